"""How often the teacher runs."""

from distillation_worker import STEPS_PER_EPOCH, disturbed, loader, network

from sepconvert.distillation import teacher
from sepconvert.distillation.training import finetune


def runs(epochs, **options):
    """Batches that the teacher ran on, but for evaluations and trials of layout, outputs and classifier."""
    original, calls = network(), []
    original.register_forward_hook(lambda *_: calls.append(1))
    student = disturbed(network())
    finetune(student, original, loader(), loader(4), epochs=epochs, labelled=True, **options)
    return len(calls) - (epochs + 1) - 3


def test_the_teacher_runs_once_for_several_epochs(monkeypatch):
    assert runs(1) == STEPS_PER_EPOCH
    assert runs(3) == STEPS_PER_EPOCH
    assert runs(4) == 2 * STEPS_PER_EPOCH
    # A byte less than what 58 samples take, of 4 classes and 6 inputs of the classifier.
    monkeypatch.setattr(teacher, "MOST_KEPT", 58 * (4 + 6) * 4 - 1)
    assert runs(3) == 3 * STEPS_PER_EPOCH
