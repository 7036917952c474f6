"""Fine-tunes a small network in a process of its own: `distillation_worker.py RESULT [CHECKPOINT [KILL_AT]]`.

With KILL_AT the process kills itself after that step, as a machine that is taken away does.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.distillation.training import finetune

STEPS_PER_EPOCH = 15


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def disturbed(teacher, norm=True, seed=1):
    """Another network, off by noise."""
    student = network(norm)
    student.load_state_dict(teacher.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return student


def loader(n=58, seed=0, batch_size=4, labels=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    y = torch.randint(4, (n,), generator=generator) if labels else torch.full((n,), -1)
    return DataLoader(TensorDataset(x, y), batch_size)


def tuned(norm=True, **options):
    teacher = network(norm)
    options = {"epochs": 3, "labelled": True, "checkpoint_every": 4, "learning_rate": 1e-2} | options
    return finetune(disturbed(teacher, norm), teacher, loader(), loader(21, seed=1), **options)


def assert_same(a, b):
    a, b = (model if isinstance(model, dict) else model.state_dict() for model in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def untimed(history):
    return [replace(epoch, seconds=0) for epoch in history]


def run_worker(*arguments, launcher=(), **environment):
    return subprocess.run(  # noqa: S603  (our own script)
        [sys.executable, *launcher, __file__, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )


def main(result, checkpoint=None, kill_at=None):
    def kill(step):
        if kill_at is not None and step.step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    path = checkpoint and Path(checkpoint)
    # Without BatchNorm the number of processes changes nothing but rounding.
    done = tuned(norm=path is not None, checkpoint=path, resume=path is not None, progress=kill)
    if int(os.environ.get("RANK", "0")) == 0:
        last, divergences = done.history[-1], [epoch.divergence for epoch in done.history]
        # Not torch's count, which is of processes that Accelerate may leave to train alone.
        processes = PartialState().num_processes
        torch.save([done.model.state_dict(), last.loss, last.accuracy, divergences, processes], result)


if __name__ == "__main__":
    main(*sys.argv[1:])
