"""Capacity: the simulation obeys queueing theory, agrees with an engine on a clock, and finds the smallest number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.bench import BenchError, bench
from fewstep.bench.capacity import attempt, latencies_ms, line, measured, most_of, needed
from fewstep.bench.generator import Records
from fewstep.bench.run import address_of
from fewstep.bench.simulation import ROUTINGS, Replica, simulate
from fewstep.bench.workload import Kind, Workload, workload
from fewstep.cli import main
from fewstep.runtime.simulated import Cost

MIX = "steps=1:0.5, steps=2:0.3, steps=4:0.2"


def mean_ms(load: Workload, records: Records) -> float:
    return float(latencies_ms(load, records).mean())


# --- laws


def test_a_request_alone_takes_its_calls_and_the_overhead() -> None:
    load = workload("steps=4", rate=0.1, arrivals="constant", warmup_s=0, seconds=100)
    records = simulate(load, Replica(Cost(40, 1), overhead_ms=3), 1)
    assert 1000 * (records.done - records.meant) == pytest.approx(4 * 41 + 3)


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_one_row_with_poisson_arrivals_is_the_queue_of_pollaczek_and_khinchine(load: float) -> None:
    """With one row and one step a replica is M/D/1, whose mean wait is load / (2 (1 - load)) services."""
    asked = workload("steps=1", rate=100 * load, warmup_s=5, seconds=150)
    found = mean_ms(asked, simulate(asked, Replica(Cost(10, 0), max_rows=1), 1))
    assert found == pytest.approx(10 + 10 * load / (2 * (1 - load)), rel=0.07)


def test_times_that_vary_do_so_by_what_was_said() -> None:
    """M/G/1: the mean wait grows with the variance, by (1 + variance / mean ** 2) / 2."""
    asked = workload("steps=1", rate=60, warmup_s=5, seconds=150)
    replica = Replica(Cost(10, 0), max_rows=1, deviation_ms=4)
    found = mean_ms(asked, simulate(asked, replica, 1))
    assert found == pytest.approx(10 + 10 * 0.6 / (2 * 0.4) * (1 + (1.25 * 0.4) ** 2), rel=0.08)


def test_replicas_behind_a_random_router_are_as_many_queues() -> None:
    asked = workload("steps=1", rate=4 * 70, warmup_s=3, seconds=40)
    found = mean_ms(asked, simulate(asked, Replica(Cost(10, 0), max_rows=1), 4, "random"))
    assert found == pytest.approx(10 + 10 * 0.7 / (2 * 0.3), rel=0.07)


def test_a_closed_loop_obeys_littles_law() -> None:
    load = workload(MIX, clients=24, warmup_s=5, seconds=60)
    records = simulate(load, Replica(Cost(40, 1), max_rows=16), 1)
    on_clock = (records.done >= 5) & (records.done < 65)
    latency_s = float((records.done - records.meant)[on_clock].mean())
    assert on_clock.sum() / 60 * latency_s == pytest.approx(24, rel=0.03)
    assert records.counts is not None
    assert 14 < records.counts.rows / records.counts.calls <= 16


def test_the_better_the_router_knows_the_replicas_the_shorter_is_the_tail() -> None:
    load = workload("steps=1", rate=4 * 73, warmup_s=2, seconds=20)  # 0.8 of what full calls would do
    p99 = {
        routing: np.percentile(latencies_ms(load, simulate(load, Replica(Cost(40, 1), max_rows=4), 4, routing)), 99)
        for routing in ROUTINGS
    }
    assert p99["least-loaded"] < 1.03 * p99["two-choices"]
    assert p99["two-choices"] < 0.9 * p99["random"]
    assert p99["round-robin"] < 0.9 * p99["random"]


def test_what_passes_between_two_ticks_is_the_next_ones_loss_and_not_the_answers() -> None:
    """Two requests of one step that come together, one row: the second waits for the first and for what is between."""
    load = workload("steps=1", rate=0.02, arrivals="burst", burst=2, warmup_s=0, seconds=500)
    records = simulate(load, Replica(Cost(40, 0), max_rows=1, between_ms=5), 1)
    assert sorted(set(np.round(1000 * (records.done - records.meant), 3))) == [40, 85]


def test_clients_who_are_refused_in_a_closed_loop_come_back_later() -> None:
    records = simulate(workload("steps=4", clients=40, seconds=2), Replica(Cost(40, 1), 8, 8), 1)
    assert records.errors == ("429",)
    assert (records.error < 0).sum() > 10


def test_a_cell_of_many_replicas_stands_for_all_of_them() -> None:
    load, replica = workload(MIX, rate=12 * 100, warmup_s=1, seconds=5), Replica(Cost(40, 1))
    whole = latencies_ms(load, simulate(load, replica, 12, "random"))
    cell = latencies_ms(load, simulate(load, replica, 4, "random", 4 / 12))
    assert len(cell) == pytest.approx(len(whole) / 3, rel=0.05)
    assert np.percentile(cell, (50, 99)) == pytest.approx(np.percentile(whole, (50, 99)), rel=0.08)


# --- it is the engine's own scheduler


def test_refusals_are_those_of_the_engines_line_and_admission() -> None:
    burst = workload("steps=4", rate=40, arrivals="burst", burst=40, warmup_s=0, seconds=30)
    full = simulate(burst, Replica(Cost(40, 1), max_rows=8, max_waiting=8), 1)
    assert full.errors == ("429",)
    # Of a burst that finds the replica idle 8 wait; the others came when none of these had started.
    assert (full.error >= 0).mean() > 0.5


def test_a_deadline_that_cannot_be_kept_and_one_that_is_missed_end_as_the_servers_do() -> None:
    """Refused with 429 by admission, as in test_server; 504 where it was accepted, and a higher priority came."""
    never = workload("steps=4 deadline_ms=100", rate=20, warmup_s=0, seconds=0.5)
    late = simulate(never, Replica(Cost(40, 1)), 1)
    assert late.errors == ("429",)
    assert (late.error == 0).all()  # four calls of 41 ms do not fit
    bumped = workload("steps=4 deadline_ms=400:0.5, steps=8 priority=50:0.5", rate=30, warmup_s=0, seconds=9)
    assert simulate(bumped, Replica(Cost(40, 1), max_rows=8), 1).errors == ("429", "504")


def test_admission_takes_the_steps_that_fit_the_deadline() -> None:
    alone = "min_steps=1 max_steps=8 deadline_ms=204.5"
    load = workload(alone, rate=0.5, arrivals="constant", warmup_s=0, seconds=40)
    records = simulate(load, Replica(Cost(40, 1)), 1)
    assert not records.errors
    assert 1000 * (records.done - records.meant) == pytest.approx(4 * 41)


def test_priorities_go_first() -> None:
    mix = "steps=4 priority=50:0.2, steps=4 priority=0:0.8"
    load = workload(mix, rate=60, warmup_s=2, seconds=30)
    records = simulate(load, Replica(Cost(40, 1), max_rows=8, max_waiting=100_000), 1)
    latency = records.done - records.meant
    assert np.median(latency[records.kind == 0]) < 0.2 * np.median(latency[records.kind == 1])


def test_the_images_of_a_request_are_answered_together() -> None:
    load = workload("steps=2 n=6", rate=0.1, arrivals="constant", warmup_s=0, seconds=50)
    records = simulate(load, Replica(Cost(40, 1), max_rows=4), 1)
    assert 1000 * (records.done - records.meant) == pytest.approx(2 * 44 + 2 * 42)


# --- it agrees with a clock


@pytest.mark.slow
def test_a_real_engine_takes_as_long_within_15_percent(make_bundle: Callable[..., Path]) -> None:
    """The same requests at the same times, on an engine with a simulated accelerator and in the simulation.

    Calls take as much longer than the accelerator's as the machine lets them, and so they do in the simulation. In a
    round in which that was little; four are tried.
    """
    load = workload(MIX, rate=100, warmup_s=1, seconds=8)
    for _ in range(4):
        made = bench(address_of(str(make_bundle()), simulate="40+1", threads=1), load, is_quiet=True)
        server = made["server"]
        slower = server["ms_per_call"] / 1000 / Cost(40, 1).seconds(server["rows_per_call"])
        assert slower > 0.99
        if slower < 1.15 and server["call_deviation_ms"] < 8 and made["generator"]["late_p99_ms"] < 15:
            expected = latencies_ms(load, simulate(load, Replica(Cost(40 * slower, slower)), 1))
            told = made["total"]["latency_ms"]
            assert [told["p50"], told["p99"]] == pytest.approx(np.percentile(expected, (50, 99)).tolist(), rel=0.15)
            return
    pytest.skip("this machine did not keep to times for eight seconds")


def test_what_a_replica_costs_is_measured(make_bundle: Callable[..., Path]) -> None:
    """A call's time is in it, and what the machine adds; nothing less can be."""
    address = address_of(str(make_bundle()), simulate="20+1", threads=1)
    replica = measured(address, workload("steps=1, steps=4 deadline_ms=1"), seconds=0.4, max_waiting=64)
    assert replica.max_rows == 16
    assert replica.max_waiting == 64
    assert replica.default_steps == 4
    assert 0.99 * 36 <= 1000 * replica.cost.seconds(16) < 3 * 36
    assert 0 <= replica.overhead_ms < 40
    assert 0 <= replica.between_ms < 36


def test_the_line_through_measured_calls() -> None:
    rows = np.array([1.0, 4.0, 16.0])
    assert line(rows, 40 + rows).call_ms == pytest.approx(40)
    assert line(rows, np.array([50.0, 45.0, 40.0])) == Cost(45, 0)
    assert line(rows, 2 * rows - 0.5).call_ms == 0


# --- the answer


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_answer_is_the_smallest_number_that_keeps_to_the_latency(routing: Any) -> None:
    load, replica = workload(MIX, rate=400), Replica(Cost(40, 1))
    trials = {one.replicas: one for one in needed(load, replica, 300, routing)}
    answer = min(number for number, one in trials.items() if one.p99_ms <= 300)
    assert trials[answer - 1].p99_ms > 300 or answer == np.ceil(400 / most_of(load, replica))
    assert attempt(load, replica, answer, routing) == trials[answer]  # the same seed, the same figures


def test_a_million_requests_a_minute_are_planned_in_seconds() -> None:
    load, replica = workload(MIX, rate=1e6 / 60), Replica(Cost(10, 1))
    trial = attempt(load, replica, 150)
    assert trial.p50_ms < trial.p99_ms < 200
    assert trial.unanswered == 0
    assert trial.utilisation == pytest.approx(1e6 / 60 * 1.9 * 26 / 16 / 1000 / 150, rel=1e-6)


def test_requests_that_are_refused_count_as_never_answered() -> None:
    load = workload("steps=4 deadline_ms=170", rate=40)
    trial = attempt(load, Replica(Cost(40, 1)), 1)
    assert trial.unanswered > 0.01
    assert trial.p99_ms == float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("40+1 --rate 10", "--p99-ms: say the latency"),
        ("40+1 --rate 10 --p99-ms 100 --replicas 2", "one of the two"),
        ("40+1 --p99-ms 500", "--rate: needed"),
        ("40+1 --rate 10 --p99-ms 100", "--p99-ms: 100 ms are less than the 164 ms"),
        (
            "40+1 --rate 10 --p99-ms 500 --routing nearest",
            "--routing: 'nearest' is not one of least-loaded, two-choices",
        ),
        ("40+1 --rate 10 --p99-ms 99999 --mix steps=1000", "--mix: steps are 1 to 128"),
        ("40+1 --rate 10 --p99-ms 500 --arrivals nowhere", "is none of poisson, burst, constant, and no file"),
        ("4.0.0+1 --rate 10 --p99-ms 500", "simulate: '4.0.0+1' is not A+B"),
        ("nowhere --rate 10 --p99-ms 500", "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fewstep", "capacity", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("fewstep: ")
    assert message in told


def test_the_command_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("".join(f"{i / 20}\n" for i in range(2000)))
    out = tmp_path / "out" / "capacity.json"
    told = f"capacity 40+1 --arrivals {trace} --rate 100 --p99-ms 300 --routing random --json {out}"
    monkeypatch.setattr("sys.argv", ["fewstep", *told.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    held = json.loads(out.read_text())
    assert f"{held['replicas']} replicas answer 99 % of the requests within 300 ms" in capsys.readouterr().out
    assert held["load"]["seconds"] == pytest.approx(20)
    assert held["replicas"] in [one["replicas"] for one in held["trials"] if one["p99_ms"] <= 300]


def test_a_mix_without_steps_takes_the_replicas_default() -> None:
    load = Workload(kinds=(Kind("all"),), rate=1)
    assert most_of(load, Replica(Cost(40, 1), default_steps=8)) == pytest.approx(16 / 0.056 / 8)
    with pytest.raises(BenchError, match="--rate: needed"):
        list(needed(Workload(), Replica(Cost(1, 1)), 100))
