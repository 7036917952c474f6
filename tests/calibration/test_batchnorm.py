"""BatchNorm statistics, against means over batches."""

import torch
from in_step import IMAGES, conv
from torch import nn

from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.network.tensors import InputBatch


def test_batchnorm_takes_the_statistics_of_its_own_inputs():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.BatchNorm2d(6, track_running_stats=False)
    )
    model.eval()
    assert reestimate_batchnorm(model, InputBatch((IMAGES,)).split(3)) == 1
    with torch.no_grad():
        y = [model[0](batch) for batch in IMAGES.split(3)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([b.mean((0, 2, 3)) for b in y]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([b.var((0, 2, 3)) for b in y]).mean(0))
    assert (model[1].momentum, model[1].training) == (0.1, False)


def test_batchnorm_of_a_batch_of_one():
    """The last batch may hold a single image, of which a BatchNorm behind pooling has no variance."""
    model = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6)).eval()
    assert reestimate_batchnorm(model, InputBatch((IMAGES,)).split(5)) == 0
    assert all(value.isfinite().all() for value in model.state_dict().values())
