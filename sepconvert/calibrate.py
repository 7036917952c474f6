"""Calibration: the network converted so far, from convolution to convolution, and what the original answered.

The original runs once, and its outputs are kept at the positions that are looked at. Then every batch runs
through the network that is converted. Each forward pass stops at a convolution that is to be replaced until
all have come there; the moments of that layer are gathered, the layer is fitted, and the passes go on with
the new kernel. As many passes wait as memory has room for their activations; the others begin anew for each
layer, which changes nothing but time. That is needed in the first layers of a network, where activations are
large and the way is short. Beside them memory holds the outputs kept, and the moments of one layer.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from einops import rearrange
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.distributed import gather
from sepconvert.errors import SepconvertError, first_line
from sepconvert.factorize.approximate import Moments
from sepconvert.footprint import allowance, footprint
from sepconvert.spec import Pair
from sepconvert.trace import (
    ConvolutionInterceptor,
    ConvSite,
    fresh,
    private_copy,
    quick_copy,
    resolve_padding,
)

PATCHES = 12
"""For each unknown of an output, that are looked at in all images, or all there are."""

FEWEST_POSITIONS = 16
"""In each image, if it has as many."""

_BLOCKS = 4

Kernel = tuple[Tensor, Tensor]
"""O × C/g × kh × kw and O: weight and bias of a converted layer."""

_Key = tuple[str, int]


@dataclass(frozen=True)
class Answers:
    """The original's outputs at the positions that are looked at in each image."""

    images: int  # of all processes
    seed: int  # of the positions
    outputs: Mapping[tuple[_Key, int], Tensor]  # N × P × O, by layer and number of batch


def record(
    model: nn.Module,
    batches: Mapping[int, Tensor],
    sites: Sequence[ConvSite],
    *,
    images: int,
    seed: int,
) -> Answers:
    """What `calibrate` fits to.

    Args:
        model: the original; left as it is.
        batches: of images N × C × H × W by number; this process's share of them.
        sites: convolutions to look at, as `trace` found them; those without a `conv` are passed over.
        images: that all processes have.
        seed: of the positions.

    Raises:
        SepconvertError: the model cannot run on the images.
    """
    places = {site.place: site for site in sites if site.conv is not None}
    outputs: dict[tuple[_Key, int], Tensor] = {}
    if not places or not batches:
        return Answers(images, seed, outputs)
    private = quick_copy(model, next(iter(batches.values())))
    names = _names(private)

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        output, key = call(), (names[module], index)
        # One that only these images call again counts with its first call.
        if key in places and (key, number) not in outputs:
            most = _most_positions(places[key], images)
            chosen = _positions(_batched(output).shape, most, _generator(seed, places[key], number))
            outputs[key, number] = _at(output, chosen).clone()
        return output

    with torch.no_grad(), ConvolutionInterceptor(private, on_call).watching():
        for number, batch in batches.items():  # noqa: B007  (`on_call` reads it)
            _run(private, batch)
    return Answers(images, seed, outputs)


def _most_positions(site: ConvSite, images: int) -> int:
    """That are looked at in each of so many images, at most."""
    unknowns = math.prod(site.dense.spec.weight_shape[1:])
    return max(FEWEST_POSITIONS, math.ceil(PATCHES * unknowns / images))


def calibrate(
    model: nn.Module,
    batches: Mapping[int, Tensor],
    sites: Sequence[ConvSite],
    answers: Answers,
    known: Mapping[str, Kernel] | None = None,
    memory: float | None = None,
) -> Generator[tuple[ConvSite, Moments], Kernel | None, None]:
    """The moments of each layer, in order of execution; send back the kernel that takes its place, or None.

    A module that is called several times comes first: it is met with what the original presents to it
    in all its calls, since its factors must be known at the first one. One that only these images call
    again is met once, with its first call.

    Args:
        model: the original; left as it is.
        batches: those that were recorded.
        sites: convolutions to look at, among those recorded.
        answers: of the original, recorded.
        known: kernels of those sites, by name, that have been fitted; they are not met.
        memory: bytes that the process may have; None for half of what is free.

    Raises:
        SepconvertError: the model cannot run on the images, or treats images differently.
    """
    places = {site.place: site for site in sites if site.conv is not None}
    kernels: dict[_Key, Kernel | None] = {
        place: known[site.name] for place, site in places.items() if known and site.name in known
    }
    if places.keys() == kernels.keys():
        return
    if not batches:
        raise SepconvertError(
            "calibration: there are fewer batches of images than processes; pass more images"
        )
    shared = {key: site for key, site in places.items() if site.calls > 1 and key not in kernels}
    if shared:
        for key, moments in _moments_of_all_calls(model, batches, shared, answers).items():
            kernels[key] = yield places[key], moments
    stops = set(places) - set(kernels)
    quick = quick_copy(model, next(iter(batches.values())))
    room = allowance(memory) - max((_bytes_of_moments(places[key]) for key in stops), default=0)
    with _Passes(quick, batches, stops, kernels, room) as passes:
        # Of those left over when all have come to the end, the images reach none.
        while stops:
            accumulator: _Accumulator | None = None
            arrived: set[_Key | None] = set()
            for number, place, arguments in passes.arrivals():
                arrived.add(place)
                if len(arrived) > 1 or (place is not None and (place, number) not in answers.outputs):
                    raise SepconvertError(
                        "calibration: the images do not take the same way through the model; it branches on "
                        f"their values at {', '.join(sorted(str(each and each[0]) for each in arrived))}; "
                        "leave these layers out with --exclude"
                    )
                if place is None:
                    continue
                if accumulator is None:
                    accumulator = _Accumulator(places[place], _most_positions(places[place], answers.images))
                # Before any layer is replaced nothing is missed but rounding.
                followed = any(kernel is not None for kernel in kernels.values())
                expected = answers.outputs[place, number] if followed else None
                accumulator.add(arguments, _generator(answers.seed, places[place], number), expected)
            if accumulator is None:
                return
            site = accumulator.site
            stops.discard(site.place)
            kernels[site.place] = yield site, accumulator.moments()


def too_large(
    model: nn.Module,
    batches: Mapping[int, Tensor],
    sites: Sequence[ConvSite],
    *,
    images: int,
    memory: float | None = None,
) -> dict[str, str]:
    """Why single layers cannot be calibrated in the memory that there is, by name; all processes are asked.

    Args:
        model: the original; left as it is.
        batches: of images N × C × H × W by number; this process's share of them.
        sites: convolutions to look at, those with a `conv`.
        images: that all processes have.
        memory: bytes that the process may have; None for half of what is free.

    Raises:
        SepconvertError: the model cannot run on the images, or memory suffices for no layer at all.
    """
    if not sites:
        return {}
    found: dict[str, str] = {}
    if batches:
        batch = next(iter(batches.values()))
        try:
            running = footprint(model, (batch[:1],)).peak * len(batch) * _at_once(batches)
        except Exception as error:  # the user's code
            raise _failure(batch, error) from error
        answers = sum(map(len, batches.values())) * sum(_bytes_of_answers(site, images) for site in sites)
        free = allowance(memory)
        by = "by --memory" if memory else "as half of what is free"
        limit = f"{free / 1e9:.2g} are there {by}; pass more --memory"
        least = min(sites, key=_bytes_of_moments)
        if (needed := running + answers + _bytes_of_moments(least)) > free:
            raise SepconvertError(
                f"calibration: needs {needed / 1e9:.2g} GB, {answers / 1e9:.2g} for the original's outputs; "
                f"{limit} or fewer --calib-images"
            )
        found = {
            site.name: f"its statistics take {_bytes_of_moments(site) / 1e9:.2g} GB; {limit}"
            for site in sites
            if running + answers + _bytes_of_moments(site) > free
        }
    return {name: reason for each in reversed(gather(found)) for name, reason in each.items()}


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Let every BatchNorm take mean and variance of its own inputs on `batches`; returns how many there are.

    In place. Layers that follow see the statistics of the batch, as in training; running ones become the
    mean over batches. Returns 0 too where a batch of one image has no variance: the model is of no use then.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True
    with torch.no_grad():
        for batch in batches:
            try:
                model(fresh(batch))
            except ValueError:  # a batch of one has no variance behind a pooling
                return 0
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, training
    return len(norms)


def substitute(model: nn.Module, kernels: Mapping[_Key, Kernel]) -> ConvolutionInterceptor:
    """Lets `model` run with other kernels: `with substitute(model, kernels).watching(): model(x)`."""
    names = _names(model)

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        kernel = kernels.get((names[module], index))
        return call() if kernel is None else _call_with(kernel, arguments, call)

    return ConvolutionInterceptor(model, on_call)


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def _call_with(kernel: Kernel, arguments: Mapping[str, Any], call: Callable[..., Tensor]) -> Tensor:
    weight, bias = (each.to(arguments["weight"]) for each in kernel)
    return call(weight=weight, bias=bias)


class _CancelledError(BaseException):
    """Unwinds a pass that is not wanted any more; no `except Exception` of the user's stops it."""


class _Pass(threading.Thread):
    """One batch through the network, in a thread of its own that runs only from `go` until it has `come`.

    As many run at once as there are threads for operators, each of which then has one to itself: a team of
    workers for every pass would get in each other's way (2 cores, 20 batches: half as slow again).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor,
        stops: Set[_Key],
        kernels: Mapping[_Key, Kernel | None],
        turns: threading.Semaphore,
        threads: int,
    ) -> None:
        super().__init__(daemon=True)
        self._turns, self._threads = turns, threads
        self._model, self._batch, self._stops, self._kernels = private_copy(model), batch, stops, kernels
        self._go: SimpleQueue[None] = SimpleQueue()
        self._came: SimpleQueue[_Key | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._cancelled = False
        self._names = _names(self._model)
        self.seen: Mapping[str, Any]  # arguments of the convolution at which it waits

    def go(self) -> None:
        """On to the next convolution to stop at."""
        if not self.is_alive():
            self.start()
        else:
            self._go.put(None)

    def come(self) -> _Key | None:
        """Wait for it; None at the end."""
        key = self._came.get()
        if self._error is not None:
            raise self._error
        return key

    def cancel(self) -> None:
        """Unwind, if it has begun and not ended."""
        if self.is_alive():
            self._cancelled = True
            self._go.put(None)
            self.join()

    def run(self) -> None:
        """The forward pass."""
        interceptor = ConvolutionInterceptor(self._model, self._on_call)
        self._turns.acquire()
        torch.get_num_threads()  # the first call in a thread sets their number
        try:
            with (
                threadpool_limits(self._threads, "openmp"),
                torch.no_grad(),
                interceptor.watching(),
            ):
                _run(self._model, self._batch)
        except _CancelledError:
            pass
        except SepconvertError as error:
            self._error = error
        finally:
            self._turns.release()
            self._came.put(None)

    def _on_call(
        self,
        module: nn.Module,
        index: int,
        function: str,
        arguments: dict[str, Any],
        call: Callable[..., Tensor],
    ) -> Tensor:
        key = self._names[module], index
        if key in self._stops:
            self.seen = arguments
            # A forward that catches everything may come here again.
            if not self._cancelled:
                self._turns.release()
                self._came.put(key)
                self._go.get()
                self._turns.acquire()
            if self._cancelled:
                raise _CancelledError
            del self.seen
        kernel = self._kernels.get(key)
        return call() if kernel is None else _call_with(kernel, arguments, call)


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(fresh(images))
    except Exception as error:  # the user's code
        raise _failure(images, error) from error


def _failure(images: Tensor, error: Exception) -> SepconvertError:
    return SepconvertError(
        f"calibration: the model fails on images of shape {tuple(images.shape[1:])}: "
        f"{first_line(error)}; use data of the shape that it takes"
    )


def _at_once(batches: Mapping[int, Tensor]) -> int:
    """Batches that run at the same time."""
    return min(torch.get_num_threads(), len(batches))


class _Passes:
    """All batches on their way; those for which there is no room to wait begin anew for each convolution."""

    def __init__(
        self,
        model: nn.Module,
        batches: Mapping[int, Tensor],
        stops: Set[_Key],
        kernels: Mapping[_Key, Kernel | None],
        room: float,
    ) -> None:
        """`stops` and `kernels` are read again at each step; `room` is in bytes."""
        self._at_once = _at_once(batches)
        turns, threads = threading.Semaphore(self._at_once), torch.get_num_threads() // self._at_once
        self._begin = partial(_Pass, model, stops=stops, kernels=kernels, turns=turns, threads=threads)
        self._batches, self._stops = batches, stops
        self._begun: dict[int, _Pass] = {}
        first = next(iter(batches.values()))
        self._footprint = footprint(model, (first[:1],))
        self._room = room - self._at_once * len(first) * self._footprint.peak

    def arrivals(self) -> Iterator[tuple[int, _Key | None, Mapping[str, Any]]]:
        """Each batch where it stops next, None at the end, and what the convolution there is given."""
        numbers, waiting = list(self._batches), self._most_waiting()
        self._cancel(numbers[waiting:])
        yield from self._advance(numbers[:waiting])
        for start in range(waiting, len(numbers), self._at_once):
            some = numbers[start : start + self._at_once]
            yield from self._advance(some)
            self._cancel(some)

    def _most_waiting(self) -> int:
        """Batches that may wait at the next stop."""
        held = next((size for key, size in self._footprint.held.items() if key in self._stops), 0)
        each = held * len(next(iter(self._batches.values())))
        return len(self._batches) if not each else int(max(0, min(self._room // each, len(self._batches))))

    def _advance(self, numbers: Sequence[int]) -> Iterator[tuple[int, _Key | None, Mapping[str, Any]]]:
        for number in numbers:
            if number not in self._begun:
                self._begun[number] = self._begin(self._batches[number])
        passes = {number: self._begun[number] for number in numbers}
        for each in passes.values():
            each.go()
        arrived = {number: each.come() for number, each in passes.items()}
        for number, key in arrived.items():
            yield number, key, {} if key is None else passes[number].seen

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._begun:
                self._begun.pop(number).cancel()

    def __enter__(self) -> "_Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel(list(self._begun))


def _moments_of_all_calls(
    model: nn.Module, batches: Mapping[int, Tensor], sites: Mapping[_Key, ConvSite], answers: Answers
) -> dict[_Key, Moments]:
    model = private_copy(model)
    names, accumulators = (
        _names(model),
        {key: _Accumulator(site, _most_positions(site, answers.images)) for key, site in sites.items()},
    )

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        output, key = call(), (names[module], index)
        if key in accumulators:
            generator = _generator(answers.seed, sites[key], number)
            accumulators[key].add(arguments, generator)
        return output

    with torch.no_grad(), ConvolutionInterceptor(model, on_call).watching():
        for number, batch in batches.items():  # noqa: B007  (`on_call` reads it)
            model(fresh(batch))
    return {key: found.moments() for key, found in accumulators.items() if found.count}


def _generator(seed: int, site: ConvSite, batch: int) -> torch.Generator:
    """Positions depend on layer and batch alone, not on what ran before or on which process."""
    digest = hashlib.sha256(f"{seed}/{site.name}/{batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass
class _Accumulator:
    """Moments over batches, each centred by itself and then merged, so that large means cancel nothing.

    (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979.)
    """

    site: ConvSite
    positions: int  # in each image
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(
        self, arguments: Mapping[str, Any], generator: torch.Generator, answers: Tensor | None = None
    ) -> None:
        """Take a sample of positions of one batch: x and W x + b as seen, and y if it is another."""
        groups = self.site.dense.spec.groups
        positions = _positions(_output_shape(arguments), self.positions, generator)
        patches = rearrange(_patches(arguments, *positions), "n p i j (g c) -> g (n p) (i j c)", g=groups)
        x, dense = patches.double().cpu(), _convolved(patches, arguments).double().cpu()
        outputs = dense if answers is None else answers.flatten(0, 1).double().cpu()
        missed = outputs - dense
        means = {"x": x.mean(1), "missed": missed.mean(0), "outputs": outputs.mean(0)}
        if not all(mean.isfinite().all() for mean in means.values()):
            raise SepconvertError(
                f"calibration: NaN or Inf reaches the layer {self.site.name}; check the images and the model"
            )
        x -= means["x"][:, None]
        by_group, of_outputs = (
            rearrange(each - means[name], "m (g o) -> g o m", g=groups)
            for name, each in (("missed", missed), ("outputs", outputs))
        )
        sums = {
            "covariance": _gram(x),
            "cross": by_group @ x if by_group.any() else x.new_zeros(groups, by_group.shape[1], x.shape[-1]),
            "missed": by_group @ by_group.mT,
            "outputs": of_outputs @ of_outputs.mT,
        }
        self._combine(x.shape[1], sums, means)

    def _combine(self, count: int, sums: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        if not self.count:
            self.count, self.sums, self.means = count, dict(sums), dict(means)
            return
        total = self.count + count
        moved = {name: means[name] - self.means[name] for name in means}
        x = moved["x"]
        missed, outputs = (moved[name].view(len(x), -1) for name in ("missed", "outputs"))
        for name, left, right in (
            ("covariance", x, x),
            ("cross", missed, x),
            ("missed", missed, missed),
            ("outputs", outputs, outputs),
        ):
            self.sums[name] += sums[name]
            self.sums[name].baddbmm_(left[:, :, None], right[:, None, :], alpha=self.count * count / total)
        for name, value in moved.items():
            self.means[name] = self.means[name] + count / total * value
        self.count = total

    def moments(self) -> Moments:
        """Of all that was added, in all processes."""
        everyone = gather((self.count, self.sums, self.means))
        self.count = 0
        for count, sums, means in everyone:
            if count:
                self._combine(count, sums, means)
        height, width = self.site.dense.spec.kernel_size

        def channels_first(value: Tensor) -> Tensor:
            return rearrange(value, "... (i j c) -> ... (c i j)", i=height, j=width)

        lower = self.sums["covariance"].tril() / self.count
        covariance = channels_first(channels_first(lower + lower.tril(-1).mT).mT)
        return Moments(
            count=self.count,
            covariance=covariance,
            cross=channels_first(self.sums["cross"]) / self.count,
            mean=channels_first(self.means["x"]),
            missed=self.means["missed"],
            missed_covariance=self.sums["missed"] / self.count,
            output_covariance=self.sums["outputs"] / self.count,
        )


def _gram(x: Tensor) -> Tensor:
    """The lower triangle of XᵀX for each of g × n × k; most of what is above it is not computed.

    By blocks, since a routine of another library (BLAS's syrk) brings threads that get in the way of torch's.
    """
    products = x.new_zeros(len(x), x.shape[2], x.shape[2])
    for rows in torch.arange(x.shape[2]).tensor_split(_BLOCKS):
        if len(rows):
            first, end = int(rows[0]), int(rows[-1]) + 1
            products[:, first:, first:end] = x[..., first:].mT @ x[..., first:end]
    return products


def _batched(value: Tensor) -> Tensor:
    return value if value.ndim == 4 else value[None]


def _positions(shape: torch.Size, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """N × P rows and columns of the output, drawn without replacement for every image."""
    images, _, height, width = shape
    chosen = torch.rand(images, height * width, generator=generator).argsort(1)[:, :most]
    return chosen // width, chosen % width


def _output_shape(arguments: Mapping[str, Any]) -> torch.Size:
    """N × O × H × W of what a convolution with these arguments returns."""
    inputs, weight = _batched(arguments["input"]), arguments["weight"]
    stride, dilation, padding = _geometry(arguments)
    height, width = (
        (size + sum(around) - step * (kernel - 1) - 1) // pace + 1
        for size, around, step, kernel, pace in zip(
            inputs.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    )
    return torch.Size((len(inputs), len(weight), height, width))


def _convolved(patches: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """W x + b of patches g × M × (i j c), as M × O."""
    weight = rearrange(arguments["weight"], "(g o) c i j -> g (i j c) o", g=len(patches))
    precise = torch.promote_types(weight.dtype, torch.float32)
    products: Tensor = rearrange(patches.to(precise) @ weight.to(precise), "g m o -> m (g o)")
    return products if arguments.get("bias") is None else products + arguments["bias"].to(precise)


def _at(output: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """N × P × O, of N × O × H × W."""
    output, (rows, columns) = _batched(output), positions
    return output[torch.arange(len(output))[:, None], :, rows, columns]


def _patches(arguments: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """What the convolution reads for these output positions: N × P × kh × kw × C."""
    inputs, weight = _batched(arguments["input"]), arguments["weight"]
    size = tuple(weight.shape[2:])
    stride, dilation, ((top, bottom), (left, right)) = _geometry(arguments)
    padded = F.pad(inputs, (left, right, top, bottom))
    down = rows[..., None] * stride[0] + torch.arange(size[0]) * dilation[0]
    across = columns[..., None] * stride[1] + torch.arange(size[1]) * dilation[1]
    images = torch.arange(len(inputs))[:, None, None, None]
    # Advanced indices on both sides of the channels come first: N × P × kh × kw × C.
    found: Tensor = padded[images, :, down[..., :, None], across[..., None, :]]
    return found


def _geometry(arguments: Mapping[str, Any]) -> tuple[Pair, Pair, tuple[Pair, Pair]]:
    """Stride, dilation, and padding before and after, each down and across."""
    stride, dilation = (_pair(arguments.get(name, 1)) for name in ("stride", "dilation"))
    size = tuple(arguments["weight"].shape[2:])
    return stride, dilation, resolve_padding(arguments.get("padding", 0), size, dilation)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])


def _bytes_of_moments(site: ConvSite) -> int:
    """S, its working copies in the fit, and a batch of patches."""
    spec = site.dense.spec
    unknowns = spec.in_channels // spec.groups * spec.kernel_size[0] * spec.kernel_size[1]
    return 8 * spec.groups * unknowns * (5 * unknowns + 4 * spec.out_channels // spec.groups)


def _bytes_of_answers(site: ConvSite, images: int) -> int:
    """Of one image, at most."""
    spec, size = site.dense.spec, site.sizes[0]
    return (
        site.dense.inputs.element_size()
        * spec.out_channels
        * min(_most_positions(site, images), math.prod(size))
    )
