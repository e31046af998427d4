"""Tables as artefacts: looked at, compared, put into bundles, and loaded into a student that is running."""

import itertools
import json
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.runtime import Bundle, Engine, EngineThread, Request, Sample, Tableau, TableauError
from fewstep.runtime.engine import MAX_LOADED
from fewstep.runtime.schedules import flow, karras
from fewstep.runtime.solvers import ddim, dpmpp_2m, flow_euler, ipndm
from fewstep.server import Service, Settings, SettingsError, create_app
from fewstep.server.tables import TablesFolder


def version(number: int, steps: int = 3) -> Tableau:
    """A table whose rows and so whose samples and hash are like no other number's."""
    learned = ddim(karras(steps, 0.05 + 0.01 * number, 20.0))
    return replace(learned, name="learned", provenance={"number": str(number)})


def with_header(tableau: Tableau, **entries: Any) -> bytes:
    """A table's file with other entries in its header, which no `Tableau` would write."""
    data = tableau.to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fewstep_tableau"]) | entries
    return safetensors.numpy.save(safetensors.numpy.load(data), {"fewstep_tableau": json.dumps(header)})


def misfits(bundle: Bundle) -> list[tuple[Tableau, str]]:
    return [
        (replace(version(0), weights_sha256="0" * 64), "was fitted to weights 000000000000"),
        (flow_euler(flow(3)), "not on the ve path"),
        (replace(version(0), weights_sha256=bundle.weights_sha256[:-1] + "x"), "was fitted to weights"),
    ]


# --- the engine


def test_a_loaded_table_is_served_and_the_bundle_stays_as_it_is(baked: Bundle) -> None:
    engine = Engine(baked, threads=1)
    before = dict(baked.tableaus)
    assert engine.load_table(version(1)) is None
    assert engine.tableau("learned", 3) == engine.tableaus["learned", 3]
    replaced = engine.load_table(version(2))
    assert replaced is not None
    assert replaced.sha256 == version(1).sha256
    assert baked.tableaus == before


def test_a_table_over_the_bundles_own_gives_way_to_it_again(baked: Bundle) -> None:
    engine = Engine(baked, threads=1)
    mine = replace(ddim(karras(4, 0.1, 10.0)), name="ddim")
    own = engine.load_table(mine)
    assert own is baked.tableaus["ddim", 4]
    assert engine.tableau("ddim", 4) is mine
    assert engine.unload_table("ddim", 4) is mine
    assert engine.tableau("ddim", 4) is own
    with pytest.raises(KeyError):
        engine.unload_table("ddim", 4)


def test_a_refused_table_leaves_everything_as_it_was(baked: Bundle) -> None:
    engine = Engine(baked, threads=1)
    engine.load_table(version(1))
    before = dict(engine.tableaus)
    for tableau, reason in misfits(baked):
        with pytest.raises(TableauError, match=reason):
            engine.load_table(tableau)
    assert engine.tableaus == before


def test_a_request_ends_on_the_table_it_began_with(baked: Bundle) -> None:
    """Running, its rows move about in the packed table as others come and go, and become deeper."""
    make: Callable[[], Engine] = lambda: Engine(baked, max_rows=4, threads=1)  # noqa: E731
    request = Request(7, version(0, steps=8), 3)
    (alone,) = make().generate([request])
    engine = make()
    engine.load_table(request.tableau)
    (future,) = engine.submit([request])
    for number in range(1, 8):
        assert engine.step()
        engine.load_table(version(number, steps=8))
        engine.load_table(version(number, steps=1 + number % 4))
        engine.submit([Request(number, ipndm(karras(5), 1 + number % 4), 1)])
    while engine.step():
        pass
    assert np.array_equal(future.result().pixels, alone.pixels)
    assert future.result().request.tableau.sha256 == version(0, steps=8).sha256


def test_rows_of_tables_no_longer_used_are_freed(baked: Bundle) -> None:
    """However often a table is replaced, and however many are used once."""
    engine = Engine(baked, threads=1)
    sizes = set()
    for number in range(40):
        engine.load_table(version(number))
        engine.generate([Request(1, engine.tableau("learned", 3), 1)])
        engine.generate([Request(1, version(1000 + number), 1)])
        sizes.add(len(engine._times))
    served = sum(tableau.num_steps + 1 for tableau in engine.tableaus.values())
    assert max(sizes) <= served + 2 * (3 + 1)
    assert set(engine._rows_of) == set(engine._packed)


def test_loaded_tables_are_bounded(baked: Bundle) -> None:
    engine = Engine(baked, threads=1)
    many = replace(version(0))
    engine._serve({("t", i): many for i in range(MAX_LOADED)})
    with pytest.raises(TableauError, match="are loaded already"):
        engine.load_table(version(1))


def test_swaps_under_load_mix_nothing_and_drop_nothing(baked: Bundle) -> None:
    """Each of many requests equals, bit by bit, what the table it names gives it alone."""
    versions = [version(number, steps=4) for number in range(6)]
    alone: dict[tuple[str, int], Any] = {}
    reference = Engine(baked, max_rows=4, threads=1)
    for tableau, seed in itertools.product(versions, range(5)):
        (sample,) = reference.generate([Request(seed, tableau, seed)])
        alone[tableau.sha256, seed] = sample.pixels
    engine = Engine(baked, max_rows=8, max_waiting=4096, threads=1)
    engine.load_table(versions[0])
    thread = EngineThread([engine])
    thread.start()
    futures: list[tuple[int, Future[Sample]]] = []
    done = threading.Event()

    def swap() -> None:
        for number in itertools.count():
            if done.is_set():
                return
            engine.load_table(versions[number % len(versions)])
            for tableau, _ in misfits(baked):
                with pytest.raises(TableauError):
                    engine.load_table(tableau)
            time.sleep(0.001)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for i in range(300):
            tableau = engine.tableau("learned", 4)
            futures += [(i % 5, engine.submit([Request(i % 5, tableau, i % 5)])[0])]
            time.sleep(0.0005)
        samples = [(seed, future.result(timeout=60)) for seed, future in futures]
    finally:
        done.set()
        swapping.join()
        thread.stop()
    for seed, sample in samples:
        assert np.array_equal(sample.pixels, alone[sample.request.tableau.sha256, seed])
    assert len({sample.request.tableau.sha256 for _, sample in samples}) > 1
    assert engine.counters.finished == 300


# --- over HTTP


@pytest.fixture
def client(make_bundle: Callable[..., Path]) -> Iterator[TestClient]:
    with TestClient(create_app(Service(Settings(bundles=(str(make_bundle()),), threads=1)))) as client:
        yield client


TABLES = "/v2/models/digits/tables"


def image(client: TestClient, **asked: Any) -> dict[str, Any]:
    answer = client.post("/v1/images/generations", json={"prompt": "3", "seed": 5, "solver": "learned", **asked})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_posted_table_is_served_at_once(client: TestClient) -> None:
    first, second = version(1), version(2)
    assert client.post(TABLES, content=first.to_bytes()).json() == {
        "model": "digits", "solver": "learned", "num_steps": 3, "stochastic": False, "loaded": True,
        "sha256": first.sha256, "replaced_sha256": None,
    }  # fmt: skip
    before = image(client)
    assert before["tableau_sha256"] == first.sha256
    assert client.post(TABLES, content=second.to_bytes()).json()["replaced_sha256"] == first.sha256
    after = image(client)
    assert after["tableau_sha256"] == second.sha256
    assert after["data"] != before["data"]
    for listed in (client.get(TABLES).json()["tables"], client.get("/v1/models").json()["data"][0]["tableaus"]):
        assert [t["sha256"] for t in listed if t["loaded"]] == [second.sha256]
    removed = client.delete(f"{TABLES}/learned/3").json()
    assert (removed["removed_sha256"], removed["sha256"]) == (second.sha256, None)
    assert client.post("/v1/images/generations", json={"prompt": "3", "solver": "learned"}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", TABLES, b"", 400, "is not a fewstep table"),
        ("POST", TABLES, version(0).to_bytes()[:-8], 400, "is not a fewstep table"),
        ("POST", TABLES, replace(version(0), weights_sha256="1" * 64).to_bytes(), 400, "was fitted to weights 1111"),
        ("POST", TABLES, with_header(version(0), start=10**400), 400, "start 1000"),
        ("POST", TABLES, with_header(version(0), clip=[-1, 10**400]), 400, "clip has a bound that is too large"),
        ("POST", TABLES, with_header(version(0), provenance={"seed": 7}), 400, "provenance: 'seed' is 7, not a text"),
        ("POST", TABLES, bytes(2 << 20), 413, "larger than"),
        ("POST", "/v2/models/nobody/tables", version(0).to_bytes(), 404, "'nobody' is not served"),
        ("GET", "/v2/models/nobody/tables", None, 404, "'nobody' is not served"),
        ("DELETE", f"{TABLES}/ddim/4", None, 404, "belongs to the bundle"),
        ("DELETE", f"{TABLES}/nothing/4", None, 404, "is not loaded"),
        ("DELETE", f"{TABLES}/ddim/four", None, 400, "no number of steps"),
    ],
)
def test_what_is_refused_says_why_and_changes_nothing(
    client: TestClient, method: str, path: str, body: bytes | None, status: int, said: str
) -> None:
    before = client.get(TABLES).json()
    answer = client.request(method, path, content=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]  # one line, as of all paths below /v2
    assert client.get(TABLES).json() == before
    assert client.post(TABLES, content=version(1).to_bytes()).status_code == 200
    assert image(client)["tableau_sha256"] == version(1).sha256


# --- a watched folder


def test_a_folder_is_followed(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """What appears is served, what changes is replaced, what goes is gone, what is wrong changes nothing."""
    engine = Engine(Bundle.load(make_bundle()), threads=1)
    other = Engine(Bundle.load(make_bundle()), threads=1)
    (tmp_path / "second").mkdir()
    folder = TablesFolder(tmp_path, {"first": engine, "second": other}, threading.Lock())
    file = tmp_path / "a.safetensors"
    version(1).save(file)
    version(9).save(tmp_path / "second" / "b.safetensors")
    folder.poll()
    assert [table.sha256 for table in engine.loaded.values()] == [version(1).sha256]
    assert [table.sha256 for table in other.loaded.values()] == [version(9).sha256]
    version(2).save(file)
    folder.poll()
    assert engine.tableau("learned", 3).sha256 == version(2).sha256
    file.write_bytes(b"half a ta")
    folder.poll()
    assert engine.tableau("learned", 3).sha256 == version(2).sha256
    version(3, steps=5).save(file)
    folder.poll()
    assert list(engine.loaded) == [("learned", 5)]
    file.unlink()
    folder.poll()
    assert not engine.loaded
    assert other.loaded


def test_the_folder_is_looked_at_every_second(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    settings = Settings(bundles=(str(make_bundle()),), threads=1, tables_folder=tmp_path)
    with TestClient(create_app(Service(settings))) as client:
        version(4).save(tmp_path / "a.safetensors")
        for _ in range(100):
            if any(table["loaded"] for table in client.get(TABLES).json()["tables"]):
                break
            time.sleep(0.1)
        assert image(client)["tableau_sha256"] == version(4).sha256


@pytest.mark.parametrize("name", ["tables_folder", "repository"])
def test_a_folder_that_is_not_there_is_said_at_the_door(
    make_bundle: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(SettingsError, match=f"{name}: there is no folder"):
        Service(Settings.model_validate({"bundles": (str(make_bundle()),), name: tmp_path / "nowhere"}))


# --- by the command line


def fewstep(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_show_check_and_diff(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    version(1).save(one)
    version(2).save(two)
    status, shown = fewstep("table", "show", one)
    assert status == 0
    assert version(1).sha256[:20] in shown
    assert fewstep("table", "check", one, "--bundle", make_bundle()) == (
        0,
        f"{one}: learned with 3 steps fits digits\n",
    )
    assert fewstep("table", "diff", one, one)[0] == 0
    status, said = fewstep("table", "diff", one, two)
    assert status == 1
    assert "sigma[2]: 0.06 -> 0.07 (+0.01)" in said
    assert "provenance number: 1 -> 2" in said
    replace(version(1), weights_sha256="2" * 64).save(two)
    status, said = fewstep("table", "check", two, "--bundle", make_bundle())
    assert status == 2


def test_tables_are_added_to_a_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    """New ones, and over one of the same name; a misfit changes nothing."""
    version(1).save(tmp_path / "new.safetensors")
    mine = dpmpp_2m(karras(4, 0.1, 10.0))
    mine.save(tmp_path / "mine.safetensors")
    before = len(Bundle.load(bundle_copy).tableaus)
    status, _ = fewstep("table", "add", bundle_copy, tmp_path / "new.safetensors", tmp_path / "mine.safetensors")
    assert status == 0
    after = Bundle.load(bundle_copy)
    assert len(after.tableaus) == before + 1
    assert after.tableaus["dpmpp_2m", 4].sha256 == mine.sha256
    assert after.tableau(num_steps=4).name == "ancestral"
    assert fewstep("table", "add", bundle_copy, tmp_path / "mine.safetensors", "--default")[0] == 0
    after = Bundle.load(bundle_copy)
    assert after.tableau(num_steps=4).sha256 == mine.sha256
    assert after.tableau(num_steps=8).name == "ancestral"
    replace(version(2), weights_sha256="3" * 64).save(tmp_path / "bad.safetensors")
    result = CliRunner().invoke(app, ["table", "add", str(bundle_copy), str(tmp_path / "bad.safetensors")])
    assert isinstance(result.exception, TableauError)
    assert Bundle.load(bundle_copy).tableaus.keys() == after.tableaus.keys()


def test_where_tables_cannot_be_written_the_bundle_stays_what_it_was(bundle_copy: Path, tmp_path: Path) -> None:
    """The system lets no file grow past the size of the first table: the second one does not fit."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    dpmpp_2m(karras(4, 0.1, 10.0)).save(first)
    dpmpp_2m(karras(64, 0.1, 10.0)).save(second)
    limit = first.stat().st_size
    assert second.stat().st_size > limit
    files = {file: file.read_bytes() for file in bundle_copy.rglob("*") if file.is_file()}
    process = subprocess.run(
        [sys.executable, "-m", "fewstep", "table", "add", bundle_copy, first, second], capture_output=True,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    said = f"fewstep: {bundle_copy}: the tables cannot be written: File too large; nothing was changed\n"
    assert (process.returncode, process.stderr) == (2, said)
    assert {file: file.read_bytes() for file in bundle_copy.rglob("*") if file.is_file()} == files
