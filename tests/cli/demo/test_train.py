"""How the demo's network was trained."""

import torch

from sepconvert.cli.demo.train import merge


def test_merging_composes_the_pair():
    vertical = torch.nn.Conv2d(3, 4, (7, 1), padding=(3, 0), bias=False).double()
    horizontal = torch.nn.Conv2d(4, 5, (1, 7), padding=(0, 3), bias=False).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    merged = torch.nn.functional.conv2d(x, merge(vertical.weight, horizontal.weight), padding=3)
    torch.testing.assert_close(merged, horizontal(vertical(x)))
