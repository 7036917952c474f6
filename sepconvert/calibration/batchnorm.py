"""Re-estimation of BatchNorm statistics on unlabelled images."""

from collections.abc import Iterable

import torch
from torch import nn

from sepconvert.base.modules import modules
from sepconvert.network.tensors import InputBatch


def reestimate_batchnorm(model: nn.Module, batches: Iterable[InputBatch]) -> int:
    """Replace mean and variance of every BatchNorm by those of its inputs on `batches`, in place.

    While they are estimated, layers that follow see the statistics of the batch, as in training; the running
    statistics become the mean over batches.

    Returns:
        The number of BatchNorms; 0 also if a batch of one image has no variance, and the model must then be
        thrown away.
    """
    norms = [
        module
        for module in modules(model)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True
    with torch.no_grad():
        for batch in batches:
            try:
                batch.run(model)
            except ValueError:  # a batch of one has no variance behind a pooling
                return 0
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, training
    return len(norms)
