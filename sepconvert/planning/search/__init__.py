"""The search for the plan to deliver, among those on the trade-off curve between cost and divergence."""
