"""Tables say what the document says, in 80 columns."""

import json

from sepconvert.report.text.numbers import fold
from sepconvert.report.text.tables import (
    anatomy_text,
    curve_table,
    layer_table,
    modes_table,
    structure_table,
    summary,
    time_line,
)


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


# The summary ---------------------------------------------------------------------------------------


def test_costs(document):
    rows = cells(summary(document))
    assert rows["parameters"] == ["4,000", "1,000", "4.00×"]
    assert rows["MACs"] == ["2,012,345", "1,006,172", "2.00×"]
    assert rows["FLOPs (2 × MACs)"] == ["4,024,690", "2,012,344", "2.00×"]
    assert rows["weights, bytes"] == ["16,000", "4,000"]
    assert rows["ONNX file, bytes"] == ["20,000", "5,000"]
    assert rows["latency, ms"] == ["1.500 [1.350, 1.650]", "1.000 [0.900, 1.100]", "1.50× [1.40, 1.60]"]
    assert rows["top-1, %"] == ["96.75", "96.50", "drop 0.25 pp"]
    assert "[-0.05, 0.55]" in rows  # in the line below
    assert not any(name.startswith("top-5") for name in rows)


def test_top5_is_shown_if_there_is_one(document):
    document["original"]["accuracy"]["top5"] = 0.999
    document["converted"]["accuracy"]["top5"] = 0.9985
    assert cells(summary(document))["top-5, %"] == ["99.90", "99.85"]


def test_costs_without_latency_and_accuracy(bare):
    rows = cells(summary(bare))
    assert "latency, ms" not in rows
    assert "top-1, %" not in rows
    assert rows["MACs"] == ["2,012,345", "0"]


def test_what_is_within_noise_says_so(document):
    document["delta"]["latency_speedup"].update(median=1.02, ci95=[0.97, 1.05], significant=False)
    rows = cells(summary(document))
    assert rows["latency, ms"][2] == "1.02× [0.97, 1.05]"
    assert "~ within noise" in rows  # in the line below


def test_sentences_and_causes_follow(document):
    text = unfolded(summary(document))
    assert text.startswith("Deploy converted.onnx: 1 of 2 convolutions converted, ")
    assert "Where the time goes: The whole model: 2.00× fewer MACs" in text
    document["execution"] = None
    assert "Where the time goes" not in summary(document)


def test_warnings_are_marked(approximate):
    assert "Warning" not in summary(approximate)
    approximate["approximation"]["calibration"]["images"] = 63
    assert "\nWarning: factors fitted to so few images" in summary(approximate)


def test_steps_and_curve_of_an_approximation(approximate):
    rows = [unfolded(line) for line in summary(approximate).splitlines()]
    assert "On the held-out images:" in rows
    assert "fit the weights 9.5000 15.0 12.5" in rows
    assert "re-estimate BatchNorm (not kept) 0.7500 50.0 -" in rows
    assert "2.00× 1 0.0625 0.25 [-0.05, 0.55] - - <-" in rows
    assert "1 plan was measured on `data`; <- is delivered." in rows


def test_a_single_plan_is_no_curve(approximate):
    del approximate["approximation"]["curve"][0]
    assert "delivered" not in summary(approximate)


def test_accuracy_on_held_out_images_takes_labels(approximate):
    for step in approximate["approximation"]["steps"]:
        step["accuracy"] = None
    assert "fit the weights 9.5000 15.0" in [unfolded(line) for line in summary(approximate).splitlines()]


def test_the_text_needs_no_more_than_the_json(document):
    assert summary(json.loads(json.dumps(document))) == summary(document)


def test_the_last_line_is_what_the_time_went_to(document):
    text = "Time: 200 s (survey 36 %, timing 32 %, export 20 %, others 12 %); peak memory 3.2 GB."
    assert summary(document).endswith("\n\n" + fold(text))
    del document["stages"]  # version 0.1.0 did not count
    assert "Time:" not in summary(document)


def test_few_stages_are_named(document):
    kinds = ("moments", "fits", "survey", "timing", "accuracy", "export")
    stages = [{"stage": name, "wall_s": 7.0 - n, "peak_bytes": 2.5e6} for n, name in enumerate(kinds)]
    text = time_line(stages)
    named = "moments 26 %, fits 22 %, survey 19 %, timing 15 %, accuracy 11 %, others 7 %"
    assert text == f"Time: 27 s ({named}); peak memory 2.5 MB."
    assert "others" not in time_line(stages[:1])
    assert "rest" not in time_line([{**stages[0], "stage": "rest"}, stages[1]])


# Layers and structures -----------------------------------------------------------------------------


def test_layers(document, approximate):
    rows = cells(layer_table(document["layers"]))
    assert rows["layer"] == ["kernel", "scheme", "MACs", "error"]
    assert rows["stem.conv"] == ["3×3 8→16", "kept", "12.3k", "≥ 1.2e-01"]
    assert rows["large.conv"] == ["3×3 8→16", "spatial-vh 2", "2M → 500k", "4.5e-08"]
    assert cells(layer_table(approximate["layers"]))["large.conv"][3] == "0.38 out"


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


def test_structures(document):
    transposed = {**document["layers"][0], "name": "up", "structures": []}
    text = structure_table([*document["layers"], transposed])
    rows, firsts = cells(text), [line.split("  ")[0].strip() for line in text.splitlines()]
    assert firsts[-5:] == ["stem.conv", "- spatial-vh", "large.conv", "- spatial-vh", "up"]
    assert rows["- spatial-vh"] == ["2/24 holds", "6.5e-09 @ 2", "5.0e-01 2.5e-01 | 1.5e-09"]
    assert rows["up"] == ["none applies"]


# Other tables --------------------------------------------------------------------------------------


def test_modes_side_by_side(document):
    bare = json.loads(json.dumps(document))
    bare["delta"].update(latency_speedup=None, metric=None, accuracy_drop_pp=None)
    rows = cells(modes_table({"exact": document, "none": bare}))
    assert rows["exact"] == [
        "4.00×", "2.00×", "1.50× [1.40, 1.60]", "96.75 → 96.50", "0.25 [-0.05, 0.55]",
    ]  # fmt: skip
    assert rows["none"] == ["4.00×", "2.00×", "-", "-", "-"]
    document["delta"]["latency_speedup"]["significant"] = False
    lines = modes_table({"approx": document}).splitlines()
    assert "~ within noise" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_tables_of_a_metric_in_decibels(restored):
    text = summary(restored)
    rows = cells(text)
    assert rows["psnr, dB"] == ["28.20", "28.10", "drop 0.098 dB"]
    assert "[0.0901, 0.106]" in rows  # in the line below
    assert not any(name.startswith("top-") for name in rows)
    assert "drop, dB" in text
    assert "2.00× 1 0.0625 0.098 [0.0901, 0.106] - - <-" in [unfolded(line) for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    modes = modes_table({"auto": restored})
    assert "psnr, dB" in modes
    assert cells(modes)["auto"][3:] == ["28.20 → 28.10", "0.098 [0.0901, 0.106]"]


def test_another_metric_of_a_classifier_has_a_row_of_its_own(document):
    document["delta"]["metric"] |= {"name": "f1", "original": 95.5, "converted": 95.25}
    rows = cells(summary(document))
    assert rows["top-1, %"] == ["96.75", "96.50"]
    assert rows["f1, %"] == ["95.50", "95.25", "drop 0.25 pp"]
    document["delta"]["metric"]["name"] = "top5"
    document["original"]["accuracy"]["top5"] = document["converted"]["accuracy"]["top5"] = 0.999
    assert cells(summary(document))["top-5, %"] == ["99.90", "99.90", "drop 0.25 pp"]


def test_the_curve_has_a_row_for_each_plan(approximate):
    curve = approximate["approximation"]["curve"]
    curve[1].update(
        predicted_speedup=1.75, latency_speedup={"median": 1.5, "ci95": [1.4, 1.6], "significant": True}
    )
    curve[0].update(heldout=None)
    lines = [unfolded(line) for line in curve_table(curve).splitlines()]
    assert lines[-2:] == [
        "1.00× 0 - - - -",
        "2.00× 1 0.0625 0.25 [-0.05, 0.55] 1.75× 1.50 [1.40, 1.60] <-",
    ]
    curve[1]["latency_speedup"]["significant"] = False
    lines = [unfolded(line) for line in curve_table(curve).splitlines()]
    assert lines[-2].endswith("1.50 [1.40, 1.60] ~ <-")
    assert lines[-1] == "~ within noise"
    assert max(map(len, curve_table(curve).splitlines())) <= 80


def test_the_unit_of_drops_is_that_of_those_that_were_measured(approximate):
    curve = approximate["approximation"]["curve"]
    assert "drop, pp" in curve_table(curve)
    assert "drop, " not in curve_table(curve[:1])


def test_the_anatomy_of_a_file(document):
    operators = [
        {"name": f"node{n}", "layer": f"layer{n}" if n else None, "operator": "Conv", "kernel": None,
         "milliseconds": 1.0 if n else 4.0, "bytes_moved": 1}
        for n in range(14)
    ]  # fmt: skip
    anatomy = {
        "peak_activation_bytes": 3 * 2**19,
        "startup": {"session_ms": 12.25, "first_run_ms": 1.5, "sessions": 5},
        "latencies_ms": [{**document["converted"]["latency_ms"], "per_second": 1234.5}],
        "operators": operators,
    }
    text = anatomy_text(anatomy)
    startup = "Creating a session takes 12.2 ms, its first run 1.50 ms (medians of 5 sessions)."
    assert startup in unfolded(text)
    assert "Peak memory of activations: 1.50 MiB." in text
    rows = cells(text)
    assert rows["2"] == ["1", "1.000 [0.900, 1.100]", "1.080", "1,234"]
    assert rows["node0"] == ["Conv", "4.000", "23.5"]
    assert rows["layer11"] == ["Conv", "1.000", "5.9"]
    assert rows["2 others"] == ["2.000", "11.8"]
    anatomy["peak_activation_bytes"] = None
    assert "unknown" in anatomy_text(anatomy)
