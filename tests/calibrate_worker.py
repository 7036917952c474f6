"""One of several processes that calibrate together: `calibrate_worker.py RANK PROCESSES PORT RESULT`.

Accumulates the moments of a small network on three batches, of which the processes share the work.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from sepconvert.calibration.record import record
from sepconvert.calibration.split import CalibrationSet
from sepconvert.calibration.stream import calibrate
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import traced


def fitted(batches):
    """Moments of two layers, of which the first is replaced: lists of tensors by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 3)).double().eval()
    images = torch.randn(4 * batches, 4, 20, 20, dtype=torch.float64) + 2
    kernel = torch.randn(6, 2, 3, 3).double(), torch.randn(6).double()
    share = CalibrationSet(tuple(InputBatch((images,)).split(4)), (), (), "test").share(model)
    sites = traced(model, (images[:1],)).sites
    recorded, found = record(model, share, sites, images=4 * batches, seed=0), {}
    stream = calibrate(model, share, sites, recorded)
    for _ in range(2):
        site, moments = stream.send(kernel if found else None)
        found[site.name] = [torch.as_tensor(value).double() for value in vars(moments).values()]
    stream.close()
    return found


def main(rank, processes, port, result):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.init_process_group(
        "gloo", rank=int(rank), world_size=int(processes), timeout=timedelta(seconds=20)
    )
    torch.save(fitted(3), Path(result) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
