"""Options as values, and their declaration."""
