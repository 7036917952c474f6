"""The plan that is delivered, with surveys made by hand and measurements that are functions of the cost."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_bench import REST, Bench, layer, surveys
from strategies import numbered

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options.values import Budget
from sepconvert.measure.latency import Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.planning.search.curve import Totals
from sepconvert.planning.search.search import Search


@numbered(60)
@given(surveys(most=4), st.floats(0.05, 1))
def test_a_share_of_macs_is_met_by_the_best_plan_that_can(surveyed, share):
    bench = Bench(surveyed)
    best = bench.best_within(share * bench.total)
    if best is None:
        with pytest.raises(DemandNotMetError, match=r"`target_macs` .*fewest MACs") as caught:
            bench.search.run(Budget(target_macs=share))
        assert bench.carried == []
        assert len(caught.value.curve) == len(bench.search.points)
        assert all(point["macs"] >= share * bench.total - 1e-9 for point in caught.value.curve)
        return
    point = bench.search.run(Budget(target_macs=share))
    assert point.plan.macs <= share * bench.total * (1 + 1e-9)
    assert point.plan.expected == pytest.approx(best)
    assert point.plan.bound <= point.plan.expected + 1e-9
    assert bench.carried[0] == point.plan.choice
    converting = [each for each in bench.search.points if each.plan.choice]
    assert sum(each.measured.fitted is not None for each in converting) >= min(5, len(converting))
    assert point.measured.fitted.model.cost == point.plan.macs


@numbered(60)
@given(surveys(), st.floats(0, 20))
def test_a_plan_within_the_drop_goes_as_far_as_it_can(surveyed, most):
    def drop(cost):
        return 20 * (1 - cost / Bench(surveyed).total)

    bench = Bench(surveyed, drop=drop)
    point = bench.search.run(Budget(max_drop=most))
    assert drop(point.plan.macs) <= most or point.plan.choice == {}
    curve = bench.search.points
    assert [each.plan.cost for each in curve] == sorted((each.plan.cost for each in curve), reverse=True)
    converting = [each for each in curve if each.plan.choice]
    assert sum(each.measured.fitted is not None for each in converting) >= min(5, len(converting))
    # None of the plans that were found to be good goes further.
    good = [cost for cost in bench.measured["drop"] if drop(cost) <= most]
    assert point.plan.macs == min(good, default=bench.total)
    # Each plan is carried out and measured once.
    assert all(bench.carried.count(choice) == 1 for choice in bench.carried)
    shown = bench.search.to_json(point)
    json.dumps(shown, allow_nan=False)
    assert [each["delivered"] for each in shown].count(True) == 1
    assert shown[0]["macs"] == bench.total
    assert shown[0]["converted"] == 0


@numbered(60)
@given(surveys(least=2), st.floats(1.15, 6))  # which is beyond the noise, see `Bench.speedups`
def test_the_least_divergence_that_is_fast_enough(surveyed, least):
    def ratio(cost):
        return Bench(surveyed).total / cost

    bench = Bench(surveyed, ratio=ratio)
    assume(abs(ratio(bench.cheapest) - least) > 1e-9)
    if ratio(bench.cheapest) < least:
        with pytest.raises(DemandNotMetError, match=r"`min_speedup` .*largest speed-up"):
            bench.search.run(Budget(min_speedup=least))
        return
    point = bench.search.run(Budget(min_speedup=least))
    assert ratio(point.plan.macs) >= least
    timed = [each for each in bench.search.points if each.measured.speedup is not None]
    # No dearer one was beyond doubt; see `Bench.speedups` for the intervals.
    assert all(0.99 * ratio(each.plan.macs) < least for each in timed if each.plan.cost > point.plan.cost)


def test_a_plan_that_is_fast_enough_by_chance_is_the_second_choice():
    surveyed = {name: layer(400, 1.0) for name in "abcdef"}
    total = Bench(surveyed).total
    for about in (1.3, 1.5, 2.0):
        found = Bench(surveyed, ratio=lambda cost: total / cost).search.run(Budget(min_speedup=about))
        least = 0.995 * found.measured.speedup.median  # which that plan has by less than its interval
        bench = Bench(surveyed, ratio=lambda cost: total / cost)
        point = bench.search.run(Budget(min_speedup=least))
        assert point.measured.speedup.ci95.lo >= least
    # Where no plan is so beyond doubt, one that was measured to be is delivered.
    fastest = total / bench.cheapest
    point = Bench(surveyed, ratio=lambda cost: total / cost).search.run(Budget(min_speedup=0.995 * fastest))
    assert point.measured.speedup.ci95.lo < 0.995 * fastest <= point.measured.speedup.median


def test_plans_are_timed_before_they_are_fitted():
    surveyed = {name: layer(macs, 1.0) for name, macs in zip("abcdef", range(300, 900, 100), strict=True)}
    total = Bench(surveyed).total
    bench = Bench(surveyed, ratio=lambda cost: total / cost)
    bench.search.run(Budget(min_speedup=1.7))
    looked_at = [each for each in bench.search.points if each.measured.speedup is not None]
    assert any(each.measured.fitted is None for each in looked_at)
    assert sum(each.measured.fitted is not None for each in looked_at) >= 5


def test_layers_that_bring_nothing_in_the_whole_model_stay_dense():
    surveyed = {name: layer(400, 1.0) for name in "abc"}
    total = Bench(surveyed).total
    bench = Bench(surveyed, ratio=lambda cost: total / cost, timed=True, idle=("b",))
    point = bench.search.run(Budget(min_speedup=1.2))
    assert "b" not in point.plan.choice
    assert {"a", "c"} & set(point.plan.choice)
    assert point in bench.search.points
    assert point.measured.speedup.median >= 1.2


class Noisy(Bench):
    """Plans of which one layer has been restored seem to be faster than they are."""

    def speedups(self, models):
        layers = len(self.surveyed)
        return [
            Speedup(1.05 * each.median, each.ci95, each.noise_floor)
            if len(model.choice) == layers - 1
            else each
            for each, model in zip(super().speedups(models), models, strict=True)
        ]


def test_layers_that_only_noise_calls_idle_stay_converted():
    surveyed = {name: layer(4, 1.0) for name in "abcd"}
    total = Bench(surveyed).total
    bench = Noisy(surveyed, drop=lambda cost: 0.0, ratio=lambda cost: total / cost, timed=True)
    point = bench.search.run(Budget(max_drop=1.0))
    assert set(point.plan.choice) == set("abcd")


def test_the_fastest_of_the_plans_within_the_budget_is_delivered():
    """The search goes by predicted times, of which the cheapest plans here fall short."""
    surveyed = {name: layer(400, 1.0) for name in "abcdef"}
    total = Bench(surveyed).total

    def ratio(cost):
        return total / cost if cost > 0.4 * total else 1.1

    bench = Bench(surveyed, drop=lambda cost: 0.0, ratio=ratio, timed=True)
    point = bench.search.run(Budget(max_drop=1.0))
    within = [
        each.measured.speedup.median
        for each in bench.search.points
        if each.measured.accuracy and each.measured.speedup
    ]
    assert point.measured.speedup.median == max(within)
    assert point.measured.speedup.median > 1.3


def test_a_plan_that_is_slower_as_a_whole_is_not_delivered():
    surveyed = {name: layer(400, 1.0) for name in "ab"}
    total = Bench(surveyed).total
    for beginning, delivered in ((0.7, False), (0.9, True)):  # the second is within noise
        bench = Bench(
            surveyed, drop=lambda cost: 0.0, timed=True,
            ratio=lambda cost, beginning=beginning: beginning + 0.01 * total / cost,
        )  # fmt: skip
        assert bool(bench.search.run(Budget(max_drop=1.0)).plan.choice) is delivered


class Fickle(Bench):
    """Plans that are fast enough until they are timed beside themselves without one of their layers."""

    def speedups(self, models):
        busy = 0.2 if len(models) > 2 else 1.0
        return [
            Speedup(busy * each.median, Interval(busy * each.ci95.lo, busy * each.ci95.hi), each.noise_floor)
            for each in super().speedups(models)
        ]


def test_a_plan_that_turns_out_slower_does_not_meet_a_demand_of_speed():
    """Nothing replaced is no answer then."""
    surveyed = {name: layer(400, 1.0) for name in "ab"}
    total = Bench(surveyed).total
    bench = Fickle(surveyed, ratio=lambda cost: total / cost, timed=True)
    with pytest.raises(DemandNotMetError, match=r"`min_speedup` 1.4: .* is 0\.30× as fast when timed again"):
        bench.search.run(Budget(min_speedup=1.4))


def test_sensitivities_are_corrected_among_replaced_layers():
    """Alone, both layers count alike; where both are replaced, the errors of "a" count tenfold."""
    surveyed = {"a": layer(400, 1.0), "b": layer(400, 1.0)}

    def divergence(model):
        return sum(
            {"a": 10.0, "b": 1.0}[name] * surveyed[name].offer(each).error
            for name, each in model.choice.items()
        )

    total = Bench(surveyed).total
    bench = Bench(surveyed, ratio=lambda cost: total / cost, divergence=divergence)
    point = bench.search.run(Budget(min_speedup=1.5))
    corrected = {name: each.sensitivity for name, each in bench.search.curve.surveyed.items()}
    assert corrected["a"] == pytest.approx(10**0.5)
    assert corrected["b"] == pytest.approx(1.0)
    assert point.plan.choice["b"].rank <= point.plan.choice["a"].rank if "a" in point.plan.choice else True
    # The plan that was learnt from is on the curve as well, by what was learnt.
    carried_out = [each for each in bench.search.points if each.measured.fitted is not None]
    assert len(bench.carried) == len({id(each.measured.fitted) for each in carried_out})
    for each in carried_out:
        errors = (corrected[n] * surveyed[n].offer(c).error for n, c in each.plan.choice.items())
        assert each.plan.expected == pytest.approx(sum(errors))
        assert 0 < each.plan.bound <= each.plan.expected * (1 + 1e-9)


@pytest.mark.parametrize("budget", [Budget(max_drop=2.0), Budget(target_macs=0.5), Budget(min_speedup=2.0)])
def test_a_form_that_errs_far_beyond_what_its_layer_does_is_left_out(budget):
    """Rank 2 and 1 of "a" seem to cost little, and lose everything."""
    surveyed = {name: layer(400, 0.01 if name == "a" else 1.0) for name in "abcdef"}

    def lost(choice):
        return 50.0 if "a" in choice and choice["a"].rank <= 2 else 0.0

    def divergence(model):
        errors = (surveyed[n].sensitivity * surveyed[n].offer(each).error for n, each in model.choice.items())
        return sum(errors) + lost(model.choice)

    total = Bench(surveyed).total

    class Losing(Bench):
        def drop_of(self, model):
            return 4 * (1 - model.cost / total) + lost(model.choice)

    bench = Losing(surveyed, drop=True, ratio=lambda cost: total / cost, divergence=divergence)
    # Learnt alone: nothing corrects the sensitivity before.
    bench.search.learner.learn_sensitivities = lambda point: None
    point = bench.search.run(budget)
    assert lost(point.plan.choice) == 0
    assert point.plan.choice["a"].rank == 3
    assert any(lost(each.plan.choice) for each in bench.search.points if each.measured.fitted)
    # What a plan is expected to do is now near to what it does.
    for each in bench.search.points:
        if each.measured.fitted is not None and each.plan.choice:
            assert each.measured.fitted.heldout.divergence < 8 * each.plan.expected
    # Without images held out there is nothing to be surprised by.
    blind = Losing(surveyed, drop=True, ratio=lambda cost: total / cost)
    assert (lost(blind.search.run(budget).plan.choice) > 0) is (budget.max_drop is None)


@pytest.mark.parametrize("gain", [0.6, 0.8, 1.0, 1.2])
def test_what_forms_save_is_corrected_by_what_whole_plans_do(gain):
    """Among each other, forms save `gain` times what they save alone."""
    surveyed = {name: layer(400 + 100 * number, 1.0) for number, name in enumerate("abcd")}

    class Together(Bench):
        def model(self, choice):
            model = super().model(choice)
            model.cost = self.total - gain * (self.total - model.cost)
            return model

    total = Bench(surveyed).total
    bench = Together(
        surveyed, drop=lambda cost: 10 * (1 - cost / total), ratio=lambda cost: total / cost, timed=True
    )
    point = bench.search.run(Budget(max_drop=5.0))
    timed = [each for each in bench.search.points if each.measured.speedup is not None]
    assert point in timed
    assert len(timed) > 3
    for each in timed:
        assert each.plan.predicted == pytest.approx(each.measured.speedup.median, rel=0.02)


@numbered(30)
@given(surveys(least=2), st.floats(0.5, 8))
def test_a_plan_is_on_the_curve_once_whatever_was_learnt_of_it(surveyed, allowed):
    total = Bench(surveyed).total
    bench = Bench(
        surveyed, drop=lambda cost: 10 * (1 - cost / total), ratio=lambda cost: total / cost,
        divergence=lambda model: 3 * sum(each.error for each in model.choice.values()),
    )  # fmt: skip
    bench.search.run(Budget(max_drop=allowed))
    forms = [each.plan.forms for each in bench.search.points]
    assert all(forms.count(each) == 1 for each in forms)


def test_a_plan_that_was_timed_fast_enough_is_delivered_though_cheaper_ones_are_not():
    surveyed = {name: layer(400, 1.0) for name in "abc"}
    total, cheapest = Bench(surveyed).total, Bench(surveyed).cheapest
    bench = Bench(surveyed, ratio=lambda cost: 0.5 if cost == cheapest else total / cost)
    point = bench.search.run(Budget(min_speedup=1.2))
    assert point.plan.cost > cheapest
    assert point.measured.speedup.median >= 1.2


def test_where_no_plan_is_fast_enough_it_is_shown_how_fast_plans_are():
    surveyed = {name: layer(400, 1.0) for name in "abc"}
    total = Bench(surveyed).total
    bench = Bench(surveyed, drop=lambda cost: 10 * (1 - cost / total), ratio=lambda cost: total / cost)
    with pytest.raises(DemandNotMetError, match="largest speed-up") as caught:
        bench.search.run(Budget(max_drop=0.0, min_speedup=50.0))
    carried_out = [
        each for each in bench.search.points if each.plan.choice and each.measured.fitted is not None
    ]
    assert len(carried_out) >= 5
    fastest = max(each.measured.speedup.median for each in carried_out)
    assert fastest > 1.5
    assert f"largest speed-up {fastest:.2f}× of" in str(caught.value)


def test_one_rank_everywhere():
    surveyed = {"a": layer(400, 1.0, (2,)), "b": layer(80, 9.0, (2,))}
    bench = Bench(surveyed, drop=lambda cost: 3.0)
    point = bench.search.run(Budget(rank=2))
    assert {name: each.rank for name, each in point.plan.choice.items()} == {"a": 2, "b": 2}
    assert point.plan.macs == REST + 200 + 40
    assert bench.measured["drop"] == [point.plan.macs]  # what is delivered is measured, demanded or not
    assert bench.search.to_json(point)[0]["accuracy_drop_pp"]["value"] == 3.0
    with pytest.raises(DemandNotMetError, match=r"`rank` 2 and `max_drop` 2 .*smallest drop 3.00 pp"):
        bench.search.run(Budget(rank=2, max_drop=2.0))


def test_of_two_forms_of_one_rank_the_cheaper_is_taken():
    surveyed = {"a": layer(400, 1.0, (3, 2))}
    point = Bench(surveyed).search.run(Budget(rank=2))
    assert point.plan.macs == REST + 200


def test_demands_are_met_together():
    surveyed = {name: layer(400, 1.0) for name in "abc"}
    total = Bench(surveyed).total
    both = {"drop": lambda cost: 10 * (1 - cost / total), "ratio": lambda cost: total / cost}
    point = Bench(surveyed, **both).search.run(Budget(max_drop=6.0, min_speedup=1.5))
    assert both["drop"](point.plan.macs) <= 6
    assert both["ratio"](point.plan.macs) >= 1.5
    with pytest.raises(DemandNotMetError, match=r"`max_drop` 1 and `min_speedup` 3 .*smallest drop"):
        Bench(surveyed, **both).search.run(Budget(max_drop=1.0, min_speedup=3.0))
    point = Bench(surveyed, **both).search.run(Budget(max_drop=6.0, target_macs=0.5))
    assert point.plan.macs <= 0.5 * total
    with pytest.raises(DemandNotMetError, match=r"`target_macs` 0\.5 and `max_drop` 4"):
        Bench(surveyed, **both).search.run(Budget(max_drop=4.0, target_macs=0.5))


def test_nothing_to_replace():
    point = Bench({}).search.run(Budget(rank=1))
    assert point.plan.choice == {}
    point = Bench({}, drop=lambda cost: 0.0).search.run(Budget(max_drop=1.0))
    assert point.plan.choice == {}
    with pytest.raises(DemandNotMetError, match=r"`target_macs` 0\.9"):
        Bench({}).search.run(Budget(target_macs=0.9))


def test_a_model_without_macs():
    search = Search({}, Bench({}), Totals(macs=0, cost=0))
    assert search.run(Budget(target_macs=0.5)).plan.choice == {}


# Demands that are not met ---------------------------------------------------------------------------


def unmet(budget, **options):
    """A search for which the demand is out of reach, and its error."""
    surveyed = {name: layer(400, 1.0) for name in "abcd"}
    total = Bench(surveyed).total
    bench = Bench(surveyed, ratio=lambda cost: total / cost, timed=True, **options)
    with pytest.raises(DemandNotMetError) as caught:
        bench.search.run(budget)
    return bench, total, caught.value


def test_a_speed_that_noise_explains_is_no_demand_that_would_be_met():
    """The noise of the bench reaches to 1.1."""
    bench = Bench({name: layer(400, 1.0) for name in "ab"}, ratio=lambda cost: 1.08)
    with pytest.raises(DemandNotMetError) as caught:
        bench.search.run(Budget(min_speedup=1.05))
    assert "largest speed-up 1.08× of " in str(caught.value)
    assert " timed, within noise" in str(caught.value)
    assert "measure with more `runs` while the machine is idle" in str(caught.value)
    assert caught.value.within_reach == {}


def test_a_speed_out_of_reach_names_one_within_reach_and_has_a_nearest_plan():
    budget = Budget(min_speedup=50)
    bench, total, error = unmet(budget)
    fastest = max(total / point.plan.macs for point in bench.search.points)
    met = error.within_reach["min_speedup"]
    assert 0.96 * fastest - 0.01 <= met <= 0.97 * fastest
    assert bench.search.run(Budget(min_speedup=met)).plan.choice
    nearest = bench.search.nearest(budget)
    assert total / nearest.plan.macs == pytest.approx(fastest)
    assert nearest.measured.fitted is not None


def test_speed_and_drop_together_keep_the_drop():
    total = Bench({name: layer(400, 1.0) for name in "abcd"}).total
    budget = Budget(min_speedup=3.0, max_drop=1.0)
    bench, _, error = unmet(budget, drop=lambda cost: 4 * (1 - cost / total))
    assert set(error.within_reach) == {"min_speedup"}
    again = Budget(min_speedup=error.within_reach["min_speedup"], max_drop=1.0)
    point = bench.search.run(again)
    assert bench.drop(point.plan.macs) <= 1.0
    nearest = bench.search.nearest(budget)
    assert bench.drop(nearest.plan.macs) <= 1.0
    assert nearest.plan.choice


def test_where_nothing_is_faster_the_drop_is_to_be_relaxed():
    budget = Budget(min_speedup=1.5, max_drop=0.0)
    bench, _, error = unmet(budget, drop=lambda cost: 0.0 if cost == bench_total() else 2.0)
    assert error.within_reach == {"max_drop": 2.0}
    assert bench.search.run(Budget(min_speedup=1.5, max_drop=2.0)).plan.choice


def bench_total():
    return Bench({name: layer(400, 1.0) for name in "abcd"}).total


def test_a_share_out_of_reach_has_the_cheapest_plan_as_the_nearest():
    bench = Bench({name: layer(400, 1.0) for name in "abcd"})
    budget = Budget(target_macs=0.01)
    with pytest.raises(DemandNotMetError) as caught:
        bench.search.run(budget)
    assert caught.value.within_reach == {}
    assert bench.search.nearest(budget).plan.macs == min(point.plan.macs for point in bench.search.points)
