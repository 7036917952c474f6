"""ONNX files in the place of a model: they take its inputs by name, and return outputs in its structure."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sepconvert.files.onnx.export import runtime_dtype
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.running import Feed, feed_by_name
from sepconvert.files.onnx.naming import Interface, input_names
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, fresh


def onnx_feed(model: nn.Module, inputs: Inputs, interface: Interface | None = None) -> Feed:
    """Return the inputs of a model as its ONNX file takes them, which has this interface, or its own."""
    if isinstance(model, OnnxNetwork):
        return model.feed(inputs)
    names = interface.inputs if interface is not None else input_names(model, inputs)
    return feed_by_name(names, cast(inputs, runtime_dtype(model)))


def example_of(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model returns; None for a tensor, or a tuple of several, as ONNX files return them."""
    with torch.no_grad():
        returned = private_copy(model)(*fresh(inputs))
    several = type(returned) is tuple and len(returned) > 1
    plain = isinstance(returned, Tensor) or (several and all(isinstance(each, Tensor) for each in returned))
    return None if plain else returned


def filled(example: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a structure with other tensors in the places of its own, depth first."""
    if isinstance(example, Tensor):
        return next(tensors)
    if isinstance(example, Mapping):
        by_name = {name: filled(each, tensors) for name, each in example.items()}
        return by_name if type(example) is dict else type(example)(**by_name)
    if isinstance(example, tuple | list):
        parts = [filled(each, tensors) for each in example]
        return type(example)(*parts) if hasattr(example, "_fields") else type(example)(parts)
    if is_dataclass(example) and not isinstance(example, type):
        return replace(
            example, **{each.name: filled(getattr(example, each.name), tensors) for each in fields(example)}
        )
    return example
