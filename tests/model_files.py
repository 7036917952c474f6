"""Model files of every kind, hostile ones among them."""

import os
import zipfile

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.files.models.loading import load_model

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


NET = """from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )
"""


X = torch.linspace(-1, 1, 3 * 36).reshape(1, 3, 6, 6)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )


def built():
    model = small()
    model(torch.zeros(1, 3, 6, 6))
    return model


def write_checkpoint(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")


def naming(name):
    """A pickle of the class or function `name`."""
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n."


class Evil:
    """Object that creates the directory `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def refused(match, path, **options):
    with pytest.raises(SepconvertError, match=match) as error:
        load_model(path, **options)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


def assert_same(model, reference):
    assert not any(parameter.is_cuda for parameter in model.parameters())
    torch.testing.assert_close(model(X), reference(X))


def write_pickle(path, pickled, zipped=True):
    """A dictionary of one weight and what `pickled` puts on the stack."""
    whole = b"\x80\x02}X\x01\x00\x00\x00a" + pickled + b"s."
    if zipped:
        write_checkpoint(path, whole)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        parts = path.read_bytes().split(b"\x80\x02}q\x00.")
        path.write_bytes(parts[0] + whole + parts[1])


def named(module, name):
    return b"c%s\n%s\n" % (module.encode(), name.encode())


NINE_GIGABYTES = b"\x8a\x05" + (9 * 10**9).to_bytes(5, "little")
BYTES, TENSOR, PARTIAL = (
    named("__builtin__", "bytearray"),
    named("torch", "Tensor"),
    named("functools", "partial"),
)
RELU = named("torch.nn.functional", "relu")
FROM_TYPE = named("torch._tensor", "_rebuild_from_type_v2")
# A container that holds one container twice, and so on.
TUPLES = b")q\x00" + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(40))
LISTS = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
DEEP_TUPLE = b")" + b"\x85" * 2 * 10**5
LONG_TEXT = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))).encode()
SLOWLY_ENCODED = b"X" + len(LONG_TEXT).to_bytes(4, "little") + LONG_TEXT + b"X\x08\x00\x00\x00punycode"
MEMORY, TIME = "its pickle asks for gigabytes of memory", "its pickle is not read within 1 s"
COSTLY = {
    "an array of bytes": (BYTES + NINE_GIGABYTES + b"\x85R", MEMORY),
    "a tensor": (TENSOR + NINE_GIGABYTES + b"\x85R", MEMORY),
    "a new tensor": (named("torch", "FloatTensor") + NINE_GIGABYTES + b"\x85\x81", MEMORY),
    "arguments in a list": (TENSOR + b"](" + NINE_GIGABYTES + b"eR", MEMORY),
    "a function that calls": (FROM_TYPE + b"(" + BYTES + TENSOR + NINE_GIGABYTES + b"\x85}tR", MEMORY),
    "a tuple that is hashed for ever": (b"}" + TUPLES + b"K\x01s", TIME),
    "a list that is called, and printed for ever": (LISTS + b")R", TIME),
    "a tuple that is walked for ever": (TUPLES, TIME),
    "a slow codec": (named("_codecs", "encode") + SLOWLY_ENCODED + b"\x86R", TIME),
    "a tuple so deep that its hash overflows the C stack": (
        b"}" + DEEP_TUPLE + b"K\x01s",
        "its pickle (crashes the process that reads it|is not read within)",
    ),
    "instructions without end": (
        b"N0" * (10**6 + 10) + b"N",
        "its pickle has more than 2,000,000 instructions",
    ),
}
