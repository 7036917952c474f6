"""The clock of stages: every moment belongs to one stage, and nothing is counted where there is no clock."""

import mmap
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base import progress
from sepconvert.base.progress import Stage, StageClock, silent, stage, stage_clock, stages_so_far

PARTS = ("stem", "head")


def by_name(stages: list[dict]) -> dict[str, dict]:
    return {each["stage"]: each for each in stages}


@dataclass(frozen=True)
class Work:
    """A stage that takes `wall` and `cpu` seconds before and after each of the stages within it."""

    name: Stage
    part: str | None
    wall: int
    cpu: int
    within: list["Work"] = field(default_factory=list)


def works(within: st.SearchStrategy) -> st.SearchStrategy:
    kinds = st.sampled_from([Stage.SURVEY, Stage.MOMENTS, Stage.FITS, Stage.EXPORT])
    parts, seconds = st.sampled_from([None, *PARTS]), st.integers(0, 100)
    return st.builds(Work, kinds, parts, seconds, seconds, within)


TREES = st.lists(
    st.recursive(works(st.just([])), lambda each: works(st.lists(each, max_size=3)), max_leaves=12),
    max_size=3,
)


class Hands:
    """A clock on the wall and one of the processor, which move when they are moved."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def move(self, work: Work) -> None:
        self.wall, self.cpu = self.wall + work.wall, self.cpu + work.cpu


def do(works: list[Work], hands: Hands) -> None:
    for work in works:
        with stage(work.name, work.part):
            hands.move(work)
            for each in work.within:
                do([each], hands)
                hands.move(work)


def alone(works: list[Work]) -> list[tuple[Work, int]]:
    """Every piece of work in a tree, and how often its seconds pass outside the work within it."""
    return [(work, 1 + len(work.within)) for work in works] + [
        each for work in works for each in alone(work.within)
    ]


@given(TREES)
def test_a_stage_is_counted_without_those_within_it(trees):
    hands = Hands()
    clocks = SimpleNamespace(perf_counter=lambda: hands.wall, process_time=lambda: hands.cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", clocks)
        with stage_clock() as clock:
            do(trees, hands)
            hands.wall += 7
            found = clock.to_json()
    pieces = alone(trees)
    assert {each["stage"] for each in found} == {"rest", *(work.name for work, _ in pieces)}
    assert found[0]["stage"] == "rest"
    for each in found:
        mine = [(work, times) for work, times in pieces if work.name == each["stage"]]
        rest = 7 if each["stage"] == "rest" else 0
        assert each["wall_s"] == rest + sum(times * work.wall for work, times in mine)
        assert each["cpu_s"] == sum(times * work.cpu for work, times in mine)
        assert each["parts"] == {
            part: sum(times * work.wall for work, times in mine if work.part == part)
            for part in PARTS
            if part in {work.part for work, _ in mine}
        }
    assert sum(each["wall_s"] for each in found) == hands.wall
    assert sum(each["cpu_s"] for each in found) == hands.cpu


def test_the_time_is_that_of_the_clock_on_the_wall():
    start = time.perf_counter()
    with stage_clock() as clock:
        with stage(Stage.FITS):
            time.sleep(0.05)
        found = by_name(clock.to_json())
    whole = time.perf_counter() - start
    assert 0.05 <= found["fits"]["wall_s"] <= sum(each["wall_s"] for each in found.values()) <= whole
    assert found["fits"]["cpu_s"] < found["fits"]["wall_s"]  # it slept


def test_the_peak_of_a_stage_is_that_of_memory_it_has_freed():
    size = 2**27
    with stage_clock() as clock:
        # Not on the heap, which may keep what is freed.
        with stage(Stage.MOMENTS), mmap.mmap(-1, size) as held:
            held.write(b"1" * size)
            time.sleep(3 * progress._SAMPLED)
        with stage(Stage.FITS):
            pass
        found = by_name(clock.to_json())
    assert found["moments"]["peak_bytes"] > found["fits"]["peak_bytes"] + 0.9 * size
    assert found["fits"]["peak_bytes"] > 0


def test_a_decorated_function_is_a_stage_each_time():
    @stage(Stage.TIMING)
    def measure(depth: int) -> int:
        return measure(depth - 1) + 1 if depth else 0

    assert measure(2) == 2
    with stage_clock():
        assert measure(2) == 2
        assert measure(0) == 0
        assert [each["stage"] for each in stages_so_far()] == ["rest", "timing"]


def test_without_a_clock_nothing_is_counted():
    with stage(Stage.FITS, "stem"):
        assert stages_so_far() == []


def test_an_error_ends_its_stage():
    with stage_clock() as clock:
        with pytest.raises(ValueError, match="no"), stage(Stage.SURVEY), stage(Stage.FITS):
            raise ValueError("no")
        clock.count()
        before = clock.times[Stage.REST].wall_s
        clock.count()
        assert clock.times[Stage.REST].wall_s > before


def test_the_clock_within_is_the_clock_around_and_ends_with_it():
    with stage_clock() as outer:
        with stage_clock() as inner, stage(Stage.FITS):
            pass
        assert inner is outer
        assert "fits" in by_name(stages_so_far())
    assert stages_so_far() == []
    with stage_clock() as other:
        assert other is not outer
        assert "fits" not in by_name(stages_so_far())


def test_an_error_ends_its_clock():
    with pytest.raises(ValueError, match="no"), stage_clock():
        raise ValueError("no")
    assert stages_so_far() == []


def test_other_threads_have_no_clock():
    seen = []

    def work() -> None:
        with stage(Stage.FITS):
            seen.append(stages_so_far())

    with stage_clock() as clock:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "fits" not in by_name(clock.to_json())
    assert seen == [[]]


def test_the_thread_that_looks_at_memory_ends_with_the_clock():
    def watching() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "memory"]

    before = watching()
    with stage_clock():
        (thread,) = set(watching()) - set(before)
        assert thread.daemon  # it must not keep a process that is interrupted
    thread.join(10)
    assert not thread.is_alive()


def test_the_start_is_what_the_process_did_before():
    clock = StageClock()
    clock.count_start()
    start, age = clock.times[Stage.START], time.time() - psutil.Process().create_time()
    assert 0 < start.wall_s == pytest.approx(age, abs=1)
    assert 0 < start.cpu_s <= time.process_time()
    assert start.peak_bytes > 0
    assert "rest" in by_name(clock.to_json())


def test_a_start_is_never_negative(monkeypatch):
    """The wall clock may be set back while a process runs."""
    clock = StageClock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.count_start()
    assert clock.times[Stage.START].wall_s == 0


def test_silence_leaves_a_loop_as_it_is():
    items = [1, 2]
    assert silent(items, "counting") is items
