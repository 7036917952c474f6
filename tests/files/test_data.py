"""Loaders of batches, also those of callables; data against the model; parts of data."""

import sys

import numpy as np
import pytest
import torch
from data_files import IMAGES, LABELS, everything, refused
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import (
    UNLABELLED,
    Preprocess,
    check_against_model,
    has_labels,
    load_data,
    paired,
    split,
)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A Python file with loaders; whatever loading it does to sys.path and sys.modules is undone."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)

    def write(expression):
        path = tmp_path / f"loaders_{tmp_path.name}.py"
        path.write_text(
            "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
            "x, y = torch.zeros(4, 3, 5, 5), torch.arange(4)\n"
            f"def make():\n    return {expression}\n"
        )
        return f"{path}:make"

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_callable_returns_the_loader_itself(module):
    x, y = everything(load_data(module("DataLoader(TensorDataset(x, y), 3)")))
    assert x.shape == (4, 3, 5, 5)
    assert y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ("[(x, y)]", "returned a list"),
        ("1 / 0", "ZeroDivisionError"),
        ("DataLoader(TensorDataset(x, y), shuffle=True)", "shuffle=False"),
        ("DataLoader(TensorDataset(x))", "expected two tensors"),
        ("DataLoader(x)", "expected two tensors"),
        ("DataLoader([])", "is empty"),
        ("DataLoader(TensorDataset(x.double(), y))", "float64 of shape"),
        ("DataLoader(TensorDataset(x, y.float()))", "its y is float32"),
        ("DataLoader(TensorDataset(x, y[:, None]))", "its y is int64"),
        ("DataLoader(TensorDataset(x, y - 1))", "its y is"),
        ("DataLoader([1], collate_fn=lambda b: 1 / 0)", "ZeroDivisionError"),
    ],
)
def test_bad_callables(module, expression, match):
    refused(f"^`calib` .*{match}", module(expression), parameter="calib")


X, Y = torch.arange(24.0).reshape(4, 1, 2, 3), torch.tensor([3, 1, 4, 1])


@pytest.mark.parametrize(
    ("samples", "labels"),
    [
        (X, None),
        (TensorDataset(X), None),
        (TensorDataset(X, Y), Y),
        (TensorDataset(X, Y, Y + 1), Y),
        (TensorDataset(X, Y.float()), None),
        (TensorDataset(X, torch.zeros(4, 2, 3)), None),
        ([(x, f"{int(y)}.png") for x, y in zip(X, Y, strict=True)], None),
        ([{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)], Y),
        ([{"id": y, "photo": x} for x, y in zip(X, Y, strict=True)], None),
        ([{"image": x, "mask": x > 0.5, "depth": x} for x in X], None),
    ],
)
def test_images_are_found_in_batches_of_any_form(samples, labels):
    loader = DataLoader(samples, 3)
    x, y = everything(paired(paired(loader, "calib"), "calib"))
    assert torch.equal(x, X)
    assert y.tolist() == (torch.full((4,), UNLABELLED) if labels is None else labels).tolist()
    assert type(next(iter(loader))) is type(next(iter(DataLoader(samples, 3))))  # it is left as it is


@pytest.mark.parametrize("sample", [1, (), {"a": X[0], "b": X[0]}, {"image": 3}, ("a.png", X[0])])
def test_batches_without_images_name_the_parameter(sample):
    loader = paired(DataLoader([sample], collate_fn=lambda samples: samples[0]), "calib")
    with pytest.raises(
        SepconvertError, match=r"^`calib`: its batches are .*; expected a tensor N×C×H×W, a tuple"
    ):
        next(iter(loader))


@pytest.mark.parametrize(
    "expression", ["DataLoader(x, 2)", "DataLoader(TensorDataset(x, x), 2, shuffle=True)"]
)
def test_a_callable_needs_no_labels_where_none_are_needed(module, expression):
    spec = module(expression)
    assert not has_labels(spec)
    x, y = everything(load_data(spec, labelled=False))
    assert (x.shape, y.tolist()) == ((4, 3, 5, 5), [UNLABELLED] * 4)


def test_labels_of_a_callable_are_kept_where_none_are_needed(module):
    _, y = everything(load_data(module("DataLoader(TensorDataset(x, y), 3)"), labelled=False))
    assert y.tolist() == [0, 1, 2, 3]


def test_arrays_that_are_no_labels(tmp_path):
    for name, y in (("classes", Y.numpy()), ("masks", np.zeros((4, 2, 3), int)), ("scores", np.zeros(4))):
        np.savez(tmp_path / f"{name}.npz", x=X.numpy(), y=y)
    assert [has_labels(str(tmp_path / f"{each}.npz")) for each in ("classes", "masks", "scores")] == [
        True,
        False,
        False,
    ]


def test_preprocessing_a_loader_is_refused(module):
    refused("leave out `mean`", module("DataLoader(TensorDataset(x, y))"), Preprocess(resize=3))


def test_data_that_do_not_fit_the_model(npz, module):
    specs = npz(x=IMAGES, y=LABELS), module("DataLoader(TensorDataset(torch.zeros(4, 3, 8, 6), y), 4)")
    for loader in map(load_data, specs):
        check_against_model(loader, (3, 8, 6), 4)
        check_against_model(loader, None, None)
        with pytest.raises(SepconvertError, match=r"label 3.*3 outputs"):
            check_against_model(loader, (3, 8, 6), 3)
        with pytest.raises(SepconvertError, match=r"3×8×6.*1×8×6"):
            check_against_model(loader, (1, 8, 6), 4)


# Parts


def test_parts_are_disjoint_and_keep_the_order_of_the_data(npz):
    loader = load_data(npz(x=IMAGES, y=np.arange(10)), batch_size=4)
    parts = [everything(part)[1].tolist() for part in split(loader, [3, 2], seed=0)]
    assert [len(part) for part in parts] == [3, 2, 5]
    assert sorted(label for part in parts for label in part) == list(range(10))
    assert all(part == sorted(part) for part in parts)
    assert parts == [everything(part)[1].tolist() for part in split(loader, [3, 2], seed=0)]
    assert parts != [everything(part)[1].tolist() for part in split(loader, [3, 2], seed=1)]
    with pytest.raises(SepconvertError, match="`data`: expected at least 11 samples, got 10"):
        split(loader, [11], seed=0)


def test_a_stream_has_no_parts(module):
    stream = module(
        "DataLoader(type('Stream', (torch.utils.data.IterableDataset,), "
        "{'__iter__': lambda self: iter([(x[0], y[0])])})())"
    )
    with pytest.raises(SepconvertError, match="`data`: expected a map-style dataset"):
        split(load_data(stream), [1], seed=0)
