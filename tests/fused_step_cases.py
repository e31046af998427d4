"""Random batches for the fused step, for every build of it."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.kernels import StepRow, pack_rows

Array = NDArray[Any]


class Case:
    """A random batch over a random table, with NaN in everything that must not be read."""

    def __init__(self, rng: np.random.Generator, rows: int, elements: int, history: int, dtype: type[Any]) -> None:
        self.table = pack_rows([random_row(rng, history) for _ in range(6)], history)
        self.row = rng.integers(0, len(self.table), rows).astype(np.int32)
        w = self.table[self.row]
        self.x = rng.standard_normal((rows, elements), np.float32)
        self.history = rng.standard_normal((rows, history, elements), np.float32)
        self.uncond = np.full(rows, -1, np.int32)
        self.guidance = np.full(rows, np.nan, np.float32)
        with_guidance = np.flatnonzero(rng.random(rows) < rng.choice([0, 0.5, 1]))
        self.uncond[with_guidance] = rows + np.arange(len(with_guidance))
        self.guidance[with_guidance] = rng.uniform(0, 5, len(with_guidance))
        self.raw = rng.standard_normal((rows + len(with_guidance) + 1, elements), np.float32).astype(dtype)
        self.seed = rng.integers(0, 2**64, rows, np.uint64)
        self.network_input = np.full((rows, elements), np.nan, dtype)

        self.raw[-1] = np.nan
        for i in range(rows):
            writes = w["write_slot"][i] >= 0
            if w["a"][i] == 0 and (w["k_x"][i] == 0 or not writes):
                self.x[i] = np.nan
            if w["k_m"][i] == 0 or not writes:
                self.raw[i] = np.nan
                if self.uncond[i] >= 0:
                    self.raw[self.uncond[i]] = np.nan
            for k in range(history):
                if w["b"][i, k] == 0 or k == w["write_slot"][i]:
                    self.history[i, k] = np.nan

    def run(self, step: Any, part: Any = slice(None), **kwargs: Any) -> tuple[Array, Array, Array]:
        """``x, history, network_input`` after a step over some of the rows."""
        x, history, network_input = self.x[part].copy(), self.history[part].copy(), self.network_input[part].copy()
        uncond, raw = self.uncond[part].copy(), self.raw
        if not isinstance(part, slice):
            extra = [raw[j] for j in uncond if j >= 0]
            uncond[uncond >= 0] = len(uncond) + np.arange(len(extra))
            raw = np.stack([*raw[part], *extra])
        step(
            self.table, self.row[part], x, history, raw, uncond, self.guidance[part], self.seed[part], network_input,
            **kwargs,
        )  # fmt: skip
        return x, history, network_input


def random_row(rng: np.random.Generator, history: int) -> StepRow:
    """A table row of any kind: first, deterministic, stochastic, clipped, one that keeps nothing."""

    def some(low: float = -2, high: float = 2) -> float:
        return float(rng.choice([0.0, rng.uniform(low, high)]))

    clip = float(rng.choice([np.inf, 0.5]))
    write_slot = int(rng.integers(-1, history))
    b = [some() for _ in range(int(rng.integers(0, history + 1)))]
    return StepRow(
        some(), some(), -clip, clip, some(), tuple(b), some(0, 2), some(0.1, 2), write_slot, int(rng.integers(2**32))
    )


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.integers(1, 7),
    # The C++ step takes 512 at a time; those of its blocks but the first are reached by the larger ones.
    "elements": st.sampled_from([1, 2, 3, 4, 5, 7, 63, 64, 65, 511, 512, 513, 1025, 2059]),
    "history": st.sampled_from([1, 2, 4, 8]),
    "dtype": st.sampled_from([np.float32, np.float16]),
}
