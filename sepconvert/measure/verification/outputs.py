"""Checks of whole models: the converted one against the original, and ONNX files against both."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import Stage, stage
from sepconvert.files.onnx.export import runtime_dtype
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.running import answers
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.measure.verification.activations import ActivationErrors, hides
from sepconvert.network.calls import Call, ConvolutionInterceptor
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, floating, fresh, largest, model_dtype, tensor_leaves
from sepconvert.network.trace import ConvSite

Outputs = list[Tensor]
"""Tensors that a model returns, as float64 on the CPU."""


# Perturbations of random sign partly cancel where a true difference might add up.
_SAFETY = 4.0


_RUNTIME_NOISE = 16.0


# Activations that saturate alike in all places err alike, and a sum over them adds that up.
_SIGNS: tuple[Literal["random", "equal"], ...] = ("random", "equal")


_MARGIN = 2.0**-6  # below the largest number of a dtype, within which rounding may lead beyond it


# Factors of random inputs that are tried on a model whose outputs are within rounding of each other.
_GAINS = (8.0, 64.0, 512.0, 4096.0)


@dataclass(frozen=True)
class OutputCheck:
    """Largest difference of two lists of outputs, and how large it may be; None sets no limit."""

    max_abs_diff: float
    tolerance: float | None
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance (NaN is not)."""
        return self.tolerance is None or self.max_abs_diff <= self.tolerance


def random_like(inputs: Inputs, seed: int) -> Inputs:
    """Return standard normal tensors of the same shapes; integer tensors stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    return floating(lambda value: torch.randn(value.shape, generator=generator).to(value), inputs)


def float64_outputs(model: nn.Module, inputs: Inputs) -> Outputs:
    """Return all tensors that a model returns, as float64 on the CPU.

    Raises `SepconvertError` if there are none.
    """
    with torch.no_grad():
        leaves = list(tensor_leaves(model(*fresh(inputs))))
    if not leaves:
        raise SepconvertError(
            "verification: the model returns no tensor; wrap it so that it returns its outputs"
        )
    return [leaf.double().cpu() for leaf in leaves]


@dataclass(frozen=True)
class Case:
    """Outputs of the original model for some inputs, and how far each may move."""

    inputs: Inputs
    outputs: Outputs
    tolerances: tuple[float, ...]  # by rounding of the converted kernels
    roundings: tuple[float, ...]  # by the runtime's arithmetic and its activation functions
    flat: frozenset[int] = frozenset()  # activations within whose rounding their own outputs lie

    @property
    def hidden(self) -> set[tuple[str, int]]:
        """Outputs and activations that vary by less than can be told from rounding."""
        outputs = {
            ("output", number)
            for number, (values, rounding) in enumerate(zip(self.outputs, self.roundings, strict=True))
            if hides(values, rounding)
        }
        return outputs | {("activation", number) for number in self.flat}

    @property
    def shows(self) -> bool:
        """Whether some output varies visibly, and none overflows, as it may sooner in the runtime's dtype."""
        finite = all(map(math.isfinite, self.roundings)) and all(o.isfinite().all() for o in self.outputs)
        return finite and not self.hidden >= {("output", number) for number in range(len(self.outputs))}


@dataclass(frozen=True)
class Reference:
    """Outputs of the original model in high precision."""

    cases: tuple[Case, ...]
    dtype: torch.dtype  # that they were computed in
    runtime: torch.dtype  # that the runtime computes in

    @property
    def inputs(self) -> tuple[Inputs, ...]:
        """Inputs of all cases."""
        return tuple(case.inputs for case in self.cases)


@stage(Stage.VERIFICATION)
def reference(
    model: nn.Module,
    inputs: Inputs,
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
) -> Reference:
    """Run the original on the given and on random inputs, in float64.

    The tolerance of a conversion is found by letting the network propagate the permitted errors: the output
    of each converted layer is moved by ±τ (|W| ∗ |x|) with random signs, where τ is the error that its
    certificate permits and |W| ∗ |x| the sum of the magnitudes of the terms (a componentwise bound). The
    model's output may move four times as far as it moves then. That of a runtime is found in the same way
    from the errors of its activation functions (`activations`), to which sixteen times PyTorch's own rounding
    is added, as the runtime sums in another order.

    An ONNX file is also run on another batch and on another size, where they are open.

    Values that lie within rounding of each other, such as those of a saturated sigmoid, would hide a wrong
    kernel before them. Where outputs, or those of an activation inside, do so, the model is also run on
    larger random inputs.

    A model that runs in its own dtype alone is run in that, and one that refuses random inputs runs on the
    given ones alone.
    """
    attempts = [
        (dtype, chosen)
        for chosen in ((inputs, random_like(inputs, seed)), (inputs,))
        for dtype in (torch.float64, model_dtype(model))
    ]
    for number, (dtype, chosen) in enumerate(attempts, 1):
        runs = _Runs(model, sites, tolerances, dtype, seed)
        # The user's code may raise anything.
        with contextlib.suppress(Exception) if number < len(attempts) else contextlib.nullcontext():
            cases = tuple(map(runs.case, chosen))
            more = (*runs.larger(cases), *runs.resized(inputs))
            return Reference((*cases, *more), dtype, runtime_dtype(model))
    raise AssertionError("the last attempt returns or raises")


class _Runs:
    """Runs of one model in high precision, as it is and with errors, and in the runtime's dtype."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[ConvSite],
        tolerances: Mapping[str, float],
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self._precise, self._rounded = private_copy(model, dtype), private_copy(model, runtime_dtype(model))
        self._sites, self._tolerances, self._dtype, self._seed = sites, tolerances, dtype, seed
        self._runtime = runtime_dtype(model)
        self._eps = torch.finfo(self._runtime).eps

    def case(self, inputs: Inputs) -> Case:
        """Return the outputs for some inputs, and how far they may move."""
        precise = cast(inputs, self._dtype)
        plain, activations = self._plain(precise)
        perturbed = _perturbed(self._precise, precise, self._sites, self._tolerances, self._seed)
        rounded = self._in_runtime_dtype(inputs)
        moved = self._moved_by_activations(precise, plain) if activations.count else [0.0] * len(plain)
        least = 100 * torch.finfo(self._dtype).eps
        return Case(
            inputs,
            plain,
            tuple(
                _SAFETY * _difference(p, e) + least * _magnitude(e)
                for p, e in zip(perturbed, plain, strict=True)
            ),
            tuple(
                _RUNTIME_NOISE
                * (max(self._moved(r, e) for r in each) + self._eps * _magnitude(e, self._runtime))
                + by_activations
                for each, e, by_activations in zip(zip(*rounded, strict=True), plain, moved, strict=True)
            ),
            frozenset(activations.flat),
        )

    def _plain(self, precise: Inputs) -> tuple[Outputs, ActivationErrors]:
        """Return the outputs for some inputs, and what is known of the activations on the way."""
        with ActivationErrors(self._eps, "none", self._seed) as activations:
            return float64_outputs(self._precise, precise), activations

    def _in_runtime_dtype(self, inputs: Inputs) -> list[Outputs]:
        """Return the outputs in the dtype of the runtime, computed in one way or in several.

        The network of an ONNX file runs in its own dtype alone; what rounding is worth there is seen from the
        file itself, run by ONNX Runtime with its optimisations and without.
        """
        found = [float64_outputs(self._rounded, cast(inputs, model_dtype(self._rounded)))]
        if isinstance(self._rounded, OnnxNetwork):
            file, feed = converted_model(self._rounded, embedded=True), onnx_feed(self._rounded, inputs)
            for optimised in (True, False):
                returned = answers(file, feed, optimised=optimised)
                found.append([torch.from_numpy(np.asarray(each)).double() for each in returned])
        return found

    def larger(self, cases: Sequence[Case]) -> tuple[Case, ...]:
        """Return cases of larger inputs, each of which shows something that is hidden in all others."""
        found, hidden = list[Case](), set.intersection(*(case.hidden for case in cases))
        for gain in _GAINS if hidden else ():
            inputs = floating(partial(torch.mul, torch.tensor(gain)), cases[-1].inputs)
            with contextlib.suppress(Exception):
                _, activations = self._plain(cast(inputs, self._dtype))
                flat = {("activation", number) for number in activations.flat}
                if hidden <= flat:  # nothing new, at a fraction of the time of a case
                    continue
                case = self.case(inputs)
                if case.shows and hidden - case.hidden:
                    found.append(case)
                    hidden &= case.hidden
        return tuple(found)

    def resized(self, inputs: Inputs) -> tuple[Case, ...]:
        """Return cases of other sizes, where an ONNX file leaves sizes open and runs in these."""
        found = []
        for shapes in self._precise.other_shapes(inputs) if isinstance(self._precise, OnnxNetwork) else ():
            generator = torch.Generator().manual_seed(self._seed)
            with contextlib.suppress(Exception):  # a size that is open in name only
                found.append(
                    self.case(
                        tuple(
                            torch.randn(shape, generator=generator).to(value)
                            if value.is_floating_point()
                            else value.new_zeros(shape)
                            for shape, value in zip(shapes, inputs, strict=True)
                        )
                    )
                )
        return tuple(found)

    def _moved_by_activations(self, inputs: Inputs, plain: Outputs) -> list[float]:
        """Return how far errors of activation functions move each output: of random and of equal signs."""
        moved = []
        for signs in _SIGNS:
            with ActivationErrors(self._eps, signs, self._seed):
                outputs = float64_outputs(self._precise, inputs)
            moved.append([_SAFETY * self._moved(a, e) for a, e in zip(outputs, plain, strict=True)])
        return [max(each) for each in zip(*moved, strict=True)]

    def _moved(self, moved: Tensor, exact: Tensor) -> float:
        return _difference(moved, exact, _overflows(exact, self._runtime))


def _perturbed(
    model: nn.Module, inputs: Inputs, sites: Sequence[ConvSite], tolerances: Mapping[str, float], seed: int
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    permitted = {site.place: tolerances[site.name] for site in sites if site.name in tolerances}

    def on_call(call: Call) -> Tensor:
        output, tolerance = call.run(), permitted.get(call.place)
        if tolerance is None:
            return output
        inputs, weight = call.arguments["input"], call.arguments["weight"]
        magnitude = call.run(input=inputs.abs(), weight=weight.abs(), bias=None)
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output + tolerance * signs * magnitude

    interceptor = ConvolutionInterceptor(model, on_call)
    with interceptor.watching():
        return float64_outputs(model, inputs)


@stage(Stage.VERIFICATION)
def compare_with(expected: Reference, converted: nn.Module) -> OutputCheck:
    """Check the outputs of the converted model against the original's reference."""
    precise = private_copy(converted, expected.dtype)
    # Outputs in the runtime's dtype are off by as much as the runtime's.
    noisy = expected.dtype == expected.runtime
    pairs = [
        (_difference(a, e), tolerance + (2 * rounding if noisy else 0.0))
        for case in expected.cases
        for a, e, tolerance, rounding in zip(
            float64_outputs(precise, cast(case.inputs, expected.dtype)),
            case.outputs,
            case.tolerances,
            case.roundings,
            strict=True,
        )
    ]
    return _worst(pairs, expected.dtype)


def compare_export(
    expected: Reference, runs: Sequence[Outputs], *, any_rounding: bool = False
) -> OutputCheck:
    """Check the outputs of a model in the runtime against those in PyTorch.

    Args:
        expected: of the model.
        runs: outputs in the runtime for each of its cases.
        any_rounding: whether to allow whatever may be called rounding, half of the digits of the dtype,
            instead of what is expected: √ε times the largest output.
    """
    half = math.sqrt(torch.finfo(expected.runtime).eps) if any_rounding else 0.0
    pairs = [
        (
            _difference(output, exact, _overflows(exact, expected.runtime)),
            max(rounding, half * _magnitude(exact, expected.runtime)),
        )
        for case, run in zip(expected.cases, runs, strict=True)
        for exact, rounding, output in zip(case.outputs, case.roundings, run, strict=True)
    ]
    return _worst(pairs, expected.runtime)


def compare_runs(
    expected: Reference, original: Sequence[Outputs], converted: Sequence[Outputs]
) -> OutputCheck:
    """Check the converted model against the original, both in the runtime, for the cases of `expected`."""
    pairs = [
        (_difference(theirs, ours, _overflows(exact, expected.runtime)), tolerance + 2 * rounding)
        for case, before, after in zip(expected.cases, original, converted, strict=True)
        for exact, tolerance, rounding, ours, theirs in zip(
            case.outputs, case.tolerances, case.roundings, before, after, strict=True
        )
    ]
    return _worst(pairs, expected.runtime)


def _worst(pairs: Sequence[tuple[float, float]], dtype: torch.dtype) -> OutputCheck:
    """Return the check of the pair (difference, tolerance) that comes nearest to failing or fails by most."""
    # NaN must lose: no comparison with it is true.
    difference, tolerance = max(
        pairs, key=lambda pair: math.inf if not pair[0] <= pair[1] else pair[0] / (pair[1] or 1.0)
    )
    return OutputCheck(difference, tolerance, str(dtype).removeprefix("torch."))


def _magnitude(values: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """Return the largest absolute value of those that are finite in a dtype."""
    return largest([values[values.isfinite() & ~_overflows(values, dtype)]])


def _overflows(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where finite values are infinite in a dtype, or may be after a rounding."""
    return exact.isfinite() & (exact.abs() > (1 - _MARGIN) * torch.finfo(dtype).max)


def _difference(a: Tensor, b: Tensor, ignored: Tensor | None = None) -> float:
    """Return max |a − b| over elements where one is finite (a model may have NaN or Inf in its weights)."""
    same = (a == b) | ~(a.isfinite() | b.isfinite())
    if ignored is not None:
        same = same | ignored
    return largest([torch.where(same, 0.0, a - b)])
