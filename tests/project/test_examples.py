"""The examples run as they stand, and do what they say."""

import runpy
import sys
from pathlib import Path

import pytest
from pages import exit_code

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "01_edges.py": (
        "Sobel: [-1 -2 -1]ᵀ × [1 0 -1], 9 → 6 multiplications a pixel, images differ by 0e+00",
        "Laplacian: kept, no exact structure",
    ),
    "02_depthwise_separable.py": "1,228,800 dense, 53,952 separable",
    "03_exact.py": "MACs: 2.03× fewer",
    "04_approx_finetune.py": tuple(
        f"M = {rank}, {epochs} epochs: 143,786 → {params} parameters, accuracy "
        for rank, params in ((1, "14,587"), (2, "27,980"))
        for epochs in (0, 1)
    ),
    "05_auto_budget.py": "times as fast, accuracy lost: ",
    "06_own_training_loop.py": "after epoch 1: ",
    "07_compare_in_ci.py": (
        "exit code 0: passed",
        "Checks passed: `latency > +5%`, `drop > 0.5`.",
        "Since the baseline:",
    ),
    "08_segmentation.py": ("step 20 of 20: loss ", "mean IoU: ", " pp on 16 scenes", "times as fast, "),
    "09_super_resolution.py": ("bicubic: ", " dB on 8 crops", "times as fast, "),
    "image_filters.py": "3.49× fewer",
    "own_model.py": "merged: converted, rank 8 of 80",
}
# Less of what takes time.
ARGUMENTS = {
    "01_edges.py": ["--figure", "edges.png"],
    "04_approx_finetune.py": ["--ranks", "1", "2", "--images", "100", "--epochs", "1", "--figure", "few.png"],
    "05_auto_budget.py": ["--images", "100", "--max-drop", "5", "--seconds", "2"],
    "06_own_training_loop.py": ["--images", "100", "--epochs", "1"],
    "08_segmentation.py": [
        "--steps",
        "20",
        "--scenes",
        "4",
        "--max-drop",
        "50",
        "--seconds",
        "1",
        "--save",
        "scenes",
    ],
    "09_super_resolution.py": ["--steps", "20", "--crops", "8", "--max-drop", "3", "--seconds", "1"],
}

SLOW = {
    "03_exact.py",
    "04_approx_finetune.py",
    "05_auto_budget.py",
    "06_own_training_loop.py",
    "07_compare_in_ci.py",
    "08_segmentation.py",
    "09_super_resolution.py",
}


def test_every_example_is_listed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SAYS]
)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported what takes an example seconds to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *ARGUMENTS.get(name, [])])
    assert exit_code(lambda: runpy.run_path(str(EXAMPLES / name), run_name="__main__")) == 0
    output = capsys.readouterr().out
    for said in [SAYS[name]] if isinstance(SAYS[name], str) else SAYS[name]:
        assert said in output
    for figure in (each for each in ARGUMENTS.get(name, []) if each.endswith(".png")):
        assert (tmp_path / figure).stat().st_size > 10_000
