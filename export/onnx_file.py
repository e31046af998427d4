"""An ONNX file and, where its weights are too large to stand in it, the file of weights beside it.

ONNX is protobuf, which ends at 2 GiB. A larger network keeps its weights as external data in ``NAME.onnx.data``, which
ONNX Runtime and TensorRT read from the same folder. A bundle hashes both files.
"""

from pathlib import Path

import onnx

DATA = ".data"  # what is added to the name of the ONNX file
_OUTSIDE = 1 << 30  # bytes of a model from which on its weights are kept outside
_SMALL = 1024  # bytes of a tensor up to which it stays inside


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with external data if it is large; a large one is loaded again, since writing it takes it apart.

    Args:
        model: what to write.
        path: the ONNX file; the weights go to ``path`` and `DATA`.
    """
    if model.ByteSize() < _OUTSIDE:
        onnx.save(model, str(path))
        return
    name = path.name + DATA
    path.with_name(name).unlink(missing_ok=True)  # ONNX would append to it
    onnx.save(model, str(path), save_as_external_data=True, location=name, size_threshold=_SMALL)
    onnx.load_external_data_for_model(model, str(path.parent))
