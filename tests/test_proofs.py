"""What must hold under abuse of a running server: aborts, swaps, reloads, overload, leaving, fuzzing, slow clients.

Each proof is sized by PROOF_SCALE. At 1 it is the full one, which ``make proofs`` runs and writes to
``docs/results/proofs.json``; left out, a twentieth of it, for every day.
"""

import asyncio
import base64
import hashlib
import http.client
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import schemathesis
from conftest import exchange, free_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fewstep.runtime import Bundle, Engine, Request, Sample, Tableau
from fewstep.runtime.pictures import encode
from fewstep.runtime.schedules import karras
from fewstep.runtime.simulated import simulated
from fewstep.runtime.solvers import ddim

Address = tuple[str, int]
Serving = Callable[..., AbstractContextManager[tuple[Any, Address]]]
IMAGES = "/v1/images/generations"
SCALE = float(os.environ.get("PROOF_SCALE", "0.05"))
RESULTS = os.environ.get("PROOF_RESULTS")


def sized(full: int, least: int = 1) -> int:
    return max(least, round(full * SCALE))


def note(name: str, **figures: Any) -> None:
    """Keep what a proof saw."""
    if RESULTS:
        file = Path(RESULTS)
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[name] = {"scale": SCALE, **figures}
        kept["command"] = "make proofs"
        # How busy the machine is with other things decides the times here, and not what is right.
        kept["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}
        file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def metrics(address: Address) -> Counter[str]:
    """Metrics summed over their labels, and each reason of failure by itself."""
    sums: Counter[str] = Counter()
    for line in exchange(address, "GET", "/metrics")[1].decode().splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#"):
            sums[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
            if 'reason="' in name:
                sums[name.partition('reason="')[2].partition('"')[0]] += float(value)  # type: ignore[assignment]
    return sums


def wait_until_idle(address: Address, limit_s: float = 20.0) -> Counter[str]:
    start_s = time.monotonic()
    while True:
        seen = metrics(address)
        if not seen["fewstep_running_rows"] + seen["nv_inference_pending_request_count"]:
            return seen
        assert time.monotonic() - start_s < limit_s, seen
        time.sleep(0.01)


# --- HTTP as one writes it by hand, so that a connection can be cut at any moment


async def post(address: Address, path: str, body: Any, cut_s: float | None = None) -> tuple[int, bytes] | None:
    """The status and body of an answer; None when the connection was cut before the answer was whole."""
    reader, writer = await asyncio.open_connection(*address)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        writer.write(head.encode() + data)
        async with asyncio.timeout(cut_s):
            whole = await reader.read()
    except TimeoutError:
        writer.transport.abort()
        return None
    finally:
        writer.close()
    status_line, _, rest = whole.partition(b"\r\n")
    head_, _, content = rest.partition(b"\r\n\r\n")
    if b"chunked" in head_.lower():
        parts, place = [], 0
        while (size := int(content[place : (end := content.index(b"\r\n", place))], 16)) > 0:
            parts.append(content[end + 2 : end + 2 + size])
            place = end + 4 + size
        content = b"".join(parts)
    return int(status_line.split()[1]), content


def last_event(body: bytes) -> Any:
    return json.loads(body.strip().rpartition(b"data: ")[2])


# --- abort half, on every protocol

STEPS = 8


class Door:
    """One way to ask for an image: gives its PNG, or None when it was cut."""

    def __init__(self, address: Address, channel: grpc.aio.Channel, steps: int = STEPS) -> None:
        self.address, self.steps = address, steps
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def images(self, seed: int, cut_s: float | None) -> bytes | None:
        answer = await post(self.address, IMAGES, self.asked(seed), cut_s)
        return answer and base64.b64decode(json.loads(answer[1])["data"][0]["b64_json"])

    async def images_stream(self, seed: int, cut_s: float | None) -> bytes | None:
        body = self.asked(seed) | {"stream": True, "partial_images": 3}
        answer = await post(self.address, IMAGES, body, cut_s)
        return answer and base64.b64decode(last_event(answer[1])["b64_json"])

    async def infer(self, seed: int, cut_s: float | None) -> bytes | None:
        body = {"parameters": self.parameters(seed), "outputs": [{"name": "PNG"}]}
        answer = await post(self.address, "/v2/models/digits/infer", body, cut_s)
        return answer and base64.b64decode(json.loads(answer[1])["outputs"][0]["data"][0])

    async def generate(self, seed: int, cut_s: float | None) -> bytes | None:
        answer = await post(self.address, "/v2/models/digits/generate", self.parameters(seed), cut_s)
        return answer and base64.b64decode(json.loads(answer[1])["PNG"])

    async def generate_stream(self, seed: int, cut_s: float | None) -> bytes | None:
        body = self.parameters(seed) | {"preview_every": 2}
        answer = await post(self.address, "/v2/models/digits/generate_stream", body, cut_s)
        return answer and base64.b64decode(last_event(answer[1])["PNG"])

    async def jobs(self, seed: int, cut_s: float | None) -> bytes | None:
        answer = await post(self.address, "/v1/jobs", self.asked(seed))
        assert answer is not None
        path = json.loads(answer[1])["poll_url"]
        if cut_s is not None:
            await asyncio.sleep(cut_s)
            over = await post(self.address, f"{path}/cancel", {})
            assert over is not None
            if over[0] == 200:
                return None
        while True:
            status, content, _ = await asyncio.to_thread(exchange, self.address, "GET", path)
            assert status == 200
            job = json.loads(content)
            if job["status"] == "completed":
                return base64.b64decode(job["result"]["data"][0]["b64_json"])
            assert job["status"] in ("queued", "running")
            await asyncio.sleep(0.05)

    async def grpc_unary(self, seed: int, cut_s: float | None) -> bytes | None:
        call = self.stub.ModelInfer(self.message(seed))
        return await self.cut(call, self.unary(call), cut_s)

    async def grpc_stream(self, seed: int, cut_s: float | None) -> bytes | None:
        async def messages() -> Any:
            yield self.message(seed, preview_every=2)
            await asyncio.sleep(3600)

        call = self.stub.ModelStreamInfer(messages())

        async def last() -> bytes:
            async for response in call:
                if response.infer_response.parameters["triton_final_response"].bool_param:
                    call.cancel()
                    return png_of(response.infer_response)
                assert not response.error_message
            raise AssertionError("no final response")

        return await self.cut(call, last(), cut_s)

    async def unary(self, call: Any) -> bytes:
        return png_of(await call)

    async def cut(self, call: Any, work: Awaitable[bytes], cut_s: float | None) -> bytes | None:
        try:
            async with asyncio.timeout(cut_s):
                return await work
        except TimeoutError:
            call.cancel()
            return None

    def asked(self, seed: int) -> dict[str, Any]:
        return {"prompt": "3", "seed": seed, "solver": "ddim", "num_inference_steps": self.steps}

    def parameters(self, seed: int) -> dict[str, Any]:
        return {"label": 3, "seed": seed, "solver": "ddim", "steps": self.steps}

    def message(self, seed: int, **more: int) -> Any:
        request = service_pb2.ModelInferRequest(model_name="digits")
        for name, value in (self.parameters(seed) | more).items():
            if isinstance(value, str):
                request.parameters[name].string_param = value
            else:
                request.parameters[name].int64_param = value
        request.outputs.add(name="PNG")
        return request


def png_of(response: Any) -> bytes:
    raw: bytes = response.raw_output_contents[0]
    assert struct.unpack("<I", raw[:4])[0] == len(raw) - 4
    return raw[4:]


DOORS = (
    Door.images, Door.images_stream, Door.infer, Door.generate, Door.generate_stream, Door.jobs, Door.grpc_unary,
    Door.grpc_stream,
)  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_abort_half_of_a_thousand_requests(
    serving: Serving, make_bundle: Callable[..., Path], baked: Bundle, door: Any
) -> None:
    """Every second one is cut at a random moment; the others are right, nothing leaks, and no work goes on."""
    num, rng = sized(1000, 24), random.Random(door.__name__)
    engine = Engine(baked, backend=simulated("0+0"))
    table = baked.tableau("ddim", STEPS)
    samples = engine.generate([Request(seed, table, 3) for seed in range(0, num, 2)])
    right = [encode(sample.to_uint8()) for sample in samples]
    port = free_port()
    # A step of 10 ms, so that cuts fall into the middle of the work, and not only before it and after it.
    flags = ("--simulate", "10+0", "--max-rows", "8", "--grpc-port", str(port))

    async def run(address: Address) -> tuple[int, int]:
        wrong, cut = 0, 0
        limit = asyncio.Semaphore(24)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def one(seed: int) -> None:
                nonlocal wrong, cut
                async with limit:
                    cut_s = rng.uniform(0, 0.25) if seed % 2 else None
                    png = await door(Door(address, channel), seed, cut_s)
                cut += png is None
                if cut_s is None:
                    wrong += png != right[seed // 2]

            await asyncio.gather(*map(one, range(num)))
        return wrong, cut

    with serving(make_bundle(), *flags) as (_, address):
        wrong, cut = asyncio.run(run(address))
        start_s = time.monotonic()
        seen = wait_until_idle(address)
        idle_s = time.monotonic() - start_s
        calls = seen["nv_inference_exec_count"]
        time.sleep(0.2)
        after = metrics(address)
    assert wrong == 0
    assert cut > num // 10
    assert after["nv_inference_exec_count"] == calls
    assert after["nv_inference_request_success"] >= num // 2
    assert after["nv_inference_request_success"] + after["CANCELED"] <= num
    assert after["BACKEND"] + after["REJECTED"] + after["DEADLINE"] == 0
    note(
        f"abort half, {door.__name__}", requests=num, cut=cut, wrong=wrong, cancelled_by_the_engine=after["CANCELED"],
        idle_after_s=round(idle_s, 3),
    )  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_cancelled_request_takes_no_more_than_the_step_under_way(leisurely: tuple[Address, str], door: Any) -> None:
    """Of 16 steps of 100 ms: what is done after the cut is the step it fell into, and one more if it fell into its end.

    On a machine so busy that the cut came before the first step or after the last, it is made again.
    """
    address, where = leisurely

    async def cut() -> bytes | None:
        async with grpc.aio.insecure_channel(where) as channel:
            return await door(Door(address, channel, steps=16), 1, 0.45)  # type: ignore[no-any-return]

    for _ in range(10):
        before = wait_until_idle(address)
        answer = asyncio.run(cut())
        at_once = metrics(address)
        after = wait_until_idle(address)
        done, more = (
            seen["nv_inference_count"] - since["nv_inference_count"]
            for seen, since in ((at_once, before), (after, at_once))
        )
        assert more <= 2
        if answer is None and 1 <= done < 12:
            assert after["CANCELED"] == before["CANCELED"] + 1
            return
    raise AssertionError("the cut never fell into the work")


@pytest.fixture(scope="module")
def leisurely(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[tuple[Address, str]]:
    """A server whose steps take 100 ms each, with a table of 16 steps."""
    port = free_port()
    flags = ("--simulate", "100+0", "--max-rows", "1", "--grpc-port", str(port))
    with serving(make_bundle(), *flags) as (_, address):
        assert exchange(address, "POST", "/v2/models/digits/tables", ddim(karras(16)).to_bytes())[0] == 200
        yield address, f"127.0.0.1:{port}"


# --- tables and students change under load


def test_tables_are_swapped_and_students_reloaded_under_load(
    serving: Serving, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Each answer is that of one student and of the table it names; none is dropped."""
    folder, spare = tmp_path / "digits", tmp_path / "spare"
    shutil.copytree(make_bundle(), folder)
    shutil.copytree(make_bundle(seed=1), spare)
    students = [Bundle.load(folder), Bundle.load(spare)]
    base = students[0].tableau("ddim", 4)
    other = replace(students[0].tableau("dpmpp_2m", 4), name="ddim")
    tables = {table.sha256: table for table in (base, other)}
    right: dict[tuple[str, int], set[bytes]] = {}
    for student, (sha256, table) in itertools.product(students, tables.items()):
        samples = Engine(student, max_rows=8, threads=1).generate([Request(seed, table, 2) for seed in range(8)])
        for seed, sample in enumerate(samples):
            right.setdefault((sha256, seed), set()).add(encode(sample.to_uint8()))
    assert all(len(images) == 2 for images in right.values())
    swaps, reloads = sized(1000), sized(50, 4)
    is_over = threading.Event()
    problems: list[Any] = []
    answers: Counter[str] = Counter()

    def client(first: int) -> None:
        for seed in itertools.count(first):
            if is_over.is_set():
                return
            body = {"prompt": "2", "seed": seed % 8, "solver": "ddim", "num_inference_steps": 4}
            status, content, _ = exchange(address, "POST", IMAGES, body)
            answer = json.loads(content)
            if status != 200:
                problems.append(answer)
                return
            if base64.b64decode(answer["data"][0]["b64_json"]) not in right[answer["tableau_sha256"], seed % 8]:
                problems.append("mixed")
            answers[answer["tableau_sha256"]] += 1

    def reload() -> None:
        for _ in range(reloads):
            hold = tmp_path / "hold"
            folder.rename(hold)
            spare.rename(folder)
            hold.rename(spare)
            status, content, _ = exchange(address, "POST", "/v2/repository/models/digits/load", b"")
            if status != 200:
                problems.append(content)

    with serving(folder, "--max-rows", "4", "--no-grpc") as (_, address):
        threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
        reloader = threading.Thread(target=reload)
        for thread in (*threads, reloader):
            thread.start()
        for i in range(swaps):
            swapped: Tableau = (other, base)[i % 2]
            status, content, _ = exchange(address, "POST", "/v2/models/digits/tables", swapped.to_bytes())
            assert status == 200, content
            time.sleep(0.004)
        reloader.join()
        is_over.set()
        for thread in threads:
            thread.join()
        wait_until_idle(address)
    assert problems == []
    assert min(answers.values()) > 0
    note("swaps and reloads", swaps=swaps, reloads=reloads, answers=sum(answers.values()), dropped=0, mixed=0)


# --- open-loop overload

ROWS, WAITING, NUM_STEPS = 8, 32, 4
CAPACITY = ROWS / (NUM_STEPS * (0.040 + 0.001 * ROWS))  # images a second of the simulated accelerator


Seen = list[tuple[int, float, dict[str, str], Any]]
ASKED = {"prompt": "1", "solver": "ddim"}


async def open_loop(address: Address, moments_s: list[float], **asked: Any) -> Seen:
    """Ask at given moments, whether or not answers come: status, latency, headers and body of each."""
    seen, tasks = Seen(), list[asyncio.Task[None]]()
    body = json.dumps(ASKED | asked).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def one() -> None:
        start_s = time.perf_counter()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head + body)
        whole = await reader.read()
        writer.close()
        head_, _, content = whole.partition(b"\r\n\r\n")
        lines = head_.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        seen.append((int(lines[0].split()[1]), time.perf_counter() - start_s, headers, json.loads(content)))

    begun_s = time.perf_counter()
    for moment_s in moments_s:
        await asyncio.sleep(max(0.0, begun_s + moment_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    return seen


def random_moments(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrivals of a Poisson process."""
    moments_s: list[float] = []
    while (moments_s[-1] if moments_s else 0.0) < seconds:
        moments_s.append((moments_s[-1] if moments_s else 0.0) + rng.expovariate(rate))
    return moments_s


async def closed_loop(address: Address, clients: int, seconds: float) -> float:
    """Images a second when so many ask again whenever they have their answer: the most that there is to have."""
    done, end_s = 0, time.perf_counter() + seconds
    body = {**ASKED, "num_inference_steps": NUM_STEPS}

    async def one() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            answer = await post(address, IMAGES, body)
            assert answer is not None
            assert answer[0] == 200
            done += 1

    start_s = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return done / (time.perf_counter() - start_s)


def test_three_times_the_load_costs_no_goodput(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """At three times what the accelerator can do it does what it can, and the others are told when to come back."""
    seconds = max(6.0, 120 * SCALE)
    flags = ("--simulate", "40+1", "--max-rows", str(ROWS), "--max-waiting", str(WAITING), "--no-grpc")
    with serving(make_bundle(), *flags) as (process, address):
        server = psutil.Process(process.pid)
        peak = asyncio.run(closed_loop(address, 3 * ROWS, seconds / 3))
        before = metrics(address)
        seen: Seen = []
        sizes: list[int] = []
        took_s = 0.0
        for _ in range(4):
            start_s = time.perf_counter()
            moments_s = random_moments(3 * CAPACITY, seconds / 4, random.Random(len(sizes)))
            seen += asyncio.run(open_loop(address, moments_s, num_inference_steps=NUM_STEPS))
            took_s += time.perf_counter() - start_s
            sizes.append(server.memory_info().rss)
        after = metrics(address)
    statuses = Counter(status for status, *_ in seen)
    assert set(statuses) == {200, 429}
    for status, _, headers, _ in seen:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert float(headers["retry-after-ms"]) > 0
    latencies = sorted(latency for status, latency, *_ in seen if status == 200)
    p99_s = latencies[int(0.99 * (len(latencies) - 1))]
    goodput = statuses[200] / took_s
    fill = (after["nv_inference_count"] - before["nv_inference_count"]) / (
        after["nv_inference_exec_count"] - before["nv_inference_exec_count"]
    )
    note(
        "open loop, 3 x capacity", seconds=round(took_s, 1), capacity_per_s=round(CAPACITY, 2),
        peak_of_capacity=round(peak / CAPACITY, 4), goodput_of_peak=round(goodput / peak, 4),
        p99_of_accepted_s=round(p99_s, 3), accepted=statuses[200], rejected=statuses[429], mean_batch=round(fill, 3),
        of_rows=ROWS, rss_mb=[round(size / 1e6, 1) for size in sizes], simulated="40 + 1 n ms",
    )  # fmt: skip
    # Each part of the run ends with the line's last samples, in batches that are no longer full: that is in the time.
    assert goodput >= (0.95 if SCALE >= 1 else 0.7) * peak
    assert p99_s <= 2 * (WAITING + ROWS) / peak + 0.5
    assert sizes[-1] <= 1.05 * sizes[1] + 2e6


def test_deadlines_choose_steps_through_bursts(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """Bursts at 2.5 times and lulls at half of what eight steps allow: fewer steps keep the promise, eight do not.

    The same arrivals, each with 700 ms: with eight steps for all, and with one to eight as they fit.
    """
    rounds, rng, burst_s = sized(10, 1), random.Random(5), 3.0
    rate = ROWS / (8 * (0.040 + 0.001 * ROWS))
    moments_s: list[float] = []
    for i in range(rounds):
        for j, load in enumerate((2.5, 0.5)):
            first_s = (2 * i + j) * burst_s
            moments_s += [first_s + moment_s for moment_s in random_moments(load * rate, burst_s, rng)]
    moments_s.sort()
    for _ in range(1 if SCALE >= 1 else 3):  # one burst that falls into a busy second says nothing; the proof has ten
        figures: dict[str, Any] = {}
        flags = ("--simulate", "40+1", "--max-rows", str(ROWS), "--no-grpc")
        for name, asked in (("fixed", {"num_inference_steps": 8}), ("chosen", {"min_steps": 1, "max_steps": 8})):
            with serving(make_bundle(), *flags) as (_, address):
                seen = asyncio.run(open_loop(address, moments_s, deadline_ms=700, **asked))
                counted = metrics(address)
            statuses = Counter(status for status, *_ in seen)
            assert set(statuses) <= {200, 429, 504}
            steps = [answer["num_inference_steps"] for status, *_, answer in seen if status == 200]
            in_time = sum(status == 200 and latency <= 0.75 for status, latency, *_ in seen)
            figures[name] = {
                "in_time": round(in_time / len(seen), 4), "answered": round(statuses[200] / len(seen), 4),
                "refused_at_once": statuses[429], "late": statuses[504], "mean_steps": round(float(np.mean(steps)), 2),
                "steps": dict(sorted(Counter(steps).items())), "expired": counted["DEADLINE"],
            }  # fmt: skip
        fixed, chosen = figures["fixed"], figures["chosen"]
        if chosen["answered"] > fixed["answered"] + 0.1 and chosen["late"] <= 0.1 * len(seen):
            break
    note("deadlines through bursts", requests=len(moments_s), deadline_ms=700, simulated="40 + 1 n ms", **figures)
    assert chosen["answered"] > fixed["answered"] + 0.1
    assert len(chosen["steps"]) >= 3
    assert chosen["late"] <= 0.1 * len(seen)


def test_memory_stays_flat_over_many_requests(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """As many requests as two hours of an idle service at one in 0.36 s, through every unary door."""
    num = sized(20_000, 400)
    # The first hundreds fill the allocator's and gRPC's pools, and the first thousands leave some megabytes of cycles,
    # which from then on go with every collection.
    warm = max(num // 2, 800)
    port = free_port()

    async def run(address: Address, seeds: range) -> None:
        limit = asyncio.Semaphore(16)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            door = Door(address, channel)

            async def one(seed: int) -> None:
                async with limit:
                    work = (Door.images, Door.infer, Door.generate, Door.grpc_unary)[seed % 4]
                    assert await work(door, seed, None)

            await asyncio.gather(*map(one, seeds))

    with serving(make_bundle(), "--grpc-port", str(port)) as (process, address):
        server = psutil.Process(process.pid)
        asyncio.run(run(address, range(warm)))
        rss = server.memory_info().rss
        asyncio.run(run(address, range(warm, warm + num // 2)))
        wait_until_idle(address)
        grown = server.memory_info().rss / rss - 1
        threads, connections = server.num_threads(), len(server.net_connections())
    note("soak", requests=num, rss_mb=round(rss / 1e6, 1), rss_growth=round(grown, 4), threads=threads)
    assert grown <= 0.05
    assert connections < 20


# --- the same bits in any company


def test_ten_thousand_compositions_change_no_request() -> None:
    """An embedded student and teacher: any tables, seeds, labels and guidance, joining at any step, in any batch.

    For every day sixty: `test_engine` has twelve hundred of small students.
    """
    rng, total = np.random.default_rng(11), 10_000 if SCALE >= 1 else 60
    compared, rows = 0, Counter[int]()
    for bundle in map(Bundle.load, (None, "fashion-mnist-teacher")):
        tables = [tableau for tableau in bundle.tableaus.values() if tableau.num_steps <= 4]
        low, high = bundle.manifest.guidance.minimum, bundle.manifest.guidance.maximum
        plans = [
            Request(
                int(rng.integers(2**64, dtype=np.uint64)), tables[rng.integers(len(tables))],
                int(rng.integers(10)), float(rng.uniform(low, high)),
            )
            for _ in range(60)
        ]  # fmt: skip
        single = Engine(bundle, max_rows=1, threads=1)
        alone = [picture_sha256(sample) for sample in single.generate(plans)]
        engines = [Engine(bundle, max_rows=size, threads=threads) for size, threads in ((2, 1), (5, 2), (16, 1))]
        for number in range(total // 2):
            engine = engines[number % len(engines)]
            futures: list[tuple[int, Future[Sample]]] = []
            for _ in range(int(rng.integers(1, 4))):
                chosen = rng.integers(len(plans), size=rng.integers(1, 4)).tolist()
                futures += zip(chosen, engine.submit([plans[i] for i in chosen]), strict=True)
                for _ in range(int(rng.integers(0, 3))):
                    engine.step()
                    rows[engine.num_running] += 1
            while engine.step():
                pass
            for i, future in futures:
                assert picture_sha256(future.result(0)) == alone[i], f"{bundle.name}, composition {number}, {plans[i]}"
                compared += 1
    note("compositions", compositions=total // 2 * 2, compared=compared, other=0)
    assert compared > total
    assert len(rows) > 3


def picture_sha256(sample: Sample) -> str:
    return hashlib.sha256(encode(sample.to_uint8())).hexdigest()


# --- leaving


def test_sigterm_under_load_answers_all_that_was_accepted(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """Calls over every unary door keep coming while the server is told to leave; each is answered or refused."""
    rounds = sized(20, 2)
    totals: Counter[str] = Counter()
    for round_ in range(rounds):
        port = free_port()
        outcomes: Counter[str] = Counter()

        async def call(door: Door, work: Any, seed: int, outcomes: Counter[str] = outcomes) -> None:
            try:
                outcomes["answered" if await work(door, seed, None) else "lost"] += 1
            except (KeyError, TypeError):  # an error object in the place of the image
                outcomes["refused"] += 1
            except (ConnectionRefusedError, ConnectionResetError, IndexError):
                outcomes["not connected"] += 1
            except grpc.aio.AioRpcError as error:
                # CANCELLED: it came in the moment in which gRPC stopped listening, before anybody saw it.
                gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                outcomes["refused" if error.code() in gone else str(error)] += 1

        async def run(
            address: Address, pid: int, port: int = port, outcomes: Counter[str] = outcomes, call: Any = call
        ) -> int:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                door = Door(address, channel)
                works = (Door.images, Door.infer, Door.generate, Door.grpc_unary)
                early = [asyncio.ensure_future(call(door, work, seed)) for seed, work in enumerate(works * 6)]
                while True:  # until all of them are accepted
                    seen = await asyncio.to_thread(metrics, address)
                    names = ("nv_inference_request_success", "fewstep_running_rows")
                    if sum(seen[name] for name in (*names, "nv_inference_pending_request_count")) >= len(early):
                        break
                os.kill(pid, signal.SIGTERM)
                late = []
                for seed, work in enumerate(works * 3):
                    late.append(asyncio.ensure_future(call(door, work, seed)))
                    await asyncio.sleep(0.005)
                await asyncio.wait_for(asyncio.gather(*early), 60)
                answered = outcomes["answered"]
                await asyncio.wait_for(asyncio.gather(*late), 60)
                return answered

        with serving(make_bundle(), "--simulate", "10+0", "--max-rows", "4", "--grpc-port", str(port)) as (
            process,
            address,
        ):
            answered = asyncio.run(run(address, process.pid))
            assert process.wait(timeout=60) == 0
            assert process.stderr.read() == ""
        assert answered >= 24, (round_, outcomes)
        assert set(outcomes) <= {"answered", "refused", "not connected"}, outcomes
        totals += outcomes
    note("SIGTERM under load", rounds=rounds, accepted_and_answered=24 * rounds, later=dict(totals))


# --- slow clients


def test_slow_clients_hold_up_nobody(
    serving: Serving, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds that stop within their head or body, or never read; the others are served, and who is late is ended."""
    num = sized(400, 60)
    monkeypatch.setenv("FEWSTEP_REQUEST_TIMEOUT_S", "1.5")
    with serving(make_bundle(), "--no-grpc") as (_, address):
        times = sorted(timed(address) for _ in range(30))
        slow: list[socket.socket] = []
        body = json.dumps({"prompt": "1", "n": 8, "stream": True, "partial_images": 7}).encode()
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for i in range(num):
            slow.append(socket.create_connection(address))
            slow[-1].sendall((head[:20], head + body[:3], head + body)[i % 3])  # half a head, half a body, no reading
        late = sorted(timed(address) for _ in range(30))
        halves = slow[1::3]
        for one in halves:
            one.settimeout(30)
            answer = b""
            while not answer.endswith(b"}"):
                answer += one.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408"), answer
            assert b"the body was not there within 1.5 s" in answer
        for one in slow[::3]:  # no head: closed without a word
            one.settimeout(30)
            assert one.recv(4096) == b""
        for one in slow:
            one.close()
        wait_until_idle(address)
        assert timed(address) < 10
    note(
        "slow clients", slow=num, p50_before_ms=round(1000 * times[15], 2), p50_beside_them_ms=round(1000 * late[15], 2)
    )
    assert late[15] < 1.0


def timed(address: Address) -> float:
    start_s = time.perf_counter()
    assert exchange(address, "POST", IMAGES, {"prompt": "1"})[0] == 200
    return time.perf_counter() - start_s


# --- fuzzing

FUZZ = settings(
    max_examples=sized(2000, 60), deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[tuple[Address, str]]:
    """A server to fuzz; afterwards it is still there, idle, and has logged no traceback."""
    port = free_port()
    flags = ("--grpc-port", str(port), "--max-rows", "4")
    with serving(make_bundle(), make_bundle(is_guided=True), *flags) as (process, address):
        yield address, f"127.0.0.1:{port}"
        wait_until_idle(address)
        assert exchange(address, "GET", "/v2/health/live")[0] == 200
        process.terminate()
        _, written = process.communicate(timeout=60)
        assert "Traceback" not in written, written[-3000:]
    if tried_of:
        note("hypothesis", **tried_of)


tried_of: Counter[str] = Counter()  # examples that were answered as they should be, by what was fuzzed


def test_schemathesis_finds_no_server_error(fuzzed: tuple[Address, str]) -> None:
    schema = schemathesis.openapi.from_url(f"http://{fuzzed[0][0]}:{fuzzed[0][1]}/openapi.json")
    tried: Counter[str] = Counter()
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        if operation.path.endswith(("/load", "/unload")):
            continue  # unloading the students would leave nothing to fuzz; these are fuzzed below
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            examples = sized(100, 3)

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(FUZZ, max_examples=examples)
            def probe(case: Any) -> None:
                for name in ("model", "version"):  # half of the time one that is there
                    if name in case.path_parameters and len(case.path_parameters[name]) % 2:
                        case.path_parameters[name] = {"model": "digits", "version": "1"}[name]
                response = case.call(timeout=60)
                case.validate_response(response, checks=[not_a_server_error])
                assert "Traceback" not in response.text
                tried[f"{case.operation.method.upper()} {case.operation.path}"] += 1

            with suppress(Unsatisfiable):  # nothing about it can be wrong
                probe()
    assert len(tried) >= 25, tried
    assert tried[f"POST {IMAGES}"] > 1
    note("schemathesis", operations=len(tried), requests=tried.total(), server_errors=0)


blobs = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda head, length, tail: (head, length, tail), st.binary(max_size=40), st.integers(0, 400), st.binary()
    ).map(lambda parts: parts[0] + struct.pack("<I", parts[1]) + parts[2]),
)
names = st.sampled_from(["PROMPT", "LABEL", "SEED", "STEPS", "SOLVER", "GUIDANCE", "X", ""])
kinds = st.sampled_from(["BYTES", "INT64", "UINT64", "INT32", "FP32", "FP16", "BOOL", "BF16", "", "O"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=6)
tensors = st.fixed_dictionaries(
    {"name": names, "shape": st.lists(st.integers(-2, 70), max_size=3), "datatype": kinds},
    optional={"data": values, "parameters": st.dictionaries(st.just("binary_data_size"), values | st.integers(0, 99))},
)
parameter_names = st.sampled_from(
    ["n", "prompt", "label", "seed", "steps", "min_steps", "max_steps", "solver", "guidance", "priority", "timeout",
     "deadline_ms", "preview_every", "binary_data_output", "sequence_id", "x"]
)  # fmt: skip


@FUZZ
@given(
    inputs=st.lists(tensors, max_size=3), parameters=st.dictionaries(parameter_names, values, max_size=3),
    blob=blobs, length=st.one_of(st.none(), st.integers(-3, 400)), path=st.sampled_from(["infer", "generate"]),
)  # fmt: skip
def test_binary_bodies_are_answered_or_refused(
    fuzzed: tuple[Address, str], inputs: Any, parameters: Any, blob: bytes, length: int | None, path: str
) -> None:
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    connection = http.client.HTTPConnection(*fuzzed[0], timeout=60)
    told = str(len(head) if length is None else length)
    connection.request("POST", f"/v2/models/digits/{path}", head + blob, {"Inference-Header-Content-Length": told})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    assert answer.status < 500 or answer.status == 504, content
    if answer.status != 200:
        error = json.loads(content)["error"]
        assert isinstance(error, str)
        assert "\n" not in error
        assert "Traceback" not in error
    tried_of["binary bodies"] += 1


@FUZZ
@given(body=st.binary(max_size=300) | st.text(max_size=100).map(str.encode), path=st.sampled_from(
    [IMAGES, "/v1/jobs", "/v2/models/digits/infer", "/v2/models/digits/generate_stream", "/v2/models/digits/tables",
     "/v2/repository/index", "/v2/repository/models/digits/load", "/v2/repository/models/nobody/unload"]
), encoding=st.sampled_from(["identity", "gzip", "deflate", "br"]))  # fmt: skip
def test_any_bytes_are_answered_or_refused(fuzzed: tuple[Address, str], body: bytes, path: str, encoding: str) -> None:
    connection = http.client.HTTPConnection(*fuzzed[0], timeout=60)
    connection.request("POST", path, body, {"Content-Encoding": encoding})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    assert answer.status < 500, content
    assert b"Traceback" not in content
    tried_of["any bytes"] += 1


GRPC_ANSWERS = {
    grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip


def parameter(value: Any) -> Any:
    kind = {bool: "bool_param", int: "int64_param", str: "string_param"}.get(type(value), "double_param")
    return service_pb2.InferParameter(**{kind: value})


@st.composite
def messages(draw: st.DrawFn) -> Any:
    request = service_pb2.ModelInferRequest(model_name=draw(st.sampled_from(["digits"] * 4 + ["", "x"])))
    scalar = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=10))
    for name, value in draw(st.dictionaries(parameter_names, scalar, max_size=3)).items():
        request.parameters[name].CopyFrom(parameter(value))
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(-2, 70), max_size=3))
        given_ = request.inputs.add(name=draw(names), datatype=draw(kinds), shape=shape)
        given_.contents.int64_contents.extend(draw(st.lists(st.integers(-5, 5), max_size=3)))
        given_.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=5), max_size=2)))
    for _ in range(draw(st.integers(0, 2))):
        request.outputs.add(name=draw(st.sampled_from(["IMAGE", "PNG", "SEED", "STEPS", "X"])))
    request.raw_input_contents.extend(draw(st.lists(blobs, max_size=3)))
    return request


@FUZZ
@given(message=st.one_of(messages().map(lambda message: message.SerializeToString()), st.binary(max_size=200)))
def test_grpc_messages_are_answered_or_refused(fuzzed: tuple[Address, str], message: bytes) -> None:
    """Messages with anything in them, and bytes that are no message."""
    call = channel_to(fuzzed[1]).unary_unary("/inference.GRPCInferenceService/ModelInfer")
    code, details = grpc.StatusCode.OK, ""
    try:
        call(message, timeout=60)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
    assert code in GRPC_ANSWERS, details
    assert "Traceback" not in details
    assert "\n" not in details
    tried_of["ModelInfer"] += 1


@FUZZ
@given(
    st.lists(st.one_of(messages().map(lambda message: message.SerializeToString()), st.binary(max_size=99)), max_size=3)
)
def test_grpc_streams_answer_every_message_or_refuse_it(fuzzed: tuple[Address, str], sent: list[bytes]) -> None:
    """The stream itself ends well, whatever was in it: errors are responses."""
    call = channel_to(fuzzed[1]).stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    errors, finals = 0, 0
    for raw in call(iter(sent), timeout=60):
        response = service_pb2.ModelStreamInferResponse.FromString(raw)
        assert "Traceback" not in response.error_message
        assert "\n" not in response.error_message
        assert "its log says why" not in response.error_message  # what is told of errors that nobody foresaw
        errors += bool(response.error_message)
        finals += response.infer_response.parameters["triton_final_response"].bool_param and not response.error_message
    assert errors + finals == len(sent)
    tried_of["ModelStreamInfer"] += 1


REPOSITORY_CALLS: dict[str, Any] = {
    "RepositoryIndex": service_pb2.RepositoryIndexRequest,
    "RepositoryModelLoad": service_pb2.RepositoryModelLoadRequest,
    "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest,
    "ModelStatistics": service_pb2.ModelStatisticsRequest,
    "ModelConfig": service_pb2.ModelConfigRequest,
    "ModelMetadata": service_pb2.ModelMetadataRequest,
}


@FUZZ
@given(
    method=st.sampled_from(sorted(REPOSITORY_CALLS)), name=st.text(max_size=8).filter(lambda name: name != "digits"),
    config=st.none() | st.text(max_size=20) | values.map(lambda value: json.dumps({"bundle": value}))
    | values.map(lambda value: json.dumps({"alias": value})),
    is_garbled=st.booleans(), noise=st.binary(max_size=40),
)  # fmt: skip
def test_repository_calls_are_answered_or_refused(
    fuzzed: tuple[Address, str], method: str, name: str, config: str | None, is_garbled: bool, noise: bytes
) -> None:
    kind = REPOSITORY_CALLS[method]
    fields = kind.DESCRIPTOR.fields_by_name
    request = kind(**{field: name for field in ("model_name", "name") if field in fields})
    if config is not None and "parameters" in fields:
        request.parameters["config"].string_param = config
    code, details = grpc.StatusCode.OK, ""
    try:
        raw = noise if is_garbled else request.SerializeToString()
        channel_to(fuzzed[1]).unary_unary(f"/inference.GRPCInferenceService/{method}")(raw, timeout=60)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
    assert code in {*GRPC_ANSWERS, grpc.StatusCode.PERMISSION_DENIED}, details
    assert "Traceback" not in details
    assert "\n" not in details
    tried_of["repository and metadata calls"] += 1


@pytest.fixture(scope="module", autouse=True)
def _close_channels() -> Iterator[None]:
    yield
    for channel in _channels.values():
        channel.close()
    _channels.clear()


_channels: dict[str, grpc.Channel] = {}


def channel_to(where: str) -> grpc.Channel:
    if where not in _channels:
        _channels[where] = grpc.insecure_channel(where)
    return _channels[where]


def test_bombs_and_paths_out_of_the_repository_are_refused(fuzzed: tuple[Address, str]) -> None:
    import gzip

    bomb = gzip.compress(b" " * (64 << 20))
    connection = http.client.HTTPConnection(*fuzzed[0], timeout=60)
    connection.request("POST", IMAGES, bomb, {"Content-Encoding": "gzip"})
    assert connection.getresponse().status == 413
    connection.close()
    nested = b"[" * 100_000
    for path in (IMAGES, "/v1/jobs", "/v2/models/digits/infer"):
        assert exchange(fuzzed[0], "POST", path, nested)[0] == 400
    load = partial(exchange, fuzzed[0], "POST", "/v2/repository/models/digits/load")
    for folder in ("/etc", "../..", "..%2f..", "\u0000", "a" * 5000):
        config = {"parameters": {"config": json.dumps({"bundle": folder})}}
        assert load(config)[0] in (400, 403)
    image = json.loads(exchange(fuzzed[0], "POST", IMAGES, {"prompt": "1"})[1])
    assert np.frombuffer(base64.b64decode(image["data"][0]["b64_json"])[:8], np.uint8)[1:4].tobytes() == b"PNG"
