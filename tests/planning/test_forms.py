"""Forms of a layer and their prices."""

import torch

from sepconvert.base.notes import ReasonCode
from sepconvert.base.progress import silent
from sepconvert.cli.demo.net import load
from sepconvert.network.trace import trace
from sepconvert.planning.forms import Prices, measured_prices
from sepconvert.planning.timing import FormTime, FormTimes


def test_layers_of_many_macs_for_each_form_are_timed_first():
    """Else a filter of one form waits for layers of fifty, and time is up; exact forms do not wait either."""
    sites = {site.name: site for site in trace(load(), (torch.zeros(1, 1, 28, 28),))}
    counts = {"head.conv": 20, "contrast.conv2d_0": 1, "large.conv": 40, "edges.conv2d_0": 0}
    prices = {name: Prices(1.0, {("any", rank): 0.5 for rank in range(n)}) for name, n in counts.items()}
    held = ("any", 16)
    exact = {"large.conv": [held], "contrast.conv2d_0": [("any", 0)]}
    asked = []

    class TimeFor:
        """One call."""

        def forms(self, site, forms):
            asked.append((site.name, len(forms)))
            if len(asked) > 1:
                return None
            return FormTimes(1.0, {form: FormTime(0.4, faster=True) for form in forms})

    found, reasons = measured_prices([sites[name] for name in counts], prices, exact, TimeFor(), silent)
    assert asked == [
        ("large.conv", 1), ("contrast.conv2d_0", 1), ("contrast.conv2d_0", 1), ("large.conv", 40),
        ("head.conv", 20),
    ]  # fmt: skip
    assert found == {"large.conv": Prices(1.0, {held: 0.4})}
    assert reasons.keys() == {"contrast.conv2d_0", "head.conv"}
    assert {reason.code for reason in reasons.values()} == {ReasonCode.UNTIMED}
