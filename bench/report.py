"""What was measured: a plain dictionary, as the JSON file holds it, and the same for the terminal.

    {"fewstep_bench": 1, "rounds": [ROUND, ...]}

A round is one run of the load. Its latencies are HdrHistogram's V2 encoding, in microseconds with three digits, which
every HdrHistogram tool reads: one for the round, and one for each slice of its time, which `compare` resamples.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..runtime.files import replace_all
from .errors import BenchError
from .generator import SLICES, Records
from .targets import About, Address
from .workload import Workload

FORMAT = 1
PERCENTILES = (50, 90, 95, 99, 99.9)
LATE_MS = 1.0  # a request sent later than this after its time is told
BUSY = 0.7  # of a core: above, the load may be what is slow
_HIGHEST_US = 3_600_000_000

Round = dict[str, Any]


def histogram(values_ms: NDArray[np.float64] | Sequence[float]) -> HdrHistogram:
    """Latencies as a histogram of microseconds."""
    made = HdrHistogram(1, _HIGHEST_US, 3)
    for value in np.maximum(np.rint(np.asarray(values_ms) * 1000), 1).astype(np.int64).tolist():
        made.record_value(min(value, _HIGHEST_US))
    return made


def decode(text: str) -> HdrHistogram:
    """A histogram from its encoding in a report."""
    return HdrHistogram.decode(text)


def counts_of(made: HdrHistogram) -> list[tuple[int, int]]:
    """Its values in microseconds, and how often each was seen."""
    counts = np.ctypeslib.as_array(made.counts)  # its own iterator visits the empty ones too, in Python
    return [
        (made.get_highest_equivalent_value(made.get_value_from_index(i)), int(counts[i]))
        for i in np.flatnonzero(counts).tolist()
    ]


def round_of(
    address: Address,
    about: About,
    workload: Workload,
    records: Records,
    server: Mapping[str, Any],
    cpu_s: Sequence[float | None],
) -> Round:
    """Summarise one run.

    Args:
        address: who was asked.
        about: what it says of itself.
        workload: what was asked.
        records: what happened.
        server: what `observer` saw: ``pid``, ``memory_mb``, and `Counts.for_report`; each may be None.
        cpu_s: the server's CPU time so far at each edge of a slice.
    """
    number = records.slices
    start_s, seconds = workload.warmup_s, workload.seconds
    if number < SLICES:
        seconds *= number / SLICES
    edges = start_s + np.linspace(0, seconds, number + 1)
    meant_slice = np.searchsorted(edges, records.meant, "right") - 1
    done_slice = np.searchsorted(edges, records.done, "right") - 1
    is_open = workload.loop == "open"
    # In the closed loop a request sent before the end is part of the load whenever it is answered; both loops count
    # latencies by when requests were meant to be sent, and images by when they came.
    in_window = (meant_slice >= 0) & (meant_slice < number)
    latency_ms = 1000 * (records.done - records.meant)
    images = np.array([kind.num_images for kind in workload.kinds])[records.kind]
    steps_of = [kind.fields.get("steps", about.default_steps) for kind in workload.kinds]
    steps = np.array([steps or 0 for steps in steps_of])[records.kind]
    targets = np.array([kind.target_ms or np.nan for kind in workload.kinds])[records.kind]
    is_ok = records.error < 0
    met = is_ok & (latency_ms <= targets)
    cpu = _differences(cpu_s[: number + 1])

    def summary(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        counted, finished = chosen & in_window, chosen & is_ok & (done_slice >= 0) & (done_slice < number)
        errors = {name: int((counted & (records.error == i)).sum()) for i, name in enumerate(records.errors)}
        answered_ms = latency_ms[counted & is_ok]
        latencies = histogram(answered_ms)
        with_target = counted & ~np.isnan(targets)
        made = {
            "requests": int(counted.sum()),
            "ok": int((counted & is_ok).sum()),
            "errors": {name: number for name, number in errors.items() if number},
            "requests_per_s": float(finished.sum() / seconds),
            "images_per_s": float(images[finished].sum() / seconds),
            "sample_steps_per_s": float((images * steps)[finished].sum() / seconds),
            "latency_ms": _percentiles(answered_ms, latencies),
            "histogram": latencies.encode().decode(),
        }
        if with_target.any():
            made["goodput"] = {
                "requests": int(with_target.sum()),
                "met": int((with_target & met).sum()),
                "share": float((with_target & met).sum() / with_target.sum()),
                "images_per_s": float(images[with_target & met].sum() / seconds),
            }
        return made

    everything = np.ones(len(records.kind), bool)
    total = summary(everything)
    if any(steps is None for steps in steps_of):
        total["sample_steps_per_s"] = None
    num_images = images[is_ok & (done_slice >= 0) & (done_slice < number)].sum()
    total_cpu_s = sum(cpu) if cpu and all(part is not None for part in cpu) else None  # type: ignore[arg-type]
    late_ms = 1000 * (records.sent - records.meant)[in_window] if is_open else np.zeros(0)
    slices = []
    for i in range(number):
        counted, finished = (meant_slice == i), is_ok & (done_slice == i)
        with_target = counted & ~np.isnan(targets)
        slices.append(
            {
                "images": int(images[finished].sum()),
                "sample_steps": int((images * steps)[finished].sum()),
                "with_target": int(with_target.sum()),
                "met": int((with_target & met).sum()),
                "requests": int(counted.sum()),
                "cpu_s": cpu[i] if cpu else None,
                "histograms": {
                    kind.name: histogram(latency_ms[counted & is_ok & (records.kind == k)]).encode().decode()
                    for k, kind in enumerate(workload.kinds)
                },
            }
        )
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "target": {
            "target": address.target or about.model, "protocol": address.protocol, "model": about.model,
            "server": about.server, "simulated": about.simulated, **about.extra,
        },
        "load": {**workload.describe(), "seconds": seconds},
        "interrupted": number < SLICES,
        "generator": {
            "cpu_share": records.cpu_share,
            "late_share": float((late_ms > LATE_MS).mean()) if len(late_ms) else 0.0,
            "late_p99_ms": float(np.percentile(late_ms, 99)) if len(late_ms) else 0.0,
            "is_in_process": address.protocol == "in-process",
        },
        "server": {
            **server,
            "cpu_ms_per_image": 1000 * total_cpu_s / int(num_images) if total_cpu_s and num_images else None,
            "cpu_share": total_cpu_s / seconds if total_cpu_s else None,
        },
        "total": total,
        "kinds": {kind.name: summary(records.kind == k) for k, kind in enumerate(workload.kinds)},
        "slices": slices,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Where it ran."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }  # fmt: skip


def _differences(values: Sequence[float | None]) -> list[float | None]:
    known = [value for value in values if value is not None]
    if len(known) != len(values):  # not seen, or gone meanwhile
        return []
    found: list[float | None] = [after - before for before, after in pairwise(known)]
    return found if all(part >= 0 for part in found if part is not None) else []


def _percentiles(values_ms: NDArray[np.float64], made: HdrHistogram) -> dict[str, float | None]:
    if not len(values_ms):
        return {"mean": None, **{f"p{p:g}": None for p in PERCENTILES}, "max": None}
    found: dict[str, float | None] = {"mean": float(values_ms.mean())}
    for percentile, value_us in made.get_percentile_to_value_dict(PERCENTILES).items():
        found[f"p{percentile:g}"] = value_us / 1000
    found["max"] = made.get_max_value() / 1000
    return found


# --- files


def save(file: Path, made: Round, *, is_added: bool = False) -> None:
    """Write a round to a report file, behind the rounds it holds when ``is_added``.

    Raises:
        BenchError: the file holds no report, or cannot be written.
    """
    rounds = load(file) if is_added and file.exists() else []
    text = json.dumps({"fewstep_bench": FORMAT, "rounds": [*rounds, made]}, indent=1, ensure_ascii=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if rounds:  # never between the old rounds and the new ones with neither
            replace_all({file: (text + "\n").encode()})
        else:
            file.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise BenchError(f"--json: {file}: {error.strerror}") from None


def check_added(file: Path | None, workload: Workload) -> None:
    """Refuse before the load a round that does not belong to those of the file.

    Raises:
        BenchError: there is no file to add to, it holds no report, or rounds of another load.
    """
    if file is None:
        raise BenchError("--append: adds a round to the file of --json; name one")
    if not file.exists():
        return
    held, asked = load(file)[-1]["load"], json.loads(json.dumps(workload.describe()))
    for key in sorted((held.keys() | asked.keys()) - {"seconds", "warmup_s", "seed"}):
        if held.get(key) != asked.get(key):
            raise BenchError(
                f"--append: {file} holds rounds of another load: {key} is {held.get(key)} there, {asked.get(key)} here"
            )


def load(file: Path) -> list[Round]:
    """The rounds of a report file.

    Raises:
        BenchError: it is none.
    """
    try:
        held = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise BenchError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        held = None
    if not isinstance(held, dict) or held.get("fewstep_bench") != FORMAT or not held.get("rounds"):
        raise BenchError(f"{file}: is not a report of fewstep bench --json")
    rounds: list[Round] = held["rounds"]
    whole = ("load", "machine", "target", "total", "kinds", "slices")
    for number, made in enumerate(rounds, 1):
        missing = next((part for part in whole if not isinstance(made, dict) or part not in made), None)
        if missing is not None:
            raise BenchError(f"{file}: round {number} is not whole: it has no {missing!r}")
    return rounds


# --- for people


def facts(made: Round) -> list[tuple[str, str]]:
    """What holds for the whole round, as rows of name and text."""
    target, load_, total, server, generator = (made[k] for k in ("target", "load", "total", "server", "generator"))
    loop = f"closed loop, {load_['clients']} clients" if load_["loop"] == "closed" else _told_open(load_)
    rows = [
        ("target", f"{target['target']} by {target['protocol']}, {target['model']} {target['server']}".rstrip()),
        ("load", f"{loop}; {load_['seconds']:g} s after {load_['warmup_s']:g} s of warm-up"),
        ("machine", f"{made['machine']['cpu']}, {made['machine']['cores']} cores"),
        ("throughput", _told_throughput(total)),
    ]
    if target["simulated"]:
        rows.insert(1, ("SIMULATED", f"accelerator of {target['simulated']}: times are a model's, not a device's"))
    if "goodput" in total:
        good = total["goodput"]
        share = f"{100 * good['share']:.2f} % of {good['requests']} requests in time"
        rows.append(("goodput", f"{good['images_per_s']:.1f} images/s in time; {share}"))
    if server["rows_per_call"] is not None:
        took = f", {server['ms_per_call']:.3g} ms each" if server.get("ms_per_call") else ""
        rows.append(("batch fill", f"{server['rows_per_call']:.2f} rows a network call{took}"))
    if server["cpu_ms_per_image"] is not None:
        who = (
            "this process, with its load" if generator["is_in_process"] else f"process {server['pid']} and its children"
        )
        share = f"{server['cpu_share']:.2f} cores; {server['memory_mb'] or 0:.0f} MB resident"
        rows.append(("server CPU", f"{server['cpu_ms_per_image']:.3f} ms an image ({who}; {share})"))
    failed = sum(total["errors"].values())
    kinds = ", ".join(f"{number} x {name}" for name, number in total["errors"].items())
    rows.append(("errors", f"{failed} of {total['requests']}" + (f": {kinds}" if kinds else "")))
    late = f", {100 * generator['late_share']:.1f} % sent over {LATE_MS:g} ms late" if load_["loop"] == "open" else ""
    if not generator["is_in_process"]:
        rows.append(("load generator", f"{generator['cpu_share']:.2f} of a core{late}"))
    return rows


def warnings_of(made: Round) -> list[str]:
    """What a reader must know before believing the figures."""
    load_, generator, total = made["load"], made["generator"], made["total"]
    told = []
    if made.get("interrupted"):
        told.append(f"Interrupted: the figures are of the first {load_['seconds']:.3g} s.")
    if failed := sum(total["errors"].values()):
        share = f"{100 * failed / total['requests']:.2g} %"
        told.append(f"{share} of the requests failed; latencies are those of the others.")
    if generator["cpu_share"] > BUSY and not generator["is_in_process"]:
        told.append("The load generator was busy: what is slow may be the load, not the server.")
    if generator["late_share"] > 0.01:
        worst = f"{generator['late_p99_ms']:.1f} ms at the 99th percentile"
        told.append(f"Requests left late, {worst}. The wait is in their latency, and is the generator's.")
    if load_["loop"] == "closed":
        told.append("Closed loop: who waits sends nothing. For the latency that users would see, give --rate.")
    elif total["ok"] and total["requests_per_s"] < 0.9 * total["requests"] / load_["seconds"]:
        told.append("Overload: fewer answers than requests. Latencies grow with the length of the run.")
    if total["ok"] and total["ok"] < 1000:
        told.append(f"{total['ok']} answers: the 99th percentile rests on {max(1, total['ok'] // 100)} of them.")
    return told


def latency_rows(made: Round) -> list[tuple[str, ...]]:
    """A row for each kind of request, and one for all."""
    parts = {**(made["kinds"] if len(made["kinds"]) > 1 else {}), "all": made["total"]}
    rows = []
    for name, part in parts.items():
        numbers = map(_digits, part["latency_ms"].values())
        share = f"{100 * part['goodput']['share']:.1f} %" if "goodput" in part else ""
        rows.append((name, str(part["ok"]), f"{part['images_per_s']:.1f}", *numbers, share))
    return rows


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


LATENCY_COLUMNS = ("kind", "answers", "images/s", "mean", *(f"p{p:g}" for p in PERCENTILES), "max", "in time")


def for_terminal(made: Round) -> RenderableType:
    """The report as it is printed."""
    grid = Table(show_header=False, box=None, pad_edge=False)
    for name, text in facts(made):
        grid.add_row(Text(name, "bold"), Text(text))
    title = "Latency in ms, from the time a request was meant to be sent"
    # A terminal of 80 columns must hold it, the names of the kinds first of all.
    rows = latency_rows(made)
    used = [i for i in range(len(LATENCY_COLUMNS)) if any(row[i] for row in rows)]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for i in used:
        table.add_column(LATENCY_COLUMNS[i], no_wrap=i > 0, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in used))
    return Group(grid, table, *(Text(f"Note: {line}", "yellow") for line in warnings_of(made)))


def show(made: Round) -> None:
    """Print a round."""
    Console().print(for_terminal(made))


def _told_open(load_: Mapping[str, Any]) -> str:
    rate = f"{load_['rate']:g} requests/s" if load_["rate"] is not None else "as recorded"
    burst = f" of {load_['burst']}" if "burst" in load_ else ""
    return f"open loop, {rate}, {load_['arrivals']}{burst}"


def _told_throughput(total: Mapping[str, Any]) -> str:
    steps = total["sample_steps_per_s"]
    return f"{total['images_per_s']:.1f} images/s" + ("" if steps is None else f", {steps:.1f} sample-steps/s")
