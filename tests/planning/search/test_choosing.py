"""The choice among measured plans: by their times, and confirmed by all images."""

import pytest
from plan_bench import Bench, delta, layer

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options.values import Budget


class Halves(Bench):
    """A bench on whose first half of the images plans lose `shift` points less than on all."""

    shift = 0.0

    @property
    def scores(self):
        return HalfScores(self)


class HalfScores:
    sizes, choosing = (2500, 5000), 2500

    def __init__(self, bench):
        self.bench = bench

    def delta(self, model, images):
        drop = self.bench.drop_of(model)
        return delta(max(0.0, drop - self.bench.shift) if images == 2500 else drop, images)

    def rest(self, model):
        return delta(self.bench.drop_of(model), 2500)


def halves(shift, **options):
    surveyed = {name: layer(400, 1.0) for name in "abcdef"}
    total, cheapest = Bench(surveyed).total, Bench(surveyed).cheapest
    made = Halves(surveyed, drop=lambda cost: 4 * (total - cost) / (total - cheapest), **options)
    made.shift = shift
    return made


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, 10.0])
@pytest.mark.parametrize("timed", [False, True])
def test_what_is_delivered_keeps_within_the_budget_on_all_images(shift, timed):
    made = halves(shift, ratio=(lambda cost: 5000 / cost) if timed else None, timed=timed)
    budget = Budget(max_drop=1.0)
    point = made.search.run(budget)
    assert made.drop(point.plan.macs) <= 1.0
    assert point.measured.accuracy.n == 5000
    choice = made.search.choice(point, point.measured.fitted.model, budget)
    if shift == 0:
        # The other half had no part in the choice.
        assert choice["images"] == choice["rest"]["n"] == 2500
    if shift == 10 and choice is not None:
        assert choice["rest"] is None  # it had: the first choice was revised
        assert choice["images"] == 5000


def test_a_plan_that_is_fixed_is_not_exchanged():
    made = halves(10.0)
    with pytest.raises(DemandNotMetError):
        made.search.run(Budget(rank=1, max_drop=1.0))


def test_without_data_there_is_no_choice_to_speak_of():
    made = Bench({name: layer(400, 1.0) for name in "ab"})
    point = made.search.run(Budget(target_macs=0.7))
    assert made.search.choice(point, point.measured.fitted.model, Budget(target_macs=0.7)) is None


def test_a_plan_that_replaces_nothing_is_not_timed():
    """The times of one model, twice, differ by noise alone: here by a factor of nine."""
    surveyed = {name: layer(400, 1.0) for name in "ab"}
    total = Bench(surveyed).total
    made = Bench(
        surveyed, drop=lambda cost: 0.0, ratio=lambda cost: 9.0 if cost == total else 2.0, timed=True
    )
    point = made.search.run(Budget(max_drop=1.0))
    assert point.plan.choice
    assert total not in made.measured["ratio"]
