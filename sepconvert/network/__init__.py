"""The PyTorch model: where its convolutions are, what stands in the way of each, how it is rewritten."""
