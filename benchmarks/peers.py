"""sepconvert and its peers on the same nets, images, exporter, runtime and clock.

    peers.py convert FOLDER MODEL …   each tool's models of a net: ONNX, accuracy, MACs, seconds
    peers.py time FOLDER …            all models of each folder, interleaved in one run
    peers.py report OUT FOLDER …      tables and a plot of them

README.md explains what is compared and how.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

import sepconvert
from sepconvert.base.environment import Runtime, environment
from sepconvert.base.errors import first_line
from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.split import CalibrationSet, Division, split_data
from sepconvert.files.data import Preprocess, load_data
from sepconvert.files.models.loading import load_model
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.measure.cost import count
from sepconvert.measure.latency import Deployed, session, speedup, time_all
from sepconvert.measure.metrics.evaluation import Scoring, evaluate, metric_delta
from sepconvert.measure.statistics import median_interval
from sepconvert.network.copies import evaluation_mode, private_copy
from sepconvert.network.trace import ConvSite, trace
from sepconvert.planning.forms import FEWEST_CHANNELS

ORIGINAL, POINTS, LATENCY = "original", "points", "latency.json"
SEPCONVERT = "sepconvert"
FINETUNED = "sepconvert fine-tuned"

Judge = Callable[[nn.Module], dict[str, Any]]


# Tools ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """An original network, and the images that tools may use."""

    model: nn.Module
    inputs: tuple[Tensor, ...]  # one sample of the evaluation data, which models are run and timed on
    calibration: CalibrationSet
    calib: torch.utils.data.DataLoader[tuple[Tensor, Tensor]]  # where those of `calibration` come from
    heldout: Heldout
    cache: Path  # for the times of layers


@dataclass(frozen=True)
class Converted:
    """A net as converted by a tool; `dense` gives the reasons of the layers that were kept."""

    model: nn.Module
    batchnorm: bool
    dense: Mapping[str, str]


@dataclass(frozen=True)
class Tool:
    """A tool with its settings; `convert` is called once for each and makes one point of its curve."""

    name: str
    settings: tuple[Mapping[str, Any], ...]
    convert: Callable[..., Converted]


def tltorch_cp(conv: nn.Conv2d, *, rank: float) -> nn.Module:
    """tensorly-torch's CP: its factors as 1×1, depthwise and 1×1 convolutions (its "mobilenet" form)."""
    from tltorch import FactorizedConv

    found = FactorizedConv.from_conv(conv, rank=rank, factorization="cp", implementation="mobilenet")
    weights, (outer, inner, *spatial) = found.weight.decomposition
    depthwise = torch.einsum("hr,wr->rhw", *spatial)[:, None]
    return _chain(
        conv, inner.T[:, :, None, None], depthwise, (outer * weights)[:, :, None, None], len(weights)
    )


def tltorch_tucker(conv: nn.Conv2d, *, rank: float) -> nn.Module:
    """tensorly-torch's Tucker with whole kernels: its factors as 1×1, k×k and 1×1 convolutions."""
    from tltorch import FactorizedConv

    found = FactorizedConv.from_conv(
        conv, rank=rank, factorization="tucker", implementation="factorized", fixed_rank_modes="spatial"
    )
    core, (outer, inner, *spatial) = found.weight.decomposition
    middle = torch.einsum("oihw,yh,xw->oiyx", core, *spatial)
    return _chain(conv, inner.T[:, :, None, None], middle, outer[:, :, None, None], 1)


def _chain(conv: nn.Conv2d, first: Tensor, middle: Tensor, last: Tensor, groups: int) -> nn.Sequential:
    """Three kernels as convolutions, the middle one with the geometry of `conv`, the last with its bias."""
    place = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    layers = nn.Sequential(
        nn.Conv2d(first.shape[1], first.shape[0], 1, bias=False),
        nn.Conv2d(first.shape[0], middle.shape[0], conv.kernel_size, groups=groups, bias=False, **place),
        nn.Conv2d(last.shape[1], last.shape[0], 1, bias=conv.bias is not None),
    )
    for layer, kernel in zip(layers, (first, middle, last), strict=True):
        layer.weight = nn.Parameter(kernel.detach().contiguous())
    if conv.bias is not None:
        layers[2].bias = nn.Parameter(conv.bias.detach().clone())
    return layers


def fasterai_layer(conv: nn.Conv2d, *, method: str, **setting: float) -> nn.Module:
    """One of fasterai's four decompositions of a layer, by share removed or by share of energy kept."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    found: nn.Module = getattr(Conv_Decomposer(), method)(conv, **setting)
    return found


def by_layer(convert_layer: Callable[..., nn.Module], net: Net, **setting: Any) -> Converted:
    """Let a peer replace every k×k convolution that it can, where that takes fewer MACs.

    Stems stay dense, as they do in sepconvert. BatchNorm statistics are re-estimated where that brings the
    outputs nearer to the original's on the images held out, by the same rule and on the same images.
    """
    model = private_copy(net.model)
    dense: dict[str, str] = {}
    converted = 0
    for site in trace(net.model, net.inputs):
        conv = net.model.get_submodule(site.owner)
        if not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) == 1:
            continue
        if conv.groups > 1 or conv.in_channels < FEWEST_CHANNELS:
            dense[site.name] = f"{conv.in_channels} channels in {conv.groups} groups"
            continue
        try:
            layer = convert_layer(conv, **setting).eval()
            if macs_of(layer, site) < site.macs:
                model.set_submodule(site.owner, layer)
                converted += 1
            else:
                dense[site.name] = "no fewer MACs"
        except Exception as error:  # a peer may raise anything; its other layers are still of use
            dense[site.name] = one_line(error)
    if not converted:
        raise ValueError(f"no layer was converted: {'; '.join(sorted(set(dense.values())))}")
    return with_batchnorm(net, model, dense)


def macs_of(layer: nn.Module, site: ConvSite) -> int:
    """Return the MACs of a layer on the input that it has in the net."""
    assert site.conv is not None  # the caller has seen an nn.Conv2d run
    return count(layer, (site.conv.inputs,)).macs * site.calls


def with_batchnorm(net: Net, model: nn.Module, dense: Mapping[str, str]) -> Converted:
    """Re-estimate BatchNorms if that helps on the held-out images."""
    candidate = private_copy(model)
    with evaluation_mode(candidate):
        reestimate_batchnorm(candidate, net.calibration.fit)
    better = net.heldout.measure(candidate).divergence < net.heldout.measure(model).divergence
    return Converted(candidate if better else model, better, dense)


def plain_svd(net: Net, *, rank: int) -> Converted:
    """Fit depthwise and pointwise factors by each kernel's own SVD, which uses data for BatchNorm only."""
    untimed = sepconvert.Timing(runs=0)
    found = sepconvert.convert(net.model, net.inputs, "approx", rank=rank, gate="none", timing=untimed)
    return with_batchnorm(net, found.model, {})


def convert(net: Net, **keywords: Any) -> Converted:
    """Convert by sepconvert as a user calls it, without labels."""
    timing = sepconvert.Timing(threads=1, cache=net.cache)
    found = sepconvert.convert(net.model, net.inputs, mode="auto", calib=net.calib, timing=timing, **keywords)
    kept = [step["name"] for step in found.report["approximation"]["steps"] if step["kept"]]
    return Converted(found.model, "re-estimate BatchNorm" in kept, {})


HEADING = """# Peers: every point

Written by `python benchmarks/peers.py report`; README.md says what is compared, how, and on which machine."""
SPEEDUPS = (1.2, 1.5, 1.8, 2.2, 2.7, 3.4)
SHARES = ({"rank": 0.6}, {"rank": 0.4}, {"rank": 0.25}, {"rank": 0.12})  # of the weights
REMOVED = ({"percent_removed": 0.3}, {"percent_removed": 0.5}, {"percent_removed": 0.7})
ENERGIES = ({"energy_threshold": 0.95}, {"energy_threshold": 0.85}, {"energy_threshold": 0.7})
# fasterai's names of methods. Of the three singular values of a 3×3 kernel, "Spatial" keeps two or one.
FASTERAI = {
    "Tucker": REMOVED + ENERGIES,
    "SVD": REMOVED + ENERGIES,
    "Spatial": REMOVED[:2],
    "CP": REMOVED + ENERGIES,
}


def tools(epochs: int) -> tuple[Tool, ...]:
    """sepconvert and its peers, each with its settings; fine-tuned points if there are `epochs`."""
    finetuned = tuple({"min_speedup": each, "finetune": epochs} for each in SPEEDUPS[:2:-2])
    fasterai = (
        Tool(
            f"fasterai {method.lower()}", settings, partial(by_layer, partial(fasterai_layer, method=method))
        )
        for method, settings in FASTERAI.items()
    )
    return (
        Tool(SEPCONVERT, tuple({"min_speedup": each} for each in SPEEDUPS), convert),
        *([Tool(FINETUNED, finetuned, convert)] if epochs else []),
        Tool("tensorly-torch CP", SHARES, partial(by_layer, tltorch_cp)),
        Tool("tensorly-torch Tucker", SHARES, partial(by_layer, tltorch_tucker)),
        *fasterai,
        Tool("plain SVD", tuple({"rank": each} for each in (1, 2, 3, 4)), plain_svd),
    )


# Points --------------------------------------------------------------------------------------------


def versions(*names: str) -> Iterator[tuple[str, str]]:
    """Yield the versions of the installed packages; without its package, a peer's points are errors."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def one_line(error: Exception) -> str:
    """Return the message of a peer's exception, and where it was raised."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {first_line(error)} ({Path(frame.filename).name}:{frame.lineno})"


def describe(setting: Mapping[str, Any]) -> str:
    """A setting, in tables and file names: `rank=0.5`."""
    return ",".join(f"{name}={value:g}" for name, value in setting.items())


def write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def point(net: Net, stem: Path, convert: Callable[[], Converted], judge: Judge) -> dict[str, Any]:
    """Convert, export and judge one model: what is known of it, which is the error if there is one."""
    torch.manual_seed(0)
    np.random.seed(0)  # what tensorly draws from
    start = time.perf_counter()
    try:
        found = convert()
        seconds = time.perf_counter() - start
        save_onnx(export_program(found.model, net.inputs, dynamic_batch=False), stem.with_suffix(".onnx"))
        session(Deployed(stem.with_suffix(".onnx"), Runtime(1))).run(
            None, dict(onnx_feed(found.model, net.inputs))
        )
        cost = count(found.model, net.inputs)
        return {
            "seconds": seconds,
            "macs": cost.macs,
            "params": cost.params,
            "batchnorm_reestimated": found.batchnorm,
            "dense": dict(found.dense),
            **judge(found.model),
        }
    except Exception as error:  # the error is the tool's result
        return {"seconds": time.perf_counter() - start, "error": one_line(error)}


def points(folder: Path) -> list[dict[str, Any]]:
    """Return all points of a folder with their speed-ups, by tool and falling MACs."""
    speedups = read(folder / LATENCY)["speedup"]  # of all that have no error
    order = list(STYLES)
    found = [{**read(path), "speedup": speedups.get(path.stem)} for path in (folder / POINTS).glob("*.json")]
    return sorted(found, key=lambda each: (order.index(each["tool"]), -each.get("macs", 0)))


# Commands ------------------------------------------------------------------------------------------


@click.group()
def cli() -> None:
    """Compare sepconvert with its peers; README.md beside this file says how."""


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@cli.command("convert")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--factory", required=True, help="As sepconvert's.")
@click.option("--calib", required=True, help="Images to fit to, and to fine-tune on.")
@click.option("--data", required=True, help="Labelled images to be judged on.")
@click.option("--mean", required=True, callback=_numbers)
@click.option("--std", required=True, callback=_numbers)
@click.option("--finetune", default=0, metavar="EPOCHS", help="Make fine-tuned points of sepconvert too.")
@click.option("--tool", "names", multiple=True, metavar="NAME", help="Only this one. Repeatable.")
def convert_command(
    folder: Path,
    model: Path,
    factory: str,
    calib: str,
    data: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    finetune: int,
    names: tuple[str, ...],
) -> None:
    """Convert MODEL by every tool into FOLDER; existing points are kept."""
    known = {tool.name: tool for tool in tools(finetune)}
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"--tool {unknown[0]}: expected some of {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    (folder / POINTS).mkdir(parents=True, exist_ok=True)
    preprocess = Preprocess(mean, std)
    scored, images = load_data(data, preprocess), load_data(calib, preprocess, batch_size=128)
    original = load_model(model, factory=factory).model.eval()
    batched = partial(Scoring().batched, original)
    division = Division(sepconvert.Calibration(images=1024), epochs=0, seed=0, batched=batched)
    parts = split_data(scored, images, None, division)
    assert parts.calibration is not None  # `images` are given
    net = Net(
        original,
        (next(iter(scored))[0][:1],),
        parts.calibration,
        images,
        Heldout(original, parts.calibration.heldout),
        folder / "times",
    )
    expected = evaluate(original, scored)
    save_onnx(export_program(original, net.inputs, dynamic_batch=False), folder / f"{ORIGINAL}.onnx")
    cost = count(original, net.inputs)
    write(
        folder / f"{ORIGINAL}.json",
        {"accuracy": expected.accuracy().to_dict(), "macs": cost.macs, "params": cost.params},
    )

    def judge(converted: nn.Module) -> dict[str, Any]:
        found = evaluate(converted, scored)
        return {"accuracy": found.accuracy().to_dict(), **metric_delta(expected, found).to_dict()}

    for tool in chosen:
        for setting in tool.settings:
            stem = folder / POINTS / f"{tool.name} {describe(setting)}".replace(" ", "-").replace(".", "_")
            if not stem.with_suffix(".json").exists():
                found = point(net, stem, partial(tool.convert, net, **setting), judge)
                write(stem.with_suffix(".json"), {"tool": tool.name, "setting": describe(setting), **found})
                click.echo(f"{stem.name}: {found.get('accuracy_drop_pp', found.get('error'))}")


@cli.command("time")
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--runs", default=100, show_default=True, help="Rounds, in each of which every model runs.")
def time_command(folders: Sequence[Path], runs: int) -> None:
    """Time all models in each of FOLDERS against its original, batch 1, one thread: latency.json."""
    for folder in folders:
        original = folder / f"{ORIGINAL}.onnx"
        others = [
            path.with_suffix(".onnx")
            for path in sorted((folder / POINTS).glob("*.json"))
            if "error" not in read(path)
        ]
        shape = session(Deployed(original, Runtime(1))).get_inputs()[0].shape
        image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        models = [(Deployed(path, Runtime(1)), {"input": image}) for path in (original, original, *others)]
        first, again, *times = time_all(models, runs=runs, seed=0)
        median, ci95 = median_interval(first)
        write(
            folder / LATENCY,
            {
                "environment": environment(Runtime(1)),
                "peers": dict(versions("tensorly", "tensorly-torch", "fasterai")),
                "runs": runs,
                "original_milliseconds": {"median": median, "ci95": ci95.to_list()},
                "noise_floor": median_interval(first / again)[1].to_list(),
                "speedup": {
                    path.stem: speedup(first, again, each).to_dict()
                    for path, each in zip(others, times, strict=True)
                },
            },
        )


@cli.command("report")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def report_command(out: Path, folders: Sequence[Path]) -> None:
    """Write peers.json, peers.md and peers.png of FOLDERS, one net each, to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    nets = {
        folder.name: {
            ORIGINAL: read(folder / f"{ORIGINAL}.json"),
            "latency": read(folder / LATENCY),
            "points": points(folder),
        }
        for folder in folders
    }
    write(out / "peers.json", nets)
    tables = "\n\n".join((HEADING, *map(table, nets, nets.values())))
    (out / "peers.md").write_text(tables + "\n", encoding="utf-8")
    plot(nets, out / "peers.png")


# Results -------------------------------------------------------------------------------------------


def table(name: str, net: Mapping[str, Any]) -> str:
    """A net's points as Markdown, and which of the peers' lie beyond those of sepconvert."""
    original, latency = net[ORIGINAL], net["latency"]
    low, high = latency["noise_floor"]
    rows = [_row(each, original) for each in net["points"]]
    beyond = [f"{each['tool']} {each['setting']}" for each in beyond_ours(net["points"])]
    verdict = f"Peers faster and more accurate than a point of {SEPCONVERT}: {'; '.join(beyond) or 'none'}."
    if not any(each["tool"] == SEPCONVERT for each in measured(net["points"])):
        verdict = f"No point of {SEPCONVERT} is here to compare with."
    return "\n\n".join(
        (
            f"### {name}",
            f"Original: {100 * original['accuracy']['top1']:.2f} % of {original['accuracy']['n']} images, "
            f"{original['macs'] / 1e6:.1f} M MACs, {latency['original_milliseconds']['median']:.3f} ms; "
            f"against itself {low:.3f} to {high:.3f} times as fast.",
            tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
            verdict,
        )
    )


def _row(each: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, str]:
    row = {"tool": each["tool"], "setting": each["setting"], "seconds": f"{each['seconds']:.1f}"}
    if "error" in each:
        return {**row, "drop (pp)": each["error"]}
    drop = each["accuracy_drop_pp"]
    return {
        **row,
        "drop (pp)": _with_interval(drop["value"], drop["ci95"]),
        "speed-up": _with_interval(each["speedup"]["median"], each["speedup"]["ci95"]),
        "MACs": f"{each['macs'] / original['macs']:.2f}",
        "BatchNorm": "re-estimated" if each["batchnorm_reestimated"] else "kept",
    }


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def measured(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the points without an error."""
    return [each for each in points if "error" not in each]


def beyond_ours(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return peers' points that beat a training-free one of sepconvert in both speed and accuracy."""
    ours = [each for each in measured(points) if each["tool"] == SEPCONVERT]
    return [
        each
        for each in measured(points)
        if each["tool"] not in (SEPCONVERT, FINETUNED)
        and any(
            each["speedup"]["median"] > own["speedup"]["median"]
            and each["accuracy_drop_pp"]["value"] < own["accuracy_drop_pp"]["value"]
            for own in ours
        )
    ]


STYLES = {
    SEPCONVERT: {"color": "#c2185b", "marker": "o", "linewidth": 2.4, "zorder": 5},
    FINETUNED: {"color": "#c2185b", "marker": "D", "linewidth": 2.4, "linestyle": "--", "zorder": 5},
    "tensorly-torch CP": {"color": "#1565c0", "marker": "s"},
    "tensorly-torch Tucker": {"color": "#42a5f5", "marker": "^"},
    "fasterai tucker": {"color": "#2e7d32", "marker": "^"},
    "fasterai svd": {"color": "#66bb6a", "marker": "v"},
    "fasterai spatial": {"color": "#9e9d24", "marker": "P"},
    "fasterai cp": {"color": "#8d6e63", "marker": "X"},
    "plain SVD": {"color": "#616161", "marker": "*"},
}


def plot(nets: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One panel a net: accuracy lost, downwards, against measured speed-up; one line a tool."""
    figure = Figure(figsize=(5.2 * len(nets), 5.4), layout="constrained")
    axes = figure.subplots(1, len(nets), squeeze=False, sharey=True)
    for axis, (name, net) in zip(axes[0], nets.items(), strict=True):
        for tool, speeds, drops in curves(net["points"]):
            style = {"markersize": 6, "linewidth": 1.3, "alpha": 0.9, **STYLES[tool]}
            axis.plot(speeds, drops, label=tool, **style)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        # Linear up to one point, where tools are chosen, and by powers of ten beyond.
        axis.set_yscale("symlog", linthresh=1, linscale=1)
        axis.set_yticks(
            [0, 0.5, 1, 2, 5, 10, 20, 50, 90], ["0", "0.5", "1", "2", "5", "10", "20", "50", "90"]
        )
        axis.minorticks_off()
        axis.set_ylim(100, -0.6)
        accuracy, latency = net[ORIGINAL]["accuracy"], net["latency"]["original_milliseconds"]
        axis.set_title(f"{name}  ({100 * accuracy['top1']:.1f} %, {latency['median']:.2f} ms)")
        axis.set_xlabel("measured speed-up (ONNX Runtime, 1 thread)")
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("top-1 accuracy lost (percentage points)")
    handles = {
        label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(2 * len(nets), 5),
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def curves(points: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float], list[float]]]:
    """Tool, speed-ups and drops, by rising speed-up."""
    for tool, group in groupby(measured(points), key=lambda each: each["tool"]):
        pairs = sorted((each["speedup"]["median"], each["accuracy_drop_pp"]["value"]) for each in group)
        yield tool, [speed for speed, _ in pairs], [drop for _, drop in pairs]


if __name__ == "__main__":
    cli()
