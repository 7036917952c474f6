"""The moving average and what a checkpoint holds of the student."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.student import Student
from sepconvert.network.tensors import InputBatch


class Masked(nn.Module):
    """Two layers that share a weight, a mask that is infinite, and a count of calls."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]), persistent=False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return self.second(self.first(x).relu()) + self.mask


def student_of(model, **options):
    example = InputBatch((torch.ones(1, 3),))
    return Student(model, example, Accelerator(cpu=True), learning_rate=0.1, steps=400, **options)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return student_of(Masked())


def step(student):
    student.backward(student.run(InputBatch((torch.ones(2, 3),)))[:, 0].sum())
    student.step(0.1)


def test_the_average_follows_sooner_at_first(student):
    expected = student.module.first.weight.detach().clone()
    for weight in (9 / 10, 9 / 11, 9 / 12):
        step(student)
        expected = expected.lerp(student.module.first.weight.detach(), weight)
        assert torch.equal(student.average.module.first.weight, expected)
    for _ in range(200):
        step(student)
    expected = student.average.module.first.bias.detach().clone()
    step(student)
    expected = expected.lerp(student.module.first.bias.detach(), 1 / 20)  # a twentieth of the 400 steps
    torch.testing.assert_close(student.average.module.first.bias, expected)


def test_buffers_are_averaged_or_copied(student):
    step(student)
    assert torch.equal(student.average.module.mask, torch.tensor([0.0, -math.inf, 0.0]))
    assert student.average.module.calls == student.module.calls


def test_what_is_loaded_goes_on_alike(student):
    for _ in range(3):
        step(student)
    torch.manual_seed(1)
    other = student_of(Masked())
    other.load({name: tensor.clone() for name, tensor in student.tensors().items()})
    for each in (student, other):
        step(each)
    assert student.tensors().keys() == other.tensors().keys()
    for name, tensor in student.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_nothing_to_train():
    with pytest.raises(SepconvertError, match="`student`: expected parameters that require a gradient"):
        student_of(nn.Linear(3, 3).requires_grad_(False))


def test_gradients_of_several_batches_add_up():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for parts in ([x], x.split(1)):
        torch.manual_seed(0)
        each = student_of(nn.Linear(3, 2))
        for _ in range(2):  # the second step must not know the gradients of the first
            for number, part in enumerate(parts, start=1):
                with each.accumulating(last=number == len(parts)):
                    each.backward(each.run(InputBatch((part,))).square().sum())
            each.step(0.1)
        found.append(each.module.weight.detach())
    torch.testing.assert_close(*found)


def test_statistics_of_single_samples_are_not_taken():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert student_of(model).module[1].training
    assert not student_of(model, renews_statistics=False).module[1].training
