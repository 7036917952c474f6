"""Numbers are written in one way."""

import pytest

from sepconvert.report.text.numbers import (
    TOP1,
    Quality,
    by_time,
    compared_by,
    count_text,
    divergence_text,
    drop_text,
    duration_text,
    estimate_text,
    fold,
    heading,
    peak_memory,
    percent_text,
    ratio_text,
    speedup_text,
    total_time,
    written_size,
)

SPEEDUP = {"median": 1.234, "ci95": [1.2, 1.3], "significant": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(1_234_567), "1,234,567"),
        (count_text(None), "-"),
        (ratio_text(2), "2.00×"),
        (ratio_text(None), ""),
        (percent_text(0.12345), "12.35"),
        (percent_text(0.5, 1), "50.0"),
        (percent_text(None), "-"),
        (estimate_text(1.5, (1.25, 1.75)), "1.50 [1.25, 1.75]"),
        (estimate_text(1.5, (1.25, 1.75), " ms", 3), "1.500 ms [1.250, 1.750]"),
        (speedup_text(SPEEDUP), "1.23× [1.20, 1.30]"),
        (speedup_text({**SPEEDUP, "significant": False}), "1.23× [1.20, 1.30] ~ within noise"),
        (drop_text({"value": -0.25, "unit": "pp", "ci95": [-1, 0.5]}), "-0.25 pp [-1.00, 0.50]"),
        (drop_text({"value": 0.098, "unit": "dB", "ci95": [0.09012, 0.1059]}), "0.098 dB [0.0901, 0.106]"),
        (drop_text({"value": 1e-4, "unit": "", "ci95": [0, 2.5e-4]}), "0.0001 [0, 0.00025]"),
        (drop_text({"value": 0.5, "unit": "dB", "ci95": [0.25, 1]}, unit=False), "0.5 [0.25, 1]"),
        (written_size(1_250), "1 kB"),
        (written_size(1_250_000), "1.2 MB"),
        (written_size(3_300_000_000), "3.3 GB"),
        (written_size(None), "-"),
        (duration_text(0.04), "0.0 s"),
        (duration_text(9.94), "9.9 s"),
        (duration_text(9.96), "10 s"),
        (duration_text(599.4), "599 s"),
        (duration_text(2_327), "39 min"),
        (heading("drop", "dB"), "drop, dB"),
        (heading("drop", ""), "drop"),
    ],
)
def test_texts(text, expected):
    assert text == expected


def test_sentences_are_folded_but_words_are_not():
    name = "a-b." * 30
    first, second, third = fold(f"{'word ' * 15}{name} word").splitlines()
    assert first == ("word " * 15).strip()
    assert (second, third) == (f"  {name}", "  word")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (0.35, "0.3500"), (0.00123, "0.0012"), (4.06e-5, "4.1e-05")]
)
def test_small_divergences_keep_two_digits(value, text):
    assert divergence_text(value) == text


def test_what_outputs_are_compared_by_is_said_of_all_but_classifiers():
    restored = Quality("psnr", "dB", True)
    assert compared_by(["kl"], TOP1) == ""
    assert compared_by(["kl"], restored) == ", by Kullback-Leibler divergence over classes"
    assert compared_by(["bernoulli", "relative", "relative"], restored) == (
        ", by Bernoulli divergence of each value and relative squared error"
    )


def test_stages_by_their_time(document):
    stages = document["stages"]
    assert [stage["stage"] for stage in by_time(stages)] == [
        "survey", "timing", "export", "rest", "start", "trace", "report",
    ]  # fmt: skip
    assert total_time(stages) == 200.25
    assert peak_memory(stages) == 3_250_000_000
