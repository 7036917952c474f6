"""Where numbers were measured, and how ONNX Runtime is set up for it."""

from importlib.metadata import version

import pytest

from sepconvert.base.environment import Runtime, available_cores, environment
from sepconvert.base.errors import SepconvertError


def test_the_environment_of_a_report():
    found = environment(Runtime(2, "basic"))
    assert (found["threads"], found["graph_optimization"], found["provider"]) == (2, "basic", "cpu")
    assert found["torch"] == version("torch")
    assert found["onnxruntime"] == version("onnxruntime")
    assert found["cpu"]
    assert 1 <= available_cores() <= found["cores"]


@pytest.mark.parametrize(
    "arguments", [(0,), (1025,), (1.5,), (1, "most"), (1, "all", "npu")], ids=lambda each: str(each)
)
def test_settings_that_the_runtime_does_not_have(arguments):
    with pytest.raises(SepconvertError, match="expected"):
        Runtime(*arguments)


def test_the_name_of_a_provider():
    assert Runtime(1).execution_provider == "CPUExecutionProvider"
