"""Plans that put accuracy at risk are warned about, with the layers, and so are data that do not fit."""

import pytest

from sepconvert.report.text.risks import doubts, risks, unseen
from sepconvert.report.text.sentences import warnings_of


@pytest.fixture
def risky(approximate):
    """Not measured on evaluation data, and not at risk yet."""
    approximate["delta"] |= {"metric": None, "accuracy_drop_pp": None}
    approximate["approximation"]["budget"]["max_drop"] = None
    approximate["approximation"]["steps"] = [
        {"kind": kind, "agreement": agreement, "kept": kept}
        for kind, agreement, kept in (("data", 0.5, True), ("data", 0.97, True), ("batchnorm", 0.1, False))
    ]
    return approximate


def converted(document):
    return next(layer for layer in document["layers"] if layer["decision"] == "converted")


def test_a_plan_that_keeps_accuracy(document, approximate):
    assert risks(document) == risks(approximate) == []


def test_a_plan_without_a_sign_of_risk(risky):
    assert risks(risky) == []


def test_fits_to_weights_alone_have_a_warning_of_their_own(risky):
    converted(risky)["output_error"] = 0.9
    risky["approximation"]["calibration"] = None
    assert risks(risky) == []


def test_predictions_that_change_on_held_out_images(risky):
    risky["approximation"]["steps"][1]["agreement"] = 0.949
    (warning,) = risks(risky)
    assert "only 94.9 % of 256 held-out images are classified as before. Demand less" in warning.text
    assert "(`finetune`)" in warning.text
    risky["approximation"]["steps"] = [
        {**step, "name": "", "divergence": 0.5, "accuracy": None} for step in risky["approximation"]["steps"]
    ]
    assert warning in warnings_of(risky)


@pytest.mark.parametrize(("error", "warned"), [(0.49, False), (0.5, True)])
def test_layers_of_large_error_are_named(risky, error, warned):
    converted(risky)["output_error"] = error
    found = [note.text for note in risks(risky)]
    assert any("large.conv has an output error of 50 % or more." in text for text in found) == warned
    risky["approximation"]["finetune"] = {"attempts": []}
    assert not risks(risky)


def test_layers_and_models_of_few_parameters(risky):
    converted(risky)["params"] = [3200, 199]
    (warning,) = risks(risky)
    assert "large.conv keeps less than 6 % of the parameters" in warning.text
    risky["original"]["params"], risky["converted"]["params"] = 4000, 499
    (warning,) = risks(risky)
    assert "the model keeps 499 of 4,000 parameters" in warning.text


def test_many_layers_are_counted(risky):
    layer = converted(risky)
    layer["output_error"] = 0.9
    risky["layers"] += [{**layer, "name": f"layer{n}"} for n in range(5)]
    (warning,) = risks(risky)
    assert "large.conv, layer0, layer1, layer2 and 2 more have output errors of" in warning.text


def test_a_drop_that_was_measured(risky):
    converted(risky)["output_error"] = 0.9  # the measured drop is a better judge
    top1 = {"name": "top1", "unit": "pp", "higher_is_better": True, "original": 96.75}
    for value, low, high in ((1.0, 0.4, 1.6), (1.5, -0.1, 3.1)):
        risky["delta"]["metric"] = {**top1, "drop": value, "ci95": [low, high]}
        assert risks(risky) == []
    risky["delta"]["metric"] = {**top1, "drop": 1.2, "ci95": [0.67, 1.73]}
    (warning,) = risks(risky)
    assert str(warning).startswith("Warning: accuracy falls by 1.20 pp [0.67, 1.73].")
    risky["approximation"]["budget"]["max_drop"] = 3.0  # who allows it knows
    assert risks(risky) == []


# Metrics in other units ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "text"),
    [(0.28, None), (0.29, "Warning: psnr falls by 0.29 dB [0.1, 0.5].")],
    ids=["less than a hundredth of 28.2", "more"],
)
def test_a_drop_in_decibels(restored, drop, text):
    restored["approximation"]["budget"]["max_drop"] = None
    restored["delta"]["metric"] = {**restored["delta"]["metric"], "drop": drop, "ci95": [0.1, 0.5]}
    found = [str(note) for note in risks(restored)]
    assert [each[: len(text or "")] for each in found] == ([text] if text else [])
    assert all("recover psnr by training" in each for each in found)


def test_an_error_that_rises(restored):
    restored["approximation"]["budget"]["max_drop"] = None
    error = {"name": "mse", "unit": "", "higher_is_better": False, "original": 0.5, "drop": 0.0125}
    restored["delta"]["metric"] = {**error, "ci95": [0.01, 0.015]}
    (warning,) = risks(restored)
    assert str(warning).startswith("Warning: mse rises by 0.0125 [0.01, 0.015].")


def test_unseen_images_of_a_metric_without_a_level_of_chance(restored):
    (note,) = unseen(restored)
    assert str(note) == (
        "On unseen images of the same kind, expect a drop of up to 0.104 dB (95 % confidence)."
    )
    restored["approximation"]["choice"] |= {"confidence": 0.95, "bound": 0.1}
    (note,) = unseen(restored)
    assert "is at most 0.1 dB (`max_drop`)" in str(note)


def test_an_interval_in_decibels(restored):
    assert doubt(restored) == ""
    restored["delta"]["metric"] = {**restored["delta"]["metric"], "ci95": [-0.052, 0.248]}
    assert "known to ±0.15 dB, `max_drop` is 0.1 dB: about 680 scored images would do" in doubt(restored)


# Data that do not fit the original ----------------------------------------------------------------


def doubt(document) -> str:
    """The text of the only doubt; nothing if there is none."""
    return "".join(note.text for note in doubts(document))


def test_data_that_fit(document, approximate, bare):
    assert doubts(document) == doubts(approximate) == doubts(bare) == []


@pytest.mark.parametrize(("top1", "n", "warned"), [(0.13, 2000, True), (0.19, 2000, False), (0.19, 50, True)])
def test_an_original_near_chance(document, top1, n, warned):
    document["original"]["accuracy"] |= {"top1": top1, "n": n}
    assert (
        "where one answer for all gives 12.50 %: drop and agreement mean nothing" in doubt(document)
    ) == warned
    assert all(note in warnings_of(document) for note in doubts(document))


def test_an_original_far_below_its_accuracy_on_calibration_labels(document):
    document["original"]["accuracy"] |= {"top1": 0.6, "n": 1000}
    document["data"]["calibration_accuracy"] = {"top1": 0.75, "top5": None, "n": 256}
    assert doubt(document) == ""  # it may be 9 points
    document["data"]["calibration_accuracy"]["n"] = 1024
    assert "classifies 75.00 % of 1,024 calibration images as labelled, but 60.00 % of 1,000" in doubt(
        document
    )


@pytest.mark.parametrize(
    ("scored", "example", "top1", "said"),
    [
        ((0, 255), (-2.0, 2.0), 0.9, "range over 0 to 255, those of the example inputs over -2 to 2"),
        ((0, 255), (0, 255), 0.3, "as if they were not normalised"),
        ((0, 255), (0, 255), 0.9, None),  # the model was trained so
        ((-9, 9.5), (-1.0, 1.0), 0.9, None),
        ((0, 1), (0, 1), 0.3, "range over 0 to 1, as if they were not normalised"),
        ((0, 1), (0, 1), 0.9, None),
        ((-21, 0), None, 0.3, "range over -21 to 0, as if"),
        ((-19, 19), (-19, 19), 0.3, None),
    ],
)
def test_values_that_leave_the_range_of_the_example(document, scored, example, top1, said):
    document["original"]["accuracy"]["top1"] = top1
    document["data"]["values"] |= {"scored": scored, "example": example}
    assert said in doubt(document) if said else doubt(document) == ""


def test_calibration_images_have_a_range_as_well(approximate):
    approximate["data"]["values"] |= {"calibration": [0, 255], "scored": None}
    approximate["original"]["accuracy"] = None
    assert "the values of calibration images range over 0 to 255" in doubt(approximate)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"missing": 1, "missing_shown": [0], "smallest": 1}, "subtract 1 if"),
        ({"missing": 7, "missing_shown": [1, 2, 4, 5, 6]}, "labelled 1, 2, 4, 5, 6 and 2 more, though"),
        ({"missing": 740, "missing_shown": [0], "missing_by_chance": 740.7, "classes": 1000}, None),
        ({"missing": 1, "missing_shown": [3], "missing_by_chance": 0.4}, None),
    ],
)
def test_classes_without_images(document, labels, said):
    document["data"]["labels"] |= labels
    assert said in doubt(document) if said else doubt(document) == ""


def test_a_drop_that_is_not_known_as_exactly_as_the_budget_asks(approximate):
    approximate["delta"]["metric"] |= {"n": 300, "ci95": [-1.25, 1.75]}
    assert "known to ±1.50 pp, `max_drop` is 1: about 680 scored images would do" in doubt(approximate)
    converted(approximate)["decision"] = "kept"
    assert doubt(approximate) == ""
