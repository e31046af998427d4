"""The comparison with peers is fair: what they run makes the very images that our engine makes."""

import base64
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sampler import Ask, Sampler, Setup
from scripts import load_script

from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.pictures import encode
from fewstep.runtime.simulated import simulated

ROOT = Path(__file__).parents[1]
ASKS = [Ask(i % 10, 100 + i, (1, 4, 8, 2)[i % 4]) for i in range(9)]


@pytest.mark.parametrize("is_padded", [False, True], ids=["leave", "padded"])
@pytest.mark.parametrize("simulate", [None, "0+0"], ids=["network", "simulated"])
def test_a_peers_batch_of_any_mix_has_the_engines_bits(is_padded: bool, simulate: str | None) -> None:
    bundle = Bundle.load()
    sampler = Sampler(Setup(str(bundle.path), 0, 16, 1, simulate, is_padded=is_padded))
    engine = Engine(bundle, threads=1, backend=simulated(simulate) if simulate else None)
    requests = [Request(ask.seed, bundle.tableau(None, ask.num_steps), ask.label) for ask in ASKS]
    expected = [encode(sample.to_uint8()) for sample in engine.generate(requests)]
    for asks, images in ((ASKS, expected), (ASKS[:2], expected[:2])):  # the second batch finds what the first left
        assert [base64.b64decode(image) for image in sampler(asks)] == images


def test_a_peers_simulated_calls_take_their_time() -> None:
    sampler = Sampler(Setup(str(Bundle.load().path), 0, 16, 1, "10+1"))
    start_s = time.perf_counter()
    sampler([Ask(0, 1, 4), Ask(0, 2, 1)])
    assert time.perf_counter() - start_s >= 0.012 + 3 * 0.011


def test_a_server_that_ended_by_itself_is_no_error_when_it_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    load_script("peers").stop(process.pid)


def test_every_peer_and_scenario_names_files_and_servers_that_are_there() -> None:
    peers = load_script("peers")
    for file, flags in peers.PEERS.values():
        assert (peers.SERVERS / file).is_file()
        Setup(bundle="", port=1, max_batch=1, threads=1, **flags)
    for scenario in peers.SCENARIOS.values():
        assert set(scenario["servers"]) <= {*peers.PEERS, *peers.OURS}
    assert Path(peers.SERVERS / "requirements.txt").read_text().count("==") == 2
