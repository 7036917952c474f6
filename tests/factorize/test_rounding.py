import math

import numpy as np
import pytest
import torch
from strategies import DTYPES, ROUNDOFF

from sepconvert.factorize.rounding import rounding_noise, unit_roundoff


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_roundoff_is_half_the_distance_to_the_next_number(dtype):
    assert unit_roundoff(dtype) == ROUNDOFF[dtype]
    one = torch.ones((), dtype=dtype)
    assert (torch.nextafter(one, 2 * one).double() - 1) / 2 == unit_roundoff(dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("scale", ["normal", "subnormal"])
def test_noise_bounds_the_error_of_storing_each_element(dtype, scale):
    info = torch.finfo(dtype)
    factor = 1.0 if scale == "normal" else info.smallest_normal
    meant = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * factor
    stored = meant.to(dtype)
    error = (stored.double() - meant).abs()
    noise = rounding_noise(stored, 1)
    assert noise.dtype == torch.float64
    assert (error <= noise).all()
    # and is no larger than it must be
    assert error.max() > 0.2 * noise[error.argmax()]


@pytest.mark.parametrize("terms", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_bounds_the_error_of_kernels_that_were_computed(dtype, terms):
    """Products of matrices in the working precision, rounded to the stored one."""
    rng = np.random.default_rng(terms)
    left, right = (rng.standard_normal(shape) for shape in ((200, terms), (terms, 300)))
    working = np.float64 if dtype == torch.float64 else np.float32
    left, right = left.astype(working), right.astype(working)
    computed = np.zeros((200, 300), dtype=working)
    for r in range(terms):  # in this very order, rounded each time
        computed += left[:, r : r + 1] * right[r : r + 1]
    if dtype == torch.float64:
        meant = (left.astype(np.longdouble) @ right.astype(np.longdouble)).astype(np.longdouble)
    else:
        meant = left.astype(np.float64) @ right.astype(np.float64)
    stored = torch.from_numpy(computed).to(dtype)
    error = np.linalg.norm((stored.double().numpy() - meant).astype(np.float64))
    noise = float(torch.linalg.vector_norm(rounding_noise(stored, terms)))
    assert error <= noise
    assert noise <= 12 * error


def test_noise_grows_with_the_square_root_of_the_terms():
    weight = torch.ones(3)
    u = ROUNDOFF[torch.float32]
    for terms in (1, 9, 64):
        assert rounding_noise(weight, terms)[0] == pytest.approx((1 + math.sqrt(terms)) * u, rel=1e-12)
    # float32 works beneath the narrow types, whose own rounding comes once
    half = float(rounding_noise(torch.ones(1, dtype=torch.float16), 64))
    assert half == pytest.approx(ROUNDOFF[torch.float16] + 8 * u, rel=1e-3)
