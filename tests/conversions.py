"""Conversions in tests: what is called and what is read of them."""

import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import sepconvert
from sepconvert import Calibration, Timing
from sepconvert.measure.cost import FlopCountAnalysis

UNTIMED = Timing(runs=0, threads=1)


def convert(model, *inputs, timing=UNTIMED, **options):
    """Convert `model`, with `inputs` as examples, by default without timing anything."""
    return sepconvert.convert(model, inputs, timing=timing, **options)


def decided(model, example_inputs, mode="exact", **options):
    """Convert where only the decisions, the plan and the model matter: no files, no times."""
    return sepconvert.convert(model, example_inputs, mode, check="torch", **options)


def decisions(report):
    """Decision by the name of the layer."""
    return {layer["name"]: layer["decision"] for layer in report["layers"]}


def run(path, *inputs):
    """Outputs of an ONNX file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))


def close(actual, expected, tolerance=1e-5):
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def fvcore_macs(model, *inputs):
    analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    return analysis.uncalled_modules_warnings(False).tracer_warnings("none").total()


class Answering(nn.Module):
    """A convolution, and a function of its output and of further inputs."""

    def __init__(self, conv, answer):
        super().__init__()
        self.conv, self.answer = conv, answer

    def forward(self, x, *others):
        return self.answer(self.conv(x), *others)


def converted(report):
    """The layers that were converted."""
    return [layer for layer in report["layers"] if layer["decision"] == "converted"]


def convert_small(small, mode="approx", *, reconstruct=0.0, **options):
    """Convert the network of the fixture `small`, fitted to 64 of its images."""
    model, loader = small
    images = torch.cat([x for x, _ in loader])
    calib, _ = apart(loader)
    calibration = Calibration(images=64, reconstruct=reconstruct)
    return decided(model, images[:2], mode, calib=calib, calibration=calibration, **options)


def apart(loader):
    """Return two loaders: the first 100 images of one, and the others."""
    parts = range(100), range(100, len(loader.dataset))
    return [DataLoader(Subset(loader.dataset, part), loader.batch_size) for part in parts]


class Net(nn.Module):
    """Convolutions that separate and such that do not, a blur, a frozen stem."""

    def __init__(self, planted):
        super().__init__()
        torch.manual_seed(0)
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("blur", torch.outer(line, line).repeat(8, 1, 1, 1))
        self.stem = planted(3, 8, 5, padding=2).requires_grad_(False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(planted(8, 8, padding=1, seed=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.conv2d(self.norm(self.stem(x)), self.blur, stride=2, padding=2, groups=8)
        return self.head(self.body(x).mean((2, 3)))

    def predict(self, x):
        return self(x).argmax(1)


def snapshot(model):
    """Everything of a model that a conversion might change."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "gradients": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "hooks": [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def look(module, inputs, output):
    """A hook that changes nothing."""
