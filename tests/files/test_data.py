"""Loaders of batches, also those of callables; data against the model; parts of data."""

import sys

import numpy as np
import pytest
import torch
from data_files import IMAGES, LABELS, everything, refused
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import (
    Preprocess,
    check_shape,
    has_labels,
    load_data,
    paired,
    sample_shapes,
    split,
    varies,
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
        ("[(x, y)]", r"returned \[.*expected a torch.utils.data.DataLoader; return one"),
        ("7", "returned 7, expected"),
        ("1 / 0", "failed .ZeroDivisionError.*fix it"),
        ("DataLoader(TensorDataset(x, y), shuffle=True)", "shuffle=False"),
        ("DataLoader(TensorDataset(x))", r"expected pairs \(x, y\)"),
        ("DataLoader(x)", r"expected pairs \(x, y\)"),
        ("DataLoader([])", "is empty; let it"),
        ("DataLoader(TensorDataset(x.double(), y))", "float64 of shape"),
        ("DataLoader([(('a', 'b'), 1)])", "its x is .*; expected a tensor float32"),
        ("DataLoader([({'ids': y}, 1)])", "its x is dicts of ids; expected a tensor float32"),
        ("DataLoader([1], collate_fn=lambda b: 1 / 0)", "fails on the first batch .ZeroDivisionError.*fix"),
    ],
)
def test_bad_callables(module, expression, match):
    refused(f"^`calib` .*{match}", module(expression), parameter="calib")


X, Y = torch.arange(24.0).reshape(4, 1, 2, 3), torch.tensor([3, 1, 4, 1])


@pytest.mark.parametrize(
    ("samples", "targets"),
    [
        (X, None),
        (TensorDataset(X), None),
        (TensorDataset(X, Y), Y),
        (TensorDataset(X, Y, Y + 1), Y),
        (TensorDataset(X, Y.float()), Y.float()),
        (TensorDataset(X, torch.zeros(4, 2, 3)), torch.zeros(4, 2, 3)),
        ([{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)], Y),
        ([{"id": y, "photo": x} for x, y in zip(X, Y, strict=True)], None),
        ([{"image": x, "mask": x > 7, "depth": x} for x in X], X > 7),
    ],
)
def test_images_are_found_in_batches_of_any_form(samples, targets):
    loader = DataLoader(samples, 3)
    xs, ys = zip(*paired(paired(loader, "calib"), "calib"), strict=True)
    assert torch.equal(torch.cat(xs), X)
    assert ys == (None, None) if targets is None else torch.equal(torch.cat(ys), targets)
    assert type(next(iter(loader))) is type(next(iter(DataLoader(samples, 3))))  # it is left as it is


def test_texts_and_several_inputs_are_kept():
    x, y = next(iter(paired(DataLoader([(each, f"{n}.png") for n, each in enumerate(X)], 2), "calib")))
    assert torch.equal(x, X[:2])
    assert list(y) == ["0.png", "1.png"]
    samples = [{"left": each, "right": -each, "label": 3} for each in X]
    x, y = next(iter(paired(DataLoader(samples, 2), "calib")))
    assert list(x) == ["left", "right"]
    assert torch.equal(x["right"], -X[:2])
    assert y.tolist() == [3, 3]


@pytest.mark.parametrize("sample", [1, (), {"a": "b"}, {"image": 3}, ("a.png", X[0])])
def test_batches_without_images_name_the_parameter(sample):
    loader = paired(DataLoader([sample], collate_fn=lambda samples: samples[0]), "calib")
    with pytest.raises(
        SepconvertError, match=r"^`calib`: its batches are .*; expected a tensor N×C×H×W, a tuple"
    ):
        next(iter(loader))


@pytest.mark.parametrize(
    ("expression", "targets"),
    [
        ("DataLoader(x, 2)", [None, None]),
        ("DataLoader(TensorDataset(x, y), 2)", [[0, 1], [2, 3]]),
        ("DataLoader(TensorDataset(x, y), 4, shuffle=True)", None),
    ],
)
def test_a_callable_needs_no_targets_where_none_are_needed(module, expression, targets):
    spec = module(expression)
    assert not has_labels(spec)
    batches = list(load_data(spec, labelled=False))
    assert torch.cat([x for x, _ in batches]).shape == (4, 3, 5, 5)
    found = [y if y is None else y.tolist() for _, y in batches]
    assert found == targets if targets is not None else sorted(found[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("samples", "targets"),
    [
        ("TensorDataset(x, x)", "torch.zeros(2, 3, 5, 5)"),
        ("TensorDataset(x, y.float())", "torch.tensor([0., 1.])"),
        ("[((i, i), 'abcd'[n]) for n, i in enumerate(x)]", "('a', 'b')"),
        ("[({'left': i, 'right': i}, n) for n, i in enumerate(x)]", "torch.tensor([0, 1])"),
    ],
)
def test_targets_and_inputs_of_a_callable_may_be_anything(module, samples, targets):
    x, y = next(iter(load_data(module(f"DataLoader({samples}, 2)"))))
    parts = list(x.values()) if isinstance(x, dict) else [x] if isinstance(x, torch.Tensor) else x
    assert all(torch.equal(each, torch.zeros(2, 3, 5, 5)) for each in parts)
    expected = eval(targets)  # noqa: S307
    assert torch.equal(y, expected) if isinstance(y, torch.Tensor) else tuple(y) == expected


def test_boxes_come_as_a_list_by_a_collate_function(module):
    spec = module(
        "DataLoader([(i, {'boxes': torch.ones(n, 4), 'labels': y[:n]}) for n, i in enumerate(x)], 4, "
        "collate_fn=lambda batch: (torch.stack([i for i, _ in batch]), [t for _, t in batch]))"
    )
    x, y = next(iter(load_data(spec, kind="any")))
    assert len(x) == 4
    assert [len(each["boxes"]) for each in y] == [0, 1, 2, 3]


def test_files_that_have_targets(tmp_path, folder):
    for name, y in (("classes", Y.numpy()), ("masks", np.zeros((4, 2, 3), int)), ("texts", np.array(["a"]))):
        np.savez(tmp_path / f"{name}.npz", x=X.numpy(), y=y)
        assert has_labels(str(tmp_path / f"{name}.npz"))
    np.savez(tmp_path / "none.npz", x=X.numpy())
    assert not has_labels(str(tmp_path / "none.npz"))
    assert has_labels(str(folder))
    assert not has_labels(str(folder / "cat"))


def test_preprocessing_a_loader_is_refused(module):
    refused("leave out `mean`", module("DataLoader(TensorDataset(x, y))"), Preprocess(resize=3))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("masks", "`targets` .*masks: is for images in a folder, and `data` is .*data.npz.*; leave"),
        ("absent", "`targets` .*absent: there is no such folder"),
        ("data.npz", "`targets` .*data.npz: there is no such folder"),
    ],
)
def test_targets_go_with_a_folder_of_images(npz, folder, targets, match):
    data = npz(x=IMAGES, y=LABELS)
    refused(match, data if targets == "masks" else folder, targets=str(folder.parent / targets))


def test_shapes_of_samples(npz, module):
    structured = "DataLoader([({'a': torch.zeros(2, 5), 'b': torch.zeros(7)}, 1)], 1)"
    assert sample_shapes(load_data(npz(x=IMAGES, y=LABELS))) == ((3, 8, 6),)
    assert sample_shapes(load_data(module(structured))) == ((2, 5), (7,))
    # T × N × F
    batches = DataLoader([(torch.zeros(9, 4, 2), torch.zeros(4))], batch_size=None)
    assert sample_shapes(batches, axis=1) == ((9, 2),)


def test_images_of_two_sizes_are_told_by_two_batches():
    samples = [(torch.zeros(3, 4, width), 0) for width in (5, 5, 6)]
    assert not varies(DataLoader(samples[:2]))
    assert varies(DataLoader(samples[1:]))


def test_data_that_do_not_fit_the_model():
    check_shape((3, 8, 6), (3, 8, 6), dense=False)
    check_shape((3, 8, 6), (3, 16, 16), dense=True)
    for shape, expected, dense in (((3, 8, 6), (3, 16, 16), False), ((3, 8, 6), (1, 8, 6), True)):
        with pytest.raises(SepconvertError, match=r"`data`: samples are 3×8×6, the model takes .*`resize`"):
            check_shape(shape, expected, dense=dense)


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
