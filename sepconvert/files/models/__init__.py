"""Models: recognised, read from files without running them, and built by name."""
