"""Train the demo network and write its checkpoint: `python -m sepconvert.demo.train`.

The network is trained in the form that its structure comes from, and deployed at the end: `large` as a pair
of a 7×1 and a 1×7 convolution, `elastic` as a 3×3, and `widen` with half of its filters pruned midway.
No image is seen twice. It takes one thread and some minutes; the same machine gives the same weights.
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

from sepconvert.demo.images import TRAINING_SEED, LabelledImages, draw, evaluation_data
from sepconvert.demo.net import CHECKPOINT, ShapeNet, to_input

RANK = 16
"""Channels between the pair that becomes `large`."""

ROUNDS = 60
PRUNING_ROUND = 30
IMAGES_PER_ROUND = 1_600
BATCH = 50
LEARNING_RATE = 4e-3


def main() -> None:
    """Train, deploy, save, and print the accuracy on the evaluation split."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = train()
    with as_file(files("sepconvert.demo") / CHECKPOINT) as path:
        save_file(net.state_dict(), path)
    images = evaluation_data()
    seconds = time.perf_counter() - started
    print(f"{accuracy(net, images):.2%} of {len(images.y)} evaluation images, after {seconds:.0f} s")


def train() -> ShapeNet:
    """Return a trained network in its deployed form, in eval mode."""
    net = ShapeNet()
    vertical = nn.Conv2d(32, RANK, (7, 1), padding=(3, 0), bias=False)
    horizontal = nn.Conv2d(RANK, 32, (1, 7), padding=(0, 3), bias=False)
    core = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    deployed_large, deployed_elastic = net.large.conv, net.elastic.conv
    net.large.register_module("conv", nn.Sequential(vertical, horizontal))
    net.elastic.register_module("conv", core)

    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=ROUNDS * (IMAGES_PER_ROUND // BATCH)
    )
    for round_ in tqdm(range(ROUNDS)):
        if round_ == PRUNING_ROUND:
            prune.ln_structured(net.widen.conv, "weight", amount=0.5, n=1, dim=0)  # type: ignore[no-untyped-call]  # torch's own
        images = draw(IMAGES_PER_ROUND, TRAINING_SEED + round_)
        x, y = to_input(images.x), torch.from_numpy(images.y)
        for batch, labels in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(batch), labels))
            optimizer.step()
            schedule.step()

    prune.remove(net.widen.conv, "weight")  # type: ignore[no-untyped-call]  # torch's own
    with torch.no_grad():
        deployed_large.weight.copy_(merge(vertical.weight, horizontal.weight))
        deployed_elastic.weight.copy_(F.pad(core.weight, (1, 1, 1, 1)))
    net.large.register_module("conv", deployed_large)
    net.elastic.register_module("conv", deployed_elastic)
    return net.eval()


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
