"""The simulated accelerator: its calls take what they should and burn nothing, and whatever runs on it says so."""

import json
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.backends import BackendError
from fewstep.runtime.simulated import Cost, SimulatedBackend, simulated
from fewstep.server import Service, Settings


@pytest.mark.parametrize("rows", [1, 16])
def test_a_call_takes_its_cost_and_no_cpu_time(baked: Bundle, rows: int) -> None:
    cost = Cost(20, 0.5)
    backend = SimulatedBackend(baked, 16, cost)
    took, cpu_s = [], time.process_time()
    for _ in range(45):
        start_s = time.perf_counter()
        backend(rows)
        backend.device.wait()
        took.append(time.perf_counter() - start_s)
    cpu_s = time.process_time() - cpu_s
    assert min(took) >= cost.seconds(rows)
    # Most calls are on time on a machine that is idle; the quickest fifth on one that is not.
    assert np.quantile(took, 0.2) < 1.02 * cost.seconds(rows)
    assert cpu_s < 0.1 * sum(took)


def test_a_call_leaves_the_host_its_time_until_it_is_waited_for(baked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("fewstep.runtime.simulated._sleep_until", slept.append)
    backend, begin_s = SimulatedBackend(baked, 16, Cost(20, 0.5)), time.perf_counter()
    backend(16)
    assert slept == []
    backend.device.wait()
    (until_s,) = slept
    assert begin_s + 0.028 <= until_s <= time.perf_counter() + 0.028


def test_samples_are_the_same_bits_in_any_company_and_depend_on_all_they_should(baked: Bundle) -> None:
    requests = [Request(i, baked.tableau("ddim", 2 + 2 * (i % 2)), i % 10) for i in range(12)]

    def made(wanted: list[Request], max_rows: int) -> list[Any]:
        engine = Engine(baked, max_rows=max_rows, backend=simulated("0+0"))
        return [sample.pixels for sample in engine.generate(wanted)]

    alone = [made([request], 1)[0] for request in requests]
    together = made(requests, 12)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    others = [Request(0, baked.tableau("ddim", 2), 1), Request(1, baked.tableau("ddim", 2), 0)]
    for other in made(others, 2):
        assert np.isfinite(other).all()
        assert not np.array_equal(other, alone[0])


@pytest.mark.parametrize("text", ["", "fast", "1+", "1+2+3", "-1+1", "inf+1", "nan"])
def test_a_cost_that_is_none_is_refused(text: str) -> None:
    if text == "1+":
        assert Cost.parse(text) == Cost(1, 0)
        return
    with pytest.raises(BackendError, match="simulate: "):
        simulated(text)


def test_a_simulating_server_says_so_everywhere(
    serving: Callable[..., AbstractContextManager[Any]], make_bundle: Callable[..., Path]
) -> None:
    with serving(make_bundle(), "--simulate", "3+0.1", "--no-grpc") as (_, (host, port)):

        def get(path: str) -> str:
            with urllib.request.urlopen(f"http://{host}:{port}{path}") as answer:
                text: str = answer.read().decode()
            return text

        assert json.loads(get("/v1/models"))["data"][0]["simulated"] == "3 + 0.1 n ms a network call"
        assert 'fewstep_simulated_accelerator{cost="3 + 0.1 n ms a network call"} 1.0' in get("/metrics")
        assert json.loads(get("/v2/models/digits"))["platform"] == "fewstep-simulated"
        assert json.loads(get("/v2/models/digits/config"))["platform"] == "fewstep-simulated"


def test_a_server_that_does_not_simulate_says_nothing_of_it(make_bundle: Callable[..., Path]) -> None:
    service = Service(Settings(bundles=(str(make_bundle()),), threads=1))
    assert service.simulated is None
