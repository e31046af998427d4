"""Who starts next, when it will be finished, what is accepted; and what one request's failure does to the others."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.runtime import Bundle, DeadlineInfeasible, Engine, EngineThread, QueueFull, Request, Sample, SampleFailed
from fewstep.runtime.backends import OnnxBackend
from fewstep.runtime.pace import Pace, ticks_to_end, ticks_to_start
from fewstep.runtime.request import SampleFuture, Ticket
from fewstep.runtime.scheduler import Scheduler

# --- the line


def ticket(bundle: Bundle, caller: str = "", *, priority: int = 0, weight: float = 1.0, at_s: float = 0.0) -> Ticket:
    request = Request(0, bundle.tableau("ddim", 4), 0, priority=priority, caller=caller, weight=weight)
    return Ticket(request, SampleFuture(), at_s)


def callers(scheduler: Scheduler, num: int, now_s: float = 0.0) -> list[str]:
    return [ticket.request.caller for ticket in scheduler.take(num, now_s)[0]]


def test_time_in_line_counts_as_priority(baked: Bundle) -> None:
    """With 10 s a level, priority 2 that comes 19 s later goes first, and 21 s later it does not."""
    for later_s, first in ((19.0, "new"), (21.0, "old")):
        scheduler = Scheduler(ageing_s=10.0)
        scheduler.add(ticket(baked, "old"))
        scheduler.add(ticket(baked, "new", priority=2, at_s=later_s))
        assert callers(scheduler, 1, later_s) == [first]


def test_nobody_starves_behind_a_stream_of_higher_priority(baked: Bundle) -> None:
    scheduler = Scheduler(ageing_s=1.0)
    scheduler.add(ticket(baked, "low"))
    for second in range(20):
        scheduler.add(ticket(baked, "high", priority=5, at_s=second))
        scheduler.add(ticket(baked, "high", priority=5, at_s=second))
        if "low" in callers(scheduler, 1, second):
            break
    assert 4 <= second <= 12


def test_callers_share_alike_whoever_came_first(baked: Bundle) -> None:
    scheduler = Scheduler()
    for _ in range(100):
        scheduler.add(ticket(baked, "many"))
    scheduler.take(10, 0.0)
    for _ in range(5):
        scheduler.add(ticket(baked, "few"))
    order = callers(scheduler, 12)
    assert order.count("few") == 5
    assert len(scheduler) == 100 - 10 - 7


def test_a_callers_weight_is_its_share(baked: Bundle) -> None:
    scheduler = Scheduler()
    for name, weight in (("one", 1.0), ("three", 3.0)):
        for _ in range(60):
            scheduler.add(ticket(baked, name, weight=weight))
    assert 28 <= callers(scheduler, 40).count("three") <= 32


def test_who_was_away_saves_nothing_up(baked: Bundle) -> None:
    """A caller that comes to a long line gets its half from then on, and not what it could have had before."""
    scheduler = Scheduler()
    for _ in range(300):
        scheduler.add(ticket(baked, "busy"))
    scheduler.take(200, 0.0)
    for _ in range(40):
        scheduler.add(ticket(baked, "idle"))
    assert 18 <= callers(scheduler, 40).count("idle") <= 22


def test_a_request_knows_its_place(baked: Bundle) -> None:
    scheduler = Scheduler()
    first, second, high = ticket(baked), ticket(baked), ticket(baked, priority=1)
    for one in (first, second, high):
        scheduler.add(one)
    assert [scheduler.place(one.future) for one in (high, first, second)] == [0, 1, 2]
    assert scheduler.places() == {high.future: 0, first.future: 1, second.future: 2}
    assert scheduler.lengths() == {0: 2, 1: 1}
    scheduler.take(1, 0.0)
    assert [scheduler.place(one.future) for one in (high, first, second)] == [None, 0, 1]


# --- the pace


def test_the_line_of_the_costs_is_found_under_noise_and_stalls() -> None:
    pace, rng = Pace(), np.random.default_rng(0)
    for i in range(600):
        rows = int(rng.integers(1, 17))
        stall = 5.0 if i % 50 == 49 else 0.0
        pace.add(rows, 0.040 + 0.001 * rows + 0.001 * rng.standard_normal() + stall)
    a, b = pace.line()
    assert a == pytest.approx(0.040, abs=0.008)
    assert b == pytest.approx(0.001, abs=0.0008)


def test_a_changed_cost_is_learned(baked: Bundle) -> None:
    pace = Pace()
    for cost in (0.01, 0.03):
        for i in range(1000):
            pace.add(1 + i % 16, cost + 0.001 * (i % 16))
    assert pace.seconds(1) == pytest.approx(0.03, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 1e3)), max_size=50))
def test_a_prediction_is_never_negative(ticks: list[tuple[int, float]]) -> None:
    pace = Pace()
    for rows, took_s in ticks:
        pace.add(rows, took_s)
    for rows in (1, 16, 4096):
        assert 0 <= pace.seconds(rows) < np.inf
    assert 0 <= pace.reserve_s(16) < np.inf


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.lists(st.sampled_from([1, 2, 3, 4, 8]), max_size=12), st.integers(0, 6),
    st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4),
)  # fmt: skip
def test_the_engine_takes_exactly_the_ticks_that_are_foretold(
    baked: Bundle, places: int, before: list[int], ticks: int, asked: list[int]
) -> None:
    engine = Engine(baked, max_rows=places, threads=1)
    engine.submit([Request(0, baked.tableau("ddim", steps), 0) for steps in before])
    for _ in range(ticks):
        engine.step()
    running = [engine._slots.left(i) for i in range(engine.num_running)]
    waiting = before[len(before) - engine.num_waiting :]
    foretold = ticks_to_end(ticks_to_start(running, waiting, places), asked)
    futures = engine.submit([Request(0, baked.tableau("ddim", steps), 0) for steps in asked])
    took = 0
    while not all(future.done() for future in futures):
        engine.step()
        took += 1
    assert took == foretold


# --- a device with a clock of its own


class Clocked:
    """The student's network on a device where a call of n rows takes 40 + n ms of a clock moved by hand."""

    def __init__(self, bundle: Bundle, rows: int, clock: SimpleNamespace) -> None:
        self.network = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape)
        self.inputs, self.device, self.clock = self.network.inputs, self.network.device, clock

    def __call__(self, rows: int) -> NDArray[Any]:
        self.clock.now_s += 0.040 + 0.001 * rows
        return self.network(rows)


@pytest.fixture
def clock() -> SimpleNamespace:
    clock = SimpleNamespace(now_s=100.0)
    clock.read = lambda: clock.now_s
    return clock


def clocked(bundle: Bundle, clock: SimpleNamespace, max_rows: int = 4, **kwargs: Any) -> Engine:
    engine = Engine(
        bundle, max_rows=max_rows, backend=lambda b, rows: Clocked(b, rows, clock), clock=clock.read, **kwargs
    )
    engine.warm_up()
    return engine


# --- making room at a step


def test_a_higher_priority_takes_a_place_at_the_next_step_and_the_other_goes_on_to_the_same_bits(
    baked: Bundle, clock: SimpleNamespace
) -> None:
    engine = clocked(baked, clock, max_rows=2)
    low = [Request(seed, baked.tableau("dpmpp_2m", 8), 1) for seed in (1, 2)]
    high = Request(3, baked.tableau("ddim", 1), 1, priority=1)
    (first,) = engine.submit(low[:1])
    engine.step()
    (second,) = engine.submit(low[1:])
    for _ in range(2):
        engine.step()
    (urgent,) = engine.submit([high])
    engine.step()
    assert urgent.done()
    assert engine.counters.preempted == 1
    assert [engine.place(future) for future in (first, second)] == [None, 0]  # the one with more to go
    ticks = engine.counters.ticks
    while engine.step():
        pass
    alone = Engine(baked, max_rows=1, threads=1).generate([*low, high])
    for future, sample in zip((first, second, urgent), alone, strict=True):
        assert np.array_equal(future.result(0).pixels, sample.pixels)
    assert engine.counters.ticks - ticks == 6  # the second had two of eight steps behind it, and none is done twice
    assert engine.counters.row_steps == 17


@pytest.mark.parametrize(
    ("running", "waiting"),
    [
        ({"priority": 1}, {"priority": 1}),
        ({"priority": 2}, {"priority": 1}),
        ({"deadline_s": 1e9}, {"priority": 5}),
    ],
    ids=["equal", "lower", "promised"],
)
def test_who_keeps_a_place(
    baked: Bundle, clock: SimpleNamespace, running: dict[str, Any], waiting: dict[str, Any]
) -> None:
    engine = clocked(baked, clock, max_rows=1)
    first = Request(0, baked.tableau("ddim", 8), 0, **running)
    engine.submit([first])
    engine.step()
    clock.now_s += 1000
    (other,) = engine.submit([replace(first, deadline_s=None, **waiting)])
    for _ in range(6):
        engine.step()
    assert engine.counters.preempted == 0
    assert not other.done()


def test_a_stream_of_higher_priority_does_not_keep_one_from_its_end(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = clocked(baked, clock, max_rows=1, ageing_s=1.0)
    (low,) = engine.submit([Request(0, baked.tableau("ddim", 8), 0)])
    engine.step()
    start_s = clock.now_s
    while not low.done():
        engine.submit([Request(1, baked.tableau("ddim", 1), 0, priority=3)])
        engine.step()
        assert clock.now_s - start_s < 4.0  # in 3 s it has outgrown those that come then
    assert engine.counters.preempted > 0


def test_a_deadline_reckons_with_places_that_it_may_take(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = clocked(baked, clock, max_rows=1)
    engine.submit([Request(0, baked.tableau("ddim", 8), 0)])
    engine.step()
    with pytest.raises(DeadlineInfeasible):
        engine.submit([hurried(baked, clock, 0.2, 2)])
    (urgent,) = engine.submit([replace(hurried(baked, clock, 0.2, 2), priority=1)])
    while not urgent.done():
        engine.step()
    assert urgent.result(0).num_steps == 2


def test_one_that_made_room_can_be_cancelled_and_its_table_unloaded(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = clocked(baked, clock, max_rows=1)
    mine = replace(baked.tableau("ddim", 8), name="mine")
    engine.load_table(mine)
    low, other = engine.submit([Request(0, mine, 0), Request(1, mine, 0)])
    engine.step()
    (high,) = engine.submit([Request(2, baked.tableau("ddim", 2), 0, priority=1)])
    engine.step()
    assert engine.num_waiting == 2
    engine.unload_table("mine", 8)
    other.cancel()
    while engine.step():
        pass
    (same,) = Engine(baked, max_rows=1, threads=1).generate([Request(0, mine, 0)])
    assert np.array_equal(low.result(0).pixels, same.pixels)
    assert high.done()
    assert (engine.counters.finished, engine.counters.cancelled) == (2, 1)


# --- deadlines


def hurried(bundle: Bundle, clock: SimpleNamespace, within_s: float, *choices: int) -> Request:
    tableau, *fewer = [bundle.tableau("ddim", steps) for steps in choices or (8, 4, 3, 2, 1)]
    return Request(1, tableau, 2, deadline_s=clock.now_s + within_s, fallbacks=tuple(fewer))


@pytest.mark.parametrize(("within_s", "steps"), [(9.0, 8), (0.35, 8), (0.33, 4), (0.175, 4), (0.13, 3), (0.045, 1)])
def test_the_most_steps_that_fit_are_taken(baked: Bundle, clock: SimpleNamespace, within_s: float, steps: int) -> None:
    """A step is 41 ms with one row and 44 with four; the mean of what was seen counts."""
    engine = clocked(baked, clock)
    (future,) = engine.submit([hurried(baked, clock, within_s)])
    deadline_s = clock.now_s + within_s
    while engine.step():
        pass
    sample = future.result(0)
    assert sample.num_steps == steps
    assert clock.now_s <= deadline_s
    (same,) = Engine(baked, threads=1).generate([Request(1, baked.tableau("ddim", steps), 2)])
    assert np.array_equal(sample.pixels, same.pixels)


def test_what_runs_and_waits_is_reckoned_with(baked: Bundle, clock: SimpleNamespace) -> None:
    """One place, taken for 8 more steps, and 4 steps in line before it: 12 of 41 ms and the tick under way."""
    engine = clocked(baked, clock, max_rows=1)
    engine.submit([Request(0, baked.tableau("ddim", 8), 0)])
    engine.step()
    engine.submit([Request(0, baked.tableau("ddim", 4), 0)])
    with pytest.raises(
        DeadlineInfeasible, match=r"^400 ms are not enough: 1 steps behind 1 others would take "
    ) as late:
        engine.submit([hurried(baked, clock, 0.4)])
    assert late.value.retry_after_s == pytest.approx((7 + 4 + 1 + 1) * 0.041 - 0.4, abs=0.005)
    assert engine.counters.rejected == 1
    (future,) = engine.submit([hurried(baked, clock, 0.62)])
    while engine.step():
        pass
    assert future.result(0).num_steps == 3
    (first,) = engine.submit([replace(hurried(baked, clock, 0.3), priority=1)])
    assert engine.place(first) == 0


def test_what_never_fits_is_not_told_to_try_again(baked: Bundle, clock: SimpleNamespace) -> None:
    """With nobody there, and behind others: a wait would not help."""
    engine = clocked(baked, clock, max_rows=1)
    for waiting in (0, 5):
        engine.submit([Request(0, baked.tableau("ddim", 4), 0)] * waiting)
        with pytest.raises(
            DeadlineInfeasible, match=r"^30 ms are not enough: 1 steps would take 41 ms; .* since no wait will help$"
        ) as never:
            engine.submit([hurried(baked, clock, 0.03)])
        assert never.value.retry_after_s is None


def test_the_retry_time_is_the_line_at_the_measured_pace_whoever_left(baked: Bundle, clock: SimpleNamespace) -> None:
    """Four rows at 44 ms a tick, and 8 in line of 8 and 2 steps; that others gave up late is no matter."""
    engine = clocked(baked, clock, max_rows=4, max_waiting=8)
    long, short = (Request(0, baked.tableau("ddim", steps), 0) for steps in (8, 2))
    for _ in range(20):
        futures = engine.submit([long] * 4)
        for _ in range(7):
            engine.step()
        for future in futures:
            future.cancel()
        engine.step()
    engine.submit([long, short] * 4)
    with pytest.raises(QueueFull) as caught:
        engine.submit([short])
    assert caught.value.retry_after_s == pytest.approx((4 * 8 + 4 * 2) / 4 * 0.044, rel=0.02)
    assert engine.seconds_to_start(2) == pytest.approx(caught.value.retry_after_s / 4)


def test_the_images_of_one_call_get_the_same_number_of_steps(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = clocked(baked, clock, max_rows=2)
    futures = engine.submit([hurried(baked, clock, 0.5)] * 5)
    while engine.step():
        pass
    assert [future.result(0).num_steps for future in futures] == [3] * 5  # three rounds of three steps of 42 ms


def test_under_random_load_what_is_accepted_is_in_time_and_what_is_refused_would_be_late(
    baked: Bundle, clock: SimpleNamespace
) -> None:
    engine, rng = clocked(baked, clock, max_rows=4), np.random.default_rng(3)
    accepted: list[tuple[int, float, Future[Sample]]] = []
    end_s: dict[int, float] = {}
    refused, taken = 0, set[int]()
    for i in range(600):
        if rng.random() < 0.5:
            request = hurried(baked, clock, float(rng.uniform(0.03, 1.0)))
            try:
                (future,) = engine.submit([request])
            except DeadlineInfeasible:
                refused += 1
                running = [engine._slots.left(i) for i in range(engine.num_running)]
                ahead = [ticket.request.tableau.num_steps for ticket in engine._scheduler.ahead(request)]
                ticks = ticks_to_end(ticks_to_start(running, ahead, 4), [1]) + 1
                assert request.deadline_s is not None
                assert clock.now_s + ticks * 0.044 + engine.pace.reserve_s(ticks) > request.deadline_s
            else:
                future.add_done_callback(lambda _, i=i: end_s.update({i: clock.now_s}))  # type: ignore[misc]
                accepted.append((i, request.deadline_s or 0.0, future))
        else:
            engine.step()
    while engine.step():
        pass
    for i, deadline_s, future in accepted:
        if future.exception(0) is None:
            taken.add(future.result(0).num_steps)
        assert end_s[i] <= deadline_s + 0.044  # those who join later make ticks a little longer
    assert engine.counters.expired <= 0.02 * len(accepted)
    assert refused > 30
    assert taken == {1, 2, 3, 4, 8}


# --- one request's failure


class Refusing:
    """A network that raises on every batch with a certain label in it."""

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.network = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape)
        self.inputs, self.device = self.network.inputs, self.network.device

    def __call__(self, rows: int) -> NDArray[Any]:
        if 3 in self.inputs["label"][:rows]:
            raise RuntimeError("label 3 is more than this device can bear")
        return self.network(rows)


@pytest.mark.parametrize("kind", ["baked", "guided"])
def test_a_row_that_the_network_raises_on_fails_alone(kind: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    scales = [None] if kind == "baked" else [1.0, 2.0, None]
    requests = [
        Request(i, bundle.tableau(*table), i % 5, scales[i % len(scales)])
        for i, table in enumerate([("ddim", 4), ("heun", 7), ("ancestral", 3), ("dpmpp_2m", 8)] * 6)
    ]
    right = Engine(bundle, threads=1).generate([r for r in requests if r.label != 3])
    engine = Engine(bundle, max_rows=6, backend=Refusing)
    futures = engine.submit(requests)
    while engine.step():
        pass
    failed = [future for asked, future in zip(requests, futures, strict=True) if asked.label == 3]
    assert len(failed) == 5
    for future in failed:
        with pytest.raises(SampleFailed, match=r"^the step failed: label 3 is more than this device can bear$"):
            future.result(0)
    made = [future.result(0) for asked, future in zip(requests, futures, strict=True) if asked.label != 3]
    assert all(np.array_equal(ours.pixels, sample.pixels) for ours, sample in zip(made, right, strict=True))
    assert engine.counters.failed == 5


@pytest.mark.parametrize("part", ["_let_go", "_admit", "_harvest", "_pack", "_step"])
def test_whatever_raises_in_a_tick_ends_what_ran_and_the_thread_goes_on(
    baked: Bundle, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    engine = Engine(baked, max_rows=2, threads=1)
    thread = EngineThread([engine])
    whole: Callable[..., Any] = getattr(engine, part)
    times = iter([True, True, False])

    def broken(*arguments: Any) -> Any:
        if next(times, False):
            raise MemoryError("no memory left")
        return whole(*arguments)

    requests = [Request(i, baked.tableau("ddim", 8), i) for i in range(8)]
    futures = engine.submit(requests)
    monkeypatch.setattr(engine, part, broken)
    if part == "_pack":
        engine.load_table(baked.tableau("ddim", 8))  # so that there is something to pack
    thread.start()
    for future in futures:
        assert isinstance(future.exception(30), SampleFailed | None)
    (again,) = engine.submit(requests[:1])
    (sample,) = Engine(baked, threads=1).generate(requests[:1])
    assert np.array_equal(again.result(30).pixels, sample.pixels)
    thread.stop()
    assert engine.num_running == engine.num_waiting == 0
    assert not any(times)  # it raised as often as it should


# --- several students on one device


def test_students_share_the_device_by_their_weights(baked: Bundle, guided: Bundle) -> None:
    """Both have more to do than there is time for; one is to get three times the other's."""
    engines = [Engine(baked, max_rows=1, threads=1, weight=weight) for weight in (1.0, 3.0)]
    thread = EngineThread(engines)
    for engine in engines:
        engine.submit([Request(i, baked.tableau("ddim", 8), 0) for i in range(500)])
    thread.start()
    while sum(engine.counters.ticks for engine in engines) < 600:
        pass
    ticks = [engine.counters.ticks for engine in engines]
    times = [engine.counters.busy_s for engine in engines]
    for engine in engines:
        assert engine.num_waiting > 0
        engine.close()
        engine._scheduler.take(1000, 0.0)
    thread.stop()
    assert 2.0 <= times[1] / times[0] <= 4.5, (ticks, times)
    assert engines[0].pace.others_s > 0
