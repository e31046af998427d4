"""The engine: what a request gets depends on the request alone, and every request comes to exactly one end."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from fewstep.kernels import normals
from fewstep.runtime import (
    Bundle,
    BundleError,
    DeadlineExpired,
    Engine,
    EngineStopped,
    EngineThread,
    QueueFull,
    Request,
    Sample,
    SampleFailed,
    TableauError,
)
from fewstep.runtime.backends import Backend, BackendError, OnnxBackend
from fewstep.runtime.request import to_uint8
from fewstep.runtime.schedules import flow, karras
from fewstep.runtime.simulated import simulated
from fewstep.runtime.solvers import ddim, dpmpp_2m

Pixels = NDArray[np.float32]


def engine_of(bundle: Bundle, **kwargs: Any) -> Engine:
    return Engine(bundle, **{"max_rows": 4, "threads": 1, **kwargs})


def drain(engine: Engine) -> None:
    while engine.step():
        pass
    assert engine.num_waiting == engine.num_running == 0


def ends(engine: Engine) -> int:
    """Requests that have come to an end of any kind."""
    done = engine.counters
    return done.finished + done.cancelled + done.expired + done.failed


class Plan:
    """A request drawn at random from everything that a student offers."""

    def __init__(self, bundle: Bundle, rng: np.random.Generator) -> None:
        tableaus = list(bundle.tableaus.values())
        is_guided = bundle.manifest.guidance.mode == "classifier-free"
        scale = rng.choice([1.0, rng.uniform(1, 5)]) if is_guided else None
        self.request = Request(
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            tableau=tableaus[rng.integers(len(tableaus))],
            label=None if rng.random() < 0.1 else int(rng.integers(10)),
            guidance=None if scale is None or rng.random() < 0.2 else float(scale),
        )


class Loop:
    """One sample at a time, one network call at a time: the plain loop that the engine must equal."""

    def __init__(self, bundle: Bundle) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(bundle.network), options, providers=["CPUExecutionProvider"])
        self.manifest = bundle.manifest

    def network(self, x: Pixels, t: np.float32, label: int) -> Pixels:
        inputs = {
            "x": x.reshape(1, *self.manifest.sample_shape),
            "t": np.array([t]),
            "label": np.array([label], np.int64),
        }
        (raw,) = self.session.run(None, inputs)
        pixels: Pixels = np.asarray(raw, np.float32).reshape(-1)
        return pixels

    def sample(self, request: Request) -> Pixels:
        labels, guidance = self.manifest.labels, self.manifest.guidance
        assert labels is not None
        assert labels.null is not None
        label = labels.null if request.label is None else request.label
        scale = np.float32(guidance.default if request.guidance is None else request.guidance)
        start, *rows = request.tableau.step_rows(self.manifest.output.prediction())
        elements = int(np.prod(self.manifest.sample_shape))
        f = np.float32

        def noise(number: int) -> Pixels:
            z: Pixels = normals(np.array([request.seed], np.uint64), np.array([number]), elements)[0]
            return z

        x, c_in = f(start.c) * noise(0), f(start.c_in)
        kept: dict[int, Pixels] = {}
        for row in rows:
            raw = self.network(c_in * x, f(row.t), label)
            if guidance.mode == "classifier-free" and scale != 1:
                base = self.network(c_in * x, f(row.t), labels.null)
                raw = base + scale * (raw - base)
            m = f(row.k_x) * x + f(row.k_m) * raw
            if row.write_slot >= 0:
                kept[row.write_slot] = m
            x = f(row.a) * x
            for slot, weight in enumerate(row.b):
                if weight:
                    x = x + f(weight) * kept[slot]
            if row.c:
                x = x + f(row.c) * noise(row.noise_id)
            c_in = f(row.c_in)
        return x.reshape(self.manifest.sample_shape)


# --- a sample depends on its request alone


@pytest.mark.parametrize("kind", ["baked", "guided"])
def test_alone_a_sample_is_the_plain_loops_to_the_bit(kind: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    loop, engine, rng = Loop(bundle), engine_of(bundle), np.random.default_rng(0)
    for tableau in bundle.tableaus.values():
        asked = replace(Plan(bundle, rng).request, tableau=tableau)
        (sample,) = engine.generate([asked])
        assert np.array_equal(sample.pixels, loop.sample(asked)), tableau.name


@pytest.mark.parametrize("kind", ["baked", "guided"])
def test_a_sample_has_the_same_bits_in_any_company(kind: str, request: pytest.FixtureRequest) -> None:
    """600 random compositions a student: solvers, steps, guidance, seeds, arrivals, priorities, cancels, batch limits.

    The engines are used again and again, so slots and history hold what earlier requests left there.
    """
    bundle: Bundle = request.getfixturevalue(kind)
    rng = np.random.default_rng(2026)
    plans = [Plan(bundle, rng).request for _ in range(80)]
    loop = Loop(bundle)
    alone = [loop.sample(plan) for plan in plans]
    sizes = ((1, 1), (2, 1), (3, 2), (4, 3), (5, 1), (8, 2))
    engines = [engine_of(bundle, max_rows=rows, threads=threads) for rows, threads in sizes]
    compared = 0
    for composition in range(600):
        engine = engines[rng.integers(len(engines))]
        before, accepted = ends(engine), 0
        futures: list[tuple[int, Future[Sample]]] = []
        for _ in range(int(rng.integers(1, 5))):
            chosen = rng.integers(len(plans), size=rng.integers(1, 4))
            asked = [replace(plans[i], priority=int(rng.integers(-1, 2))) for i in chosen]
            futures += zip((int(i) for i in chosen), engine.submit(asked), strict=True)
            accepted += len(asked)
            for _ in range(int(rng.integers(0, 4))):
                engine.step()
            if rng.random() < 0.4:
                futures[rng.integers(len(futures))][1].cancel()
        drain(engine)
        assert ends(engine) - before == accepted
        for i, future in futures:
            if not future.cancelled():
                assert np.array_equal(future.result(0).pixels, alone[i]), f"composition {composition}, {plans[i]}"
                compared += 1
    assert compared > 1500


def test_the_same_stream_of_requests_gives_the_same_trace(baked: Bundle) -> None:
    rng = np.random.default_rng(5)
    stream = [Plan(baked, rng).request for _ in range(12)]

    def trace() -> list[tuple[int, int, int]]:
        engine, seen = engine_of(baked), []
        engine.submit(stream)
        while engine.step():
            seen.append((engine.num_waiting, engine.num_running, engine.counters.finished))
        return seen

    assert trace() == trace()


def test_no_label_means_the_null_label_and_no_guidance_the_default(guided: Bundle) -> None:
    engine, tableau = engine_of(guided), guided.tableau("ddim", 2)
    said, unsaid = engine.generate([Request(1, tableau, 3, 2.0), Request(1, tableau, 3)])
    assert np.array_equal(said.pixels, unsaid.pixels)
    one, five = engine.generate([Request(1, tableau, None, 1.0), Request(1, tableau, None, 5.0)])
    assert one.pixels == pytest.approx(five.pixels, abs=1e-4)  # both sides of the guidance are the null label


def test_a_table_first_seen_under_load_disturbs_nobody(baked: Bundle) -> None:
    """It makes the history deeper and the table longer while others are on their way."""
    shallow = replace(baked, tableaus={("ddim", 8): baked.tableau("ddim", 8), ("ancestral", 4): baked.tableau()})
    engine, loop = engine_of(shallow), Loop(baked)
    first = Request(3, shallow.tableau("ddim", 8), 1)
    (running,) = engine.submit([first])
    engine.step()
    new = Request(4, dpmpp_2m(karras(5)), 2)
    (second,) = engine.submit([new])
    drain(engine)
    assert np.array_equal(running.result(0).pixels, loop.sample(first))
    assert np.array_equal(second.result(0).pixels, loop.sample(new))


def test_generate_takes_more_requests_than_the_line_holds(baked: Bundle) -> None:
    engine, seen = engine_of(baked, max_waiting=3), list[int]()
    requests = [Request(seed, baked.tableau("ddim", 2), 0) for seed in range(20)]
    samples = engine.generate(requests, on_step=seen.append)
    assert [sample.request for sample in samples] == requests
    assert seen == sorted(seen)
    assert seen[-1] == 20


def test_pixels_become_bytes_by_rounding_to_nearest(baked: Bundle) -> None:
    pixels = np.linspace(-1.2, 1.2, 64, dtype=np.float32).reshape(1, 8, 8)
    sample = Sample(pixels, Request(0, baked.tableau(), 0), 0, 0)
    exact = (np.clip(pixels.astype(np.float64), -1, 1) + 1) * 127.5
    assert np.abs(sample.to_uint8() - exact.transpose(1, 2, 0)).max() <= 0.5 + 1e-4
    odd = replace(sample, pixels=np.array([[[np.nan, np.inf, -np.inf, 3e38]]], np.float32))  # and without a warning
    assert odd.to_uint8().ravel().tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_become_bytes_together_as_they_do_alone(channels: int) -> None:
    pixels = np.random.default_rng(0).standard_normal((5, channels, 4, 6), np.float32)
    together = to_uint8(pixels)
    assert together.shape == (5, 4, 6, channels)
    assert np.array_equal(together, np.stack([to_uint8(one) for one in pixels]))


def test_a_samples_bytes_are_those_of_its_pixels(baked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is small, so that they are made with those of its tick, or not."""
    requests = [Request(seed, baked.tableau("ddim", 1 + seed % 2), 0) for seed in range(6)]
    small = engine_of(baked).generate(requests)
    monkeypatch.setattr("fewstep.runtime.engine.TOGETHER", 0)
    for one, other in zip(small, engine_of(baked).generate(requests), strict=True):
        assert one.picture is not None
        assert other.picture is None
        assert np.array_equal(one.to_uint8(), other.to_uint8())


# --- order, cancellation, deadlines, the bound


def long_and_short(bundle: Bundle) -> tuple[Request, Request]:
    return Request(0, bundle.tableau("ddim", 8), 1), Request(1, bundle.tableau("ddim", 1), 2)


def test_a_higher_priority_starts_first_and_equals_come_first_served(baked: Bundle) -> None:
    engine, order = engine_of(baked, max_rows=1), list[int]()
    _, short = long_and_short(baked)
    for name, priority in enumerate([0, 5, 0, -1, 5]):
        (future,) = engine.submit([replace(short, priority=priority)])
        future.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
    drain(engine)
    assert order == [1, 4, 0, 2, 3]


def test_a_cancelled_request_frees_its_slot_within_one_step(baked: Bundle) -> None:
    engine = engine_of(baked, max_rows=1)
    long, short = long_and_short(baked)
    running, waiting = engine.submit([long, short])
    engine.step()
    assert running.cancel()
    engine.step()
    assert waiting.done()
    assert engine.num_running == 0
    assert engine.counters.cancelled == 1
    assert engine.counters.row_steps == 2


def test_whoever_waits_for_a_cancelled_request_is_told(baked: Bundle) -> None:
    """`concurrent.futures.wait` returns only when the worker has acknowledged a cancellation."""
    engine = engine_of(baked, max_rows=1)
    running, waiting = engine.submit(long_and_short(baked))
    engine.step()
    running.cancel()
    waiting.cancel()
    drain(engine)
    assert wait([running, waiting], timeout=1).not_done == set()
    with pytest.raises(CancelledError):
        running.result(0)


@pytest.fixture
def clock() -> SimpleNamespace:
    """The engine's clock, moved by hand: ``clock.now_s``."""
    clock = SimpleNamespace(now_s=100.0)
    clock.read = lambda: clock.now_s
    return clock


def test_a_deadline_ends_a_running_request_and_not_its_neighbour(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = engine_of(baked, clock=clock.read)
    long, _ = long_and_short(baked)
    hurried, patient = engine.submit([replace(long, deadline_s=101.0), replace(long, deadline_s=200.0)])
    engine.step()
    clock.now_s = 101.0
    engine.step()
    assert engine.num_running == 2  # at the deadline, not past it
    clock.now_s = 101.5
    engine.step()
    with pytest.raises(DeadlineExpired, match=r"^the deadline passed while the sample was running$"):
        hurried.result(0)
    drain(engine)
    assert patient.result(0).run_s == pytest.approx(1.5)
    assert engine.counters.expired == 1


def test_a_deadline_ends_a_waiting_request_before_it_starts(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = engine_of(baked, clock=clock.read, max_rows=1)
    long, short = long_and_short(baked)
    engine.submit([long])
    (late,) = engine.submit([replace(short, deadline_s=100.5)])
    engine.step()
    clock.now_s = 101.0
    drain(engine)
    with pytest.raises(DeadlineExpired, match=r"^the deadline passed while the sample was waiting$"):
        late.result(0)
    assert engine.counters.row_steps == long.tableau.num_steps


def test_a_full_queue_takes_all_or_nothing_and_says_when_to_come_back(baked: Bundle) -> None:
    engine = engine_of(baked, max_rows=1, max_waiting=3)
    _, short = long_and_short(baked)
    engine.submit([short, short])
    with pytest.raises(QueueFull, match=r"^the queue is full: 2 of 3 samples wait; try again in 1 s$") as caught:
        engine.submit([short, short])
    assert caught.value.retry_after_s > 0
    assert engine.num_waiting == 2
    assert engine.counters.rejected == 2
    engine.submit([short])
    drain(engine)
    assert engine.counters.finished == 3


def test_what_nobody_wants_any_more_makes_room_in_a_full_queue(baked: Bundle, clock: SimpleNamespace) -> None:
    engine = engine_of(baked, clock=clock.read, max_rows=1, max_waiting=2)
    _, short = long_and_short(baked)
    gone, late = engine.submit([short, replace(short, deadline_s=101.0)])
    gone.cancel()
    clock.now_s = 102.0
    engine.submit([short, short])
    assert isinstance(late.exception(0), DeadlineExpired)
    drain(engine)
    assert (engine.counters.finished, engine.counters.cancelled, engine.counters.expired) == (2, 1, 1)


def test_a_callback_may_submit_again(baked: Bundle, clock: SimpleNamespace) -> None:
    """Whatever end a future comes to, no lock is held when its callbacks run."""
    engine = engine_of(baked, clock=clock.read, max_rows=1, max_waiting=2)
    _, short = long_and_short(baked)
    again: list[Future[Sample]] = []

    def submit_again(_: Future[Sample]) -> None:
        again.extend(engine.submit([short]))

    ended, cancelled = engine.submit([replace(short, deadline_s=100.0), short])
    ended.add_done_callback(submit_again)
    cancelled.add_done_callback(submit_again)
    clock.now_s = 101.0

    def work() -> None:
        cancelled.cancel()
        drain(engine)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(20)
    assert not worker.is_alive()
    assert [future.exception(0) for future in again] == [None, None]


# --- refusals at the door


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("baked", {"seed": -1}, r"seed: -1, must be 0 to 2\*\*64 - 1"),
        ("baked", {"seed": 2**64}, r"seed: 18446744073709551616, must be 0 to 2\*\*64 - 1"),
        ("baked", {"label": 10}, "label: 10, digits has 0 to 9"),
        ("baked", {"label": -1}, "label: -1, digits has 0 to 9"),
        ("baked", {"guidance": 2.0}, "guidance: 2, digits takes 1 only: its guidance is fixed"),
        ("guided", {"guidance": 5.5}, "guidance: 5.5, digits-guided takes 1 to 5"),
        ("guided", {"guidance": float("nan")}, "guidance: nan, digits-guided takes 1 to 5"),
        ("baked", {"tableau": ddim(flow(4))}, "ddim: level 0 is not on the ve path of digits"),
        (
            "baked",
            {"tableau": replace(ddim(karras(4)), weights_sha256="ab" * 32)},
            "ddim: was fitted to weights abababababab, digits has [0-9a-f]{12}",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_none_of_its_company_kept(
    kind: str, changes: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    engine, good = engine_of(bundle), Request(0, bundle.tableau(), 0)
    with pytest.raises(ValueError, match=f"^{message}$"):
        engine.submit([good, replace(good, **changes)])
    assert engine.num_waiting == 0


def test_a_misfit_table_is_a_table_error(baked: Bundle) -> None:
    with pytest.raises(TableauError):
        engine_of(baked).submit([Request(0, ddim(flow(2)), 0)])


def test_a_student_with_labels_and_no_null_label_needs_one(baked: Bundle) -> None:
    labels = baked.manifest.labels
    assert labels is not None
    manifest = baked.manifest.model_copy(update={"labels": labels.model_copy(update={"null": None})})
    engine = engine_of(replace(baked, manifest=manifest))
    with pytest.raises(ValueError, match=r"^label: digits needs one, 0 to 9$"):
        engine.submit([Request(0, baked.tableau())])


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_waiting": 0}])
def test_an_engine_of_no_size_is_refused(baked: Bundle, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1$"):
        engine_of(baked, **limits)


def test_a_network_that_contradicts_its_manifest_is_refused(baked: Bundle) -> None:
    manifest = baked.manifest.model_copy(update={"labels": None})
    with pytest.raises(BundleError, match=r"the network takes label, against what the manifest says$"):
        engine_of(replace(baked, manifest=manifest))
    embedded = baked.manifest.guidance.model_copy(update={"mode": "embedded"})
    manifest = baked.manifest.model_copy(update={"guidance": embedded})
    with pytest.raises(BundleError, match=r"the network does not take guidance, against what the manifest says$"):
        engine_of(replace(baked, manifest=manifest))


def test_a_network_of_another_shape_is_refused(baked: Bundle) -> None:
    with pytest.raises(BackendError, match=r"model\.onnx: input x is tensor\(float\).*, not what a step graph has$"):
        OnnxBackend(baked.network, 2, (1, 8, 16))


def test_a_file_that_is_no_network_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a network")
    with pytest.raises(BackendError, match=r"model\.onnx: ONNX Runtime cannot load it: .+") as caught:
        OnnxBackend(tmp_path / "model.onnx", 2, (1, 8, 8))
    assert "\n" not in str(caught.value)


def test_a_network_with_an_input_nobody_feeds_is_refused(baked: Bundle, tmp_path: Path) -> None:
    model = onnx.load(baked.network)
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, ["batch"])
    model.graph.input.append(mask)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=r"input mask is .*, not what a step graph has$"):
        OnnxBackend(tmp_path / "model.onnx", 2, (1, 8, 8))


@pytest.mark.parametrize("name", ["fashion-mnist-mm4", "fashion-mnist-teacher"])
def test_the_threads_change_no_bit(name: str) -> None:
    bundle = Bundle.load(name)
    rng = np.random.default_rng(1)
    backends = [OnnxBackend(bundle.network, 8, bundle.manifest.sample_shape, threads) for threads in (1, 2, 3)]
    given: dict[str, Any] = {key: rng.standard_normal(array.shape) for key, array in backends[0].inputs.items()}
    given |= {"label": np.arange(8), "guidance": np.linspace(0, 4, 8)}
    for backend in backends:
        for key, array in backend.inputs.items():
            array[:] = given[key]
    alone = backends[0](1).copy()
    for rows in (1, 2, 3, 5, 8):
        raw = [backend(rows).copy() for backend in backends]
        assert np.array_equal(raw[0], raw[1])
        assert np.array_equal(raw[0], raw[2])
        assert np.array_equal(raw[0][:1], alone)


def test_a_part_that_fails_fails_the_call_and_no_other(baked: Bundle) -> None:
    backend = OnnxBackend(baked.network, 4, baked.manifest.sample_shape, 2)
    good = backend(4).copy()
    for row in (0, 3):  # of the part that the caller runs, and of the other
        backend.inputs["label"][row] = 10**6
        with pytest.raises(Exception, match="indices element out of data bounds"):
            backend(4)
        backend.inputs["label"][row] = 0
        assert np.array_equal(backend(4), good)


# --- failures


def test_nan_from_the_network_fails_its_own_request_only(
    make_bundle: Callable[..., Path], baked: Bundle, guided: Bundle
) -> None:
    for is_guided, clean in ((False, baked), (True, guided)):
        bundle = Bundle.load(make_bundle(is_guided=is_guided, nan_label=3))
        engine, loop = engine_of(bundle, max_rows=3), Loop(clean)
        rng = np.random.default_rng(1)
        requests = [replace(Plan(bundle, rng).request, label=int(label)) for label in rng.integers(10, size=40)]
        futures = engine.submit(requests)
        drain(engine)
        for request, future in zip(requests, futures, strict=True):
            if request.label == 3:
                with pytest.raises(SampleFailed, match=r"^the sample is not finite: the network gave NaN or infinity$"):
                    future.result(0)
            else:
                assert np.array_equal(future.result(0).pixels, loop.sample(request))
        assert engine.counters.failed == sum(request.label == 3 for request in requests) > 0


class Moody:
    """A real network that raises when told to."""

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.network = OnnxBackend(bundle.network, rows, bundle.manifest.sample_shape)
        self.inputs, self.device = self.network.inputs, self.network.device
        self.is_broken = False

    def __call__(self, rows: int) -> NDArray[Any]:
        if self.is_broken:
            raise RuntimeError("out of memory")
        return self.network(rows)


def test_a_network_exception_fails_who_was_running_and_the_engine_goes_on(
    baked: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Moody] = []

    def backend(bundle: Bundle, rows: int) -> Backend:
        made.append(Moody(bundle, rows))
        return made[0]

    engine = engine_of(baked, max_rows=2, backend=backend)
    long, short = long_and_short(baked)
    futures = engine.submit([long, long, short])
    engine.step()
    made[0].is_broken = True
    assert engine.step()
    assert "its 2 rows are run one by one" in caplog.text
    made[0].is_broken = False
    for future in futures[:2]:
        with pytest.raises(SampleFailed, match=r"^the step failed: out of memory$"):
            future.result(0)
    drain(engine)
    assert np.array_equal(futures[2].result(0).pixels, Loop(baked).sample(short))
    assert (engine.counters.failed, engine.counters.finished) == (2, 1)


def test_no_slot_leaks_in_thousands_of_random_operations(baked: Bundle, clock: SimpleNamespace) -> None:
    """Every accepted request comes to one end that is counted, and the engine is empty when all have."""
    engine = engine_of(baked, clock=clock.read, max_rows=3, max_waiting=6)
    rng = np.random.default_rng(9)
    tableau, open_, accepted, rejected = baked.tableau("ddim", 3), list[Future[Sample]](), 0, 0
    for _ in range(5000):
        clock.now_s += float(rng.exponential(0.2))
        action = rng.random()
        if action < 0.4:
            deadline_s = clock.now_s + float(rng.exponential(3)) if rng.random() < 0.5 else None
            requests = [Request(int(rng.integers(9)), tableau, 0, deadline_s=deadline_s)] * int(rng.integers(0, 4))
            try:
                open_ += engine.submit(requests)
                accepted += len(requests)
            except QueueFull:
                rejected += len(requests)
        elif action < 0.6 and open_:
            open_.pop(-int(rng.integers(1, min(9, len(open_) + 1)))).cancel()
        elif action < 0.8:
            engine.step()
        assert engine.num_running <= 3
        assert engine.num_waiting <= 6
        assert accepted == ends(engine) + engine.num_waiting + engine.num_running
    drain(engine)
    assert all(future.done() for future in open_)
    assert ends(engine) == accepted
    assert engine.counters.rejected == rejected
    assert min(engine.counters.finished, engine.counters.cancelled, engine.counters.expired, rejected) > 100


# --- the thread


@pytest.fixture
def running(baked: Bundle, guided: Bundle) -> Iterator[tuple[Engine, Engine, EngineThread]]:
    """Two engines on one thread; stopped at the end."""
    engines = engine_of(baked), engine_of(guided)
    thread = EngineThread(engines)
    thread.start()
    yield *engines, thread
    thread.stop()
    assert not thread.is_alive


def test_the_thread_serves_every_engine_and_any_caller(running: tuple[Engine, Engine, EngineThread]) -> None:
    *engines, thread = running
    results: list[tuple[Request, Pixels]] = []

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        engine = engines[number % 2]
        for _ in range(15):
            asked = Plan(engine.bundle, rng).request
            (future,) = engine.submit([asked])
            if rng.random() < 0.2:
                future.cancel()
            else:
                pixels = future.result(30).pixels
                if number < 2:
                    results.append((asked, pixels))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert not any(one.is_alive() for one in clients)
    assert thread.is_alive
    loops = Loop(engines[0].bundle), Loop(engines[1].bundle)
    assert results
    for asked, pixels in results:
        assert any(np.array_equal(loop.sample(asked), pixels) for loop in loops)


def test_stop_finishes_what_was_accepted_and_refuses_the_rest(running: tuple[Engine, Engine, EngineThread]) -> None:
    engine, _, thread = running
    long, short = long_and_short(engine.bundle)
    futures = engine.submit([long] * 20)
    thread.stop()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(EngineStopped, match=r"^digits is shutting down$"):
        engine.submit([short])


def test_stop_ends_what_is_not_finished_in_time(baked: Bundle) -> None:
    """Those that run, those in line and those that were cancelled: each future is done when the thread is."""
    for timeout_s in (0.0, 0.05):
        engine = engine_of(baked, max_rows=2, backend=simulated("10+0"))
        thread = EngineThread([engine])
        long, _ = long_and_short(baked)
        futures = engine.submit([long] * 100)
        futures[50].cancel()
        thread.start()
        thread.stop(timeout_s)
        assert not thread.is_alive
        assert all(future.done() for future in futures)
        with pytest.raises(EngineStopped, match=r"^digits is shutting down$"):
            futures[-1].result()
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        assert engine.counters.finished + engine.counters.failed + engine.counters.cancelled == 100
        assert engine.counters.cancelled == 1


def test_nobody_waits_for_a_thread_that_ended_by_an_error(
    running: tuple[Engine, Engine, EngineThread], caplog: pytest.LogCaptureFixture
) -> None:
    engine, other, thread = running
    engine.weight = 0.0  # which no engine can be made with
    long, short = long_and_short(engine.bundle)
    with suppress(EngineStopped):  # it ends after the first tick, maybe between two of these
        for future in (*engine.submit([long] * 5), *engine.submit([short])):
            assert isinstance(future.exception(30), EngineStopped)
    thread.stop()
    late = engine_of(engine.bundle)
    thread.add(late)
    for stopped in (engine, other, late):
        with pytest.raises(EngineStopped, match=r"^the engine failed and takes no more requests"):
            stopped.submit([replace(short, label=1)])
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_no_share_is_refused(baked: Bundle, weight: float) -> None:
    with pytest.raises(ValueError, match=r"^weight: .* must be above 0 and finite"):
        engine_of(baked, weight=weight)


def test_stop_in_the_middle_of_a_rush_loses_nothing(baked: Bundle) -> None:
    """Whenever the thread is told to stop, each request was either refused or is finished."""
    network = OnnxBackend(baked.network, 4, baked.manifest.sample_shape)
    for _ in range(30):
        engine = engine_of(baked, max_waiting=20, backend=lambda bundle, rows: network)
        thread = EngineThread([engine])
        accepted: list[Future[Sample]] = []
        _, short = long_and_short(baked)

        def rush(engine: Engine = engine, accepted: list[Future[Sample]] = accepted, short: Request = short) -> None:
            while True:
                try:
                    accepted.extend(engine.submit([short]))
                except QueueFull:
                    continue
                except EngineStopped:
                    return

        client = threading.Thread(target=rush)
        thread.start()
        client.start()
        time.sleep(0.002)
        thread.stop()
        client.join(10)
        assert not client.is_alive()
        assert all(future.done() for future in accepted)
