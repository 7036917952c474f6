"""Conversions to int8 from beginning to end: files that agree with the models, and what the report says."""

import json
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import torch
from command_line import RESULTS, listing
from conversions import UNTIMED, converted, decisions, run
from files.onnx.graph.onnx_cases import conv, kernel, model_of, node, separable, values
from onnx import numpy_helper
from profiles import profile, speedup
from schemas import assert_conforms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert import Calibration, DemandNotMetError, Int8, SepconvertError, Timing, VerificationError
from sepconvert.files.onnx.int8.quantizer import Number, measured_ranges, prepared, quantized
from sepconvert.files.results import INT8_FILES
from sepconvert.measure.latency import PairTiming
from sepconvert.pipeline.deployment import FOUR_FORMS, check_int8, write_int8
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.modes.exact import convert_exactly
from sepconvert.pipeline.original import examine
from sepconvert.pipeline.stages import hold_to_speed
from sepconvert.report.schema.report import ReportDocument

FILES = sorted([*RESULTS, *INT8_FILES])
QDQ = {"QuantizeLinear", "DequantizeLinear"}

ROUNDINGS = 1.5  # two roundings that know nothing of each other are √2 times as far apart as each is off


@pytest.fixture(scope="module")
def deployed(planted):
    """A network of a stem and a wide kernel of rank 1, images to calibrate by, and labelled ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 1), nn.ReLU(), planted(48, 48, 7, rank=1, padding=3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    ).eval()  # fmt: skip
    x = torch.randn(100, 3, 12, 12) + torch.randn(100, 3, 1, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
        y[::7] = 4 - y[::7]  # some labels that it misses
    return model, DataLoader(TensorDataset(x[:40]), 16), DataLoader(TensorDataset(x[40:], y[40:]), 30)


@pytest.fixture(scope="module")
def conversion(deployed, tmp_path_factory):
    """The result of an exact conversion with data and a few timed runs, and its folder."""
    model, calib, data = deployed
    folder = tmp_path_factory.mktemp("deployed")
    timing = Timing(runs=3, measure_seconds=0, threads=1)
    images = next(iter(data))[0][:2]
    result = sepconvert.convert(
        model, images, calib=calib, data=data, int8=True, gate="macs", timing=timing, out=folder
    )
    return result, folder, next(iter(data))[0]


def difference(one, other, x):
    """Root mean square over the outputs of two files."""
    first, second = (run(path, x)[0].astype(float) for path in (one, other))
    return np.sqrt(np.square(first - second).mean())


# A whole conversion -----------------------------------------------------------------------------------


def test_files(conversion):
    _, folder, x = conversion
    assert listing(folder) == FILES
    for name in INT8_FILES:
        onnx.checker.check_model(folder / name, full_check=True)
        file = onnx.load(folder / name)
        kernels = [numpy_helper.to_array(each) for each in file.graph.initializer]
        assert {each.dtype for each in kernels if each.ndim == 4} == {np.dtype("int8")}
        assert {each.op_type for each in file.graph.node} > QDQ
        for batch in (1, 7):
            assert run(folder / name, x[:batch])[0].shape == (batch, 5)


def test_int8_files_are_near_those_in_floating_point(conversion, deployed):
    """The conversion is exact: int8 outputs are off each other by rounding, and no more."""
    _, folder, x = conversion
    original, int8 = folder / "original.onnx", folder / INT8_FILES[0]
    by_int8 = difference(original, int8, x)
    assert 0 < by_int8 < 0.1 * np.std(run(original, x)[0])
    assert difference(int8, folder / INT8_FILES[1], x) <= ROUNDINGS * by_int8
    with torch.no_grad():
        np.testing.assert_allclose(run(original, x)[0], deployed[0](x).numpy(), atol=1e-4)


def test_the_report_has_the_forms(conversion):
    result, folder, _ = conversion
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report == result.report
    assert_conforms(report, ReportDocument)
    assert set(FOUR_FORMS) == set(report["forms"]) - {"quantization"}
    assert decisions(report) == {"0": "kept", "2": "converted"}
    note = report["forms"]["quantization"]
    assert (note["method"], note["images"]) == ("minmax", 30)  # a quarter is held out
    assert set(note["files"]) == set(INT8_FILES)
    assert all(0 <= each["rounding"] <= 1 for each in note["files"].values())
    assert all(0 < each["deviation"] < 0.3 for each in note["files"].values())


def test_forms_are_those_of_the_files(conversion, deployed):
    """Accuracy and drops counted anew from the files' own predictions."""
    result, folder, _ = conversion
    x, y = (torch.cat(parts) for parts in zip(*deployed[2], strict=True))
    forms = result.report["forms"]
    names = ("original.onnx", INT8_FILES[0], "converted.onnx", INT8_FILES[1])
    right = {}
    for form, name in zip(FOUR_FORMS, names, strict=True):
        predicted = run(folder / name, x)[0].argmax(1)
        right[form] = 100 * float((predicted == y.numpy()).mean())
        assert forms[form]["metric"]["value"] == pytest.approx(right[form])
        assert forms[form]["onnx_bytes"] == (folder / name).stat().st_size
        assert forms[form]["latency_ms"]["runs"] == 3
        delta = forms[form]["delta"]
        if form != "float":
            assert delta["metric"]["drop"] == pytest.approx(right["float"] - right[form])
            assert delta["latency_speedup"]["median"] == pytest.approx(
                forms["float"]["latency_ms"]["median"] / forms[form]["latency_ms"]["median"], rel=0.5
            )
    assert forms["float"]["delta"]["metric"] is forms["float"]["delta"]["latency_speedup"] is None
    assert forms["int8"]["delta"]["latency_speedup_over_int8"] is None
    assert forms["converted"]["delta"]["metric"]["drop"] == 0
    assert forms["converted"]["delta"]["agreement"] == 1
    assert forms["int8"]["weight_bytes"] < 0.3 * forms["float"]["weight_bytes"]
    assert forms["float"]["params"] == forms["int8"]["params"] > forms["converted_int8"]["params"]


def test_the_report_is_that_of_the_form_that_is_deployed(conversion):
    result, _, _ = conversion
    report, forms = result.report, result.report["forms"]
    assert report["original"]["latency_ms"] == forms["int8"]["latency_ms"]
    assert report["converted"]["latency_ms"] == forms["converted_int8"]["latency_ms"]
    assert report["converted"]["metric"] == forms["converted_int8"]["metric"]
    assert report["original"]["metric"] == forms["float"]["metric"]
    assert report["delta"]["latency_speedup"] == forms["converted_int8"]["delta"]["latency_speedup_over_int8"]
    assert report["delta"]["metric"] == forms["converted_int8"]["delta"]["metric"]
    assert result.speedup.median > 1  # 100 times fewer multiplications
    assert result.layers[1].latency is not None


# ONNX files -------------------------------------------------------------------------------------------


def network(weight=None, **fields):
    """A file: a kernel of rank 1, or another one, between an activation and a pooled output."""
    weight = separable(8, 4) if weight is None else weight
    nodes = [
        conv("x s", "a"), node("Relu", "a", "r"), conv("r w b", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "y"),
    ]  # fmt: skip
    return model_of(nodes, {"s": kernel(4, 4, 1, 1), "w": weight, "b": values(8, seed=3)}, **fields)


def pictures(count=24, seed=0):
    return torch.from_numpy(values(count, 4, 9, 10, seed=seed))


def loader(count=24, seed=0):
    return DataLoader(TensorDataset(pictures(count, seed)), 8)


def convert(model, **options):
    options = {"int8": True, "gate": "macs", "calib": loader(), "timing": UNTIMED, **options}
    return sepconvert.convert(model, pictures(2), **options)


@pytest.fixture(scope="module")
def of_a_file(tmp_path_factory):
    """The result of a file without data and without timing, and its folder."""
    folder = tmp_path_factory.mktemp("of-a-file")
    onnx.save(network(), folder / "given.onnx")
    return convert(folder / "given.onnx", out=folder / "out"), folder / "out"


def test_a_file(of_a_file):
    result, folder = of_a_file
    assert listing(folder) == sorted({*FILES} - {"converted.pt2"})
    assert len(converted(result.report)) == 1
    msgspec.convert(result.report, ReportDocument)
    for name in INT8_FILES:
        onnx.checker.check_model(folder / name, full_check=True)
    x = pictures(8, seed=5)
    by_int8 = difference(folder / "original.onnx", folder / INT8_FILES[0], x)
    assert 0 < difference(folder / INT8_FILES[0], folder / INT8_FILES[1], x) <= ROUNDINGS * by_int8
    assert difference(folder / "original.onnx", folder / "converted.onnx", x) < 1e-5


def test_without_data_and_without_timing(of_a_file):
    for form in FOUR_FORMS:
        found = of_a_file[0].report["forms"][form]
        assert found["metric"] is found["latency_ms"] is found["delta"]["latency_speedup"] is None
        assert found["onnx_bytes"] > 0


def test_the_same_call_gives_the_same_files(of_a_file, tmp_path):
    _, folder = of_a_file
    convert(folder.parent / "given.onnx", out=tmp_path)
    for name in INT8_FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_other_ranges(of_a_file, tmp_path):
    """As settings say; the file differs, and the report names the way."""
    _, folder = of_a_file
    result = convert(folder.parent / "given.onnx", out=tmp_path, int8=Int8("on", "percentile"))
    assert result.report["forms"]["quantization"]["method"] == "percentile"
    assert (tmp_path / INT8_FILES[0]).read_bytes() != (folder / INT8_FILES[0]).read_bytes()


def test_nothing_is_converted():
    """Both int8 files compute the same then."""
    result = convert(network(kernel(8, 4, 3, 3)))
    forms = result.report["forms"]
    assert converted(result.report) == []
    assert forms["int8"]["onnx_bytes"] == forms["converted_int8"]["onnx_bytes"]


def test_images_are_split_off_the_data():
    """Where there is no `calib`; the rest is scored."""
    x = pictures(400)
    y = torch.from_numpy(np.arange(400) % 2)
    flat = model_of(
        [conv("x w", "a"), node("GlobalAveragePool", "a", "p"), node("Flatten", "p", "y")],
        {"w": separable(8, 4)},
    )
    data = DataLoader(TensorDataset(x, y), 50)
    result = convert(flat, calib=None, data=data, calibration=Calibration(images=80))
    forms = result.report["forms"]
    assert forms["quantization"]["images"] == 60
    assert forms["float"]["metric"]["n"] == 320
    assert forms["converted"]["delta"]["metric"]["drop"] == 0


@pytest.mark.slow
def test_the_form_may_be_decided_by_measurement():
    result = convert(network(), int8="auto", timing=Timing(runs=0, threads=1, measure_seconds=0))
    gain = result.report["int8_gain"]
    assert ("forms" in result.report) == (gain["significant"] and gain["median"] > 1)
    msgspec.convert(result.report, ReportDocument)


# What int8 files are held against ---------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """What `check_int8` takes: the original, its conversion, their form and files."""
    job = Job.of(
        metric=None, int8=True, finetune=0, out=None, mode="exact", gate="macs", timing=UNTIMED,
    )  # fmt: skip
    original = examine(network(), pictures(2), None, loader(), job)
    made = convert_exactly(original, job)
    return original, made, original.form, write_int8(original, made, original.form, tmp_path)


def test_files_that_are_as_they_were_written(written):
    found = check_int8(*written)
    assert set(found) == set(INT8_FILES)
    assert all(0 <= each.rounding < 0.5 for each in found.values())
    assert all(0 < each.deviation < 0.3 for each in found.values())
    original, made, form, paths = written
    for path, model in zip(paths, (original.model, made.model), strict=True):
        assert onnx.load(path) == form.model(model)


@pytest.mark.parametrize("name", INT8_FILES)
def test_a_file_that_was_tampered_with(written, name):
    """A kernel's scale is 3 times what it was: the files are checked, not what is in memory."""
    before = check_int8(*written)[name].deviation
    (path,) = (each for each in written[3] if each.name == name)
    file = onnx.load(path)
    scale = next(each for each in file.graph.initializer if each.name.endswith("_scale") and each.dims)
    scale.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(scale), scale.name))
    onnx.save(file, path)
    assert check_int8(*written)[name].deviation > 3 * before


def test_a_file_that_the_runtime_computes_otherwise(tmp_path):
    """The runtime rounds a kernel between integers, of which the file says that it is not rounded.

    One channel of it is large, of a value that is always 0: the others are rounded to nothing.
    """
    second = kernel(5, 6, 1, 1)
    second[:, 0] = 1000
    weights = {"w": kernel(6, 4, 3, 3), "b": np.array([-100, 0, 0, 0, 0, 0], "f"), "v": second}
    nodes = [conv("x w b", "a"), node("Relu", "a", "r"), conv("r v", "c")]
    model = prepared(model_of([*nodes, node("GlobalAveragePool", "c", "y")], weights))
    feed = {"x": values(8, 4, 9, 10)}
    file = quantized(model, measured_ranges(model, [feed], "minmax"), Number("uint8", False))
    next(each for each in file.graph.node if each.output[0] == "c").input[1] = "v"
    file.graph.initializer.append(numpy_helper.from_array(second, "v"))
    form = SimpleNamespace(
        example=lambda given: feed, model=lambda given: file, float_model=lambda given: model
    )
    both = SimpleNamespace(model=None)
    paths = tuple(tmp_path / name for name in INT8_FILES)
    for path in paths:
        onnx.save(file, path)
    with pytest.raises(VerificationError) as caught:
        check_int8(both, both, form, paths)
    one_line(caught, "original-int8.onnx", "off its own definition")


def one_line(caught, *words):
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


# Errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calib": None}, ["`int8`", "pass `calib`"]),
        ({"int8": "on"}, ["`int8`", "expected True, False, 'auto'"]),
        ({"mode": "exact", "target_macs": 0.5}, ["`mode`"]),
        ({"mode": "auto", "rank": 2}, ["`rank`"]),
        ({"mode": "approx", "rank": 2, "target_macs": 0.5}, ["`rank` and `target_macs`"]),
        ({"mode": "auto", "max_drop": 1.0}, ["`max_drop`", "pass `data`"]),
    ],
)
def test_options_that_do_not_go_together(options, words, tmp_path):
    with pytest.raises(SepconvertError) as caught:
        convert(network(), out=tmp_path / "out", **options)
    one_line(caught, *words)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_int8_is_checked_in_onnx():
    with pytest.raises(SepconvertError) as caught:
        convert(network(), check="torch")
    one_line(caught, "`int8`", "check in onnx")


def constant(outputs=8):
    """A file, the kernel of which is of rank 1 and whose stem answers a constant."""
    found = network()
    stem = next(each for each in found.graph.initializer if each.name == "s")
    stem.CopyFrom(numpy_helper.from_array(np.zeros((4, 4, 1, 1), "f"), "s"))
    return found


def quantized_already():
    ready = prepared(network())
    feed = {"x": pictures().numpy()}
    return quantized(ready, measured_ranges(ready, [feed], "minmax"), Number("uint8", False))


@pytest.mark.parametrize(
    ("model", "words"),
    [(constant, ["`int8`", "the same number"]), (quantized_already, ["`int8`", "quantized already"])],
)
def test_models_that_cannot_be_quantized(model, words, tmp_path):
    with pytest.raises(SepconvertError) as caught:
        convert(model(), out=tmp_path / "out")
    one_line(caught, *words)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_demand_that_no_plan_meets(tmp_path):
    with pytest.raises(DemandNotMetError) as caught:
        convert(network(kernel(8, 4, 3, 3)), mode="approx", target_macs=0.001, out=tmp_path / "out")
    one_line(caught, "`target_macs`")
    assert not list((tmp_path / "out").iterdir())


SLOWER = PairTiming(profile(1.0).latency, profile(2.0).latency, speedup(0.5))


def test_a_conversion_that_is_slower_in_int8_is_refused():
    with pytest.raises(DemandNotMetError) as caught:
        hold_to_speed(SLOWER, Job(int8=Int8("on")))
    one_line(caught, "`int8`", "0.50× as fast")


def test_advice_to_those_whose_conversion_is_slower():
    with pytest.raises(DemandNotMetError) as caught:
        hold_to_speed(SLOWER, Job(int8=Int8("on"), gate="macs"))
    assert "pass `gate` macs" not in str(caught.value)
    assert "each replaced layer is faster alone" not in str(caught.value)
