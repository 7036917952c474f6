"""The mathematics: structures of a kernel, exact factors with a certificate, least-squares fits to data.

It works on tensors and geometries alone and knows no `nn.Module`. `rounding` defines how small an error still
counts as exact.
"""
