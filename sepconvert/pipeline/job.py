"""One conversion's settings as a value, checked before any work begins."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sepconvert.base.errors import MAX_SEED, SepconvertError, check_number, quoted
from sepconvert.base.options.declared import check_options, option, path_of
from sepconvert.base.options.exporting import Export
from sepconvert.base.options.values import (
    GATES,
    MODES,
    Budget,
    Calibration,
    Finetuning,
    Gate,
    Int8,
    Mode,
    Origin,
    Selection,
    Task,
    Timing,
)
from sepconvert.base.progress import Progress, silent

Check = Literal["onnx", "torch"]

_VALUES = {
    "task": Task,
    "selection": Selection,
    "timing": Timing,
    "calibration": Calibration,
    "int8": Int8,
    "export": Export,
    "origin": Origin,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of one conversion; see `sepconvert.convert`."""

    mode: Mode = option(
        "exact: only replacements that preserve the function; approx: depthwise and pointwise convolutions, "
        "fitted to the data; auto: for each layer the best of all structures.",
        "exact",
        choices=MODES,
    )
    gate: Gate = option(
        "Convert only layers that cost less: counted in MACs, or measured in ONNX Runtime.",
        choices=GATES,
        shown_default="macs; latency in auto mode and in int8",
    )
    tol: float | None = option(
        "Relative kernel error that counts as exact.",
        low=0,
        metavar="X",
        shown_default="rounding of the kernel's dtype",
    )
    seed: int = option(
        "Seed of random inputs, data splits, training and the order of runs.",
        0,
        low=0,
        high=MAX_SEED,
        whole=True,
        metavar="N",
    )
    nearest: bool = option(
        "Deliver the plan that comes nearest to the demands, where none meets them.", False
    )
    dynamic_batch: bool = option("Leave the batch dimension open where the model allows it.", True)
    check: Check = "onnx"
    task: Task = field(default_factory=Task)
    budget: Budget = field(default_factory=Budget)
    selection: Selection = field(default_factory=Selection)
    timing: Timing = field(default_factory=Timing)
    calibration: Calibration = field(default_factory=Calibration)
    int8: Int8 = field(default_factory=Int8)
    export: Export = field(default_factory=Export)
    finetuning: Finetuning = field(default_factory=Finetuning)
    out: Path | None = None
    origin: Origin = field(default_factory=Origin)
    progress: Progress = silent

    def __post_init__(self) -> None:
        """Fill in the gate of the mode, and check what no single value can."""
        if self.gate is None:
            by_time = self.mode == "auto" or bool(self.int8)
            object.__setattr__(self, "gate", "latency" if by_time else "macs")
        check_options(self)
        for name, kind in _VALUES.items():
            if not isinstance(value := getattr(self, name), kind):
                raise SepconvertError(
                    f"`{name}`: expected a sepconvert.{kind.__name__}, got {quoted(value)}; "
                    f"pass {name}=sepconvert.{kind.__name__}(…)"
                )
        if not callable(self.progress):
            raise SepconvertError(f"`progress`: expected a function, got {quoted(self.progress)}")
        if self.tol is not None and self.tol >= 1:
            raise SepconvertError(f"`tol`: expected a relative error in [0, 1), got {self.tol}")
        if self.check not in ("onnx", "torch"):
            raise SepconvertError(f"`check`: expected onnx or torch, got {quoted(self.check)}")
        if self.check == "torch" and self.out is not None:
            raise SepconvertError("`check`: torch exports no files; leave `out` out, or check in onnx")
        if self.check == "torch" and (given := self.export.given()):
            raise SepconvertError(
                f"`{given[0]}`: is of ONNX files, and check torch writes none; leave it out, or check in onnx"
            )
        if self.check == "torch" and self.int8:
            raise SepconvertError("`int8`: is a form of ONNX files; check in onnx")
        if self.mode == "exact" and (self.budget != Budget() or self.finetuning):
            raise SepconvertError(
                "`mode`: budgets, calibration and fine-tuning are for the modes approx and auto; pass one of "
                "them"
            )
        if self.calibration.reconstruct:
            self._check_reconstruction()
        if self.mode == "exact" and self.nearest:
            raise SepconvertError("`nearest`: is for demands on a plan, in the modes approx and auto")
        if self.mode == "exact" and self.task.divergence is not None:
            raise SepconvertError(
                "`divergence`: is what plans are ranked by in the modes approx and auto; leave it out"
            )
        if self.task.loss is not None and not self.finetuning:
            raise SepconvertError("`loss`: only for fine-tuning; pass `finetune` too, or leave it out")
        if self.finetuning and self.budget.confidence is not None:
            raise SepconvertError(
                "`confidence`: proves plans that are fixed beforehand, and fine-tuning chooses them by their "
                "drop; leave `finetune` out, or `confidence`"
            )
        if self.mode == "auto" and self.budget.rank is not None:
            raise SepconvertError(
                "`rank`: fixes the multiplier of approx mode; pass another budget in auto mode"
            )

    def _check_reconstruction(self) -> None:
        """Raise `SepconvertError` if factors cannot be tuned, or are by something else."""
        refusals = {
            "is for the modes approx and auto; pass one of them": self.mode == "exact",
            "tunes factors as fine-tuning does, with fewer means; leave one of them out": self.finetuning,
            "tunes factors in floating point; leave it out with `int8`": self.int8,
            "tunes plans that `confidence` proves as they are; leave one of them out": (
                self.budget.confidence is not None
            ),
        }
        for reason, holds in refusals.items():
            if holds:
                raise SepconvertError(f"`reconstruct`: {reason}")

    @property
    def runs(self) -> int:
        """Timed runs of the files; 0 where none are written."""
        return self.timing.runs if self.check == "onnx" else 0

    @property
    def learnt(self) -> Path | None:
        """Folder of what conversions learn for the next ones; None keeps nothing."""
        return None if self.timing.cache is None else self.timing.cache / "learnt"

    def deployed_in_int8(self, is_int8: bool) -> "Job":
        """Return the job after the decision about int8, which `int8` auto leaves to a measurement."""
        return self if is_int8 else replace(self, int8=Int8())

    def with_default_budget(self, *, unit: str | None) -> "Job":
        """Return the job with the budget that holds where none is given; see `Budget.or_default`.

        `unit` is that of drops, None without data to measure any on.
        """
        if self.mode == "exact":
            return self
        by_time = self.gate == "latency" and self.budget.share is None
        return replace(self, budget=self.budget.or_default(unit=unit, timed=self.timing.runs > 0 or by_time))

    @classmethod
    def of(
        cls,
        *,
        metric: Any,
        finetune: int | Finetuning,
        out: str | os.PathLike[str] | None,
        int8: bool | str | Int8 = False,
        **settings: Any,
    ) -> "Job":
        """Return a job of the arguments of `sepconvert.convert`."""
        if not isinstance(finetune, Finetuning):
            check_number("finetune", finetune, 0, whole=True)
            finetune = Finetuning(epochs=finetune)
        return cls(
            task=Task.of(metric),
            int8=Int8.of(int8),
            finetuning=finetune,
            out=path_of("out", out),
            **settings,
        )
