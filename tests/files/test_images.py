"""Images of folders, and their preprocessing. The oracle of resizing is Pillow."""

import io
import os

import numpy as np
import pytest
import torch
from data_files import IMAGES, LABELS, RNG, everything, folder_of, palette, refused
from PIL import Image

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import load_data, sample_shapes
from sepconvert.files.images import Preprocess, layout_of


def test_resize_averages_when_it_shrinks(npz):
    checkers = np.indices((8, 8)).sum(0)[None, :, :, None] % 2 * np.uint8(255)
    path = npz(x=checkers.astype(np.uint8), y=[0])
    got, _ = everything(load_data(path, Preprocess(resize=4)))
    assert got.shape == (1, 1, 4, 4)
    torch.testing.assert_close(got, torch.full_like(got, 0.5), atol=0.05, rtol=0)
    assert sample_shapes(load_data(path, Preprocess(resize=(4, 12)))) == ((1, 4, 12),)


def test_folder_of_class_folders(folder):
    x, y = everything(load_data(str(folder), batch_size=4))
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(x, torch.from_numpy(IMAGES[:6]).permute(0, 3, 1, 2) / 255)


def test_grey_images_have_one_channel_if_all_are_grey(folder):
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    assert sample_shapes(load_data(str(folder))) == ((1, 8, 6),)
    Image.fromarray(IMAGES[0]).save(folder / "dog" / "colour.png")
    assert sample_shapes(load_data(str(folder))) == ((3, 8, 6),)


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


# Targets in a folder of their own

CLASSES = RNG.integers(0, 200, (8, 6))


def pairs(tmp_path, images, targets):
    folder_of(tmp_path / "x", images)
    return {"spec": folder_of(tmp_path / "x", images), "targets": str(folder_of(tmp_path / "t", targets))}


def read(spec, **options):
    return list(load_data(str(spec), **options))


@pytest.mark.parametrize("kind", [None, "classes", "any"])
@pytest.mark.parametrize("form", [palette, lambda classes: classes.astype(np.uint8)], ids=["palette", "grey"])
def test_masks_are_the_numbers_in_the_file(tmp_path, kind, form):
    names = ["b", "a/c", "a.d"]
    given = pairs(
        tmp_path,
        {f"{name}.jpg": IMAGES[n] for n, name in enumerate(names)},
        {f"{name}.png": form(CLASSES + n) for n, name in enumerate(names)},
    )
    ((x, y),) = read(**given, kind=kind)
    assert x.shape == (3, 3, 8, 6)
    assert y.dtype == torch.int64
    assert {int(each[0, 0]) for each in y} == {int(CLASSES[0, 0]) + n for n in range(3)}
    first = [*sorted(names)].index("b")
    assert torch.equal(y[first], torch.from_numpy(CLASSES))
    # The image of the same name: JPEG is lossy, and the others are random.
    assert (x[first] - torch.from_numpy(IMAGES[0]).permute(2, 0, 1) / 255).abs().mean() < 0.25


@pytest.mark.parametrize(
    ("target", "kind", "channels"), [(IMAGES[1], "any", 3), (IMAGES[1][..., 0], "pictures", 1)]
)
def test_pictures_are_scaled_and_not_normalised(tmp_path, target, kind, channels):
    given = pairs(tmp_path, {"a.png": IMAGES[0]}, {"a.png": target})
    ((_, y),) = read(**given, kind=kind, preprocess=Preprocess((0.5,) * 3, (0.2,) * 3))
    expected = torch.from_numpy(np.atleast_3d(target)).permute(2, 0, 1)[None] / 255
    assert y.shape == (1, channels, 8, 6)
    torch.testing.assert_close(y, expected)


def test_masks_are_resized_to_the_nearest_pixel(tmp_path):
    given = pairs(tmp_path, {"a.png": IMAGES[0]}, {"a.png": palette(CLASSES)})
    ((x, y),) = read(**given, preprocess=Preprocess(resize=(16, 4)))
    wanted = Image.fromarray(CLASSES.astype(np.uint8)).resize((4, 16), Image.Resampling.NEAREST)
    assert x.shape == (1, 3, 16, 4)
    assert y[0].tolist() == np.asarray(wanted).tolist()


def test_images_of_several_sizes_come_one_by_one(tmp_path):
    images = {"a.png": IMAGES[0], "b.png": IMAGES[1][:4]}
    given = pairs(tmp_path, images, {name: palette(CLASSES[: len(each)]) for name, each in images.items()})
    assert [(tuple(x.shape), tuple(y.shape)) for x, y in read(**given)] == [
        ((1, 3, 8, 6), (1, 8, 6)),
        ((1, 3, 4, 6), (1, 4, 6)),
    ]
    assert [len(x) for x, _ in read(**given, preprocess=Preprocess(resize=4))] == [2]
    # So do those of class folders, if a metric of another kind than a classifier's judges.
    folder_of(tmp_path / "x", {"cat/a.png": IMAGES[0], "dog/b.png": IMAGES[1][:4]})
    for name in images:
        (tmp_path / "x" / name).unlink()
    assert [len(x) for x, _ in read(tmp_path / "x", kind="any")] == [1, 1]
    refused("pass `resize`", tmp_path / "x")


GREY = CLASSES.astype(np.uint8)


@pytest.mark.parametrize(
    ("images", "targets", "kind", "match"),
    [
        (["a.png", "b.png"], {"a.png": GREY}, None, r"t: holds no target for .*b\.png; add b\.png"),
        (["a.png"], {"a.png": GREY, "c.png": GREY}, None, r"c\.png: there is no image of that name in .*x;"),
        (
            ["a.png"],
            {"a.png": GREY, "a.bmp": GREY},
            None,
            r"a\.png: has the name of .*a\.bmp, and images and",
        ),
        (["a.png", "a.jpg"], {"a.png": GREY}, None, r"a\.png: has the name of .*a\.jpg"),
        (["a.png"], {"a/a.png": GREY}, None, "holds no target"),
        (["a.png"], {"a.jpg": GREY}, None, r"a\.jpg: is a JPEG, whose compression .*; save masks as PNG"),
        (
            ["a.png"],
            {"a.png": IMAGES[0]},
            "classes",
            r"a\.png: is a picture \(RGB\), expected class numbers; ",
        ),
        (
            ["a.png", "b.png"],
            {"a.png": GREY, "b.png": IMAGES[0]},
            "any",
            r"b\.png: is a picture \(RGB\), expected class",
        ),
        (["a.png"], {"a.png": GREY.astype(np.uint16) * 256}, None, "more than 8 bits"),
        (["a.png"], {}, None, "t: holds no images"),
        ([], {"a.png": GREY}, None, "x: holds no images"),
    ],
)
def test_targets_that_do_not_match(tmp_path, images, targets, kind, match):
    for name in ("x", "t"):
        (tmp_path / name).mkdir()
    folder_of(tmp_path / "x", dict.fromkeys(images, IMAGES[0]))
    folder_of(tmp_path / "t", targets)
    refused(match, tmp_path / "x", targets=str(tmp_path / "t"), kind=kind)


def test_layout_moves_the_channels_of_images_alone():
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    last = Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), layout="nhwc")
    first = Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert torch.equal(last(image), first(image).permute(1, 2, 0))
    assert torch.equal(last.picture(image), first.picture(image))
    assert Preprocess(layout="nhwc") == Preprocess()  # float samples refuse what changes values


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((None, 224, 224, 3), "nhwc"), ((1, None, None, 1), "nhwc"), ((1, 3, 224, 224), "nchw"),
        ((1, 3, 224, 3), "nchw"), ((None, None, None, None), "nchw"), ((None, 64, 7, 7), "nchw"),
        ((None, 43844, 1), "nchw"),
    ],
)  # fmt: skip
def test_the_layout_that_a_shape_speaks_for(shape, layout):
    assert layout_of(shape) == layout
