"""Plans that put accuracy at risk are warned of, with the layers, and no others."""

import copy

import pytest

from sepconvert.report.risks import risks
from sepconvert.report.sentences import warnings_of


@pytest.fixture
def risky(approximate):
    """Not measured on --data, nor at risk as yet."""
    document = copy.deepcopy(approximate)
    document["delta"]["accuracy_drop_pp"] = None
    document["approximation"]["budget"]["max_drop"] = None
    document["approximation"]["steps"] = [
        {"name": "fit the outputs", "divergence": 0.5, "agreement": 0.5, "accuracy": None, "kept": True},
        {"name": "follow the drift", "divergence": 0.1, "agreement": 0.97, "accuracy": None, "kept": True},
        {
            "name": "re-estimate BatchNorm",
            "divergence": 0.2,
            "agreement": 0.1,
            "accuracy": None,
            "kept": False,
        },
    ]
    return document


def layer(document):
    return next(each for each in document["layers"] if each["decision"] == "converted")


def test_a_plan_that_keeps_accuracy_is_not_warned_of(document, approximate, risky):
    assert risks(document) == risks(approximate) == risks(risky) == []


def test_fits_to_weights_alone_have_a_warning_of_their_own(risky):
    layer(risky)["output_error"] = 0.9
    risky["approximation"]["calibration"] = None
    assert risks(risky) == []


def test_predictions_that_change_on_images_held_out(risky):
    risky["approximation"]["steps"][1]["agreement"] = 0.949
    (warning,) = risks(risky)
    assert "of 256 images held out, 94.9 % are classified as before" in warning
    assert "--finetune" in warning
    assert warning in warnings_of(risky)


@pytest.mark.parametrize(("error", "warned"), [(0.49, False), (0.5, True)])
def test_layers_of_large_error_are_named(risky, error, warned):
    layer(risky)["output_error"] = error
    assert any("large.conv answers with an error of 50%" in line for line in risks(risky)) == warned
    risky["approximation"]["finetune"] = {"attempts": []}
    assert not risks(risky)


def test_layers_and_models_of_few_parameters(risky):
    layer(risky)["params"] = [3200, 199]
    (warning,) = risks(risky)
    assert "large.conv keeps less than 6% of the parameters" in warning
    risky["original"]["params"], risky["converted"]["params"] = 4000, 499
    (warning,) = risks(risky)
    assert "the model keeps 499 of 4,000 parameters" in warning


def test_many_layers_are_counted(risky):
    found = layer(risky)
    found["output_error"] = 0.9
    risky["layers"] += [{**found, "name": f"layer{n}"} for n in range(5)]
    (warning,) = risks(risky)
    assert "large.conv, layer0, layer1, layer2 and 2 more answer with" in warning


def test_a_drop_that_was_measured(risky):
    layer(risky)["output_error"] = 0.9  # of which the measured drop is a better judge
    for value, low, high in ((1.0, 0.4, 1.6), (1.5, -0.1, 3.1)):
        risky["delta"]["accuracy_drop_pp"] = {"value": value, "ci95": [low, high]}
        assert risks(risky) == []
    risky["delta"]["accuracy_drop_pp"] = {"value": 1.2, "ci95": [0.67, 1.73]}
    (warning,) = risks(risky)
    assert warning.startswith("Warning: accuracy falls by 1.20 pp [0.67, 1.73].")
    risky["approximation"]["budget"]["max_drop"] = 3.0  # who allows it knows
    assert risks(risky) == []
