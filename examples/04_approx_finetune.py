"""Measure what depthwise and pointwise convolutions with few parameters lose, with and without fine-tuning.

    python examples/04_approx_finetune.py [--ranks 1 2 3] [--images 2000] [--epochs 8] [--figure few.png]

Every dense layer of the network of `sepconvert demo` becomes a sum of M branches, each a depthwise
convolution followed by a pointwise one: M = 1 is a depthwise separable convolution. Factors are fitted to the
layers' outputs on unlabelled images and then trained to reproduce the original's outputs. With so few
parameters a small network may fail to learn what is missing; each step of M adds some.
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.cli.demo.images import LabelledImages, evaluation_data, training_data
from sepconvert.cli.demo.net import load, to_input


def loader(digits: LabelledImages, *, labelled: bool) -> DataLoader[tuple[torch.Tensor, ...]]:
    labels = torch.from_numpy(digits.y) if labelled else torch.full((len(digits.y),), -1)
    return DataLoader(TensorDataset(to_input(digits.x), labels), batch_size=64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], metavar="M")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--figure", help="draw accuracy against parameters")
    options = parser.parse_args()
    model, image = load(), to_input(evaluation_data(1).x)
    data = loader(evaluation_data(options.images), labelled=True)
    calib = loader(training_data(options.images), labelled=False)

    rows = []
    for rank in options.ranks:
        for epochs in sorted({0, options.epochs}):
            result = sepconvert.convert(
                model, image, "approx", rank=rank, calib=calib, data=data, finetune=epochs, check="torch"
            )
            before, after, lost = result.original, result.converted, result.accuracy
            trained = result.report["approximation"]["finetune"]
            done = trained["history"][-1]["epoch"] if trained else 0
            rows.append((epochs, after.params, lost.drop, lost.ci95.lo, lost.ci95.hi))
            print(
                f"M = {rank}, {done} epochs: {before.params:,} → {after.params:,} parameters, "
                f"accuracy {100 * after.accuracy.top1:.1f} %, "
                f"{lost.drop:.1f} [{lost.ci95.lo:.1f}, {lost.ci95.hi:.1f}] pp lost"
            )
    if options.figure:
        draw(rows, before.params, 100 * before.accuracy.top1).savefig(options.figure, dpi=150)


def draw(rows: list[tuple[float, ...]], params: int, accuracy: float) -> Figure:
    """Draw accuracy against parameters, with the paired 95 % intervals of the accuracy lost."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for epochs, marker in zip(sorted({row[0] for row in rows}), "os", strict=False):
        counts, lost, least, most = np.array([row[1:] for row in rows if row[0] == epochs]).T
        label = f"after {epochs:.0f} epochs of fine-tuning" if epochs else "as fitted"
        reach = lost - least, most - lost
        shift = 1.02 if epochs else 1  # so that the intervals do not hide each other
        axis.errorbar(counts * shift, accuracy - lost, reach[::-1], marker=marker, capsize=4, label=label)
    axis.plot(params, accuracy, "k*", markersize=12, label="original")
    axis.set(xlabel="parameters", ylabel="accuracy, %", xscale="log")
    axis.set_xticks([*{row[1] for row in rows}, params], minor=False)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
