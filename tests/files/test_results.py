"""Result directories appear whole or not at all, and take the place of nothing that is needed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sepconvert.base.errors import SepconvertError
from sepconvert.files.results import check_result_directory, result_directory


def fill(out: Path, *, force: bool = False, inputs: tuple[Path, ...] = (), text: str = "new") -> None:
    with result_directory(out, force=force, inputs=inputs) as folder:
        (folder / "plan.json").write_text(text)


def fail(out: Path, error: BaseException, *, force: bool = False) -> None:
    with result_directory(out, force=force) as folder:
        (folder / "plan.json").write_text("half")
        raise error


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, and what it holds."""
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory beside the one where the user stands."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def existing(place):
    (place / "out").mkdir()
    (place / "out" / "report.json").write_text("old")
    return place / "out"


@pytest.mark.parametrize("out", ["out", "a/b/out", "a b/ü →"])
def test_a_directory_takes_its_name_when_it_is_complete(place, out):
    with result_directory(place / out, force=False) as folder:
        (folder / "plan.json").write_text("new")
        assert not (place / out).exists()
    assert tree(place) == {f"{out}/plan.json": "new"}


def test_a_relative_name_is_one_of_the_working_directory(place):
    fill(Path("out"))
    assert tree(Path.cwd()) == {"out/plan.json": "new"}


@pytest.mark.parametrize(
    "error", [SepconvertError("no"), ValueError("no"), KeyboardInterrupt(), SystemExit(1)]
)
@pytest.mark.parametrize("out", ["out", "a/b/out"])
def test_nothing_is_left_when_the_block_fails(place, out, error):
    with pytest.raises(type(error)):
        fail(place / out, error)
    assert list(place.iterdir()) == []


def test_what_exists_stays_when_the_block_fails(place, existing):
    with pytest.raises(ValueError, match="no"):
        fail(existing, ValueError("no"), force=True)
    assert tree(place) == {"out/report.json": "old"}


@pytest.mark.parametrize("out", ["out", "a/b/out"])
def test_a_check_beforehand_leaves_nothing(place, out):
    check_result_directory(place / out, force=False)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("../place/out", "exists already"),
        ("../place/out/report.json", "is a file"),
        ("../place/out/report.json/a/b", "Not a directory"),
        ("/proc/out", "No such file or directory"),
        ("loop/out", "cannot be written"),
    ],
)
def test_a_check_beforehand_says_what_the_work_would_fail_with(place, existing, out, reason):
    Path("loop").symlink_to("loop")
    messages = []
    for attempt in (fill, check_result_directory):
        with pytest.raises(SepconvertError, match=reason) as caught:
            attempt(Path(out), force=False)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert tree(place) == {"out/report.json": "old"}


def test_what_exists_is_not_replaced_unasked(place, existing):
    with pytest.raises(SepconvertError, match=r"out: exists already; pass `force` to replace it"):
        fill(existing)
    assert tree(place) == {"out/report.json": "old"}


def test_force_replaces_the_whole_directory(place, existing):
    (existing / "auto").mkdir()  # as `sepconvert demo` leaves it
    (existing / "auto/plan.json").write_text("old")
    fill(existing, force=True)
    assert tree(place) == {"out/plan.json": "new"}


@pytest.mark.parametrize("name", ["thesis.tex", "exact/notes.txt", ".git/HEAD"])
def test_force_does_not_replace_what_is_no_result(place, existing, name):
    (existing / name).parent.mkdir(exist_ok=True)
    (existing / name).write_text("mine")
    with pytest.raises(SepconvertError, match=rf"out: holds {name}, which is no result .*; move it away or"):
        fill(existing, force=True)
    assert tree(place) == {"out/report.json": "old", f"out/{name}": "mine"}


def test_force_replaces_what_a_link_points_to(place, existing):
    (place / "link").symlink_to(existing)
    fill(place / "link", force=True)
    assert (place / "link").is_symlink()
    assert tree(existing) == {"plan.json": "new"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_not_replaced(place, force):
    (place / "out").write_text("mine")
    with pytest.raises(SepconvertError, match="out: is a file, expected a directory"):
        fill(place / "out", force=force)
    assert tree(place) == {"out": "mine"}


@pytest.mark.parametrize("out", [".", "..", "../cwd"])
def test_force_does_not_replace_where_the_user_stands(place, out):
    with pytest.raises(SepconvertError, match=r"holds .*cwd, which replacing it would delete"):
        fill(Path(out), force=True)
    assert Path.cwd().is_dir()


def test_force_does_not_replace_what_is_read(place, existing):
    with pytest.raises(SepconvertError, match=r"holds .*report\.json, which replacing it would delete"):
        fill(existing, force=True, inputs=(place / "model.pt", existing / "report.json"))
    assert tree(place) == {"out/report.json": "old"}


def test_force_does_not_replace_a_mount_point():
    with pytest.raises(SepconvertError, match="is a mount point"):
        fill(Path("/proc"), force=True)


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_place(place, existing, monkeypatch):
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SepconvertError, match="cannot be written: Input/output error"):
        fill(existing, force=True)
    assert tree(place) == {"out/report.json": "old"}


@pytest.mark.parametrize(
    "out", ["file/out", "file/a/b/out", "/proc/out", "/dev/null/out", "x" * 300, "loop/out"]
)
def test_an_impossible_place_is_found_out_at_once(place, out):
    (place / "file").write_text("mine")
    (place / "loop").symlink_to(place / "loop")
    entered = False
    with (
        pytest.raises(SepconvertError, match=r"cannot be written: .*; pass another `out`"),
        result_directory(place / out, force=True),
    ):
        entered = True
    assert not entered
    assert sorted(child.name for child in place.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o002, 0o775), (0o077, 0o700)])
def test_permissions_are_those_of_the_umask(place, umask, mode):
    before = os.umask(umask)
    try:
        with result_directory(place / "a" / "out", force=False) as folder:
            (folder / "plan.json").write_text("new")
            (folder / "converted.safetensors").touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (place / "a").stat().st_mode & 0o777 == mode
    assert (place / "a" / "out").stat().st_mode & 0o777 == mode
    for file in (place / "a" / "out").iterdir():
        assert file.stat().st_mode & 0o777 == mode & 0o666


KILLED = """
import os, signal, sys
from pathlib import Path
from sepconvert.files.results import result_directory
with result_directory(Path(sys.argv[1]), force=False) as folder:
    (folder / "plan.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("out", ["out", "a/b/out", "x" * 250])
def test_a_resumed_run_removes_what_its_killed_one_left(place, out):
    for each in (out, "another"):
        subprocess.run([sys.executable, "-c", KILLED, str(place / each)], check=False)  # noqa: S603
    assert sorted(tree(place).values()) == ["half", "half"]
    with result_directory(place / out, force=False, resumed=True) as folder:
        (folder / "plan.json").write_text("new")
    found = tree(place)
    assert found.pop(f"{out}/plan.json") == "new"
    assert list(found.values()) == ["half"]  # that of the other, which may still be at work


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_impatience_does_not_stop_the_cleaning(place, monkeypatch, number):
    remove = shutil.rmtree

    def interrupted(*args: object, **keywords: object) -> None:
        os.kill(os.getpid(), number)
        remove(*args, **keywords)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fail(place / "out", KeyboardInterrupt())
    assert list(place.iterdir()) == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_force_replaces_a_result_with_external_data(place):
    out = place / "out"
    weight = onnx.numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["y"])]
    types = [onnx.helper.make_tensor_value_info(name, 1, [1, 4, 8, 8]) for name in ("x", "y")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", types[:1], types[1:], [weight]))
    with result_directory(out, force=False) as folder:
        (folder / "data").mkdir()
        onnx.save(
            model, folder / "original.onnx", save_as_external_data=True, location="data/w.bin",
            size_threshold=0,
        )  # fmt: skip
    fill(out, force=True)
    assert tree(place) == {"out/plan.json": "new"}
