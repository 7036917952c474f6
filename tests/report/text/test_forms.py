"""What a report says of the four forms, on documents made by hand."""

import pytest
from report.int8_forms import NAMES, deployed, ratio

from sepconvert.base.notes import NoteLevel
from sepconvert.report.text import forms
from sepconvert.report.text.forms import headers, quantization, rows, verdict
from sepconvert.report.text.sentences import sentences


def said(document):
    """Level and text of the verdict."""
    note = verdict(document)
    assert "\n" not in note.text
    assert "  " not in note.text
    assert note.text.endswith(".")
    return note.level, note.text


def nothing_converted(document):
    for layer in document["layers"]:
        layer["decision"] = "kept"
    return document


# The verdict ------------------------------------------------------------------------------------------


def test_in_floating_point_there_is_no_verdict(document, bare, approximate):
    for each in (document, bare, approximate):
        assert verdict(each) is None
        assert quantization(each) == []


def test_a_gain_over_int8(document):
    level, text = said(deployed(document))
    assert level is NoteLevel.INFO
    assert text == (
        "Deploy converted-int8.onnx: 1.50× [1.35, 1.65] as fast as int8 alone, 3.00× as fast as floating "
        "point, losing 0.50 pp. int8 alone is 2.00× as fast as in floating point, losing 0.25 pp."
    )


@pytest.mark.parametrize(
    "numbers",
    [
        {"both": 3.0, "int8_noise": True},
        {"both": 1.8},
        {"both": 2.0, "int8_noise": True},
    ],
    ids=["within noise", "slower", "equal"],
)
def test_no_gain_over_int8(document, numbers):
    level, text = said(deployed(document, **numbers))
    assert level is NoteLevel.WARNING
    assert text.startswith("int8 alone is the better choice: converting it as well gains nothing (")
    assert f"({numbers['both'] / 2:.2f}× [" in text
    assert text.endswith(
        "Deploy original-int8.onnx, 2.00× as fast as in floating point, losing 0.25 pp."
    )  # fmt: skip


def test_figures_of_an_original_near_chance_are_no_reason_to_deploy(approximate):
    approximate["original"]["accuracy"] |= {"top1": 0.13, "n": 2000}  # one answer for all has 0.125
    level, text = said(deployed(approximate))
    assert level is NoteLevel.WARNING
    assert text.startswith("not to be judged by these figures: converted-int8.onnx is 1.50× ")
    assert "Deploy" not in text


def test_nothing_converted(document):
    level, text = said(deployed(nothing_converted(document), converted=1.0, both=2.0, int8_noise=True))
    assert level is NoteLevel.WARNING
    assert text.startswith("int8 alone is the better choice: nothing could be converted. Deploy original-")


@pytest.mark.parametrize("both", [0.9, 0.6])
def test_int8_is_slower_than_floating_point(document, both):
    """Whatever is gained over it: neither int8 file is named as the one to deploy."""
    level, text = said(deployed(document, int8=0.7, converted=0.8, both=both))
    assert level is NoteLevel.WARNING
    assert text.startswith("int8 is slower than floating point on this machine: the original is 0.70× as")
    assert "leave `int8` out" in text
    assert "Deploy" not in text


def test_int8_is_as_fast_as_floating_point(document):
    """Noise may explain that it is slower, and the gain over it counts."""
    _, text = said(deployed(document, int8=0.97, converted=1.2, both=1.6, float_noise=True))
    assert text.startswith("Deploy converted-int8.onnx: 1.65× [")
    assert "int8 alone is 0.97× as fast as in floating point" in text


def test_the_converted_model_is_faster_in_floating_point(document):
    """Of all forms the fastest is deployed, or named."""
    _, text = said(deployed(document, int8=1.2, converted=4.0, both=2.0))
    assert "Deploy converted-int8.onnx" not in text


def test_the_original_in_int8_is_the_fastest_of_all(document):
    _, text = said(deployed(document, int8=3.0, converted=2.0, both=1.5))
    assert "Deploy original-int8.onnx" in text


def test_untimed(document):
    level, text = said(deployed(document, timed=False))
    assert level is NoteLevel.INFO
    assert text.startswith("1 convolution")
    assert text.endswith("converted and quantized to int8; nothing was timed.")


def test_without_data_nothing_is_said_of_losses(document):
    _, text = said(deployed(document, values=None))
    assert text.startswith("Deploy converted-int8.onnx: 1.50×")
    assert "losing" not in text
    assert "loss" not in text


def test_without_losses(document):
    _, text = said(deployed(document, values=(96.75, 96.75, 96.75, 97.0)))
    assert text.count(" at no loss of accuracy") == 2


def test_a_metric_that_is_better_lower(document):
    """An error that grows is a loss; one that shrinks is none."""
    metric = {"name": "mse", "unit": "", "higher_is_better": False}
    _, text = said(deployed(document, values=(0.5, 0.75, 0.5, 1.0), **metric))
    assert "as fast as floating point, losing 0.5" in text
    assert "in floating point, losing 0.25" in text
    _, text = said(deployed(document, values=(0.5, 0.25, 0.5, 0.25), **metric))
    assert text.count(" at no loss of mse") == 2


def test_a_metric_with_a_unit(document):
    _, text = said(deployed(document, values=(28.2, 28.1, 28.1, 28.0), name="psnr", unit="dB"))
    assert "losing 0.2 dB" in text.replace("0.200", "0.2")


CASES = {
    "gain": {}, "noise": {"int8_noise": True}, "slower": {"int8": 0.5}, "untimed": {"timed": False},
    "no data": {"values": None}, "mse": {"name": "mse", "unit": "", "higher_is_better": False},
    "converted in floating point": {"converted": 9.0},
}  # fmt: skip


@pytest.mark.parametrize("numbers", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kept", [False, True])
def test_every_sentence_is_one_line(document, numbers, kept):
    """And the verdict is the first of all."""
    made = deployed(nothing_converted(document) if kept else document, **numbers)
    notes = [verdict(made), *quantization(made)]
    assert len(notes) == 2
    for each in notes:
        assert each.text == " ".join(each.text.split())
        assert each.text.endswith(".")
        assert "None" not in each.text
        assert "nan" not in each.text
    texts = [each.text for each in sentences(made)]
    assert texts[0] == notes[0].text
    assert notes[1].text in texts


# How the files were made ------------------------------------------------------------------------------


def test_quantization(document):
    (note,) = quantization(deployed(document))
    assert note.level is NoteLevel.INFO
    for words in ("QDQ", "weights int8", "activations uint8", "by percentile on 1,256 images",
                  "for AVX2, FMA", "opset 20", "IR version 10"):  # fmt: skip
        assert words in note.text
    document["environment"]["instruction_sets"] = []
    assert "an unknown processor" in quantization(document)[0].text


@pytest.mark.parametrize(
    ("gain", "words"),
    [(ratio(0.8), "0.80× as fast on"), (ratio(1.01, significant=False), "1.01× as fast (within noise) on")],
)
def test_deployed_in_floating_point_by_measurement(document, gain, words):
    document["int8_gain"] = gain
    (note,) = quantization(document)
    assert note.text.startswith("Deployed in floating point: ")
    assert words in note.text


# The table --------------------------------------------------------------------------------------------


def test_rows(document):
    made = deployed(document, converted=1.6)
    assert headers(made)[2:] == ["ms", "× float", "× int8", "top-1", "drop, pp"]
    found = rows(made)
    assert {len(row) for row in found} == {len(headers(made))}
    assert [row[0] for row in found] == [forms.NAMES[name] for name in NAMES]
    sizes = [row[1].split(",") for row in found]
    assert [each[0] for each in sizes] == ["2.01M", "2.01M", "1.01M", "1.01M"]
    assert [each[-1].strip() for each in sizes] == ["20 kB", "1.5 MB", "5 kB", "2 kB"]
    assert [row[2] for row in found] == ["3.000", "1.500", "1.875", "1.000"]
    assert [row[3] for row in found] == [
        "-", "2.00× [1.80, 2.20]", "1.60× [1.44, 1.76]", "3.00× [2.70, 3.30]",
    ]  # fmt: skip
    assert [row[4] for row in found] == ["-", "-", "0.80× [0.72, 0.88]", "1.50× [1.35, 1.65]"]
    scores = [row[5].replace("%", "").replace(",", "").split() for row in found]
    assert [each[0] for each in scores] == ["96.75", "96.50", "96.60", "96.25"]
    assert [each[1:] for each in scores] == [[], *[["98.0", "agree"]] * 3]
    assert found[0][6] == "-"
    assert found[3][6] == "0.50 [0.30, 0.70]"


def test_rows_mark_what_is_within_noise(document):
    found = rows(deployed(document, int8_noise=True, float_noise=True))
    assert found[1][3].endswith("within noise")
    assert found[3][4].endswith("within noise")
    assert not found[3][3].endswith("within noise")


def test_rows_without_data_and_without_times(document):
    found = rows(deployed(document, values=None, timed=False))
    assert [row[2:] for row in found] == [["-"] * 5] * 4


def test_rows_of_another_metric(document):
    made = deployed(document, values=(0.5, 0.75, 0.5, 0.25), name="mse", unit="", higher_is_better=False)
    assert headers(made)[-2:] == ["mse", "drop"]
    drops = [row[-1].split()[0] for row in rows(made)]
    assert drops[0] == "-"
    assert [float(each.replace("−", "-")) for each in drops[1:]] == [0.25, 0.0, -0.25]


def test_int8_that_moves_outputs_far_is_warned_of(document):
    """A network of random outputs has a deviation of about 1."""
    (said_of_files,) = quantization(deployed(document, deviation=0.25))
    assert said_of_files.level is NoteLevel.INFO
    _, warned = quantization(deployed(document, deviation=0.5))
    assert warned.level is NoteLevel.WARNING
    assert warned.text.startswith(
        "int8 itself moves the original's outputs by 50 % of their standard deviation"
    )
