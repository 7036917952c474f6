r"""A check for continuous integration: a model must not become slower, nor lose accuracy.

    python examples/07_compare_in_ci.py

Both models are measured in one process and in turns, the first one twice: what does not stand out from that
noise is no difference. On the command line the same is

    sepconvert compare original.onnx converted.onnx --data val.npz --fail-if 'latency > +5%' \
        --fail-if 'drop > 0.5'

which ends with exit code 3 if one of the conditions holds.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import sepconvert
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input


def main() -> None:
    digits = evaluation_data(200)
    images = to_input(digits.x)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sepconvert.convert(load(), images[:1], mode="exact", runs=0, out=folder)
        np.savez(folder / "val.npz", x=images.numpy(), y=digits.y)
        done = subprocess.run(
            [
                sys.executable, "-m", "sepconvert", "compare", "original.onnx", "converted.onnx",
                "--data", "val.npz", "--threads", "1", "--runs", "30", "--format", "markdown",
                "--fail-if", "latency > +5%", "--fail-if", "drop > 0.5",
            ],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    print(done.stdout)
    print(f"exit code {done.returncode}: {'passed' if done.returncode == 0 else done.stderr.strip()}")


if __name__ == "__main__":
    main()
