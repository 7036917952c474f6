"""What the commands do: files → values → pipeline → files and tables."""

import contextlib
import json
import logging
import math
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from sepconvert.approx import checkpoints
from sepconvert.comparison import Comparison, Demand
from sepconvert.data import (
    Batch,
    Preprocess,
    check_against_model,
    has_labels,
    is_own,
    load_data,
    sample_shape,
)
from sepconvert.distillation import Step
from sepconvert.distributed import join, rank
from sepconvert.environment import Runtime, available_cores, environment
from sepconvert.errors import DemandNotMetError, SepconvertError, first_line
from sepconvert.export import OnnxFile, cast, model_dtype, read_onnx, writing
from sepconvert.footprint import images_at_once
from sepconvert.head_to_head import Subject
from sepconvert.head_to_head import measure as measure_together
from sepconvert.load import MAX_INPUT_ELEMENTS, LoadedModel, load_model, parse_input_shape
from sepconvert.output import FILES, result_directory
from sepconvert.pipeline import ConversionResult
from sepconvert.pipeline import apply_plan as run_apply
from sepconvert.pipeline import convert as run_convert
from sepconvert.pipeline import inspect as run_inspect
from sepconvert.plan import read_plan
from sepconvert.profiling import SCHEMA as PROFILE_SCHEMA
from sepconvert.profiling import StoredProfile, anatomy, batch_size, read_profile
from sepconvert.profiling import profile as run_profile
from sepconvert.progress import Progress, silent
from sepconvert.report.html import render_comparison
from sepconvert.report.terminal import (
    anatomy_text,
    layer_table,
    modes_table,
    story,
    structure_table,
    summary,
    warnings_of,
)
from sepconvert.trace import Inputs, tensors_in

T = TypeVar("T")
Options = Mapping[str, Any]

_STEP = 64
"""Images to a step of fine-tuning.

Five epochs of a ResNet-9 end at 87.3 %, at 86.6 % with 128 and the learning rate 5e-3 (a run each)."""


# What `sepconvert demo` shows: what each mode is about, and how it is asked for.
_DEMO: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "exact": ("EXACT: what separates for free, proved.", {}),
    "approx": (
        "APPROX: a depthwise and a pointwise convolution in place of each dense one.",
        {"rank": 1, "gate": "none"},
    ),
    "auto": (
        "AUTO: a mix of structures, chosen by measured times, that loses at most a point of accuracy.",
        {"max_drop": 1.0},
    ),
}
_DEMO_SCORED, _DEMO_IMAGES, _DEMO_SECONDS = 2000, 512, 10.0

_LINE_EVERY = 10.0  # seconds between lines that show progress where there is no terminal


def convert(**options: Any) -> None:
    """`sepconvert MODEL`."""
    _check_used(options)
    if options["dry_run"]:
        _dry_run(options)
        return
    join()
    main, out = rank() == 0, _out(options)
    place = _result_directory(options, out) if main else contextlib.nullcontext()
    with _quietly(), place as folder:
        loaded = _load(options)
        data, inputs = _data_and_inputs(options, loaded)
        result = run_convert(
            loaded.model,
            inputs,
            options["mode"],
            data=data,
            **_approximate(options, out),
            gate=options["gate"],
            measure_seconds=options["measure_seconds"],
            cache=options["cache"] or user_cache_path("sepconvert") / "latency",
            dynamic_batch=options["dynamic_batch"],
            runs=options["runs"],
            threads=options["threads"],
            graph_optimization=options["graph_optimization"],
            provider=options["provider"],
            source={"path": str(loaded.path), "sha256": loaded.sha256},
            command=_command(),
            out=folder,
            **_common(options),
        )
    if main:
        if (checkpoint := _checkpoint(options, out)) is not None:
            training = (result.report["approximation"] or {}).get("finetune")
            # Files that this run has read or written, and no others that were in their place.
            used = 0 if training is None else max(1, len(training["attempts"]))
            for path in checkpoints(checkpoint)[:used]:
                path.unlink(missing_ok=True)
        _show(options, result, out)


def _check_used(options: Options) -> None:
    """Refuse what would be dropped in silence."""
    given = [f"--{name}" for name in ("train", "precision", "checkpoint", "resume") if options[name]]
    if given and not options["finetune"]:
        raise SepconvertError(f"{', '.join(given)}: for fine-tuning; pass --finetune too, or leave it out")
    if options["dry_run"] and options["mode"] != "exact":
        raise SepconvertError(
            f"--dry-run: shows what exact mode converts; {options['mode']} mode fits and measures before it "
            "knows: run it, and apply its plan.json if you like it"
        )


def inspect(**options: Any) -> None:
    """`sepconvert inspect MODEL`."""
    with _quietly():
        loaded = _load(options)
        _, inputs = _data_and_inputs(options, loaded)
        found = run_inspect(
            loaded.model, inputs, **{k: v for k, v in _common(options).items() if k != "seed"}
        )
    _print(options, found, layer_table(found["layers"]), "", structure_table(found["layers"]))


def apply(**options: Any) -> None:
    """`sepconvert apply MODEL PLAN.json`."""
    out = _out(options)
    with _quietly(), _result_directory(options, out) as folder:
        plan = read_plan(options["plan"])
        loaded = _load(options)
        if plan.model_sha256 not in (None, loaded.sha256):
            raise SepconvertError(
                f"{loaded.path}: is another file than the plan was made of (SHA-256 {loaded.sha256[:12]}…, "
                f"expected {plan.model_sha256[:12]}…), and would take the plan's weights; pass that file, or "
                "call sepconvert.apply in Python, which takes any model of the architecture"
            )
        verified = run_apply(
            loaded.model,
            plan,
            options["plan"].parent / "converted.safetensors",
            folder,
            model_sha256=loaded.sha256,
            dynamic_batch=options["dynamic_batch"],
            progress=_progress(options),
        )
    _print(options, {"out": str(out), "converted": len(plan.converted), "verification": verified},
           f"{len(plan.converted)} convolutions replaced as planned; written to {out}/",
           _verdict(verified))  # fmt: skip


def profile(**options: Any) -> None:
    """`sepconvert profile MODEL`."""
    out: Path | None = options["out"]
    if out is not None and not out.parent.is_dir():  # which is better known before all is measured
        raise SepconvertError(f"{out}: cannot be written: there is no {out.parent}; pass another --out")
    if out is not None and out.exists() and not _is_profile(out):
        raise SepconvertError(f"{out}: exists and is no profile of this version; pass another --out")
    with _quietly():
        found = _profile(options)
    document = {
        "schema": PROFILE_SCHEMA,
        "model": {"path": found.model, "sha256": found.sha256},
        "environment": found.environment,
        **found.profile.to_json(),
    }
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    details = ("", anatomy_text(document["anatomy"])) if "anatomy" in document else ()
    _print(options, document, str(Comparison((found.profile,))), *details)


def _is_profile(path: Path) -> bool:
    try:
        read_profile(path)
    except SepconvertError:
        return False
    return True


def compare(**options: Any) -> None:
    """`sepconvert compare A B …`."""
    if len(options["models"]) < 2:  # of which no condition of --fail-if would fail
        raise SepconvertError("compare: expected two models or more, got one; profile measures one")
    demands = [Demand.parse(text) for text in options["fail_if"]]
    stored = any(path.suffix == ".json" for path in options["models"])
    for demand in demands:
        demand.require(together=not stored, timed=options["runs"] > 0, data=options["data"] is not None)
    with _quietly():
        found, note = _stored(options) if stored else _together(options)
    json_wanted = {**options, "as_json": options["as_json"] or options["style"] == "json"}
    if options["style"] == "html":
        text = render_comparison(found, note)
    else:
        text = "" if options["style"] == "json" else found.text(options["style"])
    _print(json_wanted, found.to_json(), text, *(("", note) if options["style"] == "table" else ()))
    failures = [failure for demand in demands for failure in demand.failures(found)]
    if failures:
        raise DemandNotMetError(f"--fail-if: {'; '.join(failures)}")


def _stored(options: Options) -> tuple[Comparison, str]:
    """Profiles, and models that are profiled now, one after the other."""
    found = [
        read_profile(path) if path.suffix == ".json" else _profile({**options, "model": path})
        for path in options["models"]
    ]
    notes = ["Measured apart: differences of latency are not tested for significance."]
    for path, each in zip(options["models"][1:], found[1:], strict=True):
        if differences := found[0].differences(each.environment):
            notes.append(f"Warning: {path} was measured elsewhere than {options['models'][0]}:")
            notes += [f"  {difference}" for difference in differences]
        if each.model == found[0].model and each.sha256 != found[0].sha256:
            notes.append(f"Warning: {path} is of another file of the name {each.model} (sha256 differs).")
    names = tuple(map(str, options["models"]))
    return Comparison(tuple(each.profile for each in found), names), "\n".join(notes)


def _together(options: Options) -> tuple[Comparison, str]:
    """Models and ONNX files, measured in this process."""
    paths = options["models"]
    files = {path: read_onnx(path) for path in paths if path.suffix == ".onnx"}
    loaded = {path: _load({**options, "model": path}) for path in paths if path not in files}
    examples = [each.example_inputs for each in loaded.values()] + [_example(each) for each in files.values()]
    example = next((each for each in examples if each is not None), None)
    data, inputs = _data_and_examples(options, example)
    with tempfile.TemporaryDirectory() as folder:
        subjects = [
            Subject.of_file(path, files[path])
            if path in files
            else Subject.of_model(str(path), loaded[path].model, inputs, Path(folder) / f"{index}.onnx")
            for index, path in enumerate(paths)
        ]
        comparison = _measured(subjects, data, inputs, options)
    seen = "of the data" if data is not None else "of the timed batch"
    rounds = (
        f"{options['runs']} interleaved rounds, batch {options['batch']}.\n"
        "Medians with 95 % intervals; noise is the base against itself."
        if options["runs"]
        else "not timed (--runs 0)."
    )
    return comparison, (f"Measured together: {rounds}\nDifferences are those {seen}, of each output in turn.")


def _example(file: OnnxFile) -> Inputs | None:
    """Inputs of the shapes that an ONNX file gives; None if it leaves more open than the batch."""
    if any(None in shape[1:] for shape in file.shapes):
        return None
    return tuple(
        torch.from_numpy(np.zeros((1, *(size or 1 for size in shape[1:]))[: len(shape)], dtype))
        for shape, dtype in zip(file.shapes, file.dtypes, strict=True)
    )


def _profile(options: Options) -> StoredProfile:
    """Of a model or an ONNX file."""
    path, runtime = options["model"], _runtime(options)
    if path.suffix == ".onnx":
        file = read_onnx(path)
        data, inputs = _data_and_examples(options, _example(file))
        batches = _batches(options) if options["runs"] else None
        # What is timed in detail is not timed before.
        timing = options if batches is None else {**options, "runs": 0}
        found = _measured([Subject.of_file(path, file)], data, inputs, timing).profiles[0]
        if batches is not None:
            arrays = [value.numpy() for value in tensors_in(inputs)]
            detail = anatomy(
                path, arrays, batches=batches, runs=options["runs"], runtime=runtime, seed=options["seed"],
                progress=_progress(options),
            )  # fmt: skip
            latency = detail.latency(runtime.threads, batch_size(inputs))
            found = replace(found, latency=latency, anatomy=detail)
        return StoredProfile(found, str(path), file.sha256, environment(runtime))
    loaded = _load(options)
    data, inputs = _data_and_inputs(options, loaded)
    found = run_profile(
        loaded.model,
        inputs,
        data=data,
        runs=options["runs"],
        threads=options["threads"],
        graph_optimization=options["graph_optimization"],
        provider=options["provider"],
        batches=_batches(options),
        seed=options["seed"],
        progress=_progress(options),
    )
    return StoredProfile(found, str(loaded.path), loaded.sha256, environment(runtime))


def _measured(
    subjects: Sequence[Subject], data: Iterable[Batch] | None, inputs: Inputs, options: Options
) -> Comparison:
    return measure_together(
        subjects,
        [value.numpy() for value in tensors_in(inputs)],
        data=data,
        runs=options["runs"],
        runtime=_runtime(options),
        seed=options["seed"],
        progress=_progress(options),
    )


def _runtime(options: Options) -> Runtime:
    return Runtime(
        options["threads"] or available_cores(), options["graph_optimization"], options["provider"]
    )


def _batches(options: Options) -> list[int] | None:
    """Those of --batches; None where nothing is asked but a comparison."""
    text = options.get("batches")
    if text is None:
        return None
    found = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(found) != len(text.split(",")) or not all(found):
        raise SepconvertError(
            f"--batches {text}: expected whole numbers from 1, joined by commas, e.g. 1,8,32"
        )
    return found


def demo(**options: Any) -> None:
    """`sepconvert demo`."""
    from torch.utils.data import TensorDataset

    from sepconvert.demo.images import evaluation_data, training_data
    from sepconvert.demo.net import load, to_input

    out, told = options["out"] or Path("demo-sepconvert"), []
    with _quietly(), _result_directory(options, out) as folder:
        scored, shown = evaluation_data(_DEMO_SCORED), training_data(_DEMO_IMAGES)
        x, y = to_input(scored.x), torch.from_numpy(scored.y)
        data = DataLoader(TensorDataset(x, y), batch_size=256)
        unlabelled = TensorDataset(to_input(shown.x), torch.full((len(shown.x),), -1))
        calib: DataLoader[Any] = DataLoader(unlabelled, _STEP)
        reports = {}
        for mode, (title, keywords) in _DEMO.items():
            result = run_convert(
                load(),
                x[: options["batch"]],
                mode,
                data=data,
                calib=None if mode == "exact" else calib,
                measure_seconds=_DEMO_SECONDS,
                cache=user_cache_path("sepconvert") / "latency",
                dynamic_batch=options["dynamic_batch"],
                runs=options["runs"],
                threads=options["threads"],
                graph_optimization=options["graph_optimization"],
                provider=options["provider"],
                seed=options["seed"],
                command=_command(),
                out=folder / mode,
                progress=_progress(options),
                **keywords,
            )
            reports[mode] = result.report
            told += [title, "", *story(result.report), ""]
    _print(options, reports, *told, modes_table(reports), "",
           f"Written to {out}/, a folder for each mode. Open {out}/exact/report.html in a browser\n"
           "for the whole account, and the reports of the other modes beside it. Options that\n"
           "are named above are those of `sepconvert MODEL`.")  # fmt: skip


def _approximate(options: Options, out: Path) -> dict[str, Any]:
    """The options of approximate mode."""
    names = (
        "calib_images", "rank", "target_macs", "target_params", "min_speedup", "max_drop",
        "finetune", "precision", "resume",
    )  # fmt: skip
    checkpoint = _checkpoint(options, out)
    if checkpoint is not None and out.resolve() in checkpoint.resolve().parents:
        raise SepconvertError(
            f"--checkpoint {checkpoint}: lies in {out}, which is written as a whole; pass a place beside it"
        )
    if checkpoint is not None and checkpoint.exists() and not options["resume"]:
        raise SepconvertError(
            f"{checkpoint}: a run that was interrupted left it; pass --resume to go on, or remove it"
        )
    if checkpoint is not None and checkpoint.exists() and not options["quiet"]:
        click.echo(f"going on from {checkpoint}", err=True)
    return {
        **{name: options[name] for name in names},
        "memory": options["memory"] and options["memory"] * 1e9,
        "calib": _images(options, "calib"),
        "train": _images(options, "train"),
        "checkpoint": checkpoint,
        "on_step": _training_progress(options),
    }


def _checkpoint(options: Options, out: Path) -> Path | None:
    if not options["finetune"]:
        return None
    given: Path | None = options["checkpoint"]
    return given or out.with_name(f"{out.name}.checkpoint")


def _images(options: Options, name: str) -> DataLoader[Batch] | None:
    """Images of --calib or --train, with labels where there are any."""
    spec = options[name]
    if spec is None:
        return None
    labelled = has_labels(spec)
    return load_data(spec, _preprocess(options), batch_size=_STEP, labelled=labelled, option=f"--{name}")


def _preprocess(options: Options) -> Preprocess:
    return Preprocess(
        _numbers(options["mean"], "--mean"), _numbers(options["std"], "--std"), _size(options["resize"])
    )


def _dry_run(options: Options) -> None:
    with _quietly():
        loaded = _load(options)
        _, inputs = _data_and_inputs(options, loaded)
        keywords = {k: v for k, v in _common(options).items() if k != "seed"}
        found = run_inspect(loaded.model, inputs, gate=options["gate"] or "macs", **keywords)
    _print(options, found, layer_table(found["layers"]), "", "Dry run: nothing was written.")


def _command() -> str:
    return shlex.join(["sepconvert", *sys.argv[1:]])


def _out(options: Options) -> Path:
    return options["out"] or Path(f"{options['model'].stem}-sepconvert")


def _result_directory(options: Options, out: Path) -> contextlib.AbstractContextManager[Path]:
    """Where results go, which must not replace what they are made from."""
    names = ("model", "plan", "data", "calib", "train")
    inputs = [Path(options[name]) for name in names if options.get(name) is not None]
    resumed = options.get("resume", False)
    return result_directory(out, force=options["force"], inputs=inputs, resumed=resumed)


def _common(options: Options) -> dict[str, Any]:
    return {
        "tol": options["tol"],
        "include": options["include"],
        "exclude": options["exclude"],
        "seed": options["seed"],
        "progress": _progress(options),
    }


def _load(options: Options) -> LoadedModel:
    if options["trust"]:
        click.echo(f"sepconvert: --trust: {options['model']} is run as a program", err=True)
    loaded = load_model(
        options["model"], factory=options["factory"], allow=options["allow"], trust=options["trust"]
    )
    if loaded.stored_dtype is not None:
        stored, own = (
            str(dtype).removeprefix("torch.") for dtype in (loaded.stored_dtype, model_dtype(loaded.model))
        )
        click.echo(
            f"sepconvert: {options['model']}: {stored} weights, in the {own} model of --factory", err=True
        )
    try:
        loaded.model.to(options["device"])
        if torch.device(options["device"]).type == "meta":
            raise ValueError("it holds no data")
    except Exception as error:  # torch's errors for unknown and for missing devices share no base class
        raise SepconvertError(
            f"--device {options['device']}: cannot be used: {first_line(error)}; pass --device cpu"
        ) from error
    return loaded


def _data_and_inputs(options: Options, loaded: LoadedModel) -> tuple[Iterable[Batch] | None, Inputs]:
    """Evaluation data if any, and the inputs to trace, verify and time the model on."""
    data, inputs = _data_and_examples(options, loaded.example_inputs)
    placed = tuple(value.to(options["device"]) for value in cast(inputs, model_dtype(loaded.model)))
    return None if data is None else _that_fit(data, loaded.model, placed), placed


def _that_fit(data: Iterable[Batch], model: nn.Module, inputs: Inputs) -> Iterable[Batch]:
    """The data in batches that leave memory for large activations; a loader of the user's as it is."""
    if not is_own(data):
        return data
    try:
        at_once = images_at_once(model, inputs, data.batch_size or 1)
    except Exception:  # the model cannot run on these inputs, of which tracing gives a better account
        return data
    return DataLoader(data.dataset, at_once)


def _data_and_examples(
    options: Options, example_inputs: Inputs | None
) -> tuple[Iterable[Batch] | None, Inputs]:
    """The same, in the dtype in which they come; `example_inputs` give a shape where nothing else does."""
    data = None
    batch = options["batch"]
    unused = [f"--{name}" for name in ("mean", "std", "resize") if options[name] is not None]
    images = next((name for name in ("data", "calib", "train") if options.get(name) is not None), None)
    if unused and images is None:
        raise SepconvertError(f"{', '.join(unused)}: for the images of --data, which is not given; pass both")
    if options["data"] is None and images is not None and not options["input_shape"]:
        found = _images(options, images)
        options = {**options, "input_shape": "x".join(map(str, sample_shape(found)))} if found else options
    if options["data"] is not None:
        data = load_data(options["data"], _preprocess(options))
        shape = parse_input_shape(options["input_shape"]) if options["input_shape"] else sample_shape(data)
        check_against_model(data, shape, None)
        images = next(iter(data))[0]
        if len(images) < batch:
            raise SepconvertError(
                f"--batch {batch}: the data begins with a batch of {len(images)}; pass a smaller --batch"
            )
        inputs: Inputs = (images[:batch],)
    elif options["input_shape"]:
        shape = parse_input_shape(options["input_shape"])
        if batch * math.prod(shape) > MAX_INPUT_ELEMENTS:
            raise SepconvertError(
                f"--batch {batch}: {batch:,} samples of {options['input_shape']} are more than "
                f"{MAX_INPUT_ELEMENTS:,} elements; pass a smaller one"
            )
        generator = torch.Generator().manual_seed(options["seed"])
        inputs = (torch.randn(batch, *shape, generator=generator),)
    elif example_inputs is not None:
        inputs = tuple(_random(value, batch, options["seed"]) for value in example_inputs)
    else:
        raise SepconvertError(
            "the input's shape is not known; pass --input-shape, e.g. --input-shape 3x224x224, or --data"
        )
    return data, inputs


def _random(value: Tensor, batch: int, seed: int) -> Tensor:
    if not value.is_floating_point() or value.ndim == 0:
        return value
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *value.shape[1:]), generator=generator).to(value)


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SepconvertError(
            f"{option} {text}: expected numbers joined by commas, e.g. 0.485,0.456,0.406"
        ) from error


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdigit() for part in parts) or len(parts) > 2:
        raise SepconvertError(f"--resize {text}: expected N or HxW in pixels, e.g. 224")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _progress(options: Options) -> Progress:
    """A bar for each loop on a terminal, else a line from time to time."""
    if options["quiet"] or sys.stderr is None:
        return silent
    return _progress_bar if sys.stderr.isatty() else _progress_lines()


def _progress_bar(items: Iterable[T], description: str, /) -> Iterable[T]:
    # Of a terminal that does not tell its size, tqdm would think that it has no room for a bar.
    bar: Iterable[T] = tqdm(items, description, file=sys.stderr, leave=False, nrows=2)
    return bar


def _progress_lines() -> Progress:
    due = time.monotonic() + _LINE_EVERY

    def progress(items: Iterable[T], description: str, /) -> Iterable[T]:
        nonlocal due
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        for number, item in enumerate(items, start=1):
            if time.monotonic() >= due:
                click.echo(f"{description}: {number}{total}", err=True)
                due = time.monotonic() + _LINE_EVERY
            yield item

    return progress


def _training_progress(options: Options) -> Callable[[Step], None]:
    """Steps, loss and time left of fine-tuning: a bar on a terminal, else a line for every tenth of it."""
    if options["quiet"] or sys.stderr is None:
        return lambda step: None
    if not sys.stderr.isatty():
        return _training_line
    bar: tqdm[Any] | None = None

    def show(step: Step) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(None, "fine-tuning", step.steps, file=sys.stderr, leave=False, nrows=2)
        bar.set_postfix(epoch=step.epoch, loss=f"{step.loss:.3f}", refresh=False)
        bar.update(step.step - bar.n)

    return show


def _training_line(step: Step) -> None:
    if step.step * 10 // step.steps > (step.step - 1) * 10 // step.steps:
        click.echo(
            f"fine-tuning: step {step.step} of {step.steps}, epoch {step.epoch}, loss {step.loss:.3f}, "
            f"{step.seconds_left:.0f} s left",
            err=True,
        )


def _show(options: Options, result: ConversionResult, out: Path) -> None:
    if options["quiet"]:
        for warning in warnings_of(result.report):
            click.echo(warning, err=True)
    written = [name for name in FILES if name not in result.report["export"]["missing"]]
    _print(options, result.report, layer_table(result.report["layers"]), "", summary(result.report), "",
           f"Written to {out}/:\n  {', '.join(written[:4])},\n  {', '.join(written[4:])}")  # fmt: skip


def _verdict(verified: Mapping[str, Any] | None) -> str:
    if verified is None:
        return (
            "Weights are the plan's; no outputs were compared, as the plan is approximate or names no file."
        )
    return (
        f"Verified: outputs differ by {verified['max_abs_diff']:.1e} (tolerance {verified['tolerance']:.1e})."
    )


def _print(options: Options, document: Mapping[str, Any], *text: str) -> None:
    if options["as_json"]:
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    elif not options["quiet"]:
        click.echo("\n".join(text))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Libraries' warnings are not the user's business; ours are errors or sentences of the report.

    What the user's own code prints goes to standard error: standard output is for our tables and JSON.
    """
    logging.getLogger("torch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
