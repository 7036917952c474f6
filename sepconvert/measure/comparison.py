"""Comparison of models: measurements of each, and of each against the first, as a table or as JSON."""

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from tabulate import tabulate

from sepconvert.base.errors import SepconvertError, quoted
from sepconvert.measure.divergence import OutputDifference
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.evaluation import NO_DELTA, MetricDelta
from sepconvert.measure.metrics.metric import drop_number, written_interval
from sepconvert.measure.profiling import Profile

Style = Literal["table", "markdown", "csv", "page"]

_TABULATE = {"table": "simple", "markdown": "github", "page": "html"}  # formats, by style


_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")  # separators that people read and programs do not


@dataclass(frozen=True)
class Delta:
    """Measurements of a model against the first one, on the same inputs in the same rounds.

    What was not measured is None. `outputs` are empty where they were not compared, and None where they
    differ in number or shape.
    """

    speedup: Speedup | None = None
    accuracy: MetricDelta | None = None
    outputs: tuple[OutputDifference, ...] | None = ()


@dataclass(frozen=True, repr=False)
class Comparison:
    """Profiles side by side, which print as a table. The first is the base of the ratios.

    `names` are those of the profiles. `deltas`, one for each profile but the first, are empty if the profiles
    were measured apart. `data_sha256` is that of all batches that the models were run on.
    """

    profiles: tuple[Profile, ...]
    names: tuple[str, ...] = ()
    deltas: tuple[Delta, ...] = ()
    data_sha256: str | None = None

    def __repr__(self) -> str:
        return self.text("table")

    def _repr_html_(self) -> str:
        return self.text("page")

    @property
    def verdict(self) -> str:
        """One sentence: how the fastest of the others compares with the first, by what was measured."""
        base, *others = self.profiles
        if not others:
            return base.sentence
        deltas = self.deltas or (Delta(),) * len(others)
        index = self.fastest - 1
        names = self.names or tuple(f"#{number}" for number in range(1, len(self.profiles) + 1))
        names = short_names(names)
        timed = any(delta.speedup is not None for delta in deltas)
        fastest = f", the fastest of {len(others)}," if len(others) > 1 and timed else ""
        return f"{names[index + 1]}{fastest} {_against(base, others[index], deltas[index], names[0])}."

    @property
    def fastest(self) -> int:
        """Index of the profile that the verdict is on: the fastest of the others, or the second."""
        speeds = [0.0 if delta.speedup is None else delta.speedup.median for delta in self.deltas]
        return 1 + (speeds.index(max(speeds)) if speeds else 0)

    def rows(self) -> list[list[str]]:
        """Return a row for each quantity that was measured: its name, and its value for each profile."""
        base = self.profiles[0]
        deltas = (None, *(self.deltas or (Delta(),) * (len(self.profiles) - 1)))
        columns = [
            _column(profile, base, delta) for profile, delta in zip(self.profiles, deltas, strict=True)
        ]
        wanted = [name for name in columns[0] if any(column[name] != "-" for column in columns)]
        rows = [[_with_unit(name, deltas), *(column[name] for column in columns)] for name in wanted]
        if any(self.dominated):
            rows.append(["", *("dominated" if dominated else "" for dominated in self.dominated)])
        return rows

    def text(self, style: Style) -> str:
        """Return a table for the terminal, in Markdown, of comma-separated values, or in HTML."""
        rows = self.rows()
        headers = [
            "",
            "base" if len(self.profiles) > 1 else "value",
            *(f"#{index}" for index in range(2, len(self.profiles) + 1)),
        ]
        if style == "csv":
            lines = io.StringIO()
            table = [
                ["", *(self.names or headers[1:])],
                *([_THOUSANDS.sub("", cell) for cell in row] for row in rows),
            ]
            csv.writer(lines, lineterminator="\n").writerows(table)
            return lines.getvalue().rstrip("\n")
        if style == "table":  # narrower, to fit a terminal
            rows = [[cell.replace(" ~ ", "\n~ ") for cell in row] for row in rows]
        text = tabulate(
            rows,
            headers=headers,
            disable_numparse=True,
            tablefmt=_TABULATE[style],
        )
        legend = [f"{header}: {name}" for header, name in zip(headers[1:], self.names, strict=False)]
        if style == "page":
            return "".join([*(f"<div>{html.escape(line)}</div>" for line in legend), text])
        return "\n".join([*legend, "", text] if legend else [text])

    def to_json(self) -> dict[str, Any]:
        """Return `{"names": […], "profiles": […], "deltas": […], …}`, each delta against the first profile.

        Separate runs are not paired: they allow no statement about speed-up or agreement.
        """
        base = self.profiles[0]
        deltas = self.deltas or (Delta(),) * (len(self.profiles) - 1)
        return {
            "names": list(self.names),
            "profiles": [profile.to_json() for profile in self.profiles],
            "deltas": [
                {
                    "params_ratio": base.params / profile.params if profile.params else None,
                    "macs_ratio": base.macs / profile.macs if profile.macs else None,
                    "latency_speedup": None if delta.speedup is None else delta.speedup.to_dict(),
                    **(NO_DELTA if delta.accuracy is None else delta.accuracy.to_dict()),
                    "outputs": None
                    if delta.outputs is None
                    else [difference.to_dict() for difference in delta.outputs],
                }
                for profile, delta in zip(self.profiles[1:], deltas, strict=True)
            ],
            "dominated": list(self.dominated),
            "data_sha256": self.data_sha256,
        }

    @property
    def dominated(self) -> tuple[bool, ...]:
        """Whether each profile is dominated: another is as good in latency and accuracy, and better in one.

        It is False for all if there are no more than two profiles. A latency is better if the intervals of
        the medians do not overlap.
        """
        if len(self.profiles) < 3 or not self.deltas:
            return (False,) * len(self.profiles)
        return tuple(any(_dominates(other, own) for other in self.profiles) for own in self.profiles)


def _dominates(one: Profile, other: Profile) -> bool:
    if one.latency is None or one.metric is None or other.latency is None or other.metric is None:
        return False
    faster = one.latency.ci95_ms.hi < other.latency.ci95_ms.lo
    slower = other.latency.ci95_ms.hi < one.latency.ci95_ms.lo
    if one.metric.value == other.metric.value:
        return faster
    better = (one.metric.value > other.metric.value) == one.metric.higher_is_better
    return better and not slower


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the names of files without their folders, unless two would be the same."""
    short = tuple(PurePath(path).name for path in paths)
    return short if len({*short}) == len(short) else tuple(paths)


def compare(*profiles: Profile) -> Comparison:
    """Put profiles side by side. Latencies of separate runs are shown without a claim of significance.

    Raises:
        SepconvertError: there is no profile, or something that is none.

    Example:
        >>> from sepconvert import Profile, compare
        >>> before, after = (
        ...     Profile(params, macs, None, None, None, None, {})
        ...     for params, macs in ((19_200, 1_228_800), (843, 53_952))
        ... )
        >>> print(compare(before, after))
                    base       #2
        ----------  ---------  ---------------
        parameters  19,200     843 (22.78×)
        MACs        1,228,800  53,952 (22.78×)
        FLOPs       2,457,600  107,904
    """
    if not profiles or not all(isinstance(each, Profile) for each in profiles):
        wrong = next((each for each in profiles if not isinstance(each, Profile)), None)
        raise SepconvertError(
            f"compare: expected profiles, got {quoted(wrong) if profiles else 'none'}; pass what "
            "sepconvert.profile returns, the base first"
        )
    return Comparison(profiles)


# Text ----------------------------------------------------------------------------------------------


def _column(profile: Profile, base: Profile, delta: Delta | None) -> dict[str, str]:
    column = profile.facts()
    if profile is not base:
        for name, value, reference in (
            ("parameters", profile.params, base.params),
            ("MACs", profile.macs, base.macs),
        ):
            column[name] += f" ({reference / value:.2f}×)" if value and reference else ""
    return column | _paired(delta or Delta())


def _against(base: Profile, profile: Profile, delta: Delta, name: str) -> str:
    """Return what a model gains and loses against the first."""
    speedup, accuracy = delta.speedup, delta.accuracy
    if speedup is None:
        speed = f"was not timed together with {name}"
    elif not speedup.significant:
        speed = f"is as fast as {name}, within noise"
    else:
        speed = f"is {speedup.median:.2f}× [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}] as fast as {name}"
    parts = [speed]
    if base.macs != profile.macs and profile.macs:
        fewer = base.macs / profile.macs
        parts.append(f"with {fewer:.2f}× fewer MACs" if fewer > 1 else f"with {1 / fewer:.2f}× the MACs")
    if accuracy is not None:
        worse = "drop" if accuracy.metric.higher_is_better else "worse by"
        parts.append(f"{accuracy.metric.name} {worse} {accuracy.written_drop}")
    elif base.metric is not None and profile.metric is not None:
        parts.append(f"{base.metric.name} {base.metric} → {profile.metric}")
    return ", ".join(parts)


def _paired(delta: Delta) -> dict[str, str]:
    ratio, accuracy = delta.speedup, delta.accuracy
    return {
        "speed-up": "-"
        if ratio is None
        else f"{ratio.median:.2f}× [{ratio.ci95.lo:.2f}, {ratio.ci95.hi:.2f}]"
        + ("" if ratio.significant else " ~ within noise"),
        "noise": "-" if ratio is None else f"[{ratio.noise_floor.lo:.3f}, {ratio.noise_floor.hi:.3f}]",
        "drop": "-" if accuracy is None else _drop(accuracy),
        "McNemar p": "-" if accuracy is None or accuracy.p_value is None else f"{accuracy.p_value:.3g}",
        "agreement": "-"
        if accuracy is None or accuracy.agreement is None
        else f"{100 * accuracy.agreement:.2f} %",
        "max abs Δ": "other shapes"
        if delta.outputs is None
        else _each(delta, lambda output: "not finite" if output.max_abs is None else _number(output.max_abs)),
        "mean abs Δ": _each(delta, lambda output: _number(output.mean_abs)),
        "relative Δ": _each(delta, lambda output: _number(output.relative)),
        "cosine": _each(delta, lambda output: _number(output.cosine, ".6f")),
        "SNR, dB": _each(delta, lambda output: _number(output.snr_db, ".1f")),
        "same argmax": _each(delta, lambda output: _number(output.agreement, ".2%")),
    }


def _drop(delta: MetricDelta) -> str:
    unit = delta.metric.unit
    return f"{drop_number(delta.drop, unit)} {written_interval(delta.ci95.to_list(), unit)}"


def _with_unit(name: str, deltas: Sequence[Delta | None]) -> str:
    """Return the name of a row; that of the drop is followed by the unit of the metric, which all share."""
    if name != "drop":
        return name
    unit = next(each.accuracy.metric.unit for each in deltas if each is not None and each.accuracy)
    return f"drop, {unit}" if unit else "drop"


def _each(delta: Delta, cell: Callable[[OutputDifference], str]) -> str:
    """Return a cell with a value for every output, in the models' order; a dash if there is none."""
    cells = [cell(output) for output in delta.outputs or ()]
    return ", ".join(cells) if set(cells) - {"-"} else "-"


def _number(value: float | None, style: str = ".2e") -> str:
    return "-" if value is None else f"{value:{style}}"
