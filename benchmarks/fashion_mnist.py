"""Train a small ResNet on Fashion-MNIST, and write data and weights as sepconvert reads them.

    python benchmarks/fashion_mnist.py /usr/share/datasets/fashion-mnist fmnist
    sepconvert fmnist/fmnist.pt --factory benchmarks/fashion_mnist.py:resnet8 --mode auto \
        --calib fmnist/train.npz --data fmnist/val.npz --mean .2860 --std .3530

The first folder holds the data set's four .gz files (Debian's package dataset-fashion-mnist puts them there).
"""

import gzip
import time
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.files.data import Preprocess, load_data
from sepconvert.measure.metrics.evaluation import evaluate

MEAN, STD = (0.2860,), (0.3530,)
_BATCH = 128


class Block(nn.Module):
    """Two 3×3 convolutions, and a 1×1 convolution as shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """N × C × H × W → N × channels × H / stride × W / stride."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet8() -> nn.Sequential:
    """ResNet-8 for 1×28×28 images: stages of one block with 32, 64 and 128 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array in the IDX format of MNIST: two zero bytes, type 8 (uint8), dimensions, big-endian sizes."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape.tolist())


def write_npz(source: Path, prefix: str, path: Path) -> None:
    """One half of the data set, `train` or `t10k`, as an .npz with x N×28×28×1 and y N."""
    x = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")[..., None]
    np.savez_compressed(path, x=x, y=read_idx(source / f"{prefix}-labels-idx1-ubyte.gz"))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """SGD with one cycle of the learning rate; mirrored images are the only augmentation."""
    steps = epochs * (len(x) // _BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    start = time.perf_counter()
    for epoch in range(epochs):
        # Whole batches alone: so many steps the schedule has.
        for chosen in torch.randperm(len(x))[: len(x) // _BATCH * _BATCH].split(_BATCH):
            mirrored = torch.rand(len(chosen), 1, 1, 1) < 0.5
            images = torch.where(mirrored, x[chosen].flip(3), x[chosen])
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--epochs", default=5, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(source: Path, out: Path, epochs: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_npz(source, "train", out / "train.npz")
    write_npz(source, "t10k", out / "val.npz")
    preprocess = Preprocess(MEAN, STD)
    x, y = (torch.cat(part) for part in zip(*load_data(str(out / "train.npz"), preprocess), strict=True))
    torch.manual_seed(seed)
    model = resnet8().to(memory_format=torch.channels_last)
    train(model, x, y, epochs)
    torch.save(model.to(memory_format=torch.contiguous_format).state_dict(), out / "fmnist.pt")
    accuracy = evaluate(model, load_data(str(out / "val.npz"), preprocess)).accuracy()
    print(f"{100 * accuracy.top1:.2f} % of {accuracy.n} test images")


if __name__ == "__main__":
    main()
