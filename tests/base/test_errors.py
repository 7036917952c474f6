"""Messages of errors: on one line, of reasonable length, and with the exit code of the contract."""

import pickle

import pytest

from sepconvert.base.errors import (
    DemandNotMetError,
    ExportError,
    SepconvertError,
    VerificationError,
    check_number,
    first_line,
    one_line,
    quoted,
    some_of,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [(SepconvertError, 2), (ExportError, 2), (DemandNotMetError, 3), (VerificationError, 3)],
)
def test_exit_codes(error, code):
    assert error("message").exit_code == code
    assert isinstance(error("message"), SepconvertError)


def test_an_unmet_demand_carries_the_plans_that_were_found():
    assert DemandNotMetError("no plan").curve == ()
    assert DemandNotMetError("no plan", iter([{"macs": 1}])).curve == ({"macs": 1},)


@pytest.mark.parametrize("value", [None, 1, 7, 1.5, 10])
def test_numbers_within_their_bounds(value):
    check_number("runs", value, 1, 10)


@pytest.mark.parametrize(
    ("value", "whole", "expected"),
    [
        (0, False, "`runs`: expected a number from 1 to 2,000, got 0"),
        (2001, False, "`runs`: expected a number from 1 to 2,000, got 2001"),
        (float("nan"), False, "`runs`: expected a number from 1 to 2,000, got nan"),
        ("1", False, "`runs`: expected a number from 1 to 2,000, got '1'"),
        (1.5, True, "`runs`: expected a whole number from 1 to 2,000, got 1.5"),
    ],
)
def test_numbers_out_of_their_bounds(value, whole, expected):
    with pytest.raises(SepconvertError) as caught:
        check_number("runs", value, 1, 2000, whole=whole)
    assert str(caught.value) == expected


def test_foreign_messages_are_quoted_on_one_line():
    assert first_line(ValueError("\n  first\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 10_000))) == 400
    assert quoted("a\n  b") == r"'a\n b'"
    assert len(quoted("x" * 10_000)) == 80


def test_the_cause_of_what_torch_says_of_a_pickle():
    said = "Weights only load failed. Do this.\n\tWeightsUnpickler error: Unsupported class:\n  posix.system"
    assert one_line(pickle.UnpicklingError(said)) == "UnpicklingError: Unsupported class: posix.system"
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], ""), (["a", "b"], "a, b"), (list("abcdef"), "a, b, c, d and 2 more")],
)
def test_the_first_of_many_names(names, expected):
    assert some_of(names) == expected
