"""Declaration of options, on a value of its own."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from sepconvert import SepconvertError
from sepconvert.base.options.declared import check_options, option, options_of, path_of, texts_of


@dataclass(frozen=True)
class Oven:
    """Settings of an oven."""

    degrees: float = option("Temperature.", 180.0, low=50, high=250)
    minutes: int | None = option("Time.", low=1, whole=True)
    heat: str = option("Where from.", "below", choices=("below", "above"))
    fan: bool = option("Whether it blows.", True)
    cake: object = None  # no option


def test_fields_with_help_are_options():
    assert [each.name for each in options_of(Oven)] == ["degrees", "minutes", "heat", "fan"]
    assert len(fields(Oven)) == 5


@pytest.mark.parametrize("settings", [{}, {"degrees": 250}, {"minutes": 1, "heat": "above", "fan": False}])
def test_values_in_range_pass(settings):
    check_options(Oven(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degrees": 251}, "`degrees`: expected a number"),
        ({"degrees": None}, "`degrees`: expected a number, got None"),
        ({"minutes": 1.5}, "`minutes`: expected a whole number from 1"),
        ({"minutes": 0}, "`minutes`: expected a whole number from 1"),
        ({"heat": "beside"}, "`heat`: expected"),
        ({"fan": 1}, "`fan`: expected True or False, got 1"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(SepconvertError) as caught:
        check_options(Oven(**settings))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_paths_and_texts():
    assert path_of("cache", "a/b") == Path("a/b")
    assert path_of("cache", None) is None
    assert texts_of("more", {"a": 1}) == {"a": "1"}
    with pytest.raises(SepconvertError, match="`cache`: expected a path"):
        path_of("cache", 5)
    with pytest.raises(SepconvertError, match="`more`: expected a mapping"):
        texts_of("more", ["a"])
