"""Public operations: convert, inspect, apply."""
