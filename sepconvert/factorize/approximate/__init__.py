"""Approximate structures: fits in the metric of the data by alternating least squares."""
