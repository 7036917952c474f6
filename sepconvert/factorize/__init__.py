"""Tensors only: structures, exact analysis and factors. No `nn.Module` in here."""
