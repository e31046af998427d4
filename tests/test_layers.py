"""The ladder: a floor imports only floors below it, and serving never loads torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "client": 1, "kernels": 1, "runtime": 2, "export": 3, "training": 4, "server": 4, "bench": 4, "deploy": 5, "cli": 6
}  # fmt: skip
MODULES = {"client", "cli"}  # the others are folders
ENTRIES = ("__init__.py", "__main__.py")
TRAINING_ONLY = {"torch", "onnx", "onnxscript", "sklearn", "scipy", "accelerate", "datasets", "diffusers"}
SOURCES = sorted(
    path.relative_to(ROOT)
    for name in FLOORS
    for path in ([ROOT / f"{name}.py"] if name in MODULES else (ROOT / name).rglob("*.py"))
)


def floor_name(source: Path) -> str:
    return source.parts[0].removesuffix(".py")


def imports(source: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports: the dotted name from the package's root, or another package's, and which it is."""
    package = ["fewstep", *source.parts[:-1]]
    for node in ast.walk(ast.parse((ROOT / source).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            assert base, f"{source}:{node.lineno} climbs out of the package"
            for alias in node.names:
                yield ".".join([*base, *([node.module] if node.module else []), alias.name]), True


def test_every_floor_has_source_files() -> None:
    assert {floor_name(source) for source in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_file_imports_only_from_its_own_floor_and_those_below(source: Path) -> None:
    own = floor_name(source)
    for name, is_ours in imports(source):
        other = name.split(".")[1] if is_ours else ""
        if other in FLOORS and other != own:
            assert FLOORS[other] < FLOORS[own], f"{source} imports {name}"


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if floor_name(s) in ("client", "kernels", "runtime", "server", "bench")], ids=str
)
def test_what_serves_imports_nothing_of_training_or_export(source: Path) -> None:
    for name, is_ours in imports(source):
        if is_ours:
            assert name.split(".")[1] not in ("training", "export"), f"{source} imports {name}"
        else:
            assert name.split(".")[0] not in TRAINING_ONLY, f"{source} imports {name}"


@pytest.mark.parametrize("source", [*map(Path, ENTRIES), *SOURCES], ids=str)
def test_inside_the_package_imports_are_relative(source: Path) -> None:
    assert not [name for name, is_ours in imports(source) if not is_ours and name.split(".")[0] == "fewstep"]


@pytest.mark.parametrize(
    "module", ["fewstep", "fewstep.client", "fewstep.kernels", "fewstep.runtime", "fewstep.server", "fewstep.cli"]
)
def test_importing_what_serves_loads_no_training_package(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")}
    )
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & TRAINING_ONLY
    assert not {"fewstep.training", "fewstep.export"} & set(run.stdout.split())


def test_src_holds_links_only_and_one_for_each_part() -> None:
    """The folders of the checkout are the package: a file written in ``src`` would be one nobody finds."""
    links = {path.name: path for path in (ROOT / "src" / "fewstep").iterdir() if path.name != "__pycache__"}
    assert set(links) == {"py.typed", *ENTRIES, *(f"{name}.py" if name in MODULES else name for name in FLOORS)}
    for name, link in links.items():
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
