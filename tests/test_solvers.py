"""Solvers as tables: exact where any solver must be, of the order they claim, and served as they are written."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.kernels import fused_step, pack_rows
from fewstep.kernels.noise import normals
from fewstep.runtime import Bundle, Engine, Levels, Request, Tableau, TableauError
from fewstep.runtime import schedules as sch
from fewstep.runtime import solvers as sol
from fewstep.runtime.bundle import write_manifest
from fewstep.runtime.prediction import Prediction
from fewstep.runtime.solvers import SOLVERS, exponential
from fewstep.training.exact import Mixture, run

Array = NDArray[np.float64]
Solver = Callable[[Levels], Tableau]

MIXTURE = Mixture.random(dimensions=6, components=4, scale=0.3)
BATCH = 3

SCHEDULES: dict[str, Callable[[int], Levels]] = {
    "karras": sch.karras,
    "exponential": sch.exponential,
    "vp_cosine": sch.vp_cosine,
    "vp_linear": sch.vp_linear,
    "vp_linear log_snr": partial(sch.vp_linear, spacing="log_snr"),
    "vp_linear quadratic": partial(sch.vp_linear, spacing="quadratic", t_min=1e-4),
    "flow": partial(sch.flow, shift=3.0),
    "flow below noise": partial(sch.flow, t_max=0.999, time_scale=1000),
    "discrete": partial(sch.discrete, betas="scaled_linear", spacing="trailing"),
    "discrete cosine": partial(sch.discrete, betas="cosine"),
    "discrete karras": partial(sch.discrete, sigmas="karras"),
    "discrete lcm": partial(sch.discrete, betas="scaled_linear", spacing="lcm"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_knows_its_levels_both_ways(name: str) -> None:
    """Time gives the level and the level its time, at every level visited."""
    levels = SCHEDULES[name](9)
    assert levels.schedule is not None
    for level, _ in levels.steps():
        if name == "vp_cosine" and level.t == 1:  # where the log-SNR is bounded
            continue
        for again in (levels.schedule.at_time(level.t), levels.schedule.at_ratio(level.ratio)):
            if name == "discrete karras" and again.t == level.t:
                continue  # between trained times the two interpolations differ a little
            assert again.alpha == pytest.approx(level.alpha, rel=1e-9, abs=1e-12)
            assert again.sigma == pytest.approx(level.sigma, rel=1e-9)
            assert again.t == pytest.approx(level.t, rel=1e-9, abs=1e-9)


def test_levels_come_down() -> None:
    """A time that stands there twice, a level that is noisier than the one before, an unclean end: refused."""
    with pytest.raises(
        ValueError, match=r"^levels: level 2 is no cleaner than level 1 \(t = 0\.5 and 0\.5\); is a time"
    ):
        Levels(np.ones(4), np.array([1, 0.5, 0.5, 0]), np.array([1, 0.5, 0.5]))
    with pytest.raises(ValueError, match="level 1 is no cleaner than level 0"):
        Levels(np.ones(3), np.array([0.5, 1, 0]), np.array([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"^levels: the last must be clean, sigma = 0, not 0\.1$"):
        Levels(np.ones(2), np.array([0.5, 0.1]), np.array([1.0]))
    with pytest.raises(ValueError, match=r"^levels: sigma\[1\] is not finite$"):
        Levels(np.ones(3), np.array([0.5, np.nan, 0]), np.array([1.0, 0.5]))
    with pytest.raises(ValueError, match="is a time there twice"):
        sch.discrete(3, "cosine", sigmas="karras", num_train=1)


# --- laws


REFUSALS = r"straight path|count down to 0|some signal|says nothing new|misses the variance"


def is_refused(solver: str, levels: Levels) -> bool:
    """Whether the solver says it cannot visit these levels, and rightly so."""
    straight = np.abs(levels.alpha + levels.sigma - 1).max() < 1e-9
    if solver.startswith("flow_"):
        return not straight
    if solver == "tcd":
        return levels.schedule is None or levels.schedule.path == "ve"
    if solver == "lcm":
        return bool(levels.t.min() < 0)
    if solver == "dpm_solver_2m_sde" and levels[1].sigma and levels[0].alpha * 200 < levels[1].alpha * levels[0].sigma:
        return True  # its first noise is then hundreds of times that of its level
    slope_in_eps = ("euler", "heun", "pndm", "ipndm", "deis", "dpm_solver")
    return bool(levels.alpha[0] == 0) and solver.startswith(slope_in_eps) and solver != "euler_ancestral"


def is_steep(levels: Levels) -> bool:
    """Whether a step takes off more than 19/20 of the noise.

    Each of Runge-Kutta's four stages multiplies the rounding of eps by the step over the level it goes to.
    """
    ratio = np.array([levels[i].ratio for i in range(len(levels) - 1)])
    return bool((ratio[1:] < 0.05 * ratio[:-1]).any())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 12])
def test_with_one_data_point_every_solver_is_exact(schedule: str, steps: int) -> None:
    """However few the steps: the sample is the point. So sigma = 0 is never divided by, and no weight is lost."""
    levels = SCHEDULES[schedule](steps)
    generator = np.random.default_rng(0)
    point, eps = generator.standard_normal((2, 6))
    for name, solver in SOLVERS.items():
        if is_refused(name, levels):
            with pytest.raises(ValueError, match=REFUSALS):
                solver(levels)
            continue
        table = solver(levels)
        x = table.alpha[0] * point + table.sigma[0] * eps
        end = run(table, lambda *_: point, x, lambda _: generator.standard_normal(6))[-1]
        assert table.name == name
        if name == "pndm_rk" and is_steep(levels):
            continue
        assert np.isfinite(end).all()
        if name != "lcm":  # which keeps a little of the latent on purpose
            rounding = 1e-11 * max(100.0, levels[0].ratio)  # eps is a difference of latents this much larger than data
            assert np.abs(end - point).max() < rounding, name


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=7),
    first=st.floats(0.5, 100.0),
    path=st.sampled_from(["ve", "vp", "flow"]),
    name=st.sampled_from(sorted(set(SOLVERS) - {"tcd", "lcm", "pndm_rk", *(f"deis_{i}" for i in range(4))})),
)
def test_on_any_levels_too(gaps: list[float], first: float, path: Any, name: str) -> None:
    """The same law on random levels, on every path."""
    ratio = first * np.exp(-np.cumsum([0.0, *gaps]))
    alpha, sigma = (np.append(v, end) for v, end in zip(sch._on_path(path, ratio), (1.0, 0.0), strict=True))
    levels = Levels(alpha, sigma, np.arange(len(ratio), 0.0, -1.0))
    if is_refused(name, levels):
        return
    table = SOLVERS[name](levels)
    generator = np.random.default_rng(0)
    point, eps = generator.standard_normal((2, 4))
    x = table.alpha[0] * point + table.sigma[0] * eps
    end = run(table, lambda *_: point, x, lambda _: generator.standard_normal(4))[-1]
    assert np.abs(end - point).max() < 1e-8


UNIFORM = partial(sch.vp_linear, spacing="log_snr")

# The rate at which the error falls on levels uniform in log-SNR, or in t on the straight path, as measured. What each
# solver's theory says; iPNDM and PNDM are of order 2 for their equal weights, third-order multistep DPM-Solver and
# DPM-Solver++ are of 2 for the weight of their second difference, half of what the polynomial through its points has;
# SA-Solver's noise is of lower order than its slope.
ORDERS = {
    **dict.fromkeys(["ancestral", "ddim", "ddpm", "euler", "euler_ancestral", "flow_euler"], 1.0),
    **dict.fromkeys(["dpm_solver_1", "ipndm_1", "deis_0"], 1.0),
    **dict.fromkeys(["dpm_solver_2m", "dpm_solver_2m_sde", "dpm_solver_3m", "flow_heun"], 2.0),
    **dict.fromkeys(["heun", "dpmpp_2m", "dpmpp_2s", "dpm_solver_2", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde"], 2.0),
    **dict.fromkeys(
        ["deis_1", "deis_rho_1", "deis_log_rho_1", "ipndm_2", "ipndm_3", "ipndm_4", "pndm", "pndm_rk"], 2.0
    ),
    **dict.fromkeys(["dpm_solver_3", "dpmpp_3s", "deis_2", "deis_rho_2", "deis_log_rho_2", "unipc_2"], 3.0),
    **dict.fromkeys(["deis_3", "deis_rho_3", "deis_log_rho_3", "unipc_3"], 4.0),
    "sa_solver": 2.5,
}


def gaussian_error(solver: Solver, steps: int, levels: Callable[..., Levels] = UNIFORM) -> float:
    """How far the standard deviation of the samples is off on Gaussian data, worst of three widths, at t = 0.05.

    All is linear there, so latents are followed as their weights of the initial noise and of each fresh one.
    """
    table = solver(levels(steps + 1, t_min=0.05))
    width = np.array([0.25, 0.5, 0.8])[:, None]
    x = np.zeros((3, table.num_steps + 1))
    exact = np.hypot(table.alpha * width, table.sigma)
    x[:, 0] = exact[:, 0]

    def x0_of(x: Array, alpha: float, sigma: float) -> Array:
        return np.asarray(alpha * width**2 / (alpha**2 * width**2 + sigma**2) * x)

    def noise(i: int) -> Array:
        return np.asarray(np.eye(table.num_steps + 1)[i + 1])

    before_last = run(table, x0_of, x, noise)[-2]
    return float(np.abs(np.linalg.norm(before_last, axis=1) / exact[:, -2] - 1).max())


WHOLE: dict[str, Solver] = {
    "dpm_solver_3m": partial(sol.dpm_solver_3m, lower_order_final=False),
    "dpmpp_3m": partial(sol.dpmpp_3m, lower_order_final=False),
    "dpmpp_3m_sde": partial(sol.dpmpp_3m_sde, lower_order_final=False),
    "unipc_2": partial(sol.unipc, order=2, lower_order_final=False),
    "unipc_3": partial(sol.unipc, order=3, lower_order_final=False),
    "sa_solver": partial(sol.sa_solver, lower_order_final=False),
}  # without their lower orders at the end


@pytest.mark.parametrize("name", ORDERS)
def test_order(name: str) -> None:
    """The error falls as a power of the step."""
    levels = sch.flow if name.startswith("flow_") else UNIFORM
    errors = [gaussian_error(WHOLE.get(name, SOLVERS[name]), steps, levels) for steps in (36, 72)]
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(ORDERS[name], abs=0.4 if ORDERS[name] <= 2 else 0.55)


@pytest.mark.parametrize("name", ["dpmpp_3m", "dpm_solver_3m"])
def test_the_third_order_multistep_weight_is_what_lowers_its_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the second difference weighed as the polynomial has it, it is of third order."""
    hphi = exponential.hphi
    monkeypatch.setattr(exponential, "hphi", lambda k, z: 2 * hphi(k, z) if k == 3 else hphi(k, z))
    errors = [gaussian_error(WHOLE[name], steps) for steps in (36, 72)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.4)


def test_every_solver_of_an_ode_or_sde_has_its_order_tested() -> None:
    """All but the samplers of distilled students, which solve neither: more steps of a teacher bring them nowhere."""
    assert set(SOLVERS) - set(ORDERS) == {"consistency", "lcm", "meng_stochastic", "tcd"}


def ends(solver: Solver, levels: Levels) -> Array:
    """Samples from one noise, with the same fresh noises."""
    table = solver(levels)
    generator = np.random.default_rng(3)
    x, *noises = generator.standard_normal((table.num_steps + 1, BATCH, 6))
    return run(table, MIXTURE.x0, table.initial_scale * x, lambda i: noises[i])[-1]


@pytest.mark.parametrize(
    ("these", "schedule"),
    [
        (["ddim", "euler", "dpm_solver_1", "deis_0", "ipndm_1"], "vp_linear"),
        (["ddim", "flow_euler"], "flow"),
        (["ancestral", "ddpm", "euler_ancestral"], "karras"),
        (["ipndm_4", "pndm", "pndm_rk"], "one step"),
    ],
)
def test_one_solver_goes_by_many_names(these: list[str], schedule: str) -> None:
    """In whatever form the history is kept."""
    levels = sch.vp_linear(1) if schedule == "one step" else SCHEDULES[schedule](5)
    first, *others = (ends(SOLVERS[name], levels) for name in these)
    for other in others:
        assert np.allclose(other, first, rtol=1e-9)


@pytest.mark.parametrize(
    ("general", "special"),
    [
        (partial(sol.ddim, eta=1.0), sol.ancestral),
        (partial(sol.tcd, gamma=0.0), sol.ddim),
        (partial(sol.tcd, gamma=1.0), sol.consistency),
        (partial(sol.dpm_solver_2m_sde, eta=0.0), sol.dpm_solver_2m),
        (partial(sol.dpmpp_2m_sde, eta=0.0), sol.dpmpp_2m),
        (partial(sol.dpmpp_3m_sde, eta=0.0), sol.dpmpp_3m),
        (partial(sol.sa_solver, predictor=1, corrector=0, tau=0.0), sol.ddim),
        (partial(sol.sa_solver, predictor=1, corrector=0, tau=1.0), partial(sol.ddim, eta=1.0)),
        (partial(sol.unipc, order=1, corrector=False), sol.ddim),
        (partial(sol.unipc, order=2, corrector=False), sol.dpmpp_2m),
        (partial(sol.heun, churn=0.0), sol.heun),
    ],
)
def test_special_cases_of_one_another(general: Solver, special: Solver) -> None:
    """At an end of its options a solver is another solver, as its paper says."""
    levels = sch.vp_linear(6, spacing="log_snr")
    assert np.allclose(ends(general, levels), ends(special, levels), rtol=1e-9)


WRONG: Any = "squaredcos_cap_v2"  # diffusers' name of the cosine betas


def test_options_that_mean_nothing_are_refused_by_name_and_not_taken_for_others() -> None:
    """Each names the option; else a misspelt schedule would give samples, of another schedule."""
    levels = sch.karras(4)
    asked: list[tuple[str, Callable[[], object]]] = [
        ("betas: 'squaredcos_cap_v2' is not one of linear, scaled_linear, cosine", lambda: sch.discrete(4, WRONG)),
        ("spacing: 'squaredcos_cap_v2' is not one of leading, ", lambda: sch.discrete(4, spacing=WRONG)),
        ("sigmas: 'squaredcos_cap_v2' is not one of trained, ", lambda: sch.discrete(4, sigmas=WRONG)),
        ("spacing: 'squaredcos_cap_v2' is not one of time, ", lambda: sch.vp_linear(4, spacing=WRONG)),
        ("betas: shape \\[500\\], num_train is 1000", lambda: sch.discrete(4, np.linspace(1e-4, 0.02, 500))),
        ("betas: each must be 0 to 1", lambda: sch.discrete(4, np.linspace(-1e-4, 0.02, 1000))),
        ("shift: 0, must be above 0", lambda: sch.flow(4, 0.0)),
        ("time_scale: 0, must be above 0", lambda: sch.flow(4, time_scale=0.0)),
        ("t_max: 2, must be above 0 and at most 1", lambda: sch.flow(4, t_max=2.0)),
        ("beta_min 20 and beta_max 0.1", lambda: sch.vp_linear(4, 20.0, 0.1)),
        ("sigma_min 0.002 and sigma_max inf", lambda: sch.karras(4, sigma_max=math.inf)),
        ("rho: 0, must be above 0", lambda: sch.karras(4, rho=0.0)),
        ("ddim: eta 2, must be 0 to 1", lambda: sol.ddim(levels, eta=2.0)),
        ("ddim: eta -1, must be 0 to 1", lambda: sol.ddim(levels, eta=-1.0)),
        ("euler_ancestral: eta nan, must be 0 to 1", lambda: sol.euler_ancestral(levels, eta=math.nan)),
        ("dpmpp_2m_sde: eta -1, must be at least 0", lambda: sol.dpmpp_2m_sde(levels, eta=-1.0)),
        ("consistency: sigma_min -1, must be at least 0", lambda: sol.consistency(levels, sigma_min=-1.0)),
        ("unipc_3: b: 'squaredcos_cap_v2' is not one of bh1, bh2", lambda: sol.unipc(levels, b=WRONG)),
        ("unipc_3: kept: 'squaredcos_cap_v2' is not one of x0, eps", lambda: sol.unipc(levels, kept=WRONG)),
        ("deis: variable: 'squaredcos_cap_v2' is not one of t, rho", lambda: sol.deis(levels, variable=WRONG)),
        ("heun: churn -1, must be at least 0", lambda: sol.heun(levels, churn=-1.0)),
    ]
    for message, ask in asked:
        with pytest.raises(ValueError, match=f"^{message}"):
            ask()


def test_betas_that_end_in_pure_noise_are_taken() -> None:
    """As diffusers rescales them for zero terminal SNR: the last is 1."""
    betas = np.append(np.linspace(1e-4, 0.02, 999), 1.0)
    levels = sch.discrete(4, betas, spacing="trailing")
    assert levels[0].alpha == 0
    assert sol.ddim(levels, form="x0").num_steps == 4


def test_what_a_solver_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^unipc_5: order 5, must be 1 to 4$"):
        sol.unipc(sch.karras(3), 5)
    with pytest.raises(ValueError, match=r"^deis_rho_4: order 4, must be 0 to 3$"):
        sol.deis(sch.karras(3), 4, "rho")
    with pytest.raises(ValueError, match=r"^dpm_solver_4: order 4, must be 1 to 3$"):
        sol.dpm_solver(sch.karras(3), 4)
    with pytest.raises(ValueError, match=r"^sa_solver: predictor 5 must be 1 to 4, corrector 3 0 to 4$"):
        sol.sa_solver(sch.karras(3), 5)
    with pytest.raises(ValueError, match=r"^tcd: gamma 2 must be 0 to 1$"):
        sol.tcd(sch.vp_cosine(3), 2)
    unscheduled = replace(sch.karras(3), schedule=None)
    for solver in (sol.tcd, sol.deis, partial(sol.heun, churn=1.0), partial(sol.pndm, runge_kutta=True)):
        with pytest.raises(ValueError, match="the levels must know their schedule"):
            solver(unscheduled)
    with pytest.raises(TableauError, match=r"^euler: eps says nothing new at alpha = 0, sigma = 1$"):
        sol.euler(sch.flow(3))


# --- as served


@pytest.mark.parametrize(
    ("name", "window", "places"),
    [
        *((name, 1, 1) for name in ("ddim", "ancestral", "consistency", "lcm", "tcd")),
        *((name, 2, 2) for name in ("heun", "dpmpp_2m", "dpmpp_2s", "dpm_solver_2", "dpm_solver_2m", "deis_1")),
        *((name, 3, 3) for name in ("dpmpp_3m", "dpm_solver_3", "dpm_solver_3m", "unipc_2", "deis_2")),
        *((name, 4, 4) for name in ("unipc_3", "deis_3", "ipndm_4", "sa_solver")),
        ("pndm", 5, 4),  # its second prediction is used once
        ("pndm_rk", 13, 6),  # the first slope of each of three steps of four, and the one in work
    ],
)
def test_a_table_keeps_only_the_predictions_that_are_read_again(name: str, window: int, places: int) -> None:
    """However far back it reaches."""
    table = SOLVERS[name](sch.vp_linear(9))
    assert (table.history, table.num_places) == (window, places)


def test_the_scale_of_the_initial_noise_goes_with_the_table() -> None:
    """A DDPM's samples start from noise of scale 1, by its users' custom; its first level has a little less."""
    table = sol.ddim(sch.discrete(4))
    assert table.start == table.initial_scale == 1 > table.sigma[0]
    assert table.step_rows(Prediction("eps"))[0].c == 1
    again = Tableau.from_bytes(table.to_bytes())
    assert (again.start, again.sha256) == (1, table.sha256)
    assert sol.ddim(sch.karras(4)).start is None
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(TableauError, match=r"^ddim: start .* is not a positive number of float32$"):
            replace(table, start=bad)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_is_enough_and_unwritten_memory_is_not_read(name: str) -> None:
    """Rows in float32 by the fused step, the history memory full of NaN at first, against the same table in float64."""
    levels = sch.flow(8, t_max=0.95) if name.startswith("flow") else sch.vp_linear(8, t_max=0.95)
    table = SOLVERS[name](levels)
    prediction = Prediction("flow" if name.startswith("flow") else "v")
    rows = pack_rows(table.step_rows(prediction), table.num_places)
    seed = np.arange(BATCH, dtype=np.uint64)
    x, history = np.full((BATCH, 6), np.nan, np.float32), np.full((BATCH, table.num_places, 6), np.nan, np.float32)
    network_input = np.empty((BATCH, 6), np.float32)
    raw, nobody, one = network_input.copy(), np.full(BATCH, -1, np.int32), np.ones(BATCH, np.float32)
    for i in range(table.num_steps + 1):
        if i:
            alpha, sigma = float(table.alpha[i - 1]), float(table.sigma[i - 1])
            raw = MIXTURE.output(prediction, x.astype(np.float64), alpha, sigma).astype(np.float32)
        fused_step(rows, np.full(BATCH, i, np.int32), x, history, raw, nobody, one, seed, network_input)

    def noise(i: int) -> Array:
        return normals(seed, np.full(BATCH, i), 6).astype(np.float64)

    exact = run(table, MIXTURE.x0, table.initial_scale * noise(0), lambda i: noise(i + 1))[-1]
    assert np.abs(x - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
def test_every_solver_in_one_batch_is_itself_alone(path: str, baked: Bundle, bundle_copy: Path) -> None:
    """Requests for every table at once, joining and leaving: each sample has the bits it has on its own."""
    kinds: dict[str, tuple[Callable[[int], Levels], str]] = {
        "ve": (sch.karras, "edm"),
        "vp": (sch.vp_linear, "v"),
        "flow": (partial(sch.flow, t_max=0.98), "flow"),
    }
    levels, output = kinds[path]
    for file in (bundle_copy / "tableaus").iterdir():
        file.unlink()
    tables = []
    for name, solver in SOLVERS.items():
        for steps in (2, 5):
            if not is_refused(name, levels(steps)):
                tables.append(solver(levels(steps)))
                tables[-1].save(bundle_copy / "tableaus" / f"{name}-{steps}.safetensors")
    fields = baked.manifest.model_dump(mode="json", exclude={"files", "format"})
    fields |= {"path": path, "output": {"type": output}, "default_tableau": {"solver": "ddim", "num_steps": 2}}
    write_manifest(bundle_copy, fields)
    engine = Engine(Bundle.load(bundle_copy), max_rows=16, threads=1)
    requests = [Request(seed=i, tableau=table, label=i % 10) for i, table in enumerate(tables)]
    together = engine.generate(requests)
    for request, sample in zip(requests, together, strict=True):
        (alone,) = engine.generate([request])
        assert np.array_equal(alone.pixels, sample.pixels), request.tableau.name
    assert len({sample.pixels.tobytes() for sample in together}) == len(tables)
