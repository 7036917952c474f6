"""Drafts of ONNX files of conversions: in the file of the original, layers are exchanged.

Plans are timed and scored by them, and the file that is delivered is one: an export by torch takes seconds,
and many plans are looked at.
"""

import ast
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from sepconvert.base.errors import ExportError
from sepconvert.base.modules import named_modules
from sepconvert.base.progress import Stage, stage
from sepconvert.files.onnx.export import Exported, export_program, runtime_dtype, translated
from sepconvert.files.onnx.graph.convolutions import OnnxGraph
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.running import Feed, opened, with_sizes
from sepconvert.files.onnx.graph.surgery import converted_model, edited
from sepconvert.files.onnx.naming import Interface, interface_of
from sepconvert.files.onnx.structured import example_of, filled, onnx_feed
from sepconvert.network.copies import quick_copy
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import (
    InputBatch,
    Inputs,
    StandIn,
    fresh,
    largest,
    ordered_like,
    state_tensors,
    tensor_leaves,
    tensors_in,
)

_LOG = logging.getLogger(__name__)

_SCOPES = "pkg.torch.onnx.name_scopes"  # property of nodes: the modules that they are of, the outermost first


_AT_ONCE = 32  # samples by which torch and ONNX Runtime are compared, at most


# Torch has to be so many times as fast to be preferred: conversions have more and smaller layers than the
# original, on which it loses more (a converted ResNet-9 ran in 0.37 ms an image there, and in 0.84 in torch,
# the original in 1.04 and 1.38).
_PREFERENCE = 1.2


_OFF = 1e-3  # of the largest output, by which the outputs of a file may be off those of the model


class Drafts:
    """Makes the drafts of one original's conversions, and runs them.

    Attributes:
        original: the model.
        inputs: that it is exported with.
        interface: names and opset of all files that are made of it.
    """

    def __init__(self, original: nn.Module, inputs: Inputs, interface: Interface | None = None) -> None:
        self.original, self.inputs = original, inputs
        self.interface = interface or interface_of(original, inputs)

    def feed(self, inputs: Inputs) -> Feed:
        """Return inputs as the files take them."""
        return onnx_feed(self.original, ordered_like(self.inputs, inputs), self.interface)

    @cached_property
    def export(self) -> Exported:
        """The exported original, with any number of samples if it allows that.

        Raises:
            ExportError: torch cannot export it.
        """
        with stage(Stage.EXPORT):
            return export_program(self.original, self.inputs, interface=self.interface)

    def of(self, model: nn.Module) -> onnx.ModelProto:
        """Return a file that computes what a conversion does, as fast as the one that is exported.

        A conversion that differs from the original by more than its convolutions is exported.

        Raises:
            ExportError: torch cannot export it.
        """
        if isinstance(model, OnnxNetwork):
            return converted_model(model, embedded=True)
        with stage(Stage.EXPORT):
            found = self._draft(model)
            if found is None:
                found = ir.to_proto(translated(export_program(model, self.inputs, interface=self.interface)))
        return found

    def delivered(self, model: nn.Module) -> ir.Model | None:
        """Return the same file as the exporter optimizes files; None if it has to be exported.

        Raises:
            ExportError: torch cannot export the original.
        """
        try:
            draft = self._draft(model)
            self.__dict__.pop("_graph", None)  # another copy of all weights, which no plan needs any more
            return None if draft is None else self.export.optimized(ir.from_proto(draft))
        except ExportError:
            raise
        except Exception as error:  # of ONNX Runtime or of the exporter; another export says what is wrong
            _LOG.debug("no file of the conversion is made from that of the original", exc_info=error)
            return None

    def forget(self) -> None:
        """Free the memory of the exported original, which is exported again where it is needed again."""
        for name in ("export", "_graph"):
            self.__dict__.pop(name, None)

    def timed(self, model: nn.Module) -> onnx.ModelProto:
        """Return the same file for inputs of the size of the example, for which ONNX Runtime folds shapes."""
        return with_sizes(self.of(model), self.feed(self.inputs))

    def module(self, model: nn.Module) -> "RunsInRuntime | None":
        """Return a conversion as a module that ONNX Runtime runs; None if its file fixes the batch."""
        fixed = model.batch is not None if isinstance(model, OnnxNetwork) else not self._is_dynamic
        return None if fixed else RunsInRuntime(self, model)

    def are_faster_than_torch(self, axis: int, at_once: int) -> bool:
        """Return whether ONNX Runtime is measured to run conversions faster than torch, and as well.

        It is the original that is measured.

        Args:
            axis: dimension of the inputs that counts samples.
            at_once: samples that there is memory for.
        """
        if runtime_dtype(self.original) != torch.float32:
            return False
        sample = InputBatch(self.inputs, axis)[:1]
        batch = InputBatch.joined([sample] * min(at_once, _AT_ONCE))
        try:
            other = self.module(self.original)
            if other is None:
                return False
            (mine, before), (theirs, after) = (
                _timed(each, batch) for each in (quick_copy(self.original, sample), other)
            )
        except Exception:  # whatever torch or ONNX Runtime do not take, the other one may
            return False
        return _are_alike(mine, theirs) and after < _PREFERENCE * before

    @cached_property
    def example(self) -> Any:
        """Outputs of the original; None if they are a tensor or a tuple of them, as a file returns them."""
        return None if isinstance(self.original, OnnxNetwork) else example_of(self.original, self.inputs)

    @property
    def _is_dynamic(self) -> bool:
        return self.export.note.dynamic_batch

    @cached_property
    def _graph(self) -> OnnxGraph:
        """The original's file without what is folded into parameters: each of these is there by its name."""
        translation = translated(self.export, optimize=False)
        fold_constants(translation)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(translation)
        for node in translation.graph:
            # What torch calls without a bias is translated with one of zeros.
            bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
            if bias is not None and bias.const_value is not None and not bias.const_value.numpy().any():
                node.resize_inputs(2)
        RemoveUnusedNodesPass()(translation)
        return OnnxGraph(ir.to_proto(translation))

    @cached_property
    def _names(self) -> set[str]:
        """Names of the nodes in the original's file."""
        return {node.name for node in self._graph.model.graph.node}

    @cached_property
    def _folded(self) -> set[str]:
        """Names of parameters and buffers of the original that are part of a constant of `_graph`."""
        initializers = self.export.translation.model.graph.initializers
        used = {str(name) for name, value in initializers.items() if value.uses()}
        return used - {tensor.name for tensor in self._graph.model.graph.initializer}

    def _draft(self, model: nn.Module) -> onnx.ModelProto | None:
        """Return the original's file with layers exchanged; None if that is not all that differs."""
        exchanged = _exchanged(self._modules, model)
        graph = None if exchanged is None else self._with_state_of(model)
        if exchanged is None or graph is None:
            return None
        paths = self._paths
        pairs = [
            (each, module)
            for each in graph.convolutions
            if (module := exchanged.get(paths[each.output])) is not None
        ]
        if {paths[each.output] for each, _ in pairs} != exchanged.keys():
            return None
        draft = edited(graph, pairs, folding=True, paths=paths)
        for node in draft.graph.node:
            if node.name not in self._names:
                _give_scope(node)
        # Where a module is called again, its functional convolutions may be counted in another way.
        functional = not exchanged.keys() <= self._modules.keys()
        return None if functional and not self._is_of(draft, model) else draft

    def _is_of(self, draft: onnx.ModelProto, model: nn.Module) -> bool:
        """Return whether a file computes what a model does, on the example."""
        with torch.no_grad():
            expected = list(tensor_leaves(quick_copy(model, InputBatch(self.inputs))(*fresh(self.inputs))))
        found = opened(draft, threads=1).run(None, self.feed(self.inputs))
        return _are_alike(expected, [torch.from_numpy(each) for each in found])

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        """The modules of the original by path."""
        return dict(named_modules(self.original, duplicates=True))

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Paths of the convolutions in the original's file, by their outputs.

        Functional ones have the path of the submodule that takes their place, which counts the calls of a
        forward.
        """
        called, found = Counter[str](), dict[str, str]()
        for node in self._graph.model.graph.node:
            if node.op_type in ("Conv", "ConvTranspose"):
                scope = _scope_of(node, self.export.prefix)
                path = re.sub(r"@\d+", "", scope)  # a module that is called again is marked: conv, conv@1
                if not isinstance(self._modules.get(path), nn.Conv2d):
                    path = f"{path}{'.' if path else ''}conv2d_{called[scope]}"
                    called[scope] += 1
                found[node.output[0]] = path
        return found

    def _with_state_of(self, model: nn.Module) -> OnnxGraph | None:
        """Return the original's graph with the parameters and buffers of a conversion.

        None if one that differs was folded with others into a constant.
        """
        before, after = (state_tensors(each) for each in (self.original, model))
        prefix = self.export.prefix
        changed = {
            f"{prefix}{name}": value
            for name, value in after.items()
            if name in before and not _is_same(before[name], value)
        }
        if changed.keys() & self._folded:
            return None
        if not changed:
            return self._graph
        updated = onnx.ModelProto()
        updated.CopyFrom(self._graph.model)
        for tensor in updated.graph.initializer:
            if (value := changed.get(tensor.name)) is not None:
                array = value.detach().double().cpu().numpy().astype(numpy_helper.to_array(tensor).dtype)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return OnnxGraph(updated)


class RunsInRuntime(StandIn):
    """A conversion whose draft ONNX Runtime runs; samples of other sizes than the example's, torch does."""

    def __init__(self, drafts: Drafts, model: nn.Module) -> None:
        super().__init__(quick_copy(model, InputBatch(drafts.inputs)))
        self._drafts = drafts
        self._session = opened(drafts.of(model), threads=torch.get_num_threads())

    def forward(self, *inputs: Any) -> Any:
        """Return what the model does."""
        shapes = [[value.shape[1:] for value in tensors_in(each)] for each in (inputs, self._drafts.inputs)]
        if shapes[0] != shapes[1]:
            return self.stands_for(*inputs)
        found = self._session.run(None, self._drafts.feed(inputs))
        tensors = tuple(map(torch.from_numpy, found))
        if self._drafts.example is not None:
            return filled(self._drafts.example, iter(tensors))
        return tensors[0] if len(tensors) == 1 else tensors


def _exchanged(before: Mapping[str, nn.Module], model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the modules of a conversion that take the place of convolutions, by path.

    None if it differs in anything else from the original, whose modules are `before`.
    """
    found = dict[str, nn.Module]()
    for path, module in named_modules(model, duplicates=True):
        if any(path.startswith(f"{each}.") or not each for each in found):
            continue
        was = before.get(path)
        if was is None:  # in the place of a functional convolution
            if not isinstance(module, FactorizedConv2d):
                return None
            found[path] = module
        elif not isinstance(was, nn.Conv2d):
            # Where calls of its forward were replaced, its class is a subclass of what it was.
            if not isinstance(module, type(was)):
                return None
        elif type(module) is not type(was) or _sizes(module) != _sizes(was):
            if not isinstance(module, FactorizedConv2d | nn.Identity) and type(module) is not nn.Conv2d:
                return None
            if isinstance(module, FactorizedConv2d) and module.padding_mode != "zeros":
                return None  # each of its factors pads by itself, and the file does so before the convolution
            found[path] = module
    return found


def _sizes(module: nn.Module) -> list[torch.Size]:
    return [value.shape for value in module._parameters.values() if value is not None]


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _are_alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether outputs are equal up to a small part of the largest one."""
    scale = largest(some)
    alike = [
        one.shape == two.shape and bool((one - two).abs().max() <= _OFF * scale)
        for one, two in zip(some, others, strict=False)
        if one.numel()
    ]
    return len(some) == len(others) and all(alike)


def _scope_of(node: onnx.NodeProto, prefix: str) -> str:
    """Return the path of the module whose forward calls a node, marked where it is called again."""
    scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), "[None]")
    *modules, _ = ast.literal_eval(scopes)
    path = modules[-1] if modules else ""
    return path.removeprefix(prefix) if path != prefix.rstrip(".") else ""


def _give_scope(node: onnx.NodeProto) -> None:
    """Note the module that a new node, which is named after it, is of, as the exporter does."""
    del node.metadata_props[:]
    scopes = ["", node.name, node.op_type.lower()]
    node.metadata_props.append(onnx.StringStringEntryProto(key=_SCOPES, value=repr(scopes)))


def _timed(model: nn.Module, batch: InputBatch) -> tuple[list[Tensor], float]:
    """Return the outputs for a batch, and the seconds of the faster one of two runs."""
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            returned = batch.run(model)
            seconds.append(time.perf_counter() - start)
    return list(tensor_leaves(returned)), min(seconds)
