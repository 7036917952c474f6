"""Pictures of the HTML report: plots, kernels, and samples with what both models make of them."""
