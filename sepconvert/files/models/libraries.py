"""Models that timm or torchvision builds by name, with what these libraries say of their inputs."""

import contextlib
import difflib
import inspect
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from sepconvert.base.errors import SepconvertError, one_line
from sepconvert.base.modules import unshadowed
from sepconvert.files.models.names import ModelName

RANDOM = "random"
"""Name of weights that are not trained."""

_SEED = 0  # of random weights: the same name gives the same model, whatever the seed of a run

_SUGGESTED = 3  # names like an unknown one


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of `x / 255` per channel, which images are normalised by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class NamedModel:
    """A model that a library built.

    Attributes:
        model: the model, in eval mode.
        weights: name of its weights; `RANDOM` for such as are not trained.
        input_size: channels, height and width of an image, as its library gives them; None if it gives none.
        normalisation: of images, as its library gives it; None if it gives none.
        notes: sentences that the user must see.
    """

    model: nn.Module
    weights: str
    input_size: tuple[int, ...] | None
    normalisation: Normalisation | None
    notes: tuple[str, ...]


def build_named(name: ModelName) -> NamedModel:
    """Build a model by the function of its library, which also fetches trained weights where it is asked to.

    Random weights are the same each time.

    Raises:
        SepconvertError: the library knows no such model or weights, cannot build it with these arguments, or
            cannot fetch the weights.
    """
    build = _build_of_torchvision if name.scheme == "torchvision" else _build_of_timm
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model, facts = build(name)
    except SepconvertError:
        raise
    except Exception as error:  # the libraries raise errors of many kinds, and those of the network
        raise _not_built(name, error) from error
    unshadowed(model).cpu().eval()
    notes = []
    if name.weights is None:
        notes.append(
            f"WARNING: {name.text}: its weights are random, so that accuracy and outputs mean nothing; for "
            f"trained ones, pass {quote(name.with_weights)}"
        )
    return NamedModel(
        model,
        RANDOM if name.weights is None else name.weights,
        facts.get("input_size"),
        _normalisation(model, facts),
        tuple(notes),
    )


def timm_config(model: nn.Module) -> Mapping[str, Any]:
    """Return the configuration that a timm model carries; empty for other models."""
    configs = (getattr(model, name, None) for name in ("pretrained_cfg", "default_cfg"))
    return next((found for found in configs if isinstance(found, dict) and found), {})


def _build_of_timm(name: ModelName) -> tuple[nn.Module, Mapping[str, Any]]:
    import timm  # an optional dependency, which takes seconds

    if name.scheme == "timm" and not timm.is_model(name.name):
        raise _unknown(name, timm.list_models())
    source = f"hf-hub:{name.name}" if name.scheme == "hf-hub" else name.name
    fetched = name.scheme == "hf-hub" or name.weights is not None
    with _without_retries() if fetched else contextlib.nullcontext():
        model = timm.create_model(source, pretrained=name.weights is not None, **name.arguments)
    return model, timm_config(model)


@contextlib.contextmanager
def _without_retries() -> Iterator[None]:
    """Let the hub's client look only into its cache within the block if the hub's host is not known.

    It would try for 47 s otherwise. Behind a proxy, that knows the host.
    """
    from huggingface_hub import constants  # timm depends on it

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (getproxies() or _is_known(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_known(address: str) -> bool:
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, None))
    except OSError:
        return False


def _build_of_torchvision(name: ModelName) -> tuple[nn.Module, Mapping[str, Any]]:
    from torchvision import models  # an optional dependency

    if name.name.lower() not in models.list_models():
        raise _unknown(name, models.list_models())
    builder = models.get_model_builder(name.name)
    known = models.get_model_weights(builder)
    weights = None if name.weights is None else _weights(name, known.__members__)
    arguments: dict[str, Any] = {"weights": weights}
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None  # of which torchvision would fetch trained ones
    model = builder(**{**arguments, **name.arguments})
    shown = weights or next(iter(known), None)  # what the trained model takes, the architecture does
    return model, {} if shown is None else _facts(shown.transforms())


def _weights(name: ModelName, known: Mapping[str, Any]) -> Any:
    """Return the weights of torchvision that a name asks for."""
    wanted = (name.weights or "").rpartition(".")[2]  # ResNet18_Weights.IMAGENET1K_V1 is one of their names
    if wanted not in known:
        raise SepconvertError(
            f"{name.text}: torchvision knows no such weights; expected one of {', '.join(known)}"
        )
    return known[wanted]


def _facts(preset: object) -> Mapping[str, Any]:
    """Return what the preprocessing of torchvision says of the inputs; of videos and pairs, nothing."""
    sides: Sequence[int] = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None) or ()
    if len(sides) != 1:
        return {}
    found = {key: getattr(preset, key, None) for key in ("mean", "std")}
    return {"input_size": (3, sides[0], sides[0]), **found}


def _normalisation(model: nn.Module, facts: Mapping[str, Any]) -> Normalisation | None:
    """Return the normalisation among the facts about a model; None if its images have other channels."""
    mean, std = (tuple(map(float, facts.get(key) or ())) for key in ("mean", "std"))
    first = next((each for each in unshadowed(model).modules() if isinstance(each, nn.Conv2d)), None)
    fits = first is None or first.in_channels == len(mean)
    return Normalisation(mean, std) if mean and len(mean) == len(std) and fits else None


def _unknown(name: ModelName, known: Iterable[str]) -> SepconvertError:
    """Return the error that names the models that are called most like an unknown one."""
    architecture = name.name.partition(".")[0].lower()
    near = difflib.get_close_matches(architecture, known, _SUGGESTED, 0.5)
    advice = f"the nearest are {', '.join(near)}" if near else "its documentation lists them"
    return SepconvertError(f"{name.text}: {name.library} knows no such model; {advice}")


def _not_built(name: ModelName, error: Exception) -> SepconvertError:
    """Return the error to raise when a library fails: to fetch something, or to build the model."""
    reasons = [each for each in _causes(error) if isinstance(each, OSError)]
    if reasons:
        what = "it" if name.scheme == "hf-hub" else "its weights"
        return SepconvertError(
            f"{name.text}: {name.library} cannot fetch {what} ({_reason(reasons)}); connect to the network "
            "and check the name, or pass the file of the weights, with the `factory` that builds the model"
        )
    return SepconvertError(
        f"{name.text}: {name.library} cannot build it ({one_line(error)}); check the name and its arguments"
    )


def _reason(errors: Sequence[OSError]) -> str:
    """Return why something was not fetched: what lies at the bottom of the errors, the latest one first."""
    # The hub's client tells of this as of a setting of the user's, which it is not.
    if any(type(each).__name__ == "OfflineModeIsEnabled" for each in errors):
        return "there is no connection to its host, and no copy of it in the cache"
    return one_line(errors[-1])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from or while they were handled."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
