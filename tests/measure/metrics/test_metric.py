import numpy as np
import pytest

from sepconvert.measure.metrics.metric import Metric, MetricValue, means, shares, written, written_drop


def test_values_of_several_data_sets_at_once() -> None:
    statistics, weights = np.array([0.0, 1.0, 1.0]), np.array([[1.0, 1, 1], [3, 0, 0], [1, 2, 0]])
    assert means(statistics, weights) == pytest.approx([2 / 3, 0, 2 / 3])
    assert shares(statistics, weights) == pytest.approx([200 / 3, 0, 200 / 3])


def test_a_drop_is_what_got_worse() -> None:
    more = Metric("psnr", "dB", True, lambda outputs, targets: outputs, means)
    less = Metric("mse", "", False, lambda outputs, targets: outputs, means)
    assert more.drop(28.2, 28.1) == pytest.approx(0.1)
    assert less.drop(0.2, 0.3) == pytest.approx(0.1)
    assert more.value(np.array([1.0, 2.0])) == 1.5


@pytest.mark.parametrize(
    ("value", "unit", "text", "drop"),
    [
        (91.734, "pp", "91.73 %", "91.73 pp"),
        (28.2, "dB", "28.20 dB", "28.2 dB"),
        (0.0412345, "", "0.04123", "0.0412"),
    ],
)
def test_numbers_are_written_with_their_unit(value: float, unit: str, text: str, drop: str) -> None:
    assert written(value, unit) == text
    assert written_drop(value, unit) == drop
    found = MetricValue("m", unit, True, value, 300)
    assert str(found) == f"{text} of 300"
    assert found.to_dict() == {
        "name": "m", "unit": unit, "higher_is_better": True, "value": value, "n": 300,
    }  # fmt: skip
