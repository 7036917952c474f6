"""State_dicts: found in what a file holds, and loaded into the model that takes them."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError, one_line, some_of
from sepconvert.base.modules import unshadowed

Content = nn.Module | Mapping[str, Tensor]
"""What a model file holds: a module or a state_dict."""

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema",
)


_MOST_GLOBS, _LONGEST_GLOB = 3, 60  # that a message suggests


def unwrapped_content(content: object, path: Path) -> Content:
    """Return the module or the state_dict within the dictionaries of a checkpoint."""
    for _ in range(8):  # a hostile wrapper may hold itself
        if isinstance(content, nn.DataParallel | nn.parallel.DistributedDataParallel):
            content = content.module
        if isinstance(content, nn.Module):
            return content
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping | nn.Module)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise SepconvertError(f"{path}: holds a {type(content).__name__}; expected a module or a state_dict")
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise SepconvertError(
            f"{path}: holds no weights, only {some_of(map(str, content)) or 'an empty dict'}; "
            "expected a module or a state_dict"
        )
    return {str(key): value for key, value in content.items()}


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: Path, ignored: Sequence[str]
) -> tuple[str, ...]:
    """Load weights into a model in place, and return what the user must know of it.

    Raises:
        SepconvertError: they do not fit; the message says where.
    """
    expected = unshadowed(model).state_dict()
    stored, own = _float_dtypes(weights), _float_dtypes(expected)
    names = {_plain_key(key, expected): key for key in weights}
    plain = {key: weights[name] for key, name in names.items()}
    if "n_averaged" not in expected:  # of torch.optim.swa_utils.AveragedModel
        plain.pop("n_averaged", None)
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
        for key, value in plain.items()
        if isinstance(value, Tensor)
        and isinstance(expected.get(key), Tensor)
        and value.shape != expected[key].shape
    ]
    try:
        missing, unexpected = unshadowed(model).load_state_dict(plain, strict=False)
    except Exception as error:  # size mismatches, and whatever load hooks of user code raise
        problem = f"has shapes that differ: {some_of(shapes)}" if shapes else one_line(error)
        raise _unfit(path, problem) from error
    # The model itself says which keys it lacks: its load hooks may take more than its state_dict has. A glob
    # is for a key as the message below shows it, or as it is stored.
    matching = {
        key: [glob for glob in ignored if fnmatchcase(key, glob) or fnmatchcase(names.get(key, key), glob)]
        for key in unexpected
    }
    extra, left_out = ([key for key in unexpected if bool(matching[key]) is out] for out in (False, True))
    if missing or extra:
        found = {"lacks": missing, "also holds": extra}
        problem = " and ".join(f"{verb} {some_of(keys)}" for verb, keys in found.items() if keys)
        raise _unfit(path, problem, () if missing else _globs(extra, expected))
    notes = [
        f"`ignore_extra_keys` {quote(glob)} matches no key that the model lacks"
        for glob in ignored
        if not any(glob in globs for globs in matching.values())
    ]
    if left_out:
        keys = "key is" if len(left_out) == 1 else "keys are"
        notes.append(f"{len(left_out)} {keys} left out (`ignore_extra_keys`): {some_of(left_out)}")
    if len(stored) == len(own) == 1 and stored != own:
        given, taken = (str(dtype).removeprefix("torch.") for dtype in (*stored, *own))
        notes.append(f"{given} weights, in the {taken} model of `factory`")
    return tuple(f"{path}: {note}" for note in notes)


def _unfit(path: Path, problem: str, ignorable: Sequence[str] = ()) -> SepconvertError:
    """Return the error that says why weights do not fit, and by which globs the rest of them would."""
    options = "".join(f" `ignore_extra_keys` {quote(glob)}" for glob in ignorable)
    advice = f", or leave out what that model does not have:{options}" if ignorable else ""
    return SepconvertError(
        f"{path}: does not fit the model of `factory`: it {problem}; pass the `factory` that builds the "
        f"model which was trained{advice}"
    )


def _globs(extra: Sequence[str], own: Iterable[str]) -> list[str]:
    """Return a few globs that match all extra keys, and none that the model has, if that can be."""
    left, globs = list(extra), list[str]()
    while left and len(globs) < _MOST_GLOBS:
        first, last = left[0].partition(".")[0], left[0].rpartition(".")[2]
        families = [glob for glob in (f"{escape(first)}.*", f"*{escape(last)}") if not _matching(glob, own)]
        globs.append(max((escape(left[0]), *families), key=lambda glob: len(_matching(glob, left))))
        left = [key for key in left if not fnmatchcase(key, globs[-1])]
    # One for all is as safe: a key that the model has is never left out.
    return ["*"] if left or any(len(glob) > _LONGEST_GLOB for glob in globs) else globs


def _matching(glob: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if fnmatchcase(key, glob)]


def _float_dtypes(weights: Mapping[str, object]) -> set[torch.dtype]:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _plain_key(key: str, expected: Mapping[str, object]) -> str:
    """Return a key without the prefixes of torch.compile and DataParallel."""
    key = key if key in expected else key.replace("_orig_mod.", "")
    while key not in expected and key.startswith("module."):
        key = key.removeprefix("module.")
    return key
