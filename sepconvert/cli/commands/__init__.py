"""Commands: each takes the options of the command line, and calls the public functions."""
