"""Exact structures: analysis by singular values, factors, certificates."""
