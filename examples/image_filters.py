"""Separate fixed filters in functional convolutions, and count what that saves.

    python examples/image_filters.py

A module that computes edges and blurs with `F.conv2d` has no `nn.Conv2d` at all. The Gaussians and the Scharr
filter separate exactly, and larger kernels save more; the Laplacian does not separate.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconvert
from sepconvert.report.text.tables import layer_table


def gaussian(size: int, sigma: float) -> Tensor:
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    bell = torch.exp(-(x**2) / (2 * sigma**2))
    bell /= bell.sum()
    return torch.outer(bell, bell).float()[None, None]


class ImageFilters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fine", gaussian(5, 1.0))
        self.register_buffer("coarse", gaussian(11, 2.5))
        self.register_buffer("scharr", torch.tensor([[[[-3.0, 0, 3], [-10, 0, 10], [-3, 0, 3]]]]))
        self.register_buffer("laplacian", torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]]))

    def forward(self, x: Tensor) -> Tensor:
        fine = F.conv2d(x, self.fine, padding=2)
        coarse = F.conv2d(x, self.coarse, padding=5)
        edges = F.conv2d(fine - coarse, self.scharr, padding=1)
        return torch.cat([edges, F.conv2d(fine, self.laplacian, padding=1)], dim=1)


def main() -> None:
    model, image = ImageFilters(), torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    result = sepconvert.convert(model, image, mode="exact", timing=sepconvert.Timing(runs=20))
    print(layer_table(result.report["layers"]))
    difference = (result.model(image) - model(image)).abs().max()
    print(f"MACs: {result.report['delta']['macs_ratio']:.2f}× fewer; outputs differ by {difference:.1e}")


if __name__ == "__main__":
    main()
