"""State_dicts that are loaded into the model of a factory: keys that it lacks, and keys that they lack."""

import re
from pathlib import Path
from shlex import split

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.files.models.weights import load_weights

PATH = Path("m.pth")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)


TRAINED = Net()
WEIGHTS = TRAINED.state_dict()
COUNTS = {f"{name}.total_{what}": torch.zeros(1) for name in ("stem.0", "fc") for what in ("ops", "params")}
COUNTS |= {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
EMA = {f"ema.{key}": value for key, value in WEIGHTS.items()}
HEAD = {"head.weight": torch.ones(3, 4), "head.bias": torch.ones(3)}


def load(extra, *globs, prefix=""):
    """Load the weights and extra ones into another net, and return it with the notes."""
    model = Net()
    weights = {f"{prefix}{key}": value for key, value in (WEIGHTS | extra).items()}
    return model, load_weights(model, weights, PATH, globs)


def assert_trained(model):
    for key, value in model.state_dict().items():
        assert torch.equal(value, WEIGHTS[key])


def suggested(error):
    """Return the globs that a message suggests, as a shell would read them."""
    words = split(str(error.value).rpartition(": ")[2])
    assert set(words[::2]) == {"`ignore_extra_keys`"}
    return words[1::2]


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("extra", "globs"),
    [
        (HEAD, ["head.*"]),
        (COUNTS, ["*total_ops", "*total_params"]),
        (EMA, ["ema.*"]),
        (HEAD | EMA | COUNTS, ["*"]),  # more globs than are worth typing
        ({"stem.1.old_buffer": torch.ones(1)}, ["stem.1.old_buffer"]),
        ({"a[0].weight": torch.ones(1)}, ["a[[]0].weight"]),
        ({"it's": torch.ones(1), "epoch": 3}, ["it's", "epoch"]),
        ({f"{'deep.' * 30}{key}": torch.ones(1) for key in "ab"}, ["deep.*"]),
    ],
)
def test_the_refusal_of_extra_keys_names_globs_that_leave_them_out(extra, globs, prefix):
    with pytest.raises(SepconvertError, match=r"also holds .*; pass the `factory` .*, or leave out") as error:
        load(extra, prefix=prefix)
    assert suggested(error) == globs
    model, notes = load(extra, *globs, prefix=prefix)
    assert_trained(model)
    keys = "1 key is" if len(extra) == 1 else f"{len(extra)} keys are"
    (note,) = notes
    told, _, first = note.partition("`): ")
    assert told == f"m.pth: {keys} left out (`ignore_extra_keys"
    assert any(first.startswith(key[:40]) for key in extra)


def test_globs_are_for_keys_as_they_are_stored_too():
    for glob in ("module.head.*", "head.*"):
        assert_trained(load(HEAD, glob, prefix="module.")[0])


def test_keys_that_no_glob_matches_are_refused():
    with pytest.raises(SepconvertError, match=r"it also holds head\.weight, head\.bias; ") as error:
        load(HEAD | EMA, "ema.*")
    assert suggested(error) == ["head.*"]


def test_keys_that_the_model_has_are_never_left_out():
    model, notes = load(HEAD, "*")
    assert_trained(model)
    assert notes == ("m.pth: 2 keys are left out (`ignore_extra_keys`): head.weight, head.bias",)
    with pytest.raises(SepconvertError, match=r"shapes that differ: fc\.bias \(3,\) for \(2,\)"):
        load({"fc.bias": torch.ones(3)}, "*")


def test_a_glob_that_matches_nothing_is_told_of():
    model, notes = load({}, "total_*", "fc.*")
    assert_trained(model)
    assert notes == tuple(
        f"m.pth: `ignore_extra_keys` {glob} matches no key that the model lacks"
        for glob in ("'total_*'", "'fc.*'")
    )


def test_missing_keys_are_an_error_whatever_is_ignored():
    """The refusal suggests no glob: what is missing may be among the extra keys, by another name."""
    for globs in ((), ("*",)):
        weights = {key: value for key, value in (WEIGHTS | HEAD).items() if key != "fc.bias"}
        with pytest.raises(
            SepconvertError, match=r"it lacks fc\.bias.*that builds the model which was trained$"
        ):
            load_weights(Net(), weights, PATH, globs)


class Renamed(Net):
    """Takes weights by the names of an older version."""

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, *_):
        for key in [key for key in state if key.startswith("old_fc.")]:
            state[key.removeprefix("old_")] = state.pop(key)


def test_keys_that_a_hook_takes_are_not_left_out():
    model = Renamed()
    weights = {re.sub("^fc", "old_fc", key): value for key, value in WEIGHTS.items()}
    assert load_weights(model, weights | HEAD, PATH, ["*"]) == (
        "m.pth: 2 keys are left out (`ignore_extra_keys`): head.weight, head.bias",
    )
    assert_trained(model)
