"""Models read from files, which are recognised by their content and never run as programs, or built by name.

A pickle is a program, and so is a torch.export archive: `sepconvert.files.models.untrusted` reads them with a
short list of harmless names. Everything else is refused by name, with the parameter that admits it.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sepconvert.base.documents import sha256_of_file
from sepconvert.base.errors import SepconvertError, one_line, quoted, some_of
from sepconvert.base.modules import modules, named_modules, unshadowed
from sepconvert.files.callables import resolve_callable
from sepconvert.files.models.formats import model_format
from sepconvert.files.models.libraries import Normalisation, build_named, timm_config
from sepconvert.files.models.names import name_of
from sepconvert.files.models.untrusted.archives import load_archive
from sepconvert.files.models.untrusted.pickles import load_pickle
from sepconvert.files.models.weights import Content, load_weights, unwrapped_content
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.sources import is_sensible
from sepconvert.network.copies import unwrapped
from sepconvert.network.tensors import sha256_of

_MAX_EXAMPLE = 2**22  # elements of an input whose shape the file gives, and not the user


@dataclass(frozen=True)
class LoadedModel:
    """A model and the file, or the name, that it came from.

    Attributes:
        model: the model, on the CPU, in the mode (train or eval) in which it was saved or built.
        path: the file, or a name: of a model that a library builds, or where `factory` gave the weights.
        sha256: SHA-256 of the file, in hexadecimal; for a name, that of the weights (`sha256_of`).
        example_inputs: inputs with a batch dimension: those stored in a .pt2 archive, or zeros of the input
            size that a library names for its model; None if there are none.
        notes: sentences that the user must see: which weights were left out, cast, random or not read.
        weights: what a library filled the model with, such as `DEFAULT` or `random`; None for a file.
        normalisation: of images, as a library trained the model with; None where that is not known.
    """

    model: nn.Module
    path: Path
    sha256: str
    example_inputs: tuple[Tensor, ...] | None
    notes: tuple[str, ...] = ()
    weights: str | None = None
    normalisation: Normalisation | None = None


def load_model(
    path: str | os.PathLike[str],
    *,
    factory: str | None = None,
    factory_args: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
    ignore_extra_keys: Sequence[str] = (),
) -> LoadedModel:
    """Read a model file, or build a model by its name; the content of a file decides its format.

    Loading is not thread-safe: while torch reads the file, `nn.Module.__init__` (or, for a .pt2 archive, an
    environment variable of torch) is changed for the whole process. On Linux a forked child process reads
    pickles first, within limits of memory and time.

    Args:
        path: a module or a state_dict saved by `torch.save` (zip or legacy), a `.safetensors` file, a
            `.pt2` archive of `torch.export.save`, or a `.onnx` file; or the name of a model that timm or
            torchvision builds (see `sepconvert.files.models.names`). Where the model of `factory` has its
            weights already: what they came from, either a file of another framework, or a name, which has no
            separator and no extension of a model file.
        factory: callable, as `pkg.mod:callable` or `file.py:callable`, that builds the model which takes the
            weights of the file. It is needed for a state_dict; if the file holds several, plain
            weights are preferred to averaged (EMA) ones.
        factory_args: keyword arguments that `factory` is called with.
        allow: full names of further classes that a pickle may use.
        trust: whether to run the file as the program that it is, without restrictions.
        ignore_extra_keys: globs of keys in the file that the model of `factory` does not have; those that
            match are left out.

    Raises:
        SepconvertError: the file is no model, is damaged, or needs more than is allowed; or a library cannot
            build the model, or fetch its weights.
    """
    path = Path(path)
    kind = model_format(path, built=factory is not None)
    build = _builder(factory, factory_args or {}) if factory else None
    if ignore_extra_keys and build is None:
        raise SepconvertError(
            "`ignore_extra_keys`: only for weights that the model of `factory` takes; pass `factory` too"
        )
    if (name := name_of(path)) is not None:
        named = build_named(name)
        return LoadedModel(
            named.model,
            path,
            sha256_of(unshadowed(named.model).state_dict().values()),
            _example(named.model, named.input_size),
            named.notes,
            named.weights,
            named.normalisation,
        )
    if kind == "onnx":
        network = open_network(path)
        return LoadedModel(network, path, sha256_of_file(path), network.example())
    if build is not None and kind == "origin":
        return _as_built(build, path)
    try:
        content, weights, examples = _read(path, kind, allow, trust)
    except SepconvertError:
        raise
    except Exception as error:  # a damaged or hostile file can make the readers raise anything
        advice = (
            "install what it needs, or run from the directory that holds it"
            if isinstance(error, ImportError)  # of a file that is trusted
            else "it is damaged, or of another version of torch: save it again"
        )
        raise SepconvertError(
            f"{path}: cannot be read as a {kind} file ({one_line(error)}); {advice}"
        ) from error
    _check_data(weights, path)
    notes: tuple[str, ...] = ()
    if build is not None:
        model = build()
        notes = load_weights(model, weights, path, ignore_extra_keys)
    elif isinstance(content, nn.Module):
        model = content
    else:
        raise SepconvertError(
            f"{path}: holds a state_dict ({len(content)} entries), which does not say how to build the "
            "model; pass `factory` pkg.mod:callable or `factory` file.py:callable that returns it"
        )
    unshadowed(model).cpu()
    return LoadedModel(model, path, sha256_of_file(path), examples or _example_of_timm(model), notes)


def _read(
    path: Path, kind: str, allow: Sequence[str], trust: bool
) -> tuple[Content, Mapping[str, Tensor], tuple[Tensor, ...] | None]:
    """Return the module or the state_dict in a file, its weights, and the example inputs stored with it."""
    examples: tuple[Tensor, ...] | None = None
    stored: object
    if kind == "pt2":
        stored, examples = load_archive(path, trust)
    elif kind == "safetensors":
        stored = load_file(path)
    else:
        stored = load_pickle(path, allow, trust, legacy=kind == "legacy torch.save")
    content = unwrapped_content(stored, path)
    if isinstance(content, nn.Module):
        _check_state(content)
    weights = unshadowed(content).state_dict() if isinstance(content, nn.Module) else content
    _check_tensors(content, weights, path)
    return content, weights, examples


# Contents ----------------------------------------------------------------------------------------


def _check_state(model: nn.Module) -> None:
    """Raise `ValueError` if a module's own dictionaries have other types than its constructor gives them."""
    usual = {name: value for name, value in vars(nn.Module()).items() if isinstance(value, dict)}
    for _, module in named_modules(model):  # one after the other: the next are found in what is checked
        if _makes_layers(vars(module).get("forward", id)):
            raise ValueError(f"the forward of a {type(module).__name__} is not as torch makes it")
        for name, value in usual.items():
            held = vars(module).get(name, value)
            called = name in ("_forward_hooks", "_forward_pre_hooks")
            if not isinstance(held, type(value)) or (called and any(map(_makes_layers, held.values()))):
                raise ValueError(f"{name} of a {type(module).__name__} is not as torch makes it")


def _makes_layers(called: object) -> bool:
    """Return whether a hook is a class, or a partial call of one with any size, or is not callable at all."""
    return isinstance(called, type | functools.partial) or not callable(called)


def _check_tensors(content: Content, weights: Mapping[str, object], path: Path) -> None:
    """Refuse sparse tensors, and views that repeat a few stored numbers until they fill the memory."""
    plain = unshadowed(content) if isinstance(content, nn.Module) else nn.Module()
    own = [*plain.parameters(), *plain.buffers()]
    tensors = [value for value in (*weights.values(), *own) if isinstance(value, Tensor)]
    if any(tensor.layout is not torch.strided and not tensor.is_mkldnn for tensor in tensors):
        raise SepconvertError(f"{path}: has sparse weights; save them dense (tensor.to_dense())")
    claims: dict[int, int] = {}  # by storage, since slices of one take no more than it does
    for tensor in tensors:
        if tensor.layout is torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage().data_ptr()
            claims[storage] = max(claims.get(storage, 0), tensor.numel() * tensor.element_size())
    claimed, size = sum(claims.values()), path.stat().st_size
    if claimed > 2 * size + 2**28:
        raise SepconvertError(
            f"{path}: its weights take {claimed / 1e6:,.0f} MB, and the file {size / 1e6:,.1f}: they "
            "repeat what is stored; save them whole (tensor.contiguous())"
        )


def _check_data(weights: Mapping[str, object], path: Path) -> None:
    """Refuse weights that are only shapes."""
    if any(isinstance(value, Tensor) and value.is_meta for value in weights.values()):
        raise SepconvertError(f"{path}: has weights without data (on the meta device); save a trained model")


def _builder(spec: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Return a function that builds the model of `factory`, whose code is imported at once."""
    function = resolve_callable(spec, "factory")
    _check_arguments(function, spec, arguments)
    given = ", ".join(f"{name}={quoted(value)}" for name, value in arguments.items())

    def build() -> nn.Module:
        try:
            model = function(**arguments)
        except (Exception, SystemExit) as error:
            raise SepconvertError(
                f"`factory` {spec}: calling it {f'with {given}' if given else 'without arguments'} failed "
                f"({one_line(error)}); give a callable that returns the model, and what it has to be called "
                "with as `factory_args`"
            ) from error
        if not isinstance(model, nn.Module):
            raise SepconvertError(
                f"`factory` {spec}: returned a {type(model).__name__}; expected an nn.Module"
            )
        return unwrapped(model)

    return build


def _check_arguments(function: Callable[..., object], spec: str, arguments: Mapping[str, Any]) -> None:
    """Raise `SepconvertError` if a function has no parameter of the name of an argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a class or function in C
        return
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    names = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if unknown := [name for name in arguments if name not in names]:
        raise SepconvertError(
            f"`factory_args`: {unknown[0]} is no parameter of {spec}, which takes "
            f"{some_of(names, 12) or 'none'}; correct the name, or leave it out"
        )


# Models that have their weights already -----------------------------------------------------------


def _as_built(build: Callable[[], nn.Module], path: Path) -> LoadedModel:
    """Return the model of `factory` with the weights that it has; `path` says what they came from.

    Raises:
        SepconvertError: they are others each time, as those of a model that was not trained are.
    """
    model = build()
    weights = unshadowed(model).state_dict()
    _check_data(weights, path)
    sha256 = sha256_of(weights.values())
    found = "is no model file of torch" if path.exists() else "there is no such file"
    if sha256_of(unshadowed(build()).state_dict().values()) != sha256:
        raise SepconvertError(
            f"{path}: {found}, and the weights that `factory` gives are random: no two calls give the same; "
            "pass the file that holds trained ones, or a `factory` that loads them"
        )
    note = f"{path}: {found}; the weights are those that `factory` gives"
    sha256 = sha256_of_file(path) if path.exists() else sha256
    unshadowed(model).cpu()
    return LoadedModel(model, path, sha256, _example_of_timm(model), (note,))


# Small helpers ------------------------------------------------------------------------------------


def _example_of_timm(model: nn.Module) -> tuple[Tensor, ...] | None:
    """Return zeros of the input size that a timm model's configuration gives; None if it is of no use."""
    return _example(model, timm_config(model).get("input_size"))


def _example(model: nn.Module, size: object) -> tuple[Tensor, ...] | None:
    """Return zeros of an input size (channels, height, width); None if it is none that the model takes."""
    if not isinstance(size, tuple | list) or len(size) != 3 or not is_sensible(size, _MAX_EXAMPLE):
        return None
    # timm's configuration keeps its 3 channels when a model is created with in_chans=1.
    first = next((m for m in modules(model) if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels % size[0]:
        return None
    dtype = next((p.dtype for p in unshadowed(model).parameters() if p.is_floating_point()), torch.float32)
    return (torch.zeros(1, *size, dtype=dtype),)
