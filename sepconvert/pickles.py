"""Pickles whose cost is out of all proportion to their size, found before they are read.

torch's restricted unpickler runs no code, but a few bytes suffice to have it allocate gigabytes
(`bytearray(9_000_000_000)`), or hash for ever: a tuple of one tuple twice, which is of one twice, 40 deep.
"""

import io
import pickletools
from dataclasses import dataclass
from typing import BinaryIO

import torch

from sepconvert.errors import SepconvertError

__all__ = ["check_archive", "check_pickle"]

_MOST = 10**6
_ALLOCATING = ("Tensor", "Storage", "bytearray")  # when called with a size, as no saved model calls them


@dataclass(frozen=True)
class _Value:
    """On the unpickler's stack: a global by its name, a tuple by what it holds, or anything else."""

    name: str = ""
    items: "tuple[_Value, ...] | None" = None
    weight: int = 1  # values that a walk through nested tuples comes by


def check_archive(file: BinaryIO, label: str) -> None:
    """`check_pickle` for the one in an archive of torch.save. Leaves `file` where it happens to be."""
    file.seek(0)
    check_pickle(torch._C.PyTorchFileReader(file).get_record("data.pkl"), label)


def check_pickle(pickled: bytes, label: str) -> None:
    """Follow what an unpickler would have on its stack, without making any of it.

    Raises:
        SepconvertError: it makes a tensor, a storage or an array of bytes of a size that it names, or tuples
            that take a million steps more to walk than their own length explains. Begins with `label`.
        Exception: any, for what is no pickle.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[object, _Value] = {}

    def refuse(what: str) -> None:
        raise SepconvertError(
            f"{label}: refused, its pickle {what}, as no saved model does; save the state_dict anew"
        )

    for operation, argument, _ in pickletools.genops(io.BytesIO(pickled)):
        name, before, number = operation.name, operation.stack_before, argument or 0
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[number] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[number])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            if pickletools.markobject in before:
                start = marks.pop() - before.index(pickletools.markobject)
            else:
                start = len(stack) - len(before)
            if start < 0:
                raise ValueError("takes more from the stack than there is")
            taken = tuple(stack[start:])
            del stack[start:]
            found = _Value()
            if name == "GLOBAL":
                found = _Value(str(argument).replace(" ", "."))
            elif "TUPLE" in name:
                found = _Value("", taken, 1 + sum(each.weight for each in taken))
                # The function and what it is called with: of functools.partial, or a tensor's class.
                if len(taken) > 1 and taken[0].name.endswith(_ALLOCATING):
                    refuse(f"has {taken[0].name} called")
            elif name in ("REDUCE", "NEWOBJ"):
                function, arguments = taken
                if arguments.items is None or (arguments.items and function.name.endswith(_ALLOCATING)):
                    refuse(f"calls {function.name or 'what it made'}")
                found = _Value("", None, arguments.weight)  # which may be a tuple, as torch.Size is
            if found.weight > _MOST + len(pickled):
                refuse("nests tuples without end")
            stack += [found] * len(operation.stack_after)
