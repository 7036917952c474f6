"""Train the demo network and write its checkpoint: `python -m sepconvert.cli.demo.train`.

The network is trained in the form that its structure comes from, and deployed at the end: `large` as a pair
of a 7×1 and a 1×7 convolution, `elastic` as a 3×3, and `widen` with half of its filters pruned midway.
Each time an image is seen it is turned, scaled and moved a little. Training takes a few minutes on one
thread; the same machine gives the same weights.
"""

import time
from importlib.resources import as_file, files

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from tqdm import tqdm

from sepconvert.cli.demo.images import TRAINING, LabelledImages, evaluation_data, training_data
from sepconvert.cli.demo.net import CHECKPOINT, DigitNet, to_input

RANK = 16
"""Channels between the pair that becomes `large`."""


EPOCHS = 40


PRUNING_EPOCH = 20


BATCH = 50


LEARNING_RATE = 4e-3


def main() -> None:
    """Train, deploy, save, and print the accuracy on the evaluation split."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = train()
    with as_file(files("sepconvert.cli.demo") / CHECKPOINT) as path:
        save_file(net.state_dict(), path)
    images = evaluation_data()
    seconds = time.perf_counter() - started
    print(f"{accuracy(net, images):.2%} of {len(images.y)} evaluation images, after {seconds:.0f} s")


def train() -> DigitNet:
    """Return a trained network in its deployed form, in eval mode."""
    net = DigitNet()
    vertical = nn.Conv2d(32, RANK, (7, 1), padding=(3, 0), bias=False)
    horizontal = nn.Conv2d(RANK, 32, (1, 7), padding=(0, 3), bias=False)
    core = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    deployed_large, deployed_elastic = net.large.conv, net.elastic.conv
    net.large.register_module("conv", nn.Sequential(vertical, horizontal))
    net.elastic.register_module("conv", core)

    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * (TRAINING // BATCH)
    )
    images = training_data()
    x, y = to_input(images.x), torch.from_numpy(images.y)
    for epoch in tqdm(range(EPOCHS)):
        if epoch == PRUNING_EPOCH:
            prune.ln_structured(net.widen.conv, "weight", amount=0.5, n=1, dim=0)  # type: ignore[no-untyped-call]  # torch's own
        for batch in torch.split(torch.randperm(len(y)), BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(disturb(x[batch])), y[batch]))
            optimizer.step()
            schedule.step()

    prune.remove(net.widen.conv, "weight")  # type: ignore[no-untyped-call]  # torch's own
    with torch.no_grad():
        deployed_large.weight.copy_(merge(vertical.weight, horizontal.weight))
        deployed_elastic.weight.copy_(F.pad(core.weight, (1, 1, 1, 1)))
    net.large.register_module("conv", deployed_large)
    net.elastic.register_module("conv", deployed_elastic)
    return net.eval()


def disturb(x: Tensor) -> Tensor:
    """Turn (±15°), scale (±15 %) and move (±2 pixels) each of the images `x`, N×C×H×W, at random."""
    turn, scale, right, down = (torch.empty(len(x)).uniform_(-1, 1) for _ in range(4))
    angle, scale = turn * torch.pi / 12, 1 + 0.15 * scale
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    step = 4 / x.shape[-1]  # two pixels, of a grid from -1 to 1
    rows = [torch.stack([cosine, -sine, step * right], 1), torch.stack([sine, cosine, step * down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def merge(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Compose the kernels `vertical`, R×C×K×1, and `horizontal`, O×R×1×L, into one, O×C×K×L, in float64."""
    return torch.einsum("rci,orj->ocij", vertical.double().squeeze(3), horizontal.double().squeeze(2))


@torch.no_grad()
def accuracy(net: nn.Module, images: LabelledImages) -> float:
    """Return the fraction of `images` that `net` classifies correctly."""
    guesses = [net(to_input(x)).argmax(1) for x in np.array_split(images.x, 20)]
    return float(np.mean(torch.cat(guesses).numpy() == images.y))


if __name__ == "__main__":
    main()
