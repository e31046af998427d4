"""Noise schedules: the levels a solver visits and what the network is told at each.

A level is one ``(alpha, sigma)``: there ``x = alpha * x0 + sigma * eps``. A schedule is the map from time to
levels; the functions below pick the times and return `Levels`, noisiest first and clean last. Solvers are
tables over levels and know no schedule.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Path = Literal["ve", "vp", "flow"]
Betas = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "trailing", "linspace", "lcm"]


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level, and what the network is told there."""

    alpha: float  # signal scale
    sigma: float  # noise scale, in units of the data
    t: float  # not a number at the last level, where no network is called

    @property
    def ratio(self) -> float:
        """Noise to signal, ``sigma / alpha``: EDM's sigma. Infinite in pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """``lambda = ln(alpha / sigma)``; infinite at clean data, minus infinite in pure noise."""
        if self.alpha == 0 or self.sigma == 0:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The map between time and noise-to-signal ratio ``sigma / alpha``, for levels that lie between those visited."""

    path: Path  # ve: alpha = 1. vp: alpha^2 + sigma^2 = 1. flow: alpha + sigma = 1
    ratio: Callable[[Array], Array]  # sigma / alpha at a time
    time: Callable[[Array], Array]  # what the network is told at a sigma / alpha
    whole_times: bool = False  # whether only whole times were trained

    def at_ratio(self, ratio: float, t: float | None = None) -> Level:
        """The level at a noise-to-signal ratio; ``t`` is its time if that is known already."""
        alpha, sigma = _on_path(self.path, np.array([ratio]))
        told = float(self.time(np.array([ratio]))[0]) if t is None else t
        return Level(float(alpha[0]), float(sigma[0]), told)

    def at_time(self, t: float) -> Level:
        """The level at a time."""
        return self.at_ratio(float(self.ratio(np.array([t]))[0]), t)


@dataclass(frozen=True, slots=True)
class Levels:
    """The noise levels of one trajectory.

    Raises:
        ValueError: there are not one more levels than times, a value is not finite, a level is no cleaner than
            the one before it (a time came twice), or the last one is not clean.
    """

    alpha: Array  # [rows + 1]  signal scale
    sigma: Array  # [rows + 1]  noise scale, in units of the data
    t: Array  #     [rows]      what the network is told at level i
    start: float | None = None  # scale of the initial noise, where it is not sigma[0]
    schedule: Schedule | None = None  # asked by the few solvers that visit levels off the grid

    def __post_init__(self) -> None:
        rows = len(self.t)
        if rows < 1 or self.alpha.shape != (rows + 1,) or self.sigma.shape != (rows + 1,):
            raise ValueError(f"levels: {rows} times need {rows + 1} alphas and sigmas, got {len(self.alpha)}")
        for name in ("alpha", "sigma", "t"):
            bad = np.flatnonzero(~np.isfinite(getattr(self, name)))
            if len(bad):
                raise ValueError(f"levels: {name}[{bad[0]}] is not finite")
        if self.sigma[-1] != 0 or self.alpha[-1] <= 0:
            raise ValueError(f"levels: the last must be clean, sigma = 0, not {self.sigma[-1]:g}")
        same = np.flatnonzero(self.sigma[:-1] * self.alpha[1:] <= self.sigma[1:] * self.alpha[:-1])
        if len(same):
            i = same[0]
            t = f"t = {self.t[i]:g} and " + (f"{self.t[i + 1]:g}" if i + 1 < rows else "the end")
            raise ValueError(f"levels: level {i + 1} is no cleaner than level {i} ({t}); is a time there twice?")

    def __len__(self) -> int:
        """How many levels there are, the clean one included."""
        return len(self.alpha)

    def __getitem__(self, i: int) -> Level:
        """Level ``i``."""
        i = range(len(self))[i]
        return Level(float(self.alpha[i]), float(self.sigma[i]), float(self.t[i]) if i < len(self.t) else math.nan)

    def steps(self) -> Iterator[tuple[Level, Level]]:
        """Each level but the last, with the one after it."""
        for i in range(len(self.t)):
            yield self[i], self[i + 1]


def karras(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Levels:
    """EDM's levels, ``alpha = 1``: Karras et al. 2022 (arXiv:2206.00364), eq. 5, and zero last.

    Args:
        num_steps: network calls of a one-call-a-step solver.
        sigma_min: last level before zero; not reached when ``num_steps`` is 1.
        sigma_max: first level.
        rho: crowds the levels toward ``sigma_min``; as it grows they become uniform in ln(sigma).

    Returns:
        Levels with ``t = ln(sigma) / 4``, EDM's c_noise.
    """
    _refuse_bad_range(num_steps, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho: {rho:g}, must be above 0")
    ramp = np.linspace(0, 1, num_steps)
    sigma = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return Levels(np.ones(num_steps + 1), np.append(sigma, 0.0), np.log(sigma) / 4, schedule=EDM)


def exponential(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Levels:
    """Levels uniform in log-SNR, ``alpha = 1``, and zero last; arguments and ``t`` as in `karras`."""
    _refuse_bad_range(num_steps, sigma_min, sigma_max)
    sigma = np.geomspace(sigma_max, sigma_min if num_steps > 1 else sigma_max, num_steps)
    return Levels(np.ones(num_steps + 1), np.append(sigma, 0.0), np.log(sigma) / 4, schedule=EDM)


def vp_cosine(num_steps: int) -> Levels:
    """Variance preserving, ``alpha = cos(pi t / 2)``, ``t`` uniform from 1 to 0: Salimans & Ho 2022, section 2.

    The log-SNR is bounded at the noisy end as in their code, ``alpha >= exp(-10)``.
    """
    _refuse_bad_steps(num_steps)
    t = np.linspace(1, 0, num_steps + 1)
    alpha = np.maximum(np.cos(np.pi * t / 2), np.exp(-10.0))
    sigma = np.sqrt(1 - alpha**2)
    alpha[-1], sigma[-1] = 1.0, 0.0
    return Levels(alpha, sigma, t[:-1], schedule=COSINE)


def vp_linear(
    num_steps: int,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    *,
    t_max: float = 1.0,
    t_min: float | None = None,
    spacing: Literal["time", "quadratic", "log_snr"] = "time",
) -> Levels:
    """Variance preserving, ``beta(t)`` linear in ``t``: Song et al. 2021 (arXiv:2011.13456), eq. 32 and 33.

    Args:
        num_steps: network calls of a one-call-a-step solver.
        beta_min: ``beta(0)``.
        beta_max: ``beta(1)``.
        t_max: first time.
        t_min: last time before clean data. Left out, the times are uniform down to 0; the other spacings
            take 0.001.
        spacing: uniform in time, in its square root, or in log-SNR (Lu et al. 2022, arXiv:2206.00927).
    """
    _refuse_bad_steps(num_steps)
    refuse_unknown("spacing", spacing, ("time", "quadratic", "log_snr"))
    if not 0 < beta_min <= beta_max:
        raise ValueError(f"beta_min {beta_min:g} and beta_max {beta_max:g} must satisfy 0 < beta_min <= beta_max")
    schedule = linear_betas(beta_min, beta_max)
    if t_min is None and spacing == "time":
        return _levels(schedule, np.linspace(t_max, 0, num_steps + 1)[:-1])
    last = 1e-3 if t_min is None else t_min
    if not 0 < last < t_max:
        raise ValueError(f"t_min {last:g} and t_max {t_max:g} must satisfy 0 < t_min < t_max")
    if spacing == "log_snr":
        first_ratio, last_ratio = schedule.ratio(np.array([t_max, last]))
        ratio = np.geomspace(first_ratio, last_ratio, num_steps) if num_steps > 1 else np.array([first_ratio])
        return _levels(schedule, schedule.time(ratio), ratio)
    power = 2 if spacing == "quadratic" else 1
    return _levels(schedule, np.linspace(t_max ** (1 / power), last ** (1 / power), num_steps) ** power)


def flow(
    num_steps: int, shift: float = 1.0, *, t_max: float = 1.0, t_min: float | None = None, time_scale: float = 1.0
) -> Levels:
    """The straight path, ``alpha = 1 - t``, ``sigma = t``, with the timestep shift of SD3.

    Esser et al. 2024 (arXiv:2403.03206), eq. 23: ``t = shift * u / (1 + (shift - 1) * u)``, ``u`` from 1 to 0.

    Args:
        num_steps: network calls of a one-call-a-step solver.
        shift: above 1, more of the steps are spent in noise.
        t_max: first ``u``. Solvers in log-SNR that must start below pure noise take 0.999.
        t_min: last ``u`` before zero. Left out, ``u`` is uniform down to zero.
        time_scale: the network is told ``t * time_scale``; 1000 for most networks trained with diffusers.
    """
    _refuse_bad_steps(num_steps)
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max: {t_max:g}, must be above 0 and at most 1")
    for name, value in {"shift": shift, "time_scale": time_scale}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: {value:g}, must be above 0")
    u = np.linspace(t_max, 0, num_steps + 1)[:-1] if t_min is None else np.linspace(t_max, t_min, num_steps)
    t = np.append(shift * u / (1 + (shift - 1) * u), 0.0)
    return Levels(1 - t, t, t[:-1] * time_scale, schedule=straight(time_scale))


def discrete(
    num_steps: int,
    betas: Betas | ArrayLike = "linear",
    *,
    spacing: Spacing = "leading",
    offset: int = 0,
    without_last: bool = False,
    sigmas: Literal["trained", "karras", "exponential"] = "trained",
    num_train: int = 1000,
    beta_range: tuple[float, float] | None = None,
    original_steps: int = 50,
) -> Levels:
    """The levels of a DDPM trained on discrete times, ``t = 0 ... num_train - 1``, in the ways users pick from them.

    Ho et al. 2020 (arXiv:2006.11239); the spacings are those of Lin et al. 2024 (arXiv:2305.08891), table 2, and
    the names and defaults those of diffusers. Samples start from noise of scale 1, as they do there.

    Args:
        num_steps: network calls of a one-call-a-step solver.
        betas: ``linear`` (DDPM), ``scaled_linear`` (Stable Diffusion), ``cosine`` (Nichol & Dhariwal 2021), or
            the values.
        spacing: ``leading`` rounds down and never starts at the noisiest time, ``trailing`` does, ``linspace``
            has both ends. ``lcm`` picks from the ``original_steps`` times that LCM and TCD students know.
        offset: added to ``leading`` times (Stable Diffusion: 1).
        without_last: space for one step more and leave out the cleanest time, as diffusers does for DPM-Solver,
            DEIS, UniPC and SA-Solver (``trailing`` is never changed).
        sigmas: keep the trained levels, or space the ratios between the outermost ones as Karras et al. do
            (``rho = 7``), or uniformly in log-SNR; the network is then told times between the trained ones.
        num_train: trained times.
        beta_range: first and last beta; by default (0.0001, 0.02), scaled_linear (0.00085, 0.012).
        original_steps: see ``spacing``.
    """
    _refuse_bad_steps(num_steps)
    refuse_unknown("spacing", spacing, ("leading", "trailing", "linspace", "lcm"))
    refuse_unknown("sigmas", sigmas, ("trained", "karras", "exponential"))
    schedule = trained(discrete_betas(betas, num_train, beta_range))
    if sigmas != "trained":
        low, high = schedule.ratio(np.array([0.0, num_train - 1.0]))
        space = karras if sigmas == "karras" else exponential
        ratio = space(num_steps, low, high).sigma[:-1]
        return _levels(schedule, schedule.time(ratio), ratio, start=1.0)
    return _levels(schedule, _spaced(num_steps, spacing, offset, without_last, num_train, original_steps), start=1.0)


def discrete_betas(betas: Betas | ArrayLike, num_train: int, beta_range: tuple[float, float] | None = None) -> Array:
    """The variances ``beta[num_train]`` that DDPM's forward process adds at each time; see `discrete`."""
    if not isinstance(betas, str):
        given = np.asarray(betas, np.float64)
        if given.shape != (num_train,):
            raise ValueError(f"betas: shape {list(given.shape)}, num_train is {num_train}")
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError("betas: each must be 0 to 1")
        return given
    refuse_unknown("betas", betas, ("linear", "scaled_linear", "cosine"))
    if betas == "cosine":
        t = np.arange(num_train + 1) / num_train
        bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999), np.float64)
    first, last = beta_range or ((0.0001, 0.02) if betas == "linear" else (0.00085, 0.012))
    if betas == "linear":
        return np.linspace(first, last, num_train)
    return np.linspace(first**0.5, last**0.5, num_train) ** 2


def _spaced(
    num_steps: int, spacing: Spacing, offset: int, without_last: bool, num_train: int, original_steps: int
) -> Array:
    if num_steps > num_train:
        raise ValueError(f"num_steps: {num_steps}, the network was trained on {num_train} times")
    spaced = num_steps + without_last
    if spacing == "trailing":
        return np.round(num_train - np.arange(num_steps) * (num_train / num_steps)) - 1
    if spacing == "lcm":
        if not num_steps <= original_steps <= num_train:
            raise ValueError(f"num_steps: {num_steps}, the student knows {original_steps} times of {num_train}")
        known = np.arange(1, original_steps + 1) * (num_train // original_steps) - 1.0
        return np.asarray(known[::-1][np.floor(np.arange(num_steps) * original_steps / num_steps).astype(int)])
    if spacing == "leading":
        times = np.arange(spaced) * (num_train // spaced) + float(offset)
    else:
        times = np.linspace(0, num_train - 1, spaced).round() if spaced > 1 else np.array([num_train - 1.0])
    return np.asarray(times[::-1][:num_steps], np.float64)


# --- the schedules themselves


def linear_betas(beta_min: float, beta_max: float) -> Schedule:
    """The schedule of `vp_linear`."""

    def ratio(t: Array) -> Array:
        return np.asarray(np.sqrt(np.expm1(t * beta_min + t**2 * (beta_max - beta_min) / 2)))

    def time(ratio: Array) -> Array:
        integral = np.log1p(ratio**2)
        return np.asarray(2 * integral / (beta_min + np.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral)))

    return Schedule("vp", ratio, time)


def straight(time_scale: float = 1.0) -> Schedule:
    """The schedule of `flow`."""

    def ratio(t: Array) -> Array:
        with np.errstate(divide="ignore"):  # pure noise
            return np.asarray(t / (time_scale - t))

    def time(ratio: Array) -> Array:
        return np.asarray(_on_path("flow", ratio)[1] * time_scale)

    return Schedule("flow", ratio, time)


def trained(betas: Array) -> Schedule:
    """The schedule of `discrete`. Between whole times ratios are interpolated linearly, times in log-SNR."""
    with np.errstate(divide="ignore"):  # a last beta of 1 is pure noise
        table = np.sqrt(np.expm1(-np.cumsum(np.log1p(-betas))))
    whole = np.arange(len(table), dtype=np.float64)

    def ratio(t: Array) -> Array:
        return np.asarray(np.interp(t, whole, table))

    def time(ratio: Array) -> Array:
        with np.errstate(divide="ignore"):  # clean data is told the first time
            return np.interp(np.log(ratio), np.log(table), whole)

    return Schedule("vp", ratio, time, whole_times=True)


def _edm_time(ratio: Array) -> Array:
    with np.errstate(divide="ignore"):  # clean data
        return np.asarray(np.log(ratio) / 4)


EDM = Schedule("ve", lambda t: np.asarray(np.exp(4 * t)), _edm_time)
COSINE = Schedule("vp", lambda t: np.tan(np.pi * t / 2), lambda ratio: np.asarray(np.arctan(ratio) * (2 / np.pi)))


def _on_path(path: Path, ratio: Array) -> tuple[Array, Array]:
    """``(alpha, sigma)`` at each ratio."""
    if path == "ve":
        return np.ones_like(ratio), ratio
    total = np.hypot(1, ratio) if path == "vp" else 1 + ratio
    with np.errstate(invalid="ignore"):
        return 1 / total, np.where(np.isinf(ratio), 1.0, ratio / total)


def _levels(schedule: Schedule, t: Array, ratio: Array | None = None, start: float | None = None) -> Levels:
    """Levels at some times (or at their ratios, if those are known exactly), and clean data."""
    alpha, sigma = _on_path(schedule.path, schedule.ratio(t) if ratio is None else ratio)
    return Levels(np.append(alpha, 1.0), np.append(sigma, 0.0), np.array(t, np.float64), start, schedule)


def refuse_unknown(what: str, given: str, known: Sequence[str]) -> None:
    """Refuse a name that is none of those there are, and would else be taken for one of them."""
    if given not in known:
        raise ValueError(f"{what}: {given!r} is not one of {', '.join(known)}")


def _refuse_bad_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps}, must be at least 1")


def _refuse_bad_range(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    _refuse_bad_steps(num_steps)
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g} must satisfy 0 < sigma_min <= sigma_max")
