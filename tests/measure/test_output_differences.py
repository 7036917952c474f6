import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.measure.divergence import OutputComparison


def compared(*pairs):
    found = OutputComparison()
    for base, other in pairs:
        found.add(np.asarray(base), np.asarray(other))
    return found.result()


def test_by_hand():
    found = compared(([[3.0, 4.0]], [[3.0, 1.0]]))
    assert (found.max_abs, found.mean_abs, found.relative) == (3, 1.5, 0.6)
    assert found.cosine == pytest.approx(13 / (5 * math.sqrt(10)))
    assert found.snr_db == pytest.approx(10 * math.log10(25 / 9))
    assert found.agreement == 0


@given(st.integers(1, 5), st.integers(0, 2**20))
def test_batches_make_no_difference(parts, seed):
    rng = np.random.default_rng(seed)
    base, other = rng.standard_normal((2, 12, 4)).astype(np.float32)
    whole = compared((base, other))
    found = compared(*zip(np.array_split(base, parts), np.array_split(other, parts), strict=True))
    assert found.to_dict() == pytest.approx(whole.to_dict())
    difference = np.linalg.norm((base - other).astype(float)) / np.linalg.norm(base.astype(float))
    assert found.relative == pytest.approx(difference, rel=1e-5)
    assert found.agreement == np.mean(base.argmax(1) == other.argmax(1))


def test_equal_outputs_have_no_noise():
    x = np.ones((2, 3, 4, 4), np.float16)
    found = compared((x, x))
    assert (found.max_abs, found.mean_abs, found.relative) == (0, 0, 0)
    assert found.cosine == pytest.approx(1)
    assert (found.snr_db, found.agreement) == (None, None)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_not_small(odd):
    found = compared(([[1.0, 2.0]], [[1.0, odd]]), ([[1.0, 2.0]], [[1.0, 2.0]]))
    assert (found.max_abs, found.mean_abs, found.relative) == (None, None, None)


def test_zeros():
    found = compared(([[0.0, 0.0]], [[0.0, 0.0]]))
    assert (found.max_abs, found.relative, found.cosine) == (0, None, None)
