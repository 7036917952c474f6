"""The int8 files of a conversion: written, checked, and measured beside those in floating point."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sepconvert.base.errors import VerificationError
from sepconvert.files.onnx.facts import onnx_sizes
from sepconvert.files.onnx.graph.running import answers
from sepconvert.files.onnx.int8.form import Int8Form, QuantizationNote
from sepconvert.files.onnx.writing import passes_check, save_edited
from sepconvert.files.results import INT8_FILES
from sepconvert.measure.latency import Deployed, PairTiming, Speedup, latency, speedup, time_all
from sepconvert.measure.metrics.evaluation import NO_DELTA, MetricDelta, metric_delta
from sepconvert.measure.profiling import Profile, batch_size
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.original import Original
from sepconvert.planning.conversion import Conversion

FOUR_FORMS = "float", "int8", "converted", "converted_int8"
"""The original and the converted model, each in floating point and in int8."""


@dataclass(frozen=True)
class MeasuredForm:
    """One form of a model, against the original in floating point and in int8."""

    profile: Profile
    speedup: Speedup | None  # over the original in floating point; None if it was not timed
    over_int8: Speedup | None  # over the original in int8
    accuracy: MetricDelta | None  # drop from the original in floating point

    def to_json(self) -> dict[str, Any]:
        """Return the form's entry in the report's `forms`."""
        return {
            **self.profile.to_json(),
            "delta": {
                "latency_speedup": None if self.speedup is None else self.speedup.to_dict(),
                "latency_speedup_over_int8": None if self.over_int8 is None else self.over_int8.to_dict(),
                **(NO_DELTA if self.accuracy is None else self.accuracy.to_dict()),
            },
        }


@dataclass(frozen=True)
class FourForms:
    """All four forms, measured in the same rounds and on the same samples."""

    measured: Mapping[str, MeasuredForm]  # by the names in `FOUR_FORMS`
    note: QuantizationNote
    checks: Mapping[str, "Int8Check"]  # of both int8 files
    timing: PairTiming | None  # of the int8 files

    def to_json(self) -> dict[str, Any]:
        """Return the report's `forms`."""
        return {
            "quantization": {
                **asdict(self.note),
                "files": {name: asdict(each) for name, each in self.checks.items()},
            },
            **{name: each.to_json() for name, each in self.measured.items()},
        }


@dataclass(frozen=True)
class Int8Check:
    """An int8 file as ONNX Runtime runs it, on calibration images; errors are root mean squares."""

    deviation: float  # of the outputs from those of floating point, over their standard deviation
    rounding: (
        float  # what integer kernels are off the file's definition, over what that is off floating point
    )


def write_int8(original: Original, made: Conversion, form: Int8Form, folder: Path) -> tuple[Path, Path]:
    """Write the int8 files of both models; they pass `onnx.checker` if those in floating point do."""
    paths = folder / INT8_FILES[0], folder / INT8_FILES[1]
    for path, model in zip(paths, (original.model, made.model), strict=True):
        save_edited(form.model(model), path, check=passes_check(form.float_model(model)))
    return paths


def check_int8(
    original: Original, made: Conversion, form: Int8Form, paths: tuple[Path, Path]
) -> dict[str, Int8Check]:
    """Hold what ONNX Runtime makes of each int8 file against what the file says, on calibration images.

    Without graph optimization the runtime computes in floating point between QuantizeLinear and
    DequantizeLinear: the definition of the file. Optimized, it computes in integers, whose results may fall
    on the other side of a tie, but which must not saturate.

    It may be off by as much as the definition is off floating point, and by a step of the outputs in any
    case: a softmax that is almost 1 has next to no error, until a step more or less is one.

    Returns:
        The check of each file, by its name.

    Raises:
        VerificationError: a file deviates by more.
    """
    found = {}
    for path, model in zip(paths, (original.model, made.model), strict=True):
        feed, file = form.example(model), onnx.load(str(path))
        optimized, defined = (answers(file, feed, optimised=each) for each in (True, False))
        exact = answers(form.float_model(model), feed)
        optimized, defined, exact = (
            [each for each in outputs if np.asarray(each).dtype.kind == "f"]
            for outputs in (optimized, defined, exact)
        )
        if not exact:  # class numbers, say, of which any may be as far off as any other
            found[path.name] = Int8Check(0.0, 0.0)
            continue
        most = max(_rms(defined, exact), *(_step(each) for each in defined))
        check = Int8Check(
            _rms(optimized, exact) / (_spread(exact) or 1.0), _rms(optimized, defined) / (most or 1.0)
        )
        found[path.name] = check
        if not check.rounding <= 1:
            raise VerificationError(
                f"verification failed: in ONNX Runtime {path.name} is {check.rounding:.2f} times as far "
                "off its own definition as quantization explains; the runtime's integer kernels may "
                "saturate or fail on this processor; deploy in floating point, and report it to ONNX Runtime"
            )
    return found


def _rms(one: Sequence[Any], other: Sequence[Any]) -> float:
    differences = [
        (np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel()
        for a, b in zip(one, other, strict=True)
    ]
    return float(np.sqrt(np.square(np.concatenate(differences)).mean()))


def _step(output: Any) -> float:
    """Return the step of an output in int8: of 255 between its ends and 0."""
    values = np.asarray(output, np.float64)
    return float(max(values.max(initial=0), 0) - min(values.min(initial=0), 0)) / 255


def _spread(outputs: Sequence[Any]) -> float:
    """Return the standard deviation of all outputs, each around its own mean."""
    centred = [(np.asarray(each, np.float64) - np.mean(each, dtype=np.float64)).ravel() for each in outputs]
    return float(np.concatenate(centred).std())


def measure_forms(
    original: Original,
    made: Conversion,
    paths: Sequence[Path],
    checks: Mapping[str, Int8Check],
    job: Job,
) -> FourForms:
    """Time the four files in the same rounds, and score all four models on the same samples.

    Args:
        original: in whose int8 form the models are deployed.
        made: its conversion.
        paths: files of the forms, in the order of `FOUR_FORMS`.
        checks: from `check_int8`.
        job: how often to time, and in which runtime.
    """
    form = original.form
    if form is None:
        raise ValueError("there is one form alone")
    runtime, batch = job.timing.runtime, batch_size(original.inputs)
    by_float: list[Speedup | None] = [None] * len(FOUR_FORMS)
    by_int8, timing = list(by_float), None
    costs = original.cost, original.cost, *[original.count(made.model)] * 2
    profiles = [
        Profile(cost.params, cost.macs, *onnx_sizes(path), None, None, cost.uncounted_ops)
        for cost, path in zip(costs, paths, strict=True)
    ]
    if job.runs:
        feed = original.drafts.feed(original.inputs)
        deployed = [(Deployed(path, runtime), feed) for path in (*paths, paths[0], paths[1])]
        *times, again, int8_again = time_all(
            deployed, runs=job.runs, seed=job.seed, progress=job.progress, description="timing forms"
        )
        by_float = [None, *(speedup(times[0], again, each) for each in times[1:])]
        by_int8 = [None, None, *(speedup(times[1], int8_again, each) for each in times[2:])]
        profiles = [
            replace(profile, latency=latency(each, runtime.threads, batch))
            for profile, each in zip(profiles, times, strict=True)
        ]
        before, after = profiles[1].latency, profiles[3].latency
        if before is not None and after is not None and by_int8[3] is not None:
            timing = PairTiming(before, after, by_int8[3])
    scored = _scored(original, made)
    deltas = [None if each is None or index == 0 else metric_delta(scored[0], each)
              for index, each in enumerate(scored)]  # fmt: skip
    measured = {
        name: MeasuredForm(profile.with_scores(own), over_float, over_int8, delta)
        for name, profile, own, over_float, over_int8, delta in zip(
            FOUR_FORMS, profiles, scored, by_float, by_int8, deltas, strict=True
        )
    }
    return FourForms(measured, form.note(made.model), checks, timing)


def _scored(original: Original, made: Conversion) -> list[Any]:
    """Return the evaluation of each form; None where there are no data to score."""
    scores = original.scores
    if scores is None:
        return [None] * len(FOUR_FORMS)
    return [
        scores.original,
        scores.evaluation(original.model),
        scores.in_floating_point(made.model),
        scores.evaluation(made.model),
    ]
