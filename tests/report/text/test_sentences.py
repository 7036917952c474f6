"""Sentences say what the document says."""

import pytest

from sepconvert.base.notes import NoteLevel
from sepconvert.report.text.sentences import causes, machine, sentences, story, warnings_of


def texts(document) -> list[str]:
    return [str(note) for note in sentences(document)]


def unfolded(text: str) -> str:
    """Lines and columns joined by single blanks."""
    return " ".join(text.split())


def test_an_exact_conversion(document):
    first, *others = texts(document)
    assert first.startswith("Deploy converted.onnx: 1 of 2 convolutions converted, ")
    assert others == [
        "Verified: PyTorch float64 outputs differ by 3.5e-08 (tolerance 4.5e-06), "
        "ONNX Runtime float32 outputs by 6.5e-08 (tolerance 5.5e-06).",
        "Latency: 50 interleaved runs, batch 1, median and 95 % interval; "
        "the original against itself: [0.980, 1.020].",
        "Timed on AMD EPYC (8 cores, AVX2, FMA, 2.4 GHz) in ONNX Runtime 1.32.0: provider cpu, 2 threads, "
        "spinning off, sequential execution, graph optimization all.",
        "Predictions agree on 99.50 % of 2,000 images.",
        "Not counted in MACs: add, mul.",
    ]
    assert {note.level for note in sentences(document)} == {NoteLevel.INFO}


def test_what_may_be_no_convolution_is_counted_apart(document):
    kept = {**document["layers"][0], "decision": "kept", "name": "unfold_0", "reason_code": "unfollowed"}
    document["layers"].append(kept)
    first, second, *_ = texts(document)
    assert "1 of 2 convolutions converted, " in first
    assert second == "Other operators that may be part of a convolution: 1; listed with the reason."
    assert story(document)[0].startswith("1 of 2 convolutions were replaced")


def test_an_approximate_conversion(approximate):
    first, *others = texts(approximate)
    assert first.startswith("Deploy converted.onnx: 1 of 2 convolutions converted, ")
    assert others[:2] == [
        "Approximate: outputs differ from the original's by up to 3.5e-08. Verified: converted.onnx in ONNX "
        "Runtime differs from the converted model in PyTorch by 6.5e-08 (tolerance 5.5e-06).",
        "Calibrated on 768 images (`calib`); plans compared on 256 held-out images.",
    ]


def test_what_a_choice_leaves_to_be_expected_is_said(approximate):
    choice = approximate["approximation"]["choice"]

    def said():
        return next(text for text in texts(approximate) if "unseen" in text)

    assert said() == ("On unseen images of the same kind, expect a drop of up to 0.75 pp (95 % confidence).")
    choice |= {"plans": 6, "rest": {"value": 0.5, "ci95": [-0.25, 1.25], "unit": "pp", "n": 2000}}
    assert said().startswith(
        "6 plans were measured on 2,000 images; the best was taken, which favours it; on 2,000 others, its "
        "drop is 0.50 "
    )
    assert said().endswith(
        "On unseen images of the same kind, expect a drop of up to 0.75 pp (95 % confidence, with allowance "
        "for the choice)."
    )
    choice |= {"confidence": 0.95, "bound": 1.0}
    assert said() == (
        "With 95 % confidence, the drop on unseen images of the same kind is at most 1 pp (`max_drop`). "
        "Plans that were tested, in an order fixed beforehand: 6."
    )
    approximate["approximation"]["choice"] = None
    assert not any("unseen" in text for text in texts(approximate))


def test_a_difference_that_is_not_the_conversions_is_a_warning(document):
    check = document["verification"]
    check |= {"original_onnx_max_abs_diff": 1e-6, "original_onnx_tolerance": 1e-6}
    assert not any("original.onnx" in text for text in texts(document))
    check["original_onnx_max_abs_diff"] = 2e-5
    warned = [note.text for note in warnings_of(document) if "original.onnx" in note.text]
    assert len(warned) == 1
    assert "by 2.0e-05, where rounding explains 1.0e-06" in warned[0]


def test_without_onnx_runtime_the_reason_is_given(bare):
    first, *others = texts(bare)
    assert first.startswith("1 of 2 convolutions converted, ")
    assert others == [
        "Verified: PyTorch float64 outputs differ by 3.5e-08 (tolerance 4.5e-06). Not verified in ONNX "
        "Runtime: no kernel.",
    ]
    bare["verification"]["torch_tolerance"] = None
    assert texts(bare)[1] == (
        "Approximate: outputs differ from the original's by up to 3.5e-08. Not verified in ONNX Runtime: "
        "no kernel."
    )


def nothing(document, *codes):
    """The first sentence of a conversion that kept layers for these reasons."""
    layer = {**document["layers"][0], "decision": "kept"}
    document["layers"] = [{**layer, "reason_code": code} for code in codes]
    first = sentences(document)[0]
    assert first.level is NoteLevel.WARNING
    return first.text


def test_an_exact_conversion_of_nothing_says_what_to_try(document):
    assert not any("nothing was converted" in text for text in texts(document))
    assert nothing(document, "obstacle", "full-rank", "full-rank") == (
        "nothing was converted. Of 3 convolutions: 2 without an exact structure, 1 not replaceable here. "
        "`mode` auto, with `calib` and `data`, may find approximations that pay at a small loss of accuracy."
    )
    assert "`gate` none" in nothing(document, "costs-more")
    assert "Of 1 convolution: 1 not selected. Select other" in nothing(document, "not-selected")
    assert "what stands in the way" in nothing(document, "obstacle")
    assert "runs no convolution" in nothing(document)


def test_an_approximate_conversion_of_nothing_says_what_to_try(approximate):
    budget = approximate["approximation"]["budget"]
    assert nothing(approximate, "budget", "costs-more") == (
        "nothing was converted. Of 2 convolutions: 1 kept by the budget, 1 without a form that passes the "
        "gate. Raise `max_drop` (it is 1), or recover accuracy by training (`finetune`)."
    )
    budget["confidence"] = 0.9
    assert "leave out `confidence`" in nothing(approximate, "budget")
    budget |= {"confidence": None, "max_drop": None}
    assert "meets the budget as it is: demand more" in nothing(approximate, "budget")
    assert "Pass more `memory`" in nothing(approximate, "too-large")


def test_layers_whose_times_are_modelled_are_named(approximate):
    def named(lines):
        return any(
            "no time was left to measure: the times of forms of stem.conv." in unfolded(line)
            for line in lines
        )

    assert not named(texts(approximate))
    assert not named(story(approximate))
    approximate["approximation"]["modelled"] = ["stem.conv"]
    assert named(texts(approximate))
    assert named(story(approximate))


def test_merged_pairs_are_named_and_the_others_counted(approximate):
    merge = {"first": "a", "second": "b", "decision": "merged", "reason": "the dense form has 1 MAC"}
    kept = {**merge, "decision": "kept"}
    approximate["approximation"]["merges"] = [merge, kept, kept]
    assert texts(approximate)[2:4] == [
        "Merged: b into a; the dense form has 1 MAC.",
        "Not merged: 2 of 3 linear pairs of convolutions; report.json says why.",
    ]


def test_attempts_at_fine_tuning_are_told(approximate):
    approximate["approximation"]["finetune"] = {
        "attempts": [
            {"drop_before_pp": 2.5, "drop_pp": 0.75, "delivered": True},
            {"drop_before_pp": 4.0, "drop_pp": 1.25, "delivered": False},
        ]
    }
    assert texts(approximate)[3:5] == [
        "Fine-tuning changed a plan's drop from 2.50 to 0.75 pp; it was delivered.",
        "Fine-tuning changed a plan's drop from 4.00 to 1.25 pp; it was not delivered.",
    ]


def test_a_metric_in_decibels_is_told(restored):
    found = texts(restored)
    reaches = (
        "reaches 28.10 dB of psnr on 300 images, the original 28.20 dB: a drop of 0.098 dB [0.0901, 0.106]."
    )
    assert f"The converted model {reaches}" in found
    assert not any("accuracy" in text or " pp" in text for text in found)
    assert unfolded(story(restored)[-1]) == f"It {reaches}"
    attempt = {"drop_before_pp": 0.25, "drop_pp": 0.075, "delivered": True}
    restored["approximation"]["finetune"] = {"attempts": [attempt]}
    assert "Fine-tuning changed a plan's drop from 0.25 to 0.075 dB; it was delivered." in texts(restored)
    restored["approximation"]["calibration"]["seen_twice"] = {
        "calib": {"images": 9, "compared": 9, "scored": 2}, "train": None,
    }  # fmt: skip
    assert any("so the psnr on others may be worse than is reported" in text for text in texts(restored))
    assert "(it is 0.1 dB), or recover psnr by" in nothing(restored, "budget")


def test_an_error_is_not_said_to_drop(restored):
    error = {"name": "mse", "unit": "", "higher_is_better": False, "original": 0.5, "converted": 0.5125}
    restored["delta"]["metric"] = {**error, "drop": 0.0125, "ci95": [0.01, 0.015], "n": 300}
    assert (
        "The converted model reaches 0.5125 of mse on 300 images, the original 0.5: worse by 0.0125 "
        "[0.01, 0.015]." in texts(restored)
    )


def test_export_limits_are_told(document):
    document["dtype"] = "float64"
    document["export"]["reason"] = "the model fixes the batch size"
    found = texts(document)
    assert (
        "The ONNX files are float32, as ONNX Runtime has no float64 convolutions; converted.pt2 keeps "
        "float64." in found
    )
    assert "The batch dimension of the ONNX files is fixed: the model fixes the batch size." in found


def test_without_times_no_machine_is_named(bare):
    assert not any("Timed on" in text for text in texts(bare))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"graph_optimization": "basic"}, "graph optimization basic."),
        ({"spinning": "on", "threads": 1}, "provider cpu, 1 thread, spinning on, sequential"),
        (
            {"provider": "openvino", "provider_options": {"num_of_threads": "2"}},
            "provider openvino (num_of_threads=2), 2 threads, sequential",
        ),
        (
            {"provider": "cuda", "provider_takes_threads": False},
            "provider cuda, 2 threads for what it leaves to the CPU, sequential",
        ),
        ({"load_average": 8.25}, "(8 cores, AVX2, FMA, 2.4 GHz, load 8.2)"),
        ({"load_average": None, "clock_mhz": None, "instruction_sets": [], "cores": 1}, "(1 core)"),
    ],
)
def test_other_machines_and_settings(document, change, text):
    assert text in str(machine({**document["environment"], **change})[0])


def test_more_threads_than_cores_are_warned_of(document):
    environment = document["environment"]
    assert len(machine({**environment, "threads": 8})) == 1
    _, note = machine({**environment, "threads": 9})
    assert note.level is NoteLevel.WARNING
    assert note.text.startswith("9 threads share 8 cores")


# Warnings ------------------------------------------------------------------------------------------


def test_warnings_are_the_sentences_of_that_level(approximate):
    assert warnings_of(approximate) == []
    approximate["approximation"]["calibration"]["images"] = 1
    (note,) = warnings_of(approximate)
    assert note.level is NoteLevel.WARNING
    assert str(note) in texts(approximate)


def test_files_that_were_not_written(document):
    document["export"]["missing"] = {"original.onnx": "no", "converted.onnx": "no", "converted.pt2": "never"}
    (note,) = warnings_of(document)
    assert note.text.startswith("not written: original.onnx, converted.onnx, converted.pt2. no; never. ")


def test_a_layer_that_became_slower_is_named(document):
    document["layers"][1]["latency_speedup"] = {"median": 0.5, "ci95": [0.4, 0.6], "significant": True}
    (note,) = warnings_of(document)
    assert note.text.startswith("fewer MACs but slower when timed alone: large.conv. ")


def test_an_original_that_differs_from_itself(document):
    document["delta"]["latency_speedup"]["noise_floor"] = [1.01, 1.08]
    (note,) = warnings_of(document)
    assert note.text.startswith("the original differs from itself")


def test_files_that_are_slower_than_was_demanded(approximate):
    approximate["approximation"]["budget"]["min_speedup"] = 1.6
    (note,) = warnings_of(approximate)
    assert note.text.startswith("1.6× was demanded")
    assert "the files are measured 1.50× [1.40, 1.60] as fast" in note.text
    approximate["approximation"]["budget"]["min_speedup"] = 1.5
    assert warnings_of(approximate) == []


def test_conversion_without_calibration(approximate):
    approximate["approximation"].update(calibration=None, steps=[], metric="weights")
    (note,) = warnings_of(approximate)
    assert note.text.startswith("without calibration images, factors were fitted to the weights alone")


@pytest.mark.parametrize(("images", "warned"), [(63, True), (64, False)])
def test_few_images(approximate, images, warned):
    approximate["approximation"]["calibration"]["images"] = images
    assert any("so few images" in note.text for note in warnings_of(approximate)) is warned


@pytest.mark.parametrize(
    ("calib", "train", "text"),
    [
        ((768, 768, 0), None, None),
        ((768, 768, 0), (5000, 768, 0), None),
        ((768, 768, 1), None, "1 scored image is also among 768 calibration images, so the accuracy"),
        ((768, 768, 12), (768, 768, 12), "12 scored images are also among 768 training images, so"),
        ((768, 768, 0), (5000, 256, 3), "3 scored images are also among 256 of 5,000 training images, so"),
        ((768, 768, 9), (5000, 256, 0), "9 scored images are also among 768 calibration images, so"),
    ],
)
def test_images_that_were_seen_twice(approximate, calib, train, text):
    calib, train = (
        each and dict(zip(("images", "compared", "scored"), each, strict=True)) for each in (calib, train)
    )
    approximate["approximation"]["calibration"]["seen_twice"] = {"calib": calib, "train": train}
    warned = [note.text for note in warnings_of(approximate)]
    assert [each[: len(text or "")] for each in warned] == ([text] if text else [])


# The story and the causes --------------------------------------------------------------------------


def test_the_story_of_a_conversion(document):
    assert [unfolded(line) for line in story(document)] == [
        "1 of 2 convolutions were replaced (spatial-vh).",
        "An image takes 2.00× fewer multiplications, and the network has 4.00× fewer parameters.",
        "Its outputs are the same: they differ by 4e-08, which is rounding error.",
        "Its speed-up, measured in ONNX Runtime, is 1.50× [1.40, 1.60].",
        "It classifies 96.50 % of 2,000 images correctly, the original 96.75 %: a drop of 0.25 pp "
        "[-0.05, 0.55].",
    ]
    assert max(len(part) for line in story(document) for part in line.splitlines()) <= 80


def test_the_story_of_an_approximation_claims_no_equality(approximate):
    text = " ".join(story(approximate))
    assert "(depthwise-pointwise)" in text
    assert "rounding" not in text


def test_the_story_of_a_conversion_that_replaced_nothing(document):
    kept = [{**layer, "decision": "kept", "scheme": None} for layer in document["layers"]]
    first, *others = story({**document, "layers": kept})
    assert unfolded(first).startswith("Warning: nothing was converted. Of 2 convolutions:")
    assert not any("fewer" in line for line in others)


def test_causes_of_the_model_and_of_its_layers(document):
    assert causes(document) == [
        "The whole model: 2.00× fewer MACs, measured 1.50× as fast; 25 % of the remaining time is in layers "
        "that were not replaced, 12 % in copies to other memory layouts; 6 operators instead of 4.",
        "large.conv: 4.00× fewer MACs, measured alone 1.50× as fast; memory is slow.",
    ]


def test_causes_call_no_noise_a_gain(document):
    document["delta"]["latency_speedup"]["significant"] = False
    assert "measured 1.50× as fast (within noise); 25 %" in causes(document)[0]


def test_what_changed_nothing_needs_no_cause(document):
    document["delta"]["macs_ratio"] = 1.0
    assert causes(document) == []
