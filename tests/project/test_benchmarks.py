import gzip
import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from skimage.metrics import peak_signal_noise_ratio

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fashion_mnist
import growth
import peers
import real
import stages
import zoo


def point(tool: str, speed: float, drop: float) -> dict[str, Any]:
    return {
        "tool": tool,
        "setting": f"rank={speed:g}",
        "seconds": 1.5,
        "macs": 5_000_000,
        "batchnorm_reestimated": True,
        "accuracy_drop_pp": {"value": drop, "ci95": [drop - 0.5, drop + 0.5]},
        "speedup": {"median": speed, "ci95": [speed - 0.1, speed + 0.1]},
    }


@pytest.fixture
def net() -> dict[str, Any]:
    return {
        "original": {"accuracy": {"top1": 0.925, "n": 10_000}, "macs": 20_000_000},
        "latency": {"original_milliseconds": {"median": 1.25}, "noise_floor": [0.99, 1.01]},
        "points": [
            point(peers.SEPCONVERT, 2.0, 1.0),
            point(peers.SEPCONVERT, 1.5, 0.2),
            point("plain SVD", 2.5, 60.0),
            {
                "tool": "fasterai cp",
                "setting": "x=1",
                "seconds": 0.1,
                "error": "ValueError: no",
                "speedup": None,
            },
        ],
    }


def test_a_table_shows_every_point_and_the_errors(net):
    text = peers.table("net", net)
    assert "92.50 % of 10000 images, 20.0 M MACs, 1.250 ms" in text
    assert "1.00 [0.50, 1.50]" in text
    assert "2.00 [1.90, 2.10]" in text
    assert "0.25" in text
    assert "ValueError: no" in text
    assert text.endswith("than a point of sepconvert: none.")


def test_without_points_of_ours_a_table_claims_nothing(net):
    text = peers.table("net", {**net, "points": net["points"][2:]})
    assert text.endswith("No point of sepconvert is here to compare with.")


@pytest.mark.parametrize(
    ("speed", "drop", "beyond"), [(1.6, 0.1, True), (1.6, 1.1, False), (1.4, 0.1, False)]
)
def test_a_peer_is_beyond_a_point_that_it_beats_twice(net, speed, drop, beyond):
    peer = point("fasterai svd", speed, drop)
    assert peers.beyond_ours([*net["points"], peer]) == [peer] * beyond


def test_curves_rise_and_leave_out_errors(net):
    assert list(peers.curves(net["points"])) == [
        (peers.SEPCONVERT, [1.5, 2.0], [0.2, 1.0]),
        ("plain SVD", [2.5], [60.0]),
    ]


def test_every_tool_has_a_style():
    assert [tool.name for tool in peers.tools(5)] == list(peers.STYLES)


def test_a_plot_has_a_panel_for_each_net(net, tmp_path):
    peers.plot({"one": net, "two": net}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_idx_files_are_read(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    sizes = np.array(images.shape, ">u4").tobytes()
    (tmp_path / "images.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + sizes + images.tobytes()))
    assert np.array_equal(fashion_mnist.read_idx(tmp_path / "images.gz"), images)


def zoo_result(name: str, mode: str, outcome: str = "passed", **more: Any) -> dict[str, Any]:
    found = {"name": name, "family": name[:3], "mode": mode, "outcome": outcome, "error": None}
    costs = {"seconds": 2.4, "peak_gb": 1.25, "converted": 3, "convolutions": 7, "macs_ratio": 1.5}
    costs |= {"speedup": {"median": 1.21, "significant": True}}
    versions = {
        "environment": {
            "torch": "2.14",
            "onnxruntime": "1.32",
            "cpu": "Abacus",
            "cores": 2,
            "instruction_sets": ["AVX2"],
        },
        "libraries": {"torchvision": "0.29", "timm": "1.0"},
    }
    return {**found, **costs, **versions, **more}


ZOO = [
    zoo_result("torchvision vgg16", "exact"),
    zoo_result("torchvision vgg16", "auto"),
    zoo_result("timm dla34", "exact"),
    zoo_result("timm dla34", "approx", "failed", error="ValueError: no"),
    zoo_result("timm dla34", "auto", "no plan is fast enough"),
]


def test_the_zoo_shows_every_model_and_what_failed():
    lines = list(zoo.table(ZOO))
    assert [line.split("|")[2].strip() for line in lines[0].splitlines()[2:]] == [
        "timm dla34", "torchvision vgg16",
    ]  # fmt: skip
    assert "3 of 7, 1.50×, 2 s" in lines[0]
    assert "3 of 7, 1.50×, 1.21× as fast, 2 s" in lines[0]
    noisy = zoo_result("UNet", "auto", speedup={"median": 0.98, "significant": False})
    assert "0.98× as fast (noise), 2 s" in next(iter(zoo.table([noisy])))
    assert lines[2] == "approx: 1 failed; auto: 1 no plan is fast enough; auto: 1 passed; exact: 2 passed."
    assert lines[3:] == ["- timm dla34, approx: ValueError: no"]


def test_the_zoo_s_section_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{zoo.MARKS[0]}\nold\n{zoo.MARKS[1]}\nrest\n")
    (tmp_path / "zoo.json").write_text(json.dumps(ZOO))
    for _ in range(2):  # the second time changes nothing
        command = ["report", "--results", str(tmp_path / "zoo.json"), "--page", str(page)]
        done = CliRunner().invoke(zoo.cli, command, catch_exceptions=False)
        assert "timm dla34" in done.output
        text = page.read_text()
        assert text.startswith("# Title\n")
        assert text.endswith("\nrest\n")
        assert "old" not in text
        words = " ".join(text.split())
        assert "2 architectures of torchvision 0.29 and timm 1.0 were" in words
        assert zoo.CAVEATS in words
        assert "the median speed-up is 1.21×, 0 of 2 are within noise" in words
        assert "Runtime 1.32 on Abacus (2 cores, AVX2; `benchmarks/zoo.py`): tim, tor." in text
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
        assert rows[2:] == [
            ["exact", "2", "2", "0", "0"],
            ["approx", "1", "0", "0", "1"],
            ["auto", "2", "1", "1", "0"],
        ]
        assert "- timm dla34, approx: ValueError: no" in text


# Real networks -------------------------------------------------------------------------------------

FACTORIES = """
import os
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)
    )

def crashing():
    os._exit(7)
"""
QUICK = ("--rank", "1", "--gate", "none", "--runs", "3")
CASES = f"""
[[case]]
name = "psnr"
model = "net.pt"
factory = "nets.py:net"
calib = "calib.npz"
data = "val.npz"
metric = "psnr"
mode = "approx"
threads = 1
options = {json.dumps(QUICK)}

[[case]]
name = "crash"
model = "net.pt"
factory = "nets.py:crashing"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[case]]\nname = "a"\nmodel = "b"\nweigths = "c"', r"weigths.*case\[0\]"),
        ('[[case]]\nname = "a"', r"missing required field `model`"),
        ('[[case]]\nname = "a/b"\nmodel = "c"', r"case\[0\]\.name"),
        ('[[case]]\nname = "a"\nmodel = "b"\nmetric = "top1"', "metric top1 needs `data`"),
        ('[[case]]\nname = "a"\nmodel = "b"\n' * 2, "2 cases are named a"),
        ("case = [", "cases.toml: "),
    ],
    ids=["unknown", "missing", "name", "metric", "twice", "syntax"],
)
def test_cases_of_another_form_are_refused(tmp_path, text, message):
    (tmp_path / "cases.toml").write_text(text)
    with pytest.raises(click.UsageError, match=message):
        real.read_cases(tmp_path / "cases.toml")


@pytest.mark.parametrize("name", ["real.example.toml", "real_nets.toml"])
def test_the_files_of_cases_are_read(name):
    cases = real.read_cases(Path(real.__file__).with_name(name))
    assert len(cases) >= 2


def test_arguments_are_those_of_the_command_line():
    case = real.Case(
        name="a", model="b.pt", mode="auto", data="c.npz", metric="top1", input_shape=(3, 8, 8),
        mean=(-0.5, 0.25), resize=9, options=("--max-drop", "1"),
    )  # fmt: skip
    assert list(case.arguments()) == [
        "b.pt", "--mode=auto", "--data=c.npz", "--input-shape=3x8x8", "--mean=-0.5,0.25", "--resize=9",
        "--batch=1", "--max-drop", "1",
    ]  # fmt: skip
    without_classes = real.Case(name="a", model="b.pt", data="c.npz")
    assert list(without_classes.arguments()) == ["b.pt", "--mode=exact", "--batch=1"]


def test_psnr_is_that_of_scikit_image():
    random = np.random.default_rng(0)
    truth, before, after = random.random((3, 5, 1, 4, 6), dtype=np.float32)
    pairs = (([before[at : at + 2]], [after[at : at + 2]]) for at in (0, 2, 4))
    found = real.mean_psnr(pairs, truth)
    expected = [
        np.mean([peak_signal_noise_ratio(t, x, data_range=1) for t, x in zip(truth, images, strict=True)])
        for images in (before, after)
    ]
    assert found == pytest.approx(expected)


def test_the_relative_error_is_that_of_the_worst_output():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(6, 3)), random.normal(size=(6, 2, 2))
    pairs = (
        ([first[at : at + 3], second[at : at + 3]], [first[at : at + 3] * 1.1, second[at : at + 3] * 0.7])
        for at in (0, 3)
    )
    assert real.relative_error(pairs) == pytest.approx(0.3)


def real_result(name: str, **more: Any) -> dict[str, Any]:
    environment = {
        "cpu": "Test CPU", "cores": 2, "threads": 1, "platform": "Linux", "python": "3.11", "torch": "2.14",
        "sepconvert": "0.1", "onnxruntime": "1.32",
    }  # fmt: skip
    speedup = {"median": 1.18, "ci95": [1.15, 1.21], "significant": True}
    found = {"name": name, "case": {"mode": "auto"}, "environment": environment, "error": None}
    costs = {"seconds": 277.2, "peak_gb": 2.34, "converted": 3, "convolutions": 26, "macs_ratio": 1.3}
    return {**found, **costs, "speedup": speedup, **more}


def test_the_table_of_real_networks_shows_gains_and_failures():
    noisy = {"median": 1.01, "ci95": [0.97, 1.05], "significant": False}
    found = [
        real_result("a", drop={"value": 0.714, "ci95": [-0.5, 1.9]}, top1=0.6229),
        real_result("b", psnr={"original": 28.21, "converted": 28.125}),
        real_result("c", speedup=noisy, relative_error=0.0123),
        {"name": "d", "case": {}, "seconds": 3.0, "error": "exit code 2: a | b"},
    ]
    where, gap, table = real.table(found)
    assert where == (
        "Test CPU, 2 cores, Linux, python 3.11, sepconvert 0.1, torch 2.14, onnxruntime 1.32; threads: 1."
    )
    assert gap == ""
    rows = [
        [cell.strip() for cell in line.replace(r"\|", "/").split("|")[1:-1]] for line in table.splitlines()
    ]
    first = ["a", "auto", "3 of 26", "1.30×", "1.18× [1.15, 1.21]", "0.71 pp [-0.50, 1.90] of 62.29%"]
    assert rows[2] == [*first, "277", "2.3", ""]
    assert rows[3][5] == "0.085 dB of 28.21"
    assert rows[4][4:6] == ["1.01× [0.97, 1.05], within noise", "relative error 0.012"]
    assert rows[5] == ["d", "exact", "", "", "", "", "3", "", "exit code 2: a / b"]


@pytest.fixture
def cases(tmp_path) -> Path:
    namespace: dict[str, Any] = {}
    exec(FACTORIES, namespace)  # noqa: S102
    torch.manual_seed(0)
    torch.save(namespace["net"]().state_dict(), tmp_path / "net.pt")
    (tmp_path / "nets.py").write_text(FACTORIES)
    x, y = np.random.default_rng(0).integers(0, 256, (2, 16, 12, 12, 1), dtype=np.uint8)
    np.savez(tmp_path / "calib.npz", x=x)
    np.savez(tmp_path / "val.npz", x=x[:6], y=y[:6])
    (tmp_path / "cases.toml").write_text(CASES)
    return tmp_path / "cases.toml"


def real_outcome(command: str, cases: Path) -> str:
    words = [command, str(cases), "--results", str(cases.parent / "results")]
    return CliRunner().invoke(real.cli, words, catch_exceptions=False).output


@pytest.mark.slow
def test_real_networks_are_converted_each_in_a_process_of_its_own(cases):
    assert "not run yet" in real_outcome("report", cases)
    shown = real_outcome("run", cases).splitlines()
    assert shown[0].startswith("psnr: converted, ")
    assert shown[1].startswith("crash: exit code 7: no message, ")
    found = json.loads((cases.parent / "results/psnr.json").read_text())
    assert (found["converted"], found["convolutions"]) == (1, 3)
    assert found["peak_gb"] > 0.1
    with np.load(cases.with_name("val.npz")) as data, torch.no_grad():
        x, y = (torch.from_numpy(data[name]).permute(0, 3, 1, 2) / 255 for name in "xy")
    namespace: dict[str, Any] = {}
    exec(FACTORIES, namespace)  # noqa: S102
    net = namespace["net"]()
    net.load_state_dict(torch.load(cases.with_name("net.pt")))
    outputs = net(x).detach().clip(0, 1)
    expected = [
        peak_signal_noise_ratio(t.numpy(), o.numpy(), data_range=1) for t, o in zip(y, outputs, strict=True)
    ]
    assert found["psnr"]["original"] == pytest.approx(np.mean(expected), abs=1e-4)
    table = real_outcome("report", cases)
    assert "| 1 of 3" in table
    assert "exit code 7: no message" in table


@pytest.mark.slow
def test_real_networks_are_continued_where_keys_are_the_same(cases):
    """Results are kept, failures too, unless the keys of a case change."""
    results = cases.parent / "results"
    results.mkdir()
    for name, case in real.read_cases(cases).items():
        (results / f"{name}.json").write_text(json.dumps(real._about(case) | {"error": "kept"}))
    assert real_outcome("run", cases) == ""
    cases.write_text(CASES.replace('"net.pt"', '"none.pt"', 1))
    (line,) = real_outcome("run", cases).splitlines()
    assert line.startswith("psnr: exit code 2: sepconvert: none.pt: there is no such file")
    assert real_outcome("report", cases).count("kept") == 1


# Stages --------------------------------------------------------------------------------------------


def timed(seconds: dict[str, float], **layers: float) -> dict[str, Any]:
    """A report of a conversion on two busy cores."""
    return {
        "command": "sepconvert net.pt",
        "environment": {"cpu": "A", "cores": 2, "threads": 1, "torch": "2", "onnxruntime": "1"},
        "stages": [
            {
                "stage": name,
                "wall_s": wall,
                "cpu_s": 2 * wall,
                "peak_bytes": int(1e9 + wall),
                "parts": layers if name == "survey" else {},
            }
            for name, wall in seconds.items()
        ],
    }


def cells(text: str) -> list[list[str]]:
    """The rows of Markdown tables, without those of dashes."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def test_stages_are_listed_by_falling_time():
    report = timed({"trace": 5.0, "survey": 35.0, "merging": 0.0}, stem=7.0, head=28.0)
    assert cells(stages.table(report)) == [
        ["stage", "wall s", "share", "CPU s", "CPU/wall", "peak GB"],
        ["survey", "35.0", "87.5 %", "70.0", "2.00", "1.00"],
        ["trace", "5.0", "12.5 %", "10.0", "2.00", "1.00"],
        ["merging", "0.0", "0.0 %", "0.0", "", "1.00"],
        ["total", "40.0", "100.0 %", "80.0", "2.00", "1.00"],
        ["layer, survey", "wall s", "share"],
        ["head", "28.00", "80.0 %"],
        ["stem", "7.00", "20.0 %"],
    ]


def test_many_layers_share_a_row():
    rows = cells(stages.layer_table("survey", {f"conv{n}": 1.0 for n in range(stages.LAYERS + 5)}))
    assert len(rows) == 1 + stages.LAYERS + 1
    assert rows[-1] == ["5 others", "5.00", "20.0 %"]


def test_reports_side_by_side(tmp_path):
    for name, seconds in (("a", {"fits": 3.0, "survey": 9.0}), ("b", {"fits": 2.0, "training": 2.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(timed(seconds)))
    a, b = tmp_path / "a", tmp_path / "b" / "report.json"
    found = CliRunner().invoke(stages.cli, ["report", str(a), str(b)])
    assert cells(found.output) == [
        ["wall s", str(a), str(b), f"{a} / {b}"],
        ["survey", "9.00", "0.00", ""],
        ["fits", "3.00", "2.00", "1.50"],
        ["training", "0.00", "2.00", "0.00"],
        ["total", "12.00", "4.00", "3.00"],
        ["total CPU", "24.00", "8.00", "3.00"],
        ["peak GB", "1.00", "1.00", "1.00"],
    ]
    assert "survey" in CliRunner().invoke(stages.cli, ["report", str(a)]).output


@pytest.mark.parametrize(
    ("text", "message"),
    [(json.dumps(timed({})), "has no stages"), ("{}", "has no stages"), ("x", "Expecting")],
)
def test_reports_without_stages_are_refused(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    found = CliRunner().invoke(stages.cli, ["report", str(tmp_path)])
    assert found.exit_code == 2
    assert message in found.output


def test_growth_shows_the_stages_that_take_time():
    runs = [{"images": 8, "layers": 2}, {"images": 16, "layers": 2}]
    found = [
        (9.5, 1.25, {"fits": 2.0, "export": 7.0, "trace": 0.1}),
        (21.0, 1.5, {"fits": 20.0, "rest": 1.0}),
    ]
    assert cells(growth.table(runs, found)) == [
        ["images", "layers", "seconds", "GB"], ["8", "2", "9.5", "1.25"], ["16", "2", "21", "1.5"],
    ]  # fmt: skip
    assert cells(growth.stage_table(runs, found)) == [
        ["images", "layers", "fits", "export", "rest"],
        ["8", "2", "2", "7", "0"], ["16", "2", "20", "0", "1"],
    ]  # fmt: skip
