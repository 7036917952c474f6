"""Make a network for super-resolution faster: how many dB does a faster one lose?

    python examples/09_super_resolution.py [--steps 1500] [--crops 200] [--max-drop 0.1] [--seconds 60]

The script trains a small network to double the resolution of photographs, and converts it within a budget of
0.1 dB of PSNR, which is scored on crops of other photographs. The original and the bicubic enlargement, which
the network adds details to, are there to compare with. Only brightness is enlarged, as is usual.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import skimage.color
import skimage.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sepconvert

SIDE = 96  # of a crop, in pixels
TRAINING = (
    "astronaut", "coffee", "camera", "brick", "grass", "gravel", "immunohistochemistry", "retina",
    "hubble_deep_field",
)  # fmt: skip
SCORING = ("chelsea", "rocket", "coins", "stereo_motorcycle")


class SuperResolution(nn.Module):
    """Convolutions on the small picture find details, which are added to its bicubic enlargement."""

    def __init__(self, width: int = 40, depth: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.details = nn.Sequential(*layers, nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return enlarged(x) + self.details(x)


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic")


def reduced(y: Tensor) -> Tensor:
    """Return pictures at half the resolution, with values from 0 to 1."""
    return F.interpolate(y, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def brightness(name: str) -> Tensor:
    """Return the brightness of a photograph of scikit-image, float32 H × W from 0 to 1."""
    image = getattr(skimage.data, name)()
    image = image[0] if isinstance(image, tuple) else image  # one of a pair
    grey = skimage.color.rgb2gray(image) if image.ndim == 3 else image / 255
    return torch.from_numpy(np.ascontiguousarray(grey)).float()


def crops(photographs: Sequence[Tensor], number: int, side: int, random: np.random.Generator) -> Tensor:
    """Return crops at random places, N × 1 × side × side, some of them mirrored."""
    found = []
    for _ in range(number):
        photo = photographs[random.integers(len(photographs))]
        top, left = (random.integers(size - side + 1) for size in photo.shape)
        crop = photo[top : top + side, left : left + side]
        crop = crop.flip(1) if random.integers(2) else crop
        found.append(crop.T if random.integers(2) else crop)
    return torch.stack(found)[:, None]


def train(model: nn.Module, photographs: Sequence[Tensor], steps: int) -> None:
    random = np.random.default_rng(0)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    model.train()
    for step in range(1, steps + 1):
        y = crops(photographs, 16, SIDE // 2, random)
        loss = F.l1_loss(model(reduced(y)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step} of {steps}: mean error {loss.item():.4f}", flush=True)
    model.eval()


def bicubic(y: Tensor) -> float:
    """Return the mean PSNR of bicubic enlargements, in dB."""
    errors = (enlarged(reduced(y)).clamp(0, 1) - y).square().flatten(1).mean(1)
    return float(-10 * errors.log10().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500, help="of training, with 16 crops each")
    parser.add_argument("--crops", type=int, default=200, help="to fit to, and as many others to score on")
    parser.add_argument("--max-drop", type=float, default=0.1, metavar="DB")
    parser.add_argument("--seconds", type=float, default=60, help="time limit for timing layers")
    options = parser.parse_args()
    torch.manual_seed(0)
    photographs, others = [brightness(name) for name in TRAINING], [brightness(name) for name in SCORING]
    model = SuperResolution()
    train(model, photographs, options.steps)

    random = np.random.default_rng(1)
    calib, y = (crops(each, options.crops, SIDE, random) for each in (photographs, others))
    x = reduced(y)
    result = sepconvert.convert(
        model, x[:1], "auto", metric="psnr", max_drop=options.max_drop,
        calib=DataLoader(reduced(calib), batch_size=50), data=DataLoader(TensorDataset(x, y), batch_size=50),
        timing=sepconvert.Timing(threads=1, measure_seconds=options.seconds),
    )  # fmt: skip
    speedup, psnr = result.speedup, result.accuracy
    print(f"bicubic: {bicubic(y):.2f} dB")
    print(
        f"PSNR: {psnr.original:.2f} → {psnr.converted:.2f} dB, lost: {psnr.drop:.3f} "
        f"[{psnr.ci95.lo:.3f}, {psnr.ci95.hi:.3f}] dB on {psnr.n} crops"
    )
    print(
        f"{speedup.median:.2f} [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}] times as fast, "
        f"{result.report['delta']['macs_ratio']:.2f}× fewer MACs"
    )


if __name__ == "__main__":
    main()
