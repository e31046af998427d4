"""The examples in docs/deploy say what is there: metrics, flags, settings."""

import http.client
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fewstep.server import Settings

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"
CLI = [sys.executable, "-m", "fewstep"]
Serving = Callable[..., AbstractContextManager[tuple[Any, tuple[str, int]]]]


def test_the_dashboard_asks_for_metrics_that_there_are(serving: Serving, make_bundle: Callable[..., Path]) -> None:
    """Each with the labels it selects and groups by; Prometheus scrapes the path that is served."""
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    path = job.get("metrics_path", "/metrics")
    with serving(make_bundle(), "--no-grpc", "--max-rows", "1") as (_, address):
        connection = http.client.HTTPConnection(*address, timeout=60)
        body = {"prompt": "1", "n": 64, "solver": "heun", "num_inference_steps": 7}
        connection.request("POST", "/v1/jobs", json.dumps(body))
        connection.getresponse().read()
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
    there = {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    }
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [one["definition"] for one in dashboard["templating"]["list"] if "definition" in one]
    assert len(asked) >= 12
    for expression in asked:
        metrics = set(re.findall(r"\b(?:nv|fewstep)_\w+", expression))
        assert metrics
        for metric in metrics:
            assert metric in there, expression
        words = set(re.findall(r"(\w+)=[~\"]", expression))
        for group in re.findall(r"by \(([^)]*)\)", expression):
            words |= {word.strip() for word in group.split(",")}
        assert words <= set.union(*(there[metric] for metric in metrics)), expression
    unused = {name for name in there if name.startswith(("nv_inference_", "fewstep_"))} - {
        metric for expression in asked for metric in re.findall(r"\b(?:nv|fewstep)_\w+", expression)
    }
    assert {name for name in unused if not re.search(r"_duration_seconds_(sum|count)$", name)} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_unit_is_one_that_systemd_takes_and_its_command_one_of_ours(tmp_path: Path) -> None:
    text = (DEPLOY / "fewstep.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    program, *arguments = shlex.split(command)
    assert program.endswith("/fewstep")
    config = tmp_path / "fewstep.toml"
    config.write_text("port = 9\n")
    arguments = [str(config) if argument.endswith(".toml") else argument for argument in arguments]
    done = subprocess.run([*CLI, *arguments, "--print-config"], capture_output=True, text=True, check=True)
    assert "port = 9\n" in done.stdout
    assert 'log_format = "json"\n' in done.stdout
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert int(stop_s) > Settings().drain_timeout_s
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    unit = tmp_path / "fewstep.service"
    unit.write_text(text.replace(program, sys.executable))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_images_environment_and_commands_are_ours(tmp_path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    environment = dict(pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.M) for pair in line.split())
    settings = Settings.load(None, {}, environment)
    assert settings.host == "0.0.0.0"
    (exposed,) = re.findall(r"^EXPOSE (.*)$", text, re.M)
    assert exposed.split() == [str(settings.port), str(settings.port + 1)]
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.M)
    assert json.loads(entry) == ["fewstep", "serve"]
    (first,) = re.findall(r"^RUN fewstep (.*)$", text, re.M)
    picture = tmp_path / "first.png"
    command = [*CLI, *shlex.split(first.replace("/tmp/first.png", str(picture)))]
    subprocess.run(command, check=True, capture_output=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_images_context_has_all_that_is_installed() -> None:
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    root = DEPLOY.parents[1]
    assert all((root / name).exists() for name in kept)
    links = [path for path in (root / "src" / "fewstep").iterdir() if path.is_symlink()]
    assert {link.resolve().relative_to(root).as_posix() for link in links} <= kept
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"} <= kept
