"""Command `demo`: the three modes on an embedded network and its data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.options.values import Mode, Origin
from sepconvert.cli.demo.images import evaluation_data, training_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.cli.inputs import TRAINING_BATCH, timing_of
from sepconvert.cli.outputs import command_line, out_of, result_directory_of, show
from sepconvert.cli.progress import display_for, quietly
from sepconvert.pipeline.convert import convert as run_convert
from sepconvert.report.text.sentences import story
from sepconvert.report.text.tables import headline, modes_table

# For each mode: what it is about, and the arguments of its conversion.
_DEMO: Mapping[Mode, tuple[str, Mapping[str, Any]]] = {
    "exact": ("EXACT: what separates for free, proved.", {}),
    "approx": (
        "APPROX: a depthwise and a pointwise convolution in place of each dense one.",
        {"rank": 1, "gate": "none"},
    ),
    "auto": (
        "AUTO: structures chosen by measured times, for at most a point of accuracy.",
        {"max_drop": 1.0},
    ),
}

_LAST = """\
Written to {out}/, one folder per mode. For the full report, open
  {out}/auto/report.html
in a browser; the other modes have theirs beside it.

With a model of your own, saved by torch.save, begin with
  sepconvert inspect model.pt --input-shape 3x224x224
and, with some images, some of them labelled, go on with
  sepconvert model.pt --mode auto --calib images/ --data val.npz --max-drop 1
The options that are named above are those of this command, too."""

_DEMO_SCORED, _DEMO_IMAGES, _DEMO_SECONDS = 2000, 256, 3.0


def demo(**options: Any) -> None:
    """Run `sepconvert demo`."""
    out, said, display = out_of(options), list[str](), display_for(options)
    with quietly(), display.shown(), result_directory_of(options, out) as folder:
        scored, shown = evaluation_data(_DEMO_SCORED), training_data(_DEMO_IMAGES)
        x, y = to_input(scored.x), torch.from_numpy(scored.y)
        data = DataLoader(TensorDataset(x, y), batch_size=256)
        unlabelled = TensorDataset(to_input(shown.x), torch.full((len(shown.x),), -1))
        calib: DataLoader[Any] = DataLoader(unlabelled, TRAINING_BATCH)
        reports: dict[str, Any] = {}
        for mode, (title, keywords) in _DEMO.items():
            display.title = mode
            result = run_convert(
                load(),
                x[: options["batch"]],
                mode,
                data=data,
                calib=None if mode == "exact" else calib,
                timing=dataclasses.replace(timing_of(options), measure_seconds=_DEMO_SECONDS),
                dynamic_batch=options["dynamic_batch"],
                seed=options["seed"],
                origin=Origin(command=command_line()),
                out=folder / mode,
                progress=display,
                **keywords,
            )
            reports[mode] = result.report
            said += [title, "", *story(result.report), ""]
    show(options, reports, headline(reports), "", modes_table(reports), "", *said, _LAST.format(out=out))
