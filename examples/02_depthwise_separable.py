"""Replace a 5×5 convolution from 3 to 256 channels on a 12×12 image by a depthwise separable one.

    python examples/02_depthwise_separable.py

The dense layer slides 256 kernels of 5×5×3 over 8×8 positions: it transforms the image 256 times. The
separable one transforms it once, channel by channel, and then mixes the three results into 256 channels.
Both are counted by sepconvert, which builds the second from the first.
"""

import torch
from torch import nn

import sepconvert

IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def main() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 256, 5, bias=False)).eval()
    # Layers with so few input channels seldom pay, so they are converted only if they are named.
    result = sepconvert.convert(
        dense, IMAGE, "approx", rank=1, selection=sepconvert.Selection(include=["0"]), check="torch"
    )

    print(dense[0])
    for convolution in result.model[0].convolutions:
        print(f"  → {convolution}")
    before, after = result.original, result.converted
    print(f"positions: {'×'.join(map(str, dense(IMAGE).shape[2:]))}")
    print(f"multiplications: {before.macs:,} dense, {after.macs:,} separable")
    (layer,) = result.report["layers"]
    print(f"relative error, too large as the kernel is random and not trained: {layer['weight_error']:.2f}")


if __name__ == "__main__":
    main()
