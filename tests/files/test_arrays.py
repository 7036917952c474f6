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

from sepconvert.files.data import Preprocess, load_data, sample_shapes


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
    assert sample_shapes(loader) == ((3, 8, 6),)


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
        ({"x": IMAGES[:0], "y": LABELS[:0]}, r"x holds no samples .*; save at least one"),
        ({"x": IMAGES.astype(np.int64), "y": LABELS}, "int64"),
        ({"x": IMAGES, "y": LABELS[:9]}, r"10 samples and y, of shape \(9,\), 9; .*save a target for each"),
        ({"x": IMAGES, "y": np.int64(3)}, r"of shape \(\), 1; expected"),
        ({"x": IMAGES, "y": LABELS.astype(float)}, "float64 .* or a `metric` that takes such targets"),
        ({"x": IMAGES, "y": np.array(["a"] * 10)}, "<U1 of shape .* or a `metric`"),
        ({"x": IMAGES, "y": LABELS == 1}, "bool"),
        ({"x": IMAGES, "y": LABELS[:, None]}, "shape"),
        ({"x": IMAGES, "y": LABELS - 1}, "-1 to 2; expected classes from 0 upwards: number them"),
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


# Targets that a metric takes

MASKS = RNG.integers(0, 4, (10, 8, 6))


def targets(path, **options):
    _, ys = zip(*load_data(path, batch_size=4, **options), strict=True)
    return [each for y in ys for each in y] if isinstance(ys[0], list) else torch.cat(ys)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64, bool])
def test_masks_become_class_numbers(npz, dtype):
    y = targets(npz(x=IMAGES, y=MASKS.astype(dtype)), kind="classes")
    assert y.dtype == torch.int64
    assert y.tolist() == MASKS.astype(dtype).astype(int).tolist()


def test_numbers_that_are_ignored_are_kept(npz):
    masks = np.where(MASKS == 3, -1, np.where(MASKS == 2, 255, MASKS))
    assert targets(npz(x=IMAGES, y=masks), kind="classes").tolist() == masks.tolist()
    assert targets(npz(x=IMAGES, y=LABELS - 1), kind="classes").tolist() == (LABELS - 1).tolist()


def test_masks_are_resized_to_the_nearest_pixel(npz):
    y = targets(npz(x=IMAGES, y=MASKS - 1), kind="classes", preprocess=Preprocess(resize=(16, 3)))
    # Each row twice, and of two columns the second: that of the nearest centre.
    assert y.tolist() == (MASKS - 1).repeat(2, 1)[:, :, 1::2].tolist()


@pytest.mark.parametrize("kind", ["pictures", "any"])
def test_pictures_are_scaled_like_images_and_not_normalised(npz, kind):
    pictures = 255 - IMAGES
    path = npz(x=IMAGES, y=pictures)
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    y = targets(path, kind=kind, preprocess=Preprocess((0.4,) * 3, (0.3,) * 3))
    torch.testing.assert_close(y, expected)
    smaller = Preprocess(resize=4)
    x = everything(load_data(npz(x=pictures, y=LABELS), smaller))[0]
    torch.testing.assert_close(targets(npz(x=IMAGES, y=pictures), kind=kind, preprocess=smaller), x)


def test_grey_pictures_need_no_dimension_of_channels(npz):
    grey = IMAGES[..., 0]
    y = targets(npz(x=IMAGES, y=grey), kind="pictures")
    torch.testing.assert_close(y, torch.from_numpy(grey)[:, None] / 255)


@pytest.mark.parametrize("shape", [(10,), (10, 5), (10, 3, 8, 6), (10, 8, 6)])
def test_floats_are_used_as_they_are(npz, shape):
    values = RNG.normal(size=shape).astype(np.float32)
    assert np.array_equal(targets(npz(x=IMAGES, y=values), kind="any").numpy(), values)


def test_integers_and_texts(npz):
    marks = RNG.integers(-5, 5, (10, 7))
    assert targets(npz(x=IMAGES, y=marks), kind="any").tolist() == marks.tolist()
    words = [f"word {n}" * n for n in range(10)]
    batches = list(load_data(npz(x=IMAGES, y=np.array(words)), kind="any", batch_size=4))
    assert [text for _, y in batches for text in y] == words


def test_targets_need_not_have_the_size_of_images(npz):
    large = np.zeros((10, 24, 18, 3), np.uint8)
    assert targets(npz(x=IMAGES, y=large), kind="pictures").shape == (10, 3, 24, 18)


@pytest.mark.parametrize(
    ("y", "options", "match"),
    [
        (MASKS[:9], {"kind": "classes"}, r"10 samples and y, of shape \(9, 8, 6\), 9"),
        (MASKS, {}, r"y is int64 of shape .*expected integer class numbers .*`metric`"),
        (IMAGES, {"kind": "classes"}, r"y is uint8 .*, pictures; expected class numbers N or N×H×W"),
        (IMAGES.transpose(0, 3, 1, 2), {"kind": "pictures"}, r"y is uint8 .*save y.transpose\(0, 2, 3, 1\)"),
        (np.full((10, 3), np.inf), {"kind": "any"}, "y holds NaN or infinite values"),
        (MASKS + 2**40, {"kind": "classes"}, "expected integers of 32 bits"),
        (MASKS.astype(complex), {"kind": "any"}, "complex128 .*one target for each sample"),
        (np.zeros((10, 0)), {"kind": "any"}, r"y is float64 of shape \(10, 0\)"),
        (np.zeros((10, 8, 6)), {"kind": "any", "preprocess": Preprocess(resize=4)}, "`resize` is for masks"),
        (np.array([{}] * 10), {"kind": "any"}, "cannot be read"),
    ],
)
def test_wrong_targets_are_refused_in_one_line(npz, y, options, match):
    refused(match, npz(x=IMAGES, y=y), **options)
