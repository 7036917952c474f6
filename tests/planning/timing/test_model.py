"""The model of times: what it takes for slower, and how measurements correct it."""

import math

import pytest

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.factors import branches
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.planning.timing.model import TimeModel, path_of

SHAPE = (1, 64, 24, 24)
PADDED = {"padding": ((1, 1), (1, 1))}
YARDSTICK = ConvSpec(64, 64, (3, 3), bias=True, **PADDED)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (ConvSpec(64, 64, (3, 3)), "dense"),
        (ConvSpec(64, 64, (1, 3)), "dense"),
        (ConvSpec(64, 32, (1, 1)), "pointwise"),
        (ConvSpec(3, 32, (3, 3)), "few channels"),
        (ConvSpec(64, 64, (3, 3), groups=64), "depthwise"),
        (ConvSpec(64, 128, (3, 3), groups=64), "grouped"),
        (ConvSpec(64, 64, (3, 3), groups=4), "grouped"),
    ],
)
def test_kernels_are_those_of_the_geometry(spec, path):
    assert path_of(spec) == path


def test_the_yardstick_takes_about_one():
    assert TimeModel().time([[YARDSTICK]], SHAPE) == pytest.approx(1, rel=0.25)


def test_lower_ranks_and_smaller_images_take_less():
    model = TimeModel()
    times = [model.time(branches(YARDSTICK, "spatial-vh", rank, Border()), SHAPE) for rank in (8, 16, 32, 64)]
    assert times == sorted(times)
    assert model.time([[YARDSTICK]], (1, 64, 12, 12)) < 0.5 * model.time([[YARDSTICK]], SHAPE)
    assert model.time([[YARDSTICK]], (4, *SHAPE[1:])) > 3 * model.time([[YARDSTICK]], SHAPE)


def test_branches_add_up():
    model, form = TimeModel(), ("depthwise-pointwise", 2)
    chains = branches(YARDSTICK, *form, Border())
    single = branches(YARDSTICK, form[0], 1, Border())
    assert model.time(chains, SHAPE) == pytest.approx(2 * model.time(single, SHAPE), rel=0.01)


def test_measurements_correct_their_kind_of_kernel_alone():
    model, untouched = TimeModel(), TimeModel()
    pointwise = [[ConvSpec(64, 64, (1, 1))]]
    for _ in range(50):
        model.learn([[YARDSTICK]], SHAPE, 3.0)
    corrected = model.time([[YARDSTICK]], SHAPE) / untouched.time([[YARDSTICK]], SHAPE)
    assert 2 < corrected < 3.2
    assert model.time(pointwise, SHAPE) == untouched.time(pointwise, SHAPE)


def test_one_measurement_corrects_half_of_what_many_do():
    few, many, untouched = TimeModel(), TimeModel(), TimeModel()
    few.learn([[YARDSTICK]], SHAPE, 3.0)
    for _ in range(1000):
        many.learn([[YARDSTICK]], SHAPE, 3.0)
    once, fully = (
        math.log(each.time([[YARDSTICK]], SHAPE) / untouched.time([[YARDSTICK]], SHAPE))
        for each in (few, many)
    )
    assert once == pytest.approx(fully / 2, rel=0.01)
