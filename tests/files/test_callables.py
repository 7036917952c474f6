"""Callables of the user's code: found, or refused with the reason."""

import sys
from pathlib import Path

import pytest
import torch

from sepconvert.base.errors import SepconvertError
from sepconvert.files.callables import check_callable, resolve_callable


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("nothing", "expected pkg.mod:callable or file.py:callable"),
        (":build", "expected pkg.mod:callable"),
        ("model.py:", "expected pkg.mod:callable"),
        ("absent.py:build", "no file absent.py"),
        ("absent:build", "No module named 'absent'"),
        ("model.py:absent", "defines no 'absent'"),
        ("userpkg.net:number", "is a int; expected a callable"),
        ("broken.py:build", "SyntaxError"),
        ("quits.py:build", "SystemExit"),
    ],
)
def test_callables_that_cannot_be_had(project, spec, match):
    (project / "broken.py").write_text("def")
    (project / "quits.py").write_text("import sys\nsys.exit(0)")
    with pytest.raises(SepconvertError, match=match) as error:
        resolve_callable(spec, "factory")
    assert str(error.value).startswith(f"`factory` {spec}:")
    assert "\n" not in str(error.value)


def test_a_callable_can_be_checked_without_running_its_file(project):
    (project / "broken.py").write_text("def")
    assert check_callable("broken.py:nets.build", "factory") == ("broken.py", "nets.build")
    assert check_callable("absent.module:build", "factory") == ("absent.module", "build")
    for spec, match in (
        ("absent.py:build", "there is no file absent.py"),
        ("build", "expected pkg.mod:call"),
    ):
        with pytest.raises(SepconvertError, match=rf"^`factory` {spec}: {match}"):
            check_callable(spec, "factory")


def test_files_are_run_once_and_hide_no_other_module(project):
    (project / "runs").touch()
    (project / "counted.py").write_text(
        "from pathlib import Path\nPath('runs').write_bytes(Path('runs').read_bytes() + b'x')\nf = print\n"
    )
    assert resolve_callable("counted.py:f", "data") is resolve_callable(f"{project}/counted.py:f", "data")
    assert Path("runs").read_text() == "x"
    (project / "torch.py").write_text("def build():\n    return 3\n")
    assert resolve_callable("torch.py:build", "factory")() == 3
    assert sys.modules["torch"] is torch
