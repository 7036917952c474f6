r"""Check in continuous integration that a model becomes neither slower nor less accurate.

    python examples/07_compare_in_ci.py

Both models are measured alternately in one process, and the first one twice: a difference within that noise
does not count. On the command line the same check is

    sepconvert compare original.onnx converted.onnx --data val.npz --fail-if 'latency > +5%' \
        --fail-if 'drop > 0.5'

which exits with code 3 if one of the conditions holds. Where the model is trained or exported anew, it is
compared with its earlier self, by a history that a run on the main branch begins:

    sepconvert compare original.onnx converted.onnx --data val.npz --threads 1 --baseline history.json \
        --update-baseline
    sepconvert compare original.onnx converted.onnx --data val.npz --threads 1 --baseline history.json \
        --fail-if 'latency > +5%' --fail-if 'drop > 0.5'

What is printed is Markdown, for a comment on the pull request.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import sepconvert
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input

COMPARE = (
    sys.executable, "-m", "sepconvert", "compare", "original.onnx", "converted.onnx", "--data", "val.npz",
    "--threads", "1", "--runs", "30", "--format", "markdown",
)  # fmt: skip
CONDITIONS = ("--fail-if", "latency > +5%", "--fail-if", "drop > 0.5")
CHECKS = {
    "Against the original": CONDITIONS,
    "On the main branch": ("--baseline", "history.json", "--update-baseline", "--quiet"),
    "Against the main branch": ("--baseline", "history.json", *CONDITIONS),
}


def main() -> None:
    digits = evaluation_data(200)
    images = to_input(digits.x)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sepconvert.convert(load(), images[:1], mode="exact", timing=sepconvert.Timing(runs=0), out=folder)
        np.savez(folder / "val.npz", x=images.numpy(), y=digits.y)
        for title, options in CHECKS.items():
            command = [*COMPARE, *options]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
            outcome = "passed" if done.returncode == 0 else done.stderr.strip()
            print(f"## {title}\n\n{done.stdout}\nexit code {done.returncode}: {outcome}\n")


if __name__ == "__main__":
    main()
