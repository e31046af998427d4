"""How long samples will take: the measured cost of a tick, and how many ticks it is to each sample's end.

A tick's cost is a line over the rows of its network call, a + b * n, fitted to what was measured with a memory that
fades. A row takes one tick a step and each place one row, so the end of a sample is known when it arrives: list
scheduling over the places, first of those who run, then of those ahead in line, then of the sample itself.
"""

import heapq
import math
from collections.abc import Iterable, Sequence

MEMORY = 200  # ticks after which a measurement counts 1 / e
STALL = 4.0  # a tick counts as no more than so many times what was expected; the machine has other things to do too
SURE = 2.0  # mean deviations kept in reserve


class Pace:
    """The cost of an engine's ticks."""

    def __init__(self) -> None:
        self.num = 0  # ticks measured
        self.deviation_s = 0.0  # mean distance of a tick from the line
        self.others_s = 0.0  # between two ticks: the turns of other engines on the same thread
        self._moments = (0.0, 0.0, 0.0, 0.0, 0.0)  # faded sums of 1, n, n * n, s, n * s

    def add(self, rows: int, took_s: float, others_s: float = 0.0) -> None:
        """Take in one tick.

        Args:
            rows: of its network call.
            took_s: its own time.
            others_s: what other engines took since the one before.
        """
        if self.num >= 10:
            took_s = min(took_s, STALL * self._own_s(rows))
        self.num += 1
        fade = 1 - 1 / min(self.num, MEMORY)
        one, n, nn, s, ns = self._moments
        self._moments = (
            fade * one + 1.0, fade * n + rows, fade * nn + rows * rows, fade * s + took_s, fade * ns + rows * took_s,
        )  # fmt: skip
        self.deviation_s += (1 - fade) * (abs(took_s - self._own_s(rows)) - self.deviation_s)
        self.others_s += max(1 - fade, 0.1) * (others_s - self.others_s)

    def line(self) -> tuple[float, float]:
        """``(a, b)``: seconds of a tick, and of each row in it. Neither is negative."""
        one, n, nn, s, ns = self._moments
        if not one:
            return 0.0, 0.0
        spread = one * nn - n * n
        b = (one * ns - n * s) / spread if spread > 1e-6 * one * nn else 0.0
        a = (s - b * n) / one
        if b <= 0:
            return s / one, 0.0
        return (a, b) if a >= 0 else (0.0, ns / nn)

    @property
    def rows(self) -> float:
        """Rows of the mean tick."""
        return self._moments[1] / self._moments[0] if self._moments[0] else 0.0

    def seconds(self, rows: float) -> float:
        """From the start of a tick with so many rows to that of the next."""
        return self._own_s(rows) + self.others_s

    def reserve_s(self, ticks: int) -> float:
        """What so many ticks may take beyond their mean."""
        return SURE * self.deviation_s * math.sqrt(ticks)

    def _own_s(self, rows: float) -> float:
        a, b = self.line()
        return a + b * rows


def ticks_to_start(running: Iterable[int], ahead: Iterable[int], places: int) -> list[int]:
    """When each place comes free for whoever is next, as a heap.

    Args:
        running: steps left of each row that runs.
        ahead: steps of each sample that waits and goes first.
        places: rows that run together.
    """
    free = sorted(running)[:places]
    free = [0] * (places - len(free)) + free  # sorted, so a heap
    for steps in ahead:
        heapq.heapreplace(free, free[0] + steps)
    return free


def ticks_to_end(free: Sequence[int], asked: Iterable[int]) -> int:
    """When the last of some samples is finished, given when the places come free and the steps of each."""
    free, last = list(free), 0
    for steps in asked:
        last = max(last, free[0] + steps)
        heapq.heapreplace(free, free[0] + steps)
    return last
