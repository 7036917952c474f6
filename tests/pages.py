"""The pages of the documentation, the command lines on them, and what runs those."""

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
BENCHMARKS = ROOT / "benchmarks/README.md"  # which the documentation includes
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if not path.relative_to(DOCS).parts[0].startswith("_")),
]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(body) for _, info, body in found if info == language]


def blocks(page: Path) -> list[list[list[str]]]:
    """Words of every command in each shell block of a page, without comments and redirections."""
    found = []
    for block in fences(page, "sh"):
        lines = [part for line in block.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
        words = [shlex.split(line, comments=True) for line in lines]
        found.append([each[:-2] if each[-2:-1] == [">"] else each for each in words if each])
    return found


def commands(page: Path) -> list[list[str]]:
    """Those of all its blocks."""
    return list(chain.from_iterable(blocks(page)))


def inline(page: Path) -> list[str]:
    """What stands between backticks on a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(each.split()) for _, each in _CODE.findall(text)]


def exit_code(program: Callable[[], object]) -> object:
    """Of a program that runs in this process."""
    try:
        program()
    except SystemExit as end:
        return end.code or 0
    return 0


def parsed(command: click.Command, words: list[str]) -> dict[str, Any]:
    """The options and arguments of a command of click, as it reads them; it raises what it would say."""
    if isinstance(command, click.Group):
        _, command, words = command.resolve_command(click.Context(command), words)
    return command.make_context(command.name, list(words)).params


def canonical(text: str) -> str:
    """A command line as one text, however it is broken and quoted."""
    return shlex.join(shlex.split(text))
