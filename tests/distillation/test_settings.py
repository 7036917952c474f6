"""Settings: their ranges, and the line that a checkpoint is compared by."""

import math

import pytest

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.settings import Settings

GIVEN = {
    "epochs": 3, "labelled": True, "learning_rate": 4e-3, "temperature": 4.0, "feature_weight": 0.0,
    "renew_statistics": True, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, "a whole number from 1"),
        ("learning_rate", 0.0, "a number above 0"),
        ("learning_rate", math.inf, "a number above 0"),
        ("temperature", math.nan, "a number above 0, about 1 to 4"),
        ("feature_weight", -0.5, "0 or more"),
    ],
)
def test_values_out_of_range(name, value, expected):
    with pytest.raises(SepconvertError) as caught:
        Settings(**{**GIVEN, name: value})
    assert str(caught.value).startswith(f"`{name}`: expected {expected}, got {value}")


def test_every_setting_is_in_the_text():
    text = str(Settings(**GIVEN))
    assert "\n" not in text
    changed = {
        "epochs": 4, "labelled": False, "learning_rate": 1.0, "temperature": 1.0, "feature_weight": 1.0,
        "renew_statistics": False, "seed": 1,
    }  # fmt: skip
    for name, value in changed.items():
        assert str(Settings(**{**GIVEN, name: value})) != text, name
