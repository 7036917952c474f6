"""Gradients of ONNX networks: what lies between the convolutions, translated to torch where that is right."""

import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.files.onnx.graph.network import Island, OnnxNetwork
from sepconvert.network.tensors import Inputs, fresh

_DIFFERENCE = 2.0**-12
"""Largest difference from ONNX Runtime that is taken for rounding, relative to the largest output: √ε."""


def add_gradients(network: OnnxNetwork, inputs: Inputs) -> str | None:
    """Let a network be differentiated, if torch is seen to compute what ONNX Runtime does between its layers.

    Where gradients are recorded, the network then runs its islands in torch, as onnx2pytorch translates them.
    Weights within them stay as they are: only convolutions can be trained.

    Args:
        network: is given the translations, which its copies share.
        inputs: samples on which each island must give what it gives in ONNX Runtime.

    Returns:
        None, or the reason why the network has no gradients.
    """
    try:
        from onnx2pytorch import ConvertModel
    except ImportError:
        return "onnx2pytorch is not installed; pip install 'sepconvert[gradients]' brings it"
    found: dict[Island, nn.Module] = {}
    reasons: list[str] = []

    def watch(island: Island, values: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if island in found or reasons:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = (
                    ConvertModel(_inference(island.model), experimental=True).eval().requires_grad_(False)
                )
                returned = module(*fresh(tuple(values)))
            translated = returned if isinstance(returned, list | tuple) else [returned]
            if not _are_equal(translated, outputs):
                raise ValueError("torch computes something else than ONNX Runtime")
            found[island] = module
        except Exception as error:  # a translation may fail in any way
            kinds = sorted({node.op_type for node in island.model.graph.node})
            reasons.append(f"{', '.join(kinds)} cannot be differentiated ({first_line(error)})")

    with torch.no_grad(), network.watched(watch):
        network(*inputs)
    if reasons:
        return reasons[0]
    for island, module in found.items():
        island.module = module
    return None


def demand_gradients(reason: str | None, option: str) -> None:
    """Raise `SepconvertError` if a network that is to be trained, by some option, has no gradients."""
    if reason is not None:
        raise SepconvertError(
            f"`{option}`: needs gradients, and the ONNX file has none: {reason}; leave `{option}` out, or "
            "convert the model that the file was exported from"
        )


def _inference(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the attributes that say that it is not being trained."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        kept = [each for each in node.attribute if not (each.name == "training_mode" and each.i == 0)]
        if len(kept) < len(node.attribute):
            copies = [onnx.AttributeProto.FromString(each.SerializeToString()) for each in kept]
            del node.attribute[:]
            node.attribute.extend(copies)
    return plain


def _are_equal(translated: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    return len(translated) == len(outputs) and all(
        mine.shape == theirs.shape
        and bool((mine.double() - theirs.double()).abs().max() <= _DIFFERENCE * theirs.double().abs().max())
        for mine, theirs in zip(translated, outputs, strict=True)
        if theirs.numel()
    )
