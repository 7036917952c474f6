"""Fisher information of layers' outputs, against its definition."""

import torch
from torch import nn

from sepconvert.calibration.importance import BATCHES, fisher_information
from sepconvert.measure.divergence import Kind, Yardstick
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import traced


def images(count=512, size=1):
    generator = torch.Generator().manual_seed(0)
    return {n: InputBatch((torch.randn(count, 3, size, size, generator=generator),)) for n in range(BATCHES)}


def run(model, batches):
    """What the model returns for all batches, one after the other."""
    with torch.no_grad():
        return model(*InputBatch.joined(list(batches.values())).inputs)


def found_in(model, batches, **options):
    sites = traced(model, batches[0][:1].inputs).sites
    return fisher_information(model, batches, sites, seed=0, **options)


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_of_a_classifier_it_is_the_expected_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 3)).eval()
    batches = images()
    p = run(model, batches).double().softmax(1)
    by_logits = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    mixing = model[2].weight.detach().double()
    expected = mixing.T @ by_logits @ mixing
    # Labels are drawn: the error falls with the root of 2,048 images.
    assert distance(found_in(model, batches)["0"][0], expected) < 0.15


def test_positions_are_summed_and_groups_apart():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    batches = {
        n: InputBatch((torch.randn(128, 4, 5, 3, generator=torch.Generator().manual_seed(n)),))
        for n in range(4)
    }
    found = found_in(model.eval(), batches)["0"]
    p = run(model, batches).double().softmax(1)
    by_logits = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    # The gradient at each of 15 positions is a fifteenth of that of the mean.
    mixing = model[3].weight.detach().double() / 15
    expected = 15 * mixing.T @ by_logits @ mixing
    assert found.shape == (2, 3, 3)
    assert distance(found, torch.stack([expected[:3, :3], expected[3:, 3:]])) < 0.25


def test_of_pictures_it_is_that_of_the_squared_error():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 1).eval()
    # The error is Σ δ²/48 of an image; half of what is found is its second-order term.
    expected = 2 / 48 * 16 * torch.eye(3, dtype=torch.float64)
    assert distance(found_in(model, images(64, 4))[""][0], expected) < 0.25


def test_of_other_outputs_it_is_that_of_the_relative_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(2)).eval()
    batches = images(64, 4)
    variance = float(run(model, batches).var(correction=0))
    expected = 2 / (48 * variance) * 16 * torch.eye(3, dtype=torch.float64)
    assert distance(found_in(model, batches)["0"][0], expected) < 0.25


def test_of_sigmoids_it_is_the_expected_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Sigmoid()).eval()
    batches = images(128, 4)
    p = run(model, batches).double()
    mixing = model[1].weight.detach().double().flatten(1)
    # A mean over 2 × 16 values; the positions are summed.
    expected = mixing.T @ torch.diag((p * (1 - p)).mean((0, 2, 3)) / 2) @ mixing
    assert distance(found_in(model, batches)["0"][0], expected) < 0.15


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        found = self.last(self.body(x)).mean((2, 3))
        return found[:, :3], found[:, 3:] * 50


def test_several_outputs_share_it():
    torch.manual_seed(0)
    model = TwoHeads().eval()
    batches = images()
    logits, numbers = (each.double() for each in run(model, batches))
    yardstick = Yardstick((Kind("kl"), Kind("relative"))).measured_on([(logits, numbers)])
    found = found_in(model, batches, yardstick=yardstick)["body"][0]
    p = logits.softmax(1)
    mixing = model.last.weight.detach().double().flatten(1)
    by_logits = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    by_numbers = 50**2 * 2 / (2 * numbers.var(correction=0)) * torch.eye(2, dtype=torch.float64)
    expected = mixing.T @ torch.block_diag(by_logits, by_numbers) @ mixing / 2  # a mean of two
    assert distance(found, expected) < 0.15


def test_of_sequences_the_last_dimension_holds_the_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), Sequence()).eval()
    batches = images(128, 4)
    p = run(model, batches).double().exp()  # 4 steps × samples × classes
    by_logits = (torch.diag_embed(p) - p[..., :, None] * p[..., None, :]).mean((0, 1))
    mixing = model[1].weight.detach().double().flatten(1)
    # Each step is the mean of a column of 4, and the divergence that of 4 steps: 16 positions in all.
    expected = 16 / (4 * 4**2) * mixing.T @ by_logits @ mixing
    assert distance(found_in(model, batches)["0"][0], expected) < 0.15


class Sequence(nn.Module):
    def forward(self, y):
        return y.mean(2).permute(2, 0, 1).log_softmax(2)


def test_outputs_overwritten_in_place():
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.Flatten(), nn.Linear(4, 3)).eval()
        for inplace in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    plain, overwritten = (found_in(model, images())["0"] for model in models)
    torch.testing.assert_close(plain, overwritten)
    assert not models[0][0].weight.grad


class Rounded(nn.Module):
    """Nothing can be learnt of the layer before the rounding."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(self.a(x).detach().round()).flatten(1)


class Opaque(nn.Module):
    """In place upon a leaf: no gradient can be taken."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        with torch.inference_mode():
            return self.a(x).flatten(1).clone()


def test_where_no_gradient_comes():
    assert list(found_in(Rounded().eval(), images())) == ["b"]
    assert found_in(Opaque().eval(), images()) == {}
