"""Convert what separates exactly in a trained network, and measure the gain.

    python examples/03_exact.py

The network of `sepconvert demo` classifies handwritten digits. Some of its kernels have exact structure:
image filters, a layer that was trained as a pair, one with a border of zeros, and one that was pruned.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input


def main() -> None:
    model, digits = load(), evaluation_data(400)
    images, labels = to_input(digits.x), torch.from_numpy(digits.y)
    data = DataLoader(TensorDataset(images, labels), batch_size=100)

    result = sepconvert.convert(model, images[:1], mode="exact", data=data, timing=sepconvert.Timing(runs=20))
    for layer in result.report["layers"]:
        print(f"{layer['name']}: {layer['decision']}, {layer['scheme'] or ''} {layer['reason']}")
    delta, checked = result.report["delta"], result.report["verification"]
    print(f"MACs: {delta['macs_ratio']:.2f}× fewer")
    print(f"outputs differ by {checked['torch_max_abs_diff']:.0e}; accuracy lost: "
          f"{result.accuracy.drop:.2f} pp on {len(labels)} images")  # fmt: skip


if __name__ == "__main__":
    main()
