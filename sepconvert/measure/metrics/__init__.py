"""Metrics: what a conversion may cost, measured sample by sample, with intervals of paired differences."""
