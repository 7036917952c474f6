"""Options of the command line, grouped by what they configure."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sepconvert.base.environment import GRAPH_OPTIMIZATIONS, MAX_THREADS
from sepconvert.base.errors import MAX_SEED

Command = Callable[..., Any]


def in_flags(text: str) -> str:
    """Return a text with names of parameters, in backticks, turned into options of the command line."""
    return re.sub(r"`([a-z][a-z_]*)`", lambda name: f"--{name[1].replace('_', '-')}", text)


def _options(*decorators: Command) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


loading_options = _options(
    click.option(
        "--factory",
        metavar="PKG.MOD:CALLABLE",
        help="Builds the model of a state_dict checkpoint; also file.py:callable.",
    ),
    click.option(
        "--allow", multiple=True, metavar="CLASS", help="Admit this class of a pickled model. Repeatable."
    ),
    click.option("--trust", is_flag=True, help="Run the file as the program that a pickle is. Last resort."),
    click.option("--input-shape", metavar="CxHxW", help="Shape of one sample, e.g. 3x224x224."),
)


model_options = _options(click.argument("model", type=click.Path(path_type=Path)), loading_options)


data_options = _options(
    click.option(
        "--data", metavar="PATH", help="Labelled data: .npz, a folder of class folders, or pkg.mod:callable."
    ),
    click.option("--mean", metavar="R,G,B", help="Mean of x/255 per channel, for uint8 images."),
    click.option("--std", metavar="R,G,B", help="Standard deviation, likewise."),
    click.option("--resize", metavar="N|HxW", help="Size to which uint8 images are resized."),
)


selection_options = _options(
    click.option("--include", multiple=True, metavar="GLOB", help="Only layers with such names. Repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No layers with such names. Repeatable."),
    click.option(
        "--tol",
        type=float,
        help="Relative kernel error that counts as exact [default: rounding of its dtype].",
    ),
)


approx_options = _options(
    click.option("--calib", metavar="PATH", help="Images to fit to, in the forms of --data "
                 "[default: a part of --data, which is then not scored]."),
    click.option("--calib-images", default=1536, show_default=True, type=click.IntRange(1),
                 help="How many; a quarter, or 256, are held out to judge plans by."),
    click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GB",
                 help="That the process may have while it calibrates; less takes longer "
                      "[default: half of what is free besides]."),
    click.option("--rank", type=click.IntRange(1), help="Depthwise multiplier of all layers, no search."),
    click.option("--target-macs", type=float, metavar="F", help="Most MACs, as a share of the original's."),
    click.option("--target-params", type=float, metavar="F", help="Most parameters, likewise."),
    click.option("--min-speedup", type=float, metavar="X", help="Least measured latency ratio."),
    click.option("--max-drop", type=float, metavar="PP",
                 help="Largest drop of top-1 on --data [default: 1, if nothing else is demanded]."),
    click.option("--finetune", default=0, metavar="EPOCHS", type=click.IntRange(0),
                 help="Distil from the original afterwards, on --train or --calib."),
    click.option("--train", metavar="PATH", help="Images to fine-tune on; their labels are used if there."),
    click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]),
                 help="Mixed precision of fine-tuning [default: that of accelerate launch]."),
    click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
                 help="Keep fine-tuning in this file while it runs [default: beside --out]."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint of a run that was interrupted."),
)  # fmt: skip


run_options = _options(
    click.option(
        "--batch", default=1, show_default=True, type=click.IntRange(1), help="Batch that is run and timed."
    ),
    click.option("--device", default="cpu", show_default=True, help="Where torch runs it, e.g. cuda."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0, MAX_SEED), metavar="N",
                 help="Of random inputs and of the order of runs."),
    click.option("--quiet", is_flag=True, help="No progress, no tables; warnings remain."),
    click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)  # fmt: skip


timing_options = _options(
    click.option("--threads", type=click.IntRange(1, MAX_THREADS), metavar="N",
                 help="Threads of ONNX Runtime [default: all cores]."),
    click.option(
        "--graph-optimization",
        type=click.Choice(GRAPH_OPTIMIZATIONS),
        default="all",
        show_default=True,
        help="Of ONNX Runtime, for what is timed: that with which you deploy.",
    ),
    click.option("--provider", default="cpu", show_default=True, metavar="NAME",
                 callback=lambda context, parameter, name: name.lower(),
                 help="Execution provider of ONNX Runtime: cpu, cuda, tensorrt, openvino, coreml, …"),
    click.option(
        "--runs", default=50, show_default=True, type=click.IntRange(0), help="Timed runs; 0 for none."
    ),
)  # fmt: skip


output_options = _options(
    click.option("--out", type=click.Path(path_type=Path), help="Results [default: STEM-sepconvert]."),
    click.option("--force", is_flag=True, help="Replace an existing result directory."),
    click.option("--dynamic-batch/--no-dynamic-batch", default=True, show_default=True,
                 help="Leave the batch dimension open where the model allows it."),
)  # fmt: skip
