"""Fits of layers: of all forms alone, in plans, and kept for the next conversion."""
