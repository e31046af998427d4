"""A Triton model repository from a bundle: complete, and independent of what made it.

    REPOSITORY/NAME/config.pbtxt     written from Triton's own ModelConfig message, so it is one
    REPOSITORY/NAME/1/model.py       what Triton imports; it says in one line what is missing
    REPOSITORY/NAME/1/bundle/        the student, which proves itself when it is loaded
    REPOSITORY/NAME/1/fewstep/       this package's kernels and runtime, as they were

The server's Python needs `REQUIREMENTS` and nothing of fewstep's, so an upgrade here changes no model there.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from google.protobuf.json_format import ParseDict
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ..runtime import Bundle
from ..runtime.call import INPUTS, OUTPUTS, PRIORITY_LEVELS
from ..runtime.gpu_backends import DeviceName, refuse_lack

Variant = Literal["inflight", "iterative", "loop"]
VARIANTS: tuple[Variant, ...] = ("inflight", "iterative", "loop")  # beside these there is `triton_graph`
REQUIREMENTS = ("numpy", "onnxruntime", "pydantic", "safetensors", "pillow")  # by what they are installed as
_ON_A_GPU: dict[DeviceName, tuple[str, str]] = {  # in the place of onnxruntime; of the CUDA that the server has
    "cuda": ("onnxruntime-gpu", "cupy-cuda12x"),
    "tensorrt": ("onnxruntime", "cupy-cuda12x"),
}
CONFIG, MODEL, BUNDLE, GRAPH, PLAN = "config.pbtxt", "model.py", "bundle", "model.onnx", "model.plan"
GRAPH_CASES = f"{GRAPH}.cases.safetensors"  # requests, with the engine's pixels
PLACES = 1024  # sequences that Triton lets to a model's rows at a time
CORES = "fewstep-cores"  # the rate limiter's name for CPU threads
_PACKAGE = Path(__file__).parents[1]
_CARRIED = ("kernels", "runtime", "deploy")
_LEFT = shutil.ignore_patterns(
    "__pycache__", "embedded", "update.cu", "triton_[grs]*.py", "ray_app.py", "kubernetes", "*.txt"
)

_MODEL = '''"""A few-step diffusion student; see fewstep/deploy/triton_model.py."""

import sys
from pathlib import Path

import triton_python_backend_utils as pb

sys.path.insert(0, str(Path(__file__).parent))  # fewstep as it was exported, before any that is installed


class TritonPythonModel:
    """What Triton looks for in this file."""

    def initialize(self, args):
        where = f"{args['model_name']}: the server's Python, {sys.version.split()[0]} in {sys.prefix},"
        if sys.version_info < (3, 11):
            raise pb.TritonModelException(f"{where} is too old: students need Python 3.11 or newer")
        try:
            import IMPORTED

            numbers = numpy.arange(90210, 90214)
            if list(pb.Tensor.from_dlpack("x", pb.Tensor("x", numbers)).as_numpy()) != list(numbers):
                told = f"has numpy {numpy.__version__}, whose arrays this server cannot read: install 'numpy<2'"
                raise pb.TritonModelException(f"{where} {told}")
            from fewstep.deploy.triton_model import model_of
        except ImportError as error:
            if (error.name or "").startswith("fewstep"):
                told = f"{args['model_version']}/fewstep is not whole ({error}); export the model again with --replace"
                raise pb.TritonModelException(f"{args['model_name']}: {told}") from None
            told = f"lacks what the student needs ({error}): pip install REQUIREMENTS"
            raise pb.TritonModelException(f"{where} {told}") from None
        self._model = model_of(args)
        self.execute = self._model.execute

    def execute(self, requests):
        """The model's own, from `initialize` on."""
        return self._model.execute(requests)

    def finalize(self):
        self._model.finalize()
'''


class RepositoryError(ValueError):
    """A model repository that cannot be written or used. One line: which model, which file, what is wrong."""


def write_model(
    bundle: Bundle,
    repository: Path,
    *,
    variant: Variant = "inflight",
    name: str | None = None,
    is_decoupled: bool = False,
    max_rows: int = 16,
    instances: int = 1,
    threads: int | None = None,
    device: DeviceName = "cpu",
    precision: str = "float32",
    version: int = 1,
    replace: bool = False,
) -> Path:
    """Write a student as a model of a repository.

    Args:
        bundle: the student.
        repository: folder of the repository; made if it is not there.
        variant: see `triton_model`.
        name: of the model; the student's when left out.
        is_decoupled: answer in several responses, previews among them; then only streams can ask.
        max_rows: samples that run together in an instance.
        instances: processes, each with an engine of its own; on a GPU, so many on each that the server has.
        threads: CPU threads of one network call; the machine's cores when left out.
        device: see `gpu_backends.backend_on`.
        precision: of the network, one that the bundle has; on TensorRT, of the engine.
        version: of the model; a new one of a model that is there is put beside the others. Triton serves the highest.
        replace: take the place of a model of this name.

    Returns:
        The model's folder.

    Raises:
        RepositoryError: it is there already, or the name is none that Triton takes; or the bundle has nothing for the
            device.
        BackendError: it has no such engine.
        BundleError: it has no such precision.
    """
    name = name or bundle.name
    if device != "cpu":
        _refuse_misfit(bundle, device, precision, threads)
    if device != "tensorrt":
        bundle.network_in(precision)
    said = {
        "variant": variant,
        "max_rows": str(max_rows),
        "device": device,
        "precision": precision,
        **({"threads": str(threads)} if threads else {}),
    }
    config = model_config(bundle, name, variant, is_decoupled, max_rows, instances, said)
    out = repository / name
    if (out / CONFIG).is_file() and not (out / str(version)).exists() and not replace:
        if (out / CONFIG).read_text("utf-8") != config:
            told = "all versions of a model have one: give the same shape and flags, or another --name"
            raise RepositoryError(f"--version: {out / CONFIG} would be another; {told}")
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=repository.parent) as place:
            _write_version(Path(place) / "new", bundle, device)
            (Path(place) / "new").rename(out / str(version))  # whole or not at all
        return out
    with new_model(repository, name, replace) as folder:
        (folder / CONFIG).write_text(config, "utf-8")
        _write_version(folder / str(version), bundle, device)
    return out


def _write_version(folder: Path, bundle: Bundle, device: DeviceName) -> None:
    folder.mkdir()
    (folder / MODEL).write_text(_model_file(device), "utf-8")
    shutil.copytree(bundle.path, folder / BUNDLE)
    carried = folder / "fewstep"
    carried.mkdir()
    shutil.copy(_PACKAGE / "__init__.py", carried)
    for part in _CARRIED:
        shutil.copytree(_PACKAGE / part, carried / part, ignore=_LEFT)


def _refuse_misfit(bundle: Bundle, device: DeviceName, precision: str, threads: int | None) -> None:
    if threads is not None:
        raise RepositoryError(f"--threads: is the CPU's choice; leave it out with --device {device}")
    if device == "tensorrt":
        refuse_lack(bundle, precision)


def _model_file(device: DeviceName) -> str:
    packages, imported = list(REQUIREMENTS), "numpy"
    if device != "cpu":
        at = packages.index("onnxruntime")
        packages[at : at + 1] = _ON_A_GPU[device]
        imported += ", cupy"
    return _MODEL.replace("REQUIREMENTS", " ".join(packages)).replace("IMPORTED", imported)


@contextmanager
def new_model(repository: Path, name: str, replace: bool) -> Iterator[Path]:
    """A folder to fill, which is the repository's model afterwards, whole or not at all.

    Args:
        repository: made if it is not there.
        name: of the model.
        replace: take the place of one of this name.

    Raises:
        RepositoryError: it is there already, or the name is none that Triton takes.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise RepositoryError(f"--name: {name[:80]!r}: letters, digits, '.', '_' and '-' only")
    out = repository / name
    if out.exists() and not replace:
        raise RepositoryError(f"{out}: exists already; --replace takes its place")
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=repository.parent) as place:
        folder = Path(place) / "model"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(place) / "old")
        folder.rename(out)


def model_config(
    bundle: Bundle,
    name: str,
    variant: Variant,
    is_decoupled: bool,
    max_rows: int,
    instances: int,
    parameters: dict[str, str],
) -> str:
    """``config.pbtxt``."""
    channels, height, width = bundle.manifest.sample_shape
    outputs = [("IMAGE", "UINT8", [height, width, channels]), ("PNG_BASE64", "STRING", [1])]
    outputs += [(one, kind, [1]) for one, kind in OUTPUTS.items() if one not in ("IMAGE", "PNG")]
    if is_decoupled:
        outputs += [("INDEX", "INT32", [1]), ("STEP", "INT32", [1]), ("IS_PREVIEW", "BOOL", [1])]
    # What `inflight` works on does not show: its execute() returns at once.
    limited = int(parameters.get("threads", 0)) if variant != "inflight" else None
    kind = "KIND_CPU" if parameters["device"] == "cpu" else "KIND_GPU"
    config: dict[str, Any] = {
        "name": name,
        "backend": "python",
        "max_batch_size": max_rows,
        "input": [
            {"name": one, "data_type": _type(kind), "dims": [1], "optional": True} for one, kind in INPUTS.items()
        ],
        "output": [{"name": one, "data_type": _type(kind), "dims": dims} for one, kind, dims in outputs],
        "instance_group": [{"kind": kind, "count": instances} | cores(limited)],
        "model_transaction_policy": {"decoupled": is_decoupled},
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    if variant == "iterative":
        control = {
            "START": {"kind": "CONTROL_SEQUENCE_START", "int32_false_true": [0, 1]},
            "CORRID": {"kind": "CONTROL_SEQUENCE_CORRID", "data_type": "TYPE_UINT64"},
        }
        config["sequence_batching"] = {
            "iterative_sequence": True,
            "max_sequence_idle_microseconds": 60_000_000,
            "control_input": [{"name": one, "control": [kind]} for one, kind in control.items()],
            "oldest": {"max_candidate_sequences": max(PLACES, max_rows)},
        }
    else:
        config["dynamic_batching"] = queue_policy()
    return str(text_format.MessageToString(ParseDict(config, ModelConfig())))


def cores(threads: int | None) -> dict[str, Any]:
    """What an instance takes of Triton's rate limiter: its threads, where they are known; it counts where it is on."""
    return {"rate_limiter": {"resources": [{"name": CORES, "count": threads, "global": True}]}} if threads else {}


def graph_sha256(version: Path) -> str:
    """Of a graph's files: the ONNX file, that of its weights where they are too large to stand in it, and its cases."""
    files = sorted(file for file in version.iterdir() if file.name.startswith(GRAPH))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def queue_policy() -> dict[str, Any]:
    """Triton's queue, where it has one: bounded, with the server's priorities and a timeout for who wants one."""
    policy = {
        "timeout_action": "REJECT",
        "default_timeout_microseconds": 3_600_000_000,  # Triton takes a request's own only if it is less
        "allow_timeout_override": True,
        "max_queue_size": 1024,
    }
    return {
        "priority_levels": PRIORITY_LEVELS,
        "default_priority_level": (PRIORITY_LEVELS + 1) // 2,
        "default_queue_policy": policy,
    }


def _type(kind: str) -> str:
    return "TYPE_" + {"BYTES": "STRING"}.get(kind, kind)
