"""Arrays in .npz files: read, or refused in one line."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import IMAGES, LABELS, RNG, everything, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset

from sepconvert.files.data import Preprocess, load_data, sample_shape


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
