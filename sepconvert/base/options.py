"""Options as values: frozen, and checked when they are made."""

import math
import numbers
from dataclasses import dataclass

from sepconvert.base.errors import SepconvertError, quoted


@dataclass(frozen=True)
class Budget:
    """What is demanded of a plan; None where nothing is."""

    rank: int | None = None
    target_macs: float | None = None  # most MACs, as a share of the original's
    target_params: float | None = None  # most parameters, likewise
    min_speedup: float | None = None  # least measured latency ratio
    max_drop: float | None = None  # largest measured drop of top-1 accuracy, in percentage points

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, low, high, expected in (
            ("--rank", self.rank, 1, math.inf, "a whole channel multiplier, 1 or more"),
            ("--target-macs", self.target_macs, 1e-9, 1, "a share of the MACs, above 0 and up to 1"),
            (
                "--target-params",
                self.target_params,
                1e-9,
                1,
                "a share of the parameters, above 0 and up to 1",
            ),
            ("--min-speedup", self.min_speedup, 1e-9, math.inf, "a ratio above 0"),
            ("--max-drop", self.max_drop, 0, 100, "percentage points, 0 to 100"),
        ):
            kind = numbers.Integral if name == "--rank" else numbers.Real
            if value is not None and not (isinstance(value, kind) and low <= value <= high):
                raise SepconvertError(f"{name} {quoted(value)}: expected {expected}")
        fixing = {
            "--rank": self.rank,
            "--target-macs": self.target_macs,
            "--target-params": self.target_params,
        }
        given = [name for name, value in fixing.items() if value is not None]
        if len(given) > 1:
            raise SepconvertError(f"{' and '.join(given)}: each fixes the plan by itself; pass one of them")

    @property
    def share(self) -> float | None:
        """Of the original's cost that a plan may have."""
        return self.target_params if self.target_macs is None else self.target_macs

    def or_default(self, *, labelled: bool, timed: bool) -> "Budget":
        """With a drop of one point where nothing is demanded.

        Raises:
            SepconvertError: what is demanded cannot be measured, for want of labelled data or timed runs.
        """
        if self == Budget():
            if not labelled:
                raise SepconvertError(
                    "mode: approx and auto need a budget; pass --rank, --target-macs, --target-params or "
                    "--min-speedup, or --data to hold accuracy"
                )
            return Budget(max_drop=1.0)
        if self.max_drop is not None and not labelled:
            raise SepconvertError("--max-drop: needs labelled data to measure the drop on; pass --data")
        if self.min_speedup is not None and not timed:
            raise SepconvertError("--min-speedup: needs timed runs; leave out --runs 0")
        return self
