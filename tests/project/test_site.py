"""The documentation as a site: built quickly, with the same bytes wherever it is built."""

import filecmp
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

from sepconvert.report.text.glossary import STEPS, WORDS

pytest.importorskip("furo", reason="the extra docs is not installed")
pytest.importorskip("sphinx_click", reason="the extra docs is not installed")

pytestmark = pytest.mark.slow  # two builds

CPU_SECONDS = 120  # on 2 cores that are idle, a build takes no longer than its CPU time


def build(source: Path, site: Path, **variables: str) -> float:
    """Build the documentation in a process with environment variables of its own; return the CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(site)]
    done = subprocess.run(  # noqa: S603
        command,
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build from two folders, as of two machines; within a time limit."""
    folder = tmp_path_factory.mktemp("site")
    moved = folder / "another clone"
    for part in ("docs", "benchmarks", "examples", "sepconvert"):
        leave = shutil.ignore_patterns("_build", "__pycache__", "results")
        shutil.copytree(ROOT / part, moved / part, ignore=leave)
    sites = folder / "one", folder / "other"
    assert build(ROOT, sites[0], PYTHONHASHSEED="1", TZ="UTC") < CPU_SECONDS
    other = {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "COLUMNS": "60", "HOME": str(folder)}
    assert build(moved, sites[1], **other) < CPU_SECONDS
    return sites


def files(site: Path) -> list[Path]:
    """Return the files of a site, without the cache of a later build."""
    found = (path.relative_to(site) for path in site.rglob("*") if path.is_file())
    return sorted(path for path in found if path.parts[0] != ".doctrees")


def test_bytes_do_not_depend_on_the_machine(sites):
    one, other = sites
    assert len(files(one)) > 50
    assert files(one) == files(other)
    assert filecmp.cmpfiles(one, other, map(str, files(one)), shallow=False)[1:] == ([], [])


def test_reports_can_refer_to_every_entry_of_the_glossary(sites):
    page = (sites[0] / "glossary.html").read_text(encoding="utf-8")
    anchors = {*re.findall(r' id="([^"]+)"', page)}
    assert {entry.anchor for entry in (*WORDS, *STEPS)} <= anchors
