"""The fastest network within a budget of accuracy, by what is measured on this machine.

    python examples/05_auto_budget.py [--max-drop 1.0] [--images 1000] [--seconds 30]

Every layer gets the structure that brings most time for least error, or stays as it is. The curve shows what
other budgets would bring.
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.cli.demo.images import LabelledImages, evaluation_data, training_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.report.tables import curve_table


def loader(digits: LabelledImages) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(to_input(digits.x), torch.from_numpy(digits.y)), batch_size=64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-drop", type=float, default=1.0, metavar="PP")
    parser.add_argument("--images", type=int, default=1000, help="to fit to; as many others are scored")
    parser.add_argument("--seconds", type=float, default=30, help="to time layers for")
    options = parser.parse_args()
    data, calib = loader(evaluation_data(options.images)), loader(training_data(options.images))
    result = sepconvert.convert(
        load(), next(iter(data))[0][:1], "auto", max_drop=options.max_drop, calib=calib, data=data,
        threads=1, measure_seconds=options.seconds, runs=20,
    )  # fmt: skip
    print(curve_table(result.report["approximation"]["curve"]))
    delta = result.report["delta"]
    speedup, drop = delta["latency_speedup"], delta["accuracy_drop_pp"]
    print(
        "delivered: {:.2f} [{:.2f}, {:.2f}] times as fast, ".format(speedup["median"], *speedup["ci95"])
        + "accuracy lost: {:.1f} [{:.1f}, {:.1f}] pp".format(drop["value"], *drop["ci95"])
    )


if __name__ == "__main__":
    main()
