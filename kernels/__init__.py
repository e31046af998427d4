"""The fused step: one pass that moves every row of a batch by its own table row, and the noise it needs.

Floor 1. It knows arrays and nothing of models, requests or servers.
"""

from .fused_step import BoundStep, StepRow, fused_step, pack_rows, row_dtype, step_numpy, step_reference
from .native import native_step
from .noise import normals

__all__ = [
    "BoundStep",
    "StepRow",
    "fused_step",
    "native_step",
    "normals",
    "pack_rows",
    "row_dtype",
    "step_numpy",
    "step_reference",
]
