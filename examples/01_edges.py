"""Find out which classical image filters separate, and apply them to a photograph.

    python examples/01_edges.py [--figure edges.png]

The Sobel kernel is [1 2 1]ᵀ times [-1 0 1], and a Gaussian is a product of two vectors as well: six
multiplications per pixel instead of nine, for the same image. A Laplacian is not such a product and is left
unchanged.
"""

import argparse

import torch
from matplotlib.figure import Figure
from skimage.data import camera
from torch import Tensor, nn

import sepconvert

PHOTO = torch.from_numpy(camera()).float()[None, None]  # whole numbers, so that sums are exact
FILTERS = {
    "Sobel": [[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]],
    "Gaussian": [[1 / 16, 1 / 8, 1 / 16], [1 / 8, 1 / 4, 1 / 8], [1 / 16, 1 / 8, 1 / 16]],
    "Laplacian": [[0.0, 1, 0], [1, -4, 1], [0, 1, 0]],
}


def filter_of(kernel: list[list[float]]) -> nn.Module:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)
    layer.weight.data = torch.tensor(kernel)[None, None]
    return nn.Sequential(layer).eval()


def whole(vector: Tensor) -> str:
    """Format a vector up to scale, in whole numbers where possible."""
    values = vector.flatten() / vector.abs()[vector.abs() > 1e-6].min()
    return "[" + " ".join(f"{value:.3g}" for value in (values + 0.0).tolist()) + "]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", help="draw the photograph and the filtered images")
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].set_title("photograph")
    axes[0].imshow(PHOTO[0, 0].numpy(), cmap="gray")
    options = parser.parse_args()
    for axis, (name, kernel) in zip(axes[1:], FILTERS.items(), strict=True):
        model = filter_of(kernel)
        result = sepconvert.convert(model, PHOTO, check="torch")
        (layer,) = result.report["layers"]
        with torch.no_grad():
            before, after = model(PHOTO), result.model(PHOTO)
        difference = f"{float((after - before).abs().max()):.0e}"
        macs = [profile.macs // PHOTO.numel() for profile in (result.original, result.converted)]
        if layer["decision"] == "converted":
            column, row = (convolution.weight for convolution in result.model[0].convolutions)
            print(f"{name}: {whole(column)}ᵀ × {whole(row)}, {macs[0]} → {macs[1]} multiplications a pixel, "
                  f"images differ by {difference}")  # fmt: skip
            axis.set_title(f"{name}: {macs[0]} → {macs[1]} multiplications")
        else:
            values = ", ".join(f"{value:.3g}" for value in torch.linalg.svdvals(torch.tensor(kernel)))
            print(f"{name}: kept, {layer['reason']}; singular values {values}")
            axis.set_title(f"{name}: does not separate")
        axis.imshow(after[0, 0].numpy(), cmap="gray")
    if options.figure:
        for axis in axes:
            axis.axis("off")
        figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
