"""Simulation of `confidence`: how often is its promise kept, and how much speed does it cost?

    python benchmarks/confidence.py [--repetitions 1000]

Twelve plans lose from 0.05 to 4 points of accuracy, and each saves more than the one before. They are tested
by the code of `sepconvert.planning.search.proof`, on images that are drawn at random, so that the truth is
known. Images are lost by several plans together (a plan loses what a more cautious one loses, and some more)
or by each on its own. Beside it stands the choice by the measured drop alone, as without `confidence`.
"""

from collections.abc import Callable
from types import SimpleNamespace

import click
import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from sepconvert.base.options.values import Budget
from sepconvert.measure.metrics.evaluation import TOP1, MetricDelta
from sepconvert.measure.metrics.uncertainty import Discordant
from sepconvert.planning.scores import sizes_of
from sepconvert.planning.search.curve import Measurement, Point
from sepconvert.planning.search.measurements import Measurements
from sepconvert.planning.search.proof import proven_in_order

DROPS = np.geomspace(0.05, 4, 12)  # percentage points, of the plans in order
SPEEDUPS = np.geomspace(1.1, 3, 12)
CHURN = 0.02  # share of images that a plan wins back, and loses again beside its drop


class Drawn:
    """The scores of all plans on images that were drawn once."""

    def __init__(self, images: int, correlated: bool, rng: np.random.Generator) -> None:
        self.sizes, self.choosing = sizes_of(images)
        # Whether a plan loses an image (1), wins it (-1) or leaves it (0), by thresholds of one random number
        # for all plans, or of one for each.
        draws = rng.random((1 if correlated else len(DROPS), images))
        lost = (DROPS / 100 + CHURN)[:, None]
        self.signs = (draws < lost).astype(np.int8) - ((draws >= lost) & (draws < lost + CHURN)).astype(
            np.int8
        )

    def delta(self, plan: int, images: int) -> MetricDelta:
        """Return the drop of a plan on the first images."""
        signs = self.signs[plan, :images]
        lost, won = int((signs == 1).sum()), int((signs == -1).sum())
        drop = 100 * (lost - won) / images
        return MetricDelta(TOP1, 100.0, 100.0 - drop, drop, Discordant(lost, won, images))


def proven(scores: Drawn, budget: Budget) -> int | None:
    """Return the plan that `confidence` delivers; None if there is none."""
    measurements = Measurements(SimpleNamespace(scores=scores))
    points = [Point(None, Measurement(fitted=SimpleNamespace(model=plan))) for plan in range(len(DROPS))]
    found = proven_in_order(points, measurements, budget)
    confirmed = [point for point in found if measurements.is_proven(point, budget, on_all=True)]
    return confirmed[-1].measured.fitted.model if confirmed else None


def measured(scores: Drawn, budget: Budget) -> int | None:
    """Return the furthest plan whose measured drop is within the budget."""
    within = [
        plan for plan in range(len(DROPS)) if scores.delta(plan, scores.sizes[-1]).drop <= budget.max_drop
    ]
    return within[-1] if within else None


def simulated(
    choose: Callable[[Drawn, Budget], int | None], images: int, correlated: bool, repetitions: int
) -> tuple[float, float, float]:
    """Return the share of choices that keep within 1 point, the share delivered, and the speed-up."""
    budget = Budget(max_drop=1.0, confidence=0.95)
    rng = np.random.default_rng(0)
    chosen = [choose(Drawn(images, correlated, rng), budget) for _ in range(repetitions)]
    kept = np.mean([plan is None or DROPS[plan] <= budget.max_drop for plan in chosen])
    found: npt.NDArray[np.float64] = np.array([1.0 if plan is None else SPEEDUPS[plan] for plan in chosen])
    return float(kept), float(np.mean([plan is not None for plan in chosen])), float(found.mean())


@click.command(help=__doc__)
@click.option("--repetitions", default=1000, show_default=True, help="Draws of each number of images.")
def main(repetitions: int) -> None:
    """Print the table."""
    best = SPEEDUPS[DROPS <= 1.0][-1]
    rows = []
    for images in (500, 2000, 10_000):
        for correlated in (True, False):
            row: list[object] = [f"{images:,}", "together" if correlated else "each on its own"]
            for choose in (proven, measured):
                kept, delivered, speedup = simulated(choose, images, correlated, repetitions)
                row += [f"{100 * kept:.1f} %", f"{100 * delivered:.0f} %", f"{speedup:.2f}×"]
            rows.append(row)
    headers = ["images", "lost", "kept", "delivered", "speed-up", "kept", "delivered", "speed-up"]
    click.echo(
        f"{repetitions} repetitions; max_drop 1, confidence 0.95; the best plan within it is {best:.2f}×\n"
    )
    click.echo("First three figures: with confidence; last three: by the measured drop alone.\n")
    click.echo(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
