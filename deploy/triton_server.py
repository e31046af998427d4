"""A Triton server on this machine: an environment for it, a process of it, and a check of its answers.

The wheel ``nvidia-pytriton`` holds a whole ``tritonserver`` with the Python backend. `Environment.make` installs it and
what a student needs into a folder of its own, since its numpy is older than ours. `check` reads a repository as Triton
would, then asks a server that was started on it, and holds every pixel against the engine's.
"""

import contextlib
import hashlib
import os
import platform
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import text_format
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ..kernels.native import cache_folders
from ..runtime import Bundle, BundleError, Engine, Request
from .triton_repository import (
    BUNDLE,
    CONFIG,
    GRAPH,
    GRAPH_CASES,
    MODEL,
    PLAN,
    VARIANTS,
    RepositoryError,
    graph_sha256,
)

_REQUIREMENTS = Path(__file__).with_name("triton-requirements.txt")
_STAMP = "ready"
_PYTHONS = ((3, 11), (3, 12))  # those that numpy 1.26 and today's ONNX Runtime are both built for
_CONCURRENT = 16
_GPU_LEVELS = 8  # of 255, by which a GPU's pixels may differ from the CPU's: an allowance, not run on a GPU yet


class TritonError(RuntimeError):
    """A server that cannot be made or started. One line: what is missing, and what to do."""


class NoTritonHere(TritonError):
    """There is no Triton server for this platform or this Python."""


@dataclass(frozen=True)
class Environment:
    """A Triton server and its Python, in a folder."""

    folder: Path

    @classmethod
    def default(cls) -> "Environment":
        """Where `make` puts it when nobody says where."""
        folder = next(cache_folders(), None)
        if folder is None:
            raise TritonError("there is no cache folder that only you can write; name a folder for the environment")
        return cls(folder / "triton")

    @property
    def python(self) -> Path:
        """The interpreter that the students run in."""
        return self.folder / "python" / "bin" / "python"

    @property
    def is_ready(self) -> bool:
        """Whether it was made, from what `make` would make it from now."""
        try:
            return (self.folder / _STAMP).read_text("utf-8") == _key()
        except OSError:
            return False

    def make(self) -> None:
        """Install it; nothing is done where it is ready.

        Raises:
            NoTritonHere: there is none for this platform or Python.
            TritonError: it cannot be installed.
        """
        if self.is_ready:
            return
        _refuse_platform()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary=:all:")
        with tempfile.TemporaryDirectory(prefix=f".{self.folder.name}-", dir=self.folder.parent) as place:
            made = Environment(Path(place) / "made")
            _run("the environment", sys.executable, "-m", "venv", "--without-pip", str(made.folder / "python"))
            _run(
                _REQUIREMENTS.name,
                *(sys.executable, "-m", "pip", "--python", str(made.python), "install", *options),
                *("--requirement", str(_REQUIREMENTS)),
            )
            # The stub is the process that runs a model: one built for this Python must stand beside the backend.
            backend = made.folder / "backends" / "python"
            shutil.copytree(made._server / "backends" / "python", backend)
            shutil.copy(made._server / "python_backend_stubs" / _version() / "triton_python_backend_stub", backend)
            (made.folder / _STAMP).write_text(_key(), "utf-8")
            if self.folder.exists():
                self.folder.rename(Path(place) / "old")
            made.folder.rename(self.folder)  # whole or not at all

    def add_backend(self, source: Path) -> None:
        """Give it one more of Triton's backends: a folder ``NAME`` with ``libtriton_NAME.so``, and what that needs.

        Raises:
            TritonError: it is none, or the server was not made.
        """
        self.refuse_unready()
        if not (source / f"libtriton_{source.name}.so").is_file():
            told = "a backend is a folder NAME that holds libtriton_NAME.so"
            raise TritonError(f"--backend: {source}: has no libtriton_{source.name}.so; {told}")
        if source.name == "python":
            raise TritonError("--backend: python: the server has it, with this Python's stub; leave that as it is")
        with tempfile.TemporaryDirectory(prefix=".backend-", dir=self.folder) as place:
            shutil.copytree(source, Path(place) / "new")
            there = self._backends / source.name
            if there.exists():
                there.rename(Path(place) / "old")
            (Path(place) / "new").rename(there)

    def has_backend(self, name: str) -> bool:
        """Whether it can run models of this backend."""
        return (self._backends / name / f"libtriton_{name}.so").is_file()

    def command(self, repository: Path, arguments: Sequence[str] = ()) -> list[str]:
        """The command that serves a repository."""
        backends = f"--backend-directory={self._backends}"
        return [str(self._server / "bin" / "tritonserver"), f"--model-repository={repository}", backends, *arguments]

    def variables(self) -> dict[str, str]:
        """The process environment that the command needs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        libraries = [sysconfig.get_config_var("LIBDIR") or "", str(self.libraries)]
        paths = [str(self.python.parent), kept.get("PATH", os.defpath)]
        return {
            **kept,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [*libraries, kept.get("LD_LIBRARY_PATH")])),
            "PATH": os.pathsep.join(paths),
            "VIRTUAL_ENV": str(self.folder / "python"),
        }

    def refuse_unready(self) -> None:
        """Check that students can run in it.

        Raises:
            TritonError: it was not made, or its Python lacks something.
        """
        if not self.is_ready:
            raise TritonError(f"{self.folder}: no Triton server; make it with: fewstep triton setup {self.folder}")
        code = "import numpy, onnxruntime, pydantic, safetensors, PIL; print(numpy.__version__)"
        done = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=False)
        again = f"make it again: rm -r {self.folder} && fewstep triton setup {self.folder}"
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it does not start"])[-1]
            raise TritonError(f"{self.python}: {reason}; {again}")
        if int(done.stdout.split(".")[0]) > 1:
            told = f"has numpy {done.stdout.strip()}; this server needs numpy 1.26, with 2 its outputs are empty"
            raise TritonError(f"{self.python}: {told}; {again}")

    @property
    def libraries(self) -> Path:
        """The shared libraries that came with the server."""
        return self._packages / "nvidia_pytriton.libs"

    @property
    def _backends(self) -> Path:
        return self.folder / "backends"

    @property
    def _packages(self) -> Path:
        return self.folder / "python" / "lib" / f"python{_version()}" / "site-packages"

    @property
    def _server(self) -> Path:
        return self._packages / "pytriton" / "tritonserver"


@dataclass(frozen=True)
class Model:
    """A student of a repository."""

    name: str
    variant: str
    backend: str  # Triton's name of it
    is_decoupled: bool
    version: Path  # the folder that Triton serves
    bundle: Bundle | None  # None: a graph, which no Python runs
    device: str = "cpu"
    precision: str = "float32"  # of the network


def read_repository(repository: Path) -> list[Model]:
    """The students of a repository, each read as Triton and its model would.

    Raises:
        RepositoryError: one of them cannot be served; or there is none.
    """
    if not repository.is_dir():
        raise RepositoryError(f"{repository}: there is no such folder")
    models = [_read_model(path.parent) for path in sorted(repository.glob(f"*/{CONFIG}"))]
    if not models:
        raise RepositoryError(f"{repository}: holds no model; write one: fewstep export BUNDLE --triton {repository}")
    return models


def _read_model(folder: Path) -> Model:
    path = folder / CONFIG
    try:
        config = text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError, OSError) as error:
        raise RepositoryError(f"{path}: {str(error).splitlines()[0]}") from None
    if config.name != folder.name:
        raise RepositoryError(f"{path}: name is {config.name!r}, but must be the folder's, {folder.name!r}")
    variant = config.parameters["variant"].string_value if "variant" in config.parameters else ""
    graphs = ("onnxruntime", "graph"), ("tensorrt", "graph")
    if (config.backend, variant) not in {*graphs, *(("python", one) for one in VARIANTS)}:
        raise RepositoryError(f"{path}: is no model of fewstep's: backend {config.backend!r}, variant {variant!r}")
    versions = [place for place in folder.iterdir() if place.is_dir() and place.name.isdigit() and place.name != "0"]
    if not versions:
        raise RepositoryError(f"{folder}: holds no version; there should be a folder 1")
    version = max(versions, key=lambda place: int(place.name))
    if variant == "graph":
        graph = version / GRAPH
        if not graph.is_file() or graph_sha256(version) != config.parameters["sha256"].string_value:
            raise RepositoryError(f"{graph}: is missing or was altered; export the model again with --replace")
        if config.backend == "tensorrt" and not (version / PLAN).is_file():
            how = config.parameters["plan"].string_value
            raise RepositoryError(f"{version / PLAN}: is missing; with the server's TensorRT: cd {version} && {how}")
        return Model(folder.name, variant, config.backend, False, version, None)
    for name in (MODEL, "fewstep/deploy/triton_model.py"):
        if not (version / name).is_file():
            raise RepositoryError(f"{version}: {name} is missing; export the model again with --replace")
    try:
        bundle = Bundle.load(version / BUNDLE)
    except BundleError as error:
        raise RepositoryError(str(error)) from None
    is_decoupled = config.model_transaction_policy.decoupled
    device, precision = (config.parameters[name].string_value for name in ("device", "precision"))
    return Model(folder.name, variant, "python", is_decoupled, version, bundle, device, precision)


def refuse_without_backend(models: Sequence[Model], environment: Environment) -> None:
    """Check that a server can run all models of a repository.

    Raises:
        TritonError: it has no backend for one.
    """
    for model in models:
        if not environment.has_backend(model.backend):
            told = f"{model.name}: is for Triton's {model.backend} backend, which {environment.folder} lacks"
            raise TritonError(f"{told}; give it one: fewstep triton setup --backend FOLDER/{model.backend}")


@contextlib.contextmanager
def running(
    environment: Environment,
    repository: Path,
    log: Path,
    *,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> Iterator[tuple[str, str]]:
    """A server on a repository, at free ports of this machine; gives the addresses of HTTP and of gRPC.

    Args:
        environment: which server.
        repository: what it serves.
        log: file for its log.
        arguments: further ones of the server's.
        variables: further ones of its process environment.
        timeout_s: for its students to load.

    Raises:
        TritonError: it ended, or was not ready in time. The line is the log's first that tells an error.
    """
    http, grpc = free_ports(2)
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", "--allow-metrics=false"]
    ports.append("--model-load-thread-count=1")  # nine loaded at once were seen not to come up, once
    ports.append("--exit-timeout-secs=3")  # a request whose client left may never end
    ports.append("--disable-auto-complete-config")  # for which Triton would start each model's Python twice
    local = ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    command = environment.command(repository, [*ports, *local, *arguments])
    with process_of(command, {**environment.variables(), **(variables or {})}, http, log, timeout_s):
        yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"


@contextlib.contextmanager
def process_of(
    command: Sequence[str], variables: Mapping[str, str], http: int, log: Path, timeout_s: float = 120
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a command that serves at a port of HTTP, once it is ready; see `running`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end_s = time.monotonic() + timeout_s
        while not _is_ready(http):
            if process.poll() is not None:
                raise TritonError(f"Triton ended: {_first_error(log)}")
            if time.monotonic() > end_s:
                raise TritonError(f"Triton was not ready within {timeout_s:g} s: {_first_error(log)}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its stubs, which are of its session
        process.wait()


def free_ports(number: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in taken]


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and the pixels it must give."""

    inputs: Mapping[str, NDArray[Any]]  # [1, ...], by Triton's names
    pixels: NDArray[np.uint8]  # [height, width, channels]
    levels: int = 0  # by which a pixel may differ


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a model answered."""

    alone: int  # answers with the right pixels, asked one after the other
    together: int  # asked all at once
    asked: int  # each time

    @property
    def is_right(self) -> bool:
        """Whether all of them had."""
        return self.alone == self.together == self.asked


def cases(
    bundle: Bundle, seeds: Sequence[int] = (0, 7, 2**63), *, precision: str = "float32", levels: int = 0
) -> list[Case]:
    """Requests of every solver and number of steps of a student, with the pixels of the engine on the CPU."""
    labels = bundle.manifest.labels
    engine = Engine(bundle, precision=precision)
    wanted = [
        Request(seed, tableau, (i + j) % len(labels.names) if labels else None)
        for i, tableau in enumerate(bundle.tableaus.values())
        for j, seed in enumerate(seeds)
    ]

    def inputs(one: Request) -> dict[str, NDArray[Any]]:
        return {
            "SOLVER": np.array([[one.tableau.name.encode()]], np.object_),
            "STEPS": np.array([[one.tableau.num_steps]], np.int32),
            "SEED": np.array([[one.seed]], np.uint64),
            **({} if one.label is None else {"LABEL": np.array([[one.label]], np.int64)}),
        }

    samples = engine.generate(wanted)
    return [Case(inputs(one), sample.to_uint8(), levels) for one, sample in zip(wanted, samples, strict=True)]


def graph_cases(version: Path) -> list[Case]:
    """What a graph was held against when it was written; the engine's pixels, which are its own but for rounding."""
    held = load_file(version / GRAPH_CASES)
    pixels = held.pop("IMAGE")
    return [
        Case({name: array[i : i + 1] for name, array in held.items()}, pixels[i], levels=1) for i in range(len(pixels))
    ] * 8  # few, and asked often enough to share batches


def check_model(address: str, model: Model, wanted: Sequence[Case]) -> Verdict:
    """Ask a running server over gRPC, with the stock client, one request after the other and then all at once.

    Raises:
        TritonError: it refused.
    """
    ask = _ask_stream if model.is_decoupled else _ask
    try:
        alone = ask(address, model.name, wanted, 1)
        together = ask(address, model.name, wanted, _CONCURRENT)
    except InferenceServerException as error:
        raise TritonError(f"{model.name}: {error.message()}") from None

    def right(got: Sequence[NDArray[np.uint8]]) -> int:
        off = [np.abs(a.astype(int) - case.pixels.astype(int)).max() for a, case in zip(got, wanted, strict=True)]
        return sum(int(most <= case.levels) for most, case in zip(off, wanted, strict=True))

    return Verdict(right(alone), right(together), len(wanted))


def check(
    repository: Path, environment: Environment | None, address: str | None = None
) -> Iterator[tuple[Model, Verdict | None]]:
    """Hold a repository's students against the engine, one after the other.

    Args:
        repository: what is served.
        environment: the server to start on it; None to ask the one at ``address``.
        address: gRPC's, of a server that runs already.

    Returns:
        An iterator over the models, each with what it answered; None for those that were not asked: graphs of TensorRT,
        and those that the server to start has no backend for.

    Raises:
        RepositoryError: a student cannot be served.
        TritonError: the server cannot be started, or refuses.
    """
    asked: list[Model] = []
    for model in read_repository(repository):
        is_served = environment is None or environment.has_backend(model.backend) or model.backend == "python"
        if is_served and (model.bundle or (model.version / GRAPH_CASES).is_file()) and model.backend != "tensorrt":
            asked.append(model)
        else:
            yield model, None
    with contextlib.ExitStack() as stack:
        if environment is not None and asked:
            environment.refuse_unready()
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fewstep-triton-")))
            which = ["--model-control-mode=explicit", *(f"--load-model={model.name}" for model in asked)]
            _, address = stack.enter_context(running(environment, repository, place / "log", arguments=which))
        for model in asked:
            assert address is not None
            if model.bundle is None:
                wanted = graph_cases(model.version)
            else:
                levels = 0 if model.device == "cpu" else _GPU_LEVELS
                precision = "float32" if model.device == "tensorrt" else model.precision
                wanted = cases(model.bundle, precision=precision, levels=levels)
            yield model, check_model(address, model, wanted)


def _ask(address: str, model: str, wanted: Sequence[Case], concurrent: int) -> list[NDArray[np.uint8]]:
    with triton.InferenceServerClient(address) as client, ThreadPoolExecutor(concurrent) as pool:

        def one(case: Case) -> NDArray[np.uint8]:
            pixels: NDArray[np.uint8] = client.infer(model, request_inputs(case)).as_numpy("IMAGE")[0]
            return pixels

        return list(pool.map(one, wanted))


def _ask_stream(address: str, model: str, wanted: Sequence[Case], concurrent: int) -> list[NDArray[np.uint8]]:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    got: dict[int, NDArray[np.uint8]] = {}
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i, case in enumerate(wanted):
            client.async_stream_infer(model, request_inputs(case), request_id=str(i))
            while i + 1 - len(got) >= concurrent or (i + 1 == len(wanted) and len(got) <= i):
                result, error = answers.get(timeout=60)
                if error is not None:
                    raise error
                got[int(result.get_response().id)] = result.as_numpy("IMAGE")[0]
        client.stop_stream()
    return [got[i] for i in range(len(wanted))]


def request_inputs(case: Case) -> list[Any]:
    """A request's inputs as the stock gRPC client has them."""
    inputs = []
    for name, array in case.inputs.items():
        one = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        one.set_data_from_numpy(array)
        inputs.append(one)
    return inputs


def _is_ready(port: int) -> bool:
    """Asked over HTTP: a gRPC channel that was refused waits longer and longer before it tries again."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _first_error(log: Path) -> str:
    """The line of Triton's log that says why a student is not served, without its stamp; else the log's last one."""
    lines = log.read_text("utf-8", "replace").splitlines() or ["its log is empty"]
    for line in lines:
        if line.startswith("E") and ("failed to load" in line or "Poll failed" in line):
            return line.partition("] ")[2].strip('"').partition("\\n")[0]  # what follows is where in the code
    return next((line for line in lines if "Exception" in line or line.startswith("error:")), lines[-1])


def _refuse_platform() -> None:
    here = f"{platform.system()} {platform.machine()}"
    if here != "Linux x86_64":
        raise NoTritonHere(f"there is no Triton wheel for {here}, only for Linux x86_64")
    if sys.version_info[:2] not in _PYTHONS:
        told = " or ".join(".".join(map(str, version)) for version in _PYTHONS)
        raise NoTritonHere(f"Triton's wheel runs students in Python {told}, not in {_version()}")
    library = f"libpython{_version()}.so.1.0"
    places = [Path(sysconfig.get_config_var(name) or "/") for name in ("LIBDIR", "LIBPL")]
    if not any((place / library).exists() for place in places):
        raise NoTritonHere(f"this Python has no {library}, which Triton needs; Debian's is in libpython{_version()}")


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _key() -> str:
    return hashlib.sha256(_REQUIREMENTS.read_bytes() + sys.version.encode() + sys.base_prefix.encode()).hexdigest()


def _run(what: str, *command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        raise TritonError(f"{what} cannot be installed: {lines[-1] if lines else command[0]}")
