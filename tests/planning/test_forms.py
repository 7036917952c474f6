"""Forms of a layer and their prices."""

import torch

from sepconvert.base.notes import ReasonCode
from sepconvert.base.progress import silent
from sepconvert.cli.demo.net import load
from sepconvert.measure.statistics import Interval
from sepconvert.network.trace import trace
from sepconvert.planning.forms import Prices, measured_prices
from sepconvert.planning.timing.clock import FormTime, FormTimes

MEASURED = Interval(1.9, 2.1)


class Stopwatch:
    """A clock that measures a few layers, and models the others."""

    def __init__(self, calls, faster=True):
        self.calls, self.faster, self.asked = calls, faster, []

    def forms(self, site, forms):
        self.asked.append((site.name, len(forms)))
        interval = MEASURED if len(self.asked) <= self.calls else None
        return FormTimes(1.0, {form: FormTime(0.4, 2.5, interval, self.faster) for form in forms})


def sites_and_prices():
    sites = {site.name: site for site in trace(load(), (torch.zeros(1, 1, 28, 28),))}
    counts = {"head.conv": 20, "contrast.conv2d_0": 1, "large.conv": 40, "edges.conv2d_0": 0}
    exact = {"large.conv": {("any", 16)}, "contrast.conv2d_0": {("any", 0)}}
    prices = {
        name: Prices(1.0, {("any", rank): 0.5 for rank in range(n)}, frozenset(exact.get(name, ())))
        for name, n in counts.items()
    }
    return [sites[name] for name in counts], prices


def test_exact_forms_are_timed_first_and_then_layers_of_many_macs_for_each_form():
    sites, prices = sites_and_prices()
    clock = Stopwatch(calls=3)
    found, reasons = measured_prices(sites, prices, clock, silent)
    assert clock.asked == [
        ("large.conv", 1), ("contrast.conv2d_0", 1), ("contrast.conv2d_0", 1), ("large.conv", 40),
        ("head.conv", 20),
    ]  # fmt: skip
    assert reasons == {}
    assert {name: each.modelled for name, each in found.items()} == {
        "large.conv": True, "contrast.conv2d_0": False, "head.conv": True,
    }  # fmt: skip
    # The exact form is there, whatever costs are near its own.
    assert ("any", 16) in found["large.conv"].forms


def test_what_is_not_faster_is_kept_and_it_is_said_how_that_is_known():
    sites, prices = sites_and_prices()
    found, reasons = measured_prices(sites, prices, Stopwatch(calls=3, faster=False), silent)
    # What exact mode takes is there in any case.
    assert {name: set(each.forms) for name, each in found.items()} == {
        "large.conv": {("any", 16)}, "contrast.conv2d_0": {("any", 0)},
    }  # fmt: skip
    # An exact form that was not measured is taken: it loses nothing.
    assert reasons.keys() == {"contrast.conv2d_0", "head.conv"}
    assert found["large.conv"].forms["any", 16] <= 0.99
    assert {reason.code for reason in reasons.values()} == {ReasonCode.COSTS_MORE}
    assert reasons["contrast.conv2d_0"].text == (
        "no form is measured to be faster in ONNX Runtime beyond noise (best 2.50× [1.90, 2.10], "
        "and equal layers differ as much now: measure on an idle machine)"
    )
    assert reasons["head.conv"].text == (
        "no form is faster by the model of times (best 2.50×); there was no time to measure"
    )
