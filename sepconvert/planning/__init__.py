"""Choice of a form for each layer: forms and prices, survey, allocation, search, the plan."""
