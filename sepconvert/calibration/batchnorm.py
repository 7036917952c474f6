"""Re-estimation of BatchNorm statistics on unlabelled images."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sepconvert.network.tensors import fresh


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Let every BatchNorm take mean and variance of its own inputs on `batches`; returns how many there are.

    In place. Layers that follow see the statistics of the batch, as in training; running ones become the
    mean over batches. Returns 0 too where a batch of one image has no variance: the model is of no use then.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True
    with torch.no_grad():
        for batch in batches:
            try:
                model(fresh(batch))
            except ValueError:  # a batch of one has no variance behind a pooling
                return 0
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, training
    return len(norms)
