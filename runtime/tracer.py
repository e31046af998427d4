"""The tracer: a solver written once as ordinary code becomes its table.

The code runs on stand-ins. A latent is a `Linear` form, a weighted sum of the initial latent, the predictions
so far and the noises so far; where the network would be called, the form is recorded and a new prediction
comes back. From the recorded points ``E[0], E[1], ...`` and the end follow the rows:

    E[i+1] = a[i] * E[i] + sum_j b[i, j] * m[j] + c[i] * (noise that is new)                       (1)

This works whenever initial latent and old noise stand in ``E[i+1]`` in the same proportion as in ``E[i]``:
``a`` is that proportion, and ``b`` is whatever the predictions then lack. So the point that a two-stage method
goes back to need not be kept, since it is ``E[i]`` less predictions that are in the history anyway. A solver
that puts noise inside a step and then goes back to before it does not fit, and is refused with the reason.

Forms are kept in decimals of 60 digits: a weight that cancels then cancels for certain, and what is left of a
difference of large numbers is still exact when it is rounded to float64, once, into the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Context, Decimal, localcontext
from itertools import pairwise
from typing import Literal, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from .prediction import Form, form_weights
from .schedules import Level, Levels
from .tableau import MAX_HISTORY, Tableau, TableauError

Array = NDArray[np.float64]

_CONTEXT = Context(prec=60)
_SAME = Decimal("1e-40")  # weights that agree this well, relatively, are equal


_ZERO = Decimal(0)


class Linear:
    """A latent, as the tracer sees it: one weight for the initial latent and each prediction and noise so far.

    Forms can be added, subtracted and scaled by numbers, and nothing else.

    Raises:
        TableauError: the solver did something else with a latent.
    """

    __slots__ = ("weights",)  # by place in the order in which start, predictions and noises appeared
    __array_ufunc__ = None  # numbers of numpy are numbers, and leave the arithmetic to us
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, weights: dict[int, Decimal]) -> None:
        self.weights = weights

    def __add__(self, other: Linear) -> Linear:
        if not isinstance(other, Linear):
            _refuse("adds a number to a latent")
        total = dict(self.weights)
        for k, weight in other.weights.items():
            total[k] = total[k] + weight if k in total else weight
        return Linear(total)

    def __mul__(self, factor: object) -> Linear:
        if isinstance(factor, Linear):
            _refuse("multiplies two latents")
        exact = _exact(factor)
        return Linear({k: exact * weight for k, weight in self.weights.items()} if exact else {})

    def __sub__(self, other: Linear) -> Linear:
        return self + (-1.0) * other

    def __neg__(self) -> Linear:
        return (-1.0) * self

    def __truediv__(self, divisor: object) -> Linear:
        if isinstance(divisor, Linear):
            _refuse("divides by a latent")
        exact = _exact(divisor)
        return Linear({k: weight / exact for k, weight in self.weights.items()})

    __rmul__ = __mul__

    def __radd__(self, _: object) -> NoReturn:
        _refuse("adds a number to a latent")

    __rsub__ = __radd__

    def __rtruediv__(self, _: object) -> NoReturn:
        _refuse("divides by a latent")

    def __pow__(self, _: object) -> NoReturn:
        _refuse("raises a latent to a power")

    def __abs__(self) -> NoReturn:
        _refuse("takes the size of a latent")

    def _compare(self, _: object) -> NoReturn:
        _refuse("compares latents")

    __lt__ = __le__ = __gt__ = __ge__ = _compare
    __eq__ = __ne__ = _compare

    def __bool__(self) -> NoReturn:
        _refuse("lets a latent decide what it does")

    def __float__(self) -> NoReturn:
        _refuse("needs the value of a latent")


class Predicted(NamedTuple):
    """What one network call says, both ways: ``x = alpha * x0 + sigma * eps`` holds exactly."""

    x0: Linear
    eps: Linear


class Trace:
    """What solver code is given: the initial latent, the network, and noise.

    Args:
        form: the form that the table will keep its predictions in.
    """

    def __init__(self, form: Form) -> None:
        self._form = form
        self._kinds: list[Literal["start", "m", "noise"]] = ["start"]
        self.points: list[tuple[Linear, Level]] = []  # where the network was called

    def start(self) -> Linear:
        """The initial latent."""
        return self._unit(0)

    def noise(self) -> Linear:
        """Fresh standard normal noise."""
        self._kinds.append("noise")
        return self._unit(len(self._kinds) - 1)

    def __call__(self, x: Linear, level: Level) -> Predicted:
        """Call the network."""
        if not isinstance(x, Linear):
            _refuse("gives the network what is no latent")
        self.points.append((x, level))
        self._kinds.append("m")
        m = self._unit(len(self._kinds) - 1)
        p, q = form_weights(self._form, level.alpha, level.sigma)
        determinant = level.alpha * q - level.sigma * p
        if determinant == 0:
            raise TableauError(f"{self._form} says nothing new at alpha = {level.alpha:g}, sigma = {level.sigma:g}")
        return Predicted((q * x - level.sigma * m) / determinant, (level.alpha * m - p * x) / determinant)

    def _unit(self, i: int) -> Linear:
        return Linear({i: Decimal(1)})

    def rows(self, end: Linear) -> tuple[Array, Array, Array, Array]:
        """Equation (1) for every network call: ``a, b, c``, and what the first latent holds: start, then noises."""
        calls = [k for k, kind in enumerate(self._kinds) if kind == "m"]
        points = [x.weights for x, _ in self.points] + [end.weights]
        carried = [{k: w for k, w in x.items() if w and self._kinds[k] != "m"} for x in points]
        rows = len(calls)
        a, b, c = np.zeros(rows), np.zeros((rows, rows)), np.zeros(rows)
        known: set[int] = set()
        for i, (here, there) in enumerate(pairwise(points)):
            known |= carried[i].keys()
            new = carried[i + 1].keys() - known
            c[i] = math.hypot(*(carried[i + 1][k] for k in new))
            proportion = _proportion(i, carried[i], {k: w for k, w in carried[i + 1].items() if k in known})
            a[i] = proportion
            for j in range(i + 1):
                wanted, given = there.get(calls[i - j], _ZERO), proportion * here.get(calls[i - j], _ZERO)
                if abs(wanted - given) > _SAME * (abs(wanted) + abs(given)):
                    b[i, j] = wanted - given
        window = 1 + int(np.flatnonzero(b.any(axis=0)).max(initial=0))
        if window > MAX_HISTORY:
            raise TableauError(f"reads {window} predictions back, a table may read {MAX_HISTORY}")
        noises = [float(w) for k, w in carried[0].items() if k]
        return a, b[:, :window], c, np.array([float(carried[0].get(0, _ZERO)), *noises])


def trace(
    name: str,
    form: Form,
    levels: Levels,
    solve: Callable[[Trace], Linear],
    *,
    inexact: bool = False,
    options: Mapping[str, object] | None = None,
) -> Tableau:
    """Compile a solver into its table.

    Args:
        name: the solver's name.
        form: what the table keeps its predictions as. Choose the form in which the solver looks back over a few
            calls only: another costs as many places as there are rows.
        levels: the levels it was given; the table ends at the last.
        solve: the solver. It takes a `Trace` and returns the sample.
        inexact: whether it misses the mean or the variance of its levels on purpose. The table then says by how
            much.
        options: how the solver was set, for the table's provenance.

    Raises:
        TableauError: the solver is not one linear recurrence; the message says where and why.
    """
    net = Trace(form)
    try:
        with localcontext(_CONTEXT):
            end = solve(net)
            if not isinstance(end, Linear) or not net.points:
                raise TableauError("the solver must call the network and return a latent")
            a, b, c, first = net.rows(end)
    except TableauError as error:
        raise TableauError(f"{name}: {error}") from None
    visited = [level for _, level in net.points]
    start = levels.sigma[0] if levels.start is None else levels.start
    scale = float(np.hypot(first[0] * start, np.linalg.norm(first[1:])))
    table = Tableau(
        name,
        form,
        alpha=np.array([*(level.alpha for level in visited), levels.alpha[-1]]),
        sigma=np.array([*(level.sigma for level in visited), levels.sigma[-1]]),
        t=np.array([level.t for level in visited]),
        a=a,
        b=b,
        c=c,
        residual=1e5 if inexact else 0.0,
        start=None if abs(scale - visited[0].sigma) <= 1e-12 * scale else scale,
        provenance={key: str(value) for key, value in (options or {}).items()},
    )
    if inexact:
        table = replace(table, residual=float(max(np.abs(miss).max() for miss in table.misses())))
    return table


def _proportion(i: int, here: Mapping[int, Decimal], there: Mapping[int, Decimal]) -> Decimal:
    """``a`` with ``there = a * here``."""
    largest = max(here, key=lambda k: abs(here[k]), default=None)
    a = there.get(largest, _ZERO) / here[largest] if largest is not None else _ZERO
    for k in here.keys() | there.keys():
        wanted, given = there.get(k, _ZERO), a * here.get(k, _ZERO)
        if abs(wanted - given) > _SAME * (abs(wanted) + abs(given)):
            raise TableauError(
                f"row {i} needs an earlier latent again that the latent before it does not hold: noise was added in "
                f"between, so a second latent would have to be kept. A step that adds noise inside and goes back to "
                f"before it is no table; else keep the history in the form in which the solver looks back"
            )
    return a


def _exact(number: object) -> Decimal:
    try:
        return Decimal(float(number))  # type: ignore[arg-type]  # whatever calls itself a number
    except (TypeError, ValueError):
        _refuse(f"scales a latent by a {type(number).__name__}")


def _refuse(what: str) -> NoReturn:
    raise TableauError(f"the solver {what}; a table holds fixed weights, so steps cannot adapt to the sample")
