"""Layers say what became of them, what replaces them, and how much they compute for each byte."""

import pytest

from sepconvert.report.page.layers import decision_text, factor_rows, intensity, kernel_text, traffic


def test_what_is_exact_says_so(document, approximate):
    kept, converted = document["layers"]
    assert decision_text(kept) == "kept"
    assert decision_text(converted) == "converted, exact"
    assert decision_text({**converted, "exact": False}) == "converted, within tolerance"
    assert decision_text(approximate["layers"][1]) == "converted"


@pytest.mark.parametrize(
    ("size", "channels", "groups", "text"),
    [
        ([3, 1], (64, 40), 1, "3×1 64→40"),
        ([3, 3], (64, 128), 64, "3×3 64→128 depthwise"),
        ([3, 3], (32, 16), 16, "3×3 32→16, 16 groups"),
    ],
)
def test_kernels(size, channels, groups, text):
    inputs, outputs = channels
    kernel = {"kernel_size": size, "in_channels": inputs, "out_channels": outputs, "groups": groups}
    assert kernel_text(kernel) == text


def test_factors_stand_with_their_macs(document, approximate):
    kept, converted = document["layers"]
    assert factor_rows(kept) == []
    # 8 → 16 channels, 3×3, on 4×4 pixels: 16 · 8 · 2 · 3 and 16 · 2 · 16 · 3
    assert factor_rows(converted) == [("3×1 8→2", "768 MACs"), ("1×3 2→16", "1.54k MACs")]
    depthwise, pointwise = factor_rows(approximate["layers"][1])
    assert depthwise == ("3×3 8→8 depthwise", "1.15k MACs")
    assert pointwise == ("1×1 8→16", "2.05k MACs")
    del converted["factors"]  # version 0.1.0
    assert factor_rows(converted) == []


def test_bytes_and_arithmetic_intensity(document):
    kept, converted = document["layers"]
    assert (traffic(kept), intensity(kept, 1)) == ("", "")
    assert traffic(converted) == "1.00 → 0.50 MiB"
    # 2,000,000 MACs for 2²⁰ bytes, and 500,000 for 2¹⁹
    assert intensity(converted, 1) == "1.91 → 0.954 MACs/byte"
    assert intensity(converted, 8) == "15.3 → 7.63 MACs/byte"  # bytes are those of the whole batch
    converted["execution"]["bytes_moved"] = [1, 0]
    assert intensity(converted, 1) == ""
