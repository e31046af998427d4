"""Benchmarks: what they report is what was there, and what they call a difference is one."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import free_port
from rich.console import Console

from fewstep.bench import BenchError, bench
from fewstep.bench.compare import _student, compare, compare_files, unlike
from fewstep.bench.generator import Records
from fewstep.bench.http_client import Answer
from fewstep.bench.observer import ProcessTree
from fewstep.bench.page import page
from fewstep.bench.report import Round, check_added, facts, for_terminal, load, round_of, save, warnings_of
from fewstep.bench.run import address_of
from fewstep.bench.targets import About, Address, InProcessTarget, KserveGrpcTarget, KserveTarget, OpenAiTarget
from fewstep.bench.workload import Kind, Workload, parse_mix, workload

SERVER = Path(__file__).parent / "synthetic_server.py"
Serving = Callable[..., AbstractContextManager[tuple["subprocess.Popen[str]", tuple[str, int]]]]


@contextmanager
def synthetic(**said: Any) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """The URL of a server with known service times, and a call that ends it and tells the times it gave."""
    said = {"fast": 0.01, "slow": 0.01, "slow_every": 0, "serial": False, **said}
    command = [sys.executable, str(SERVER), json.dumps(said)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        yield f"http://127.0.0.1:{port}", lambda: list(json.loads(process.communicate()[0]))
    finally:
        process.kill()
        process.communicate()


def measured(url: str, load: Workload) -> Round:
    return bench(address_of(url), load, timeout_s=20, is_quiet=True)


# --- true percentiles


def is_quiet(made: Round, given_ms: Sequence[float] = (), known_ms: Sequence[float] = ()) -> bool:
    """Whether the machine itself kept to the times: requests left on time, and the server slept as told."""
    kept = all(abs(given / known - 1) < 0.01 for given, known in zip(given_ms, known_ms, strict=True))
    return kept and made["generator"]["late_p99_ms"] < 8


@pytest.mark.parametrize(("slow", "slow_every"), [(0.6, 0), (1.5, 4)], ids=["fixed", "bimodal"])
def test_percentiles_of_known_service_times_are_within_2_percent(slow: float, slow_every: int) -> None:
    """In a round in which the machine let anybody know service times that well; four are tried.

    The times are long, since a busy machine costs milliseconds.
    """
    known = [600.0, 1000 * slow, 1000 * slow]
    for _ in range(4):
        with synthetic(fast=0.6, slow=slow, slow_every=slow_every) as (url, end):
            made = measured(url, workload(rate=40, warmup_s=0.5, seconds=4))
            given = np.percentile(1000 * np.array(end()), (50, 90, 95)).tolist()
        if is_quiet(made, given, known):
            told = made["total"]["latency_ms"]
            assert [told["p50"], told["p90"], told["p95"]] == pytest.approx(known, rel=0.02)
            return
    pytest.skip("this machine did not keep to times for four seconds")


def test_percentiles_of_known_latencies_are_those() -> None:
    """Without a machine in between: fixed, bimodal and lognormal latencies, as they went into the records."""
    load_ = workload(rate=200, arrivals="constant", warmup_s=0, seconds=20)
    meant, kind = load_.schedule()
    rng = np.random.default_rng(0)
    for latency in (
        np.full(len(meant), 0.05),
        np.where(rng.random(len(meant)) < 0.25, 0.4, 0.05),
        rng.lognormal(-3, 0.7, len(meant)),
    ):
        records = Records(kind, meant, meant, meant + latency, np.full(len(meant), -1), (), 0.1, None)
        server = {"pid": None, "memory_mb": None, "rows_per_call": None}
        made = round_of(Address("http://a", "openai"), About("m"), load_, records, server, [])
        told = made["total"]["latency_ms"]
        for percentile in (50, 90, 95, 99):
            rank = np.sort(latency)[int(np.ceil(percentile / 100 * len(latency))) - 1]
            assert told[f"p{percentile}"] == pytest.approx(1000 * rank, rel=0.002)


def test_a_stalled_server_is_charged_for_all_who_would_have_come() -> None:
    """A queue with one server, constant arrivals and one long service has latencies in closed form (Lindley)."""
    stall, load_ = 1.2, workload(rate=30, arrivals="constant", warmup_s=0, seconds=3.9)
    free, latencies = 0.0, []
    for number, at in enumerate(load_.schedule()[0].tolist()):
        free = max(free, at) + (stall if number + 1 == 60 else 0.02)
        latencies.append(1000 * (free - at))
    expected = np.percentile(latencies, (90, 95, 99)).tolist()
    assert expected[0] > 20 * np.percentile([20.0] * 116 + [1200.0], 90)  # what counting from the sending would say
    for _ in range(4):
        with synthetic(fast=0.02, slow=stall, slow_every=60, serial=True) as (url, _):
            made = measured(url, load_)
        if is_quiet(made):
            told = made["total"]["latency_ms"]
            assert [told["p90"], told["p95"], told["p99"]] == pytest.approx(expected, rel=0.02)
            return
    pytest.skip("this machine did not keep to times for four seconds")


def test_a_closed_loop_obeys_littles_law() -> None:
    """Throughput times latency is the number of clients."""
    with synthetic(fast=0.05) as (url, _):
        made = measured(url, workload(clients=8, warmup_s=0.3, seconds=2))
    total = made["total"]
    assert total["requests_per_s"] * total["latency_ms"]["mean"] / 1000 == pytest.approx(8, rel=0.05)
    assert total["errors"] == {}


# --- every protocol, on a real server


def test_every_protocol_measures_a_real_server(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    mix = "steps=1 target_ms=5000:0.5, steps=4 target_ms=5000:0.3, n=2:0.2"
    load = workload(mix, clients=4, warmup_s=0.2, seconds=1)
    rounds: dict[str, Round] = {}
    with serving(make_bundle(), "--grpc-port", "0") as (process, (host, port)):
        url = f"http://{host}:{port}"
        for protocol in ("openai", "http"):
            rounds[protocol] = bench(address_of(url, protocol), load, is_quiet=True)
        assert all(made["server"]["pid"] == process.pid for made in rounds.values())
        grpc_port = next(port for port in ports(process.pid) if port != int(url.rpartition(":")[2]))
        grpc = address_of(f"grpc://{host}:{grpc_port}")
        rounds["grpc"] = bench(grpc, load, metrics=f"{url}/metrics", is_quiet=True)
    rounds["in-process"] = bench(address_of(str(make_bundle()), threads=1), load, is_quiet=True)
    for protocol, made in rounds.items():
        total = made["total"]
        assert total["ok"] == total["requests"] > 10, protocol
        assert total["errors"] == {}
        assert total["goodput"]["share"] == 1
        assert 1 <= made["server"]["rows_per_call"] <= 16
        assert made["server"]["cpu_ms_per_image"] > 0
        assert made["server"]["memory_mb"] > 20
        assert total["images_per_s"] > total["requests_per_s"]
        assert set(made["kinds"]) == {"steps=1 target_ms=5000", "steps=4 target_ms=5000", "n=2"}
    assert rounds["openai"]["total"]["sample_steps_per_s"] > rounds["openai"]["total"]["images_per_s"]


def test_a_server_with_keys_and_tls_is_measured_too(
    serving: Serving, make_bundle: Callable[..., Path], certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, private = certificate
    monkeypatch.setenv("FEWSTEP_API_KEY", "open-sesame")
    load = workload(clients=2, warmup_s=0.1, seconds=0.5)
    port = free_port()
    flags = ("--tls-certfile", cert, "--tls-keyfile", private, "--grpc-port", str(port))
    with serving(make_bundle(), *flags) as (_, (host, http_port)):
        url = f"https://{host}:{http_port}"
        for target in (url, f"grpcs://{host}:{port}"):
            address = address_of(target, key="open-sesame", cafile=cert)
            made = bench(address, load, metrics=f"{url}/metrics", is_quiet=True)
            assert made["total"]["ok"] == made["total"]["requests"] > 2
            assert made["server"]["rows_per_call"] >= 1
        for target, key, cafile, message in (
            (url, "wrong", cert, "401"),
            (url, "open-sesame", None, "--cafile names a file"),
            (f"grpcs://{host}:{port}", "wrong", cert, "UNAUTHENTICATED"),
            (f"grpcs://{host}:{port}", "open-sesame", None, "UNAVAILABLE"),
        ):
            with pytest.raises(BenchError) as error:
                bench(address_of(target, key=key, cafile=cafile), load, is_quiet=True)
            assert message in str(error.value)


def ports(pid: int) -> list[int]:
    import psutil

    listening = psutil.Process(pid).net_connections("tcp")
    return sorted({one.laddr.port for one in listening if one.status == psutil.CONN_LISTEN})


def test_a_servers_refusals_are_counted_by_kind(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    load = workload("deadline_ms=0.001:0.5, steps=1:0.5", clients=4, warmup_s=0, seconds=1)
    with serving(make_bundle(), "--no-grpc") as (_, (host, port)):
        made = measured(f"http://{host}:{port}", load)
        with pytest.raises(BenchError, match=r"kind 'steps=77' fails: 400: num_inference_steps: digits has no table"):
            measured(f"http://{host}:{port}", workload("steps=77", seconds=1))
    total = made["total"]
    assert set(total["errors"]) <= {"429", "504"}  # refused at the door, or given up
    assert 0 < sum(total["errors"].values()) == total["requests"] - total["ok"]
    assert total["goodput"]["met"] == 0
    assert made["kinds"]["steps=1"]["errors"] == {}


def test_an_unknown_kserve_model_gets_inputs_by_its_metadata() -> None:
    """Types and shapes as the server says; what only binary can say goes as binary."""

    async def ask(url: str) -> Any:
        target = KserveTarget(Address(url, "http", "sleeper"))
        await target.open()
        assert await target.send(Kind("all", 1.0, {"text": "words"}), 0) is None
        kept: list[bytes] = []
        request = target._client.request

        async def listening(*arguments: Any) -> Any:
            answer = await request(*arguments)
            kept.append(answer.body)
            return answer

        target._client.request = listening  # type: ignore[method-assign,assignment]
        assert await target.send(Kind("all", 1.0, {"text": "words"}), 1) is None
        await target.close()
        return json.loads(kept[0])["held"]

    with synthetic() as (url, _):
        held = dict(asyncio.run(ask(url)))
        made = bench(address_of(url, "http", model="sleeper"), workload(clients=2, seconds=0.5), is_quiet=True)
    assert held == {"noise": [1, 3, 8, 8], "mask": [1, 4], "text": [1, 1]}
    assert made["total"]["ok"] > 0
    assert made["total"]["sample_steps_per_s"] is None


def test_a_kserve_server_over_grpc_needs_no_extension_of_tritons() -> None:
    """ModelConfig and RepositoryIndex are Triton's; the protocol has neither."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Foreign(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the stubs are untyped
        def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's names
            return service_pb2.ServerMetadataResponse(name="foreign", version="1")

        def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
            made = service_pb2.ModelMetadataResponse(name="m")
            made.inputs.add(name="x", datatype="FP32", shape=[-1, 3])
            made.inputs.add(name="seed", datatype="UINT32", shape=[-1, 1])
            return made

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
            asked.append([(one.name, list(one.shape)) for one in request.inputs])
            made = service_pb2.ModelInferResponse(model_name="m")
            made.outputs.add(name="y", datatype="FP32", shape=[1])
            return made

    asked: list[Any] = []
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Foreign(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def ask(model: str | None, seed: int) -> str | None:
        target = KserveGrpcTarget(Address(f"grpc://127.0.0.1:{port}", "grpc", model))
        try:
            await target.open()
            return await target.send(Kind("all", 1.0, {"seed": seed}), 0)
        finally:
            await target.close()

    try:
        assert asyncio.run(ask("m", 7)) is None
        assert asked == [[("x", [1, 3]), ("seed", [1, 1])]]
        with pytest.raises(BenchError, match=r"--model: grpc://.* does not list its models; name one"):
            asyncio.run(ask(None, 7))
        with pytest.raises(BenchError, match="seed: -1 is no UINT32"):
            asyncio.run(ask("m", -1))
    finally:
        server.stop(None).wait()


def test_a_server_is_asked_without_what_it_would_refuse() -> None:
    """OpenAI's own has no seed, some models take a guidance of 0, and no word is dropped in silence."""
    kinds = parse_mix("seed=none size=512x512, guidance=0")
    assert [kind.fields for kind in kinds] == [{"seed": "none", "size": "512x512"}, {"guidance": 0.0}]
    sent: list[dict[str, Any]] = []

    async def ask() -> None:
        target = OpenAiTarget(Address("http://a", "openai"))

        async def request(method: str, path: str, body: bytes, headers: str) -> Answer:
            sent.append(json.loads(body))
            return Answer(200, b'{"data": [{"b64_json": "AAAA"}]}')

        target._client.request = request  # type: ignore[method-assign,assignment]
        assert await target.send(kinds[0], 3) is None
        engine = InProcessTarget(Address("", "in-process"))
        assert await engine.send(Kind("all", 1.0, {"size": "512x512"}), 0) == "refused"
        assert engine.detail.startswith("size: an engine in this process knows n, steps, ")

    asyncio.run(ask())
    assert sent == [{"prompt": "a photograph", "size": "512x512"}]


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(BenchError, match="cannot be reached: Connection refused; is the server running"):
        measured("http://127.0.0.1:9", workload(seconds=1))


def test_a_server_that_dies_meanwhile_leaves_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was answered before; and nothing is told of a process that is no more."""
    cpu_s, seen = ProcessTree.cpu_s, []
    with synthetic(fast=0.01) as (url, end):

        def watching(tree: ProcessTree) -> float:
            seen.append(tree)
            if len(seen) == 8:
                end()
            return cpu_s(tree)

        monkeypatch.setattr(ProcessTree, "cpu_s", watching)
        made = measured(url, workload(clients=4, warmup_s=0.2, seconds=2))
    total = made["total"]
    assert total["ok"] > 0
    assert "connection refused" in total["errors"]
    assert sum(total["errors"].values()) < 4000  # who is refused at once does not ask as fast as it can
    assert any("of the requests failed" in line for line in warnings_of(made))
    assert "server CPU" not in dict(facts(made))
    assert (made["server"]["memory_mb"], made["server"]["cpu_ms_per_image"]) == (None, None)


INTERRUPTED = """
import os, signal, sys
from fewstep.bench import run

cpu_s, edge, seen = run.ProcessTree.cpu_s, int(sys.argv[1]), []

def watching(tree):
    seen.append(tree)
    if len(seen) == edge:
        os.killpg(0, signal.SIGINT)  # as a terminal does
    return cpu_s(tree)

run.ProcessTree.cpu_s = watching
sys.argv[1:] = ["bench", *sys.argv[2:]]
from fewstep.cli import main
main()
"""


@pytest.mark.parametrize(("edge", "is_kept"), [(5, True), (1, False)], ids=["measuring", "before"])
def test_an_interrupted_run_reports_what_it_measured(tmp_path: Path, edge: int, is_kept: bool) -> None:
    file = tmp_path / "a.json"
    with synthetic(fast=0.01) as (url, _):
        options = [url, "--rate", "50", "--seconds", "4", "--warmup", "0", "--json", str(file)]
        command = [sys.executable, "-c", INTERRUPTED, str(edge), *options]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert file.exists() == is_kept
    if is_kept:
        made = load_one(file)
        assert 4 <= len(made["slices"]) < 20
        assert made["load"]["seconds"] == pytest.approx(0.2 * len(made["slices"]))
        assert made["total"]["ok"] == made["total"]["requests"] > 0
        assert "Interrupted: the figures are of the first" in ended.stdout


def test_a_generator_that_cannot_keep_up_says_so() -> None:
    """Its own lateness is measured; here it is made to be late."""
    made = fake_round(np.random.default_rng(0), late_ms=30)
    assert made["generator"]["late_share"] > 0.9
    assert any("left late" in line for line in warnings_of(made))


# --- comparing


def fake_round(rng: np.random.Generator, *, factor: float = 1.0, late_ms: float = 0.0, seconds: float = 20) -> Round:
    """A round of a server with lognormal latencies, drifting slowly as machines do."""
    load = Workload((Kind("a"), Kind("b", 1.0, {"steps": 4})), rate=200, warmup_s=1, seconds=seconds)
    meant, kind = load.schedule()
    drift = 1 + 0.05 * np.sin(2 * np.pi * (meant / 7 + rng.random()))
    latency = factor * drift * rng.lognormal(np.log(0.02), 0.4, len(meant)) * (1 + kind)
    sent = meant + late_ms / 1000
    error = np.full(len(meant), -1)
    records = Records(kind, meant, sent, meant + latency, error, (), 0.1, None)
    server = {"pid": None, "memory_mb": None, "rows_per_call": None}
    address = Address("http://127.0.0.1:8000", "openai")
    return round_of(address, About("m", default_steps=2), load, records, server, [])


def test_like_runs_differ_by_noise_alone() -> None:
    """Ten pairs of runs of one server: of their hundred figures none differs, however often they are compared."""
    rng = np.random.default_rng(3)
    found = [one for _ in range(10) for one in compare([fake_round(rng)], [fake_round(rng)])]
    assert len(found) >= 80
    assert [one for one in found if one.verdict != "noise"] == []


def test_a_slower_server_is_found_and_every_comparison_finds_it() -> None:
    rng = np.random.default_rng(4)
    for seed in range(5):
        found = compare([fake_round(rng)], [fake_round(rng, factor=1.25)], seed=seed)
        verdicts = {one.figure: one.verdict for one in found}
        for figure in ("latency mean", "latency p50", "latency p90", "a: p50", "b: p50"):
            assert verdicts[figure] == "worse", (figure, found)
        assert verdicts["images/s"] == "noise"  # an open loop that keeps up


def test_rounds_widen_the_interval_by_what_differs_between_them() -> None:
    """Rounds that each agree within and not among themselves: one each would see a difference, four do not."""
    rng = np.random.default_rng(5)
    factors = [1.0, 1.3, 0.8, 1.1]
    one = compare([fake_round(rng)], [fake_round(rng, factor=1.3)])
    rounds = [[fake_round(rng, factor=f) for f in order] for order in (factors, factors[::-1])]
    four = compare(*rounds)
    verdict_of = [{each.figure: each.verdict for each in found} for found in (one, four)]
    assert [verdicts["latency mean"] for verdicts in verdict_of] == ["worse", "noise"]


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 31.599), (4, 8.610), (10, 4.587), (1000, 3.300)])
def test_intervals_are_students(freedom: float, quantile: float) -> None:
    """The tables' quantiles at 0.9995, which is what ten figures at 99 % take."""
    assert _student(0.9995, freedom) == pytest.approx(quantile, rel=1e-3)


def test_few_rounds_that_lie_apart_are_called_noise() -> None:
    """Two rounds a side, 10 % apart from round to round: a normal interval calls every eighth pair different."""
    rng = np.random.default_rng(10)

    def rounds() -> list[Round]:
        return [fake_round(rng, factor=float(np.exp(0.1 * rng.standard_normal())), seconds=4) for _ in range(2)]

    for _ in range(12):
        assert [one for one in compare(rounds(), rounds()) if one.verdict != "noise"] == []


def test_open_and_closed_loops_are_not_compared(tmp_path: Path) -> None:
    made = fake_round(np.random.default_rng(11), seconds=4)
    save(tmp_path / "open.json", made)
    save(tmp_path / "closed.json", {**made, "load": {**made["load"], "loop": "closed"}})
    with pytest.raises(BenchError, match=r"open loop, .*closed.json in closed loop"):
        compare_files(tmp_path / "open.json", tmp_path / "closed.json")


def test_reports_are_kept_round_by_round_and_unlike_loads_are_told(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    rng = np.random.default_rng(6)
    first, second = fake_round(rng, seconds=4), fake_round(rng, seconds=4)
    save(file, first)
    save(file, second, is_added=True)
    assert load(file) == [first, second]
    other = fake_round(rng, seconds=5)
    assert unlike([first], [other]) == ["not the same load: seconds is 4 and 5"]
    file.write_text("{}")
    with pytest.raises(BenchError, match="is not a report of fewstep bench"):
        load(file)


def test_a_round_that_does_not_belong_is_refused_before_the_load(tmp_path: Path) -> None:
    file, load_ = tmp_path / "a.json", workload(rate=5)
    check_added(file, load_)  # the first round
    with pytest.raises(BenchError, match="--append: adds a round to the file of --json; name one"):
        check_added(None, load_)
    file.write_text("x")
    with pytest.raises(BenchError, match="is not a report of fewstep bench --json"):
        check_added(file, load_)
    save(file, fake_round(np.random.default_rng(8), seconds=4))
    with pytest.raises(BenchError, match=r"another load: kinds is .* there, .* here"):
        check_added(file, load_)
    file.write_text('{"fewstep_bench": 1, "rounds": [{"load": {}}]}')
    with pytest.raises(BenchError, match="round 1 is not whole: it has no 'machine'"):
        load(file)


def test_the_report_names_its_kinds_on_a_narrow_terminal() -> None:
    made = fake_round(np.random.default_rng(9), seconds=4)
    made["kinds"]["steps=4 solver=ddim target_ms=60"] = made["kinds"].pop("b")
    made["kinds"]["a"] = {**made["kinds"]["a"], "goodput": {"share": 1.0}}
    console = Console(width=80, record=True, file=StringIO())
    console.print(for_terminal(made))
    lines = console.export_text().splitlines()
    (head,) = [line.split() for line in lines if "answers" in line and "images/s" in line]
    assert head == ["kind", "answers", "images/s", "mean", "p50", "p90", "p95", "p99", "p99.9", "max", "in", "time"]
    names = [line[:14].strip() for line in lines]
    assert [name for name in names if name in ("a", "steps=4", "solver=ddim", "target_ms=60", "all")] == [
        "a", "steps=4", "solver=ddim", "target_ms=60", "all"
    ]  # fmt: skip
    assert "…" not in "".join(lines)


def test_the_page_needs_nothing_from_anywhere() -> None:
    made = fake_round(np.random.default_rng(7), seconds=4)
    text = page(made)
    assert "<svg" in text
    assert not [word for word in ("src=", "href=", "@import", "url(", "<script") if word in text]
    assert "<b>" not in page({**made, "target": {**made["target"], "model": "<b>"}})


# --- workloads


def test_a_mix_is_read_from_text_and_from_a_file(tmp_path: Path) -> None:
    kinds = parse_mix("steps=1:0.5, steps=4 solver=ddim:0.3,n=2")
    assert kinds[0] == Kind("steps=1", 0.5, {"steps": 1})
    assert kinds[1] == Kind("steps=4 solver=ddim", 0.3, {"steps": 4, "solver": "ddim"})
    assert kinds[2] == Kind("n=2", 1.0, {"n": 2})
    file = tmp_path / "mix.toml"
    file.write_text('[[request]]\nweight = 3\nsteps = 1\n[[request]]\nname = "slow"\nprompt = "a, b: c"\n')
    assert parse_mix(str(file)) == (Kind("steps=1", 3.0, {"steps": 1}), Kind("slow", 1.0, {"prompt": "a, b: c"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "steps"}, "--mix: 'steps' is not NAME=VALUE"),
        ({"mix": "steps=one"}, "--mix: steps=one: steps is 'one', must be a whole number"),
        ({"mix": "steps=1:0"}, "weight is '0', must be a number above 0"),
        ({"mix": "n=0"}, "n is 0, at least one image"),
        ({"mix": "n=1, n=1"}, "'n=1' is there twice"),
        ({"mix": "nothing.toml"}, "nothing.toml: cannot be read"),
        ({"rate": -1.0}, "--rate: -1 must be more than 0"),
        ({"clients": 0}, "--clients: 0 must be at least 1"),
        ({"arrivals": "burst"}, "--arrivals burst: needs --rate"),
        ({"arrivals": "weekly"}, "--arrivals: weekly is none of poisson, burst, constant, and no file"),
    ],
)
def test_a_wrong_workload_is_refused_by_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError) as error:
        workload(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("target", "protocol", "message"),
    [
        ("http://a", "tcp", "--protocol: 'tcp' is not one of openai, http, grpc, in-process"),
        ("ftp://a", None, "begins with http://"),
        ("http://a:1", "grpc", "needs the gRPC port"),
        ("http://a:1", "in-process", "needs a bundle"),
        ("somewhere", "http", "needs a URL"),
        ("grpcs://a:1", "http", "needs a URL"),
        ("http://", None, "is no URL of a server"),
        ("http://[::1", None, "is no URL of a server"),
        ("http://a:99999", None, "is no URL of a server"),
    ],
)
def test_a_target_that_does_not_fit_its_protocol_is_refused(target: str, protocol: str, message: str) -> None:
    with pytest.raises(BenchError) as error:
        address_of(target, protocol)
    assert message in str(error.value)


def test_certificates_to_trust_are_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for target, cafile, message in (
        ("http://a:1", tmp_path / "empty.pem", "--cafile: only https:// and grpcs://"),
        ("https://a:1", tmp_path / "empty.pem", f"--cafile: {tmp_path / 'empty.pem'}: holds no certificate"),
        ("grpcs://a:1", tmp_path / "no.pem", f"--cafile: {tmp_path / 'no.pem'}: No such file or directory"),
    ):
        with pytest.raises(BenchError) as error:
            address_of(target, cafile=cafile)
        assert message in str(error.value)


def test_arrivals_have_their_rate_and_their_shape() -> None:
    """Poisson: gaps as long as they vary. Bursts: several at once. Both at the rate asked for, and the same again."""
    wanted = workload(rate=500, warmup_s=0, seconds=100)
    times, _ = wanted.schedule()
    gaps = np.diff(times)
    assert len(times) / 100 == pytest.approx(500, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.03)
    assert np.array_equal(times, wanted.schedule()[0])
    bursts, _ = workload(rate=500, arrivals="burst", burst=10, warmup_s=0, seconds=100).schedule()
    assert len(bursts) / 100 == pytest.approx(500, rel=0.05)
    assert np.unique(np.unique(bursts, return_counts=True)[1]).tolist() == [10]


def test_kinds_come_by_their_weights() -> None:
    _, kinds = workload("steps=1:3, steps=4:1", rate=1000, seconds=50).schedule()
    assert (kinds == 0).mean() == pytest.approx(0.75, abs=0.01)


def test_prompts_and_seeds_of_a_trace_make_no_kinds(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [{"at": i / 200, "steps": 1 + i % 2, "label": i % 10, "seed": i} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, lines)))
    replayed = workload(arrivals=str(file), warmup_s=0, deadline_ms=5000)
    assert [kind.name for kind in replayed.kinds] == ["steps=1", "steps=2"]
    assert [dict(replayed.request(kind, i).fields) for i, kind in enumerate(replayed.schedule()[1])] == [
        {"deadline_ms": 5000, "steps": one["steps"], "label": one["label"], "seed": one["seed"]} for one in lines
    ]
    made = bench(Address(str(make_bundle()), "in-process", threads=1), replayed, is_quiet=True)
    assert {name: one["requests"] for name, one in made["kinds"].items()} == {"steps=1": 30, "steps=2": 30}


def test_a_trace_is_replayed_and_may_be_scaled(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('10.0\n{"at": 10.5, "steps": 4}\n{"at": 12, "steps": 4}\n{"at": 11.0, "n": 2}\n')
    replayed = workload(arrivals=str(file), warmup_s=0, seconds=10)
    times, kinds = replayed.schedule()
    assert times.tolist() == [0.0, 0.5, 1.0, 2.0]
    assert [replayed.kinds[i].name for i in kinds] == ["all", "steps=4", "n=2", "steps=4"]
    faster = workload(arrivals=str(file), rate=8.0, warmup_s=0, seconds=10)
    assert faster.schedule()[0].tolist() == [0.0, 0.125, 0.25, 0.5]
    whole = workload(arrivals=str(file), warmup_s=0.5)  # and is neither cut nor waited out
    assert whole.seconds == pytest.approx(1.5, abs=0.01)
    assert len(whole.schedule()[0]) == 4
    assert workload(arrivals=str(file), rate=8.0, warmup_s=0).seconds == pytest.approx(0.5, abs=0.01)
    assert workload().seconds == 10
    file.write_bytes(b"\xff1.0")
    with pytest.raises(BenchError, match="is not text"):
        workload(arrivals=str(file))
    file.write_text("1.0\nsoon\n")
    with pytest.raises(BenchError, match="line 2: 'soon' is not a number of seconds"):
        workload(arrivals=str(file))


# --- the command


def test_the_command_writes_reports_and_compares_them(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    def fewstep(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fewstep", "bench", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    load = ("--clients", "8", "--seconds", "2", "--warmup", "0.2", "--threads", "1")
    slow = fewstep(make_bundle(), *load, "--simulate", "20+0.1", "--json", "slow.json", "--html", "slow.html")
    fast = fewstep(make_bundle(), *load, "--simulate", "5+0.1", "--json", "fast.json")
    assert slow.returncode == fast.returncode == 0, slow.stderr + fast.stderr
    assert "SIMULATED" in slow.stdout
    assert "SIMULATED" in (tmp_path / "slow.html").read_text()
    assert "20 + 0.1 n ms a network call" in dict(facts(load_one(tmp_path / "slow.json")))["SIMULATED"]
    better = fewstep("compare", "slow.json", "fast.json")
    worse = fewstep("compare", "fast.json", "slow.json")
    assert (better.returncode, worse.returncode) == (0, 1), better.stdout + better.stderr
    assert "better" in better.stdout
    assert "SIMULATED" in better.stdout
    refused = fewstep("--rate", "x")
    assert refused.returncode == 2
    lost = fewstep("compare", "fast.json", "none.json")
    assert (lost.returncode, lost.stderr.strip()) == (
        2,
        "fewstep: none.json: cannot be read: No such file or directory",
    )


def load_one(file: Path) -> Round:
    (made,) = load(file)
    return made
