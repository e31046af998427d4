"""The ONNX Runtime library that replaces the function body of ``fewstep::FewStepUpdate``; a stock runtime needs it not.

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(ort_library()))
"""

import logging
import subprocess
from functools import cache
from pathlib import Path

from .native import built

log = logging.getLogger("fewstep")


@cache
def ort_library() -> Path | None:
    """The library, compiled now if it has to be; None where there is no compiler."""
    try:
        return built("ort_op.cpp")
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no custom operator for ONNX Runtime, function bodies do its work: %s", error)
        return None
