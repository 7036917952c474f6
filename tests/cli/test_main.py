"""The command line as a process: exit codes, the two output streams, signals, and commands by name."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import COMMANDS, SHAPE, listing, start
from pages import parsed

from sepconvert.cli import inputs
from sepconvert.cli import main as cli


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["sepconvert", *COMMANDS])
def test_no_heavy_library_is_imported_for_help(command):
    arguments = [sys.executable, "-X", "importtime", "-m", "sepconvert", *command, "--help"]
    imports = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr  # noqa: S603
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports.splitlines()}
    assert {"click", "sepconvert"} <= names
    assert not {"torch", "numpy", "onnx", "onnxruntime", "scipy", "jinja2", "tabulate", "tqdm"} & names


def test_without_arguments_the_help_is_shown_as_an_error(run):
    outcome = run()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: sepconvert")


def test_the_help_cuts_no_description_of_a_command(run):
    text = run("--help").out.partition("Commands:")[2].partition("Examples:")[0]
    assert all(re.search(rf"^  {name} .*\w\.$", text, re.MULTILINE) for name in COMMANDS)
    assert "..." not in text


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]])
def test_the_examples_in_the_help_parse(run, arguments):
    examples = re.findall(r"^ +sepconvert (model\.pt .*)$", run(*arguments).out, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        assert parsed(cli.cli, ["convert", *example.split()])["model"] == Path("model.pt")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["sepconvert", *COMMANDS])
def test_the_help_has_a_short_flag(run, command):
    outcome = run(*command, "-h")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome == run(*command, "--help")


# Completion ----------------------------------------------------------------------------------------


def completed(run, monkeypatch, *words):
    """Return what a shell is offered for the last of the words, as kind and text."""
    for name, value in {
        "_SEPCONVERT_COMPLETE": "bash_complete",
        "COMP_WORDS": shlex.join(["sepconvert", *words]),
        "COMP_CWORD": str(len(words)),
    }.items():
        monkeypatch.setenv(name, value)
    outcome = run()
    assert (outcome.code, outcome.err) == (0, "")
    return [tuple(line.split(",", 1)) for line in outcome.out.splitlines()]


MODES = [("plain", "exact"), ("plain", "approx"), ("plain", "auto")]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["co"], [("plain", "compare"), ("plain", "convert"), ("file", "co")]),
        (["mod"], [("file", "mod")]),
        (["--mo"], [("plain", "--mode")]),
        (["--conf"], [("plain", "--confidence"), ("plain", "--config")]),
        (["net.pt", "--mode", ""], MODES),
        (["--mode", ""], MODES),
        (["convert", "net.pt", "--rank", "0", "--mode", "a"], MODES[1:]),
        (["net.pt", "--config", "no.toml", "--mode", "e"], MODES[:1]),
        (["net.pt", "--config", "ru"], [("file", "ru")]),
        (["compare", "a", "b", "--format", "m"], [("plain", "markdown")]),
        (["apply", "net.pt", "pl"], [("file", "pl")]),
        (["env", "--j"], [("plain", "--json")]),
    ],
    ids=str,
)  # fmt: skip
def test_a_shell_completes_commands_options_and_choices(run, monkeypatch, words, offered):
    assert completed(run, monkeypatch, *words) == offered


def test_a_shell_is_offered_all_commands_and_files_at_first(run, monkeypatch):
    found = completed(run, monkeypatch, "")
    assert {text for kind, text in found if kind == "plain"} == set(COMMANDS)
    assert ("file", "") in found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(run, monkeypatch, shell):
    monkeypatch.setenv("_SEPCONVERT_COMPLETE", f"{shell}_source")
    outcome = run()
    assert (outcome.code, outcome.err) == (0, "")
    assert f"_SEPCONVERT_COMPLETE={shell}_complete" in outcome.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself(here, tmp_path):
    (tmp_path / "sepconvert").write_text(f'#!/bin/sh\nexec {sys.executable} -m sepconvert "$@"\n')
    (tmp_path / "sepconvert").chmod(0o755)
    script = (
        'eval "$(_SEPCONVERT_COMPLETE=bash_source sepconvert)"\n'
        'COMP_WORDS=(sepconvert net.pt --gate ""); COMP_CWORD=3\n'
        '_sepconvert_completion sepconvert; echo "${COMPREPLY[@]}"\n'
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(  # noqa: S603
        ["bash", "--norc", "-c", script],  # noqa: S607
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.stdout == "macs latency none\n"


def test_version(run):
    assert re.fullmatch(r"sepconvert, version \d+\.\d+\.\d+\n", run("--version").out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "net.pt", *SHAPE, "--dry-run", "--json"],
        ["--mode", "exact", "--dry-run", *SHAPE, "--json", "net.pt"],
        ["--json", "--dry-run", "net.pt/", *SHAPE],
        ["--dry-run", "--json", *SHAPE, "--", "net.pt"],
    ],
)
def test_convert_is_the_default_command(here, run, arguments):
    expected = run("net.pt", *SHAPE, "--dry-run", "--json")
    assert expected.code == 0
    assert run(*arguments) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_named_like_a_command(here, run, name):
    (here / "net.pt").rename(here / name)
    assert run(f"./{name}", *SHAPE, "--dry-run").code == 0


@pytest.mark.slow
def test_an_output_that_cannot_be_written(here):
    with Path("/dev/full").open("wb") as full:
        process = start("inspect", here / "net.pt", *SHAPE, "--json", "--quiet", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert re.fullmatch(
        r"sepconvert: the output cannot be written: no space is left.*; write it elsewhere\n", err.decode()
    )


@pytest.mark.parametrize("arguments", [["--debug"], []])
def test_only_debug_shows_a_traceback(here, run, arguments, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(inputs, "load_model", broken)
    outcome = run("net.pt", *SHAPE, *arguments)
    assert outcome.code == 2
    assert ("Traceback" in outcome.err) == bool(arguments)
    assert outcome.err.endswith(
        "sepconvert: unexpected ZeroDivisionError: first; run again with --debug and report it\n"
    )
    assert not (here / "net-sepconvert").exists()


@pytest.mark.parametrize(
    ("encoding", "kernel"), [("latin-1", "3×3 8?8"), ("ascii", "3×3 8→8"), ("utf-8", "3×3 8→8")]
)
def test_the_encoding_of_the_terminal(here, run, monkeypatch, encoding, kernel):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    assert run("inspect", "net.pt", *SHAPE).code == 0
    # To a terminal that claims ASCII, click writes UTF-8, which it most likely reads.
    assert kernel in buffer.getvalue().decode(encoding if encoding == "latin-1" else "utf-8")


@pytest.mark.slow
def test_a_reader_that_leaves_early_causes_no_traceback(here):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("inspect", "net.pt", *SHAPE, "--json", "--quiet", stdout=writer)
    os.close(writer)
    assert process.communicate()[1] == b""
    assert process.returncode == 2


def test_no_standard_streams_at_all(here, run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["sepconvert", "inspect", "net.pt", *SHAPE])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(here, number):
    before = listing(here.parent)
    process = start("net.pt", *SHAPE, "--out", "new/out", "--runs", "100000", "--quiet")
    while listing(here.parent) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1)  # well into the work
    process.send_signal(number)
    process.send_signal(signal.SIGINT)  # impatience
    out, err = process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert err.strip() == b"sepconvert: interrupted"
    assert listing(here.parent) == before


def ended(program):
    """A Python program that has run to its end in its own process."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # noqa: S603


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_within_a_callback_of_fork_is_not_lost(number):
    """Python only reports what such a callback raises, and would continue."""
    program = (
        "import os, signal, time\n"
        "from sepconvert.cli import main\n"
        f"os.register_at_fork(after_in_parent=lambda: signal.raise_signal({number:d}))\n"
        "def work(**_):\n"
        "    main._commands('outputs')\n"
        "    if os.fork() == 0:\n"
        "        os._exit(0)\n"
        "    time.sleep(300)\n"
        "main.cli.main = work\n"
        "main.main()\n"
    )
    begun = time.monotonic()
    done = ended(program)
    assert (done.returncode, done.stderr) == (130, b"sepconvert: interrupted\n")
    assert time.monotonic() - begun < 300  # what sleeps is woken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_other_code_drops_is_repeated(number):
    """Compiled code may clear what Python code that it called has raised."""
    program = (
        "import os, signal, time\n"
        "from sepconvert.cli import main\n"
        "def work(**_):\n"
        "    main._commands('outputs')\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {number:d})\n"
        "        time.sleep(300)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    try:\n"
        "        time.sleep(300)\n"
        "    finally:\n"
        "        time.sleep(3 * main._AGAIN)\n"
        "        print('cleaned up', flush=True)\n"
        "main.cli.main = work\n"
        "main.main()\n"
    )
    begun = time.monotonic()
    done = ended(program)
    assert (done.returncode, done.stderr) == (130, b"sepconvert: interrupted\n")
    assert done.stdout == b"cleaned up\n"
    assert time.monotonic() - begun < 300


def test_an_interruption_within_exec_ends_with_the_same_exit_code(tmp_path):
    """Imports interrupted where Python makes a dataclass, for instance, would end `python -m` by SIGINT."""
    (tmp_path / "program.py").write_text(
        "from sepconvert.cli import main\n"
        "def work(**_):\n"
        "    exec('raise KeyboardInterrupt')\n"
        "main.cli.main = work\n"
        "main.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)  # noqa: S603
    assert (done.returncode, done.stderr) == (130, b"sepconvert: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("work", "code", "message"),
    [("raise KeyboardInterrupt", 130, b"sepconvert: interrupted\n"), ("return 0", 0, b"")],
)
def test_signals_while_a_process_shuts_down_change_nothing(number, work, code, message):
    """Python gives signals their default action at the end, after which one more would kill the process."""
    program = (
        "import os, signal\n"
        "from sepconvert.cli import main\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        f"        kill(pid, {number:d})\n"
        "signal.last = Last()\n"  # deleted with the modules, at the very end
        "def work(**_):\n"
        f"    {work}\n"
        "main.cli.main = work\n"
        "main.main()\n"
    )
    done = ended(program)
    assert (done.returncode, done.stderr) == (code, message)


def test_a_signal_while_torch_is_imported_raises_nothing(here, tmp_path):
    """An exception out of a callback of torch's would abort the process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sepconvert.cli.commands.converting':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGTERM)\n"
        "            except BaseException as error:\n"
        "                os.write(2, f'raised {error!r}'.encode())\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    places = [str(tmp_path), str(Path(cli.__file__).parents[2])]
    process = start("net.pt", *SHAPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)})
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"sepconvert: interrupted\n")
