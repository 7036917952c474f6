"""Distillation of small networks; two networks that differ by noise stand for a conversion."""

import copy

import pytest
import torch
from distillation_worker import (
    STEPS_PER_EPOCH,
    assert_same,
    disturbed,
    loader,
    network,
    run_worker,
    same,
    tuned,
    untimed,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Task
from sepconvert.cli.demo import images, net
from sepconvert.distillation.training import finetune
from sepconvert.factorize.border import Border
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.measure.divergence import Kind, Yardstick, outputs, relative_error
from sepconvert.measure.metrics.evaluation import evaluate
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import InputBatch


def disturbed_copy(layer, model):
    """A copy of `model` whose `layer` is off by noise."""
    place = next(name for name, module in model.named_modules() if module is layer)
    result, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in result.get_submodule(place).parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return result


@torch.no_grad()
def mean_divergence(original, converted, batches):
    """The divergence of `converted` from `original` over a data set."""
    total = 0.0
    for x, _ in batches:
        expected, actual = (outputs(model, InputBatch((x,))) for model in (original, converted))
        total += len(x) * float(Yardstick((Kind("kl"),)).divergence(expected, actual))
    return total / len(batches.dataset)


# Results -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_network_recovers():
    teacher = net.load()
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (student.head.conv, student.narrow.conv, student.widen.conv):
            layer.weight *= 1 + 2 * torch.randn(layer.weight.shape, generator=generator)

    digits, unseen = images.training_data(384), images.evaluation_data(128)
    x, y = net.to_input(digits.x), torch.from_numpy(digits.y)
    train, heldout = (DataLoader(TensorDataset(x[a:b], y[a:b]), 32) for a, b in ((0, 320), (320, 384)))
    unseen = DataLoader(TensorDataset(net.to_input(unseen.x), torch.from_numpy(unseen.y)), 32)
    result = finetune(student, teacher, train, heldout, epochs=3, labelled=False)
    before, after = (mean_divergence(teacher, model, unseen) for model in (student, result.model))
    assert after < before / 10
    assert evaluate(result.model, unseen).accuracy().top1 > evaluate(student, unseen).accuracy().top1 + 0.3


@pytest.mark.parametrize(("learning_rate", "weights"), [(0.1, "trained"), (0.08, "average")])
def test_what_is_delivered_is_what_the_history_says(learning_rate, weights):
    result = tuned(epochs=4, learning_rate=learning_rate)
    assert result.delivered.weights == weights
    assert result.delivered != result.history[-1]  # else later epochs could not have spoilt it
    teacher, heldout = network(), loader(21, seed=1)
    assert [epoch.step for epoch in result.history] == [0, *(STEPS_PER_EPOCH * n for n in range(1, 5))]
    assert result.delivered == min(result.history, key=lambda epoch: epoch.heldout_loss)
    assert result.delivered.divergence < result.history[0].divergence
    measured = mean_divergence(teacher, result.model, heldout)
    assert measured == pytest.approx(result.delivered.divergence, rel=1e-4)
    accuracy = evaluate(result.model, heldout).accuracy().top1
    assert accuracy == pytest.approx(result.delivered.accuracy)
    assert result.stopped is None
    assert result.to_dict()["delivered"]["divergence"] == result.delivered.divergence


def test_never_worse_than_the_start():
    result = tuned(learning_rate=30.0)  # leads far away
    assert all(epoch.heldout_loss > result.history[0].heldout_loss for epoch in result.history[1:])
    assert result.delivered == result.history[0]
    assert_same(result.model, disturbed(network()))


def test_inputs_are_left_alone_and_the_result_is_like_the_student():
    teacher, student = network().train(), disturbed(network())
    student[2].train()  # a mixture of modes
    calls = []
    student[3].register_forward_hook(lambda *_: calls.append(1))
    students, teachers = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    random = torch.get_rng_state()
    result = finetune(student, teacher, loader(), loader(), epochs=1, labelled=True, learning_rate=1e-2)
    assert_same(student, students)
    assert_same(teacher, teachers)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())
    assert [m.training for m in student.modules()] == [m.training for m in result.model.modules()]
    assert [m.training for m in student.modules()] == [False, False, False, True, *[False] * 4]
    assert all(module.training for module in teacher.modules())
    assert not same(result.model, student)
    calls.clear()
    result.model(torch.zeros(1, 3, 8, 8))
    assert calls == [1]
    strides = [tensor.stride() for tensor in student.state_dict().values()]
    assert [tensor.stride() for tensor in result.model.state_dict().values()] == strides


def test_frozen_parameters_stay_as_they_are():
    teacher, student = network(), disturbed(network())
    student[0].requires_grad_(False)
    student[1].requires_grad_(False)
    result = finetune(student, teacher, loader(), loader(), epochs=1, labelled=False, learning_rate=1e-2)
    for index in (0, 1):  # the statistics of a frozen BatchNorm too
        assert_same(result.model[index], student[index])
        assert not any(parameter.requires_grad for parameter in result.model[index].parameters())
    assert not same(result.model[3], student[3])


def test_the_seed_decides():
    a, b, other = tuned(seed=3), tuned(seed=3), tuned(seed=4)
    assert_same(a.model, b.model)
    assert untimed(a.history) == untimed(b.history)
    assert not same(a.model, other.model)


def test_dropout_is_off():
    teacher, student = (nn.Sequential(*model, nn.Dropout(0.9)) for model in (network(), disturbed(network())))
    a, b = (finetune(student, teacher, loader(), loader(), epochs=1, labelled=False) for _ in range(2))
    assert_same(a.model, b.model)


def test_labels_are_used_where_there_are_any():
    unlabelled = tuned(labelled=False)
    assert unlabelled.delivered.accuracy is None
    assert not same(tuned(labelled=True).model, unlabelled.model)
    teacher = network()
    without = loader(labels=False)
    heldout = loader(21, seed=1)
    options = {"epochs": 3, "learning_rate": 1e-2}
    a = finetune(disturbed(teacher), teacher, without, heldout, labelled=True, **options)
    # The same steps, of which labels may choose others.
    assert [epoch.loss for epoch in a.history] == [epoch.loss for epoch in unlabelled.history]
    assert a.delivered.accuracy is not None


class Flattening(nn.Module):
    """Takes one layout of memory alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 4)

    def forward(self, x):
        return self.last(self.conv(x).view(len(x), -1))


def test_a_model_that_views_tensors_is_trained_too():
    torch.manual_seed(0)
    teacher, student = Flattening().eval(), Flattening().eval()
    result = finetune(student, teacher, loader(), loader(4), epochs=2, labelled=False, learning_rate=1e-2)
    assert result.delivered.divergence < result.history[0].divergence


def test_half_precision_models_stay_what_they_are():
    teacher, student = network().bfloat16(), disturbed(network()).bfloat16()
    result = finetune(student, teacher, loader(), loader(), epochs=2, labelled=False, learning_rate=1e-2)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.delivered.divergence < result.history[0].divergence


class Several(nn.Module):
    """Logits of each pixel, or a mapping of two outputs that are no logits."""

    def __init__(self, body, mapping):
        super().__init__()
        self.body = body
        self.mapping = mapping

    def forward(self, x):
        y = self.body(x)
        return (
            {"picture": y, "sizes": (y.mean(dim=(1, 2, 3)), torch.zeros(3, dtype=torch.int64))}
            if self.mapping
            else y
        )


@pytest.mark.parametrize("mapping", [False, True])
def test_outputs_other_than_a_row_of_logits(mapping):
    teacher, student = (Several(model[:4], mapping).eval() for model in (network(), disturbed(network())))
    result = finetune(student, teacher, loader(), loader(), epochs=2, labelled=False, learning_rate=5e-2)
    assert result.delivered.divergence < result.history[0].divergence / 2


def test_features_of_replaced_layers_are_followed():
    teacher = network()
    spec = ConvSpec(6, 6, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "zeros", True)
    layer = FactorizedConv2d(spec, "output-subspace", 2, Border())
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(c.weight.shape, generator=generator) / 4 for c in layer.convolutions]
    layer.set_factors(weights, teacher[3].bias.detach())
    student = copy.deepcopy(teacher)
    student[3] = layer

    @torch.no_grad()
    def error(model):
        (x, _) = loader().dataset.tensors
        return float((model[:4](x) - teacher[:4](x)).square().mean())

    plain, followed = (
        finetune(student, teacher, loader(), loader(), epochs=3, labelled=False, feature_weight=weight,
                 learning_rate=1e-2)
        for weight in (0.0, 100.0)
    )  # fmt: skip
    assert error(followed.model) < 0.9 * error(plain.model)
    with pytest.raises(SepconvertError, match="`feature_weight`: expected replaced layers"):
        finetune(teacher, teacher, loader(), loader(), epochs=1, labelled=False, feature_weight=1)


class Embedded(nn.Module):
    """A row of logits from an embedding, by way of a classifier that may be another kind of layer."""

    def __init__(self, linear):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.last = nn.Linear(6, 4) if linear else nn.Conv2d(6, 4, 1)

    def embed(self, x):
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x):
        embedding = self.embed(x)
        if isinstance(self.last, nn.Linear):
            return self.last(embedding)
        return self.last(embedding[..., None, None]).flatten(1)


def test_what_the_classifier_is_given_is_followed():
    """At equal logits the embedding still differs where the classifier does not look."""

    def farther(linear):
        torch.manual_seed(0)
        teacher = Embedded(linear)
        with torch.no_grad():
            teacher.last.weight[:, 3:] = 0
        student = disturbed_copy(teacher.conv, teacher)
        result = finetune(
            student, teacher, loader(), loader(21), epochs=4, labelled=False, learning_rate=2e-2
        )
        x = loader(40, seed=3).dataset.tensors[0]
        with torch.no_grad():
            unseen = [model.embed(x)[:, 3:] for model in (teacher, student, result.model)]
        return relative_error(unseen[0], unseen[2]) / relative_error(unseen[0], unseen[1])

    assert farther(linear=True) < 0.5
    assert farther(linear=False) > 0.9


def test_progress_counts_every_step():
    steps = []
    tuned(progress=steps.append)
    assert [step.step for step in steps] == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    assert {step.steps for step in steps} == {3 * STEPS_PER_EPOCH}
    assert [step.epoch for step in steps] == [epoch for epoch in (1, 2, 3) for _ in range(STEPS_PER_EPOCH)]
    assert steps[-1].seconds_left == 0 < steps[0].seconds_left


# Other tasks ---------------------------------------------------------------------------------------


class Restorer(nn.Module):
    """A picture of one channel, in units of its own."""

    def __init__(self, seed=0, unit=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.unit = unit

    def forward(self, x):
        return self.unit * self.last(self.first(x).relu())


def near(model, seed=1):
    """A copy of a model that is off by noise."""
    result, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return result.eval()


def pictures(count=24, size=(8, 8), seed=0, batch_size=4, target=None):
    x = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    y = torch.full((count,), -1) if target is None else target(x)
    return DataLoader(TensorDataset(x, y), batch_size)


def retrained(student, teacher, data=None, heldout=None, **options):
    options = {"epochs": 2, "labelled": False, "learning_rate": 1e-2} | options
    return finetune(student, teacher, data or pictures(), heldout or pictures(seed=1), **options)


def test_pictures_are_met_in_whatever_unit():
    """The rate of learning and the steps do not depend on it, but the divergence does."""
    plain, scaled = (
        retrained(near(model), model) for model in (Restorer().eval(), Restorer(unit=1024.0).eval())
    )
    assert plain.delivered.divergence < plain.history[0].divergence / 2
    assert [epoch.heldout_loss for epoch in scaled.history] == pytest.approx(
        [epoch.heldout_loss for epoch in plain.history], rel=1e-3
    )
    assert scaled.delivered.divergence == pytest.approx(1024**2 * plain.delivered.divergence, rel=1e-3)


class Varying(torch.utils.data.Dataset):
    """Pictures of their own size each."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 8 + index % 3, 9, generator=generator), -1


def test_images_of_several_sizes():
    steps = []
    teacher = Restorer().eval()
    data, heldout = DataLoader(Varying(20)), DataLoader(Varying(5))
    result = retrained(near(teacher), teacher, data, heldout, progress=steps.append)
    assert steps[-1].steps == 2 * 3  # of at most 8 images each
    assert result.delivered.divergence < 0.8 * result.history[0].divergence


class Pair(nn.Module):
    """Two pictures in, and a row and a picture out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.last = Restorer(1), nn.Linear(64, 5)

    def forward(self, left, right):
        found = self.one(left) - self.one(right)
        return {"classes": self.last(found.flatten(1)), "difference": found}


def test_several_inputs_and_outputs():
    teacher = Pair().eval()
    left, right = (pictures(seed=seed).dataset.tensors[0] for seed in (0, 1))
    pairs = [((a, b), -1) for a, b in zip(left, right, strict=True)]
    result = retrained(near(teacher), teacher, DataLoader(pairs, 4), DataLoader(pairs[:8], 4))
    assert result.delivered.divergence < result.history[0].divergence / 2


class Reader(nn.Module):
    """Sequences, time × samples × features, in and out; normalised or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.GRU(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.inner(x)[0]).log_softmax(2)


def test_time_may_come_first():
    teacher = Reader().eval()

    def together(samples):
        return torch.stack([x for x, _ in samples], 1), torch.full((len(samples),), -1)

    x = torch.randn(24, 7, 6, generator=torch.Generator().manual_seed(0))
    data, heldout = (
        DataLoader(TensorDataset(part, part), 4, collate_fn=together) for part in (x[:16], x[16:])
    )
    result = retrained(near(teacher), teacher, data, heldout, task=Task(batch_dim=1), epochs=6)
    assert result.delivered.divergence < result.history[0].divergence / 2
    with torch.no_grad():
        expected, actual = (model(x[16:].transpose(0, 1)) for model in (teacher, result.model))
    kl = (expected.exp() * (expected - actual)).sum(2).mean()
    assert result.delivered.divergence == pytest.approx(float(kl), rel=1e-4)


def test_the_kind_may_be_said():
    teacher = network()
    found = retrained(
        disturbed(teacher), teacher, loader(), loader(), task=Task(divergence="squared"), epochs=1
    )
    x = loader().dataset.tensors[0]
    with torch.no_grad():
        expected = float((teacher(x) - disturbed(teacher)(x)).square().mean())
    assert found.history[0].divergence == pytest.approx(expected, rel=1e-4)


def test_the_users_loss_is_followed():
    """Away from the teacher, where the targets say so; pictures stay as they are for them."""
    teacher, shown = Restorer().eval(), []

    def target(x):
        return x.mean(1, keepdim=True)

    def own(outputs, y):
        shown.append((len(y), y))
        return 300 * (outputs - y).square().mean()

    data, heldout = (pictures(count=64, seed=seed, target=target) for seed in (0, 1))
    result = retrained(near(teacher), teacher, data, heldout, task=Task(loss=own), epochs=3)

    def error(model):
        x, y = heldout.dataset.tensors
        with torch.no_grad():
            return float((model(x) - y).square().mean())

    assert error(result.model) < 0.8 * error(teacher)
    assert {size for size, _ in shown} == {1, 4}  # once alone, before the first step


@pytest.mark.parametrize(("labels", "moved"), [(False, False), (True, True)])
def test_pictures_do_not_move_from_under_their_targets(labels, moved):
    teacher = Restorer().eval()
    data = pictures(target=lambda x: torch.arange(len(x)) if labels else x[:, :1])
    given = []

    def watch(module, inputs):
        given.append(inputs[0].clone())

    teacher.register_forward_pre_hook(watch)
    retrained(near(Restorer()), teacher, data, data, task=Task(loss=lambda out, y: out.mean() * 0), epochs=1)
    known = {tuple(x.flatten().tolist()) for x in data.dataset.tensors[0]}
    seen = [tuple(x.flatten().tolist()) in known for batch in given for x in batch]
    assert all(seen) != moved


def test_a_loss_that_fails_ends_before_the_first_step():
    steps = []
    teacher = Restorer().eval()
    with pytest.raises(SepconvertError, match=r"`loss`: failed with IndexError.*int64 of shape \(1,\)"):
        retrained(teacher, teacher, task=Task(loss=lambda out, y: y[3]), progress=steps.append)
    assert not steps


# Failures ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_training():
    heldout = loader(21, seed=1)
    bad = loader()
    bad.dataset.tensors[0][5] = float("nan")
    teacher, student = network(), disturbed(network())
    result = finetune(student, teacher, bad, heldout, epochs=1, labelled=False)
    assert result.stopped.startswith("the loss was nan at step ")
    assert_same(result.model, student)
    with pytest.raises(SepconvertError, match="expected finite outputs on held-out data"):
        finetune(student, teacher, heldout, bad, epochs=1, labelled=False)


def of(n, channels=3, label=0, dtype=torch.int64):
    return DataLoader(TensorDataset(torch.zeros(n, channels, 8, 8), torch.full((n,), label, dtype=dtype)), 8)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs`: expected a whole number from 1, got 0"),
        ({"learning_rate": -1.0}, "`learning_rate`: expected a number above 0"),
        ({"temperature": float("nan")}, "`temperature`: expected"),
        ({"feature_weight": -1.0}, "`feature_weight`: expected"),
        ({"checkpoint_every": 0}, "`checkpoint_every`: expected"),
        ({"resume": True}, "`resume`: expected a `checkpoint`"),
        ({"precision": "fp8000"}, "`precision`: expected one that this machine"),
        ({"data": of(0)}, "training data: expected a sample"),
        ({"data": DataLoader(Stream())}, "training data: expected a DataLoader that makes batches"),
        ({"data": DataLoader(torch.zeros(4, 3, 8, 8))}, r"data: expected batches of two \(x, y\)"),
        ({"data": of(8, channels=1)}, "data: expected inputs that the model takes"),
        ({"data": of(8, dtype=torch.float32)}, "labels: expected 1 integers"),
        ({"data": of(8, label=9)}, "labels: expected"),
        ({"heldout": loader(labels=False)}, "held-out data: expected labels"),
        ({"teacher": nn.Sequential(*network(), nn.Linear(4, 5))}, "outputs: expected"),
        ({"student": network().requires_grad_(False)}, "`student`: expected parameters"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, message):
    arguments = {
        "student": disturbed(network()),
        "teacher": network(),
        "data": loader(),
        "heldout": loader(),
        "epochs": 1,
        "labelled": True,
    } | options
    with pytest.raises(SepconvertError, match=message) as caught:
        finetune(**arguments)
    assert "\n" not in str(caught.value)


def test_a_student_that_equals_its_teacher_stays_what_it_is():
    teacher = network()
    for seed in range(6):  # divergences of equal answers are rounding, of either sign
        found = finetune(
            copy.deepcopy(teacher),
            teacher,
            loader(seed=seed),
            loader(seed=seed + 10),
            epochs=1,
            labelled=False,
        )
        assert 0 <= found.delivered.divergence < 1e-6
        assert_same(found.model, teacher)


# Processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_worker(tmp_path / "result", launcher=launcher)
    assert done.returncode == 0, done.stderr.decode()
    state, loss, accuracy, divergences, processes = torch.load(tmp_path / "result", weights_only=True)
    assert processes == 2
    alone = tuned(norm=False)
    assert loss == pytest.approx(alone.history[-1].loss, rel=1e-4)
    assert accuracy == pytest.approx(alone.history[-1].accuracy)
    assert divergences == pytest.approx([epoch.divergence for epoch in alone.history], rel=1e-3)
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_mixed_precision(tmp_path):
    # In a process of its own: Accelerate knows one precision for each.
    done = run_worker(tmp_path / "result", ACCELERATE_MIXED_PRECISION="bf16")
    assert done.returncode == 0, done.stderr.decode()
    _, loss, _, divergences, _ = torch.load(tmp_path / "result", weights_only=True)
    alone = tuned(norm=False)
    assert divergences[0] == alone.history[0].divergence
    assert min(divergences) < divergences[0]
    assert loss != alone.history[-1].loss
    assert loss == pytest.approx(alone.history[-1].loss, rel=0.02)
