"""Tables and sentences say what the document says."""

import json

import pytest

from sepconvert.report.sentences import causes, sentences, story, warnings_of
from sepconvert.report.tables import layer_table, modes_table, structure_table, summary


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a table by their first cell; cells are two blanks or more apart."""
    rows = ([cell for cell in line.split("  ") if cell.strip()] for line in table.splitlines())
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row}


def unfolded(text: str) -> str:
    """Lines and columns joined by single blanks."""
    return " ".join(text.split())


def test_80_columns_are_enough(document, approximate):
    for text in (layer_table(document["layers"]), structure_table(document["layers"]), summary(document),
                 summary(approximate)):  # fmt: skip
        assert max(map(len, text.splitlines())) <= 80


def test_summary_table(document):
    rows = cells(summary(document))
    assert rows["parameters"] == ["4,000", "1,000", "4.00×"]
    assert rows["MACs"] == ["2,012,345", "1,006,172", "2.00×"]
    assert rows["FLOPs (2 × MACs)"] == ["4,024,690", "2,012,344", "2.00×"]
    assert rows["weights, bytes"] == ["16,000", "4,000"]
    assert rows["ONNX file, bytes"] == ["20,000", "5,000"]
    assert rows["latency, ms"] == ["1.500 [1.350, 1.650]", "1.000 [0.900, 1.100]", "1.50 [1.40, 1.60]×"]
    assert rows["top-1, %"] == ["96.75", "96.50", "drop 0.25 pp"]
    assert "[-0.05, 0.55]" in rows  # in the line below
    assert not any(name.startswith("top-5") for name in rows)


def test_top5_is_shown_if_there_is_one(document):
    document["original"]["accuracy"]["top5"] = 0.999
    document["converted"]["accuracy"]["top5"] = 0.9985
    assert cells(summary(document))["top-5, %"] == ["99.90", "99.85"]


def test_summary_without_latency_and_accuracy(bare):
    rows = cells(summary(bare))
    assert "latency, ms" not in rows
    assert "top-1, %" not in rows
    assert rows["MACs"] == ["2,012,345", "1,006,172"]
    assert "ONNX Runtime could not be asked: no kernel." in unfolded(summary(bare))


def test_sentences(document):
    assert sentences(document) == [
        "1 of 2 convolutions converted.",
        "Verified: PyTorch float64 outputs differ by 3.5e-08 (tolerance 4.5e-06), "
        "ONNX Runtime float32 outputs by 6.5e-08 (tolerance 5.5e-06).",
        "Latency: 50 interleaved runs, batch 1, 2 threads, median and 95 % interval; "
        "the original against itself: [0.980, 1.020].",
        "Predictions agree on 99.50 % of 2,000 images.",
        "Not counted in MACs: add, mul.",
    ]


def test_an_exact_conversion_of_nothing_says_what_to_try(document):
    assert not any("--mode auto" in line for line in sentences(document))
    document["layers"] = document["layers"][:1]
    assert any("--mode auto, with --calib and --data" in line for line in sentences(document))
    document["mode"] = "approx"
    assert not any("--mode auto" in line for line in sentences(document))


def test_layers_that_were_not_timed_are_named(document):
    assert not any("no time was left" in line for line in sentences(document))
    document["layers"][0]["reason"] = "was not timed within --measure-seconds, least MACs for each form last"
    for lines in (sentences(document), story(document)):
        assert any("no time was left to measure their forms: stem.conv" in line for line in lines)


def test_what_is_within_noise_says_so(document):
    document["delta"]["latency_speedup"].update(median=1.02, ci95=[0.97, 1.05], significant=False)
    rows = cells(summary(document))
    assert rows["latency, ms"][2] == "1.02 [0.97, 1.05]×"
    assert "~ within noise" in rows  # in the line below


def attention(document):
    return [line for line in sentences(document) if "Attention" in line]


def test_fewer_macs_but_slower_names_the_gate(document):
    document["delta"]["latency_speedup"].update(median=0.8, ci95=[0.75, 0.85])
    (line,) = attention(document)
    assert "fewer MACs, yet 1.25× the latency" in line
    assert "--gate latency" in line


@pytest.mark.parametrize(
    "speedup", [{"median": 1.5}, {"median": 0.98, "significant": False}], ids=["faster", "within noise"]
)
def test_no_alarm_without_a_measured_loss(document, speedup):
    document["delta"]["latency_speedup"].update(speedup)
    assert attention(document) == []


def test_a_layer_that_became_slower_is_named(document):
    document["layers"][1]["latency_speedup"] = {"median": 0.5, "ci95": [0.4, 0.6], "significant": True}
    (line,) = attention(document)
    assert "slower when timed alone: large.conv." in line
    assert "--gate latency" in line


def test_a_fixed_batch_and_another_dtype_are_told(document):
    document["dtype"] = "float64"
    document["export"]["reason"] = "the model fixes the batch size"
    text = " ".join(sentences(document))
    assert "The ONNX files are float32, ONNX Runtime having no float64 convolutions" in text
    assert "The batch dimension of the ONNX files is fixed: the model fixes the batch size." in text


def test_layer_table(document):
    rows = cells(layer_table(document["layers"]))
    assert rows["layer"] == ["kernel", "scheme", "MACs", "error"]
    assert rows["stem.conv"] == ["3×3 8→16", "kept", "12.3k", "≥ 1.2e-01"]
    assert rows["large.conv"] == ["3×3 8→16", "spatial-vh 2", "2M → 500k", "4.5e-08"]


def test_reasons_are_given_once_with_their_layers(document):
    document["layers"].append({**document["layers"][0], "name": "last"})
    lines = layer_table(document["layers"]).splitlines()
    assert lines[-2:] == ["stem.conv, last: no exact structure.", "large.conv: rank 2 of 24."]


def test_layers_without_a_kernel_and_with_groups(document):
    document["layers"][0].update(kernel=None, kind="ConvTranspose2d", structures=[])
    document["layers"][1]["kernel"]["groups"] = 8
    document["layers"][1]["weight_error"] = 0.0
    rows = cells(layer_table(document["layers"]))
    assert rows["stem.conv"] == ["ConvTranspose2d", "kept", "12.3k"]
    assert rows["large.conv"][0] == "3×3 8→16 /8"
    assert rows["large.conv"][3] == "0"


def test_no_text_of_a_long_cell_is_lost(document):
    name, reason = "backbone." * 9 + "conv", "because " * 30
    document["layers"][0].update(name=name, reason=reason)
    lines = layer_table(document["layers"]).splitlines()
    assert name in "".join(line[:20].strip() for line in lines)
    assert sum(line.count("because") for line in lines) == 30
    assert any(line.startswith(f"{name}:") for line in lines)  # whole, for --exclude


def test_structure_table(document):
    document["layers"].append({"name": "up", "structures": [], "reason": "transposed"})
    text = structure_table(document["layers"])
    rows, firsts = cells(text), [line.split("  ")[0].strip() for line in text.splitlines()]
    assert firsts[-5:] == ["stem.conv", "- spatial-vh", "large.conv", "- spatial-vh", "up"]
    assert rows["- spatial-vh"] == ["2/24 holds", "6.5e-09 @ 2", "5.0e-01 2.5e-01 | 1.5e-09"]
    assert rows["up"] == ["none applies"]


def test_the_text_needs_no_more_than_the_json(document):
    assert summary(json.loads(json.dumps(document))) == summary(document)


def test_conversions_within_tol_only_are_not_passed_off_as_exact(document):
    assert "within --tol" not in summary(document)
    converted = next(layer for layer in document["layers"] if layer["decision"] == "converted")
    converted["exact"] = False
    assert "1 of them within --tol only, not exactly" in unfolded(summary(document))


def test_an_approximate_conversion(approximate):
    text = summary(approximate)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "Approximate: outputs differ from the original's by up to 3.5e-08." in unfolded(text)
    assert "against the converted model in PyTorch: 6.5e-08 (tolerance 5.5e-06)" in unfolded(text)
    assert "Calibrated on 768 images (--calib); plans judged on 256 others." in rows
    assert "within --tol only" not in text
    assert "fit the weights 9.5000 15.0 12.5" in rows
    assert "re-estimate BatchNorm (not kept) 0.7500 50.0 -" in rows
    assert "2.00× 1 0.0625 0.25 [-0.05, 0.55] - - <-" in rows
    assert "1 plans were measured on --data; <- is delivered." in rows
    assert "0.38 out" in layer_table(approximate["layers"])


def test_accuracy_on_images_held_out_takes_labels(approximate):
    for step in approximate["approximation"]["steps"]:
        step["accuracy"] = None
    text = summary(approximate)
    assert "fit the weights 9.5000 15.0" in [" ".join(line.split()) for line in text.splitlines()]


def test_conversion_without_calibration_is_warned_of(approximate):
    approximate["approximation"].update(calibration=None, steps=[], metric="weights")
    assert "Warning: without calibration images" in unfolded(summary(approximate))


def test_few_images_are_warned_of(approximate):
    assert "Warning" not in summary(approximate)
    approximate["approximation"]["calibration"].update(images=63)
    assert "Warning: what is fitted to so few images" in summary(approximate)


def test_warnings_are_for_those_too_who_want_no_output(approximate):
    assert warnings_of(approximate) == []
    approximate["approximation"]["calibration"]["images"] = 1
    (warning,) = warnings_of(approximate)
    assert "so few images" in warning
    assert warning in sentences(approximate)


def test_the_story_of_a_conversion(document):
    text = " ".join(unfolded(line) for line in story(document))
    assert text.startswith("1 of 2 convolutions were replaced (spatial-vh).")
    assert "2.00× fewer multiplications, and the network has 4.00× fewer parameters" in text
    assert "they differ by 4e-08, which is rounding" in text
    assert "it is 1.50 [1.40, 1.60]× as fast" in text
    assert "it classifies 96.50 % rightly, the original 96.75 %: 0.25 [-0.05, 0.55] points lost" in text
    assert max(len(part) for line in story(document) for part in line.splitlines()) <= 80


def test_the_story_of_an_approximation_claims_no_equality(approximate):
    text = " ".join(story(approximate))
    assert "(depthwise-pointwise)" in text
    assert "rounding" not in text


def test_modes_side_by_side(document):
    bare = json.loads(json.dumps(document))
    bare["delta"].update(latency_speedup=None, accuracy_drop_pp=None)
    rows = cells(modes_table({"exact": document, "none": bare}))
    assert rows["exact"] == ["4.00×", "2.00×", "1.50 [1.40, 1.60]", "0.25 [-0.05, 0.55]"]
    assert rows["none"] == ["4.00×", "2.00×", "-", "-"]


def test_what_changed_nothing_needs_no_cause(document):
    assert causes(document)
    document["delta"]["macs_ratio"] = 1.0
    assert causes(document) == []


def test_an_original_that_differs_from_itself_is_told_of(document):
    assert attention(document) == []
    document["delta"]["latency_speedup"]["noise_floor"] = [1.01, 1.08]
    (line,) = attention(document)
    assert "the original differs from itself" in line


def test_the_story_of_a_conversion_that_replaced_nothing(document):
    kept = [{**layer, "decision": "kept", "scheme": None} for layer in document["layers"]]
    first, *_ = story({**document, "layers": kept})
    assert first == f"0 of {len(kept)} convolutions were replaced."


def test_files_that_are_slower_than_was_demanded_are_told_of(approximate):
    assert not any("demanded" in line for line in warnings_of(approximate))
    approximate["approximation"]["budget"]["min_speedup"] = 1.6
    (warning,) = (line for line in warnings_of(approximate) if "demanded" in line)
    assert warning.startswith("Warning: 1.6× was demanded")
    assert "the files are measured 1.50 [1.40, 1.60]×" in warning
    approximate["approximation"]["budget"]["min_speedup"] = 1.5
    assert not any("demanded" in line for line in warnings_of(approximate))
