"""Surveys made by hand, and a workshop whose measurements are functions of a plan's cost."""

from itertools import product

import torch
from hypothesis import strategies as st
from torch import nn

from sepconvert.base.progress import silent
from sepconvert.calibration.heldout import Divergence
from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.evaluation import TOP1, MetricDelta
from sepconvert.measure.metrics.uncertainty import Discordant
from sepconvert.measure.statistics import Interval
from sepconvert.planning.fits.learnt import Learnt
from sepconvert.planning.fits.survey import LayerSurvey, Offer
from sepconvert.planning.search.curve import Totals
from sepconvert.planning.search.search import Search
from sepconvert.planning.workshop import Fitted, Step, StepKind

SPEC = ConvSpec(4, 4, (3, 3))
WEIGHT = torch.randn(SPEC.weight_shape, generator=torch.Generator().manual_seed(0))
FITS = [
    Problem(SPEC, WEIGHT, Moments.of_weights(SPEC, WEIGHT)).fit("depthwise-pointwise", rank)
    for rank in range(1, 5)
]
REST = 100  # MACs outside of the layers


def layer(macs, sensitivity, ranks=(3, 2, 1)):
    """A layer of which each rank saves a quarter less."""
    offers = tuple(Offer(FITS[rank - 1], macs * rank // 4, macs * rank // 4) for rank in ranks)
    return LayerSurvey(macs, macs, offers, sensitivity)


IMAGES = 10**4


def delta(drop, n=IMAGES):
    """A drop in percentage points, measured on n images."""
    lost = max(0, min(n, round(drop * n / 100)))
    return MetricDelta(TOP1, 90.0, 90.0 - drop, drop, Discordant(lost, 0, n))


class BenchScores:
    """Drops of a bench's models, each measured once, on all of the images."""

    sizes, choosing = (IMAGES,), IMAGES

    def __init__(self, bench):
        self.bench = bench

    def delta(self, model, images):
        known = self.bench.known
        if id(model) not in known:
            self.bench.measured["drop"].append(model.cost)
            known[id(model)] = model, delta(self.bench.drop_of(model))
        return known[id(model)][1]

    def rest(self, model):
        return None


class Bench:
    """A workshop whose measurements depend on the cost alone, and which remembers what it has measured."""

    progress = staticmethod(silent)
    learnt = Learnt()
    form = None

    def __init__(self, surveyed, drop=None, ratio=None, timed=False, idle=(), divergence=None):
        self.surveyed, self.carried = surveyed, []
        self.total = REST + sum(each.macs for each in surveyed.values())
        self.drop, self.ratio, self.idle, self.diverges = drop, ratio, idle, divergence
        self.compares_outputs, self.times_plans = divergence is not None, ratio is not None
        self.measured, self.known = {"drop": [], "ratio": []}, {}
        self.search = Search(
            surveyed, self, Totals(self.total, self.total, "milliseconds" if timed else "macs")
        )

    def cost(self, choice):
        layers = {name: (self.surveyed[name], each) for name, each in choice.items()}
        return self.total - sum(layer.macs - layer.offer(each).macs for layer, each in layers.values())

    def model(self, choice):
        model = nn.Module()
        # Layers that are idle bring nothing when they are replaced.
        model.cost = self.cost({name: each for name, each in choice.items() if name not in self.idle})
        model.choice = choice
        return model

    def carry_out(self, choice):
        self.carried.append(choice)
        model = self.model(choice)
        step = Step(StepKind.DATA, "all", Divergence(self.divergence(model), None), kept=True)
        return Fitted(choice, model, {}, {}, False, (step,))

    def sketched(self, choice):
        return self.model(choice)

    def divergence(self, model):
        return self.diverges(model) if self.diverges else 0.5

    def restored(self, fitted, name):
        return self.model({n: each for n, each in fitted.choice.items() if n != name})

    @property
    def scores(self):
        return None if self.drop is None else BenchScores(self)

    def drop_of(self, model):
        return self.drop(model.cost)

    def speedups(self, models):
        self.measured["ratio"] += [model.cost for model in models]
        ratios = [self.ratio(model.cost) for model in models]
        return [Speedup(ratio, Interval(0.99 * ratio, 1.01 * ratio), Interval(0.9, 1.1)) for ratio in ratios]

    @property
    def cheapest(self):
        return self.total - sum(each.macs - each.offers[-1].macs for each in self.surveyed.values())

    def best_within(self, cost):
        """The least expected divergence of all plans within a cost; None if there is none."""
        options = [
            [(each.macs, 0.0), *((c.cost, c.error) for c in each.candidates())]
            for each in self.surveyed.values()
        ]
        totals = [tuple(map(sum, zip((REST, 0), *chosen, strict=True))) for chosen in product(*options)]
        return min((error for total, error in totals if total <= cost), default=None)


@st.composite
def surveys(draw, least=1, most=6):
    return {
        name: layer(4 * draw(st.integers(5, 400)), draw(st.integers(1, 100)) / 10)
        for name in "abcdef"[: draw(st.integers(least, most))]
    }
