"""Convert architectures of torchvision and timm in every mode, and check the results.

    zoo.py run [NAME …] [--results FILE]   one process per model and mode; existing results are kept
    zoo.py report [--results FILE]         print the table; --page FILE also rewrites a section of that page

Weights are random, shapes are real. Every second dense kernel has a structure planted, which exact mode must
find. README.md beside this file says what must hold for a model to pass.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
import timm
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.base.environment import Runtime, available_cores, environment
from sepconvert.base.errors import DemandNotMetError, first_line
from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.network.tensors import InputBatch

# Keywords of each mode; of several, the first whose demand some plan meets.
MODES: dict[str, tuple[dict[str, Any], ...]] = {
    "exact": ({"gate": "macs"},),
    "approx": ({"rank": 2, "gate": "none"},),
    "auto": tuple({"min_speedup": least} for least in (1.1, 1.02)),
    "int8": ({"int8": True},),
}
OUTCOMES = ("passed", "no plan is fast enough", "failed")
IMAGES = 8
CAVEATS = (
    "These runs check coverage, not gains: weights are random, and every second dense kernel has a structure "
    "planted for exact mode to find."
)
MARKS = ("<!-- written by benchmarks/zoo.py -->", "<!-- end -->")
RESULTS = Path(__file__).parent / "results/zoo.json"
SECONDS = 3600  # time limit of a process
# Largest difference of a float32 network's outputs that rounding explains, relative to the largest output.
CLOSE = 2e-3
# The same of its int8 form, whose weights are random: deep networks of such amplify rounding.
CLOSE_IN_INT8 = 0.5


# Models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A model to build; `shape` is that of one image."""

    family: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int] = (3, 224, 224)


class UNet(nn.Module):
    """Two levels, with transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = self._block(3, 32), self._block(32, 64), self._block(64, 128)
        self.up_second, self.up_first = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.back_second, self.back_first = self._block(128, 64), self._block(64, 32)
        self.head = nn.Conv2d(32, 5, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [
                nn.Conv2d(width, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map N × 3 × H × W to N × 5 × H × W; H and W are multiples of 4."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        second = self.back_second(torch.cat([second, self.up_second(third)], 1))
        found: Tensor = self.head(self.back_first(torch.cat([first, self.up_first(second)], 1)))
        return found


# Those whose constructors would draw weights of auxiliary heads get no such heads.
_TORCHVISION = {
    "VGG": "vgg11_bn vgg16",
    "AlexNet": "alexnet",
    "ResNet": "resnet18 resnet50",
    "ResNeXt": "resnext50_32x4d",
    "WideResNet": "wide_resnet50_2",
    "DenseNet": "densenet121",
    "SqueezeNet": "squeezenet1_0 squeezenet1_1",
    "ShuffleNet": "shufflenet_v2_x1_0",
    "MobileNet": "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large",
    "MNASNet": "mnasnet1_0",
    "EfficientNet": "efficientnet_b0 efficientnet_v2_s",
    "RegNet": "regnet_x_400mf regnet_y_400mf",
    "ConvNeXt": "convnext_tiny",
}
_TIMM = {
    "MobileNet": "mobilenetv1_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium",
    "EfficientNet": "tf_efficientnet_lite0 mixnet_s tinynet_e",
    "RepVGG": "repvgg_a0 mobileone_s0",
    "NFNet": "nfnet_l0 nf_resnet26",
    "HRNet": "hrnet_w18_small",
    "DLA": "dla34 dla60",
    "CSP": "cspresnet50 cspdarknet53 cs3darknet_s",
    "GhostNet": "ghostnet_100 ghostnetv2_100 repghostnet_050",
    "ResNet with BlurPool": "resnetblur50",
    "ResNet, variants": "resnet26d seresnet50 skresnet18 res2net50_26w_4s resnest14d resnetv2_50 gernet_s",
    "VoVNet": "ese_vovnet19b_dw",
    "Inception": "inception_v4 inception_next_atto",
    "Xception": "xception41",
    "DPN": "dpn68",
    "SelecSLS": "selecsls42b",
    "HardCoRe-NAS, FBNet, LCNet": "hardcorenas_a fbnetc_100 lcnet_050",
    "ReXNet": "rexnet_100",
    "RegNet": "regnetz_b16",
    "ConvNeXt": "convnext_atto convnextv2_atto",
    "ConvMixer": "convmixer_768_32",
    "hybrids with attention": (
        "mobilevit_xxs coatnet_nano_rw_224 botnet26t_256 efficientformer_l1 fastvit_t8 edgenext_xx_small"
    ),
    "StarNet": "starnet_s1",
    "HGNet": "hgnet_tiny",
}


def entries() -> dict[str, Entry]:
    """Return all models by name."""
    models, segmentation, detection = (
        torchvision.models,
        torchvision.models.segmentation,
        torchvision.models.detection,
    )
    found = {}
    for family, names in _TORCHVISION.items():
        for name in names.split():
            found[f"torchvision {name}"] = Entry(family, partial(getattr(models, name), weights=None))
    plain = {"aux_logits": False, "init_weights": False, "weights": None}
    found["torchvision googlenet"] = Entry("GoogLeNet", partial(models.googlenet, **plain))
    found["torchvision inception_v3"] = Entry(
        "Inception", partial(models.inception_v3, **plain), (3, 299, 299)
    )
    for family, names in _TIMM.items():
        for name in names.split():
            shape = timm.get_pretrained_cfg(name).input_size
            found[f"timm {name}"] = Entry(family, partial(timm.create_model, name), shape)
    bare = {"weights": None, "weights_backbone": None}
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        found[f"torchvision {name}"] = Entry("segmentation", partial(getattr(segmentation, name), **bare))
    found["UNet"] = Entry("segmentation", UNet)
    for name, size in (
        ("ssd300_vgg16", 300),
        ("retinanet_resnet50_fpn", 320),
        ("fasterrcnn_mobilenet_v3_large_fpn", 320),
    ):
        build = partial(_backbone, partial(getattr(detection, name), **bare))
        found[f"torchvision {name} backbone"] = Entry("detection", build, (3, size, size))
    return found


def _backbone(build: Callable[[], nn.Module]) -> nn.Module:
    found: nn.Module = build().get_submodule("backbone")
    return found


def prepared(entry: Entry) -> tuple[nn.Module, list[str], Tensor]:
    """Return a model with bounded outputs, the names of its planted kernels, and images."""
    torch.manual_seed(0)
    model = entry.build()
    images = torch.randn(IMAGES, *entry.shape)
    planted = plant(model)
    model.eval()
    reestimate_batchnorm(model, InputBatch((images,)).split(4))
    return model, planted, images


@torch.no_grad()
def plant(model: nn.Module) -> list[str]:
    """Plant a structure, in turn, in every second dense k×k kernel, and keep the kernel's norm."""
    names = []
    dense = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and module.groups == 1 and min(module.kernel_size) > 1
    ]
    for number, (name, module) in enumerate(dense[::2]):
        weight = module.weight.double()
        outputs, inputs, height, width = weight.shape
        rank = max(1, min(inputs, outputs) // 4)
        kind = number % 3
        if kind == 0:
            planted = torch.einsum(
                "orj,rci->ocij", _random(outputs, rank, width), _random(rank, inputs, height)
            )
        elif kind == 1:
            planted = torch.einsum("oc,cij->ocij", _random(outputs, inputs), _random(inputs, height, width))
        else:
            planted = torch.einsum(
                "orij,rc->ocij", _random(outputs, rank, height, width), _random(rank, inputs)
            )
        module.weight.copy_(planted * (weight.norm() / planted.norm()))
        names.append(name)
    return names


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# One model in one mode -----------------------------------------------------------------------------


def attempt(name: str, mode: str) -> dict[str, Any]:
    """Convert a model and check the result; see `judge`."""
    entry = entries()[name]
    model, planted, images = prepared(entry)
    found: dict[str, Any] = {
        "name": name,
        "family": entry.family,
        "mode": mode,
        "shape": list(entry.shape),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "environment": environment(Runtime(1)),
        "libraries": {"torchvision": torchvision.__version__, "timm": timm.__version__},
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = converted(model, images, mode, Path(folder))
            found["seconds"] = time.perf_counter() - start
            found |= judge(model, planted, result, images, Path(folder))
        except DemandNotMetError as error:  # a legitimate outcome where plans are held to a speed
            allowed = mode in ("auto", "int8")
            met = {"outcome": "no plan is fast enough"} if allowed else {"outcome": "failed"}
            found |= {"seconds": time.perf_counter() - start, **met, "error": first_line(error)}
        except Exception as error:  # any failure is a result of the benchmark
            found |= {
                "seconds": time.perf_counter() - start,
                "outcome": "failed",
                "error": f"{type(error).__name__}: {first_line(error)}",
            }
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return found


def converted(model: nn.Module, images: Tensor, mode: str, folder: Path) -> Any:
    """Convert a model under the first demand of a mode that can be met.

    Raises:
        DemandNotMetError: the last demand is not met either.
    """
    keywords: dict[str, Any] = {
        "timing": sepconvert.Timing(threads=1, runs=10, measure_seconds=20.0),
        "out": folder,
    }
    if mode != "exact":
        loader = DataLoader(TensorDataset(images, torch.full((IMAGES,), -1)), 4)
        keywords |= {"calib": loader, "calibration": sepconvert.Calibration(images=IMAGES)}
    *more, least = MODES[mode]
    mode = "exact" if mode == "int8" else mode  # what it finds, deployed in int8
    for demand in more:
        with suppress(DemandNotMetError):
            return sepconvert.convert(model, images[:1], mode, **keywords, **demand)
    return sepconvert.convert(model, images[:1], mode, **keywords, **least)


def judge(
    model: nn.Module, planted: Sequence[str], result: Any, images: Tensor, folder: Path
) -> dict[str, Any]:
    """Check that every convolution is listed, all files agree with the converted model, and costs add up."""
    report, layers = result.report, result.report["layers"]
    listed = {name for layer in layers for name in (layer["name"], *layer.get("aliases", ()))}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    unlisted = sorted(name for name in modules if name not in listed)
    converted = {layer["name"] for layer in layers if layer["decision"] == "converted"}
    saved = sum(layer["macs"][0] - layer["macs"][1] for layer in layers if layer["decision"] == "converted")
    with torch.no_grad():
        before, after = (output_tensors(each.eval()(images[1:2])) for each in (model, result.model))
    wrong = []
    if unlisted:
        wrong.append(f"not listed: {', '.join(unlisted)}")
    # Kernels that the original standardises in each call, five operations an element, cost nothing after it.
    computed = sum(
        m.weight.numel() for name, m in modules.items() if name in converted and type(m) is not nn.Conv2d
    )
    if not 0 <= report["original"]["macs"] - report["converted"]["macs"] - saved <= 5 * computed:
        wrong.append("MACs of the layers do not add up to those of the model")
    missed = []
    if "forms" in report:
        wrong += wrong_in_int8(report, folder, images[1:2])
    elif report["mode"] == "exact":
        if missed := sorted(set(planted) - converted):
            reasons = {layer["name"]: layer["reason"] for layer in layers}
            missed = [f"{name} ({reasons.get(name)})" for name in missed]
        if difference(before, after) > CLOSE:
            wrong.append(f"converted model is off by {difference(before, after):.1e}")
    exported = {}
    for label, run in (("ONNX", _run_onnx), ("pt2", _run_archive)):
        path = folder / f"converted.{label.lower()}"
        if path.exists():
            exported[label] = difference(after, run(path, images[1:2]))
            if exported[label] > CLOSE:
                wrong.append(f"{path.name} is off by {exported[label]:.1e}")
    reason = report["verification"].get("onnx_reason") or report.get("export", {}).get("reason")
    return {
        "outcome": "failed" if wrong else "passed",
        "error": "; ".join(wrong) or None,
        "convolutions": len(layers),
        "converted": len(converted),
        "planted": len(planted),
        "not_found": missed,
        "kept": dict(Counter(layer["reason"] for layer in layers if layer["decision"] == "kept")),
        "macs_ratio": report["delta"]["macs_ratio"],
        "speedup": report["delta"]["latency_speedup"],
        "difference": {"model": difference(before, after), **exported},
        "export": reason,
    }


def wrong_in_int8(report: Mapping[str, Any], folder: Path, images: Tensor) -> Iterator[str]:
    """Yield what is wrong with the int8 files.

    Each must run, be no further off its own definition than that is off floating point, and be near the model
    in floating point; the converted one must not be slower than the original.
    """
    for name, check in report["forms"]["quantization"]["files"].items():
        if not check["rounding"] <= 1:
            yield f"{name} is {check['rounding']:.2f} times as far off its definition as that is off float"
        floating = folder / name.replace("-int8", "")
        expected, found = (_run_onnx(path, images) for path in (floating, folder / name))
        if not difference(expected, found) <= CLOSE_IN_INT8:
            yield f"{name} is off {floating.name} by {difference(expected, found):.1e}"
    ratio = report["delta"]["latency_speedup"]
    if ratio["significant"] and ratio["median"] < 1:
        yield f"converted-int8.onnx is {ratio['median']:.2f} times as fast as original-int8.onnx"


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Return the largest difference of all outputs, relative to the largest expected element."""
    assert len(expected) == len(actual)
    return max(
        float((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30))
        for e, a in zip(expected, actual, strict=True)
    )


def _run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return [torch.from_numpy(np.asarray(each)) for each in session.run(None, feed)]


def _run_archive(path: Path, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(torch.export.load(path).module()(images))


# Commands ------------------------------------------------------------------------------------------


@click.group()
def cli() -> None:
    """Convert many models; README.md beside this file says what is checked."""


results_option = click.option(
    "--results", "path", default=RESULTS, type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file of the results [default: results/zoo.json beside this file].",
)  # fmt: skip


@cli.command()
@results_option
@click.argument("names", nargs=-1)
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(list(MODES)), help="Only this one. Repeatable."
)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True,
    help="Processes at once, each with its share of the cores.",
)  # fmt: skip
def run(path: Path, names: Sequence[str], modes: Sequence[str], jobs: int) -> None:
    """Convert all models, or those whose name contains one of NAMES, one process per model and mode."""
    if unknown := [each for each in names if not any(each in name for name in entries())]:
        raise click.UsageError(f"{unknown[0]}: expected parts of these names: {', '.join(entries())}")
    chosen = [name for name in entries() if not names or any(each in name for each in names)]
    results = {(each["name"], each["mode"]): each for each in _read(path)} if path.exists() else {}
    asked = [(name, mode) for mode in modes or MODES for name in chosen]
    pool = ThreadPoolExecutor(jobs)  # of threads that wait for processes
    try:
        waiting = [
            pool.submit(_in_a_process, *each, threads=max(1, available_cores() // jobs))
            for each in asked
            if each not in results
        ]
        for done in as_completed(waiting):
            found = done.result()
            results[found["name"], found["mode"]] = found
            _write(path, [results[key] for key in sorted(results)])
            click.echo(
                f"{found['name']} {found['mode']}: {found['outcome']} {found.get('seconds', 0):.0f} s "
                f"{found.get('peak_gb', 0):.1f} GB {found.get('error') or ''}"
            )
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per result, atomically."""
    lines = ",\n".join(json.dumps(each) for each in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    part.replace(path)


def _in_a_process(name: str, mode: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", name, mode]
    try:
        done = subprocess.run(  # noqa: S603  (our own script)
            command, capture_output=True, text=True, timeout=SECONDS, check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _broken(name, mode, f"not done within {SECONDS} s")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return _broken(name, mode, f"exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _broken(name: str, mode: str, error: str) -> dict[str, Any]:
    entry = entries()[name]
    return {
        "name": name, "family": entry.family, "mode": mode, "shape": list(entry.shape),
        "outcome": "failed", "error": error,
    }  # fmt: skip


@cli.command()
@click.argument("name")
@click.argument("mode", type=click.Choice(list(MODES)))
def one(name: str, mode: str) -> None:
    """Convert one model in one mode in this process; the last line of the output is the result."""
    click.echo(json.dumps(attempt(name, mode)))


@cli.command()
@results_option
@click.option("--page", type=click.Path(exists=True, path_type=Path),
              help="Also replace the section between the marks in this file.")  # fmt: skip
def report(path: Path, page: Path | None) -> None:
    """Print the table of all results."""
    if not path.exists():
        raise click.UsageError(f"{path}: there are no results yet; make them with `run`")
    found = _read(path)
    click.echo("\n".join(table(found)))
    if page is not None:
        text = page.read_text(encoding="utf-8")
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        section = "\n".join(supported(found))
        page.write_text(f"{before}{MARKS[0]}\n{section}\n{MARKS[1]}{after}", encoding="utf-8")


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, one row per model, and every failure."""
    by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
    for each in found:
        by_name.setdefault(each["name"], {})[each["mode"]] = each
    rows = []
    for name, modes in sorted(
        by_name.items(), key=lambda item: (next(iter(item[1].values()))["family"], item[0])
    ):
        first = next(iter(modes.values()))
        row = {"family": first["family"], "model": name}
        for mode in MODES:
            each = modes.get(mode)
            row[mode] = "" if each is None else _cell(each)
        row["GB"] = f"{max(each.get('peak_gb', 0) for each in modes.values()):.1f}"
        rows.append(row)
    yield tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    yield ""
    outcomes = Counter((each["mode"], each["outcome"]) for each in found)
    yield "; ".join(f"{mode}: {count} {outcome}" for (mode, outcome), count in sorted(outcomes.items())) + "."
    for each in found:
        if each["outcome"] == "failed":
            yield f"- {each['name']}, {each['mode']}: {each['error']}"


def supported(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the section for the documentation: families, caveats, one row per mode, and every failure."""
    stated = next(each["environment"] | each["libraries"] for each in found if "environment" in each)
    versions = {name: str(version).partition("+")[0] for name, version in stated.items()}
    machine = ", ".join([f"{stated['cores']} cores", *stated.get("instruction_sets", [])])
    families = Counter(family for family, _ in {(each["family"], each["name"]) for each in found})
    names = ", ".join(
        family if count == 1 else f"{family} ({count})" for family, count in sorted(families.items())
    )
    yield from textwrap.wrap(
        f"{families.total()} architectures of torchvision {versions['torchvision']} and timm "
        f"{versions['timm']} were converted at their real shapes under torch {versions['torch']} and ONNX "
        f"Runtime {versions['onnxruntime']} on {stated['cpu']} ({machine}; `benchmarks/zoo.py`): {names}.",
        110,
    )
    yield ""
    yield from textwrap.wrap(f"{CAVEATS} {_gains(found)}".strip(), 110)
    yield ""
    rows = []
    for mode in MODES:
        tried = Counter(each["outcome"] for each in found if each["mode"] == mode)
        if not tried:
            continue
        rows.append({"mode": mode, "tried": tried.total(), **{each: tried[each] for each in OUTCOMES}})
    yield tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    failed = [each for each in found if each["outcome"] == "failed"]
    if failed:
        yield ""
        yield "What failed:"
        yield ""
        yield from (f"- {each['name']}, {each['mode']}: {each['error']}" for each in failed)


def _gains(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the speed-ups of auto mode, with those that noise explains."""
    speeds = [each["speedup"] for each in found if each["mode"] == "auto" and each.get("speedup")]
    if not speeds:
        return ""
    noisy = sum(not each["significant"] for each in speeds)
    medians = [each["median"] for each in speeds]
    return (
        f"In auto mode the median speed-up is {statistics.median(medians):.2f}×, {noisy} of {len(speeds)} "
        f"are within noise, and the smallest is {min(medians):.2f}×."
    )


def _cell(each: Mapping[str, Any]) -> str:
    seconds = f"{each.get('seconds', 0):.0f} s"
    if each["outcome"] != "passed":
        return f"{each['outcome']}, {seconds}"
    speed = ""
    if each["mode"] == "auto":
        found = each["speedup"]
        speed = f"{found['median']:.2f}× as fast{'' if found['significant'] else ' (noise)'}, "
    return f"{each['converted']} of {each['convolutions']}, {each['macs_ratio']:.2f}×, {speed}{seconds}"


if __name__ == "__main__":
    cli()
