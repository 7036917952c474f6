"""Foundations that every other package may use: errors, options, environment, documents, progress."""
