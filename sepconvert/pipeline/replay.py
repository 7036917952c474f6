"""Replay of a plan and its weights on a fresh model."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sepconvert.base.determinism import reproducible
from sepconvert.base.errors import SepconvertError, first_line, quoted, shortened
from sepconvert.base.modules import unshadowed
from sepconvert.base.options.declared import path_of
from sepconvert.base.options.exporting import Export
from sepconvert.base.progress import Progress, silent
from sepconvert.factorize.exact.factors import factor_specs
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.files.onnx.writing import ExportedFiles, checked_interface, save_files
from sepconvert.measure.profiling import as_inputs
from sepconvert.network.copies import checked
from sepconvert.network.merge import merge
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.tensors import Inputs, placed, state_tensors
from sepconvert.network.trace import ConvSite, traced
from sepconvert.pipeline.modes.exact import verify_model
from sepconvert.pipeline.original import Subject, as_module
from sepconvert.pipeline.results import Plan
from sepconvert.pipeline.stages import demand_verified
from sepconvert.planning.conversion import Verification
from sepconvert.planning.plan import ConversionPlan, LayerPlan, read_plan


@reproducible()
def apply(
    model: Subject,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str],
    example_inputs: Tensor | Inputs | None = None,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of `model`, converted as a plan says, with the weights that it was written with.

    Args:
        model: a module, or an ONNX file or model, as for `convert`; left as it is.
        plan: `result.plan`, or the content or the path of a plan.json. It may come from another model of the
            same architecture.
        example_inputs: as for `convert`; needed if the model takes more than floating-point tensors.
        weights: tensors of the converted model by name, or a file of them. By default those of `result.plan`,
            or the file converted.safetensors beside the plan's.

    Raises:
        SepconvertError: plan, weights and model do not belong together, or the model does not run.
    """
    beside: Path | Mapping[str, Tensor] | None = None
    if isinstance(plan, str | os.PathLike):
        plan = Path(plan)
        beside = plan.parent / "converted.safetensors"
    elif isinstance(plan, Plan):
        beside = plan.weights
    elif not isinstance(plan, Mapping):
        raise SepconvertError(
            f"`plan`: expected result.plan, or the content or the path of a plan.json, got {quoted(plan)}"
        )
    found = beside if weights is None else weights
    if found is None:
        raise SepconvertError(
            "`weights`: the content of a plan.json holds none; pass result.plan, or weights= with those of "
            "converted.safetensors"
        )
    model = as_module(model)
    inputs = None if example_inputs is None else as_inputs(model, example_inputs)
    stored = dict(found) if isinstance(found, Mapping) else path_of("weights", found)
    assert stored is not None  # noqa: S101  (`found` is not)
    return _replayed(model, read_plan(plan), stored, inputs)[0]


def apply_plan(
    model: nn.Module,
    plan: ConversionPlan,
    weights: Path,
    out: Path,
    *,
    model_sha256: str | None,
    dynamic_batch: bool = True,
    export: Export = Export(),
    progress: Progress = silent,
) -> dict[str, Any] | None:
    """Replay a plan and its weights on a fresh model, and write the converted one to `out`.

    Returns:
        The comparison of outputs, if the plan is exact and `model` comes from the very file that the plan was
        made from. Otherwise None: the weights are the plan's, and there is nothing to compare with.

    Raises:
        SepconvertError: plan, weights and model do not belong together, or `export` does not suit the model.
        ExportError: torch cannot export the model.
        VerificationError: the outputs differ from the original's.
    """
    converted, sites, inputs = _replayed(model, plan, weights)
    interface = checked_interface(model, inputs, export)
    verified = None
    if plan.mode == "exact" and plan.model_sha256 is not None and plan.model_sha256 == model_sha256:
        tolerances = {layer.name: layer.tolerance for layer in plan.replaced if layer.tolerance is not None}
        checks, _, comparison = verify_model(model, converted, inputs, sites, tolerances, plan.seed, progress)
        demand_verified(Verification(comparison, None, None, checks))
        verified = asdict(comparison)
    if isinstance(model, OnnxNetwork) and isinstance(converted, OnnxNetwork):
        save_files(model.graph, {out / "converted.onnx": converted_model(converted)})
        return verified
    files = ExportedFiles(Drafts(model, inputs, interface), converted, dynamic_batch=dynamic_batch)
    files.write_converted(out / "converted.onnx")
    files.write_archive(out / "converted.pt2")
    return verified


def _replayed(
    model: nn.Module, plan: ConversionPlan, weights: Path | dict[str, Tensor], inputs: Inputs | None = None
) -> tuple[nn.Module, tuple[ConvSite, ...], Inputs]:
    """Return the converted model, the convolutions that the plan refers to, and inputs of its shape."""
    model = checked(model)
    if inputs is None:
        inputs = tuple(
            placed(torch.randn(shape, generator=torch.Generator().manual_seed(plan.seed)), model)
            for shape in plan.input_shapes
        )
    start = traced(model, inputs)
    if plan.merges:
        start = traced(merge(start, plan.merges), inputs)
    by_name = {site.name: site for site in start.sites}
    for layer in plan.replaced:
        site = by_name.get(layer.name)
        if site is None or site.conv is None or site.conv.spec != layer.spec:
            found = (
                "none of that name"
                if site is None
                else site.obstacle
                if site.conv is None
                else site.conv.spec
            )
            raise SepconvertError(
                f"plan: expected a convolution {shortened(layer.name)}, {layer.spec}; the model has {found}"
            )
    replacements = {layer.name: _planned_replacement(layer, by_name[layer.name]) for layer in plan.replaced}
    converted = rewrite(start, replacements)
    _load_weights(converted, weights if isinstance(weights, dict) else _read(weights, plan.weights_sha256))
    return converted, start.sites, inputs


def _planned_replacement(layer: LayerPlan, site: ConvSite) -> Replacement:
    """Return factors of the planned shapes, to be filled with the plan's weights."""
    if layer.scheme is None or layer.rank is None:
        raise ValueError(f"{layer.name}: no plan that was read is like that")
    specs = factor_specs(site.dense.spec, layer.scheme, layer.rank, layer.border)
    empty = tuple(site.dense.weight.new_zeros(spec.weight_shape) for spec in specs)
    bias = site.dense.weight.new_zeros(site.dense.spec.out_channels) if layer.bias else None
    return Replacement(layer.scheme, layer.rank, layer.border, empty, bias)


def _read(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Return the tensors in the file that a plan was written with."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SepconvertError(
            f"{path}: cannot be read: {error.strerror}; it belongs beside the plan"
        ) from error
    if found != sha256:
        raise SepconvertError(
            f"{path}: is not the file that the plan was written with; use the files of one conversion"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own error
        raise SepconvertError(
            f"{path}: does not fit the model: {first_line(error)}; use the plan's model"
        ) from error


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        if different := weights.keys() ^ state_tensors(model).keys():
            raise ValueError(f"one of them lacks {min(different)}")
        unshadowed(model).load_state_dict(weights, strict=False)
    except Exception as error:  # that of load_state_dict
        raise SepconvertError(
            f"weights: do not fit the model: {first_line(error)}; use the plan's model"
        ) from error
