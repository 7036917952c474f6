"""Outputs in the structure of a model's own."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sepconvert.files.onnx.structured import example_of, filled
from sepconvert.network.tensors import tensor_leaves

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    logits: Tensor
    name: str = "head"


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


STRUCTURES = {
    "mapping": lambda x: {"a": x, "b": (x + 1, None)},
    "list": lambda x: [x, x * 2],
    "named tuple": lambda x: Pair(x, x + 3),
    "dataclass": lambda x: Output(x),
    "nested": lambda x: {"all": [Pair(x, {"deep": x + 5}), 7]},
    "one in a tuple": lambda x: (x,),
}


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_other_tensors_take_their_places(make):
    example = example_of(Returning(make), (torch.zeros(2),))
    wanted = make(torch.arange(2.0))
    found = filled(example, tensor_leaves(wanted))
    assert type(found) is type(wanted)
    assert repr(found) == repr(wanted)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, x + 1)], ids=["tensor", "tuple"])
def test_what_files_return_themselves_has_no_example(make):
    assert example_of(Returning(make), (torch.zeros(2),)) is None
