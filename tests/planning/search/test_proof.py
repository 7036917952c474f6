"""Plans whose drop is proven: tested in a fixed order, up to the first that fails."""

import re
from dataclasses import replace

import numpy as np
import pytest
from plan_bench import Bench, delta, layer

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options.values import Budget
from sepconvert.planning.fits.survey import form_of
from sepconvert.planning.scores import sizes_of

CONFIDENT = Budget(max_drop=1.0, confidence=0.95)


class Growing(Bench):
    """A bench that shows as many of its images as are asked for."""

    images = 10_000

    @property
    def scores(self):
        return GrowingScores(self)


class GrowingScores:
    def __init__(self, bench):
        self.bench = bench
        self.sizes, self.choosing = sizes_of(bench.images)

    def delta(self, model, images):
        self.bench.measured["drop"].append((model.cost, images))
        return delta(self.bench.drop_of(model), images)

    def rest(self, model):
        return None


def growing(images, worst=4.0, **options):
    """Plans that lose up to `worst` points, in proportion to what they save."""
    surveyed = {name: layer(400, 1.0) for name in "abcdef"}
    total, cheapest = Bench(surveyed).total, Bench(surveyed).cheapest
    made = Growing(surveyed, drop=lambda cost: worst * (total - cost) / (total - cheapest), **options)
    made.images = images
    return made


def test_the_plan_that_is_delivered_is_proven_and_the_next_is_not():
    made = growing(10_000)
    point = made.search.run(CONFIDENT)
    tested = list(dict.fromkeys(cost for cost, _ in made.measured["drop"]))
    assert tested == sorted(tested, reverse=True)  # from the most cautious on
    assert 0 < made.drop(point.plan.macs) < 1.0
    assert made.search.measurements.is_proven(point, CONFIDENT)
    assert point.plan.macs == tested[-2]
    assert made.drop(tested[-1]) > 0.6  # what failed is near the budget, or beyond it
    choice = made.search.choice(point, point.measured.fitted.model, CONFIDENT)
    assert choice["bound"] <= 1.0
    assert choice["confidence"] == 0.95
    assert choice["plans"] == len(tested)


def test_what_is_clear_needs_few_images():
    made = growing(50_000, worst=40.0)
    with pytest.raises(DemandNotMetError):
        made.search.run(Budget(max_drop=0.001, confidence=0.95))
    assert max(images for _, images in made.measured["drop"]) < 50_000


def test_more_images_go_further():
    reached = []
    for images in (600, 5000, 200_000):
        made = growing(images)
        try:
            reached.append(made.search.run(CONFIDENT).plan.macs)
        except DemandNotMetError:
            reached.append(np.inf)
    assert reached[0] > reached[1] >= reached[2]


def test_where_nothing_is_proven_it_is_told_how_many_images_would_do():
    made = growing(300)
    with pytest.raises(DemandNotMetError, match=r"about [0-9,]+ images would prove it") as caught:
        made.search.run(CONFIDENT)
    needed = int(re.search(r"about ([0-9,]+)", str(caught.value))[1].replace(",", ""))
    assert caught.value.curve
    enough = growing(needed + needed // 50)
    assert enough.search.run(CONFIDENT).plan.choice
    hopeless = growing(300, worst=100.0)
    with pytest.raises(DemandNotMetError, match="more images would not help"):
        hopeless.search.run(CONFIDENT)


def with_exact_layer(surveyed):
    """The same layers, the first of which is exact in its highest rank."""
    first = surveyed["a"]
    exact = replace(first, exact=frozenset({form_of(first.offers[0])}), sensitivity=0.0)
    return {**surveyed, "a": exact}


def test_exact_replacements_need_no_proof():
    """Not even so few images keep them from being delivered, where everything else fails."""
    made = growing(300)
    surveyed = with_exact_layer(made.surveyed)
    made = Growing(surveyed, drop=lambda cost: 0.4 if cost > made.total - 150 else 5.0)
    made.images = 300
    point = made.search.run(CONFIDENT)
    assert list(point.plan.choice) == ["a"]
    assert not made.search.measurements.is_proven(point, CONFIDENT)


def test_exact_replacements_in_int8_need_one():
    made = growing(300)
    made = Growing(with_exact_layer(made.surveyed), drop=lambda cost: 5.0)
    made.images, made.form = 300, object()
    with pytest.raises(DemandNotMetError):
        made.search.run(CONFIDENT)


def test_among_proven_plans_the_fastest_is_taken():
    """The cheapest ones are slower than those before."""
    made = growing(50_000, ratio=lambda cost: 2.0 if cost > 1500 else 1.5, timed=True)
    point = made.search.run(CONFIDENT)
    assert point.measured.speedup.median == 2.0


def test_a_single_plan_is_proven_or_refused():
    assert growing(10_000, worst=0.5).search.run(Budget(rank=1, max_drop=1.0, confidence=0.95)).plan.choice
    with pytest.raises(DemandNotMetError):
        growing(500, worst=0.5).search.run(Budget(rank=1, max_drop=1.0, confidence=0.95))
