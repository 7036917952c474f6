"""The shape of the package, read from its source: layers, sizes, docstrings, tests that mirror modules."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sepconvert"
TESTS = ROOT / "tests"

# From the bottom up. A package may import itself and those before it.
LAYERS = (
    "base", "factorize", "network", "files", "measure", "calibration", "distillation", "planning", "report",
    "pipeline", "cli",
)  # fmt: skip

ENTRIES_AT_THE_TOP, ENTRIES_OF_A_PACKAGE = 12, 10
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, LINES_OF_A_CLASS = 450, 60, 200
PARAMETERS = 8

# Names on the package `sepconvert` that are functions: a submodule of the same name would replace them.
PUBLIC_FUNCTIONS = {"apply", "compare", "convert", "finetune", "inspect", "profile"}

# Functions that take more than `PARAMETERS`: each is an entry point that users call by keyword. Others need a
# comment in or above their signature that contains the word "parameters" and says why.
WIDE = {
    "pipeline/convert.py:convert": "public API: a model, a mode, and the demands that people type",
    "distillation/training.py:finetune": "public API: a training loop's settings",
}

# Modules without a test file of their own: where they are tested instead, and why there.
TESTED_ELSEWHERE: dict[str, tuple[str, str]] = {
    "planning/conversion": ("pipeline/test_convert.py", "values that the report is made of"),
    "planning/fits/fitting": ("planning/test_workshop.py", "fits are judged where plans are carried out"),
    "report/schema/__main__": ("report/schema/test_published.py", "it is run there"),
    "planning/timing/pairs": ("pipeline/test_stages.py", "files and layers are timed where they are made"),
    "pipeline/modes/merging": ("network/test_merge.py", "pairs are merged on the models of that file"),
}

# Methods whose names a class of the user's may use for values of its own, such as `self.modules = []`.
SHADOWED = {
    "modules", "named_modules", "children", "named_children", "parameters", "named_parameters", "buffers",
    "named_buffers", "get_submodule", "set_submodule", "get_parameter", "get_buffer", "add_module",
    "state_dict", "load_state_dict",
}  # fmt: skip

# What they are called on: the class, a result of `unshadowed`, and what is no module.
CALLED_ON = re.compile(r"nn\.Module|unshadowed\(.*\)|plain|self\._optimizer|(self\.accelerator\.)?scaler")

FRAGMENT = re.compile(r"(Of|By|With|That|As|In|To|For|From|On|At|What|Where|Which|How|And)\b")

SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions() -> Iterator[tuple[str, Definition]]:
    """Every function and class, with the file that it is in."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Definition):
                yield name, node


def place(name: str, node: Definition) -> str:
    return f"{name}:{node.lineno} {node.name}"


def listed(numbers: dict[str, int]) -> str:
    return "\n".join(f"{number} {where}" for where, number in numbers.items())


def module_of(name: str) -> str:
    """The dotted name of a file: `files/onnx/__init__.py` is `sepconvert.files.onnx`."""
    parts = ["sepconvert", *name.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(name) for name in TREES}


def imported(name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of ours that a file imports, within functions too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (
                    module_of(name) if name.endswith("__init__.py") else module_of(name).rpartition(".")[0]
                )
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            # `from a import b`: b may be a module, or a name of a.
            found = [
                f"{base}.{each.name}" if f"{base}.{each.name}" in MODULES else base for each in node.names
            ]
        else:
            continue
        yield from ((node.lineno, each) for each in found if each.split(".")[0] == "sepconvert")


def layer_of(module: str) -> str:
    """The package of a dotted name; empty for `sepconvert` itself."""
    return module.split(".")[1] if "." in module else ""


def in_packages() -> list[str]:
    """All files but those at the top."""
    return [name for name in TREES if "/" in name]


def test_every_package_has_its_place():
    assert {name.split("/")[0] for name in in_packages()} == set(LAYERS)
    assert {name for name in TREES if "/" not in name} == {"__init__.py", "__main__.py"}


def test_imports_run_downwards():
    upwards = []
    for name in in_packages():
        here = LAYERS.index(layer_of(module_of(name)))
        for line, module in imported(name):
            # The package itself is above all; the command line alone asks it for its version.
            there = LAYERS.index(layer_of(module)) if layer_of(module) else len(LAYERS) - 1
            if there > here:
                upwards.append(f"{name}:{line} imports {module}")
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module_of(name): {module for _, module in imported(name)} - {"sepconvert", module_of(name)}
        for name in in_packages()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


def entries(folder: Path) -> list[str]:
    """Modules and packages in a folder."""
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    return modules + [path.name for path in folder.iterdir() if (path / "__init__.py").exists()]


def test_few_entries_at_the_top():
    assert len(entries(PACKAGE)) <= ENTRIES_AT_THE_TOP, entries(PACKAGE)


def test_few_entries_in_every_package():
    folders = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    crowded = {str(each.relative_to(PACKAGE)): len(entries(each)) for each in folders}
    assert not {name: count for name, count in crowded.items() if count > ENTRIES_OF_A_PACKAGE}


def test_no_entry_bears_the_name_of_a_public_function():
    """Importing `sepconvert.convert`, a module, would set the attribute `convert` of the package to it."""
    replaced = {Path(entry).stem for entry in entries(PACKAGE)} & PUBLIC_FUNCTIONS
    assert not replaced, replaced


def test_the_public_functions_are_those():
    (public,) = (
        {ast.literal_eval(key) for key in node.value.keys if key is not None}
        for node in TREES["__init__.py"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC"
        if isinstance(node.value, ast.Dict)
    )
    assert {name for name in public if name[0].islower()} == PUBLIC_FUNCTIONS


def test_no_long_file():
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    long = {name: length for name, length in lengths.items() if length > LINES_OF_A_FILE}
    assert not long, listed(long)


def body_lines(node: Definition) -> int:
    """Lines of a body, its docstring not counted."""
    documented = ast.get_docstring(node) is not None and len(node.body) > 1
    return (node.end_lineno or 0) - node.body[documented].lineno + 1


def test_no_long_function_and_no_long_class():
    long = {}
    for name, node in definitions():
        limit = LINES_OF_A_CLASS if isinstance(node, ast.ClassDef) else LINES_OF_A_FUNCTION
        if body_lines(node) > limit:
            long[place(name, node)] = body_lines(node)
    assert not long, listed(long)


def explained(name: str, node: Definition) -> bool:
    """Whether a comment in or above the signature says why there are so many parameters."""
    lines = SOURCES[name].splitlines()[node.lineno - 2 : node.body[0].lineno - 1]
    return any("parameters" in line.partition("#")[2] for line in lines)


def test_no_function_of_many_parameters():
    wide, known = {}, set()
    for name, node in definitions():
        if isinstance(node, ast.ClassDef):
            continue
        arguments = node.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        if count <= PARAMETERS:
            continue
        known.add(f"{name}:{node.name}")
        if f"{name}:{node.name}" not in WIDE and not explained(name, node):
            wide[place(name, node)] = count
    assert not wide, listed(wide)
    assert set(WIDE) <= known, "listed as wide, but not there, or not wide"


def test_no_docstring_begins_with_a_fragment():
    """In a hover it stands without the name: 'Return the kernel of …' says what 'Of a layer …' does not."""
    found = [
        f"{place(name, node)}: {(ast.get_docstring(node) or '').splitlines()[0]}"
        for name, node in definitions()
        if FRAGMENT.match(ast.get_docstring(node) or "")
    ]
    assert not found, "\n".join(found)


def test_methods_of_modules_are_called_on_what_is_unshadowed():
    """But for modules of our own, in the demo and in `network/layers.py`."""
    found = []
    for name, tree in TREES.items():
        if name.startswith("cli/demo/") or name == "network/layers.py":
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            method, receiver = node.func.attr, ast.unparse(node.func.value)
            is_hook = re.fullmatch(r"register_\w*hook|register_buffer|register_parameter", method)
            if (method in SHADOWED or is_hook) and not CALLED_ON.fullmatch(receiver):
                found.append(f"{name}:{node.lineno} {receiver}.{method}")
    assert not found, "\n".join(found)


def modules_to_test() -> list[str]:
    return [name.removesuffix(".py") for name in in_packages() if not name.endswith("__init__.py")]


def mirror(module: str) -> Path:
    """`files/onnx/passes` is tested by `tests/files/onnx/test_passes.py`."""
    return TESTS / module.rpartition("/")[0] / f"test_{module.rpartition('/')[2]}.py"


def test_every_module_has_its_tests():
    missing = [name for name in modules_to_test() if not mirror(name).exists()]
    untested = sorted(set(missing) - set(TESTED_ELSEWHERE))
    assert not untested, "\n".join(untested)
    assert sorted(set(TESTED_ELSEWHERE) - set(missing)) == [], (
        "listed, but not there, or tested where it should be"
    )
    assert not [where for where, _ in TESTED_ELSEWHERE.values() if not (TESTS / where).exists()]


def test_every_test_file_belongs_to_a_module():
    """But for those of the whole project; other files of a folder are helpers."""
    folders = [TESTS / layer for layer in LAYERS]
    found = {path for folder in folders for path in folder.rglob("test_*.py")}
    strangers = found - {mirror(name) for name in modules_to_test()}
    assert not strangers, "\n".join(sorted(map(str, strangers)))
