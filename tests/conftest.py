"""What several test files need: small real students, each exported once a session."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fewstep.export import onnx_file, write_bundle
from fewstep.runtime import Bundle, Tableau
from fewstep.runtime.bundle import MANIFEST, NETWORK, write_manifest
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import ancestral, ddim, dpmpp_2m, heun
from fewstep.training.network import NetworkConfig, UNet

SAMPLE_SHAPE = (1, 8, 8)

# Files whose tests start other programs (servers, stock clients, Triton, Ray, a browser) and wait for them on a clock.
# On a busy machine such a test may fail for no fault of the code, so it has a second try, and the report says "RERUN".
# What is computed in the test's own process has one try.
WITH_OTHER_PROGRAMS = {
    "test_bench",
    "test_client",
    "test_connection",
    "test_crashes",
    "test_deploy",
    "test_end_to_end",
    "test_export_additions",
    "test_failures",
    "test_hooks",
    "test_jobs",
    "test_kubernetes",
    "test_limits",
    "test_operations",
    "test_page",
    "test_peers",
    "test_previews",
    "test_proofs",
    "test_protocols",
    "test_ray",
    "test_server",
    "test_service",
    "test_simulated",
    "test_training",
    "test_triton",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that wait for other programs their second try."""
    for item in items:
        if item.path.stem in WITH_OTHER_PROGRAMS:
            item.add_marker(pytest.mark.flaky(reruns=1))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def ask(address: tuple[str, int], method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    """Status and JSON of an answer, on a connection of its own."""
    status, content, _ = exchange(address, method, path, body, {"X-API-Key": key} if key else None)
    return status, json.loads(content or b"null")


def exchange(
    address: tuple[str, int], method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers of an answer; ``body`` is sent as JSON, or as it is where it is bytes."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a student's folder: ``make_bundle(is_guided=False, seed=0, nan_label=None, is_large=False)``.

    The same arguments give the same folder, so a test that alters one copies it first (see `bundle_copy`).
    ``is_guided`` asks for classifier-free guidance from 1 to 5; ``nan_label`` is a label that the network
    answers with NaN; ``is_large`` keeps the weights beside the ONNX file, as those of gigabytes are.
    """
    made: dict[tuple[bool, int, int | None, bool], Path] = {}

    def make(is_guided: bool = False, seed: int = 0, nan_label: int | None = None, is_large: bool = False) -> Path:
        key = (is_guided, seed, nan_label, is_large)
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / "student"
            if nan_label is not None:
                shutil.copytree(make(is_guided, seed, is_large=is_large), out)
                poison_label(out, nan_label)
            elif is_guided:  # the same network, asked twice: only the manifest says so
                shutil.copytree(make(False, seed, is_large=is_large), out)
                metrics = Bundle.load(out).manifest.metrics
                write_manifest(out, fields(is_guided=True) | {"metrics": metrics})
            else:
                torch.set_num_threads(1)
                notice = {"NOTICE": b"Made for a test.\n"}
                with pytest.MonkeyPatch.context() as patch:
                    if is_large:
                        patch.setattr(onnx_file, "_OUTSIDE", 0)
                    write_bundle(out, network(seed), tables(), fields(is_guided=False), extra_files=notice)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def baked(make_bundle: Callable[..., Path]) -> Bundle:
    """A student that runs once a step: its guidance is in the weights."""
    return Bundle.load(make_bundle())


@pytest.fixture(scope="session")
def guided(make_bundle: Callable[..., Path]) -> Bundle:
    """A student with classifier-free guidance, 1 to 5."""
    return Bundle.load(make_bundle(is_guided=True))


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[tuple["subprocess.Popen[str]", tuple[str, int]]]]:
    """Serve bundles, with further flags, in a process of its own: gives the process and (host, port), and stops it."""
    return _serving


@pytest.fixture
def bundle_copy(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A student's folder to spoil."""
    return Path(shutil.copytree(make_bundle(), tmp_path / "student"))


def tables() -> list[Tableau]:
    """One table of each solver at several step counts, on EDM's levels."""
    built = [solver(karras(steps)) for solver in (ancestral, ddim, dpmpp_2m) for steps in (1, 2, 3, 4, 8)]
    return [*built, heun(karras(2)), heun(karras(4))]


def network(seed: int) -> UNet:
    """A network whose every weight is random, so that every input reaches the output."""
    net = UNet(NetworkConfig(SAMPLE_SHAPE, num_classes=10, channels=8, blocks=1, patch=2, fine_channels=8, heads=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return net


def fields(is_guided: bool) -> dict[str, Any]:
    """The manifest's fields, all but those that `write_bundle` fills in."""
    return {
        "name": "digits-guided" if is_guided else "digits",
        "version": "1",
        "description": "Random weights, for tests.",
        "sample_shape": SAMPLE_SHAPE,
        "path": "ve",
        "output": {"type": "edm", "sigma_data": 0.5},
        "labels": {"names": [f"digit {i}" for i in range(10)], "null": 10},
        "guidance": {"mode": "classifier-free", "default": 2.0, "minimum": 1.0, "maximum": 5.0} if is_guided else {},
        "default_tableau": {"solver": "ancestral", "num_steps": 4},
        "licence": "CC0-1.0",
        "provenance": {"weights": "random"},
        "metrics": {},
    }


def poison_label(path: Path, label: int) -> None:
    """Set one row of the label embedding to NaN, and make the manifest agree with the file."""
    model = onnx.load(path / NETWORK)
    (embedding,) = [w for w in model.graph.initializer if w.name.startswith("label.weight")]
    weights = numpy_helper.to_array(embedding).copy()
    weights[label] = np.nan
    embedding.CopyFrom(numpy_helper.from_array(weights, embedding.name))
    onnx.save(model, path / NETWORK)
    manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    del manifest["format"], manifest["files"]
    write_manifest(path, manifest)


@contextmanager
def _serving(*arguments: str | Path) -> Iterator[tuple["subprocess.Popen[str]", tuple[str, int]]]:
    command = [sys.executable, "-m", "fewstep", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r" at https?://([\d.]+):(\d+) ", line)
        assert found, process.stderr.read() if process.stderr else line
        yield process, (found[1], int(found[2]))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    folder = tmp_path_factory.mktemp("tls")
    pair = folder / "cert.pem", folder / "key.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-days", "2", "-out", str(pair[0]), "-keyout", str(pair[1])]
    subprocess.run([*new, *names, *files], check=True, capture_output=True)
    return pair
