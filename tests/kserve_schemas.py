"""KServe's own schemas, read from the classes of its wheel without importing it: its dependencies would hold ours back.

The classes are made from KServe's OpenAPI document and tell each field's name in JSON, its type, and whether it must be
there. What is of Kubernetes is left to Kubernetes' schemas.
"""

import ast
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


@dataclass(frozen=True)
class Schema:
    """One object."""

    types: dict[str, str]  # by the name in JSON
    required: frozenset[str]


class Schemas:
    """All objects of a version of KServe.

    Args:
        folder: where its wheel is put.
    """

    def __init__(self, folder: Path) -> None:
        (pin,) = re.findall(r"(?m)^# (kserve==\S+)", CONSTRAINTS.read_text())
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
        subprocess.run([sys.executable, "-m", "pip", "download", *options, pin], check=True, capture_output=True)
        (wheel,) = folder.glob("kserve-*.whl")
        self._schemas: dict[str, Schema] = {}
        with zipfile.ZipFile(wheel) as held:
            for name in held.namelist():
                if re.fullmatch(r"kserve/models/v1\w+\.py", name):
                    self._read(held.read(name).decode())

    def _read(self, text: str) -> None:
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef):
                continue
            said = {
                part.targets[0].id: ast.literal_eval(part.value)
                for part in node.body
                if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)
            }
            names = said["attribute_map"]
            required = re.findall(r"client_side_validation and (\w+) is None", text)
            types = {names[one]: kind for one, kind in said["openapi_types"].items()}
            self._schemas[node.name] = Schema(types, frozenset(names[one] for one in required))

    def errors(self, held: Any, kind: str, where: str = "") -> list[str]:
        """What is wrong with an object of a kind; what is of Kubernetes is not looked at."""
        if listed := re.fullmatch(r"list\[(.+)\]", kind):
            if not isinstance(held, list):
                return [f"{where}: must be a list"]
            return [error for i, one in enumerate(held) for error in self.errors(one, listed[1], f"{where}[{i}]")]
        if mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
            if not isinstance(held, dict):
                return [f"{where}: must be an object"]
            return [error for name, one in held.items() for error in self.errors(one, mapped[1], f"{where}.{name}")]
        plain: dict[str, type] = {"str": str, "int": int, "bool": bool, "float": float}
        if kind in plain:
            is_right = isinstance(held, plain[kind]) and (kind == "bool" or not isinstance(held, bool))
            return [] if is_right else [f"{where}: {held!r} is no {kind}"]
        schema = self._schemas.get(kind)
        if schema is None:
            assert kind == "object" or kind.startswith(("V1", "K8sIo", "Resource", "Intstr")), kind
            return []
        if not isinstance(held, dict):
            return [f"{where}: must be an object"]
        wrong = [f"{where}.{name}: is missing" for name in schema.required - held.keys()]
        for name, value in held.items():
            if name not in schema.types:
                wrong.append(f"{where}.{name}: is no field of {kind}")
            else:
                wrong += self.errors(value, schema.types[name], f"{where}.{name}")
        return wrong
