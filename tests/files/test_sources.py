"""What data are read from, and shapes of inputs; torch and numpy are not needed for that."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base.errors import SepconvertError
from sepconvert.files.sources import check_data, is_sensible, parse_input_shape

DATA = {
    "a file": ("x.npz", None),
    "a folder": ("images", None),
    "a callable of a file": ("code.py:loader", None),
    "a callable of a module": ("some.module:loader", None),
    "a folder with targets": ("images", "masks"),
}

MISSING = {
    "nothing": ("", None, "`calib`: is empty; expected an .npz file"),
    "a file": (
        "y.npz",
        None,
        "`calib` y.npz: there is no such file or folder; expected an .npz file, a folder",
    ),
    "a folder": ("nope", None, "`calib` nope: there is no such file or folder"),
    "a file on a drive": ("c:y.npz", None, "`calib` c:y.npz: there is no such file or folder"),
    "a file of code": ("nope.py:loader", None, "`calib` nope.py:loader: there is no file nope.py"),
    "a name": (":loader", None, "`calib` :loader: expected pkg.mod:callable or file.py:callable"),
    "targets": ("images", "nope", "`targets` nope: there is no such folder"),
    "targets of a folder": ("nope", "masks", "`calib` nope: there is no such file or folder"),
    "targets of a file": (
        "x.npz",
        "masks",
        "`targets` masks: is for images in a folder, and `calib` is x.npz",
    ),
    "targets of a callable": ("code.py:loader", "masks", "`targets` masks: is for images in a folder"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data; the code in it cannot be imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "masks"):
        Path(name).mkdir()
    Path("x.npz").touch()
    Path("code.py").write_text("1 / 0")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("spec", "targets"), DATA.values(), ids=DATA)
def test_data_that_are_there(spec, targets):
    check_data(spec, "calib", targets)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("spec", "targets", "message"), MISSING.values(), ids=MISSING)
def test_data_that_are_missing_are_named(spec, targets, message):
    with pytest.raises(SepconvertError) as caught:
        check_data(spec, "calib", targets)
    assert str(caught.value).startswith(message)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=3))
def test_input_shapes_round_trip(sizes):
    assert parse_input_shape("x".join(map(str, sizes))) == tuple(sizes)
    assert parse_input_shape(" " + " X ".join(map(str, sizes))) == tuple(sizes)


@pytest.mark.parametrize(
    "text",
    ["", "x", "3x", "3,224,224", "-3x4", "3x0x5", "3x1.5", "3xax5", "99999x99999x99999", "9" * 5000, "３x4"],
)
def test_input_shapes_that_make_no_sense(text):
    with pytest.raises(SepconvertError, match="3x224x224"):
        parse_input_shape(text)


@pytest.mark.parametrize(
    ("shape", "sensible"),
    [((3, 4), True), ((), True), ((3, 5), False), ((0, 4), False), ((2.0, 4), False), (("3",), False)],
)
def test_a_sensible_shape_is_of_whole_numbers_and_not_too_large(shape, sensible):
    assert is_sensible(shape, most=12) is sensible


def test_no_heavy_library_is_imported():
    program = (
        "import sys, sepconvert.files.sources\n"
        "print({'torch', 'numpy', 'onnx', 'safetensors', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "set()\n"
