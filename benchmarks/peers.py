"""fewstep and its peers, interleaved on one machine, with the same student: one command.

    python benchmarks/peers.py --json docs/results/peers.json

It makes an environment for the peers (``.venv-peers``; benchmarks/peer_servers/requirements.txt), and a copy of the
embedded student with a 16-step table beside its own. Each round starts every server once, in an order that changes from
round to round, checks that it makes the very bits our engine makes, and loads it by `fewstep.bench`. All peers run the
same sampler (`peer_servers/sampler.py`: our ONNX Runtime session, our compiled step, our PNG encoder), so what differs
is the server and how it batches:

    fewstep             step-level batching
    fastapi-padded      one queue; a batch runs to the end of its longest request
    fastapi-mixed       one queue; finished rows leave the batch's later network calls
    fastapi-bucketed    a queue for each number of steps, all on one device
    litserve, ray       one queue, as fastapi-mixed
    triton              Triton's Python backend with its dynamic batching: `fewstep export --triton --variant loop`

The scenarios: ``uniform`` four steps at 32 clients on the CPU; ``mixed`` 1, 4 and 16 steps in a closed loop, on the CPU
and on the simulated accelerator; ``half`` the same mix in an open loop at half of what fastapi-bucketed gave. In
``uniform`` the network is called by itself before and after each load, since the machine's pace drifts: a server's CPU
time is told in that of its network calls, too.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from cpu_efficiency import Bare

from fewstep.bench.report import Round, machine
from fewstep.bench.run import address_of, bench
from fewstep.bench.workload import Kind, Workload, workload
from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.bundle import add_tables
from fewstep.runtime.pictures import encode
from fewstep.runtime.schedules import karras
from fewstep.runtime.simulated import simulated
from fewstep.runtime.solvers import ddim

ROOT = Path(__file__).parents[1]
SERVERS = Path(__file__).parent / "peer_servers"
MIX = {1: 0.5, 4: 0.3, 16: 0.2}  # share of the requests by number of steps
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastapi-padded": ("fastapi_peer.py", {"is_padded": True}),
    "fastapi-mixed": ("fastapi_peer.py", {}),
    "fastapi-bucketed": ("fastapi_peer.py", {"is_bucketed": True}),
    "litserve": ("litserve_peer.py", {}),
    "ray": ("ray_peer.py", {}),
}
OURS = ("fewstep", "triton")  # started by fewstep's own command
SCENARIOS: dict[str, dict[str, Any]] = {
    "uniform-cpu": {
        "servers": ("fewstep", "fastapi-mixed", "litserve", "ray", "triton"),
        "clients": 32,
        "max_batch": 16,
    },
    "mixed-cpu": {"servers": ("fewstep", "fastapi-mixed", "fastapi-bucketed"), "clients": 32, "max_batch": 16},
    "half-cpu": {"servers": ("fewstep", "fastapi-mixed", "fastapi-bucketed"), "max_batch": 16},
    "mixed-simulated": {"servers": ("fewstep", *list(PEERS)[:4]), "clients": 128, "max_batch": 32},
    "half-simulated": {"servers": ("fewstep", "fastapi-mixed", "fastapi-bucketed"), "max_batch": 32},
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="on the clock, each; simulated ones take twice that"
    )
    parser.add_argument("--simulate", default="40+1", help="cost of the simulated accelerator, A+B ms a network call")
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--servers", nargs="*", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    python = environment(options.environment)
    with tempfile.TemporaryDirectory() as folder:
        bundle = student(Path(folder) / "student")
        made: dict[str, dict[str, list[Measured]]] = {}
        for number in range(options.rounds):
            for name in options.scenarios:
                servers = [server for server in SCENARIOS[name]["servers"] if server in options.servers]
                turned = servers[number % len(servers) :] + servers[: number % len(servers)]
                for server in turned:
                    one = measure(name, server, bundle, python, options, made)
                    made.setdefault(name, {}).setdefault(server, []).append(one)
                    print(f"round {number + 1}, {name}, {server}: {told(one)}", flush=True)
            report(options, python, made, number + 1)


class Measured(NamedTuple):
    """A server under a load."""

    round: Round
    network_ms: float | None  # CPU time of an image's network calls by themselves, then and there

    @property
    def cpu_over_network(self) -> float | None:
        """The server's CPU time as a multiple of the network's."""
        return self.round["server"]["cpu_ms_per_image"] / self.network_ms if self.network_ms else None


def report(options: argparse.Namespace, python: Path, made: dict[str, dict[str, list[Measured]]], rounds: int) -> None:
    """Print and write what there is so far."""
    result = {
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "machine": machine(),
        "niceness": os.nice(0),
        "rounds": rounds,
        "seconds": options.seconds,
        "simulated": {name: options.simulate for name in made if name.endswith("simulated")},
        "mix": MIX,
        "versions": versions(python),
        "scenarios": {name: {server: figures(rounds) for server, rounds in by.items()} for name, by in made.items()},
        "verdicts": verdicts(made),
    }
    for line, value in result["verdicts"].items():
        print(f"{line}: {value:.3g}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    scenario: str,
    server: str,
    bundle: Bundle,
    python: Path,
    options: argparse.Namespace,
    made: dict[str, dict[str, list[Measured]]],
) -> Measured:
    """One server, checked and loaded."""
    said = SCENARIOS[scenario]
    is_simulated = scenario.endswith("simulated")
    simulate = options.simulate if is_simulated else None
    seconds = options.seconds * (2 if is_simulated else 1)
    warmup_s = 4.0 if is_simulated else 2.0  # until the slow kinds have spread over the clients
    if scenario.startswith("half"):
        whole = made.get(scenario.replace("half", "mixed"), {}).get("fastapi-bucketed")
        if whole is None:
            raise SystemExit(f"{scenario}: takes its rate from fastapi-bucketed in mixed; ask for both")
        rate = 0.5 * statistics.mean(one.round["total"]["requests_per_s"] for one in whole)
        load: Workload = workload(rate=rate, seconds=seconds, warmup_s=warmup_s)
    else:
        load = workload(clients=said["clients"], seconds=seconds, warmup_s=warmup_s)
    mix = {4: 1.0} if scenario.startswith("uniform") else MIX
    asked = {"prompt": "Sneaker", **({"outputs": "PNG_BASE64"} if server == "triton" else {})}
    kinds = (Kind(f"steps={steps}", share, {"steps": steps, **asked}) for steps, share in mix.items())
    load = replace(load, kinds=tuple(kinds))
    with running(server, bundle, python, said["max_batch"], simulate) as (url, pid):
        check(server, url, bundle, simulate)
        address = address_of(url, "http" if server == "triton" else "openai", model=bundle.name)
        if not scenario.startswith("uniform"):
            return Measured(bench(address, load, server_pid=pid, is_quiet=True), None)
        with Bare(bundle, said["max_batch"], threads=1) as network:
            before_ms = network.cpu_ms_per_image(said["max_batch"], seconds / 4)
            one = bench(address, load, server_pid=pid, is_quiet=True)
            after_ms = network.cpu_ms_per_image(said["max_batch"], seconds / 4)
        return Measured(one, (before_ms + after_ms) / 2)


@contextmanager
def running(
    server: str, bundle: Bundle, python: Path, max_batch: int, simulate: str | None
) -> Iterator[tuple[str, int]]:
    """A server, until it is not needed any more."""
    port, grpc_port, metrics_port = free_ports(3)
    if server == "fewstep":
        command = [sys.executable, "-m", "fewstep", "serve", str(bundle.path), "--port", str(port), "--no-grpc"]
        command += ["--max-rows", str(max_batch), "--threads", "1", *(["--simulate", simulate] if simulate else [])]
    elif server == "triton":
        command = [sys.executable, "-m", "fewstep"]
        repository = bundle.path.parent / "triton"
        if not repository.exists():
            said = ["--variant", "loop", "--max-rows", str(max_batch), "--threads", "1"]
            export = [*command, "export", str(bundle.path), "--triton", str(repository), *said]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        command += ["triton", "serve", str(repository), "--port", str(port)]
        command += ["--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    else:
        file, flags = PEERS[server]
        setup = {"bundle": str(bundle.path), "port": port, "max_batch": max_batch, "threads": 1, "simulate": simulate}
        command = [str(python), str(SERVERS / file), json.dumps({**setup, **flags})]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            end_s = time.monotonic() + 120
            url = f"http://127.0.0.1:{port}"
            while not answers(server, url, bundle):
                if process.poll() is not None or time.monotonic() > end_s:
                    log.seek(0)
                    raise SystemExit(f"{server} did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield url, process.pid
        finally:
            stop(process.pid)
            process.wait()


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        trials = [stack.enter_context(socket.socket()) for _ in range(number)]
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [trial.getsockname()[1] for trial in trials]


def stop(pid: int) -> None:
    """End a process and all its descendants, and no others: not every Ray of the machine, as ``ray stop`` does."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:  # it ended by itself
        return
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(tree, timeout=15)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def ask(server: str, url: str, bundle: Bundle, label: int, seed: int, steps: int) -> bytes:
    """One image."""
    assert bundle.manifest.labels is not None
    prompt = bundle.manifest.labels.names[label]
    body: dict[str, Any] = {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
    path = "/v1/images/generations"
    if server == "triton":
        said = (("PROMPT", "BYTES", prompt), ("SEED", "UINT64", seed), ("STEPS", "INT32", steps))
        inputs = [{"name": name, "datatype": kind, "shape": [1, 1], "data": [value]} for name, kind, value in said]
        body = {"inputs": inputs, "outputs": [{"name": "PNG_BASE64"}]}
        path = f"/v2/models/{bundle.name}/infer"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        held = json.load(answer)
    return base64.b64decode(held["outputs"][0]["data"][0] if server == "triton" else held["data"][0]["b64_json"])


def answers(server: str, url: str, bundle: Bundle) -> bool:
    """Whether it makes images yet."""
    try:
        return bool(ask(server, url, bundle, 0, 0, 1))
    except (OSError, urllib.error.HTTPError):
        return False


def check(server: str, url: str, bundle: Bundle, simulate: str | None) -> None:
    """It must make what the engine makes, to the bit, before it is timed."""
    engine = Engine(bundle, threads=1, backend=simulated("0+0") if simulate else None)
    for label, seed, steps in ((0, 1, 1), (3, 2, 4), (9, 3, 16)):
        (sample,) = engine.generate([Request(seed, bundle.tableau(None, steps), label)])
        assert ask(server, url, bundle, label, seed, steps) == encode(sample.to_uint8()), (
            f"{url}: other bits at {steps} steps"
        )


def student(path: Path) -> Bundle:
    """The embedded student, and the 16 steps of DDIM that the mix asks for."""
    shutil.copytree(Bundle.load().path, path)
    return add_tables(path, [ddim(karras(16, 0.25, 40.0))])


def environment(path: Path) -> Path:
    """The peers' Python, installed first if need be."""
    python = path / "bin" / "python"
    if not python.exists():
        print(f"Installing the peers into {path}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
        what = ["--editable", str(ROOT), "--requirement", str(SERVERS / "requirements.txt")]
        pins = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "-qq", *pins, *what], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Of what was compared."""
    names = ["fastapi", "uvicorn", "litserve", "ray", "onnxruntime", "numpy"]
    code = f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {names}}}))"
    told_: dict[str, str] = json.loads(subprocess.check_output([str(python), "-c", code]))
    return told_


def told(measured: Measured) -> str:
    """A round in one line."""
    one = measured.round
    over = f", {measured.cpu_over_network:.3f} times the network's" if measured.cpu_over_network else ""
    parts = one["kinds"].get("steps=1", one["total"])["latency_ms"]
    errors = sum(one["total"]["errors"].values())
    return (
        f"{one['total']['images_per_s']:.1f} images/s, CPU {one['server']['cpu_ms_per_image']:.2f} ms an image{over}, "
        f"p50 {parts['p50']:.0f} and p99 {parts['p99']:.0f} ms of the shortest kind, {errors} errors"
    )


def figures(rounds: list[Measured]) -> dict[str, Any]:
    """The median of each figure over the rounds, and every round's."""
    each = [
        {
            "images_per_s": one["total"]["images_per_s"],
            "cpu_ms_per_image": one["server"]["cpu_ms_per_image"],
            "memory_mb": one["server"]["memory_mb"],
            "latency_ms": {name: part["latency_ms"] for name, part in one["kinds"].items()},
            "errors": one["total"]["errors"],
            "generator": one["generator"],
            "load": {key: one["load"].get(key) for key in ("clients", "rate")},
            **({"network_ms": network_ms} if network_ms else {}),
        }
        for one, network_ms in rounds
    ]
    kinds = each[0]["latency_ms"]
    over = [one.cpu_over_network for one in rounds if one.cpu_over_network]
    return {
        **({"cpu_over_network": statistics.median(over)} if over else {}),
        "images_per_s": statistics.median(one["images_per_s"] for one in each),
        "cpu_ms_per_image": statistics.median(one["cpu_ms_per_image"] for one in each),
        "memory_mb": statistics.median(one["memory_mb"] for one in each),
        "latency_ms": {
            kind: {p: statistics.median(one["latency_ms"][kind][p] for one in each) for p in ("p50", "p90", "p99")}
            for kind in kinds
        },
        "rounds": each,
    }


def verdicts(made: dict[str, dict[str, list[Measured]]]) -> dict[str, float]:
    """Fewstep against each peer: the median over rounds of the ratio within a round."""

    def ratios(scenario: str, peer: str, figure: Callable[[Measured], Any]) -> float:
        pairs = zip(made[scenario]["fewstep"], made[scenario][peer], strict=True)
        return statistics.median(float(figure(ours)) / float(figure(theirs)) for ours, theirs in pairs)

    found: dict[str, float] = {}
    for scenario, by in made.items():
        for peer in by:
            if peer == "fewstep" or "fewstep" not in by:
                continue
            by_name: dict[str, Callable[[Measured], Any]] = {"images/s": lambda one: one.round["total"]["images_per_s"]}
            if scenario.startswith("uniform"):
                by_name["CPU time an image"] = lambda one: one.round["server"]["cpu_ms_per_image"]
                by_name["CPU time over the network's"] = lambda one: one.cpu_over_network
            else:
                by_name["1-step p50"] = lambda one: one.round["kinds"]["steps=1"]["latency_ms"]["p50"]
                by_name["1-step p99"] = lambda one: one.round["kinds"]["steps=1"]["latency_ms"]["p99"]
            for name, figure in by_name.items():
                found[f"{scenario}, fewstep / {peer}, {name}"] = ratios(scenario, peer, figure)
    return found


if __name__ == "__main__":
    main()
