"""Modules whose classes use names of `nn.Module` for themselves."""

import copy

import pytest
import torch
from shadows import NAMES, AnswersAll, Compared, all_shadowed, shadowing_net
from torch import nn

from sepconvert.base.modules import (
    deep_copy,
    has,
    hashable,
    modules,
    named_modules,
    put,
    submodule,
    unshadowed,
)


def nested() -> nn.Module:
    """A model without shadows, in which a module is shared, and one is missing."""
    shared = nn.Conv2d(3, 3, 1)
    inner = nn.Sequential(shared, nn.ReLU())
    inner.register_module("absent", None)
    return nn.Sequential(inner, shared, nn.Sequential(shared))


@pytest.mark.parametrize("duplicates", [False, True])
def test_modules_are_those_of_torch(duplicates):
    model = nested()
    expected = list(model.named_modules(remove_duplicate=not duplicates))
    assert list(named_modules(model, duplicates=duplicates)) == expected


def test_a_path_leads_to_a_module_and_can_be_given_another():
    model = nested()
    assert submodule(model, "") is model
    assert submodule(model, "0.1") is model[0][1]
    put(model, "2.0", identity := nn.Identity())
    assert model[2][0] is identity
    for absent in ("0.7", "0.absent"):
        with pytest.raises(KeyError):
            submodule(model, absent)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")
def test_a_model_without_shadows_stands_for_itself():
    model = nested()
    assert unshadowed(model) is model
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    assert unshadowed(scripted) is scripted


@pytest.mark.parametrize("name", NAMES)
def test_one_name(name):
    model, plain = shadowing_net([name]), shadowing_net([])
    facade = unshadowed(model)
    assert list(facade.state_dict()) == list(plain.state_dict())
    assert [path for path, _ in facade.named_modules()] == [path for path, _ in plain.named_modules()]
    assert vars(model)[name] == [name]


def test_all_names_at_once_and_what_a_facade_does_to_the_model():
    model, x = all_shadowed(), torch.rand(2, 3, 8, 8)
    before = [value.clone() for value in unshadowed(model).state_dict().values()]
    expected = model(x)
    facade = unshadowed(model)
    assert torch.equal(facade(x), expected)
    facade.to(torch.float64).eval()
    assert model.stem.weight.dtype == model.block.norm.running_mean.dtype == torch.float64
    assert not any(module.training for module in modules(model))
    facade.load_state_dict({name: torch.zeros_like(value) for name, value in facade.state_dict().items()})
    assert not model(x.double()).any()
    facade.load_state_dict(dict(zip(facade.state_dict(), before, strict=True)))
    copied = copy.deepcopy(facade)
    assert torch.equal(copied(x.double()), facade(x.double()))
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(facade.parameters()).any()


class Renamed(nn.Module):
    """A class that defines a name for itself, as a value, a property or a function."""

    modules = ()

    @property
    def children(self) -> int:
        return 3

    def parameters(self, scale: float) -> float:
        return 2 * scale

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_names_that_a_class_defines():
    facade = unshadowed(nn.Sequential(Renamed()))
    assert [path for path, _ in facade.named_modules()] == ["", "0", "0.layer"]
    assert len(list(facade.parameters())) == 2


def test_functions_that_refuse_to_change_the_mode_are_no_shadows():
    exported = torch.export.export(nn.Sequential(nn.ReLU()), (torch.rand(1),)).module()
    assert unshadowed(exported) is exported


def test_modules_that_cannot_be_hashed():
    model = nn.Sequential(Compared(), Compared())
    assert len(modules(model)) == 3
    with hashable(model):
        assert len({model[0], model[1]}) == 2
    with pytest.raises(TypeError, match="unhashable"):
        hash(model[0])
    assert [path for path, _ in unshadowed(model).named_modules()] == ["", "0", "1"]


def test_modules_that_answer_any_name():
    model = nn.Sequential(AnswersAll(), nn.Identity())
    model[0].layer = nn.Linear(2, 2)
    assert model[0].nothing == "anything"
    copied = deep_copy(model, {})
    assert type(copied[0]) is AnswersAll
    assert torch.equal(copied[0].layer.weight, model[0].layer.weight)
    assert copied[0].layer is not model[0].layer
    assert copied[0].nothing == "anything"
    assert has(model[0], "layer")
    assert has(model[0].layer, "weight")
    assert not has(model[0], "nothing")
