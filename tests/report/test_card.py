"""The model card says what the report says, and no more."""

from dataclasses import replace

import msgspec
import pytest
from report.int8_forms import deployed
from schemas import assert_conforms

from sepconvert.report.card import model_card
from sepconvert.report.document import report_document
from sepconvert.report.schema.card import Card

FILES = {"data": {"source": "val.npz", "sha256": "ab" * 32}, "calib": {"source": "images"}}


def card_of(document, files=None):
    """The card as plain values of JSON, which conforms."""
    found = msgspec.json.decode(msgspec.json.encode(model_card(document, files or {})))
    assert_conforms(found, Card)
    return found


def test_it_is_a_part_of_the_report(report):
    document = report_document(replace(report, files=FILES))
    assert document["model_card"] == card_of(document, FILES)


def test_an_exact_conversion(document):
    card = card_of(document, FILES)
    assert card["model"] == {"name": "net", "source": "models/net.pt", "sha256": "0123456789abcdef" * 4}
    assert card["made"] == {
        "mode": "exact", "budget": {}, "form": "float32", "converted": 1, "convolutions": 2,
        "finetuned_epochs": 0, "command": document["command"], "seed": 0,
        "versions": {
            name: document["environment"][name]
            for name in ("sepconvert", "torch", "onnxruntime", "onnx", "onnxscript")
        },
    }  # fmt: skip
    assert card["data"] == [{"use": "evaluation", "samples": 2000, **FILES["data"]}]
    assert card["results"] == {
        "metric": document["delta"]["metric"],
        "latency_ms": [1.5, 1.0],
        "speedup": document["delta"]["latency_speedup"],
        "macs": [2_012_345, 1_006_172],
        "params": [4000, 1000],
        "onnx_bytes": [20_000, 5_000],
        "max_abs_diff": 3.5e-8,
    }
    assert card["intended_use"] == [
        "In the place of net, for any input: outputs are the same but for rounding, which was 3.5e-08 on the "
        "inputs of the verification.",
        "1.50× as fast in ONNX Runtime 1.32.0, provider cpu, 2 threads, batch 1.",
    ]
    assert card["limits"] == [
        "The difference in accuracy may be chance: its 95 % interval includes 0.",
        "Latency is that of one machine (AMD EPYC); measure it where you deploy.",
    ]


def test_an_approximate_conversion(approximate):
    card = card_of(approximate, FILES)
    assert card["made"]["budget"] == {"max_drop": 1.0}
    assert card["data"] == [
        {"use": "evaluation", "samples": 2000, **FILES["data"]},
        {"use": "calibration", "samples": 768, "source": "images"},
        {"use": "held-out calibration", "samples": 256, "source": "images"},
    ]
    assert card["intended_use"][0] == (
        "In the place of net, for inputs like the calibration images: outputs are approximations."
    )
    assert card["limits"][0] == (
        "On unseen images of the same kind, expect a drop of up to 0.75 pp (95 % confidence)."
    )
    # Calibration images are a part of `data` where none were named.
    sources = [each["source"] for each in card_of(approximate, {"data": FILES["data"]})["data"]]
    assert sources == ["val.npz"] * 3


def test_a_plan_that_was_chosen_on_the_evaluation_images_says_so(approximate):
    approximate["approximation"]["choice"] |= {"plans": 3}
    assert card_of(approximate)["limits"][0].startswith(
        "3 plans were measured on 2,000 images; the best was taken, which favours it."
    )


def test_what_was_not_measured_is_said(bare):
    card = card_of(bare)
    assert card["model"] == {"name": None, "source": None, "sha256": None}
    assert card["results"]["metric"] is card["results"]["latency_ms"] is card["results"]["speedup"] is None
    assert card["intended_use"][0].startswith("In the place of the original, for any input")
    assert card["limits"] == ["Latency was not measured.", "The ONNX files were not verified: no kernel."]


def test_random_weights_and_noise_are_limits(document):
    document["model"] = {"path": "timm:resnet18", "sha256": "ab" * 32, "weights": "random"}
    document["delta"]["latency_speedup"] |= {"significant": False}
    document["export"]["missing"] = {"converted.pt2": "no archive"}
    card = card_of(document)
    assert (card["model"]["name"], card["model"]["weights"]) == ("resnet18", "random")
    assert card["limits"][0] == "The original's weights are random: its outputs and its metric mean nothing."
    assert card["limits"][-2].startswith("The difference in latency, 1.50× [1.40, 1.60], is within noise. ")
    assert card["limits"][-1] == "converted.pt2 is missing: no archive"
    assert len(card["intended_use"]) == 1


def test_int8_is_the_form(document):
    card = card_of(deployed(document), FILES)
    assert card["made"]["form"] == "int8"
    assert card["data"][-1] == {
        "use": "int8 ranges",
        "samples": card["data"][-1]["samples"],
        "source": "images",
    }


@pytest.mark.parametrize("name", ["document", "bare", "approximate", "restored"])
def test_sentences_stand_alone(request, name):
    card = card_of(request.getfixturevalue(name))
    for sentence in (*card["intended_use"], *card["limits"]):
        assert "`" not in sentence
        assert sentence[0] == sentence[0].upper()
        assert sentence.endswith(".")
