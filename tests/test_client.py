"""`fewstep.Client` and `fewstep.AsyncClient` against a server in a process of its own."""

import asyncio
import io
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.client import Choices, FinishedImage, Preview
from fewstep.runtime import Bundle, Engine, Request
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import dpmpp_2m
from fewstep.server.keys import hashed

Serving = Callable[..., AbstractContextManager[tuple[Any, tuple[str, int]]]]
CHOICES: Choices = {"solver": "ddim", "num_inference_steps": 4, "seed": 7, "n": 2}
ADMIN, READER = "an admin's key", "another's key"


@pytest.fixture(scope="module")
def url(serving: Serving, make_bundle: Callable[..., Path]) -> Iterator[str]:
    """A server with two students whose calls take 20 ms, with API keys."""
    keys = {"root": {"sha256": hashed(ADMIN), "admin": True}, "ann": {"sha256": hashed(READER)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_API_KEYS", json.dumps(keys))
        bundles = make_bundle(), make_bundle(is_guided=True)
        with serving(*bundles, "--simulate", "20+0", "--max-rows", "2", "--no-grpc") as (_, address):
            yield f"http://{address[0]}:{address[1]}"


@pytest.fixture
def client(url: str) -> Iterator[fewstep.Client]:
    with fewstep.Client(url, api_key=ADMIN, timeout_s=60) as client:
        yield client


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def test_a_choice_of_solver_and_steps_is_what_comes(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.load(make_bundle())
    (sample,) = Engine(bundle, threads=1).generate([Request(7, bundle.tableau("ddim", 4), 3)])
    with (
        serving(make_bundle(), "--no-grpc") as (_, (host, port)),  # the real network
        fewstep.Client(f"http://{host}:{port}") as client,
    ):
        answer = client.generate("digit 3", **CHOICES)
    with Image.open(io.BytesIO(answer.images[0].data)) as image:
        assert np.array_equal(np.asarray(image), sample.to_uint8()[:, :, 0])
    assert (answer.model, answer.solver, answer.num_inference_steps) == ("digits", "ddim", 4)
    assert [image.seed for image in answer.images] == [7, 8]
    assert answer.timings["run_ms"] > 0


def test_a_stream_is_previews_and_images_of_the_same_bits(client: fewstep.Client) -> None:
    events = list(client.stream("3", partial_images=2, **CHOICES))
    previews = [event for event in events if isinstance(event, Preview)]
    images = {event.image_index: event.data for event in events if isinstance(event, FinishedImage)}
    assert sorted((preview.image_index, preview.step) for preview in previews) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert {size_of(event.data) for event in events} == {(8, 8)}
    assert [images[0], images[1]] == [image.data for image in client.generate("3", **CHOICES).images]


def test_a_stream_that_is_left_is_cancelled(client: fewstep.Client) -> None:
    stream = client.stream("3", partial_images=8, n=64, num_inference_steps=8)
    assert isinstance(next(stream), Preview)
    stream.close()  # type: ignore[attr-defined]
    answer = client.generate("3", num_inference_steps=1)
    assert answer.timings["queue_ms"] < 2500  # what was left is at least 250 calls of 20 ms


def test_a_job_is_submitted_waited_for_and_the_same_when_asked_twice(client: fewstep.Client) -> None:
    job = client.submit("3", id="twice", **CHOICES)
    assert client.submit("3", id="twice", **CHOICES).id == job.id == "twice"
    answer = client.wait(job, timeout_s=60)
    assert answer.images == client.generate("3", **CHOICES).images
    assert client.job("twice").is_over
    assert "twice" in [one.id for one in client.jobs()]
    with pytest.raises(fewstep.ClientError, match="409: id: twice is another job") as error:
        client.submit("4", id="twice")
    assert (error.value.status, error.value.field, error.value.code) == (409, "id", "job_exists")
    assert client.submit("3").id != client.submit("3").id


def test_a_job_is_cancelled_and_a_wait_ends(client: fewstep.Client) -> None:
    jobs = [client.submit("3", n=64, num_inference_steps=8) for _ in range(2)]
    assert client.job(jobs[1]).status == "queued"
    assert (client.job(jobs[1]).queue_position or 0) > 0
    with pytest.raises(TimeoutError, match=f"job {jobs[1].id} is not over after 0.05 s"):
        client.wait(jobs[1], timeout_s=0.05)
    assert [client.cancel(job).status for job in jobs] == ["cancelled"] * 2
    with pytest.raises(fewstep.ClientError, match=f"^job {jobs[0].id} cancelled: it has no images$"):
        client.wait(jobs[0])
    with pytest.raises(fewstep.ClientError, match="409: id: the job cancelled already"):
        client.cancel(jobs[0])


def test_tables_are_loaded_listed_and_taken_away(client: fewstep.Client, tmp_path: Path) -> None:
    tableau = dpmpp_2m(karras(6))
    tableau.save(tmp_path / "t.safetensors")
    table = client.load_table("digits", tmp_path / "t.safetensors")
    assert (table.solver, table.num_steps, table.sha256, table.loaded) == ("dpmpp_2m", 6, tableau.sha256, True)
    assert client.load_table("digits", (tmp_path / "t.safetensors").read_bytes()) == table
    assert table in client.tables("digits")
    assert client.generate("3", solver="dpmpp_2m", num_inference_steps=6).tableau_sha256 == tableau.sha256
    client.unload_table("digits", "dpmpp_2m", 6)
    assert table not in client.tables("digits")
    with pytest.raises(fewstep.ClientError, match="404: dpmpp_2m with 6 steps is not loaded"):
        client.unload_table("digits", "dpmpp_2m", 6)
    with pytest.raises(fewstep.ClientError, match="400: table: is not a fewstep table"):
        client.load_table("digits", b"no table")


def test_aliases_are_set_moved_and_removed(client: fewstep.Client) -> None:
    client.set_alias("blue one", {"digits": 1, "digits-guided": 0})
    assert client.generate("3", model="blue one", num_inference_steps=1).model == "digits"
    client.set_alias("blue one", "digits-guided")
    models = {model.id: model for model in client.models()}
    assert models["blue one"].alias_of == {"digits-guided": 1.0}
    assert models["digits"].labels[3] == "digit 3"
    assert ("ddim", 4) in [(table.solver, table.num_steps) for table in models["digits"].tables]
    with pytest.raises(fewstep.ClientError, match=r"^400: config: aliases\.blue one: nobody is not served$"):
        client.set_alias("blue one", "nobody")
    client.remove_alias("blue one")
    assert "blue one" not in [model.id for model in client.models()]


def test_what_is_wrong_is_one_error_with_status_field_and_message(client: fewstep.Client, url: str) -> None:
    with pytest.raises(fewstep.ClientError) as error:
        client.generate("3", solver="magic")
    assert (error.value.status, error.value.field) == (400, "solver")
    assert error.value.message.startswith("solver: digits has no table for magic")
    with pytest.raises(fewstep.ClientError, match="steps_ is not a field"):
        client.generate("3", steps_=4)  # type: ignore[call-arg]
    with pytest.raises(fewstep.ClientError, match="400: prompt: 'shoe'"):
        next(iter(client.stream("shoe")))
    with pytest.raises(fewstep.ClientError) as error:
        client.generate("3", deadline_ms=1)
    assert (error.value.status, error.value.code) == (429, "deadline_infeasible")
    assert error.value.retry_after_s is None  # it would never fit
    with fewstep.Client(url, api_key=READER) as reader:
        assert reader.generate("3", num_inference_steps=1).images
        with pytest.raises(fewstep.ClientError, match=r"^403: "):
            reader.set_alias("mine", "digits")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with fewstep.Client(nobody) as lost, pytest.raises(fewstep.ClientError, match=f"^{nobody}: ") as error:
        lost.models()
    assert error.value.status is None


def test_the_async_client_does_the_same(client: fewstep.Client, url: str, tmp_path: Path) -> None:
    dpmpp_2m(karras(6)).save(tmp_path / "t.safetensors")

    async def use() -> None:
        async with fewstep.AsyncClient(url, api_key=ADMIN, timeout_s=60) as ours:
            job, answer = await asyncio.gather(ours.submit("3", **CHOICES), ours.generate("3", **CHOICES))
            assert (await ours.wait(job, timeout_s=60)).images == answer.images
            assert job.id in [one.id for one in await ours.jobs()]
            events = [event async for event in ours.stream("3", partial_images=1, **CHOICES)]
            assert [type(event) for event in events].count(Preview) == 2
            assert {event.data for event in events if isinstance(event, FinishedImage)} == {
                image.data for image in answer.images
            }
            async with aclosing(ours.stream("3", partial_images=8, n=64, num_inference_steps=8)) as stream:
                assert isinstance(await anext(stream), Preview)
            long = await ours.submit("3", n=64, num_inference_steps=8)
            assert (await ours.cancel(long)).status == "cancelled"
            await ours.set_alias("blue", "digits")
            assert "blue" in [model.id for model in await ours.models()]
            await ours.remove_alias("blue")
            table = await ours.load_table("digits", tmp_path / "t.safetensors")
            assert table in await ours.tables("digits")
            await ours.unload_table("digits", "dpmpp_2m", 6)
            with pytest.raises(fewstep.ClientError, match="400: solver: "):
                await ours.generate("3", solver="magic")
            with pytest.raises(fewstep.ClientError, match="400: solver: "):
                await anext(ours.stream("3", solver="magic"))
            with pytest.raises(fewstep.ClientError, match="404: "):
                await ours.wait("nothing")

    asyncio.run(use())


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(fewstep.Client) == public(fewstep.AsyncClient)


def test_importing_fewstep_imports_no_client(tmp_path: Path) -> None:
    loaded = "print('httpx' in sys.modules, 'pydantic' in sys.modules)"
    code = f"import sys, fewstep; {loaded}; fewstep.Client; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "True"]
    (tmp_path / "httpx.py").write_text("raise ImportError('no httpx here')")
    refused = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fewstep; fewstep.Client"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "fewstep's clients need pip install 'fewstep[client]' (no httpx here)" in refused.stderr


def test_the_snippet_of_the_documentation_runs(url: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "client.md").read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    dpmpp_2m(karras(6)).save(tmp_path / "learned.safetensors")
    for snippet in snippets:
        code = snippet.replace('"http://localhost:8000"', f'"{url}", api_key="{ADMIN}"')
        code = code.replace("Sneaker", "digit 3").replace("fashion-mnist-mm4", "digits")
        code = code.replace("fashion-mnist-consistency", "digits-guided")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(snippets) == 2
    assert size_of((tmp_path / "first.png").read_bytes()) == (8, 8)
