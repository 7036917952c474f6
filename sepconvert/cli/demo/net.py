"""Demo network: a small classifier with the kinds of exact structure that deployed networks have.

- Filters of classical image processing run as functional convolutions on buffers: Gaussian, Sobel, binomial.
- `large` was trained as a vertical and a horizontal convolution and merged into one dense 7×7 kernel, as
  re-parameterised networks are (RepVGG, arXiv:2101.03697).
- `widen` lost half of its filters to magnitude pruning, which leaves zeros behind (arXiv:1608.08710).
- `elastic` is a 5×5 layer of which only the 3×3 core is active, as in the elastic kernels of once-for-all
  networks (arXiv:1908.09791).

The other convolutions are ordinary ones of full rank. `train` shows how each was made.
"""

from importlib.resources import files

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.cli.demo.images import CLASSES, MEAN, STD

CHECKPOINT = "digits.safetensors"


def load() -> "DigitNet":
    """Return the trained network, in eval mode."""
    net = DigitNet()
    net.load_state_dict(parse_safetensors((files("sepconvert.cli.demo") / CHECKPOINT).read_bytes()))
    return net.eval()


def to_input(x: npt.NDArray[np.uint8]) -> Tensor:
    """Turn uint8 N×H×W×C pixels into the network's normalised float32 N×C×H×W input."""
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


class LocalContrast(nn.Module):
    """Local contrast normalisation in 11×11 Gaussian windows of some scales (Jarrett et al., ICCV 2009)."""

    window: Tensor

    def __init__(self, *deviations: float) -> None:
        """Take windows of the given standard deviations, in pixels."""
        super().__init__()
        offset = torch.arange(-5, 6, dtype=torch.float64)
        gaussians = [torch.exp(-(offset**2) / (2 * deviation**2)) for deviation in deviations]
        self.register_buffer("window", torch.cat([_separable(each / each.sum()) for each in gaussians]))

    def forward(self, x: Tensor) -> Tensor:
        """Map N×1×H×W to a channel for each window: `x` less its local mean and over its local deviation."""
        x = x.repeat(1, len(self.window), 1, 1)
        x = x - self._smooth(x)
        return x / (self._smooth(x * x) + 0.01).sqrt()

    def _smooth(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), self.window, groups=len(self.window))


class EdgeMaps(nn.Module):
    """Sobel derivatives of every channel."""

    sobel: Tensor

    def __init__(self, channels: int) -> None:
        """Take images of `channels` channels."""
        super().__init__()
        self.channels = channels
        along_x = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
        self.register_buffer("sobel", torch.stack([along_x, along_x.T])[:, None].repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map N×C×H×W to N×2C×H×W: each channel's derivatives along x and y, side by side."""
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.sobel, groups=self.channels)


class BlurPool(nn.Module):
    """Anti-aliased subsampling by two with a 5×5 binomial filter (Zhang, arXiv:1904.11486)."""

    binomial: Tensor

    def __init__(self, channels: int) -> None:
        """Take images of `channels` channels."""
        super().__init__()
        self.channels = channels
        row = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
        self.register_buffer("binomial", _separable(row).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map N×C×H×W to N×C×(H/2)×(W/2)."""
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.binomial, stride=2, groups=self.channels)


class ConvNorm(nn.Module):
    """Block of a `kernel`×`kernel` convolution that keeps height and width, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        """Initialise as torch does."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×`inputs`×H×W to N×`outputs`×H×W."""
        return F.relu(self.norm(self.conv(x)))


class DigitNet(nn.Module):
    """Classifier of handwritten digits: N×1×28×28 normalised images to N×10 logits."""

    def __init__(self) -> None:
        """Initialise as torch does; `load` returns the trained network."""
        super().__init__()
        self.contrast = LocalContrast(1.25, 2.5, 5)
        self.edges = EdgeMaps(3)
        self.stem = ConvNorm(9, 32)
        self.blur1 = BlurPool(32)
        self.block = nn.Sequential(ConvNorm(32, 32), ConvNorm(32, 32))
        self.large = ConvNorm(32, 32, kernel=7)
        self.blur2 = BlurPool(32)
        self.widen = ConvNorm(32, 64)
        self.narrow = ConvNorm(64, 32)
        self.elastic = ConvNorm(32, 32, kernel=5)
        self.head = ConvNorm(32, 32)
        self.classify = nn.Linear(32, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, N×10, of the images `x`, N×1×28×28."""
        x = self.contrast(x)
        x = self.blur1(self.stem(torch.cat([x, self.edges(x)], dim=1)))
        x = x + self.block(x)
        x = self.blur2(self.large(x))
        x = x + self.narrow(self.widen(x))
        x = x + self.elastic(x)
        x = self.head(x)
        logits: Tensor = self.classify(x.mean(dim=(2, 3)))
        return logits


def _separable(row: Tensor) -> Tensor:
    """Return the float32 kernel `row ⊗ row`, 1×1×K×K, of the K weights `row`."""
    return torch.outer(row, row).float()[None, None]
