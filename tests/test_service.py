"""The service when things change or fail: an engine that ends, students that come and go, settings that are wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fewstep.server import Service, Settings, SettingsError
from fewstep.server.app import create_app

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
