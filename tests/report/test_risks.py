"""Plans that put accuracy at risk are warned about, with the layers, and no others."""

import pytest

from sepconvert.report.risks import risks
from sepconvert.report.sentences import warnings_of


@pytest.fixture
def risky(approximate):
    """Not measured on evaluation data, and not at risk yet."""
    approximate["delta"]["accuracy_drop_pp"] = None
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
    for value, low, high in ((1.0, 0.4, 1.6), (1.5, -0.1, 3.1)):
        risky["delta"]["accuracy_drop_pp"] = {"value": value, "ci95": [low, high]}
        assert risks(risky) == []
    risky["delta"]["accuracy_drop_pp"] = {"value": 1.2, "ci95": [0.67, 1.73]}
    (warning,) = risks(risky)
    assert str(warning).startswith("Warning: accuracy falls by 1.20 pp [0.67, 1.73].")
    risky["approximation"]["budget"]["max_drop"] = 3.0  # who allows it knows
    assert risks(risky) == []
