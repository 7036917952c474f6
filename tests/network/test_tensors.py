"""Tensors in nested inputs and outputs."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from sepconvert.network.tensors import cast, fresh, model_dtype, placed, sha256_of, tensor_leaves, tensors_in

A, B, C = torch.ones(2), torch.arange(3), torch.zeros(1, dtype=torch.float64)


def test_tensors_of_nested_inputs_in_order():
    found = tensors_in((A, [B, {"c": C}], "text", 3))
    assert [id(value) for value in found] == [id(A), id(B), id(C)]


def test_copies_share_no_memory():
    inputs = (A, [B, {"c": C}], "text", 3)
    copied = fresh(inputs)
    assert all(map(torch.equal, tensors_in(copied), tensors_in(inputs)))
    assert not {value.data_ptr() for value in tensors_in(copied)} & {value.data_ptr() for value in (A, B, C)}
    assert copied[2:] == inputs[2:]


def test_the_hash_of_tensors_is_that_of_their_bytes():
    values = [torch.arange(6.0).reshape(2, 3).T, torch.tensor(7), torch.empty(0), "text"]
    expected = hashlib.sha256(b"".join(value.numpy().tobytes() for value in values[:3])).hexdigest()
    assert sha256_of(values) == expected
    assert sha256_of(reversed(values)) != expected


def test_floating_point_alone_is_cast():
    assert [value.dtype for value in tensors_in(cast((A, [B, C]), torch.float16))] == [
        torch.float16, torch.int64, torch.float16,
    ]  # fmt: skip


def test_images_are_placed_as_the_model_s_first_floating_point_tensor():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
            self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    assert model_dtype(Counter()) == placed(A, Counter()).dtype == torch.float64
    assert placed(B, Counter()).dtype == torch.int64
    assert model_dtype(nn.ReLU()) == torch.float32
    assert placed(C, nn.ReLU()) is C


def test_leaves_of_an_output_depth_first():
    @dataclass
    class Output:
        logits: torch.Tensor
        parts: dict

    leaves = tensor_leaves(Output(A, {"x": [B, (C,)], "name": "text"}))
    assert [id(value) for value in leaves] == [id(A), id(B), id(C)]
