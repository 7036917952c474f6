import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sepconvert.base.environment import GRAPH_OPTIMIZATIONS, Runtime, available_cores, environment
from sepconvert.base.errors import SepconvertError
from sepconvert.measure import latency
from sepconvert.measure.latency import (
    Deployed,
    Latency,
    Speedup,
    interleave,
    measure_pair,
    measure_single,
    session,
    speedup,
    time_all,
)
from sepconvert.measure.statistics import Interval

FEEDS = {"x": np.ones((1, 16, 16, 16), np.float32)}
MS = 1e6


def conv_net(layers: int, channels: int = 16, size: int = 16) -> bytes:
    kernel = np.full((channels, channels, 3, 3), 0.01, np.float32)
    weights = [numpy_helper.from_array(kernel, f"w{i}") for i in range(layers)]
    nodes = [
        helper.make_node("Conv", [f"y{i - 1}" if i else "x", f"w{i}"], [f"y{i}"], pads=[1, 1, 1, 1])
        for i in range(layers)
    ]
    shape: list[str | int | None] = ["N", channels, size, size]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"y{layers - 1}", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class Clock:
    """Stands in for the module's clock: only tasks let its time pass, so every sample is known exactly."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter_ns(self) -> int:
        return round(self.now)

    def task(self, name: str, durations_ns: Callable[[int], float]) -> Callable[[], None]:
        calls = 0

        def run() -> None:
            nonlocal calls
            self.now += durations_ns(calls)
            calls += 1
            self.log.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_interleave_times_every_task_once_per_round_in_a_seeded_random_order(clock: Clock) -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        tasks = [clock.task(name, lambda _: 2 * MS) for name in "abc"]
        clock.log.clear()
        interleave(tasks, runs=20, seed=seed)
        timed = clock.log[1::2]  # behind an untimed call of the same task
        assert timed == clock.log[::2]
        return [tuple(timed[i : i + 3]) for i in range(len(timed) - 60, len(timed), 3)]

    assert all(sorted(each) == ["a", "b", "c"] for each in order(0))
    assert len(set(order(0))) > 3
    assert order(0) == order(0) != order(1)


def test_interleave_reports_the_time_of_one_call(clock: Clock) -> None:
    tasks = [clock.task("fast", lambda _: 0.01 * MS), clock.task("slow", lambda _: 7 * MS)]
    samples = interleave(tasks, runs=4, seed=0)
    np.testing.assert_allclose(samples, [[0.01] * 4, [7.0] * 4])
    # of the fast task, 128 calls make the first power of two to last 1 ms
    # and one of each is not timed
    tail = clock.log[-4 * 131 :]
    assert tail.count("fast") == 4 * 129
    assert tail.count("slow") == 4 * 2


def test_what_ran_before_does_not_count(clock: Clock) -> None:
    """Behind another one each task takes 1 ms longer, as it finds its weights gone from the caches."""

    def task(name: str, milliseconds: float) -> Callable[[], None]:
        return clock.task(name, lambda _: MS * (milliseconds + (clock.log[-1:] != [name])))

    samples = interleave([task("often", 0.5), task("once", 2.0)], runs=20, seed=0)
    np.testing.assert_allclose(samples, [[0.5] * 20, [2.0] * 20])


def test_pairing_cancels_the_drift_of_the_machine(clock: Clock) -> None:
    def drifting(base: float) -> Callable[[], None]:
        return clock.task("", lambda _: base * MS * (1 + clock.now / (200 * MS)))

    samples = interleave([drifting(2.0), drifting(2.0), drifting(1.6)], runs=50, seed=3)
    assert samples[0, -1] / samples[0, 0] > 5
    found = speedup(*samples)
    assert found.median == pytest.approx(1.25, rel=0.02)
    assert found.significant


def test_warm_up_waits_until_the_times_settle(clock: Clock) -> None:
    cooling = clock.task("", lambda call: 2 * MS * (1 + 3 * 0.8**call))
    samples = interleave([cooling], runs=10, seed=0)
    assert samples.max() < 2 * 1.1


def test_warm_up_of_what_is_steady_is_short(clock: Clock) -> None:
    interleave([clock.task("x", lambda _: 2 * MS)], runs=5, seed=0)
    assert len(clock.log) == 4 + 2 * (2 * 3 + 5)


def test_warm_up_of_what_never_settles_ends(clock: Clock) -> None:
    rng = np.random.default_rng(0)
    restless = clock.task("x", lambda _: MS * (2 + 50 * rng.random()))
    assert interleave([restless], runs=5, seed=0).shape == (1, 5)
    assert len(clock.log) <= 4 + 2 * (30 + 5)


def test_warm_up_of_what_is_slow_and_never_settles_ends_after_seconds(clock: Clock) -> None:
    """Blocks of 3 rounds of two calls each, of 150 to 250 ms: the fifth ends beyond 5 s."""
    rng = np.random.default_rng(0)
    restless = clock.task("x", lambda _: MS * (150 + 100 * rng.random()))
    interleave([restless], runs=5, seed=0)
    assert 4 + 2 * (4 * 3 + 5) <= len(clock.log) <= 4 + 2 * (6 * 3 + 5)


def test_what_is_slow_is_timed_less_often_if_time_is_short(clock: Clock) -> None:
    slow, quick = (clock.task("x", lambda _, each=each: MS * each) for each in (300, 5))
    assert interleave([slow], runs=50, seed=0, seconds=5.0).shape == (1, 12)  # two calls a round
    assert interleave([quick], runs=50, seed=0, seconds=5.0).shape == (1, 50)
    assert interleave([slow], runs=8, seed=0, seconds=5.0).shape == (1, 8)


def noisy_rounds(rng: np.random.Generator, ratio: float) -> npt.NDArray[np.float64]:
    """Times of 50 rounds: a drift shared within a round, 5 % noise of each, and one in ten interrupted."""
    drift = np.cumsum(rng.normal(0, 0.02, 50))
    noise = rng.normal(0, 0.05, (3, 50)) + rng.exponential(0.5, (3, 50)) * (rng.random((3, 50)) < 0.1)
    return np.asarray(np.exp(drift + noise) * np.array([[1.0], [1.0], [1 / ratio]]))


def test_the_same_speed_is_rarely_called_significant() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([speedup(*noisy_rounds(rng, 1.0)).significant for _ in range(300)]) <= 0.05


@pytest.mark.parametrize("ratio", [1.1, 1 / 1.1])
def test_ten_percent_are_found(ratio: float) -> None:
    rng = np.random.default_rng(0)
    found = [speedup(*noisy_rounds(rng, ratio)) for _ in range(100)]
    assert np.mean([each.significant for each in found]) >= 0.9
    assert np.mean([ratio in each.ci95 for each in found]) >= 0.9


@pytest.mark.parametrize(
    ("ci95", "noise_floor", "significant"),
    [
        ((1.05, 1.10), (0.99, 1.01), True),
        ((0.90, 0.95), (0.99, 1.01), True),
        ((0.99, 1.10), (0.97, 0.98), False),  # includes 1
        ((1.05, 1.10), (0.95, 1.06), False),  # the original differs as much from itself
        ((1.01, 1.03), (1.02, 1.02), False),
        ((0.81, 0.99), (1.13, 1.35), False),  # noise is noise either way round
    ],
)
def test_significance(ci95: tuple[float, float], noise_floor: tuple[float, float], significant: bool) -> None:
    assert Speedup(sum(ci95) / 2, Interval(*ci95), Interval(*noise_floor)).significant is significant


def test_a_much_smaller_model_is_faster(tmp_path: Path) -> None:
    original = tmp_path / "original.onnx"
    original.write_bytes(conv_net(40))
    models = (Deployed(model, Runtime(1)) for model in (original, conv_net(1)))
    found = measure_pair(*models, FEEDS, runs=15, batch=1, seed=0)
    assert found.speedup.median > 1
    assert found.original.median_ms > found.converted.median_ms > 0
    for own in (found.original, found.converted):
        assert own.median_ms in own.ci95_ms
        assert own.ci95_ms.lo <= own.p90_ms
        assert (own.runs, own.threads, own.batch) == (15, 1, 1)


def test_reports_are_json() -> None:
    quantiles = tuple(n / 10 for n in range(21))
    value = Latency(2.0, Interval(1.5, 2.5), quantiles, runs=9, threads=2, batch=4).to_dict()
    assert value == {
        "median": 2.0, "ci95": [1.5, 2.5], "p90": 1.8, "quantiles": list(quantiles),
        "runs": 9, "threads": 2, "batch": 4,
    }  # fmt: skip
    ratio = Speedup(1.2, Interval(1.1, 1.3), Interval(0.9, 1.05)).to_dict()
    assert ratio == {"median": 1.2, "ci95": [1.1, 1.3], "significant": True, "noise_floor": [0.9, 1.05]}
    net = Deployed(conv_net(1), Runtime(2))
    measured = measure_pair(net, net, FEEDS, runs=6, batch=1, seed=0)
    for part in (measured.original, measured.converted, measured.speedup):
        assert json.loads(json.dumps(part.to_dict())) == part.to_dict()


def test_measure_single_counts_runs_through_progress() -> None:
    seen: list[Any] = []

    def progress(rounds: Iterable[Any], description: str, /) -> Iterator[Any]:
        assert description == "timing"
        for number in rounds:
            seen.append(number)
            yield number

    feeds = {"x": np.ones((3, 16, 16, 16), np.float32)}
    found = measure_single(
        Deployed(conv_net(2), Runtime(1)), feeds, runs=7, batch=3, seed=0, progress=progress
    )
    assert (len(seen), found.runs, found.batch) == (7, 7, 3)


def test_session_has_the_threads_asked_for() -> None:
    options = session(Deployed(conv_net(1), Runtime(2))).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_threads_spin_where_they_shall() -> None:
    options = session(Deployed(conv_net(1), Runtime(2, spinning="on"))).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_what_is_recorded_is_what_the_session_has() -> None:
    found = environment(Runtime(2))
    options = session(Deployed(conv_net(1), Runtime(2))).get_session_options()
    assert found["inter_op_threads"] == options.inter_op_num_threads
    assert f"ORT_{found['execution_mode'].upper()}" == options.execution_mode.name


needs_openvino = pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-openvino"
)


@needs_openvino
@pytest.mark.parametrize(
    "options",
    [{"num_of_thread": "1"}, {"num_streams": "x"}, {"load_config": '{"CPU": {"SPEED": "1"}}'}],
    ids=str,
)
def test_options_that_a_provider_refuses(options: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    runtime = Runtime(1, provider="openvino", provider_options=options)
    with pytest.raises(SepconvertError, match=r"^`provider_options`: openvino refuses") as caught:
        session(Deployed(conv_net(1), runtime))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


@needs_openvino
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the times of threads of Linux")
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_works_on_the_threads_asked_for(threads: int) -> None:
    if available_cores() < threads:
        pytest.skip("needs two cores")
    feeds = {"x": np.ones((1, 64, 48, 48), np.float32)}
    opened = session(Deployed(conv_net(20, 64, 48), Runtime(threads, provider="openvino")))
    opened.run(None, feeds)
    before = seconds_by_thread()
    for _ in range(10):
        opened.run(None, feeds)
    worked = [after - before.get(thread, 0) for thread, after in seconds_by_thread().items()]
    assert sum(each > 0.2 * sum(worked) for each in worked) == threads


def seconds_by_thread() -> dict[str, float]:
    """Return the processor time of each thread of this process."""
    found = {}
    for path in Path("/proc/self/task").iterdir():
        user, system = (path / "stat").read_text().rpartition(")")[2].split()[11:13]
        found[path.name] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found


@needs_openvino
def test_a_bad_model_is_not_blamed_on_the_options() -> None:
    runtime = Runtime(1, provider="openvino", provider_options={"device_type": "CPU"})
    with pytest.raises(SepconvertError, match=r"^onnxruntime cannot load .* a valid ONNX"):
        session(Deployed(b"no model at all", runtime))


@needs_openvino
@pytest.mark.slow
@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
def test_openvino_is_faster_on_two_threads_than_on_one() -> None:
    """The 20 convolutions of VDSR: 141 and 75 ms on an AMD EPYC (AVX2) of two cores, if both are idle."""
    feeds = {"x": np.ones((1, 64, 96, 96), np.float32)}
    models = [Deployed(conv_net(20, 64, 96), Runtime(threads, provider="openvino")) for threads in (1, 2)]
    one, two = time_all([(model, feeds) for model in models], runs=30, seed=0)
    assert one.min() / two.min() > 1.3  # of the runs that other work disturbed least


@pytest.mark.parametrize("level", GRAPH_OPTIMIZATIONS)
def test_session_has_the_graph_optimization_asked_for(level: str) -> None:
    options = session(Deployed(conv_net(1), Runtime(1, level))).get_session_options()
    assert (
        options.graph_optimization_level
        == {
            "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        }[level]
    )


def test_unknown_graph_optimization() -> None:
    with pytest.raises(SepconvertError, match="expected one of all, extended, basic, none, got 'most'"):
        Runtime(1, "most")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (
            {"z": FEEDS["x"]},
            r"expected x tensor\(float\) \['N', 16, 16, 16\]; got z float32 \(1, 16, 16",
        ),
        ({"x": FEEDS["x"][:, :3]}, r"got x float32 \(1, 3, 16, 16\)"),
        ({"x": FEEDS["x"].astype(np.float64)}, r"got x float64"),
        ({}, "feed the inputs that it expects"),
    ],
)
def test_feeds_that_do_not_fit(
    feeds: dict[str, npt.NDArray[Any]], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SepconvertError, match=message) as caught:
        measure_single(Deployed(conv_net(1), Runtime(1)), feeds, runs=1, batch=1, seed=0)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_models_that_do_not_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    for model in (b"no model at all", empty, tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(SepconvertError, match=r"^onnxruntime cannot load .* a valid ONNX") as caught:
            session(Deployed(model, Runtime(1)))
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_numbers_out_of_range() -> None:
    with pytest.raises(SepconvertError, match="`threads`: expected a whole number from 1 to 1,024, got 0"):
        Runtime(0)
    with pytest.raises(SepconvertError, match="`runs`: expected at least 1, got 0"):
        measure_single(Deployed(conv_net(1), Runtime(1)), FEEDS, runs=0, batch=1, seed=0)
