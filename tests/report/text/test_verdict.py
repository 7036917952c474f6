"""The verdict says what was gained and lost, and what to do; it warns where there is no reason to deploy."""

import pytest

from sepconvert.base.notes import NoteLevel
from sepconvert.report.text.verdict import verdict


def said(document):
    (note,) = verdict(document)
    return note.level, note.text


def speedup(median, low, high, *, significant=True):
    return {"median": median, "ci95": [low, high], "noise_floor": [0.98, 1.02], "significant": significant}


def test_an_exact_conversion_that_is_faster_is_deployed(document):
    level, text = said(document)
    assert level is NoteLevel.INFO
    assert text == (
        "Deploy converted.onnx: 1 of 2 convolutions converted, 1.50× [1.40, 1.60] as fast with 2.00× fewer "
        "MACs, outputs equal but for rounding (4e-08). `mode` auto, with `calib` and `data`, may go further "
        "at a small loss."
    )


def test_an_approximation_names_what_it_loses_and_what_was_allowed(approximate):
    level, text = said(approximate)
    assert level is NoteLevel.INFO
    assert "top-1 96.75 % → 96.50 % on 2,000 images (drop 0.25 pp [-0.05, 0.55]; allowed: 1 pp)" in text
    assert text.endswith("Training (`finetune` 5) may go further.")
    approximate["delta"]["metric"]["ci95"] = [-0.05, 1.25]
    assert said(approximate)[1].endswith("`confidence` 0.95 holds the budget there.")


def test_a_restorer_is_judged_in_its_unit(restored):
    assert (
        "psnr 28.20 dB → 28.10 dB on 300 images (drop 0.098 dB [0.0901, 0.106]; allowed: 0.1 dB)"
        in said(restored)[1]
    )


@pytest.mark.parametrize(
    ("gain", "begins"),
    [
        (speedup(0.8, 0.7, 0.9), "keep the original, which is faster"),
        (speedup(1.02, 0.95, 1.1, significant=False), "no gain in speed was found"),
    ],
)
def test_no_gain_is_no_reason_to_deploy(document, gain, begins):
    document["delta"]["latency_speedup"] = gain
    level, text = said(document)
    assert (level, text.startswith(begins)) == (NoteLevel.WARNING, True)
    assert "Deploy" not in text


def test_without_data_accuracy_is_checked_first(approximate):
    approximate["delta"]["metric"] = None
    level, text = said(approximate)
    assert level is NoteLevel.WARNING
    assert text.startswith("not yet to be deployed: ")
    assert text.endswith("accuracy not measured. Check the converted model on labelled `data`.")


def test_figures_of_an_original_near_chance_are_no_reason_to_deploy(approximate):
    approximate["original"]["accuracy"] |= {"top1": 0.13, "n": 2000}  # one answer for all has 0.125
    level, text = said(approximate)
    assert level is NoteLevel.WARNING
    assert text.startswith("not to be judged by these figures: ")
    assert "The original itself is near chance on `data`; check the images" in text


def test_no_gain_is_told_with_the_noise_that_decides_it(document):
    document["delta"]["latency_speedup"] = speedup(1.11, 1.05, 1.14, significant=False)
    assert "as fast as itself" in said(document)[1]
    assert "[0.98, 1.02]×" in said(document)[1]


def test_what_was_not_timed_is_not_called_faster(bare):
    level, text = said(bare)
    assert level is NoteLevel.INFO
    assert text.startswith("1 of 2 convolutions converted, 1.00× fewer MACs")
    assert "Nothing was timed: pass `runs` above 0" in text
    bare["export"]["missing"] = {"converted.onnx": "torch cannot export it"}
    assert (
        "There is no ONNX file (torch cannot export it): use the converted model in PyTorch." in said(bare)[1]
    )


def test_the_nearest_plan_is_no_plan_within_the_budget(approximate):
    approximate["approximation"] |= {"shortfall": "no plan meets `min_speedup` 9"}
    approximate["approximation"]["budget"]["min_speedup"] = 9.0
    level, text = said(approximate)
    assert level is NoteLevel.WARNING
    assert text.startswith("no plan meets `min_speedup` 9 and `max_drop` 1. This is the nearest: 1 of 2 ")


def test_a_tolerance_that_was_given_is_not_called_exact(document):
    document["layers"][1]["exact"] = False
    text = said(document)[1]
    assert "1 of 2 convolutions converted (1 of them only within `tol`, not exactly)" in text
    assert "rounding" not in text
