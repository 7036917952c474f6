"""Commands that convert: `convert`, `inspect` and `apply`."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sepconvert.base.distributed import join, rank
from sepconvert.base.documents import writing
from sepconvert.base.environment import keep_freed_memory
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.exporting import Export
from sepconvert.base.options.values import (
    Budget,
    Calibration,
    Finetuning,
    Gate,
    Int8,
    Origin,
    Selection,
    Task,
)
from sepconvert.base.progress import Stage, stage, stage_clock
from sepconvert.cli.config import run_file
from sepconvert.cli.inputs import load_subject, read_data_and_inputs, read_images, suited, timing_of
from sepconvert.cli.options import Options, in_flags, value_of
from sepconvert.cli.outputs import (
    checkpoint_of,
    command_line,
    data_of,
    out_of,
    result_directory_of,
    show,
    show_page,
)
from sepconvert.cli.preflight import job_of
from sepconvert.cli.progress import Display, display_for, quietly
from sepconvert.files.results import FILES, INT8_FILES, RUN_FILE
from sepconvert.pipeline.convert import convert as run_convert
from sepconvert.pipeline.convert import inspect as run_inspect
from sepconvert.pipeline.modes.delivery import checkpoints
from sepconvert.pipeline.outlook import outlook as run_outlook
from sepconvert.pipeline.replay import apply_plan as run_apply
from sepconvert.pipeline.results import ConversionResult, Inspection
from sepconvert.planning.plan import read_plan
from sepconvert.report.text import markdown
from sepconvert.report.text.inspection import outlook_table, outlook_verdict
from sepconvert.report.text.sentences import sentences, warnings_of
from sepconvert.report.text.tables import details, layer_table


def convert(**options: Any) -> None:
    """Run `sepconvert MODEL`."""
    if options["dry_run"]:
        _dry_run(options)
        return
    join()
    main, out = rank() == 0, out_of(options)
    place = result_directory_of(options, out) if main else contextlib.nullcontext()
    keep_freed_memory()
    display = display_for(options)
    with quietly(), display.shown(), place as folder, stage_clock() as clock:
        clock.count_start()
        with stage(Stage.LOAD):
            loaded = load_subject(options)
            options = dict(suited(options, loaded))
            finetuning = _finetuning(options, display)
            data, inputs = read_data_and_inputs(options, loaded)
            calib = read_images(options, "calib")
        result = run_convert(
            loaded.model,
            inputs,
            options["mode"],
            data=data,
            calib=calib,
            metric=value_of(Task, options),
            **dataclasses.asdict(value_of(Budget, options)),
            nearest=options["nearest"],
            gate=options["gate"],
            tol=options["tol"],
            selection=value_of(Selection, options),
            timing=timing_of(options),
            calibration=value_of(Calibration, options),
            int8=value_of(Int8, options),
            finetune=finetuning,
            dynamic_batch=options["dynamic_batch"],
            export=value_of(Export, options),
            seed=options["seed"],
            origin=Origin(str(loaded.path), loaded.sha256, command_line(), loaded.weights, data_of(options)),
            out=folder,
            progress=display,
        )
        if folder is not None:
            with writing(folder / RUN_FILE):
                (folder / RUN_FILE).write_text(run_file(click.get_current_context()), encoding="utf-8")
    if main:
        if finetuning.checkpoint is not None:
            training = (result.report["approximation"] or {}).get("finetune")
            # Only files that this run has read or written.
            used = 0 if training is None else max(1, len(training["attempts"]))
            for path in checkpoints(finetuning.checkpoint)[:used]:
                path.unlink(missing_ok=True)
        _show(options, result, out)


def inspect(**options: Any) -> None:
    """Run `sepconvert inspect MODEL`."""
    found = _inspected(options, "macs")
    show(options, found.to_json(), found.verdict, "", found.table(all=options["everything"]))


def _inspected(options: Options, gate: Gate) -> Inspection:
    """Return what `sepconvert.inspect` finds in the model that the options name."""
    display = display_for(options)
    with quietly(), display.shown():
        loaded = load_subject(options)
        options = suited(options, loaded)
        _, inputs = read_data_and_inputs(options, loaded)
        return run_inspect(
            loaded.model,
            inputs,
            gate=gate,
            tol=options["tol"],
            selection=value_of(Selection, options),
            progress=display,
        )


def apply(**options: Any) -> None:
    """Run `sepconvert apply MODEL PLAN.json`."""
    out = out_of(options)
    display = display_for(options)
    with quietly(), display.shown(), result_directory_of(options, out) as folder:
        plan = read_plan(options["plan"])
        loaded = load_subject(options)
        if plan.model_sha256 not in (None, loaded.sha256):
            raise SepconvertError(
                f"{loaded.path}: is not the model that the plan was made from (SHA-256 "
                f"{loaded.sha256[:12]}…, expected {plan.model_sha256[:12]}…), and would get the plan's "
                "weights; pass that model, or call sepconvert.apply in Python, which takes any of the "
                "architecture"
            )
        verified = run_apply(
            loaded.model,
            plan,
            options["plan"].parent / "converted.safetensors",
            folder,
            model_sha256=loaded.sha256,
            dynamic_batch=options["dynamic_batch"],
            export=value_of(Export, options),
            progress=display,
        )
    show(options, {"out": str(out), "converted": len(plan.converted), "verification": verified},
           f"{len(plan.converted)} convolutions replaced as planned; written to {out}/",
           _verdict(verified))  # fmt: skip


def _finetuning(options: Options, display: Display) -> Finetuning:
    """Return the settings of fine-tuning, with the images to train on and the checkpoint."""
    if not options["finetune"]:
        return Finetuning()
    checkpoint = checkpoint_of(options)
    if checkpoint.exists() and not options["quiet"]:
        click.echo(f"continuing from {checkpoint}", err=True)
    return value_of(
        Finetuning,
        options,
        train=read_images(options, "train"),
        checkpoint=checkpoint,
        on_step=display.train,
    )


def _dry_run(options: Options) -> None:
    """Show what a conversion would convert or try, and write nothing."""
    if options["mode"] != "exact":
        _outlook(options)
        return
    found = _inspected(options, options["gate"] or "macs")
    show(options, found.to_json(), found.verdict, "", found.table(), "", "Dry run: nothing was written.")


def _outlook(options: Options) -> None:
    display = display_for(options)
    with quietly(), display.shown():
        loaded = load_subject(options)
        options = dict(suited(options, loaded))
        data, inputs = read_data_and_inputs(options, loaded)
        calib = read_images(options, "train" if options["calib"] is None else "calib")
        expected = run_outlook(loaded.model, inputs, data, calib, job_of(options)).to_json()
    show(options, expected, outlook_verdict(expected), "", outlook_table(expected), "",
         "Dry run: nothing was written.")  # fmt: skip


def _show(options: Options, result: ConversionResult, out: Path) -> None:
    if options["quiet"]:
        for warning in warnings_of(result.report):
            click.echo(in_flags(str(warning)), err=True)
    if options["style"] == "markdown":
        show_page(options, result.report, markdown.conversion(result.report))
        return
    names = (*FILES, *INT8_FILES) if "forms" in result.report else FILES
    written = [name for name in names if name not in result.report["export"]["missing"]]
    verdict, *_ = sentences(result.report)
    show(options, result.report, str(verdict), details(result.report), "",
         layer_table(result.report["layers"]), "",
         f"Written to {out}/:\n  {', '.join(written[:4])},\n  {', '.join(written[4:])}")  # fmt: skip


def _verdict(verified: Mapping[str, Any] | None) -> str:
    if verified is None:
        return (
            "The weights are the plan's; outputs were not compared, as the plan is approximate or names no "
            "file."
        )
    return (
        f"Verified: outputs differ by {verified['max_abs_diff']:.1e} (tolerance {verified['tolerance']:.1e})."
    )
