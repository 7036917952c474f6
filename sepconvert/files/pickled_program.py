"""Pickles whose cost is out of all proportion to their size, found before they are read.

torch's restricted unpickler runs no code, but a few bytes suffice to have it allocate gigabytes
(`bytearray(9_000_000_000)`), or walk for ever: a list of one list twice, which is of one twice, 40 deep.
"""

import pickletools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

import torch

from sepconvert.base.errors import SepconvertError

__all__ = ["check_length", "check_pickle", "pickle_of_archive"]


_MOST_INSTRUCTIONS = 2 * 10**6  # some seconds


_MOST_VALUES = 10**6  # in a container, those in containers within it each time that they are met


_ALLOCATING = ("Tensor", "Storage", "bytearray")


_CONTAINERS = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")


@dataclass(eq=False)
class _Value:
    """On the unpickler's stack: a global by its name, a text, what a function made, or a container."""

    name: str = ""
    text: str = ""
    made_by: str = ""
    held: "list[_Value]" = field(default_factory=list)
    is_tuple: bool = False


_PLAIN = _Value()  # a number, None, a long text


def pickle_of_archive(file: BinaryIO, label: str) -> bytes:
    """The one in an archive that torch.save wrote, no longer than `check_length` allows. Moves in `file`."""
    file.seek(0)
    found: bytes = torch._C.PyTorchFileReader(file).get_record("data.pkl")
    check_length(found, label)
    return found


def check_length(pickled: bytes | BinaryIO, label: str) -> None:
    """Raise `SepconvertError`, which begins with `label`, beyond two million instructions.

    Of a file the next pickle is read, to its end.
    """
    for count, _ in enumerate(pickletools.genops(pickled)):
        if count == _MOST_INSTRUCTIONS:
            raise SepconvertError(
                f"{label}: refused, its pickle has more than {_MOST_INSTRUCTIONS:,} instructions, as no "
                "saved model has; save the state_dict anew"
            )


def check_pickle(pickled: bytes, label: str) -> None:
    """Follow what an unpickler would have on its stack, without making any of it.

    Raises:
        SepconvertError: it makes tensors, storages or bytes of a size that it names, itself or through other
            functions, or nests containers whose walk takes a million steps more than it has bytes. Begins
            with `label`.
        Exception: any, for what is no pickle.
    """
    try:
        _follow(pickled)
    except _RefusedError as reason:
        raise SepconvertError(
            f"{label}: refused, its pickle {reason}, as no saved model does; save the state_dict anew"
        ) from None


class _RefusedError(Exception):
    pass


def _follow(pickled: bytes) -> None:
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[object, _Value] = {}
    containers: list[_Value] = []
    for operation, argument, _ in pickletools.genops(pickled):
        name, before, number = operation.name, operation.stack_before, argument or 0
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[number] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[number])
        elif name == "MARK":
            marks.append(len(stack))
        elif not before and name not in _CONTAINERS:  # constants, and what changes nothing
            found = _PLAIN
            if name == "GLOBAL":
                found = _Value(str(argument).replace(" ", "."))
            elif isinstance(argument, str) and len(argument) < 10:
                found = _Value(text=argument)
            stack += [found] * len(operation.stack_after)
        else:
            if pickletools.markobject in before:
                start = marks.pop() - before.index(pickletools.markobject)
            else:
                start = len(stack) - len(before)
            if start < 0:
                raise ValueError("takes more from the stack than there is")
            taken = stack[start:]
            del stack[start:]
            if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
                found, *held = taken
                if found is _PLAIN:
                    raise ValueError("adds to what is no container")
                found.held += held
                containers.append(found)
            elif name in _CONTAINERS:
                found = _Value(held=taken, is_tuple="TUPLE" in name)
                containers.append(found)
            elif name in ("REDUCE", "NEWOBJ"):
                function, arguments = taken
                _check_call(function, arguments)
                if function.name == "sepconvert.files.pickles._module_class":  # hands on the second of four
                    stack.append(arguments.held[1])
                    continue
                found = _Value(made_by=function.name, held=[arguments])  # a container, too, as torch.Size is
                containers.append(found)
            elif name == "BUILD":
                found, state = taken
                if found.made_by == "functools.partial":
                    _check_call(_Value("functools.partial"), state)
            else:
                found = _PLAIN
            stack += [found] * len(operation.stack_after)
    _check_walks(containers, _MOST_VALUES + len(pickled))


def _check_call(function: _Value, arguments: _Value) -> None:
    """What is called must have a name, and nothing may be hidden in what it is called with."""
    name, given = function.name, arguments.held
    if not name or not arguments.is_tuple:
        raise _RefusedError(f"calls {name or 'what it made'}")
    first = given[0] if given else _PLAIN
    if name.endswith("bytearray"):  # of bytes that the file holds
        allowed = not given or first.made_by == "_codecs.encode"
    elif name.endswith(_ALLOCATING):
        allowed = not given
    elif name == "_codecs.encode":
        allowed = len(given) == 2 and given[1].text == "latin1"  # others take the square of a text's length
    elif name == "torch._tensor._rebuild_from_type_v2":
        allowed = first.name.startswith("torch._utils._rebuild_")
    elif name == "functools.partial":
        allowed = bool(first.name) and not first.name.endswith((*_ALLOCATING, "encode", "_v2", "partial"))
    else:
        allowed = True
    if not allowed:
        raise _RefusedError(f"calls {name} with what it cannot check")


def _check_walks(containers: Iterable[_Value], most: int) -> None:
    """Count, without recursion, what a walk through each container would meet."""
    weights: dict[_Value, int] = {}
    begun: set[_Value] = set()
    for root in containers:
        pending = [root]
        while pending:
            value = pending[-1]
            waiting = [] if value in weights else [e for e in value.held if e.held and e not in weights]
            if waiting and value not in begun:
                begun.add(value)
                pending += waiting
                continue
            pending.pop()
            # What is still waited for when all above it is done holds this container itself.
            weight = most + 1 if waiting else 1 + sum(weights.get(each, 1) for each in value.held)
            weights.setdefault(value, weight)
            if weight > most:
                raise _RefusedError("nests containers without end")
