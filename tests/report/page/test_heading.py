"""The head of a report says what it is about, when and where it was made, and what is deployed."""

from report.int8_forms import deployed

from sepconvert.report.page.heading import against, deployment, facts, title


def test_the_title_is_the_name_of_the_model(document, bare):
    assert title(document) == "net.pt"
    assert title(bare) == "Net"
    for each in (document, bare):
        del each["name"]  # version 0.1.0
    assert title(document) == "net.pt"
    assert title(bare) == "Conversion"


def test_date_inputs_and_machine(document):
    assert facts(document) == [
        "exact mode", "2026-07-17", "input 1×8×4×4", "float32", "AMD EPYC, ONNX Runtime 1.32.0, 2 threads",
    ]  # fmt: skip
    document["input_shapes"] = [[1, 3], [1, 4]]
    document["environment"]["threads"] = 1
    assert facts(document)[2:] == [
        "inputs 1×3, 1×4", "float32", "AMD EPYC, ONNX Runtime 1.32.0, 1 thread",
    ]  # fmt: skip
    for key in ("created", "input_shapes"):
        del document[key]  # version 0.1.0
    assert facts(document) == ["exact mode", "float32", "AMD EPYC, ONNX Runtime 1.32.0, 1 thread"]
    assert "float32, deployed in int8" in facts(deployed(document))


def test_the_deployed_form(document):
    assert deployment(document) == (
        "`converted.onnx`, float32 (5 kB, any batch size), timed in ONNX Runtime 1.32.0: provider cpu, "
        "2 threads."
    )
    document["export"]["dynamic_batch"] = False
    document["converted"]["latency_ms"] = None
    assert deployment(document) == (
        "`converted.onnx`, float32 (5 kB, fixed batch size), run in ONNX Runtime 1.32.0: provider cpu, "
        "2 threads."
    )
    assert deployment(deployed(document)).startswith("`converted-int8.onnx`, int8 (")


def test_without_an_onnx_file_pytorch_is_deployed(document):
    document["converted"]["onnx_bytes"] = None
    assert deployment(document) == (
        "PyTorch, float32; there is no ONNX file: it was checked in PyTorch alone."
    )
    document["export"]["missing"] = {"converted.onnx": "no kernel"}
    assert deployment(document) == "PyTorch, float32; there is no ONNX file: no kernel."


def test_the_title_of_a_comparison():
    assert against(["original.onnx", "converted.onnx"]) == "converted.onnx against original.onnx"
    assert against(["a", "b", "c"]) == "b, c against a"
    assert against(["a"]) == "a"
