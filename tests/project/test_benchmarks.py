import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fashion_mnist
import peers
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
