"""Copies of models, and what is no model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.network.copies import checked, duplicate, evaluation_mode, private_copy, quick_copy


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (5, "model: expected a torch.nn.Module, got 5; pass"),
        (nn.Conv2d, "model: expected a torch.nn.Module, got <class 'torch.nn"),
        (nn.Conv2d(4, 4, 3).state_dict(), r"model: expected a torch.nn.Module, got OrderedDict\("),
        (nn.Conv2d(4, 4, 3, device="meta"), "weight has no data"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), "weight is complex"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), r"^0\.weight has no shape yet; run the model"),
    ],
)
def test_what_is_no_model(model, message):
    with pytest.raises(SepconvertError, match=message) as caught:
        checked(model)
    assert "\n" not in str(caught.value)


def test_wrappers_are_taken_off():
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    assert checked(nn.DataParallel(model)) is model
    assert checked(torch.compile(model)) is model
    inner = nn.Sequential(torch.compile(model), nn.ReLU())
    assert type(duplicate(inner)[0]) is nn.Sequential


def test_flags_of_training_come_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_duplicate_copies_activations_that_modules_keep():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kept = nn.Conv2d(3, 3, 3), {}

        def forward(self, x):
            self.last = self.conv(x)
            self.kept["all"] = [self.last]
            return self.last

    model = Keeping()
    model(torch.randn(1, 3, 8, 8))
    copied = duplicate(model)
    assert torch.equal(copied.last, model.last)
    assert copied.kept["all"][0] is copied.last
    assert copied.conv.weight is not model.conv.weight


def norms():
    """Modules whose weight is computed, by a parametrisation or by a hook."""
    return {
        "plain": lambda: nn.Conv2d(3, 4, 3),
        "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(3, 4, 3)),
        "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
        "old weight norm": lambda: torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)),
    }


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", norms().values(), ids=norms())
def test_private_copies_leave_the_model_alone(make):
    model, x = nn.Sequential(make(), nn.BatchNorm2d(4)).train(), torch.randn(1, 3, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    private = private_copy(model)
    assert not any(module.training for module in private.modules())
    private.double()(x.double())
    private_copy(model, torch.float64)(x.double())
    assert all(
        module.training or isinstance(module, parametrize.ParametrizationList) for module in model.modules()
    )
    after = model.state_dict()
    assert all(
        torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items()
    )


def test_a_quick_copy_of_a_model_with_tensors_of_rank_5():
    """They have no layout with channels last."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Unflatten(1, (1, 8)), nn.Conv3d(1, 2, 3)).eval()
    images = torch.randn(2, 3, 12, 12)
    assert torch.allclose(quick_copy(model, images)(images), model(images), atol=1e-5)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Conv2d(3, 8, 3)
    (parameter, _) = private_copy(model).parameters()
    assert not parameter.is_inference()
    assert torch.equal(parameter, model.weight)


def test_a_module_that_refuses_to_be_copied_is_named_with_its_reason():
    class Single(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is one of its kind")

    message = r"the model cannot be copied: RuntimeError: there is one of its kind; .* copy.deepcopy\(model\)"
    with pytest.raises(SepconvertError, match=message):
        sepconvert.convert(nn.Sequential(Single(3, 4, 3)), torch.rand(1, 3, 8, 8))
