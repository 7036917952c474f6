"""Command `env`: all that a report of a bug needs, also where something is broken."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from schemas import assert_conforms

import sepconvert
from sepconvert.cli.commands import environment
from sepconvert.report.schema.environment import EnvironmentDocument


def test_the_document(run):
    outcome = run("env", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert_conforms(found, EnvironmentDocument)
    assert found["sepconvert"] == sepconvert.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] == version("torch")
    assert "CPUExecutionProvider" in found["providers"]
    assert found["onnxruntime_error"] is None
    assert 1 <= found["available_cores"] <= found["cores"]
    assert 0 < found["free_memory_bytes"] <= found["memory_bytes"]


def test_the_text_is_short_and_says_the_same(run):
    outcome = run("env")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["sepconvert", sepconvert.__version__]
    assert len(lines) < 40
    assert any(line.split() == ["torch", version("torch")] for line in lines)
    assert any(line.startswith("  providers") and "CPU" in line for line in lines)
    assert not [line for line in lines if line != line.rstrip()]


def test_what_is_not_installed_is_said(run, monkeypatch):
    def installed(name):
        if name in ("timm", "torch"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment, "version", installed)
    assert environment.installation()["packages"]["timm"] is None
    outcome = run("env")
    assert outcome.code == 0
    for name in ("timm", "torch"):
        assert any(line.split() == [name, "not", "installed"] for line in outcome.out.splitlines())


def test_a_broken_runtime_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it fails
    outcome = run("env")
    assert outcome.code == 0
    assert "onnxruntime       cannot be imported: import of onnxruntime halted" in outcome.out
    found = json.loads(run("env", "--json").out)
    assert_conforms(found, EnvironmentDocument)
    assert (found["onnxruntime"], found["providers"]) == (None, [])


KNOWN = {
    "cpu": "Fast", "cores": 8, "available_cores": 2, "clock_mhz": None, "load_average": None,
    "instruction_sets": ["AVX2", "FMA", "AVX-512", "AVX-512 VNNI"], "missing_instruction_sets": ["AMX"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "lines"),
    [
        (KNOWN, ["                  8 cores (2 for this process)", "  missing         AMX",
                 "  for int8        AVX-512 VNNI"]),
        ({**KNOWN, "cores": 1, "available_cores": 1, "clock_mhz": 2400, "load_average": 0.25},
         ["                  1 core, 2.4 GHz, load 0.2"]),
        ({**KNOWN, "instruction_sets": ["AVX2"]}, ["  for int8        none"]),
        ({**KNOWN, "instruction_sets": [], "missing_instruction_sets": []},
         ["instruction sets  unknown", "  for int8        unknown"]),
    ],
)  # fmt: skip
def test_the_processor(facts, lines, capsys, monkeypatch):
    found = {**environment.installation(), **facts}
    monkeypatch.setattr(environment, "installation", lambda: found)
    environment.env(as_json=False)
    assert set(lines) <= set(capsys.readouterr().out.splitlines())
