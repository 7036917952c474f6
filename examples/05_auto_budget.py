"""Find the fastest network within an accuracy budget, as measured on this machine.

    python examples/05_auto_budget.py [--max-drop 1.0] [--images 1000] [--seconds 30]

Every layer gets the structure that saves the most time for the least error, or is kept. The curve shows what
other budgets would bring.
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.cli.demo.images import LabelledImages, evaluation_data, training_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.report.text.tables import curve_table


def loader(digits: LabelledImages) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(to_input(digits.x), torch.from_numpy(digits.y)), batch_size=64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-drop", type=float, default=1.0, metavar="PP")
    parser.add_argument(
        "--images", type=int, default=1000, help="images to fit to, and as many others to score on"
    )
    parser.add_argument("--seconds", type=float, default=30, help="time limit for timing layers")
    options = parser.parse_args()
    data, calib = loader(evaluation_data(options.images)), loader(training_data(options.images))
    result = sepconvert.convert(
        load(), next(iter(data))[0][:1], "auto", max_drop=options.max_drop, calib=calib, data=data,
        timing=sepconvert.Timing(threads=1, measure_seconds=options.seconds, runs=20),
    )  # fmt: skip
    print(curve_table(result.report["approximation"]["curve"]))
    speedup, lost = result.speedup, result.accuracy
    print(
        f"delivered: {speedup.median:.2f} [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}] times as fast, "
        f"accuracy lost: {lost.drop:.1f} [{lost.ci95.lo:.1f}, {lost.ci95.hi:.1f}] pp"
    )


if __name__ == "__main__":
    main()
