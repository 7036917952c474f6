"""A 5×5 convolution from 3 to 256 channels on a 12×12 image, and the depthwise separable one in its place.

    python examples/02_depthwise_separable.py

The dense layer slides 256 kernels of 5×5×3 over 8×8 positions: it transforms the image 256 times. The
separable one transforms it once, channel by channel, and makes 256 mixtures of what comes out. Both are built
and counted by sepconvert.
"""

import torch
from torch import nn

import sepconvert

IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def main() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 256, 5, bias=False)).eval()
    # Layers of so few input channels are converted only if they are named: they seldom pay.
    result = sepconvert.convert(dense, IMAGE, "approx", rank=1, include=["0"], runs=0)

    print(dense[0])
    for convolution in result.model[0].convolutions:
        print(f"  → {convolution}")
    before, after = (sepconvert.profile(model, IMAGE, runs=0) for model in (dense, result.model))
    print(f"positions: {'×'.join(map(str, dense(IMAGE).shape[2:]))}")
    print(f"multiplications: {before.macs:,} dense, {after.macs:,} separable")
    (layer,) = result.report["layers"]
    print(f"relative error of a random kernel, by which it is no good yet: {layer['weight_error']:.2f}")


if __name__ == "__main__":
    main()
