"""The fused step: one pass over a batch, every row moved by its own table row.

For each batch row, with the table row ``w`` it stands on:

    raw'    = uncond + guidance * (raw - uncond)                  where the row has an unconditional output
    m       = clip(w.k_x * x + w.k_m * raw')                      the stored form: x0, eps, ...
    history[w.write_slot] = m
    x       = w.a * x + sum_k w.b[k] * history[k] + w.c * noise(seed, w.noise_id)                 (1)
    input   = w.c_in * x                                          what the network reads next

Solver, step, guidance and seed are the row's own, so rows of any mix share the pass. Starting a sample is a
table row too (``a = k_m = 0``, ``c = sigma[0]``). A term whose weight is zero is not read, so what stands in
unused memory never matters. Sums run in float32 in the order written, each product and sum rounded once: the
result does not depend on the company a row keeps.

`step_reference` says it row by row. `fused_step` does it: compiled where there is a compiler (`native`), in numpy
(`step_numpy`) where not. All have the signature that the CUDA kernel has, and give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .native import native_step
from .noise import Floats, normals

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class StepRow:
    """One table row as the kernel reads it: float32 on the device, 40 bytes and 4 per history slot."""

    k_x: float  # m = k_x * x + k_m * raw
    k_m: float
    clip_min: float  # bounds of m; infinite when there are none
    clip_max: float
    a: float  # weight of x
    b: tuple[float, ...]  # weight of each history slot, by its place in memory
    c: float  # weight of fresh noise
    c_in: float  # scale of the next network input
    write_slot: int  # where m goes; -1: nowhere
    noise_id: int  # which noise of the seed
    t: float = 0.0  # what the network is told in the call that this table row consumes


@cache
def row_dtype(history: int) -> np.dtype[Any]:
    """The memory layout of a table row with ``history`` slots; the C struct of the kernel."""
    floats = ("k_x", "k_m", "clip_min", "clip_max", "a", "c", "c_in", "t")
    fields: list[Any] = [(name, np.float32) for name in floats]
    return np.dtype([*fields, ("write_slot", np.int32), ("noise_id", np.uint32), ("b", np.float32, (history,))])


def pack_rows(rows: Sequence[StepRow], history: int) -> Array:
    """Table rows in the kernel's layout: ``[len(rows)]`` of `row_dtype`. Slots a row lacks get weight zero.

    Raises:
        ValueError: a table row needs more than ``history`` slots.
    """
    table = np.zeros(len(rows), row_dtype(history))
    for i, row in enumerate(rows):
        if len(row.b) > history or row.write_slot >= history:
            raise ValueError(f"table row {i} needs {max(len(row.b), row.write_slot + 1)} history slots, not {history}")
        for name in table.dtype.names or ():
            if name != "b":
                table[name][i] = getattr(row, name)
        table["b"][i, : len(row.b)] = row.b
    return table


def step_reference(
    table: Array,
    row: NDArray[np.int32],
    x: Floats,
    history: Floats,
    raw: Array,
    uncond: NDArray[np.int32],
    guidance: Floats,
    seed: NDArray[np.uint64],
    network_input: Array,
) -> None:
    """Move each batch row by one table row, one at a time: the definition that every build is tested against.

    Args:
        table: ``[table rows]`` of `row_dtype`.
        row: ``[rows]`` int32, the table row of each batch row.
        x: ``[rows, elements]`` float32, read and overwritten.
        history: ``[rows, slots, elements]`` float32, read where ``b`` is not zero, written at ``write_slot``.
        raw: ``[outputs, elements]`` in the network's dtype, ``outputs >= rows``; output ``i`` is batch row ``i``'s;
            read where ``k_m`` is not zero.
        uncond: ``[rows]`` int32, the output that is the row's unconditional one, or -1: no guidance.
        guidance: ``[rows]`` float32, weight of the conditional output (1 means none); read where ``uncond >= 0``.
        seed: ``[rows]`` uint64.
        network_input: ``[rows, elements]`` in the network's dtype, overwritten.
    """
    for i, w in enumerate(table[row]):
        m = np.zeros_like(x[i])
        if w["k_x"] != 0:
            m += w["k_x"] * x[i]
        if w["k_m"] != 0:
            guided = raw[i].astype(np.float32)
            if uncond[i] >= 0:
                base = raw[uncond[i]].astype(np.float32)
                guided = base + guidance[i] * (guided - base)
            m += w["k_m"] * guided
        m = np.clip(m, w["clip_min"], w["clip_max"])
        if w["write_slot"] >= 0:
            history[i, w["write_slot"]] = m
        y = np.zeros_like(x[i])
        if w["a"] != 0:
            y += w["a"] * x[i]
        for k, b in enumerate(w["b"]):
            if b != 0:
                y += b * history[i, k]
        if w["c"] != 0:
            noise_id = np.array([w["noise_id"]])
            y += w["c"] * normals(seed[i : i + 1], noise_id, len(y))[0]
        x[i] = y
        network_input[i] = w["c_in"] * y


_FLOAT32 = np.dtype(np.float32)
_is_contiguous = attrgetter("flags.c_contiguous")


class Scratch:
    """Working memory of `step_numpy`, made once: ``[rows, elements]`` float32, three times."""

    def __init__(self, rows: int, elements: int) -> None:
        self.y, self.term, self.m = (np.empty((rows, elements), np.float32) for _ in range(3))


def fused_step(
    table: Array,
    row: NDArray[np.int32],
    x: Floats,
    history: Floats,
    raw: Array,
    uncond: NDArray[np.int32],
    guidance: Floats,
    seed: NDArray[np.uint64],
    network_input: Array,
) -> None:
    """Move each batch row by one table row, all at once: `step_reference`, to the same bits.

    Args:
        table: see `step_reference`, as are the others.
        row: see there.
        x: see there.
        history: see there.
        raw: see there.
        uncond: see there.
        guidance: see there.
        seed: see there.
        network_input: see there.
    """
    BoundStep(table, row.copy(), x, history, uncond, guidance, seed, network_input)(0, len(row), raw)


class BoundStep:
    """`fused_step` for arrays that stay where they are: what it has to know of them is asked once.

    Args:
        table: see `step_reference`, as are the others.
        row: see there; ``[capacity]``, and so on for the others, of which a call moves some rows. Each that it moves
            is counted on to the table row behind.
        x: see there.
        history: see there.
        uncond: see there.
        guidance: see there.
        seed: see there.
        network_input: see there; may have more rows.
    """

    def __init__(
        self,
        table: Array,
        row: NDArray[np.int32],
        x: Floats,
        history: Floats,
        uncond: NDArray[np.int32],
        guidance: Floats,
        seed: NDArray[np.uint64],
        network_input: Array,
    ) -> None:
        self._arrays: tuple[Array, ...] = (table, row, x, history, uncond, guidance, seed, network_input)
        self._scratch: Scratch | None = None
        native = native_step()
        fits = network_input.dtype == np.float32 and all(map(_is_contiguous, self._arrays))
        self._move = native.bind(*self._arrays) if native is not None and fits else None

    def __call__(self, first: int, last: int, raw: Array) -> None:
        """Move the rows from ``first`` to before ``last``; output ``i`` of ``raw`` is that of row ``first + i``."""
        if self._move is not None and raw.dtype == _FLOAT32 and _is_contiguous(raw):
            self._move(first, last, raw)
            return
        table, *others = self._arrays
        row, x, history, uncond, guidance, seed, network_input = (array[first:last] for array in others)
        self._scratch = self._scratch or Scratch(*others[1].shape)
        step_numpy(table, row, x, history, raw, uncond, guidance, seed, network_input, self._scratch)
        row += 1


def step_numpy(
    table: Array,
    row: NDArray[np.int32],
    x: Floats,
    history: Floats,
    raw: Array,
    uncond: NDArray[np.int32],
    guidance: Floats,
    seed: NDArray[np.uint64],
    network_input: Array,
    scratch: Scratch | None = None,
) -> None:
    """`step_reference` for all rows at once, to the same bits. No array of the batch's size is allocated."""
    rows, elements = x.shape
    scratch = scratch or Scratch(rows, elements)
    w = table[row]
    y, term, m = scratch.y[:rows], scratch.term[:rows], scratch.m[:rows]

    slots = w["write_slot"]
    if (slots >= 0).any():
        m.fill(0)
        _add(m, w["k_x"], x, term)
        _add(m, w["k_m"], _guided(raw, uncond, guidance, y), term)
        if np.isfinite(w["clip_min"]).any() or np.isfinite(w["clip_max"]).any():
            np.clip(m, w["clip_min"][:, None], w["clip_max"][:, None], out=m)
        if slots[0] >= 0 and (slots == slots[0]).all():
            history[:, slots[0]] = m
        else:
            for i in np.flatnonzero(slots >= 0):
                history[i, slots[i]] = m[i]

    y.fill(0)
    _add(y, w["a"], x, term)
    for k in range(history.shape[1]):
        _add(y, w["b"][:, k], history[:, k], term)
    noisy = np.flatnonzero(w["c"])
    if len(noisy):
        noise = normals(seed[noisy], w["noise_id"][noisy], elements, out=m[: len(noisy)])
        noise *= w["c"][noisy, None]
        for j, i in enumerate(noisy):
            y[i] += noise[j]
    x[...] = y
    np.multiply(y, w["c_in"][:, None], out=network_input, casting="same_kind")


def _guided(raw: Array, uncond: NDArray[np.int32], guidance: Floats, out: Floats) -> Array:
    """The first ``rows`` outputs, guided where asked. Unguided batches are passed through untouched."""
    rows = len(uncond)
    guided = np.flatnonzero(uncond >= 0)
    if not len(guided):
        return raw[:rows]
    out[...] = raw[:rows]
    for i in guided:
        base = raw[uncond[i]].astype(np.float32, copy=False)
        out[i] -= base
        out[i] *= guidance[i]
        out[i] += base
    return out


def _add(y: Floats, weight: Floats, term: Array, product: Floats) -> None:
    """``y += weight * term`` row by row; rows of weight zero are not read."""
    live = weight != 0
    if live.all():
        np.multiply(term, weight[:, None], out=product)
        y += product
    elif live.any():
        np.multiply(term, weight[:, None], out=product, where=live[:, None])
        np.add(y, product, out=y, where=live[:, None])
