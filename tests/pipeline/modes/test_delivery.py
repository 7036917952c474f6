"""How far a plan may go before it is tuned, and which of several is delivered."""

from types import SimpleNamespace

import pytest
from conversions import apart, convert_small
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base.options.values import Budget
from sepconvert.pipeline.modes import delivery
from sepconvert.pipeline.modes.delivery import Attempt, Tuned, Tuning, next_drop
from sepconvert.report.text.tables import summary

MOST = 3
TUNING = Tuning(lambda point, attempt: pytest.fail("nothing is tuned here"), MOST, won_back=3.0)


def test_the_first_is_guessed_at():
    assert next_drop([], 1.0, TUNING) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([(2.7, 1.2)], 0.9 * 2.7 / 1.2),  # as much as comes back in proportion
        ([(2.0, 0.6)], 0.9 * 2.0 / 0.6),  # so too where there is room
        ([(2.0, 0.1)], 4.0),  # but no more than twice as far
        ([(2.0, -0.3)], 4.0),
        ([(2.7, 1.2), (1.5, 0.8)], 1.5 + 0.1 / 0.4 * 1.2),  # between the two
        ([(2.0, 0.4), (4.0, 1.4)], 2.0 + 0.5 / 1.0 * 2.0),
        ([(2.0, 0.95)], None),  # no room left
        ([(2.7, 2.8)], None),  # nothing won back: one that needs no fine-tuning goes as far
        ([(3.0, 1.5), (1.8, 1.1), (1.4, 0.5)], None),  # enough of them
    ],
)
def test_what_is_won_back_tells_how_far_to_go(attempts, expected):
    found = next_drop([Attempt(*each) for each in attempts], 1.0, TUNING)
    assert found == (None if expected is None else pytest.approx(expected))


def drops(low):
    return st.floats(low, 100, allow_subnormal=False)


@given(st.lists(st.builds(Attempt, drops(0), drops(-100)), max_size=MOST), drops(0.01))
def test_none_is_beyond_one_that_did_not_come_back_nor_short_of_one_that_did(attempts, most):
    found = next_drop(attempts, most, TUNING)
    if found is None:
        return
    assert found > most
    assert all(found > each.before for each in attempts if each.after <= most)
    low = max((each.before for each in attempts if each.after <= most), default=0)
    beyond = [each.before for each in attempts if each.after > most]
    assert not beyond or min(beyond) <= low or found < min(beyond)


@given(st.floats(1.1, 10), st.floats(0.5, 3), st.floats(0.1, 5))
def test_what_comes_back_in_proportion_is_found_within_three(ratio, plans, most):
    attempts = []
    while (drop := next_drop(attempts, most, TUNING)) is not None:
        before = drop * min(plans, 1)  # a search may find less than it was allowed
        attempts.append(Attempt(before, before / ratio))
    assert len(attempts) <= MOST
    if ratio > 1 / 0.9 and plans >= 1:
        assert any(each.after <= most for each in attempts)


def test_of_plans_that_fine_tuning_brings_back_the_last_is_delivered(small, monkeypatch):
    def far(attempts, most, tuning):
        return next_drop(attempts, most, tuning) if attempts else 100.0  # the cheapest plan of all

    monkeypatch.setattr(delivery, "next_drop", far)
    report = convert_small(small, max_drop=0.5, data=apart(small[1])[1], finetune=1).report
    attempts = report["approximation"]["finetune"]["attempts"]
    assert attempts[0]["drop_pp"] > 0.5
    assert 1 <= len(attempts) <= 3
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 0.5
    within = [each for each in attempts if each["drop_pp"] <= 0.5]
    assert [each for each in attempts if each["delivered"]] == within[-1:]
    used = "fine-tune" in [step["name"] for step in report["approximation"]["steps"]]
    assert used is bool(within)
    assert "it was not delivered" in " ".join(summary(report).split())


def test_fine_tuning_may_win_back_what_a_plan_loses(small):
    report = convert_small(small, max_drop=30.0, data=apart(small[1])[1], finetune=1).report
    assert report["approximation"]["finetune"]["attempts"][-1]["delivered"]
    assert report["approximation"]["steps"][-1]["name"] == "fine-tune"
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 30


@pytest.mark.parametrize(
    ("attempts", "untuned", "delivered"),
    [
        ([(9, 0.8, 0.7)], 8, "untuned"),  # cost, and drops before and after
        ([(8, 0.8, 0.7)], 9, 0),
        ([(8, 1.5, 0.9)], 7, 0),  # that one is not even looked at
        ([(7, 1.5, 1.1), (8, 1.3, 0.9)], 7, 1),
        ([(7, 1.5, 1.1)], 9, "untuned"),
    ],
)
def test_the_plan_that_goes_furthest_is_delivered(monkeypatch, attempts, untuned, delivered):
    def point(cost):
        return SimpleNamespace(plan=SimpleNamespace(cost=cost))

    tried = tuple(
        Tuned(point(cost), SimpleNamespace(model=number), (), Attempt(before, after))
        for number, (cost, before, after) in enumerate(attempts)
    )
    monkeypatch.setattr(delivery, "_tuning", lambda *_: TUNING)
    monkeypatch.setattr(delivery, "_attempts", lambda *_: tried)
    search = SimpleNamespace(
        run=lambda budget: point(untuned),
        measurements=SimpleNamespace(fitted=lambda point: SimpleNamespace(model="untuned")),
    )
    job = SimpleNamespace(budget=Budget(max_drop=1.0), nearest=False)
    found = delivery.deliver(SimpleNamespace(scores=object()), job, search, None)
    assert found.model == delivered
    assert found.tried == tried


def test_the_nearest_plan_is_delivered_on_demand(small):
    result = convert_small(small, target_macs=0.01, nearest=True)
    found = result.report["approximation"]
    assert found["shortfall"].startswith("no plan meets `target_macs` 0.01")
    (delivered,) = [point for point in found["curve"] if point["delivered"]]
    assert delivered["macs"] == min(point["macs"] for point in found["curve"])
    assert result.report["converted"]["macs"] == delivered["macs"]
    assert "no plan meets `target_macs` 0.01. This is the nearest: " in " ".join(repr(result).split())
    met = convert_small(small, target_macs=0.6, nearest=True)
    assert "shortfall" not in met.report["approximation"]
