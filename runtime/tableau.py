"""Few-step solvers as coefficient tables.

Every solver we serve is one linear recurrence, one table row for each network call:

    x[i+1] = a[i] * x[i] + sum_j b[i, j] * m[i-j] + c[i] * noise                                  (1)

where ``m[i]`` is the network's prediction at ``x[i]`` in the table's form (x0, eps, ...) and ``noise`` is
fresh and standard normal. So a solver is a table, not a class: the functions in `solvers` fill one in, and
`kernels.fused_step` runs any of them. A two-stage method takes two rows (see `solvers.heun`). Nothing but
``x`` and the last few ``m`` is carried from row to row.

Nobody types the numbers in: `tracer` compiles a solver written as ordinary code into its table.

A table is a file: safetensors, float64, its header in the metadata. It says which weights it was fitted to.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from ..kernels import StepRow
from .files import replace_all
from .prediction import FORMS, Form, Prediction, form_weights

Array = NDArray[np.float64]

FORMAT = 1
MAX_ROWS, MAX_HISTORY = 1024, 16
LARGEST = float(np.finfo(np.float32).max)  # the kernel reads float32
_EXACT = 1e-9  # how far the closed forms may miss the invariants, relative to the largest level
_ARRAYS = ("alpha", "sigma", "t", "a", "b", "c")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_NUMBER = (int, float)
_HEADER: dict[str, Any] = {  # what each entry of a file's header may be
    "name": str,
    "form": str,
    "residual": _NUMBER,
    "start": (*_NUMBER, NoneType),
    "clip": (list, NoneType),
    "weights_sha256": str,
    "provenance": dict,
}


class TableauError(ValueError):
    """A table that cannot be one, or a file that holds none. The message names the table, the place and the amount."""


@dataclass(frozen=True)
class Tableau:
    """One solver on one set of noise levels.

    Row ``i`` takes a latent from level ``i`` to level ``i + 1``, where level ``i`` means
    ``x = alpha[i] * x0 + sigma[i] * eps``. Float64 on the host; rounded to float32 once, by `step_rows`.

    Raises:
        TableauError: a shape is off, a value is not finite, a row misses the mean or the variance of its
            level by more than ``residual``, or the last row does not end at clean data without fresh noise.
    """

    name: str  #    the solver's name; with the number of rows, how a request asks for it
    form: Form  #   what ``m`` is
    alpha: Array  # [rows + 1]       signal scale
    sigma: Array  # [rows + 1]       noise scale, in units of the data
    t: Array  #     [rows]           what the network is told
    a: Array  #     [rows]           weight of the latent
    b: Array  #     [rows, history]  weight of m[i - j]; column 0 is the newest
    c: Array  #     [rows]           weight of fresh noise; zero in a deterministic solver
    residual: float = 0.0  # how far rows may miss the invariants: learned tables do so on purpose, and say so
    start: float | None = None  # scale of the initial noise, where it is not sigma[0]
    clip: tuple[float, float] | None = None  # bounds of m, for tables that clip x0
    weights_sha256: str = "any"  # the network the table was fitted to
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not _NAME.fullmatch(self.name):
            raise TableauError(f"{self.name!r} is no name for a table: 1 to 64 of A-Z a-z 0-9 . _ + -")
        self._refuse_bad_shapes()
        for name in _ARRAYS:
            bad = np.argwhere(~np.isfinite(getattr(self, name)))
            if len(bad):
                raise TableauError(f"{self.name}: {name}{bad[0].tolist()} is not finite")
            large = np.argwhere(np.abs(getattr(self, name)) > LARGEST)
            if len(large):
                raise TableauError(f"{self.name}: {name}{large[0].tolist()} is too large for float32")
        if self.form not in FORMS:
            raise TableauError(f"{self.name}: form {self.form!r} is not one of {', '.join(FORMS)}")
        if not 0 <= self.residual < 1e6:
            raise TableauError(f"{self.name}: residual {str(self.residual)[:80]} is not a small positive number")
        if self.start is not None and not 0 < self.start <= LARGEST:
            raise TableauError(f"{self.name}: start {str(self.start)[:80]} is not a positive number of float32")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise TableauError(f"{self.name}: clip {self.clip} is not (lower, upper)")
        if self.clip is not None and any(LARGEST < abs(bound) < np.inf for bound in self.clip):
            raise TableauError(f"{self.name}: clip has a bound that is too large for float32")
        for name in ("alpha", "sigma"):
            low = int(getattr(self, name).argmin())
            if getattr(self, name)[low] < 0:
                raise TableauError(f"{self.name}: {name}[{low}] is negative: {getattr(self, name)[low]:g}")
        if self.alpha[-1] == 0:
            raise TableauError(f"{self.name}: the last row must end at data, not at alpha = 0")
        for i in range(self.num_steps):
            if self.b[i, i + 1 :].any():
                raise TableauError(f"{self.name}: row {i} reads a prediction from before the first row")
        if self.sigma[-1] != 0:
            raise TableauError(f"{self.name}: the last row must end at sigma = 0, not {self.sigma[-1]:g}")
        if self.c[-1] != 0:
            raise TableauError(f"{self.name}: the last row must add no noise, c = {self.c[-1]:g}")
        for what, miss in zip(("mean", "variance"), self.misses(), strict=True):
            worst = int(np.abs(miss).argmax())
            if not abs(miss[worst]) <= max(self.residual, _EXACT) * (1 + 1e-6):  # also when it overflowed
                raise TableauError(f"{self.name}: row {worst} misses the {what} of its level by {miss[worst]:.3g}")

    def _refuse_bad_shapes(self) -> None:
        rows = len(self.a) if self.a.ndim == 1 else 0
        if not 1 <= rows <= MAX_ROWS:
            raise TableauError(f"{self.name}: {rows} rows, must be 1 to {MAX_ROWS}")
        if self.b.ndim != 2 or not 1 <= self.b.shape[1] <= MAX_HISTORY:
            raise TableauError(f"{self.name}: b has shape {list(self.b.shape)}, must be [rows, 1 to {MAX_HISTORY}]")
        expected = {"alpha": rows + 1, "sigma": rows + 1, "t": rows, "b": rows, "c": rows}
        for name, length in expected.items():
            array = getattr(self, name)
            if array.shape[:1] != (length,) or (name != "b" and array.ndim != 1):
                raise TableauError(f"{self.name}: {name} has shape {list(array.shape)}, {rows} rows need {length}")

    @property
    def num_steps(self) -> int:
        """Network calls per sample (NFE): one a row."""
        return len(self.a)

    @property
    def history(self) -> int:
        """How many predictions a row may read, the newest included."""
        return int(self.b.shape[1])

    @property
    def initial_scale(self) -> float:
        """Standard deviation of the noise that a sample starts from."""
        return float(self.sigma[0]) if self.start is None else self.start

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where each row puts its prediction in the history memory; -1: nowhere, no row reads it.

        A prediction keeps its place until the last row that reads it, and the lowest free place is taken, so a
        table needs as many places as predictions are alive at once, however far back it reaches.
        """
        last_read = np.full(self.num_steps, -1)
        for i, j in np.argwhere(self.b):
            last_read[i - j] = max(last_read[i - j], i)
        places: list[int] = []
        for i in range(self.num_steps):
            taken = {places[k] for k in range(max(0, i - self.history), i) if last_read[k] >= i}
            free = next(place for place in range(i + 1) if place not in taken)
            places.append(free if last_read[i] >= i else -1)
        return tuple(places)

    @property
    def num_places(self) -> int:
        """Predictions that must be kept at once, the newest included."""
        return max(1, *(place + 1 for place in self.places))

    @property
    def is_stochastic(self) -> bool:
        """Whether any row adds fresh noise."""
        return bool(self.c.any())

    def misses(self) -> tuple[Array, Array]:
        """How far each row misses its level, mean and variance, relative to the largest level.

        Put clean data and its noise in, with predictions that are right: a row must take
        ``alpha x0 + sigma eps`` to ``alpha' x0 + sigma' eps``, fresh noise counted by its variance. To solvers
        these two are what ``sum(b) = 1`` is to a Butcher tableau (they hold for every form and any history).
        """
        rows = range(self.num_steps)
        said = np.array([form_weights(self.form, self.alpha[i], self.sigma[i]) for i in rows])
        heard = np.zeros((self.num_steps, 2))
        for j in range(self.history):
            heard[j:] += self.b[j:, j, None] * said[: self.num_steps - j]
        with np.errstate(all="ignore"):  # levels too large to square give NaN, which is no small miss
            mean = self.a * self.alpha[:-1] + heard[:, 0] - self.alpha[1:]
            variance = (self.a * self.sigma[:-1] + heard[:, 1]) ** 2 + self.c**2 - self.sigma[1:] ** 2
            return mean / self.alpha.max(), variance / self.sigma.max() ** 2

    def step_rows(self, prediction: Prediction) -> list[StepRow]:
        """The table as the kernel reads it, for a network with this prediction type.

        ``rows + 1`` of them: the first makes the initial latent, ``initial_scale * noise``. Predictions are
        written to their `places`, and the weights stand in the order of the places.

        Raises:
            ValueError: the form cannot be had from the prediction type at one of the levels.
        """
        scale = [prediction.c_in(a, s) for a, s in zip(self.alpha[:-1], self.sigma[:-1], strict=True)]
        low, high = self.clip or (-np.inf, np.inf)
        start = StepRow(
            k_x=0, k_m=0, clip_min=low, clip_max=high, a=0, b=(), c=self.initial_scale, c_in=scale[0],
            write_slot=-1, noise_id=0,
        )  # fmt: skip
        rows = [start]
        for i in range(self.num_steps):
            k_x, k_m = prediction.to_form(self.form, float(self.alpha[i]), float(self.sigma[i]))
            weights = [0.0] * self.num_places
            for j in np.flatnonzero(self.b[i]):
                weights[self.places[i - j]] = float(self.b[i, j])
            rows.append(
                StepRow(
                    k_x=k_x,
                    k_m=k_m,
                    clip_min=low,
                    clip_max=high,
                    a=float(self.a[i]),
                    b=tuple(weights),
                    c=float(self.c[i]),
                    c_in=scale[i + 1] if i + 1 < self.num_steps else 0.0,
                    write_slot=self.places[i],
                    noise_id=i + 1,
                    t=float(self.t[i]),
                )
            )
        return rows

    def to_bytes(self) -> bytes:
        """The table as a safetensors file; the same table gives the same bytes."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "form": self.form,
            "residual": self.residual,
            "clip": self.clip,
            "weights_sha256": self.weights_sha256,
            "provenance": dict(sorted(self.provenance.items())),
        }
        if self.start is not None:
            header["start"] = self.start
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        return safetensors.numpy.save(arrays, {"fewstep_tableau": json.dumps(header, sort_keys=True)})

    @cached_property
    def sha256(self) -> str:
        """The table's version: the hash of its file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the table to a file, which is replaced at once or not at all.

        Raises:
            TableauError: it cannot be written.
        """
        try:
            replace_all({path: self.to_bytes()})
        except OSError as error:
            raise TableauError(f"{path}: cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> "Tableau":
        """Read a table file.

        Raises:
            TableauError: there is no such file, or it holds no valid table.
        """
        try:
            return cls.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise TableauError(f"{path}: cannot be read: {error.strerror}") from None

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "table") -> "Tableau":
        """Read a table from the bytes of its file; ``source`` is its name in errors.

        Raises:
            TableauError: the bytes hold no valid table.
        """
        try:
            arrays: dict[str, Any] = safetensors.numpy.load(data)
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fewstep_tableau"])
            json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError):
            raise TableauError(f"{source}: is not a fewstep table") from None
        if not isinstance(header, dict):
            raise TableauError(f"{source}: is not a fewstep table")
        if header.get("format") != FORMAT:
            raise TableauError(f"{source}: table format {header.get('format')}, this version reads {FORMAT}")
        fields = {"name", "form", "residual", "clip", "weights_sha256", "provenance"}
        named = set(header) - {"start"}
        if set(arrays) != set(_ARRAYS) or named != {*fields, "format"}:
            odd = sorted((set(arrays) ^ set(_ARRAYS)) | (named ^ {*fields, "format"}))
            raise TableauError(f"{source}: unknown or missing entries: {', '.join(odd)}")
        for name, kind in _HEADER.items():
            if not isinstance(header.get(name), kind) or isinstance(header.get(name), bool):
                raise TableauError(f"{source}: {name} is {header.get(name)!r:.80}")
        for name, array in arrays.items():
            if array.dtype != np.float64:
                raise TableauError(f"{source}: {name} is {array.dtype}, not float64")
        for fact, said in header["provenance"].items():
            if not isinstance(said, str):
                raise TableauError(f"{source}: provenance: {fact[:80]!r} is {str(said)[:80]}, not a text")
        clip = tuple(header["clip"]) if header["clip"] else None
        if clip and (len(clip) != 2 or not all(isinstance(bound, _NUMBER) for bound in clip)):
            raise TableauError(f"{source}: clip is {header['clip']!r:.80}, not two numbers")
        try:
            rest = {name: header[name] for name in fields - {"clip"}}
            return cls(**arrays, **rest, clip=clip, start=header.get("start"))
        except (TypeError, TableauError) as error:
            raise TableauError(f"{source}: {error}") from None


def differences(old: Tableau, new: Tableau) -> list[str]:
    """What one table says otherwise than another, a line each; none when their files are the same."""
    found = []
    for name in _HEADER:
        if name != "provenance" and getattr(old, name) != getattr(new, name):
            found.append(f"{name}: {getattr(old, name)} -> {getattr(new, name)}")
    for name in _ARRAYS:
        before, after = getattr(old, name), getattr(new, name)
        if before.shape != after.shape:
            found.append(f"{name}: shape {list(before.shape)} -> {list(after.shape)}")
            continue
        for place in np.argwhere(before != after):
            was, now = before[tuple(place)], after[tuple(place)]
            found.append(f"{name}[{', '.join(map(str, place))}]: {was:.9g} -> {now:.9g} ({now - was:+.3g})")
    for fact in sorted({*old.provenance, *new.provenance}):
        was, now = old.provenance.get(fact, "nothing"), new.provenance.get(fact, "nothing")
        if was != now:
            found.append(f"provenance {fact}: {was} -> {now}")
    return found
