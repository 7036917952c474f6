"""Images of folders, and their preprocessing. The oracle of resizing is Pillow."""

import io
import os

import numpy as np
import pytest
import torch
from data_files import IMAGES, LABELS, everything, refused
from PIL import Image

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import load_data, sample_shape
from sepconvert.files.images import Preprocess


def test_resize_averages_when_it_shrinks(npz):
    checkers = np.indices((8, 8)).sum(0)[None, :, :, None] % 2 * np.uint8(255)
    path = npz(x=checkers.astype(np.uint8), y=[0])
    got, _ = everything(load_data(path, Preprocess(resize=4)))
    assert got.shape == (1, 1, 4, 4)
    torch.testing.assert_close(got, torch.full_like(got, 0.5), atol=0.05, rtol=0)
    assert sample_shape(load_data(path, Preprocess(resize=(4, 12)))) == (1, 4, 12)


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
    refused("8×6, .*z.png is 9×9.*`resize`", folder)
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
