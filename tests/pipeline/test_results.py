"""Results print shortly, and can be saved, shown and replayed in the session that made them."""

import gc
import json

import pytest
import torch
from command_line import RESULTS, listing
from conversions import UNTIMED, decided
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_hex
from torch import nn
from torch.utils.data import DataLoader

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.pipeline.results import ConversionResult, Plan


@pytest.fixture(scope="module")
def net(planted):
    torch.manual_seed(0)
    return nn.Sequential(planted(3, 16, 5, rank=1, padding=2), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()


X = torch.rand(1, 3, 12, 12)


@pytest.fixture(scope="module")
def result(net):
    return sepconvert.convert(net, X, timing=UNTIMED)


def test_a_result_prints_as_a_verdict_and_a_short_table(result):
    text = repr(result)
    assert text.startswith("1 of 2 convolutions converted, ")
    assert "parameters" in text
    assert len(text) <= 2000
    assert max(map(len, text.splitlines())) <= 80
    assert result.summary().startswith(text.splitlines()[0])


def test_a_result_is_saved_as_the_command_line_writes_it(result, tmp_path):
    folder = result.save(tmp_path / "mine")
    assert listing(folder) == sorted(RESULTS)
    assert json.loads((folder / "report.json").read_text()) == result.report
    assert json.loads((folder / "plan.json").read_text()) == result.plan
    with pytest.raises(SepconvertError, match="not empty"):
        result.save(folder)


def test_files_go_with_the_result(net):
    made = sepconvert.convert(net, X, timing=UNTIMED)
    place = made.files.path
    assert (place / "converted.onnx").is_file()
    del made
    gc.collect()
    assert not place.exists()


def test_a_result_without_files_is_not_saved(net, tmp_path):
    made = decided(net, X)
    with pytest.raises(SepconvertError, match=r"exports no files; convert with `check` onnx"):
        made.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_files_that_are_gone_are_reported(net, tmp_path):
    made = sepconvert.convert(net, X, timing=UNTIMED, out=tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(SepconvertError, match="is gone; convert anew"):
        made.save(tmp_path / "mine")


def test_a_result_of_a_process_that_does_not_report(net, tmp_path):
    other = ConversionResult(net, Plan({"mode": "exact", "layers": []}, {}), {})
    assert "another process" in repr(other)
    with pytest.raises(SepconvertError, match="main process"):
        other.summary()


def test_a_page_is_the_one_that_is_written(result, tmp_path):
    assert result.to_html() == (result.save(tmp_path / "out") / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def approximate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(512, 3))
    images = DataLoader(torch.rand(60, 3, 12, 12), 30)
    return decided(net.eval(), X, "approx", calib=images, target_macs=0.7)


def test_the_curve_is_a_figure_and_a_picture_in_notebooks(result, approximate, tmp_path):
    figure = approximate.plot()
    colours = {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines}
    assert not {colour for colour in colours if colour.startswith("#0102")}  # placeholders of a page
    assert any(len(axes.lines) > 2 for axes in figure.axes)
    figure.savefig(tmp_path / "curve.png")
    bundle, _ = DisplayFormatter().format(figure)
    assert bundle["image/png"].startswith(b"\x89PNG")
    page = approximate._repr_html_()
    assert page.startswith("<p>")
    assert "<table>" in page
    assert "data:image/svg+xml;base64," in page
    assert "<img" not in result._repr_html_()
    with pytest.raises(SepconvertError, match="exact mode has no curve"):
        result.plot()


def test_a_plan_is_replayed_in_the_session(net, result):
    again = sepconvert.apply(net, result.plan)
    x = torch.rand(2, 3, 12, 12)
    assert torch.equal(again(x), result.model(x))
    assert repr(result.plan) == "<plan of mode exact: 1 of 2 layers converted>"
    plain = dict(result.plan)
    with pytest.raises(SepconvertError, match=r"`weights`: the content of a plan.json holds none"):
        sepconvert.apply(net, plain)
    assert torch.equal(sepconvert.apply(net, plain, weights=result.model.state_dict())(x), result.model(x))
    with pytest.raises(SepconvertError, match=r"weights: do not fit the model"):
        sepconvert.apply(net, plain, weights={})


def test_an_inspection_prints_its_nearest_layers(net):
    found = sepconvert.inspect(net, X)
    assert found.verdict.startswith("1 of 2 convolutions separates exactly")
    assert "convert the model in <code>mode</code> exact." in found._repr_html_()
    assert "<td>0 " in found._repr_html_()
    lines = repr(found).splitlines()
    assert lines[0].startswith("1 of 2 convolutions separates")
    assert lines.index(next(line for line in lines if line.startswith("0 "))) < lines.index(
        next(line for line in lines if line.startswith("2 "))
    )  # what separates comes first
    assert len(repr(found)) <= 2000
    assert len(found.table(all=True)) > len(found.table())
    assert [layer["name"] for layer in found.to_json()["layers"]] == ["0", "2"]


def test_progress_is_shown_on_demand(net, capsys):
    sepconvert.inspect(net, X, progress=True)
    assert "analysing kernels" in capsys.readouterr().err
    sepconvert.inspect(net, X)
    assert capsys.readouterr().err == ""
    with pytest.raises(SepconvertError, match="`progress`: expected True, False or a function, got 3"):
        sepconvert.inspect(net, X, progress=3)


def test_names_of_the_package_are_its_api():
    assert set(dir(sepconvert)) == set(sepconvert.__all__)
    assert {"convert", "inspect", "profile", "compare", "apply", "finetune"} <= set(dir(sepconvert))
