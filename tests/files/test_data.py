import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import Preprocess, check_against_model, load_data, sample_shape

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(10) % 4


@pytest.fixture
def npz(tmp_path):
    def save(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return str(path)

    return save


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for index, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(IMAGES[3 * index + number]).save(root / name / f"{number}.png")
        (root / name / "notes.txt").write_text("no image")
    return root


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


def everything(loader):
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def refused(match, spec, *arguments, **options):
    with pytest.raises(SepconvertError, match=match) as error:
        everything(load_data(str(spec), *arguments, **options))
    assert "\n" not in str(error.value)


# .npz


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 7),
    channels=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    values=st.lists(st.floats(0.01, 2), min_size=8, max_size=8),
)
def test_uint8_images_are_normalised(tmp_path_factory, count, channels, batch_size, values):
    path = tmp_path_factory.mktemp("npz") / "d.npz"
    x = RNG.integers(0, 256, (count, 8, 6, channels), dtype=np.uint8)
    np.savez(path, x=x, y=np.zeros(count, int))
    mean, std = values[:channels], values[4 : 4 + channels]
    got, labels = everything(load_data(str(path), Preprocess(tuple(mean), tuple(std)), batch_size=batch_size))
    wanted = np.moveaxis((x / 255.0 - mean) / std, -1, 1)
    torch.testing.assert_close(got, torch.from_numpy(wanted).float(), rtol=1e-5, atol=1e-4)
    assert got.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_order_and_labels_are_those_of_the_file(npz):
    loader = load_data(npz(x=IMAGES, y=LABELS), batch_size=3)
    first, labels = everything(loader)
    assert labels.tolist() == LABELS.tolist()
    assert torch.equal(first, everything(loader)[0])
    torch.testing.assert_close(first, torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255)


def test_images_stay_uint8_until_they_are_asked_for(npz):
    loader = load_data(npz(x=IMAGES, y=LABELS))
    x, y = Subset(loader.dataset, [4])[0]
    assert x.dtype == torch.float32
    assert int(y) == LABELS[4]
    assert sample_shape(loader) == (3, 8, 6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_samples_are_used_as_they_are(npz, dtype):
    x = RNG.normal(size=(4, 2, 5, 5)).astype(dtype)
    got, _ = everything(load_data(npz(x=x, y=LABELS[:4])))
    assert torch.equal(got, torch.from_numpy(x.astype(np.float32)))


def test_resize_averages_when_it_shrinks(npz):
    checkers = np.indices((8, 8)).sum(0)[None, :, :, None] % 2 * np.uint8(255)
    path = npz(x=checkers.astype(np.uint8), y=[0])
    got, _ = everything(load_data(path, Preprocess(resize=4)))
    assert got.shape == (1, 1, 4, 4)
    torch.testing.assert_close(got, torch.full_like(got, 0.5), atol=0.05, rtol=0)
    assert sample_shape(load_data(path, Preprocess(resize=(4, 12)))) == (1, 4, 12)


def test_calibration_data_need_no_labels(npz):
    _, labels = everything(load_data(npz(x=IMAGES), labelled=False))
    assert (labels == -1).all()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": IMAGES}, r"lacks y, holds x; expected .* and y"),
        ({"images": IMAGES, "y": LABELS}, "holds images, y"),
        ({}, "no array"),
        ({"x": IMAGES[0], "y": LABELS}, "uint8 of shape"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "shape"),
        ({"x": IMAGES.astype(np.int64), "y": LABELS}, "int64"),
        ({"x": IMAGES, "y": LABELS[:9]}, "10 samples and y 9"),
        ({"x": IMAGES, "y": LABELS.astype(float)}, "float64"),
        ({"x": IMAGES, "y": LABELS == 1}, "bool"),
        ({"x": IMAGES, "y": LABELS[:, None]}, "shape"),
        ({"x": IMAGES, "y": LABELS - 1}, "-1 to 2"),
        ({"x": IMAGES, "y": np.full(10, 2**63, np.uint64)}, "ranges"),
        ({"x": IMAGES.transpose(0, 3, 1, 2), "y": LABELS}, "looks like N×C×H×W"),
        ({"x": IMAGES / np.float32(255), "y": LABELS}, "looks like N×H×W×C"),
        ({"x": np.full((2, 1, 4, 4), np.nan), "y": [0, 1]}, "NaN"),
        ({"x": np.full((2, 1, 4, 4), 1e300), "y": [0, 1]}, "infinite"),
        ({"x": np.array([None] * 4), "y": LABELS}, "cannot be read"),
        ({"x": IMAGES, "y": np.array([{}] * 10)}, "cannot be read"),
    ],
)
def test_bad_npz_is_refused_in_one_line(npz, arrays, match):
    refused(match, npz(**arrays))


def test_pickled_objects_in_an_npz_never_run(tmp_path, npz):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    refused("cannot be read", npz(x=IMAGES, y=np.array([Evil()], dtype=object)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("shape", "member", "match"),
    [
        (
            (9 * 10**8, 1000, 1000, 3),
            128 + 64,
            r"x is uint8 of shape .*, which takes 2,7.* bytes, and holds 192",
        ),
        ((3000, 1000, 1000, 3), 128 + 9 * 10**9, r"x takes 9.0 GB of memory \(0.000 GB in the file\), of "),
    ],
)
def test_sizes_are_looked_at_before_memory_is_taken(tmp_path, shape, member, match):
    """That of the header against that of the member, and both against what there is."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    content = header.getvalue()
    assert len(content) == 128
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content + bytes(64))
        archive.writestr("y.npy", content)
        archive.getinfo("x.npy").file_size = member  # what the directory of the archive says
    refused(match, tmp_path / "x.npz")


def test_preprocessing_float_data_is_refused(npz):
    path = npz(x=np.zeros((2, 1, 4, 4)), y=[0, 1])
    refused("float and used as it is", path, Preprocess(mean=(0.5,)))


@pytest.mark.parametrize("keep", [0, 3, 60, -40, -1])
def test_damaged_npz(tmp_path, npz, keep):
    path = Path(npz(x=IMAGES, y=LABELS))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(path.read_bytes()[:keep])
    refused("cannot be read", damaged)
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    refused("it is no archive of numeric arrays", text)


def test_files_that_are_no_npz(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    refused("single array", tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("1,2")
    refused("cannot be read", tmp_path / "x.csv")
    refused("no such file", tmp_path / "absent.npz")
    refused("no such file or folder", tmp_path / "absent")
    refused("is empty", "")


# Folders


def test_folder_of_class_folders(folder):
    x, y = everything(load_data(str(folder), batch_size=4))
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(x, torch.from_numpy(IMAGES[:6]).permute(0, 3, 1, 2) / 255)


def test_grey_images_have_one_channel_if_all_are_grey(folder):
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    assert sample_shape(load_data(str(folder))) == (1, 8, 6)
    Image.fromarray(IMAGES[0]).save(folder / "dog" / "colour.png")
    assert sample_shape(load_data(str(folder))) == (3, 8, 6)


def test_unlabelled_folder(folder):
    x, y = everything(load_data(str(folder / "cat"), labelled=False))
    assert len(x) == 3
    assert (y == -1).all()


def test_sizes_that_differ_need_resize(folder):
    Image.fromarray(IMAGES[0]).resize((9, 9)).save(folder / "dog" / "z.png")
    refused("8×6, .*z.png is 9×9.*--resize", folder)
    assert everything(load_data(str(folder), Preprocess(resize=5)))[0].shape == (7, 3, 5, 5)


def test_images_are_told_by_their_content_and_run_no_program(folder, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    for name in ("gs", "gswin32c", "gswin64c"):
        (folder.parent / name).write_text(f"#!/bin/sh\necho ran >> {folder.parent}/ran\n")
        (folder.parent / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder.parent}:{os.environ['PATH']}")
    (folder / "dog" / "z.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"
    )
    refused(r"z\.png: a broken image", folder, Preprocess(resize=5))
    assert not (folder.parent / "ran").exists()


def test_images_of_absurd_sizes_are_refused_unread(folder):
    for side, said in (
        (8200, "is 8200×8200, expected at most 67,108,864 pixels"),
        (14000, "too large an image"),
    ):
        Image.new("1", (side, side)).save(folder / "dog" / "z.png")
        refused(rf"z\.png: {said}", folder, Preprocess(resize=5))


def test_resizing_is_pillows(folder):
    """Bilinear and antialiased; Pillow rounds to whole numbers, at each of its two steps."""
    x, _ = everything(load_data(str(folder), Preprocess(resize=(4, 3))))
    first = Image.open(folder / "cat" / "0.png").resize((3, 4), Image.Resampling.BILINEAR)
    assert np.abs(255 * x[0].permute(1, 2, 0).numpy() - np.asarray(first)).max() <= 1.0


def test_broken_images_are_named(folder):
    (folder / "dog" / "z.jpg").write_bytes(b"no jpeg")
    refused(r"z\.jpg: a broken image", folder)
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "jpeg")
    (folder / "dog" / "z.jpg").write_bytes(buffer.getvalue()[:-200])
    refused(r"z\.jpg: a broken image", folder)


def test_16_bit_images_are_refused_rather_than_clipped(folder):
    Image.fromarray(np.full((8, 6), 40000, np.uint16)).save(folder / "dog" / "z.png")
    refused("8 bits", folder)


def test_empty_folders(tmp_path, folder):
    refused("no folders", folder / "cat")
    (folder / "eel").mkdir()
    refused("eel: holds no images", folder)
    (tmp_path / "empty").mkdir()
    refused("no folders", tmp_path / "empty")
    refused("no images", tmp_path / "empty", labelled=False)


@pytest.mark.parametrize("preprocess", [Preprocess(mean=(0.5,)), Preprocess(std=(1.0, 1.0))])
def test_one_mean_and_std_for_each_channel(folder, npz, preprocess):
    refused("images 3 channels", folder, preprocess)
    refused("3 channels", npz(x=IMAGES, y=LABELS), preprocess)


@pytest.mark.parametrize(
    "values",
    [
        {"std": (0.0,)},
        {"std": (-1.0,)},
        {"mean": (float("nan"),)},
        {"mean": (123.7, 116.3, 103.5)},
        {"std": (58.4, 57.1, 57.4)},
        {"resize": 0},
        {"resize": (4, 10**6)},
    ],
)
def test_preprocessing_out_of_range(values):
    with pytest.raises(SepconvertError, match="expected"):
        Preprocess(**values)


# Callables


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
    refused(match, module(expression), option="--calib")


def test_preprocessing_a_loader_is_refused(module):
    refused("leave out --mean", module("DataLoader(TensorDataset(x, y))"), Preprocess(resize=3))


# Against the model


def test_data_that_do_not_fit_the_model(npz, module):
    specs = npz(x=IMAGES, y=LABELS), module("DataLoader(TensorDataset(torch.zeros(4, 3, 8, 6), y), 4)")
    for loader in map(load_data, specs):
        check_against_model(loader, (3, 8, 6), 4)
        check_against_model(loader, None, None)
        with pytest.raises(SepconvertError, match=r"label 3.*3 outputs"):
            check_against_model(loader, (3, 8, 6), 3)
        with pytest.raises(SepconvertError, match=r"3×8×6.*1×8×6"):
            check_against_model(loader, (1, 8, 6), 4)
