"""Checks that need no torch, made before it is imported: a mistake is reported in a fraction of a second.

Commands do not repeat them. What the Python API checks, too, is in functions and values that both use.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from sepconvert.base.documents import check_file, writing
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.exporting import Export
from sepconvert.base.options.values import Budget, Calibration, Finetuning, Int8, Selection, Task, Timing
from sepconvert.cli.conditions import Demand
from sepconvert.cli.options import Options, value_of
from sepconvert.cli.outputs import check_place, checkpoint_of, out_of
from sepconvert.files.callables import check_callable
from sepconvert.files.models.formats import ModelFormat, model_format
from sepconvert.files.sources import check_data, parse_input_shape
from sepconvert.pipeline.job import Job

# What a trace holds among its first bytes.
_TRACE, _BEGINNING = b'"traceEvents"', 64


def check_convert(options: Options) -> None:
    """Check the options of `sepconvert MODEL`; raise `SepconvertError` for the first that is wrong."""
    job = job_of(options)
    # The unit of the metric is not known here: the usual one passes.
    job.with_default_budget(unit=None if options["data"] is None else "pp")
    _check_models(options, [_loaded(options, options["model"])])
    _check_data(options)
    if options["dry_run"]:
        return
    if job.finetuning:
        _check_checkpoint(options)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one writes
        check_place(options)


def check_inspect(options: Options) -> None:
    """Check the options of `sepconvert inspect MODEL`."""
    job_of(options)
    _check_models(options, [_loaded(options, options["model"])])
    _check_data(options)


def check_profile(options: Options) -> None:
    """Check the options of `sepconvert profile MODEL`."""
    job_of(options)
    _check_models(options, [_measured(options, options["model"])])
    _check_data(options)
    _check_writable(options["out"], "out")
    _check_trace(options)


def check_compare(options: Options) -> None:
    """Check the options of `sepconvert compare A B …`."""
    since = options["baseline"] is not None
    if len(options["models"]) < 2 and not since:  # no condition of --fail-if could fail
        raise SepconvertError(
            "compare: expected two models or more, got one; profile measures one, and --baseline compares it "
            "with earlier runs"
        )
    for text in options["fail_if"]:
        Demand.parse(text)
    job_of(options)
    formats = [_compared(options, path) for path in options["models"]]
    _check_models(options, formats)
    _check_data(options)
    for name in ("baseline", "trace"):
        if options[name] is not None and None in formats:
            raise SepconvertError(
                f"--{name}: is of models that are run now, got a stored profile; pass models or .onnx files"
            )
    _check_baseline(options)
    _check_trace(options)


def check_apply(options: Options) -> None:
    """Check the options of `sepconvert apply MODEL PLAN`."""
    value_of(Export, options)
    _check_models(options, [_loaded(options, options["model"])])
    check_file(options["plan"])
    _check_data(options)
    check_place(options)


def check_demo(options: Options) -> None:
    """Check the options of `sepconvert demo`."""
    job_of(options)
    check_place(options)


def job_of(options: Options) -> Job:
    """Return the settings that the options make; making them checks them. Others have their defaults."""
    return value_of(
        Job,
        options,
        task=value_of(Task, options),
        budget=value_of(Budget, options),
        selection=value_of(Selection, options),
        timing=value_of(Timing, options),
        calibration=value_of(Calibration, options),
        int8=value_of(Int8, options),
        export=value_of(Export, options),
        finetuning=value_of(Finetuning, options, train=options.get("train")),
    )


def _loaded(options: Options, path: Path) -> ModelFormat:
    """Return the format of a model that is loaded into torch.

    Raises:
        SepconvertError: it is no model, or cannot be on the device.
    """
    found = model_format(path, built=options["factory"] is not None)
    if found == "onnx" and options["device"] != "cpu":
        raise SepconvertError(
            f"--device {options['device']}: ONNX files are run on the CPU here; leave it out (--provider is "
            "what they are timed on)"
        )
    return found


def _measured(options: Options, path: Path) -> ModelFormat:
    """Return the format of a model that is loaded into torch, or of an ONNX file, which is not."""
    if path.suffix == ".onnx":
        check_file(path)
        return "onnx"
    return _loaded(options, path)


def _compared(options: Options, path: Path) -> ModelFormat | None:
    """Return the format of a model; None for a stored profile."""
    if path.suffix == ".json":
        check_file(path)
        return None
    return _measured(options, path)


def _check_models(options: Options, formats: Iterable[ModelFormat | None]) -> None:
    """Refuse options that models of these formats cannot obey."""
    formats = {*formats}
    if formats == {"onnx"} and (given := value_of(Export, options).given()):
        raise SepconvertError(
            f"`{given[0]}`: an ONNX file keeps the names and the opset that it has; leave it out"
        )
    ignored = [f"--{name}" for name in ("allow", "trust") if options.get(name)]
    if ignored and formats == {"named"}:
        raise SepconvertError(
            f"{', '.join(ignored)}: only for files, and a library builds this model; leave {ignored[0]} out"
        )
    if options.get("layout") == "nhwc" and not {"onnx", None} & formats:
        raise SepconvertError(
            "--layout nhwc: is for ONNX files, and layers of torch take images as N×C×H×W; leave it out"
        )


def _check_data(options: Options) -> None:
    """Check that data and code are where the options say, and that no option about them would be ignored."""
    for name in ("factory", "metric", "postprocess", "loss"):
        given = options.get(name)
        if given is not None and (name != "metric" or ":" in given):  # others are names
            check_callable(given, name)
    if options.get("factory_args") is not None and options["factory"] is None:
        raise SepconvertError("`factory_args`: are what `factory` is called with; pass `factory` too")
    names = [name for name in ("data", "calib", "train") if options.get(name) is not None]
    unused = [f"--{name}" for name in ("mean", "std", "resize") if options.get(name) is not None]
    if unused and not names:
        raise SepconvertError(
            f"{', '.join(unused)}: only for uint8 images; pass --data, --calib or --train too"
        )
    if options.get("targets") is not None and "data" not in names:
        raise SepconvertError(
            "`targets`: are those of the images of `data`; pass that folder too, or leave `targets` out"
        )
    for name in names:
        check_data(options[name], name, options["targets"] if name == "data" else None)
    if options.get("input_shape"):
        parse_input_shape(options["input_shape"])


def _check_baseline(options: Options) -> None:
    """Check that a history is there, or may be begun."""
    path: Path | None = options["baseline"]
    if path is None:
        if options["update_baseline"]:
            raise SepconvertError("--update-baseline: adds this run to a history; pass --baseline FILE too")
        return
    if not path.exists() and not options["update_baseline"]:
        raise SepconvertError(
            f"--baseline {path}: there is no such file; pass --update-baseline too, to begin it with this run"
        )
    if path.exists():
        check_file(path)
    if options["update_baseline"]:
        _check_writable(path, "baseline")


def _check_trace(options: Options) -> None:
    """Check that a trace may be written, over nothing but a trace."""
    path: Path | None = options["trace"]
    _check_writable(path, "trace")
    if path is not None and path.exists():
        check_file(path)
        with path.open("rb") as file:
            if _TRACE not in file.read(_BEGINNING):
                raise SepconvertError(f"{path}: exists and is no trace; pass another --trace")


def _check_writable(path: Path | None, parameter: str) -> None:
    """Check that a file can be written, if it is wanted."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise SepconvertError(
            f"{path}: cannot be written: there is no {path.parent}; pass another `{parameter}`"
        )
    with writing(path, parameter):
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _check_checkpoint(options: Options) -> None:
    """Check that the checkpoint of fine-tuning is no foreign file, nor within the result."""
    checkpoint, out = checkpoint_of(options), out_of(options)
    if out.resolve() in checkpoint.resolve().parents:
        raise SepconvertError(
            f"`checkpoint` {checkpoint}: lies in {out}, which is written as a whole; pass a place beside it"
        )
    if checkpoint.exists() and not options["resume"]:
        raise SepconvertError(
            f"{checkpoint}: an interrupted run left it; pass `resume` to continue, or remove it"
        )
