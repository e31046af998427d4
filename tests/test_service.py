"""The service when things change or fail: an engine that ends, students that come and go, settings that are wrong."""

import asyncio
import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fewstep.runtime import Bundle, Engine, Tableau
from fewstep.runtime.request import SampleFuture
from fewstep.server import Service, Settings, SettingsError
from fewstep.server.app import create_app
from fewstep.server.gate import gated
from fewstep.server.keys import hashed
from fewstep.server.tables import TablesFolder

IMAGES = "/v1/images/generations"
LOAD = "/v2/repository/models/digits/load"


@pytest.fixture
def service(make_bundle: Callable[..., Path]) -> Service:
    return Service(Settings(bundles=(str(make_bundle()),), threads=1))


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service)) as client:
        yield client


def test_an_engine_that_failed_is_said_on_every_request(service: Service, client: TestClient) -> None:
    """Nobody hangs: neither who was there when it happened, nor who comes later."""
    service.engines["digits"].weight = 0.0  # which no engine can be made with
    first = client.post(IMAGES, json={"prompt": "1", "solver": "ddim", "num_inference_steps": 8})
    for answer in (first, client.post(IMAGES, json={"prompt": "1"}), client.post("/v1/jobs", json={"prompt": "1"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
        assert answer.json()["error"]["message"] == "the engine failed and takes no more requests; its log says why"
    assert client.get("/v2/health/live").status_code == 503
    assert client.post(LOAD).status_code == 503


def test_an_answer_is_the_same_by_whichever_thread(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures here are small, so that an encoder's thread would never see one."""
    body = {"prompt": "1", "seed": 5, "solver": "ddim", "num_inference_steps": 4}

    def answers() -> list[list[Any]]:
        streamed = client.post(IMAGES, json={**body, "stream": True, "partial_images": 2}).text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in streamed if line.startswith("data: ")]
        whole = client.post(IMAGES, json={**body, "n": 2}).json()["data"]
        return [whole, [event["b64_json"] for event in events]]

    on_the_loop = answers()
    monkeypatch.setattr("fewstep.server.encoders.ON_LOOP", 0)
    assert answers() == on_the_loop
    assert [len(part) for part in on_the_loop] == [2, 3]


def test_pixels_leave_with_their_request(client: TestClient) -> None:
    """And not when garbage is collected, which a server does seldom: half a gigabyte of 256 x 256 images by then."""
    gc.collect()
    gc.disable()
    try:
        for door, body in ((IMAGES, {"prompt": "1"}), ("/v2/models/digits/infer", {"parameters": {"n": 2}})):
            for _ in range(8):
                assert client.post(door, json=body).status_code == 200
        alive = sum(type(one) is SampleFuture for one in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 2  # a thread may still hold its last


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"student_weights": {"nobody": 2.0}}, "student_weights.nobody is no student; there is: digits"),
        ({"bundles": 2}, "bundles: two students are called digits; give each bundle its own name"),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    make_bundle: Callable[..., Path], said: dict[str, Any], message: str
) -> None:
    bundles = (str(make_bundle()),) * said.pop("bundles", 1)
    with pytest.raises(SettingsError) as caught:
        Service(Settings(bundles=bundles, threads=1, **said))
    assert str(caught.value) == message


def names(engine: Engine) -> list[str]:
    return [name for name, _ in engine.loaded]


def test_a_table_that_arrives_during_a_reload_is_served_after_it(
    make_bundle: Callable[..., Path], service: Service, client: TestClient
) -> None:
    table = replace(Bundle.load(make_bundle()).tableau("ddim", 4), name="mine").to_bytes()

    sent = threading.Event()

    async def slow(*_: Any) -> bytes:
        client_side.start()
        await asyncio.to_thread(sent.wait, 30)
        return table

    old = service.engines["digits"]

    def reload() -> None:
        client.post(LOAD).raise_for_status()
        sent.set()

    client_side = threading.Thread(target=reload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.server.app.read_body", slow)
        assert client.post("/v2/models/digits/tables").status_code == 200
    client_side.join()
    assert service.engines["digits"] is not old
    assert names(service.engines["digits"]) == ["mine"]


def test_a_folder_follows_the_students_that_are_served(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Each engine gets the folder's tables, whatever was before it; what is gone keeps nothing alive."""
    bundle = Bundle.load(make_bundle())
    first, other = Engine(bundle, threads=1), Engine(bundle, threads=1)
    engines = {"digits": first, "other": other}
    (tmp_path / "other").mkdir()
    for name, file in (("mine", tmp_path / "a.safetensors"), ("its", tmp_path / "other" / "b.safetensors")):
        replace(bundle.tableau("ddim", 4), name=name).save(file)
    folder = TablesFolder(tmp_path, engines, threading.Lock())
    folder.poll()
    assert (names(first), names(other)) == (["mine"], ["its"])
    del engines["digits"], engines["other"]  # unloaded
    folder.poll()
    gone = weakref.ref(first)
    del first, other
    gc.collect()
    assert gone() is None
    engines["digits"] = second = Engine(bundle, threads=1)
    folder.poll()
    assert names(second) == ["mine"]
    engines["digits"] = third = Engine(bundle, threads=1)  # reloaded, and the tables carried over
    third.load_table(second.tableau("mine", 4))
    (tmp_path / "a.safetensors").unlink()  # before the next look
    folder.poll()
    assert names(third) == []


def test_a_table_is_not_taken_as_loaded_where_a_reload_came_between(
    make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(make_bundle())
    engines = {"digits": Engine(bundle, threads=1)}
    table = replace(bundle.tableau("ddim", 4), name="mine")
    table.save(tmp_path / "a.safetensors")
    folder = TablesFolder(tmp_path, engines, threading.Lock())

    def load(_: Path) -> Tableau:
        engines["digits"] = Engine(bundle, threads=1)
        return table

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.server.tables.Tableau.load", load)
        folder.poll()
    folder.poll()
    assert names(engines["digits"]) == ["mine"]


# --- metrics


def told(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_a_reload_loses_no_work_from_the_metrics(make_bundle: Callable[..., Path]) -> None:
    of = 'model="digits",version="1"'
    running = f"nv_inference_pending_request_count{{{of}}}", f"fewstep_running_rows{{{of}}}"
    success, line = (
        f"nv_inference_request_success{{{of}}}",
        'fewstep_waiting_samples{model="digits",priority="%d",version="1"}',
    )
    settings = Settings(bundles=(str(make_bundle()),), threads=1, simulate="100+0", max_rows=2)
    with TestClient(create_app(Service(settings))) as client:
        assert told(client)[line % 0] == 0
        asked = {"prompt": "1", "n": 12, "solver": "ddim", "num_inference_steps": 2, "priority": 3}
        assert client.post("/v1/jobs", json=asked).status_code == 202
        while told(client)[running[1]] == 0:
            time.sleep(0.01)
        client.post(LOAD).raise_for_status()
        after = told(client)
        assert 8 <= sum(after[part] for part in (*running, success)) <= 12  # they move on while they are read
        assert after[line % 3] > 0
        while told(client)[success] < 12:
            time.sleep(0.05)
        client.post("/v1/images/generations", json={"prompt": "1"}).raise_for_status()
        after = told(client)
        assert after[success] == 13
        assert [after[part] for part in (*running, line % 3)] == [0, 0, 0]
        client.post("/v2/repository/models/digits/unload").raise_for_status()
        assert told(client)[success] == 13
        assert f"fewstep_max_rows{{{of}}}" not in told(client)


def test_what_a_key_may_not_have_is_counted_too(make_bundle: Callable[..., Path]) -> None:
    refused = 'nv_inference_request_failure{model="digits",reason="REJECTED",version="1"}'
    keys = {"few": {"sha256": hashed("few"), "images_per_s": 0.01, "burst": 40, "max_waiting": 4}}
    said = {"bundles": (str(make_bundle()),), "threads": 1, "simulate": "200+0", "max_rows": 1, "api_keys": keys}
    service = Service(Settings.load(None, said))
    with TestClient(gated(create_app(service), service), headers={"X-API-Key": "few"}) as client:
        answers = [client.post("/v1/jobs", json={"prompt": "1", "n": n}) for n in (8, 2, 33)]
        codes = [answer.json().get("error", {}).get("code") for answer in answers]
        assert codes == [None, "queue_full", "queue_full"]
        assert told(client)[refused] == 2 + 33
        for job in client.get("/v1/jobs").json()["data"]:
            client.delete(f"/v1/jobs/{job['id']}")
        while told(client)['fewstep_waiting_samples{model="digits",priority="0",version="1"}']:
            time.sleep(0.05)
        answer = client.post("/v1/jobs", json={"prompt": "1", "n": 33})
        assert answer.json()["error"]["code"] == "rate_limited"
        assert told(client)[refused] == 2 + 33 + 33
