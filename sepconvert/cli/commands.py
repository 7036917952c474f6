"""What the commands do: files → values → pipeline → files and tables."""

import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from platformdirs import user_cache_path
from torch.utils.data import DataLoader

from sepconvert.base.distributed import join, rank
from sepconvert.base.documents import writing
from sepconvert.base.environment import environment
from sepconvert.base.errors import DemandNotMetError, SepconvertError
from sepconvert.cli.conditions import Demand
from sepconvert.cli.inputs import (
    TRAINING_BATCH,
    Options,
    batch_sizes,
    example_of_file,
    load_subject,
    read_data_and_examples,
    read_data_and_inputs,
    read_images,
    runtime_of,
)
from sepconvert.cli.options import in_flags
from sepconvert.cli.progress import progress_for, quietly, training_progress
from sepconvert.files.data import Batch
from sepconvert.files.onnx.facts import read_onnx
from sepconvert.files.results import FILES, result_directory
from sepconvert.measure.comparison import Comparison
from sepconvert.measure.head_to_head import Subject
from sepconvert.measure.head_to_head import measure as measure_together
from sepconvert.measure.profiling import SCHEMA as PROFILE_SCHEMA
from sepconvert.measure.profiling import StoredProfile, anatomy, batch_size, read_profile
from sepconvert.measure.profiling import profile as run_profile
from sepconvert.network.tensors import Inputs, tensors_in
from sepconvert.pipeline.convert import ConversionResult
from sepconvert.pipeline.convert import convert as run_convert
from sepconvert.pipeline.convert import inspect as run_inspect
from sepconvert.pipeline.delivery import checkpoints
from sepconvert.pipeline.replay import apply_plan as run_apply
from sepconvert.planning.plan import read_plan
from sepconvert.report.html import render_comparison
from sepconvert.report.sentences import story, warnings_of
from sepconvert.report.tables import anatomy_text, layer_table, modes_table, structure_table, summary

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


def convert(**options: Any) -> None:
    """`sepconvert MODEL`."""
    _check_used(options)
    if options["dry_run"]:
        _dry_run(options)
        return
    join()
    main, out = rank() == 0, _out(options)
    place = _result_directory(options, out) if main else contextlib.nullcontext()
    with quietly(), place as folder:
        loaded = load_subject(options)
        data, inputs = read_data_and_inputs(options, loaded)
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
    with quietly():
        loaded = load_subject(options)
        _, inputs = read_data_and_inputs(options, loaded)
        found = run_inspect(
            loaded.model, inputs, **{k: v for k, v in _common(options).items() if k != "seed"}
        )
    _print(options, found, layer_table(found["layers"]), "", structure_table(found["layers"]))


def apply(**options: Any) -> None:
    """`sepconvert apply MODEL PLAN.json`."""
    out = _out(options)
    with quietly(), _result_directory(options, out) as folder:
        plan = read_plan(options["plan"])
        loaded = load_subject(options)
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
            progress=progress_for(options),
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
    with quietly():
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
    with quietly():
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
    loaded = {path: load_subject({**options, "model": path}) for path in paths if path not in files}
    examples = [each.example_inputs for each in loaded.values()] + [
        example_of_file(each) for each in files.values()
    ]
    example = next((each for each in examples if each is not None), None)
    data, inputs = read_data_and_examples(options, example)
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


def _profile(options: Options) -> StoredProfile:
    """Of a model or an ONNX file."""
    path, runtime = options["model"], runtime_of(options)
    if path.suffix == ".onnx":
        file = read_onnx(path)
        data, inputs = read_data_and_examples(options, example_of_file(file))
        batches = batch_sizes(options) if options["runs"] else None
        # What is timed in detail is not timed before.
        timing = options if batches is None else {**options, "runs": 0}
        found = _measured([Subject.of_file(path, file)], data, inputs, timing).profiles[0]
        if batches is not None:
            arrays = [value.numpy() for value in tensors_in(inputs)]
            detail = anatomy(
                path, arrays, batches=batches, runs=options["runs"], runtime=runtime, seed=options["seed"],
                progress=progress_for(options),
            )  # fmt: skip
            latency = detail.latency(runtime.threads, batch_size(inputs))
            found = replace(found, latency=latency, anatomy=detail)
        return StoredProfile(found, str(path), file.sha256, environment(runtime))
    loaded = load_subject(options)
    data, inputs = read_data_and_inputs(options, loaded)
    found = run_profile(
        loaded.model,
        inputs,
        data=data,
        runs=options["runs"],
        threads=options["threads"],
        graph_optimization=options["graph_optimization"],
        provider=options["provider"],
        batches=batch_sizes(options),
        seed=options["seed"],
        progress=progress_for(options),
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
        runtime=runtime_of(options),
        seed=options["seed"],
        progress=progress_for(options),
    )


def demo(**options: Any) -> None:
    """`sepconvert demo`."""
    from torch.utils.data import TensorDataset

    from sepconvert.cli.demo.images import evaluation_data, training_data
    from sepconvert.cli.demo.net import load, to_input

    out, told = options["out"] or Path("demo-sepconvert"), []
    with quietly(), _result_directory(options, out) as folder:
        scored, shown = evaluation_data(_DEMO_SCORED), training_data(_DEMO_IMAGES)
        x, y = to_input(scored.x), torch.from_numpy(scored.y)
        data = DataLoader(TensorDataset(x, y), batch_size=256)
        unlabelled = TensorDataset(to_input(shown.x), torch.full((len(shown.x),), -1))
        calib: DataLoader[Any] = DataLoader(unlabelled, TRAINING_BATCH)
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
                progress=progress_for(options),
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
        "calib": read_images(options, "calib"),
        "train": read_images(options, "train"),
        "checkpoint": checkpoint,
        "on_step": training_progress(options),
    }


def _checkpoint(options: Options, out: Path) -> Path | None:
    if not options["finetune"]:
        return None
    given: Path | None = options["checkpoint"]
    return given or out.with_name(f"{out.name}.checkpoint")


def _dry_run(options: Options) -> None:
    with quietly():
        loaded = load_subject(options)
        _, inputs = read_data_and_inputs(options, loaded)
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
        "progress": progress_for(options),
    }


def _show(options: Options, result: ConversionResult, out: Path) -> None:
    if options["quiet"]:
        for warning in warnings_of(result.report):
            click.echo(in_flags(str(warning)), err=True)
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
        click.echo(in_flags("\n".join(text)))
