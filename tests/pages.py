"""The pages of the documentation, and helpers to find and parse the command lines on them."""

import re
import shlex
import textwrap
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks/README.md"  # included by the documentation
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if not path.relative_to(DOCS).parts[0].startswith("_")),
]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(body) for _, info, body in found if info == language]


def blocks(page: Path) -> list[list[list[str]]]:
    """Return the words of every command in each shell block of a page, without comments and redirections."""
    found = []
    for block in fences(page, "sh"):
        lines = [part for line in block.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
        words = [shlex.split(line, comments=True) for line in lines]
        found.append([each[:-2] if each[-2:-1] == [">"] else each for each in words if each])
    return found


def commands(page: Path) -> list[list[str]]:
    """Return the commands of all shell blocks of a page."""
    return list(chain.from_iterable(blocks(page)))


def inline(page: Path) -> list[str]:
    """Return the inline code of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(each.split()) for _, each in _CODE.findall(text)]


def exit_code(program: Callable[[], object]) -> object:
    """Run a program in this process and return its exit code."""
    try:
        program()
    except SystemExit as end:
        return end.code or 0
    return 0


def parsed(command: click.Command, words: list[str]) -> dict[str, Any]:
    """Return the options and arguments of a click command as it parses them, or raise its error."""
    if isinstance(command, click.Group):
        _, command, words = command.resolve_command(click.Context(command), words)
    return command.make_context(command.name, list(words)).params


def canonical(text: str) -> str:
    """Return a command line in one form, however it is broken and quoted."""
    return shlex.join(shlex.split(text))
