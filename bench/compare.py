"""Whether two reports differ by more than noise.

Both are resampled together: rounds with replacement, and within each round its slices of time, in blocks of neighbours,
since what disturbs a machine lasts longer than a slice. A figure is recomputed for each resample; the variances of the
two logarithms give the interval of the ratio by Student's distribution with Welch's degrees of freedom, since there are
few rounds, and wide enough for all figures of a comparison together (Bonferroni). A
difference counts when the interval leaves out 1 and the ratio is past the smallest difference that is asked about;
everything else is noise.

What differs between two runs and not within one (memory layout, a neighbour for a minute) is seen only by repeating:
run both in turn and add rounds with ``--append``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from .errors import BenchError
from .report import Round, counts_of, decode, load

CONFIDENCE = 0.99  # that of two like runs no figure is called different
SMALLEST = 0.02
RESAMPLES = 2000
_BLOCK = 3  # neighbouring slices drawn together

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """One figure of two reports."""

    figure: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str  # better, worse, noise


def compare_files(
    before: Path, after: Path, *, confidence: float = CONFIDENCE, smallest: float = SMALLEST
) -> list[Difference]:
    """Compare two report files and print it.

    Raises:
        BenchError: a file is no report, or nothing in them can be compared.
    """
    if not 0.5 < confidence < 1:
        raise BenchError(f"--confidence: {confidence:g} must be between 0.5 and 1")
    if not 0 <= smallest < 1:
        raise BenchError(f"--smallest: {smallest:g} must be between 0 and 1")
    old, new = load(before), load(after)
    loops = [rounds[0]["load"]["loop"] for rounds in (old, new)]
    if loops[0] != loops[1]:
        raise BenchError(
            f"{before} is of a load in {loops[0]} loop, {after} in {loops[1]} loop: their times mean different things"
        )
    found = compare(old, new, confidence=confidence, smallest=smallest)
    if not found:
        raise BenchError(f"{before} and {after} have no figure in common")
    console = Console()
    for line in unlike(old, new):
        console.print(f"Note: {line}", style="yellow")
    title = f"{after.name} ({len(new)} rounds) against {before.name} ({len(old)} rounds)"
    table = Table("figure", "before", "after", "after / before", "interval", "", title=title)
    table.title_justify = "left"
    for column in table.columns[1:5]:
        column.justify = "right"
    styles = {"better": "green", "worse": "red", "noise": "dim"}
    for one in found:
        interval = f"{one.low:.3f} to {one.high:.3f}"
        numbers = (f"{one.before:.4g}", f"{one.after:.4g}", f"{one.ratio:.3f}", interval)
        table.add_row(one.figure, *numbers, one.verdict, style=styles[one.verdict])
    console.print(table)
    worse, better = (sum(one.verdict == word for one in found) for word in ("worse", "better"))
    console.print(
        f"{better} better, {worse} worse, {len(found) - better - worse} noise. Noise: the interval holds 1, or the "
        f"difference is below {100 * smallest:g} %."
    )
    if min(len(old), len(new)) == 1:
        console.print("One round each says nothing of what differs from run to run; run both in turn with --append.")
    return found


def compare(
    before: Sequence[Round],
    after: Sequence[Round],
    *,
    confidence: float = CONFIDENCE,
    smallest: float = SMALLEST,
    seed: int = 0,
) -> list[Difference]:
    """Every figure that both have, with its interval."""
    rng = np.random.default_rng(seed)
    old, new = _Side(before, rng), _Side(after, rng)
    found = []
    figures = _figures(before, after)
    chance = 1 - (1 - confidence) / 2 / max(1, len(figures))
    for figure, (is_better_high, of) in figures.items():
        (old_point, old_sample), (new_point, new_sample) = of(old), of(new)
        if not (old_point > 0 and new_point > 0):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(new_sample / old_sample)
            variances = [_spread(old_sample) * old.widening**2, _spread(new_sample) * new.widening**2]
        if np.isfinite(logs).sum() < RESAMPLES / 2:
            continue
        ratio = new_point / old_point
        # Welch's degrees of freedom: of three rounds nobody knows well how far rounds lie apart.
        below = sum(v**2 / (side.units - 1) for v, side in zip(variances, (old, new), strict=True))
        margin = _student(chance, sum(variances) ** 2 / below) * math.sqrt(sum(variances)) if below else 0.0
        low, high = ratio * math.exp(-margin), ratio * math.exp(margin)
        is_noise = low <= 1 <= high or abs(ratio - 1) < smallest
        verdict = "noise" if is_noise else "better" if (ratio > 1) == is_better_high else "worse"
        found.append(Difference(figure, old_point, new_point, ratio, low, high, verdict))
    return found


def unlike(before: Sequence[Round], after: Sequence[Round]) -> list[str]:
    """What makes the two something else than one load on two servers."""
    told = []
    for part, name in (("load", "load"), ("machine", "machine")):
        ours, theirs = ({**rounds[0][part], "load_before": None} for rounds in (before, after))
        names = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        told += [f"not the same {name}: {key} is {ours.get(key)} and {theirs.get(key)}" for key in names]
    simulated = [rounds[0]["target"]["simulated"] for rounds in (before, after)]
    if any(simulated):
        told.append(f"SIMULATED accelerator: before {simulated[0] or 'none'}, after {simulated[1] or 'none'}")
    return told


def _spread(sample: Array) -> float:
    """The variance of the logarithm."""
    logs = np.log(sample)
    return float(logs[np.isfinite(logs)].var())


def _student(chance: float, freedom: float) -> float:
    """The quantile of Student's distribution, ``sqrt(freedom) * tan(a)`` with ``a`` as ``cos(a) ** (freedom - 1)``."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    middle = (angle[1:] + angle[:-1]) / 2
    reached = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (freedom - 1))])
    return math.sqrt(freedom) * math.tan(float(np.interp(chance, reached / reached[-1], angle)))


class _Side:
    """One report, and the weights its slices have in each resample."""

    def __init__(self, rounds: Sequence[Round], rng: np.random.Generator) -> None:
        self.rounds = rounds
        self._rng = rng
        self.slices: list[Mapping[str, Any]] = [one for made in rounds for one in made["slices"]]
        per_round = [len(made["slices"]) for made in rounds]
        firsts = np.cumsum([0, *per_round])
        self.weights = np.zeros((RESAMPLES, len(self.slices)))
        for i in range(RESAMPLES):
            for chosen in rng.integers(len(rounds), size=len(rounds)):
                size = per_round[chosen]
                blocks = -(-size // _BLOCK)
                starts = rng.integers(size, size=blocks)
                picked = (starts[:, None] + np.arange(_BLOCK)).ravel()[:size] % size  # in a circle: no edge counts less
                np.add.at(self.weights[i], firsts[chosen] + picked, 1)
        self.units = units = len(rounds) if len(rounds) > 1 else max(2, per_round[0] // _BLOCK)
        self.widening = math.sqrt(units / (units - 1))  # a bootstrap of few units is too narrow by this
        self._known: dict[tuple[str, ...], tuple[Array, Array]] = {}
        self._counts = [
            {kind: counts_of(decode(text)) for kind, text in one["histograms"].items()} for one in self.slices
        ]

    def ratio(self, upper: str, lower: str | None) -> tuple[float, Array]:
        """A sum over the slices, over another sum or over the time."""
        above = np.array([one[upper] if one[upper] is not None else np.nan for one in self.slices], float)
        seconds = np.concatenate(
            [np.full(len(r["slices"]), r["load"]["seconds"] / len(r["slices"])) for r in self.rounds]
        )
        below = np.array([one[lower] for one in self.slices], float) if lower else seconds
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(above.sum() / below.sum()), (self.weights @ above) / (self.weights @ below)

    def latency(self, kinds: Sequence[str], quantile: float | None) -> tuple[float, Array]:
        """A quantile over the slices' histograms, or their mean."""
        values, counts = self._counted(tuple(kinds))
        if not len(values):
            return 0.0, np.zeros(RESAMPLES)
        weights = np.concatenate([np.ones((1, len(counts))), self.weights])
        if quantile is None:
            with np.errstate(divide="ignore", invalid="ignore"):
                sample = (weights @ (counts @ values)) / (weights @ counts.sum(axis=1))
        else:
            reached = weights @ counts.cumsum(axis=1)
            # The rank is drawn too: twenty slices resampled say too little of a 99th percentile of some thousand.
            total = float(reached[0, -1])
            ranks = self._rng.beta(quantile * total + 1e-9, (1 - quantile) * total + 1e-9, len(weights))
            ranks[0] = quantile
            sample = values[(reached < ranks[:, None] * reached[:, -1:]).sum(axis=1).clip(max=len(values) - 1)]
        return float(sample[0]) / 1000, sample[1:] / 1000

    def _counted(self, kinds: tuple[str, ...]) -> tuple[Array, Array]:
        """Latencies of requests of these kinds, ascending, and how often each slice had them: ``[slices, values]``."""
        if kinds not in self._known:
            counted = [_merged([one[kind] for kind in kinds]) for one in self._counts]
            values = sorted({value for one in counted for value in one})
            place = {value: i for i, value in enumerate(values)}
            counts = np.zeros((len(counted), len(values)))
            for row, one in zip(counts, counted, strict=True):
                for value, count in one.items():
                    row[place[value]] = count
            self._known[kinds] = np.array(values, float), counts
        return self._known[kinds]


def _merged(parts: Sequence[Sequence[tuple[int, int]]]) -> dict[int, int]:
    merged: dict[int, int] = {}
    for part in parts:
        for value, count in part:
            merged[value] = merged.get(value, 0) + count
    return merged


_Figure = tuple[bool, Callable[[_Side], tuple[float, Array]]]


def _figures(before: Sequence[Round], after: Sequence[Round]) -> dict[str, _Figure]:
    """The figures that both sides have: whether more is better, and how each is had."""
    both = [*before, *after]
    figures: dict[str, _Figure] = {"images/s": (True, lambda side: side.ratio("images", None))}
    if all(made["total"]["sample_steps_per_s"] for made in both):
        figures["sample-steps/s"] = (True, lambda side: side.ratio("sample_steps", None))
    kinds = [name for name in before[0]["kinds"] if all(name in made["kinds"] for made in both)]

    def latency(names: Sequence[str], quantile: float | None) -> _Figure:
        return False, lambda side: side.latency(names, quantile)

    wanted = {"mean": None, "p50": 0.5, "p90": 0.9, "p99": 0.99}
    if all(set(made["kinds"]) == set(kinds) for made in both):
        figures |= {f"latency {name}": latency(kinds, quantile) for name, quantile in wanted.items()}
    if len(kinds) > 1 or (kinds and "latency mean" not in figures):
        for kind in kinds:
            figures |= {f"{kind}: {name}": latency([kind], wanted[name]) for name in ("p50", "p99")}
    if all("goodput" in made["total"] for made in both):
        figures["in time"] = (True, lambda side: side.ratio("met", "with_target"))
    if all(one["cpu_s"] is not None for made in both for one in made["slices"]):
        figures["CPU s an image"] = (False, lambda side: side.ratio("cpu_s", "images"))
    return figures
