"""Calibration layer by layer on few images, and its moments by `F.unfold` over all positions."""

import torch
from torch import nn
from torch.nn import functional as F

from sepconvert.calibration.record import record
from sepconvert.calibration.stream import calibrate as calibrate_with
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import traced

IMAGES = torch.randn(6, 4, 8, 7, generator=torch.Generator().manual_seed(0)) + 3


def conv(inputs=4, outputs=6, **options):
    torch.manual_seed(1)
    return nn.Conv2d(inputs, outputs, **{"kernel_size": 3, **options})


def sites_of(model, images=IMAGES):
    return traced(model, (images[:1],)).sites


def calibrate(model, batches, sites, seed):
    # As of one image, in which nearly every position is looked at.
    batches = {number: InputBatch((images,)) for number, images in batches.items()}
    return calibrate_with(model, batches, sites, record(model, batches, sites, images=1, seed=seed))


def drive(model, batches, kernels=None, sites=None):
    """Return the moments by name; the given kernels are sent back."""
    stream = calibrate(model, dict(enumerate(batches)), sites or sites_of(model), seed=0)
    send, found = None, {}
    try:
        while True:
            site, moments = stream.send(send)
            found[site.name] = moments
            send = (kernels or {}).get(site.name)
    except StopIteration:
        return found


def patches_of(layer, x):
    """g × M × C·K in float64, the padding done by hand."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x.double(), (left, right, top, bottom), mode=mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    rows = columns.transpose(1, 2).flatten(0, 1)
    return rows.reshape(len(rows), layer.groups, -1).transpose(0, 1)


def outputs_of(y):
    """M × O in float64."""
    return y.double().flatten(2).transpose(1, 2).flatten(0, 1)


def covariance(a, b):
    return (a - a.mean(-2, keepdim=True)).mT @ (b - b.mean(-2, keepdim=True)) / a.shape[-2]
