import dataclasses
import math
from pathlib import Path

import pytest

from sepconvert import SepconvertError
from sepconvert.base.options.declared import options_of
from sepconvert.base.options.values import (
    Budget,
    Calibration,
    Finetuning,
    Origin,
    Selection,
    Timing,
)

VALUES = (Budget, Selection, Timing, Calibration, Finetuning)


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_frozen_and_their_defaults_pass_their_own_checks(kind):
    value = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(kind)[0].name, 1)


@pytest.mark.parametrize(
    "option", [each for kind in VALUES for each in options_of(kind)], ids=lambda each: each.name
)
def test_help_is_one_sentence(option):
    assert option.metadata["help"][0].isupper()


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Budget, {"rank": 0}, "`rank`: expected a whole number from 1, got 0"),
        (Budget, {"rank": 1.5}, "`rank`: expected a whole number from 1, got 1.5"),
        (Budget, {"target_macs": 1.5}, "`target_macs`: expected a number above 0, at most 1, got 1.5"),
        (Budget, {"target_macs": math.nan}, "`target_macs`: expected a number above 0, at most 1, got nan"),
        (Budget, {"target_params": 0}, "`target_params`: expected a number"),
        (Budget, {"min_speedup": -1}, "`min_speedup`: expected a number"),
        (Budget, {"max_drop": -1}, "`max_drop`: expected a number from 0, got -1"),
        (Budget, {"max_drop": math.nan}, "`max_drop`: expected a number from 0, got nan"),
        (Budget, {"rank": 1, "target_macs": 0.5}, "`rank` and `target_macs`: each fixes the plan by itself"),
        (Timing, {"runs": -1}, "`runs`: expected a whole number from 0, got -1"),
        (Timing, {"runs": None}, "`runs`: expected a number, got None"),
        (Timing, {"runs": 1.5}, "`runs`: expected a whole number from 0, got 1.5"),
        (Timing, {"threads": 10**8}, "`threads`: expected a whole number from 1 to 1,024"),
        (Timing, {"threads": 0}, "`threads`: expected a whole number from 1"),
        (
            Timing,
            {"graph_optimization": "some"},
            "`graph_optimization`: expected one of all, extended, basic",
        ),
        (Timing, {"spinning": "maybe"}, "`spinning`: expected one of off, on, got 'maybe'"),
        (Timing, {"provider_options": ["a=b"]}, "`provider_options`: expected a mapping of names to texts"),
        (Timing, {"provider_options": {"a": None}}, "`provider_options`: expected a mapping of names"),
        (
            Timing,
            {"provider_options": {"a": 1}},
            "`provider_options`: the provider cpu has none, got {'a': '1'}",
        ),
        (Timing, {"provider": "abacus"}, "`provider`: expected one that the installed onnxruntime has"),
        (Calibration, {"images": 0}, "`images`: expected a whole number from 1, got 0"),
        (Calibration, {"memory": math.nan}, "`memory`: expected a number from 1, got nan"),
        (Calibration, {"memory": -1}, "`memory`: expected a number from 1, got -1"),
        (Calibration, {"memory": 0}, "`memory`: expected a number from 1, got 0"),
        (Selection, {"include": "conv*"}, "`include`: expected a list of globs, got 'conv*'"),
        (
            Finetuning,
            {"epochs": 1, "precision": "fp8"},
            "`precision`: expected one of no, bf16, fp16, got 'fp8'",
        ),
        (Finetuning, {"resume": True}, "`resume`: only for fine-tuning; pass `finetune` too"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(kind, given, message):
    with pytest.raises(SepconvertError) as caught:
        kind(**given)
    assert str(caught.value).startswith(message)


def test_a_budget_without_demands_is_a_drop_of_one_point():
    assert Budget().or_default(unit="pp", timed=False) == Budget(max_drop=1.0)
    assert Budget(rank=2).or_default(unit=None, timed=False) == Budget(rank=2)


@pytest.mark.parametrize(
    ("budget", "unit", "timed", "message"),
    [
        (Budget(), None, True, "`mode`: approx and auto need a budget"),
        (Budget(), "dB", True, "`max_drop`: has no default .* in dB"),
        (Budget(max_drop=1.0), None, True, "`max_drop`: needs labelled data"),
        (Budget(min_speedup=2.0), "pp", False, "`min_speedup`: needs timed runs"),
    ],
)
def test_demands_that_cannot_be_measured_are_refused(budget, unit, timed, message):
    with pytest.raises(SepconvertError, match=message):
        budget.or_default(unit=unit, timed=timed)


@pytest.mark.parametrize(
    ("selection", "admitted"),
    [
        (Selection(), {"stem", "layer1.0", "layer1.1"}),
        (Selection(include=["layer1.*"]), {"layer1.0", "layer1.1"}),
        (Selection(exclude=["layer1.1"]), {"stem", "layer1.0"}),
        (Selection(include=["layer1.*"], exclude=["*.0"]), {"layer1.1"}),
    ],
)
def test_globs_admit_layers_by_name(selection, admitted):
    assert {name for name in ("stem", "layer1.0", "layer1.1") if selection.admits(name)} == admitted


def test_the_runtime_follows_from_the_timing():
    runtime = Timing(threads=3, graph_optimization="basic", provider="CPU", cache="times").runtime
    assert (runtime.threads, runtime.graph_optimization, runtime.provider) == (3, "basic", "cpu")
    assert Timing(provider="CPUExecutionProvider").runtime == Timing().runtime
    assert Timing().runtime.threads >= 1
    assert Timing().runtime.spinning == "off"
    assert Timing(spinning="on").runtime.spinning == "on"
    assert Timing(cache="times").cache == Path("times")


def test_only_a_model_with_a_file_has_an_origin_in_the_report():
    assert Origin(command="sepconvert demo").to_json() is None
    assert Origin("net.pt", "ab").to_json() == {"path": "net.pt", "sha256": "ab"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Timing(provider=None), "`provider`: expected a name such as cpu, got None"),
        (lambda: Timing(cache=5), "`cache`: expected a path, got 5"),
        (lambda: Selection(include=None), "`include`: expected a list of globs, got None"),
        (lambda: Finetuning(epochs=1, checkpoint=3), "`checkpoint`: expected a path, got 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(make, message):
    with pytest.raises(SepconvertError, match=message):
        make()
