"""Measurements, each with its unit, its convention and its interval: cost, latency, metrics, differences."""
