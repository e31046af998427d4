"""What is shipped: the wheel and the source archive hold the package, all of it and nothing else, and they install."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "runtime", "export", "training", "server", "bench", "deploy")
NOT_SOURCE = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs")


def shipped_files() -> set[str]:
    """What a user must get, by its path under ``fewstep/``: every file of every part."""
    files = {"__init__.py", "__main__.py", "client.py", "cli.py", "py.typed"}
    for part in PARTS:
        files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / part).rglob("*") if path.is_file()}
    return {file for file in files if "__pycache__" not in file}


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without what tools have left among them; a build would leave more."""
    copy = tmp_path_factory.mktemp("packaging") / "fewstep"
    return Path(shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE)))


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", "dist", cwd=source)
    (path,) = (source / "dist").glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, archive: Path) -> Path:
    """Built from the sources, not from the archive."""
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "dist", cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/")}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    """Code, py.typed, embedded bundles, recipes and the page; no tests."""
    inside = {name.removeprefix("fewstep/") for name in contents(wheel) if name.startswith("fewstep/")}
    assert inside == shipped_files()


def test_the_wheel_adds_one_name_to_a_users_environment(wheel: Path) -> None:
    names = {name.split("/")[0] for name in contents(wheel)}
    assert names == {"fewstep", "fewstep-0.1.0.dist-info"}


def test_the_wheel_brings_the_licences(wheel: Path) -> None:
    licences = {name: text for name, text in contents(wheel).items() if "/licenses/" in name}
    assert licences["fewstep-0.1.0.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    for notice in (ROOT / "runtime" / "embedded").glob("*/NOTICE"):
        name = f"fewstep-0.1.0.dist-info/licenses/{notice.relative_to(ROOT).as_posix()}"
        assert licences[name] == notice.read_bytes()


def test_serving_needs_no_torch(wheel: Path) -> None:
    metadata = contents(wheel)["fewstep-0.1.0.dist-info/METADATA"].decode().splitlines()
    needed = [line for line in metadata if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needed
    assert not [line for line in needed if "torch" in line or "onnx>" in line]


def test_the_source_archive_builds_the_same_wheel(archive: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", cwd=unpacked)
    (again,) = (tmp_path / "dist").glob("*.whl")
    ours, theirs = contents(wheel), contents(again)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """A new environment that borrows the packages installed here, and not fewstep: its own comes first."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = Path(run(python, "-c", where, cwd=tmp_path).strip())
    # An ordinary path line, not addsitedir: the .pth files there, such as an editable install's, are not followed.
    (folder / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str | Path) -> None:
    """``pip install`` into another environment, without a download."""
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parents[2])


ASK = "import fewstep, fewstep.server, fewstep.runtime.engine as e; print(e.__file__, fewstep.__version__)"


def test_an_installed_wheel_imports_and_runs(wheel: Path, fresh_python: Path, tmp_path: Path) -> None:
    install(fresh_python, wheel)
    place, version = run(fresh_python, "-c", ASK, cwd=tmp_path).split()
    assert Path(place).is_relative_to(tmp_path / "venv")
    assert version == "0.1.0"
    told = run(fresh_python.parent / "fewstep", "--help", cwd=tmp_path)
    assert "serve" in told
    assert "generate" in told


def test_an_editable_install_runs_the_checkouts_own_files(source: Path, fresh_python: Path, tmp_path: Path) -> None:
    install(fresh_python, "--editable", source)
    place, _ = run(fresh_python, "-c", ASK, cwd=tmp_path).split()
    assert Path(place).resolve() == source / "runtime" / "engine.py"
    assert "serve" in run(fresh_python.parent / "fewstep", "--help", cwd=tmp_path)


def test_an_install_from_the_folder_runs_its_own_copy(source: Path, fresh_python: Path, tmp_path: Path) -> None:
    install(fresh_python, source)
    place, _ = run(fresh_python, "-c", ASK, cwd=tmp_path).split()
    assert Path(place).is_relative_to(tmp_path / "venv")


def test_the_pins_fit_what_the_package_asks_for() -> None:
    """Every direct dependency, of serving and of the tests, is pinned, within our own bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {name.lower().replace("_", "-"): version for name, version in (pin.split("==") for pin in lines if pin)}
    for text in [*project["dependencies"], *(t for extra in project["optional-dependencies"].values() for t in extra)]:
        asked = Requirement(text)
        if asked.name != "fewstep":
            assert asked.specifier.contains(pins[asked.name.lower().replace("_", "-")]), text


def test_what_pip_would_install_is_what_these_tests_run_on(wheel: Path) -> None:
    """As `pip install 'fewstep[ray]'` resolves it, dependencies of dependencies too; without an index or a download."""
    options = ("--dry-run", "--quiet", "--no-index", "--disable-pip-version-check", "--report", "-")
    wanted = f"fewstep[bench,client,export,otel,ray,train] @ {wheel.as_uri()}"
    told = run(sys.executable, "-m", "pip", "install", *options, wanted, cwd=wheel.parent)
    assert [one["metadata"]["name"] for one in json.loads(told)["install"]] in ([], ["fewstep"])


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel of a few files."""
    about = f"{name}-{version}.dist-info"
    files |= {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: cuda\n"
        "Provides-Extra: cudnn\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_leaves_a_whole_onnxruntime_also_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own commands over two packages that, like the real ones, hold the same file.

    When the pins have changed, the CPU's is installed over the GPU's, which then still counts as installed.
    """
    for name, build in (("onnxruntime", "cpu"), ("onnxruntime_gpu", "gpu")):
        write_wheel(tmp_path, name, "1.0", {"onnxruntime/__init__.py": f"build = {build!r}\n"})
    (tmp_path / "constraints.txt").touch()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    said = run("make", "--dry-run", "--always-make", "VENV=venv", "venv/.gpu", cwd=ROOT)
    pip = f"{sys.executable} -m pip --python venv/bin/python"
    commands = [line.replace("venv/bin/python -m pip", pip) for line in said.splitlines() if "onnxruntime" in line]
    assert [command.removeprefix(pip).split()[0] for command in commands] == ["uninstall", "install"]
    for command in [f"{pip} install --quiet onnxruntime-gpu onnxruntime", *commands]:
        run("sh", "-c", command, cwd=tmp_path)
    ask = "import onnxruntime; print(onnxruntime.build)"
    assert run("venv/bin/python", "-c", ask, cwd=tmp_path).strip() == "gpu"
