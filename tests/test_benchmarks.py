import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import fashion_mnist
import peers


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
