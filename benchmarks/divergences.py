"""Does the divergence that suits a task rank plans as the task's metric does?

    python benchmarks/divergences.py [--plans 12] [--epochs 6]

Five small networks are trained on digits of scikit-learn, set into cluttered scenes. Of each, random layers
are replaced by random forms at random ranks, fitted to the weights. The table holds Spearman's rank
correlations of the drop of the metric with the divergence from the original, by the kind that is chosen for
the network and by the others that its outputs allow.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import DIVERGENCES, Divergence
from sepconvert.calibration.heldout import Heldout
from sepconvert.factorize.approximate.problem import nearest
from sepconvert.measure.divergence import yardstick_of
from sepconvert.measure.metrics.evaluation import Scoring, evaluate
from sepconvert.measure.metrics.metric import Metric
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.own import metric_of
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import traced
from sepconvert.planning.forms import all_forms

SIZE, DIGIT = 32, 16
TRAINING, SCORED = 1500, 200
WIDTH, DEPTH = 16, 6


@dataclass(frozen=True)
class Scenes:
    """Scenes N×1×SIZE×SIZE of one digit each, and what there is to know of them."""

    clean: Tensor
    noisy: Tensor
    classes: Tensor  # N
    masks: Tensor  # N×SIZE×SIZE: 0, or the class + 1
    boxes: Tensor  # N×4: centre, height and width, from 0 to 1

    def at(self, part: slice) -> "Scenes":
        """Return some of the scenes."""
        return Scenes(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def scenes(count: int, seed: int) -> Scenes:
    """Return scenes with digits of random classes, sizes and places."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    clean = torch.zeros(count, 1, SIZE, SIZE)
    classes, boxes = torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4)
    for number in range(count):
        which = rng.integers(len(digits.images))
        height, width = rng.integers(DIGIT // 2, DIGIT + 1, 2)
        top, left = rng.integers(SIZE - height), rng.integers(SIZE - width)
        picture = torch.from_numpy(digits.images[which] / 16).float()[None, None]
        shown = F.interpolate(picture, (int(height), int(width)), mode="bilinear")[0]
        clean[number, :, top : top + height, left : left + width] = shown
        classes[number] = int(digits.target[which])
        boxes[number] = torch.tensor([top + height / 2, left + width / 2, height, width]) / SIZE
    masks = torch.where(clean[:, 0] > 0.3, classes[:, None, None] + 1, 0)
    clutter = torch.from_numpy(rng.normal(0, 0.15, clean.shape)).float()
    return Scenes(clean, clean + clutter, classes, masks, boxes)


class Net(nn.Module):
    """Convolutions, and what `end` makes of their result."""

    def __init__(self, channels: int, end: Callable[[Tensor], Tensor], shortcut: bool = False) -> None:
        super().__init__()
        widths = [1, *[WIDTH] * (DEPTH - 1), channels]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=2 if 0 < place < DEPTH - 1 else 1,
                      dilation=2 if 0 < place < DEPTH - 1 else 1)
            for place, (before, after) in enumerate(itertools.pairwise(widths))
        )  # fmt: skip
        self.end, self.shortcut = end, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the result at each position."""
        y = x
        for layer in self.layers[:-1]:
            y = layer(y).relu()
        y = self.layers[-1](y)
        return self.end(x + y if self.shortcut else y)


class TwoHeads(nn.Module):
    """A class and a box of each scene."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net(WIDTH, nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.classes, self.box = nn.Linear(16 * WIDTH, 10), nn.Linear(16 * WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits N×10 and boxes N×4."""
        rows = self.pool(self.body(x)).flatten(1)
        return self.classes(rows), self.box(rows)


def heat_maps(found: Scenes) -> Tensor:
    """Return a map of each scene for each class, with a peak at the digit's centre."""
    places = (torch.arange(SIZE) + 0.5) / SIZE
    down, right = (places[None, :] - found.boxes[:, axis, None] for axis in (0, 1))
    peaks = torch.exp(-(down.square()[:, :, None] + right.square()[:, None, :]) * SIZE**2 / 8)
    return peaks[:, None] * F.one_hot(found.classes, 10)[:, :, None, None]


def distances_of_peaks(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the distance, in pixels, of the highest peak in each scene's maps from where it should be."""
    places = [maps.sum(1).flatten(1).argmax(1) for maps in (outputs, targets)]
    down, right = (places[0] // SIZE - places[1] // SIZE), (places[0] % SIZE - places[1] % SIZE)
    return (down.square() + right.square()).double().sqrt()


distances_of_peaks.higher_is_better = False  # type: ignore[attr-defined]


def overlaps_of_known(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Return how well each box is met, from 0 to 1, where the class is, and 0 elsewhere."""
    logits, boxes = outputs
    apart = (boxes - targets[:, 1:]).abs().mean(1)
    return (logits.argmax(1) == targets[:, 0]) / (1 + apart / 0.05)


@dataclass(frozen=True)
class Case:
    """A network to train, and how it is judged."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[Scenes], tuple[Tensor, Tensor]]
    loss: Callable[..., Tensor]
    metric: Metric
    asked: Divergence | None = None  # the kind, where shapes do not tell it

    @property
    def scoring(self) -> Scoring:
        """How outputs are judged."""
        return Scoring(self.metric, postprocess=lambda returned: returned)


def cases() -> list[Case]:
    """Return a case for each kind, and one with two outputs."""
    return [
        Case(
            "segmenter",
            lambda: Net(11, nn.Identity()),
            lambda found: (found.noisy, found.masks),
            lambda y, masks: F.cross_entropy(y, masks, torch.tensor([0.2] + 10 * [1.0])),
            named("miou"),
        ),
        Case(
            "binary segmenter",
            lambda: Net(1, nn.Sigmoid()),
            lambda found: (found.noisy, (found.masks > 0).long()),
            lambda y, masks: F.binary_cross_entropy(y[:, 0], masks.float()),
            named("dice"),
        ),
        Case(
            "denoiser",
            lambda: Net(1, nn.Identity(), shortcut=True),
            lambda found: (found.noisy, found.clean),
            F.mse_loss,
            named("psnr"),
        ),
        Case(
            "heat maps",
            lambda: Net(10, nn.Identity()),
            lambda found: (found.noisy, heat_maps(found)),
            lambda y, maps: 100 * F.mse_loss(y, maps),
            metric_of(distances_of_peaks),
            "relative",
        ),
        Case(
            "two heads",
            TwoHeads,
            lambda found: (found.noisy, torch.cat([found.classes[:, None], found.boxes], 1)),
            lambda y, wanted: (
                F.cross_entropy(y[0], wanted[:, 0].long()) + 10 * F.l1_loss(y[1], wanted[:, 1:])
            ),
            metric_of(overlaps_of_known),
        ),
    ]


def trained(case: Case, found: Scenes, epochs: int) -> nn.Module:
    """Return the network of a case, trained."""
    torch.manual_seed(0)
    model, (x, y) = case.model(), case.data(found)
    steps = epochs * (len(x) // 50)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            case.loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def planned(model: nn.Module, x: Tensor, rng: np.random.Generator) -> nn.Module:
    """Return a copy of a network with random layers in random forms."""
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    sites = [site for site in traced(model, (x,)).sites if all_forms(site.dense.spec)]
    chosen = rng.random(len(sites)) < rng.random()
    chosen[rng.integers(len(sites))] = True
    for site in np.array(sites, object)[chosen]:
        forms = all_forms(site.dense.spec)
        kernel = nearest(site.dense.spec, site.dense.weight, *forms[rng.integers(len(forms))])
        modules[site.name].weight.copy_(kernel)
    return changed


def correlations(
    case: Case, model: nn.Module, found: Scenes, plans: int
) -> tuple[str, dict[str, float], float]:
    """Return the kinds that are chosen, the correlation by kinds, and the value of the original's metric."""
    x, y = case.data(found)
    batches = [InputBatch((part,)) for part in x.split(100)]
    rng = np.random.default_rng(0)
    changed = [planned(model, x[:1], rng) for _ in range(plans)]
    loader = DataLoader(TensorDataset(x, y), 100)
    original = evaluate(model, loader, case.scoring)
    drops = [case.metric.drop(original.value, evaluate(each, loader, case.scoring).value) for each in changed]
    by_kinds = {}
    chosen = yardstick_of(model, batches[0], case.asked, case.metric.targets)
    for asked in (None, *DIVERGENCES):
        try:
            yardstick = chosen if asked is None else yardstick_of(model, batches[0], asked)
        except SepconvertError:  # there are no classes
            continue
        heldout = Heldout(model, batches, yardstick=yardstick)
        divergences = [heldout.measure(each).divergence for each in changed]
        by_kinds["chosen" if asked is None else asked] = float(spearmanr(drops, divergences).statistic)
    return ", ".join(chosen.names), by_kinds, original.value


def rows(plans: int, epochs: int, names: Sequence[str]) -> list[list[str]]:
    """Return a row of the table for each case."""
    training, scored = scenes(TRAINING, 0), scenes(SCORED, 1)
    table = []
    for case in cases():
        if names and case.name not in names:
            continue
        chosen, found, value = correlations(case, trained(case, training, epochs), scored, plans)
        others = [f"{found[name]:.2f}" if name in found else "" for name in ("chosen", *DIVERGENCES)]
        table.append([case.name, f"{case.metric.name} {value:.3g}", chosen, *others])
    return table


@click.command(help=__doc__)
@click.option("--plans", default=12, show_default=True, type=click.IntRange(3), help="Of each network.")
@click.option("--epochs", default=6, show_default=True, type=click.IntRange(1), help="Of each training.")
@click.option("--case", "names", multiple=True, help="Only this network. Repeatable.")
def main(plans: int, epochs: int, names: Sequence[str]) -> None:
    """Train the networks, and print the table."""
    headers = ["network", "metric", "chosen", "by it", *DIVERGENCES]
    click.echo(tabulate(rows(plans, epochs, names), headers, tablefmt="github"))


if __name__ == "__main__":
    main()
