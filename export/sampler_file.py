"""The whole sampler as a file that stands alone: a sampler graph with its table inside, for any ONNX runtime.

    noise[B, steps + 1, C, H, W] (, label[B]) (, guidance[B]) -> sample[B, C, H, W]

It is held against the engine before it is there: the same seeds, the same samples.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime

from ..runtime import Bundle, Engine, Request, Tableau
from .additions import graphs_of
from .onnx_file import DATA, save_model
from .precisions import Precision, emulated
from .sampler_graph import refuse_second_call, request_inputs, sampler_graph, with_table
from .step_graph import ExportError
from .trajectory import relative

_SEEDS = (0, 1, 5, 2**63)
_TOLERANCE = 1e-4  # in float32, relative: the order of sums, over some steps


class SamplerParity(NamedTuple):
    """How far the graph's samples are from those of the engine, which runs in float32."""

    max_abs: float
    relative: float  # root mean square of the difference over that of the samples


def write_sampler(
    bundle: Bundle, path: Path, tableau: Tableau, precision: Precision = "float32", replace: bool = False
) -> SamplerParity:
    """Write a student's whole sampler.

    Args:
        bundle: the student.
        path: the file, whose name ends with ``.onnx``; a large network's weights go beside it, see `onnx_file`.
        tableau: the table that is put inside.
        precision: of the network; x, history and the update are float32.
        replace: whether a file that is there may be replaced.

    Returns:
        The measured difference. bfloat16 is measured emulated; see `precisions.emulated`.

    Raises:
        ExportError: the student calls its network twice a step, the file is there, or its samples are others.
    """
    refuse_second_call(bundle)
    if path.suffix != ".onnx" or path.is_dir():
        raise ExportError(f"{path}: a whole sampler is one file, whose name ends with .onnx")
    if path.exists() and not replace:
        raise ExportError(f"{path}: exists already")
    step = graphs_of(bundle, [precision])[precision]

    def unrolled(network: onnx.ModelProto) -> onnx.ModelProto:
        return with_table(sampler_graph(network, tableau.num_steps, tableau.num_places), bundle, tableau)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        save_model(unrolled(step), made := Path(folder) / path.name)
        tried = made
        if precision == "bfloat16":
            save_model(unrolled(emulated(step)), tried := Path(folder) / "emulated.onnx")
        parity = _against_engine(bundle, tableau, tried)
        if precision == "float32" and not parity.relative <= _TOLERANCE:  # NaN is no small difference
            raise ExportError(
                f"{path}: its samples differ from the engine's by {parity.relative:.2g}; it was not written"
            )
        weights = made.with_name(made.name + DATA)
        if weights.exists():
            weights.replace(path.with_name(weights.name))
        made.replace(path)
    return parity


def _against_engine(bundle: Bundle, tableau: Tableau, graph: Path) -> SamplerParity:
    labels = bundle.manifest.labels
    requests = [Request(seed, tableau, i % len(labels.names) if labels else None) for i, seed in enumerate(_SEEDS)]
    given = request_inputs(bundle, tableau, requests)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (samples,) = session.run(None, {name: array for name, array in given.items() if name != "table"})
    wanted = np.stack([made.pixels for made in Engine(bundle, max_rows=len(requests)).generate(requests)])
    return SamplerParity(float(np.abs(samples - wanted).max()), relative(samples, wanted))
