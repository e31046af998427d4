"""``fewstep::FewStepUpdate``: the fused step as an ONNX operator whose body is standard operators.

    x[B, ...], raw[B, ...], noise[B, ...], history[B, S, ...], weights[B, 8 + 2 S]
        -> x[B, ...], history[B, S, ...], network_input[B, ...]                    all float32

A row of weights is a table row, in the order of `kernels.row_dtype`: k_x, k_m, clip_min, clip_max, a, c, c_in, t,
the S weights b, and S numbers of which the write slot's is one and the others zero. Noise is an input: no
runtime has a counter-based generator of normals. The model carries the body, so any runtime runs the file;
ONNX Runtime with `kernels.ort_op` registered takes that kernel instead, to the same bits. Other than in
`kernels.fused_step` a term of weight zero is read, and must be finite.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from ..kernels import StepRow, pack_rows

DOMAIN = "fewstep"
NAME = "FewStepUpdate"
OPSET = 20
COLUMNS = ("k_x", "k_m", "clip_min", "clip_max", "a", "c", "c_in", "t")
_LARGEST = float(np.finfo(np.float32).max)  # in the place of infinity, which not every runtime takes in a clip

Floats = NDArray[np.float32]


def weights_of(rows: Sequence[StepRow], slots: int) -> Floats:
    """Table rows as the operator reads them, ``[len(rows), 8 + 2 slots]`` float32."""
    table = pack_rows(rows, slots)
    weights = np.zeros((len(rows), len(COLUMNS) + 2 * slots), np.float32)
    for i, name in enumerate(COLUMNS):
        weights[:, i] = np.clip(table[name], -_LARGEST, _LARGEST)
    weights[:, 8 : 8 + slots] = table["b"]
    for i, slot in enumerate(table["write_slot"]):
        if slot >= 0:
            weights[i, 8 + slots + slot] = 1
    return weights


def update_function(slots: int, rank: int = 4) -> onnx.FunctionProto:
    """The operator's body for a number of history slots and a rank of ``x``."""
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, *inputs: str, output: str, **attributes: Any) -> str:
        # Named, each otherwise: once the body is inlined, ONNX Runtime before 1.22 names what it fuses after the nodes
        # that it took, and refuses a model with two of the same name.
        nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    ones = add("Constant", output="shape", value_ints=[-1] + [1] * (rank - 1))

    def weight(column: int, name: str) -> str:
        index = add("Constant", output=f"{name}_column", value_int=column)
        return add("Reshape", add("Gather", "weights", index, output=f"{name}_row", axis=1), ones, output=name)

    k_x, k_m, low, high, a, c, c_in = (weight(i, name) for i, name in enumerate(COLUMNS[:7]))
    m = add("Add", add("Mul", k_x, "x", output="kx_x"), add("Mul", k_m, "raw", output="km_raw"), output="unclipped")
    m = add("Min", add("Max", m, low, output="floored"), high, output="m")
    y = add("Mul", a, "x", output="a_x")
    half = add("Constant", output="half", value_float=0.5)
    slot_axis = add("Constant", output="slot_axis", value_ints=[1])
    kept = []
    for k in range(slots):
        index = add("Constant", output=f"slot_{k}", value_int=k)
        old = add("Gather", "history", index, output=f"old_{k}", axis=1)
        writes = add("Greater", weight(8 + slots + k, f"write_{k}"), half, output=f"writes_{k}")
        now = add("Where", writes, m, old, output=f"now_{k}")
        y = add("Add", y, add("Mul", weight(8 + k, f"b_{k}"), now, output=f"b_now_{k}"), output=f"sum_{k}")
        kept.append(add("Unsqueeze", now, slot_axis, output=f"kept_{k}"))
    add("Concat", *kept, output="next_history", axis=1)
    add("Add", y, add("Mul", c, "noise", output="c_noise"), output="next_x")
    add("Mul", c_in, "next_x", output="network_input")
    inputs = ["x", "raw", "noise", "history", "weights"]
    outputs = ["next_x", "next_history", "network_input"]
    return helper.make_function(DOMAIN, NAME, inputs, outputs, nodes, [helper.make_opsetid("", OPSET)])
