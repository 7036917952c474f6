"""Where numbers were measured, and how ONNX Runtime is set up for it."""

import platform
from importlib.metadata import version

import onnxruntime as ort
import pytest

from sepconvert.base import environment as module
from sepconvert.base.environment import (
    Runtime,
    available_cores,
    environment,
    instruction_sets,
    missing_instruction_sets,
    processor,
)
from sepconvert.base.errors import SepconvertError


def test_the_environment_of_a_report():
    found = environment(Runtime(2, "basic", spinning="on"))
    assert (found["threads"], found["graph_optimization"], found["provider"]) == (2, "basic", "cpu")
    assert (found["spinning"], found["execution_mode"], found["inter_op_threads"]) == ("on", "sequential", 1)
    assert (found["provider_options"], found["provider_takes_threads"]) == ({}, True)
    assert found["torch"] == version("torch")
    assert found["onnxruntime"] == ort.__version__
    assert found["cpu"]
    assert 1 <= available_cores() <= found["cores"]
    assert found["clock_mhz"] is None or 100 < found["clock_mhz"] < 10_000
    assert found["load_average"] is None or found["load_average"] >= 0


@pytest.mark.parametrize(
    ("cpuinfo", "name", "sets"),
    [
        (
            "processor\t: 0\nmodel name\t: Xeon: fast\nflags\t: fpu avx2 fma avx512f avx512_vnni amx_tile\n"
            "\nprocessor\t: 1\nmodel name\t: other\nflags\t\t: fpu\n",
            "Xeon: fast",
            ["AVX2", "FMA", "AVX-512", "AVX-512 VNNI", "AMX"],
        ),
        ("model name: old\nflags : fpu sse2 avx2x", "old", []),
        (
            "Features\t: fp asimd asimddp sve i8mm",
            platform.machine(),
            ["NEON", "NEON dot product", "I8MM", "SVE"],
        ),
    ],
)  # fmt: skip
def test_a_processor_and_its_instruction_sets(cpuinfo, name, sets):
    assert processor(cpuinfo) == (name, sets)


@pytest.mark.parametrize(
    ("machine", "flags", "missing"),
    [
        ("x86_64", "flags: avx2 fma", ["AVX-512", "AVX-VNNI", "AVX-512 VNNI", "AMX"]),
        ("aarch64", "Features: asimd i8mm", ["NEON dot product", "SVE"]),
    ],
)
def test_instruction_sets_that_a_processor_lacks(tmp_path, monkeypatch, machine, flags, missing):
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    assert missing_instruction_sets() == []  # where nothing is known
    (tmp_path / "cpuinfo").write_text(flags)
    assert missing_instruction_sets() == missing
    assert not {*missing} & {*instruction_sets()}


@pytest.mark.parametrize(
    "arguments",
    [(0,), (1025,), (1.5,), (1, "most"), (1, "all", "npu"), (1, "all", "cpu", {}, "slow")],
    ids=str,
)  # fmt: skip
def test_settings_that_the_runtime_does_not_have(arguments):
    with pytest.raises(SepconvertError, match="expected"):
        Runtime(*arguments)


def test_the_name_of_a_provider():
    assert Runtime(1).execution_provider == "CPUExecutionProvider"


needs_azure = pytest.mark.skipif(
    "AzureExecutionProvider" not in ort.get_available_providers(), reason="a provider of some installations"
)
needs_openvino = pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-openvino"
)


@needs_azure
def test_a_provider_without_threads():
    runtime = Runtime(2, provider="azure", provider_options={"verbose": "1"})
    assert not runtime.takes_threads
    assert environment(runtime)["provider_options"] == {"verbose": "1"}


@needs_openvino
def test_threads_are_an_option_of_openvino_on_the_cpu():
    runtime = Runtime(3, provider="openvino", provider_options={"device_type": "CPU"})
    assert runtime.takes_threads
    assert runtime.execution_options == {"num_of_threads": "3", "device_type": "CPU"}
    runtime = Runtime(3, provider="openvino", provider_options={"device_type": "GPU"})
    assert not runtime.takes_threads
    assert runtime.execution_options == {"device_type": "GPU"}


@needs_openvino
@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("num_of_threads", "2", "num_of_threads"),
        ("load_config", '{"CPU": {"INFERENCE_NUM_THREADS": "2"}}', "INFERENCE_NUM_THREADS"),
    ],
)
def test_threads_are_given_in_one_place(key, value, name):
    with pytest.raises(SepconvertError, match=f"`provider_options`: {name} follows from `threads`"):
        Runtime(3, provider="openvino", provider_options={key: value})


def test_the_provider_cpu_has_no_options():
    with pytest.raises(SepconvertError, match="`provider_options`: the provider cpu has none, got"):
        Runtime(1, provider_options={"a": "1"})
