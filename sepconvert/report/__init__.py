"""Renders only: the report document, terminal tables, and HTML."""
