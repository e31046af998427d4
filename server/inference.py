"""The Open Inference Protocol's meaning: which tensors a student takes and gives, and what it says of itself.

    PROMPT BYTES  LABEL INT64  SEED UINT64  STEPS INT32  SOLVER BYTES  GUIDANCE FP32   ->   IMAGE  SEED  STEPS  PNG

Every input may be left out, and holds one element for all images or one for each; their number is the batch. The same
words in lower case are parameters of the request. `kserve` writes this as HTTP, `kserve_grpc` as gRPC.
"""

import difflib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..runtime import Engine, Request, call
from ..runtime.call import INPUTS, NAMES, OUTPUTS, PRIORITY_LEVELS, Array, outputs_of
from .errors import ApiError, refusals
from .generation import image_limit
from .service import Service

__all__ = ["INPUTS", "NAMES", "OUTPUTS", "Array", "outputs_of"]

DEFAULT_OUTPUTS = ("IMAGE", "SEED")  # encoding a picture is done only where it is asked for
DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
UNSERVED = "there is no shared memory, and traces and logs are settings of the server"  # why, of the protocol's rest
EXTENSIONS = ("binary_tensor_data", "generate", "model_configuration", "model_repository", "parameters", "statistics")


def tensor_of(name: str, datatype: str, shape: Sequence[int], limit: int) -> tuple[int, str]:
    """Check an input's description.

    Returns:
        Its number of elements, and numpy's word for its type, ``"O"`` for BYTES.

    Raises:
        ApiError: there is no such input, or its type or shape is another.
    """
    if name not in INPUTS:
        near = difflib.get_close_matches(name.upper(), INPUTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(INPUTS)}"
        raise ApiError(400, f"{name[:80]} is not an input{hint}", param=name, code="unknown_input")
    dtype = "O" if datatype == "BYTES" else DTYPES.get(datatype, "")
    kinds = {"BYTES": "O", "FP32": "fiu"}.get(INPUTS[name], "iu")
    if not dtype or np.dtype(dtype).kind not in kinds:
        raise ApiError(400, f"{name}: datatype is {INPUTS[name]}, got {datatype[:20]!r}", param=name)
    if not shape or any(size != 1 for size in shape[1:]) or not 1 <= shape[0] <= limit:
        told = f"[n] or [n, 1], n from 1 to {limit}"
        raise ApiError(400, f"{name}: shape is {told}, got {list(shape)[:8]}", param=name)
    return int(shape[0]), dtype


def from_bytes(name: str, num: int, dtype: str, raw: bytes) -> Array:
    """A tensor's binary form: little-endian numbers, or for BYTES each element after its length in four bytes.

    Raises:
        ApiError: it is not as long as its shape says.
    """
    if dtype != "O":
        expected = num * np.dtype(dtype).itemsize
        if len(raw) != expected:
            raise ApiError(400, f"{name}: {expected} bytes expected, got {len(raw)}", param=name)
        return np.frombuffer(raw, dtype)
    elements: list[bytes] = []
    place = 0
    while place + 4 <= len(raw) and len(elements) < num:
        length = int.from_bytes(raw[place : place + 4], "little")
        elements.append(raw[place + 4 : place + 4 + length])
        place += 4 + length
    if place != len(raw) or len(elements) != num:
        raise ApiError(400, f"{name}: the data are not {num} elements, each after its length", param=name)
    return np.array([*elements, None], object)[:-1]


def from_values(name: str, num: int, dtype: str, values: Sequence[Any]) -> Array:
    """A tensor whose elements came one by one, as JSON and protobuf have them.

    Raises:
        ApiError: they are too many or too few, of another kind, or do not fit the type.
    """
    kind = np.dtype(dtype).kind
    kinds: tuple[type, ...] = {"O": (str, bytes), "f": (int, float)}.get(kind, (int,))
    if len(values) != num or not all(isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        told = {"O": "texts", "f": "numbers"}.get(kind, "whole numbers")
        raise ApiError(400, f"{name}: {num} {told} expected", param=name)
    try:
        if kind != "O":
            return np.array(values, dtype)
        texts = [value.encode() if isinstance(value, str) else value for value in values]
    except (OverflowError, UnicodeEncodeError):
        raise ApiError(400, f"{name}: a value is out of the range of its datatype", param=name) from None
    return np.array([*texts, None], object)[:-1]


def to_bytes(array: Array) -> bytes:
    """The opposite of `from_bytes`."""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array).tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())


def requests_of(
    service: Service, engine: Engine, tensors: Mapping[str, Array], parameters: Mapping[str, Any]
) -> tuple[list[Request], int]:
    """What a call asks for, within the server's limits; see `call.requests_of`.

    Raises:
        ApiError: something is wrong, unknown, or too much.
    """
    with refusals:
        return call.requests_of(engine, tensors, parameters, image_limit(service, engine))


def refuse_unknown_output(name: str) -> None:
    """Check the name of an output.

    Raises:
        ApiError: there is none of that name.
    """
    if name not in OUTPUTS:
        raise ApiError(400, f"{name[:80]} is not an output; there are: {', '.join(OUTPUTS)}", param=name)


def server_metadata() -> dict[str, Any]:
    """What the server says of itself."""
    return {"name": "fewstep", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(service: Service, engine: Engine) -> dict[str, Any]:
    """The inputs and outputs of a student, the batch first."""
    channels, height, width = engine.bundle.manifest.sample_shape
    shapes = {"IMAGE": [-1, height, width, channels]}
    return {
        "name": engine.bundle.name,
        "versions": [engine.bundle.manifest.version],
        "platform": _platform(service),
        "inputs": [{"name": name, "datatype": kind, "shape": [-1, 1]} for name, kind in INPUTS.items()],
        "outputs": [
            {"name": name, "datatype": kind, "shape": shapes.get(name, [-1, 1])} for name, kind in OUTPUTS.items()
        ],
    }


def _platform(service: Service) -> str:
    return "fewstep-simulated" if service.simulated else "fewstep"


def model_config(service: Service, engine: Engine) -> dict[str, Any]:
    """Triton's ModelConfig, as JSON."""
    metadata = model_metadata(service, engine)

    def kind(datatype: str) -> str:
        return "TYPE_" + {"BYTES": "STRING"}.get(datatype, datatype)

    return {
        "name": engine.bundle.name,
        "platform": _platform(service),
        "backend": "fewstep",
        "max_batch_size": image_limit(service, engine),
        "input": [
            {"name": one["name"], "data_type": kind(one["datatype"]), "dims": one["shape"][1:], "optional": True}
            for one in metadata["inputs"]
        ],
        "output": [
            {"name": one["name"], "data_type": kind(one["datatype"]), "dims": one["shape"][1:]}
            for one in metadata["outputs"]
        ],
        "dynamic_batching": {"priority_levels": PRIORITY_LEVELS, "default_priority_level": (PRIORITY_LEVELS + 1) // 2},
        "model_transaction_policy": {"decoupled": False},
    }


def model_statistics(engine: Engine) -> dict[str, Any]:
    """Triton's statistics of one student. A request is one sample here, an execution one network call of many."""
    done = engine.counters
    queue_ns, run_ns = int(done.queue_s * 1e9), int(done.run_s * 1e9)
    none, no_time = {"count": 0, "ns": 0}, {"count": done.finished, "ns": 0}  # perf_analyzer wants equal counts
    return {
        "name": engine.bundle.name,
        "version": engine.bundle.manifest.version,
        "last_inference": int((time.time() - time.monotonic() + done.last_s) * 1000) if done.last_s else 0,
        "inference_count": done.finished,
        "execution_count": done.ticks,
        "inference_stats": {
            "success": {"count": done.finished, "ns": queue_ns + run_ns},
            "fail": {"count": done.failed + done.expired + done.rejected, "ns": 0},
            "queue": {"count": done.finished, "ns": queue_ns},
            "compute_input": no_time,
            "compute_infer": {"count": done.finished, "ns": run_ns},
            "compute_output": no_time,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [],
    }
