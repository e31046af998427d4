"""The Kubernetes manifests: valid by Kubernetes' own schemas, and agreed with themselves and with the server."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

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
