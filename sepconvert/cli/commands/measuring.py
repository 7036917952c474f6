"""Commands that measure: `profile` and `compare`."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from torch import nn

from sepconvert.base.documents import writing
from sepconvert.base.environment import environment
from sepconvert.base.errors import DemandNotMetError, SepconvertError
from sepconvert.base.notes import Note, info, warning
from sepconvert.base.options.values import Task
from sepconvert.cli.commands.history import check_judged, entry_of, update
from sepconvert.cli.conditions import QUANTITIES, Demand
from sepconvert.cli.inputs import (
    example_of_file,
    load_subject,
    read_data_and_examples,
    read_data_and_inputs,
    suited,
    timing_of,
    with_layout,
    with_normalisation,
)
from sepconvert.cli.options import Options, value_of
from sepconvert.cli.outputs import show, show_page
from sepconvert.cli.progress import Display, display_for, quietly
from sepconvert.files.data import Batch, changed, has_labels
from sepconvert.files.onnx.facts import read_onnx
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.measure.comparison import Comparison
from sepconvert.measure.execution.trace import trace_of
from sepconvert.measure.head_to_head import Subject
from sepconvert.measure.head_to_head import measure as measure_together
from sepconvert.measure.metrics.evaluation import TOP1, pair_of
from sepconvert.measure.metrics.own import scoring_of
from sepconvert.measure.profiling import SCHEMA as PROFILE_SCHEMA
from sepconvert.measure.profiling import Profile, StoredProfile, anatomy, batch_size, read_profile
from sepconvert.measure.profiling import profile as run_profile
from sepconvert.network.tensors import Inputs, arguments, tensors_in
from sepconvert.report.baseline import ModelChanges, changes_since, read_baseline
from sepconvert.report.text import markdown
from sepconvert.report.text.history import changes_text, summary
from sepconvert.report.text.numbers import fold
from sepconvert.report.text.risks import classifier_doubts
from sepconvert.report.text.sentences import machine
from sepconvert.report.text.tables import anatomy_text


def profile(**options: Any) -> None:
    """Run `sepconvert profile MODEL`."""
    out: Path | None = options["out"]
    if out is not None and out.exists() and not _is_profile(out):  # reported before anything is measured
        raise SepconvertError(f"{out}: exists and is no profile of this version; pass another --out")
    display = display_for(options)
    with quietly(), display.shown():
        found = _profile(options, display)
    document = {
        "schema": PROFILE_SCHEMA,
        "model": {"path": found.model, "sha256": found.sha256},
        "environment": found.environment,
        **found.profile.to_json(),
    }
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    details = [anatomy_text(document["anatomy"])] if "anatomy" in document else []
    if found.profile.latency is not None:
        details += [fold(str(note)) for note in machine(document["environment"])]
    details += [fold(str(note)) for note in _doubts(found.profile)]
    show(options, document, f"{found.model}: {found.profile.sentence}", "", str(Comparison((found.profile,))),
         *("\n" + detail for detail in details))  # fmt: skip


def _doubts(profile: Profile) -> list[Note]:
    """Return warnings that the accuracy of a model may mean nothing, as data and model do not fit."""
    if profile.accuracy is None or profile.labels is None:
        return []
    return classifier_doubts(profile.accuracy.to_dict(), asdict(profile.labels))


def _is_profile(path: Path) -> bool:
    try:
        read_profile(path)
    except SepconvertError:
        return False
    return True


def compare(**options: Any) -> None:
    """Run `sepconvert compare A B …`."""
    demands = [Demand.parse(text) for text in options["fail_if"]]
    path: Path | None = options["baseline"]
    history = None if path is None else read_baseline(path)
    stored = any(path.suffix == ".json" for path in options["models"])
    unit = (scoring_of(value_of(Task, options)).metric or TOP1).unit
    for demand in demands:
        demand.require(
            together=not stored,
            timed=options["runs"] > 0,
            data=options["data"] is not None,
            labels=options["data"] is not None and _may_have_labels(options),
            unit=unit,
        )
        demand.require_a_base(models=len(options["models"]), since=history is not None)
    display = display_for(options)
    with quietly(), display.shown():
        found, notes, hashes = _stored(options, display) if stored else _together(options, display)
    notes += _doubts(found.profiles[0])
    document, run, changes = found.to_json(), None, tuple[ModelChanges, ...]()
    if history is not None:
        run = entry_of(options, found, hashes)
        changes = changes_since(history, run) if history.entries else ()
        document["baseline"] = {"path": str(path), "models": [each.to_json() for each in changes]}
    since = [demand for demand in demands if history is not None and demand.metric in QUANTITIES]
    checks = {
        demand.text: demand.failures_since(changes) if demand in since else demand.failures(found)
        for demand in demands
    }
    _show(options, found, notes, document, checks)
    if failures := [failure for messages in checks.values() for failure in messages]:
        raise DemandNotMetError(f"--fail-if: {'; '.join(failures)}")
    check_judged(since, changes, updated=options["update_baseline"])
    if path is not None and history is not None and run is not None and options["update_baseline"]:
        update(path, history, run, quiet=options["quiet"])


def _show(
    options: Options,
    found: Comparison,
    notes: Sequence[Note],
    document: Mapping[str, Any],
    checks: Mapping[str, Sequence[str]],
) -> None:
    """Print a comparison in its style, and what changed since the baseline, beside pages and CSV."""
    style = options["style"]
    changes = changes_text(document["baseline"]["models"]) if "baseline" in document else ""
    if style in ("table", "json") or options["brief"]:
        since = ["", f"Since the baseline {options['baseline']}:", changes] if changes else []
        wanted = {**options, "as_json": options["as_json"] or style == "json"}
        short = summary(document["baseline"]["models"]) if changes else ""
        first = f"{found.verdict} {short}".rstrip()
        show(
            wanted, document, first, "", found.text("table"), "", *(fold(str(each)) for each in notes), *since
        )
        return
    timed = options["runs"] > 0 and bool(found.deltas)
    where = environment(timing_of(options).runtime) if timed else None
    if style == "html":
        from sepconvert.report.html import render_comparison  # which imports matplotlib, for plots

        text = render_comparison(found, notes, where)
    elif style == "markdown":
        text = markdown.comparison(document, where, checks)
    else:
        text = found.text("csv")
    show_page(options, document, text)
    if changes and style in ("csv", "html") and not options["quiet"]:
        click.echo(changes, err=True)


def _may_have_labels(options: Options) -> bool:
    """Return whether data have labels, or come from a callable, which alone knows."""
    spec = options["data"]
    return options["targets"] is not None or has_labels(spec) or not Path(spec).exists()


_Found = tuple[Comparison, list[Note], list[str | None]]
"""A comparison, how it was measured, and the SHA-256 of each model."""


def _stored(options: Options, display: Display) -> _Found:
    """Return stored profiles beside models that are profiled now, one after the other."""
    found = [
        read_profile(path) if path.suffix == ".json" else _profile({**options, "model": path}, display)
        for path in options["models"]
    ]
    notes = [info("Measured separately: differences in latency are not tested for significance.")]
    for path, each in zip(options["models"][1:], found[1:], strict=True):
        if differences := found[0].differences(each.environment):
            other = f"{path} was measured in another environment than {options['models'][0]}"
            notes.append(warning(f"{other}: {', '.join(differences)}."))
        if each.model == found[0].model and each.sha256 != found[0].sha256:
            text = f"{path} was made from a different file named {each.model} (the SHA-256 differs)."
            notes.append(warning(text))
    names = tuple(map(str, options["models"]))
    comparison = Comparison(tuple(each.profile for each in found), names)
    return comparison, notes, [each.sha256 for each in found]


def _together(options: Options, display: Display) -> _Found:
    """Return models and ONNX files measured in turns in this process."""
    paths = options["models"]
    files = {path: read_onnx(path) for path in paths if path.suffix == ".onnx"}
    loaded = {path: load_subject({**options, "model": path}) for path in paths if path not in files}
    for file in files.values():
        options = with_layout(options, file.shapes)
    options = with_normalisation(options, loaded.values())
    examples = [each.example_inputs for each in loaded.values()] + [
        example_of_file(each) for each in files.values()
    ]
    example = next((each for each in examples if each is not None), None)
    subject = next((each.model for each in loaded.values()), None) or next(iter(files.values()))
    data, inputs = read_data_and_examples(options, example, subject, labelled=False)
    if data is not None and isinstance(subject, nn.Module):
        data = changed(data, partial(_by_position, subject))
    with tempfile.TemporaryDirectory() as folder:
        subjects = [
            Subject.of_file(path, files[path])
            if path in files
            else Subject.of_model(str(path), loaded[path].model, inputs, Path(folder) / f"{index}.onnx")
            for index, path in enumerate(paths)
        ]
        comparison = _measured(subjects, data, inputs, options, display)
        _trace(options, {subject.name: subject.path for subject in subjects}, inputs)
    seen = "of the data" if data is not None else "of the timed batch"
    rounds = (
        f"{options['runs']} interleaved rounds, batch {options['batch']}. "
        "Medians with 95 % intervals; the noise is that of the base against itself."
        if options["runs"]
        else "not timed (--runs 0)."
    )
    notes = [
        info(f"Measured together: {rounds}"),
        info(f"Differences are those {seen}, output by output."),
    ]
    if options["runs"]:
        notes += machine(environment(timing_of(options).runtime))
    hashes: list[str | None] = [
        files[path].sha256 if path in files else loaded[path].sha256 for path in paths
    ]
    return comparison, notes, hashes


def _by_position(model: nn.Module, batch: object) -> Batch:
    """Return a batch with its inputs by position: the names of arguments are not those of ONNX files."""
    x, y = pair_of(batch)
    given = arguments(model, x)
    return given[0] if len(given) == 1 else given, y


def _profile(options: Options, display: Display) -> StoredProfile:
    """Return the profile of a model or of an ONNX file."""
    path, runtime = options["model"], timing_of(options).runtime
    if path.suffix == ".onnx":
        file = read_onnx(path)
        options = with_layout(options, file.shapes)
        data, inputs = read_data_and_examples(options, example_of_file(file), file)
        batches = options.get("batches") if options["runs"] else None
        # The detailed timing below includes the plain one.
        timing = options if batches is None else {**options, "runs": 0}
        found = _measured([Subject.of_file(path, file)], data, inputs, timing, display).profiles[0]
        if batches is not None:
            arrays = [value.numpy() for value in tensors_in(inputs)]
            detail = anatomy(
                path, arrays, batches=batches, runs=options["runs"], runtime=runtime, seed=options["seed"],
                progress=display,
            )  # fmt: skip
            latency = detail.latency(runtime.threads, batch_size(inputs))
            found = replace(found, latency=latency, anatomy=detail)
        _trace(options, {str(path): path}, inputs)
        return StoredProfile(found, str(path), file.sha256, environment(runtime))
    loaded = load_subject(options)
    options = suited(options, loaded)
    data, inputs = read_data_and_inputs(options, loaded)
    found = run_profile(
        loaded.model,
        inputs,
        data=data,
        metric=value_of(Task, options),
        timing=timing_of(options),
        batches=options.get("batches"),
        seed=options["seed"],
        progress=display,
    )
    if options["trace"] is not None:
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "model.onnx"
            write_onnx(loaded.model, inputs, exported)
            _trace(options, {str(loaded.path): exported}, inputs)
    return StoredProfile(found, str(loaded.path), loaded.sha256, environment(runtime))


def _trace(options: Options, files: Mapping[str, Path], inputs: Inputs) -> None:
    """Write a trace of ONNX files, by the names of their models, if --trace asks for it."""
    path: Path | None = options["trace"]
    if path is None:
        return
    arrays = [value.numpy() for value in tensors_in(inputs)]
    document = trace_of(files.items(), arrays, timing_of(options).runtime)
    with writing(path, "trace"):
        path.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")


def _measured(
    subjects: Sequence[Subject],
    data: Iterable[Batch] | None,
    inputs: Inputs,
    options: Options,
    display: Display,
) -> Comparison:
    return measure_together(
        subjects,
        [value.numpy() for value in tensors_in(inputs)],
        data=data,
        scoring=scoring_of(value_of(Task, options)),
        runs=options["runs"],
        runtime=timing_of(options).runtime,
        seed=options["seed"],
        progress=display,
    )
