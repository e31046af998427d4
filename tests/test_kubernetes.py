"""The Kubernetes manifests: valid by Kubernetes' own schemas, and agreed with themselves and with the server."""

import copy
import json
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kserve_schemas import Schemas

from fewstep.deploy.triton_repository import REQUIREMENTS

FOLDER = Path(__file__).parents[1] / "deploy" / "kubernetes"
MANIFESTS = list(yaml.safe_load_all((FOLDER / "triton.yaml").read_text()))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[manifest["kind"] for manifest in MANIFESTS])
def test_a_manifest_is_valid(manifest: dict[str, Any]) -> None:
    """Strictly: a field that Kubernetes does not know is an error, as is one that is missing."""
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_the_schemas_refuse_a_field_that_is_none() -> None:
    manifest = MANIFESTS[0] | {"spec": MANIFESTS[0]["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_the_parts_find_each_other() -> None:
    deployment, service, scaler, budget = MANIFESTS
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}  # Triton's own
    mounted = {volume["name"] for volume in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}


def test_the_image_has_what_students_need() -> None:
    (line,) = (line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line.startswith("RUN pip"))
    assert {word.strip('"').split("<")[0] for word in line.split()[4:]} == set(REQUIREMENTS)


# --- KServe

KSERVE = list(yaml.safe_load_all((FOLDER / "kserve.yaml").read_text()))
KINDS = {
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}


@pytest.fixture(scope="module")
def kserve(tmp_path_factory: pytest.TempPathFactory) -> Schemas:
    return Schemas(tmp_path_factory.mktemp("kserve"))


@pytest.mark.parametrize("manifest", KSERVE, ids=[f"{one['kind']}-{one['metadata']['name']}" for one in KSERVE])
def test_a_kserve_manifest_is_valid(kserve: Schemas, manifest: dict[str, Any]) -> None:
    """By KServe's schemas, and what they take over from Kubernetes by those of Kubernetes."""
    assert kserve.errors(manifest, KINDS[manifest["apiVersion"], manifest["kind"]]) == []
    if manifest["kind"] == "ServingRuntime":
        pod = {name: manifest["spec"][name] for name in ("containers", "volumes") if name in manifest["spec"]}
        deployment = copy.deepcopy(MANIFESTS[0])
        deployment["spec"]["template"]["spec"] = pod
        kubernetes_validate.validate(deployment, "1.37", strict=True)


def test_kserves_schemas_refuse_what_is_wrong(kserve: Schemas) -> None:
    runtime, service = copy.deepcopy(KSERVE[:2])
    runtime["spec"]["protocolVersion"] = ["v2"]
    runtime["spec"]["supportedModelFormats"][0]["version"] = 1
    assert kserve.errors(runtime, "V1alpha1ServingRuntime") == [
        ".spec.supportedModelFormats[0].version: 1 is no str",
        ".spec.protocolVersion: is no field of V1alpha1ServingRuntimeSpec",
    ]
    del service["spec"]["predictor"]["model"]["modelFormat"]
    assert kserve.errors(service, "V1beta1InferenceService") == [".spec.predictor.model.modelFormat: is missing"]


def test_services_find_their_runtimes() -> None:
    runtimes = {one["metadata"]["name"]: one["spec"] for one in KSERVE if one["kind"] == "ServingRuntime"}
    services = [one["spec"]["predictor"] for one in KSERVE if one["kind"] == "InferenceService"]
    assert [one["model"]["runtime"] for one in services] == list(runtimes)
    for service in services:
        runtime = runtimes[service["model"]["runtime"]]
        assert service["model"]["modelFormat"]["name"] in [one["name"] for one in runtime["supportedModelFormats"]]
        assert service["model"]["protocolVersion"] in runtime["protocolVersions"]
        (container,) = runtime["containers"]
        assert container["name"] == "kserve-container"
        assert [port["containerPort"] for port in container["ports"]] == [8080]
        volumes = {volume["name"] for volume in runtime.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_the_runtimes_command_serves_a_bundle_by_the_open_inference_protocol(
    serving: Callable[..., AbstractContextManager[Any]], make_bundle: Callable[..., Path]
) -> None:
    """The manifest's own arguments, all but the place of the bundle and the port, and its probe."""
    (container,) = KSERVE[0]["spec"]["containers"]
    assert container["command"] == ["fewstep", "serve"]
    model, *flags = container["args"]
    assert model == "/mnt/models"  # where KServe puts what storageUri names
    flags.remove("--port=8080")
    with serving(make_bundle(), *flags) as (_, (_, port)):
        base = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(base + container["readinessProbe"]["httpGet"]["path"]) as answer:
            assert answer.status == 200
        asked = {"inputs": [{"name": "LABEL", "datatype": "INT64", "shape": [1, 1], "data": [3]}]}
        request = urllib.request.Request(f"{base}/v2/models/digits/infer", json.dumps(asked).encode())
        with urllib.request.urlopen(request) as answer:
            outputs = {one["name"]: one["shape"] for one in json.loads(answer.read())["outputs"]}
    assert outputs["IMAGE"] == [1, 8, 8, 1]
