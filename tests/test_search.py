"""Which plan is delivered: surveys by hand, and measurements that are functions of the cost."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import numbered
from torch import nn

from sepconvert.approximation import Divergence, Fitted, LayerSurvey, Step, hull
from sepconvert.errors import DemandNotMetError, SepconvertError
from sepconvert.factorize.approximate import Moments, approximate
from sepconvert.measure.accuracy import AccuracyDelta
from sepconvert.measure.latency import Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.progress import silent
from sepconvert.search import Budget, Search
from sepconvert.spec import ConvSpec

SPEC = ConvSpec(4, 4, (3, 3))
WEIGHT = torch.randn(SPEC.weight_shape, generator=torch.Generator().manual_seed(0))
FITS = [
    approximate(SPEC, WEIGHT, Moments.of_weights(SPEC, WEIGHT), "depthwise-pointwise", rank)
    for rank in range(1, 5)
]
REST = 100  # MACs outside of the layers


def layer(dense_macs, sensitivity, ranks=(1, 2, 3)):
    """A layer of which each rank saves a quarter less."""
    return LayerSurvey(
        dense_macs,
        tuple(FITS[rank - 1] for rank in ranks),
        tuple(dense_macs * rank // 4 for rank in ranks),
        (1.0,) * len(ranks),
        sensitivity,
    )


class Bench:
    """A search whose measurements depend on the cost alone, and which remembers what it was asked."""

    def __init__(self, surveyed, drop=None, ratio=None):
        self.surveyed, self.carried = surveyed, []
        self.total = REST + sum(each.dense_macs for each in surveyed.values())
        self.drop, self.ratio = drop, ratio
        self.measured = {"drop": [], "ratio": []}
        self.search = Search(
            surveyed, self.total, self.carry_out, self.accuracy if drop else None,
            self.speedup if ratio else None, silent,
        )  # fmt: skip

    def cost(self, choice):
        return self.total - sum(self.surveyed[n].dense_macs - each.macs for n, each in choice.items())

    def carry_out(self, choice):
        self.carried.append(choice)
        model = nn.Module()
        model.cost = self.cost(choice)
        reached = Step("all", Divergence(0.5, None), kept=True)
        return Fitted(choice, model, {}, False, (reached,))

    def accuracy(self, model):
        self.measured["drop"].append(model.cost)
        return AccuracyDelta(self.drop(model.cost), Interval(0.0, 0.0), 1.0)

    def speedup(self, model):
        self.measured["ratio"].append(model.cost)
        return Speedup(self.ratio(model.cost), Interval(0.5, 9.0), Interval(0.9, 1.1))

    @property
    def hull(self):
        return [self.cost(choice) for choice in hull(self.surveyed)]


@st.composite
def surveys(draw, least=1):
    return {
        name: layer(4 * draw(st.integers(5, 400)), draw(st.integers(1, 100)) / 10)
        for name in "abcdef"[: draw(st.integers(least, 6))]
    }


@numbered(100)
@given(surveys(), st.floats(0.05, 1))
def test_a_share_of_macs_is_met_by_the_dearest_plan_that_can(surveyed, share):
    bench = Bench(surveyed)
    fitting = [cost for cost in bench.hull if cost <= share * bench.total]
    if not fitting:
        with pytest.raises(DemandNotMetError, match=r"--target-macs .*fewest MACs") as caught:
            bench.search.run(Budget(target_macs=share))
        assert bench.carried == []
        assert "MACs" in caught.value.details
        return
    point = bench.search.run(Budget(target_macs=share))
    assert point.macs == max(fitting)
    assert bench.carried == [point.choice]
    assert point.fitted.model.cost == point.macs


@numbered(100)
@given(surveys(), st.floats(0, 20))
def test_the_cheapest_plan_of_the_curve_within_the_drop(surveyed, most):
    def drop(cost):
        return 20 * (1 - cost / Bench(surveyed).total)

    bench = Bench(surveyed, drop=drop)
    point = bench.search.run(Budget(max_drop=most))
    assert drop(point.macs) <= most or point.choice == {}
    curve = bench.search.points
    assert [each.macs for each in curve] == sorted((each.macs for each in curve), reverse=True)
    assert all(drop(each.macs) > most for each in curve if each.macs < point.macs)
    # Each plan is carried out and measured once.
    assert all(bench.carried.count(choice) == 1 for choice in bench.carried)
    assert len(set(bench.measured["drop"])) == len(bench.measured["drop"])
    shown = bench.search.to_json(point)
    json.dumps(shown, allow_nan=False)
    assert [each["delivered"] for each in shown].count(True) == 1
    assert shown[0]["macs"] == bench.total
    assert shown[0]["converted"] == 0


@numbered(60)
@given(surveys(least=2), st.floats(1.01, 6))
def test_the_least_divergence_that_is_fast_enough(surveyed, least):
    def ratio(cost):
        return Bench(surveyed).total / cost

    bench = Bench(surveyed, ratio=ratio)
    assume(abs(ratio(min(bench.hull)) - least) > 1e-9)
    if ratio(min(bench.hull)) < least:
        with pytest.raises(DemandNotMetError, match=r"--min-speedup .*largest speed-up"):
            bench.search.run(Budget(min_speedup=least))
        return
    point = bench.search.run(Budget(min_speedup=least))
    assert ratio(point.macs) >= least
    assert all(ratio(each.macs) < least for each in bench.search.points if each.macs > point.macs)


def test_one_rank_everywhere():
    surveyed = {"a": layer(400, 1.0, (2,)), "b": layer(80, 9.0, (2,))}
    bench = Bench(surveyed, drop=lambda cost: 3.0)
    point = bench.search.run(Budget(rank=2))
    assert {name: each.rank for name, each in point.choice.items()} == {"a": 2, "b": 2}
    assert point.macs == REST + 200 + 40
    assert bench.measured["drop"] == []
    with pytest.raises(DemandNotMetError, match=r"--rank 2 and --max-drop 2 .*smallest drop 3.00 pp"):
        bench.search.run(Budget(rank=2, max_drop=2.0))


def test_demands_are_met_together():
    surveyed = {name: layer(400, 1.0) for name in "abc"}
    total = Bench(surveyed).total
    both = {"drop": lambda cost: 10 * (1 - cost / total), "ratio": lambda cost: total / cost}
    point = Bench(surveyed, **both).search.run(Budget(max_drop=6.0, min_speedup=1.5))
    assert both["drop"](point.macs) <= 6
    assert both["ratio"](point.macs) >= 1.5
    with pytest.raises(DemandNotMetError, match=r"--max-drop 1 and --min-speedup 3 .*smallest drop"):
        Bench(surveyed, **both).search.run(Budget(max_drop=1.0, min_speedup=3.0))
    point = Bench(surveyed, **both).search.run(Budget(max_drop=6.0, target_macs=0.5))
    assert point.macs <= 0.5 * total
    with pytest.raises(DemandNotMetError, match=r"--target-macs 0\.5 and --max-drop 4"):
        Bench(surveyed, **both).search.run(Budget(max_drop=4.0, target_macs=0.5))


def test_what_cannot_be_measured_cannot_be_demanded():
    surveyed = {"a": layer(400, 1.0)}
    with pytest.raises(SepconvertError, match="needs labelled data"):
        Bench(surveyed).search.run(Budget(max_drop=1.0))
    with pytest.raises(SepconvertError, match="needs timed runs"):
        Bench(surveyed).search.run(Budget(min_speedup=1.0))


def test_nothing_to_replace():
    point = Bench({}).search.run(Budget(rank=1))
    assert point.choice == {}
    point = Bench({}, drop=lambda cost: 0.0).search.run(Budget(max_drop=1.0))
    assert point.choice == {}
    with pytest.raises(DemandNotMetError, match=r"--target-macs 0\.9"):
        Bench({}).search.run(Budget(target_macs=0.9))


def test_a_model_without_macs():
    search = Search({}, 0, lambda choice: Fitted(choice, nn.Module(), {}, False), None, None, silent)
    assert search.run(Budget(target_macs=0.5)).choice == {}


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -3},
        {"target_macs": 0.0},
        {"target_macs": 1.01},
        {"target_macs": float("nan")},
        {"min_speedup": 0.0},
        {"min_speedup": float("nan")},
        {"max_drop": -0.1},
        {"max_drop": 101.0},
    ],
)
def test_budgets_out_of_range(options):
    with pytest.raises(SepconvertError, match=r"^--[a-z-]+ .*: expected"):
        Budget(**options)


def test_defaults():
    assert Budget().or_default(labelled=True) == Budget(max_drop=1.0)
    assert Budget(target_macs=1.0).or_default(labelled=False) == Budget(target_macs=1.0)
    with pytest.raises(SepconvertError, match="needs a budget"):
        Budget().or_default(labelled=False)
