"""Options as values: frozen, checked when they are made, and defined once.

The metadata of a field is all that the command line needs to know of an option: its flag, help, type and
default are made from it (see `sepconvert.cli.options`). Nothing here imports torch: `--help` does without.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sepconvert.base.environment import (
    GRAPH_OPTIMIZATIONS,
    MAX_THREADS,
    SPINNING,
    Runtime,
    available_cores,
)
from sepconvert.base.errors import ABOVE_ZERO, SepconvertError, quoted
from sepconvert.base.options.declared import check_options, option, path_of, texts_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

Mode = Literal["exact", "approx", "auto"]
MODES: tuple[Mode, ...] = ("exact", "approx", "auto")

Gate = Literal["macs", "latency", "none"]
GATES: tuple[Gate, ...] = ("macs", "latency", "none")

Divergence = Literal["kl", "bernoulli", "squared", "relative"]
DIVERGENCES: tuple[Divergence, ...] = ("kl", "bernoulli", "squared", "relative")

RangeMethod = Literal["minmax", "entropy", "percentile"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("minmax", "entropy", "percentile")

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Budget:
    """Demands on a plan; None where nothing is demanded.

    `rank`, `target_macs` and `target_params` each fix the plan; the others are limits to be met.
    """

    rank: int | None = option(
        "Depthwise multiplier of all layers, without a search, in approx mode; excludes `target_macs` and "
        "`target_params`.",
        low=1,
        whole=True,
        metavar="N",
    )
    target_macs: float | None = option(
        "Largest MACs, as a share of the original's; excludes `rank` and `target_params`.",
        low=ABOVE_ZERO,
        high=1,
        metavar="F",
    )
    target_params: float | None = option(
        "Largest number of parameters, as a share of the original's; excludes `rank` and `target_macs`.",
        low=ABOVE_ZERO,
        high=1,
        metavar="F",
    )
    min_speedup: float | None = option(
        "Smallest speed-up: measured latency of the original over that of the converted model.",
        low=ABOVE_ZERO,
        metavar="X",
    )
    max_drop: float | None = option(
        "Largest drop of the metric on `data`, in its unit: percentage points of accuracy, dB of psnr.",
        low=0,
        metavar="X",
        shown_default="1 percentage point, if nothing else is demanded",
    )
    confidence: float | None = option(
        "Probability with which the drop on unseen images of the same kind keeps within `max_drop`, such as "
        "0.95; by default, the drop on `data` does.",
        low=0.5,
        high=0.9999,
        metavar="P",
    )

    def __post_init__(self) -> None:
        """Check the ranges, and that at most one demand fixes the plan."""
        check_options(self)
        given = [
            f"`{name}`"
            for name in ("rank", "target_macs", "target_params")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise SepconvertError(f"{' and '.join(given)}: each fixes the plan by itself; pass one of them")

    @property
    def share(self) -> float | None:
        """Fraction of the original's MACs or parameters that the plan may have, if one is demanded."""
        return self.target_params if self.target_macs is None else self.target_macs

    def or_default(self, *, unit: str | None, timed: bool) -> "Budget":
        """Return the budget, or a drop of one percentage point where nothing is demanded.

        Args:
            unit: that of drops; None if there are no data to measure any on.
            timed: whether models are timed.

        Raises:
            SepconvertError: a demand cannot be measured, for want of labelled data or of timed runs, or there
                is none and the metric is no share.
        """
        if self == Budget(confidence=self.confidence):
            if unit not in (None, "pp"):
                raise SepconvertError(
                    "`max_drop`: has no default for this metric; pass the largest drop"
                    + (f" in {unit}" if unit else "")
                    + ", or another budget"
                )
            if unit is None:
                raise SepconvertError(
                    "`mode`: approx and auto need a budget; pass `rank`, `target_macs`, `target_params` or "
                    "`min_speedup`, or `data` to hold accuracy"
                )
            return replace(self, max_drop=1.0)
        if self.max_drop is not None and unit is None:
            raise SepconvertError("`max_drop`: needs labelled data to measure the drop on; pass `data`")
        if self.min_speedup is not None and not timed:
            raise SepconvertError("`min_speedup`: needs timed runs; pass `runs` above 0")
        if self.confidence is not None and self.max_drop is None:
            raise SepconvertError("`confidence`: needs a largest drop to prove; pass `max_drop` too")
        return self


@dataclass(frozen=True)
class Task:
    """Settings of how the outputs of a model are judged, compared and trained.

    `metric` may be a name, a function `(outputs, targets) → N scores` or a `torchmetrics.Metric`;
    `postprocess` and `loss` may be functions.
    """

    metric: Any = option(
        "What drops are measured in: top1, top5, miou, dice, pixel-accuracy, psnr, ssim, mse, mae, auc, f1, "
        "map, cer, or a callable (outputs, targets) → N scores, as file.py:callable or pkg.mod:callable.",
        metavar="NAME|FILE:CALLABLE",
        shown_default="top1, of classifiers",
    )
    postprocess: Any = option(
        "Callable between the outputs of both models and the metric, as file.py:callable.",
        metavar="FILE:CALLABLE",
    )
    output: int | str | None = option(
        "Name or number of the output that is judged.",
        metavar="NAME|INDEX",
        shown_default="the logits, or the first",
    )
    ignore_index: int | None = option(
        "Class number that is not scored, such as 255.",
        low=-(2**31),
        high=2**31,
        whole=True,
        metavar="N",
    )
    batch_dim: int | None = option(
        "Dimension of the inputs that counts samples.",
        low=0,
        high=8,
        whole=True,
        metavar="N",
        shown_default="found by running two samples",
    )
    divergence: Divergence | None = option(
        "How outputs are compared with the original's: kl (logits over classes), bernoulli (of each value), "
        "squared (pictures), relative (to their own scale).",
        choices=DIVERGENCES,
        shown_default="decided from each output",
    )
    loss: Any = option(
        "Loss of the task next to the distillation, a callable (outputs, targets), as file.py:callable.",
        metavar="FILE:CALLABLE",
    )

    def __post_init__(self) -> None:
        """Check the ranges; a number given as text is one."""
        if isinstance(self.output, str) and self.output.isdecimal():
            object.__setattr__(self, "output", int(self.output))
        check_options(self)
        if isinstance(self.output, bool) or not isinstance(self.output, int | str | None):
            raise SepconvertError(f"`output`: expected a name or a number, got {quoted(self.output)}")
        for name in ("postprocess", "loss"):
            value = getattr(self, name)
            if value is not None and not callable(value) and not isinstance(value, str):
                raise SepconvertError(f"`{name}`: expected a function, got {quoted(value)}")

    @property
    def needs_data(self) -> str | None:
        """Name of a setting that is of no use without data to score; None if there is none."""
        names = ("metric", "postprocess", "ignore_index")
        return next((name for name in names if getattr(self, name) is not None), None)

    @classmethod
    def of(cls, metric: Any) -> "Task":
        """Return the task of an argument `metric`, which may be one."""
        return metric if isinstance(metric, Task) else cls(metric=metric)


@dataclass(frozen=True)
class Selection:
    """Layers that may be replaced, by globs of their names."""

    include: Sequence[str] = option("Replace only layers with such names. Repeatable.", (), metavar="GLOB")
    exclude: Sequence[str] = option("Replace no layers with such names. Repeatable.", (), metavar="GLOB")

    def __post_init__(self) -> None:
        """Refuse a single string, whose letters would be taken for globs."""
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(glob, str) for glob in value):
                raise SepconvertError(f"`{name}`: expected a list of globs, got {quoted(value)}")

    def admits(self, *names: str) -> bool:
        """Return whether a layer that goes by these names may be replaced."""
        all_globs = self.include, self.exclude
        included, excluded = (any(fnmatchcase(n, g) for n in names for g in globs) for globs in all_globs)
        return (included or not self.include) and not excluded


@dataclass(frozen=True)
class Timing:
    """Settings of ONNX Runtime for what is timed, and the number of runs."""

    threads: int | None = option(
        "Threads of ONNX Runtime.",
        low=1,
        high=MAX_THREADS,
        whole=True,
        metavar="N",
        shown_default="all cores",
    )
    graph_optimization: str = option(
        "Graph optimization of ONNX Runtime for what is timed: the level that you deploy with.",
        GRAPH_OPTIMIZATIONS[0],
        choices=GRAPH_OPTIMIZATIONS,
    )
    provider: str = option(
        "Execution provider of ONNX Runtime, such as cpu, cuda, tensorrt, openvino or coreml.",
        "cpu",
        metavar="NAME",
    )
    provider_options: Mapping[str, Any] | None = option(
        "Option of the execution provider, such as device_id=1; its threads follow from `threads`. "
        "Repeatable.",
        flag="provider-option",
        metavar="KEY=VALUE",
    )
    spinning: str = option(
        "Whether ONNX Runtime's threads spin while they wait, as they do by default where it is deployed; "
        "models that are timed in turns then disturb each other.",
        SPINNING[0],
        choices=SPINNING,
    )
    runs: int = option("Timed runs of each model; 0 for none.", 50, low=0, whole=True, metavar="N")
    measure_seconds: float = option(
        "Time limit for timing single layers in approx and auto mode.",
        300.0,
        low=0,
        metavar="S",
    )
    cache: Path | None = option(
        "Folder in which times of layers, and what was learnt of models, are kept for the next run.",
        metavar="DIR",
        shown_default="sepconvert in the user's cache",
    )

    def __post_init__(self) -> None:
        """Check the ranges, and that the runtime has the provider."""
        check_options(self)
        object.__setattr__(self, "cache", path_of("cache", self.cache))
        if not isinstance(self.provider, str):
            raise SepconvertError(f"`provider`: expected a name such as cpu, got {quoted(self.provider)}")
        # ONNX Runtime's own name is understood, too.
        object.__setattr__(self, "provider", self.provider.lower().removesuffix("executionprovider"))
        object.__setattr__(self, "provider_options", texts_of("provider_options", self.provider_options))
        _ = self.runtime

    @property
    def runtime(self) -> Runtime:
        """Settings of ONNX Runtime."""
        threads = available_cores() if self.threads is None else self.threads
        options = self.provider_options or {}
        return Runtime(threads, self.graph_optimization, self.provider, options, self.spinning)


@dataclass(frozen=True)
class Calibration:
    """Number of calibration images, the memory that may be used, and the time to tune factors on them.

    `memory` is in bytes; the flag --memory counts gigabytes. `reconstruct` is in seconds.
    """

    images: int = option(
        "Calibration images; a quarter of them, at most 256, are held out to judge plans by.",
        1536,
        low=1,
        whole=True,
        flag="calib-images",
        metavar="N",
    )
    memory: float | None = option(
        "Memory limit of the process during calibration, in GB; a lower limit is slower but gives the same "
        "result.",
        low=1,
        unit=1e9,
        metavar="GB",
        shown_default="half of the free memory",
    )
    reconstruct: float = option(
        "Seconds in which all factors of a plan are tuned together on the calibration images, without "
        "labels, to reproduce the original's outputs and those of its layers; 0 for not at all.",
        0.0,
        low=0,
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(self)


@dataclass(frozen=True)
class Int8:
    """Settings of the int8 form that models are deployed in.

    `form` "on" plans for it, "auto" plans for it where the original is measured to be faster in it than in
    floating point.
    """

    form: Literal["off", "on", "auto"] = option(
        "Deploy in static int8: plan for it, measure in it, and write the int8 files. With auto, only if the "
        "original is measured to be faster in int8 than in floating point.",
        "off",
        choices=("off", "on", "auto"),
        flag="int8",
        flag_value="on",
    )
    ranges: RangeMethod = option(
        "Way in which the int8 ranges of values are measured on the calibration images.",
        "minmax",
        choices=RANGE_METHODS,
        flag="int8-calibration",
    )

    def __post_init__(self) -> None:
        """Check the names, and that nothing is set that would be ignored."""
        check_options(self)
        if not self and self.ranges != "minmax":
            raise SepconvertError("`ranges`: only for int8; pass `int8` too, or leave it out")

    def __bool__(self) -> bool:
        """Return whether int8 is wanted."""
        return self.form != "off"

    @classmethod
    def of(cls, given: "bool | str | Int8") -> "Int8":
        """Return the settings of an argument `int8`, which may be True, "auto" or settings."""
        if isinstance(given, Int8):
            return given
        if isinstance(given, bool):
            return cls("on" if given else "off")
        if given == "auto":
            return cls("auto")
        raise SepconvertError(
            f"`int8`: expected True, False, 'auto' or a sepconvert.Int8, got {quoted(given)}"
        )


@dataclass(frozen=True)
class Finetuning:
    """Distillation from the original after the conversion.

    `train` holds batches (x, y) of a map-style dataset, labels of -1 meaning none; without it the calibration
    images are trained on. `on_step` is called after each step.
    """

    epochs: int = option(
        "Epochs of distillation from the original after the conversion, on `train` or `calib`.",
        0,
        low=0,
        whole=True,
        flag="finetune",
        metavar="EPOCHS",
    )
    train: "DataLoader[Any] | None" = None
    precision: Precision | None = option(
        "Mixed precision of fine-tuning.", choices=PRECISIONS, shown_default="that of accelerate launch"
    )
    checkpoint: Path | None = option(
        "File that keeps the state of fine-tuning while it runs.",
        metavar="FILE",
        shown_default="beside the result directory",
    )
    resume: bool = option("Continue from the checkpoint of an interrupted run.", False)
    on_step: Callable[[Any], None] | None = None  # called with a distillation step

    def __post_init__(self) -> None:
        """Check the ranges, and that nothing is set that would be ignored."""
        check_options(self)
        if self.on_step is not None and not callable(self.on_step):
            raise SepconvertError(f"`on_step`: expected a function, got {quoted(self.on_step)}")
        object.__setattr__(self, "checkpoint", path_of("checkpoint", self.checkpoint))
        ignored = [
            f"`{name}`" for name in ("train", "precision", "checkpoint", "resume") if getattr(self, name)
        ]
        if ignored and not self.epochs:
            raise SepconvertError(
                f"{', '.join(ignored)}: only for fine-tuning; pass `finetune` too, or leave {ignored[0]} out"
            )

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return self.epochs > 0


@dataclass(frozen=True)
class Origin:
    """Provenance of a model and of its conversion, for the report."""

    path: str | None = None  # of the model file, or the name of a model without one
    sha256: str | None = None  # of the file's content, or of the model's weights
    command: str | None = None  # the command line that asked for the conversion
    weights: str | None = None  # of a model that a library built: their name, or "random"
    data: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # source and sha256 of data and calib

    def to_json(self) -> dict[str, Any] | None:
        """Return the `model` object of the report; None where there is no file."""
        if self.path is None:
            return None
        named = {} if self.weights is None else {"weights": self.weights}
        return {"path": self.path, "sha256": self.sha256, **named}
