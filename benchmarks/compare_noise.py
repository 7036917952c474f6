"""Does `compare` call equal models equal, and a slower one slower?

A ResNet-18 at 224×224 is compared with itself, and with itself and one more 3×3 convolution (64 channels at
56×56, 6 % of the MACs). Of 20 comparisons at most 1 may call the first pair different, and at least 18 must
call the longer network slower. Needs torchvision.
"""

import tempfile
from pathlib import Path

import click
import torch
from torch import nn
from torchvision.models import resnet18

from sepconvert.base.environment import Runtime, environment
from sepconvert.base.progress import silent
from sepconvert.measure.head_to_head import Subject, measure
from sepconvert.measure.metrics.evaluation import Scoring


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    short, longer = resnet18().eval(), resnet18().eval()
    longer.load_state_dict(short.state_dict())
    longer.layer1.append(nn.Conv2d(64, 64, 3, padding=1))
    return short, longer.eval()


@click.command(help=__doc__)
@click.option("--times", default=20, show_default=True, help="Comparisons.")
@click.option("--runs", default=50, show_default=True, help="Rounds of each.")
@click.option("--threads", default=1, show_default=True)
def main(times: int, runs: int, threads: int) -> None:
    x = torch.randn(1, 3, 224, 224)
    runtime = Runtime(threads)
    different = slower = 0
    with tempfile.TemporaryDirectory() as folder:
        short, longer = (
            Subject.of_model(name, model, (x,), Path(folder) / f"{name}.onnx")
            for name, model in zip(("short", "longer"), networks(), strict=True)
        )
        print(f"{environment(runtime)['cpu']}, {threads} threads, {runs} runs;"
              f" MACs ×{longer.profile.macs / short.profile.macs:.3f}")  # fmt: skip
        for seed in range(times):
            found = [
                measure([short, other], [x.numpy()], data=None, scoring=Scoring(), runs=runs,
                        runtime=runtime, seed=seed, progress=silent).deltas[0].speedup
                for other in (short, longer)
            ]  # fmt: skip
            same, more = (each for each in found if each is not None)
            different += same.significant
            slower += more.significant and more.median < 1
            print(f"itself {same.median:.3f} {same.ci95.to_list()}, longer {more.median:.3f}"
                  f" {more.ci95.to_list()}, noise {more.noise_floor.to_list()}", flush=True)  # fmt: skip
    print(f"itself called different: {different} of {times}; longer called slower: {slower}")


if __name__ == "__main__":
    main()
