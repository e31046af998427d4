"""Tables step as diffusers' schedulers do, on the same network, from the same noise and with the same noises.

In float64, latent by latent, on an exact mixture. Diffusers makes its levels in float32, so our tables are built on its
levels, made float64 on both sides (`grid`), and that both pick the same levels is tested apart, to float32. Some of
its steps cast the latent to float32; that cast is taken away (`in_float64`). The fused step, which is float32, is held
against the same float64 run. Where it does not end at clean
data or would divide by it, ``sigma = 1e-20`` stands for it. Where it is not the paper, a test says how.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import diffusers
import diffusers.schedulers as packages
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fewstep.kernels.fused_step import fused_step, pack_rows
from fewstep.kernels.noise import normals
from fewstep.runtime import Levels, Tableau
from fewstep.runtime import schedules as sch
from fewstep.runtime import solvers as sol
from fewstep.runtime.prediction import Prediction
from fewstep.runtime.solvers import dpm, exponential
from fewstep.training.exact import Mixture, run

Array = NDArray[np.float64]
Kind = Literal["x0", "eps", "v", "flow", "edm"]
Solver = Callable[[Levels], Tableau]

MIXTURE = Mixture.random(dimensions=6, components=4, scale=0.3)
BATCH = 3
CLEAN = 1e-20  # stands for sigma = 0 where diffusers would divide by it


# --- diffusers, in float64


@contextmanager
def in_float64(noises: list[Array]) -> Iterator[None]:
    """Casts to float32 do nothing, and fresh noise comes from a list."""
    left = iter(noises)

    def next_noise(*_: object, **__: object) -> torch.Tensor:
        return torch.from_numpy(next(left))

    modules = [m for name, m in vars(packages).items() if name.startswith("scheduling_") and hasattr(m, "randn_tensor")]
    saved = torch.float32, [m.randn_tensor for m in modules]
    torch.float32 = torch.float64
    torch.set_default_dtype(torch.float64)
    for module in modules:
        module.randn_tensor = next_noise
    try:
        yield
    finally:
        torch.float32 = saved[0]
        torch.set_default_dtype(torch.float32)
        for module, original in zip(modules, saved[1], strict=True):
            module.randn_tensor = original


def made(name: str, steps: int, clean: float | None = None, **config: Any) -> Any:
    """A scheduler with its levels in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations
        scheduler = getattr(diffusers, name)(**config)
        if hasattr(scheduler, "alphas_cumprod"):
            betas = sch.discrete_betas("linear", 1000)
            scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
            if hasattr(scheduler, "final_alpha_cumprod"):
                scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
            if hasattr(scheduler, "one"):
                scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        scheduler.set_timesteps(steps)
    if torch.is_tensor(getattr(scheduler, "sigmas", None)):
        scheduler.sigmas = scheduler.sigmas.double()
        if clean is not None:
            scheduler.sigmas[-1] = clean
    return scheduler


def grid(scheduler: Any, path: str) -> Levels:
    """The levels a scheduler visits, each once. ``path``: vp from its sigmas, ve, flow, or ddpm from its betas."""
    times = scheduler.timesteps.double().numpy()
    if path == "ddpm":
        times = np.unique(times)[::-1]
        bar = scheduler.alphas_cumprod[torch.from_numpy(times.astype(int))].numpy()
        alpha, sigma = np.append(np.sqrt(bar), 1.0), np.append(np.sqrt(1 - bar), 0.0)
        whole = scheduler.alphas_cumprod.numpy()
        betas = 1 - whole / np.append(1.0, whole[:-1])
        return Levels(alpha, sigma, times, schedule=sch.trained(betas))
    ratio = np.unique(scheduler.sigmas.numpy())[::-1]
    ratio = np.append(ratio[:-1], 0.0)
    _, first = np.unique(-scheduler.sigmas.numpy()[: len(times)], return_index=True)
    times = times[first]
    if path == "ve":
        return Levels(np.ones_like(ratio), ratio, times)
    if path == "flow":
        return Levels(1 - ratio, ratio, times)
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return Levels(alpha, ratio * alpha, times)


def their_points(
    scheduler: Any, table: Tableau, x: Array, noises: list[Array], kind: Kind, state: Array | None = None, **step: Any
) -> list[Array]:
    """Step a scheduler on the mixture. ``state``: its latent is ours over this (its sigma = sigma / alpha ones)."""
    points = [x]
    scale = np.ones(table.num_steps + 1) if state is None else state
    latent = torch.from_numpy(x / scale[0])
    with in_float64(noises), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, t in enumerate(scheduler.timesteps):
            raw = MIXTURE.output(Prediction(kind), points[-1], float(table.alpha[i]), float(table.sigma[i]))
            scheduler.is_scale_input_called = True
            latent = scheduler.step(torch.from_numpy(raw), t, latent, **step).prev_sample
            assert latent.dtype == torch.float64
            points.append(latent.numpy() * scale[i + 1])
    return points


def our_points(table: Tableau, x: Array, noises: dict[int, Array], kind: Kind) -> list[Array]:
    """Follow a table as it is served: the network's output is turned into the table's form by `Prediction`."""
    prediction = Prediction(kind)
    points = [x]
    history: list[Array] = []
    for i in range(table.num_steps):
        alpha, sigma = float(table.alpha[i]), float(table.sigma[i])
        k_x, k_m = prediction.to_form(table.form, alpha, sigma)
        history = [k_x * x + k_m * MIXTURE.output(prediction, x, alpha, sigma), *history]
        x = table.a[i] * x + sum(b * m for b, m in zip(table.b[i], history, strict=False) if b)
        if table.c[i]:
            x = x + table.c[i] * noises[i]
        points.append(x)
    return points


def served_points(table: Tableau, seeds: NDArray[np.uint64], kind: Kind) -> tuple[list[Array], list[Array]]:
    """The latents as the runtime makes them, by its fused step in float32, and the noises that its seeds stand for."""
    prediction = Prediction(kind)
    rows = table.step_rows(prediction)
    places = max(1, table.num_places)
    packed = pack_rows(rows, places)
    x, raw, network_input = (np.zeros((len(seeds), 6), np.float32) for _ in range(3))
    history = np.zeros((len(seeds), places, 6), np.float32)
    unguided = np.full(len(seeds), -1, np.int32), np.ones(len(seeds), np.float32)
    points: list[Array] = []
    for i in range(len(rows)):
        if i:
            raw[:] = MIXTURE.output(prediction, points[-1], float(table.alpha[i - 1]), float(table.sigma[i - 1]))
        row = np.full(len(seeds), i, np.int32)
        fused_step(packed, row, x, history, raw, *unguided, seeds, network_input)
        points.append(x.astype(np.float64))
    noises = [normals(seeds, np.full(len(seeds), row.noise_id, np.uint32), 6) for row in rows[1:]]
    return points, [noise.astype(np.float64) for noise in noises]


@dataclass(frozen=True)
class Case:
    """One scheduler held against one solver."""

    scheduler: str
    ours: Solver
    path: str = "vp"
    config: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ("eps", "v", "x0")
    steps: tuple[int, ...] = (1, 2, 3, 8)
    state: bool = False  # its latent is ours over alpha
    clean: float | None = None
    step: dict[str, Any] = field(default_factory=dict)
    last: bool = True  # whether the last row is compared
    served: float = 1e-4  # in float32; where eps is kept, x0 has its rounding times sigma / alpha
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.scheduler.removesuffix("Scheduler")


ZERO = {"final_sigmas_type": "zero"}
UNCLIPPED, TRAILING, LINSPACE = (
    {"clip_sample": False},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0}
RENOISE = {"stochastic_sampling": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
EPS = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "euler_at_final": True}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
multistep = partial(Case, "DPMSolverMultistepScheduler")
unipc = partial(Case, "UniPCMultistepScheduler")
adams = partial(Case, "SASolverScheduler", clean=CLEAN)

CASES = [
    Case("DDIMScheduler", sol.ddim, "ddpm", UNCLIPPED),
    Case("DDIMScheduler", sol.ddim, "ddpm", {**UNCLIPPED, **TRAILING}, steps=(2, 4, 8), name="DDIM-trailing"),
    Case("DDIMScheduler", partial(sol.ddim, form="eps"), "ddpm", UNCLIPPED, name="DDIM-eps"),
    Case("DDIMScheduler", partial(sol.ddim, eta=0.6), "ddpm", UNCLIPPED, step={"eta": 0.6}, name="DDIM-eta"),
    Case("DDPMScheduler", sol.ddpm, "ddpm", UNCLIPPED),
    Case("DDPMScheduler", sol.ancestral, "ddpm", {**UNCLIPPED, **LINSPACE}, name="DDPM-lin"),
    Case("EulerDiscreteScheduler", sol.euler, state=True),
    Case("EulerDiscreteScheduler", sol.euler, config={"use_karras_sigmas": True}, state=True, name="Euler-karras"),
    Case("EulerAncestralDiscreteScheduler", sol.euler_ancestral, state=True, kinds=("eps", "v")),
    Case("HeunDiscreteScheduler", sol.heun, state=True),
    Case("HeunDiscreteScheduler", sol.heun, config={"use_karras_sigmas": True}, state=True, name="Heun-karras"),
    Case("LMSDiscreteScheduler", partial(sol.deis, order=3, variable="rho"), state=True, steps=(1, 2, 3, 6)),
    Case("PNDMScheduler", sol.pndm, "ddpm", {"skip_prk_steps": True}, kinds=("eps",), steps=(1, 2, 3, 5, 10)),
    multistep(sol.dpmpp_2m, config=ZERO),
    multistep(sol.dpmpp_2m, config={**ZERO, "timestep_spacing": "leading"}, name="2M-leading"),
    multistep(sol.dpmpp_2m, config={**ZERO, **TRAILING}, name="2M-trailing"),
    multistep(sol.dpmpp_2m, config={**ZERO, "use_karras_sigmas": True}, steps=(2, 3, 8, 20), name="2M-karras"),
    multistep(sol.dpmpp_2m, config={**ZERO, "use_lu_lambdas": True}, steps=(2, 3, 8), name="2M-lambdas"),
    multistep(sol.dpmpp_2m, "flow", FLOW, ("flow",), name="2M-flow"),
    multistep(sol.dpmpp_3m, config={**ZERO, "solver_order": 3}, steps=(1, 2, 3, 4, 14, 20), name="3M"),
    multistep(sol.dpmpp_2m_sde, config={**ZERO, **SDE}, name="2M-SDE"),
    multistep(sol.dpm_solver_2m, config=EPS, clean=CLEAN, steps=(1, 2, 3, 8, 20), name="DPM-Solver-2M"),
    multistep(sol.dpm_solver_2m, config={**EPS, **TRAILING}, clean=CLEAN, name="DPM-Solver-2M-trailing"),
    multistep(
        sol.dpm_solver_3m, config={**EPS, "solver_order": 3}, clean=CLEAN, steps=(1, 2, 4, 14, 20), name="DPM-Solver-3M"
    ),
    multistep(
        sol.dpm_solver_2m_sde,
        config={**EPS, "algorithm_type": "sde-dpmsolver"},
        clean=CLEAN,
        last=False,  # theirs adds noise there
        name="DPM-Solver-2M-SDE",
    ),
    Case("DPMSolverSinglestepScheduler", sol.dpmpp_2s, config=ZERO, steps=(1, 2, 3, 4, 7), name="2S"),
    Case(
        "DPMSolverSinglestepScheduler",
        partial(sol.dpm_solver, order=2),
        config={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lower_order_final": True},
        steps=(2, 3, 4, 7),
        clean=CLEAN,
        served=2e-4,
        name="DPM-Solver-2",
    ),
    *(
        Case(
            "DEISMultistepScheduler",
            partial(sol.deis, order=order - 1, variable="log_rho", lower_order_final=True),
            config={"solver_order": order},
            clean=CLEAN,
            name=f"DEIS-{order}",
        )
        for order in (1, 2, 3)
    ),
    *(
        unipc(
            partial(sol.unipc, order=p, b=b),
            config={**ZERO, "solver_order": p, "solver_type": b},
            clean=CLEAN,
            name=f"UniPC-{p}-{b}",
        )
        for p in (1, 2, 3)
        for b in ("bh1", "bh2")
    ),
    unipc(
        partial(sol.unipc, order=3, kept="eps"),
        config={"solver_order": 3, "predict_x0": False},
        clean=CLEAN,
        served=3e-4,
        name="UniPC-eps",
    ),
    unipc(
        partial(sol.unipc, order=3, lower_order_final=False),
        config={**ZERO, "solver_order": 3, "lower_order_final": False},
        clean=CLEAN,
        steps=(8,),
        last=False,  # theirs extrapolates to clean data too, where log-SNR ends
        name="UniPC-whole",
    ),
    unipc(partial(sol.unipc, order=2), "flow", {**ZERO, **FLOW}, ("flow",), name="UniPC-flow"),
    adams(partial(sol.sa_solver, predictor=2, corrector=2, tau=lambda t: float(200 <= t <= 800)), name="SA-default"),
    *(
        adams(
            partial(sol.sa_solver, predictor=p, corrector=c, tau=tau),
            config={"predictor_order": p, "corrector_order": c, "tau_func": lambda _, tau=tau: tau},
            name=f"SA-P{p}C{c}-{tau:g}",
        )
        for p, c, tau in ((1, 1, 1.0), (2, 3, 0.5), (3, 3, 1.0), (3, 4, 0.0))
    ),
    Case("LCMScheduler", sol.lcm, "ddpm", steps=(1, 2, 4, 8)),
    Case("FlowMatchEulerDiscreteScheduler", sol.flow_euler, "flow", {"shift": 3.0}, ("flow",)),
    Case("FlowMatchEulerDiscreteScheduler", sol.consistency, "flow", RENOISE, ("flow",), name="FlowMatch-renoise"),
    Case("FlowMatchHeunDiscreteScheduler", sol.flow_heun, "flow", {"shift": 3.0}, ("flow",)),
    Case("EDMEulerScheduler", sol.euler, "ve", kinds=("edm",)),
    Case("EDMDPMSolverMultistepScheduler", sol.dpmpp_2m, "ve", kinds=("edm",)),
    Case("EDMDPMSolverMultistepScheduler", sol.dpmpp_3m, "ve", {"solver_order": 3}, kinds=("edm",), name="EDM-3M"),
    Case("EDMDPMSolverMultistepScheduler", sol.dpmpp_2m_sde, "ve", SDE, ("edm",), name="EDM-SDE"),
]


def farthest(ours: list[Array], theirs: list[Array]) -> float:
    """Largest relative distance of two runs, over the latents in turn."""
    assert len(ours) == len(theirs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_table_steps_as_diffusers_does(case: Case) -> None:
    """Every latent of every run is theirs to 1e-10, for each step count and prediction type; nearly, as served."""
    generator = np.random.default_rng(0)
    seeds = np.arange(BATCH, dtype=np.uint64)
    for steps in case.steps:
        for kind in case.kinds:
            config = dict(case.config)
            if case.scheduler.startswith(("FlowMatch", "EDM")) is False:
                config["prediction_type"] = NAMES[kind]
            scheduler = made(case.scheduler, steps, case.clean, **config)
            table = case.ours(grid(scheduler, case.path))
            assert list(table.t) == scheduler.timesteps.tolist()
            x = table.initial_scale * generator.standard_normal((BATCH, 6))
            noises = [generator.standard_normal((BATCH, 6)) for _ in range(table.num_steps)]
            theirs = their_points(scheduler, table, x, noises, kind, table.alpha if case.state else None, **case.step)
            ours = our_points(table, x, dict(enumerate(noises)), kind)
            upto = None if case.last else -1
            assert farthest(ours[:upto], theirs[:upto]) < 1e-10, (steps, kind)
            served, noises = served_points(table, seeds, kind)
            scheduler = made(case.scheduler, steps, case.clean, **config)
            state = table.alpha if case.state else None
            theirs = their_points(scheduler, table, served[0], noises, kind, state, **case.step)
            assert farthest(served[:upto], theirs[:upto]) < case.served, (steps, kind)


# --- where diffusers is not the paper


def both(scheduler: Any, table: Tableau, kind: Kind = "eps", **step: Any) -> tuple[list[Array], list[Array]]:
    """Our run and theirs, in VP latents."""
    generator = np.random.default_rng(1)
    x = table.initial_scale * generator.standard_normal((BATCH, 6))
    noises = [generator.standard_normal((BATCH, 6)) for _ in range(table.num_steps)]
    theirs = their_points(scheduler, table, x, noises, kind, **step)
    return our_points(table, x, dict(enumerate(noises)), kind), theirs


def test_ddim_goes_to_the_level_it_looks_at_next() -> None:
    """Diffusers' DDIM aims at ``t - 1000 // N`` whatever comes next, and misses it with linspace spacing; we do not."""
    scheduler = made("DDIMScheduler", 10, clip_sample=False, timestep_spacing="linspace")
    ours, theirs = both(scheduler, sol.ddim(grid(scheduler, "ddpm")))
    assert farthest(ours, theirs) > 1e-3
    # DDPM's and the sigma-based schedulers do go where they look next; DDPM's mean is DDIM's with eta = 1.
    scheduler = made("DDPMScheduler", 10, clip_sample=False, timestep_spacing="linspace")
    ours, theirs = both(scheduler, sol.ddim(grid(scheduler, "ddpm"), eta=1.0))
    assert farthest(ours, theirs) < 1e-10


def test_pndm_extrapolates_eps() -> None:
    """Diffusers' PNDM averages raw v outputs of different levels and takes eps from that; the paper averages eps."""
    scheduler = made("PNDMScheduler", 6, skip_prk_steps=True, prediction_type="v_prediction")
    table = sol.pndm(grid(scheduler, "ddpm"))
    ours, theirs = both(scheduler, table, "v")
    assert farthest(ours, theirs) > 1e-3
    scheduler = made("PNDMScheduler", 6, skip_prk_steps=True)
    assert farthest(ours, both(scheduler, table, "eps")[1]) < 1e-10


@pytest.mark.parametrize("steps", [4, 5, 10])
def test_pndm_starts_with_runge_kutta_steps(steps: int) -> None:
    """Twelve calls for the first three steps, every latent and every time as in diffusers.

    Where times are an odd number apart it goes to one middle and asks the network about another; we go where we ask.
    """
    times = made("PNDMScheduler", steps, skip_prk_steps=True)
    scheduler = made("PNDMScheduler", steps, skip_prk_steps=False)
    table = sol.pndm(grid(times, "ddpm"), runge_kutta=True)
    assert list(table.t) == scheduler.timesteps.tolist()
    assert table.num_steps == steps + 9
    assert farthest(*both(scheduler, table)) < 1e-10


@pytest.mark.parametrize("kept", ["eps", "x0"])
def test_the_inner_stage_of_the_third_order_single_step(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers reaches the second inner point with the midpoint weight ``hphi_1 / 2``; the paper's has ``hphi_2``."""
    algorithm = {"eps": "dpmsolver", "x0": "dpmsolver++"}[kept]
    config = {"algorithm_type": algorithm, "solver_order": 3, "lower_order_final": True}
    scheduler = made("DPMSolverSinglestepScheduler", 7, CLEAN, final_sigmas_type="sigma_min", **config)
    solver = sol.dpmpp_3s if kept == "x0" else partial(sol.dpm_solver, order=3)
    ours, theirs = both(scheduler, solver(grid(scheduler, "vp")))
    assert farthest(ours[:2], theirs[:2]) < 1e-10
    assert farthest(ours[:3], theirs[:3]) > 1e-4
    # Theirs is our second-order step there; the third stage is the same again.
    scheduler = made("DPMSolverSinglestepScheduler", 7, CLEAN, final_sigmas_type="sigma_min", **config)
    inner = exponential.correction

    def midpoint(k: int, here: Any, there: Any, kept: Any) -> float:
        whole = scheduler.sigmas.numpy()
        step = [int(np.abs(whole - level.ratio).argmin()) for level in (here, there)]
        return inner(1, here, there, kept) / 2 if k == 2 and step[1] - step[0] == 2 else inner(k, here, there, kept)

    monkeypatch.setattr(dpm, "correction", midpoint)
    ours, theirs = both(scheduler, solver(grid(scheduler, "vp")))
    assert farthest(ours, theirs) < 1e-10


def test_the_third_order_sde_is_k_diffusions() -> None:
    """Diffusers' 3M SDE has the 1/2 of phi_3 with the wrong sign, so its D2 weight does not vanish with the step."""
    scheduler = made("DPMSolverMultistepScheduler", 8, None, solver_order=3, **ZERO, **SDE)
    levels = grid(scheduler, "vp")
    ours, theirs = both(scheduler, sol.dpmpp_3m_sde(levels))
    assert farthest(ours[:3], theirs[:3]) < 1e-10
    assert farthest(ours[:4], theirs[:4]) > 1e-4

    sigma = np.append(np.geomspace(20, 0.05, 8), 0.0)
    table = sol.dpmpp_3m_sde(Levels(np.ones(9), sigma, np.zeros(8)), lower_order_final=False)
    generator = np.random.default_rng(0)
    x = start = sigma[0] * generator.standard_normal((BATCH, 6))
    noises = [generator.standard_normal((BATCH, 6)) for _ in range(8)]
    old: list[tuple[Array, float]] = []  # denoised and h of the steps before, newest first
    for i in range(7):  # k_diffusion/sampling.py: sample_dpmpp_3m_sde, eta = 1; its second step is of the other kind
        denoised = MIXTURE.x0(x, 1.0, sigma[i])
        h = math.log(sigma[i] / sigma[i + 1])
        h_eta = 2 * h
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        if len(old) >= 2:
            (denoised_1, h_1), (denoised_2, h_2) = old[:2]
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            phi_2 = math.expm1(-h_eta) / h_eta + 1
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif old:
            x = x - math.expm1(-h_eta) / 2 * (denoised - old[0][0]) * h / old[0][1]
        x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * h)) * noises[i]
        old = [(denoised, h), *old]
    assert np.allclose(x, run(table, MIXTURE.x0, start, lambda i: noises[i])[7], rtol=1e-10)


def test_tcd_ends_at_clean_data() -> None:
    """Diffusers' TCD ends at the first trained level; with clean data put there, all its steps are ours."""
    for steps in (1, 2, 4, 8):
        for gamma in (0.0, 0.3, 1.0):
            scheduler = made("TCDScheduler", steps)
            scheduler.alphas_cumprod[0] = 1.0
            ours, theirs = both(scheduler, sol.tcd(grid(scheduler, "ddpm"), gamma), eta=gamma)
            assert farthest(ours, theirs) < 1e-10, (steps, gamma)


def test_ddpm_clips_the_data_as_diffusers_does() -> None:
    """The static clip of x0 stands in the table row."""
    scheduler = made("DDPMScheduler", 5, clip_sample=True, clip_sample_range=0.5)
    table = replace(sol.ddpm(grid(scheduler, "ddpm")), clip=(-0.5, 0.5))
    generator = np.random.default_rng(0)
    noises = [generator.standard_normal((BATCH, 6)) for _ in range(5)]
    x = generator.standard_normal((BATCH, 6))
    theirs = their_points(scheduler, table, x, noises, "eps")
    ours = run(table, lambda *at: np.clip(MIXTURE.x0(*at), -0.5, 0.5), x, lambda i: noises[i])
    assert farthest(ours, theirs) < 1e-10


def test_consistency_models_sample_as_in_diffusers() -> None:
    """Renoised from ``sigma_min``, where a consistency model's data begin."""
    scheduler = made("CMStochasticIterativeScheduler", 4, clean=0.002, clip_denoised=False)
    levels = grid(scheduler, "ve")
    table = sol.consistency(levels, sigma_min=0.002)
    generator = np.random.default_rng(0)
    x = table.initial_scale * generator.standard_normal((BATCH, 6))
    noises = [generator.standard_normal((BATCH, 6)) for _ in range(5)]
    latent, theirs = torch.from_numpy(x), [x]
    with in_float64(noises):
        for i, t in enumerate(scheduler.timesteps):
            scheduler.is_scale_input_called = True
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[i])
            x0 = torch.from_numpy(MIXTURE.x0(theirs[-1], 1.0, float(scheduler.sigmas[i])))
            latent = scheduler.step((x0 - c_skip * latent) / c_out, t, latent).prev_sample
            theirs.append(latent.numpy())
    ours = run(table, MIXTURE.x0, x, lambda i: noises[i])
    assert farthest(ours, theirs) < 1e-9
    assert 0 < table.residual < 1e-8


def test_churn_is_edms_algorithm_2() -> None:
    """The network sees the churned latent. diffusers calls it before adding the noise, which is another sampler."""
    levels, churn, low, high, noise_scale = sch.karras(6), 4.0, 0.05, 100.0, 1.003
    table = sol.heun(levels, churn, (low, high), noise_scale)
    generator = np.random.default_rng(0)
    noises = [generator.standard_normal((BATCH, 6)) for _ in range(7)]
    x = levels.sigma[0] * noises[6]
    first: Array | None = None
    for i in range(6):
        here, there = levels.sigma[i : i + 2]
        gamma = min(churn / 6, math.sqrt(2) - 1) if low <= here <= high else 0.0
        hat = here * (1 + gamma)
        x = x + math.sqrt(hat**2 - here**2) * noise_scale * noises[i]
        first = x if first is None else first
        slope = (x - MIXTURE.x0(x, 1.0, hat)) / hat
        guess = x + (there - hat) * slope
        if there:
            guess = x + (there - hat) * (slope + (guess - MIXTURE.x0(guess, 1.0, there)) / there) / 2
        x = guess
    assert first is not None
    ours = run(table, MIXTURE.x0, first, lambda row: noises[(row + 1) // 2])
    assert np.allclose(ours[-1], x, rtol=1e-11)
    churned = np.flatnonzero(table.c)
    assert list(churned) == [1, 3, 5, 7]  # five of six levels are within the range: the first, and after these rows
    assert table.start is not None
    assert np.allclose(np.exp(4 * table.t), table.sigma[:-1])
    assert 0 < table.residual < 1e-2
    assert sol.heun(levels, churn, (low, high)).residual == 0


def test_ipndm_is_the_papers_loop() -> None:
    """Zhang & Chen 2022, appendix H.2, in sigma; diffusers' IPNDM is bound to one schedule of its own."""
    sigma = sch.karras(7).sigma
    weights = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    for order in range(1, 5):
        x = start = sigma[0] * np.random.default_rng(0).standard_normal((BATCH, 6))
        slopes: list[Array] = []
        for here, there in pairwise(sigma.tolist()):
            slopes = [(x - MIXTURE.x0(x, 1.0, here)) / here, *slopes][:order]
            x = x + (there - here) * np.tensordot(weights[len(slopes)], np.stack(slopes), 1)
        ours = run(sol.ipndm(sch.karras(7), order), MIXTURE.x0, start, np.empty)
        assert np.allclose(ours[-1], x, rtol=1e-11)


# --- levels


def as_shipped(name: str, steps: int, **config: Any) -> Any:
    """A scheduler with its own float32 levels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 3, 10, 30])
def test_discrete_levels_are_diffusers(betas: sch.Betas, steps: int) -> None:
    """The same times exactly, and the same levels to the float32 of theirs, for every way to space them."""
    start, end = (0.0001, 0.02) if betas == "linear" else (0.00085, 0.012)
    config: dict[str, Any] = {"beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(betas, betas)}
    config |= {"beta_start": start, "beta_end": end}
    spacings: tuple[sch.Spacing, ...] = ("leading", "trailing", "linspace")
    for spacing in spacings:
        offset = int(spacing == "leading")
        for name, without_last in (("DDIMScheduler", False), ("UniPCMultistepScheduler", True)):
            scheduler = as_shipped(name, steps, timestep_spacing=spacing, steps_offset=offset, **config)
            if len(set(scheduler.timesteps.tolist())) != steps:
                continue
            ours = sch.discrete(steps, betas, spacing=spacing, offset=offset, without_last=without_last)
            assert list(ours.t) == scheduler.timesteps.tolist()
            bar = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
            assert np.allclose(ours.alpha[:-1], np.sqrt(bar), rtol=1e-4, atol=1e-6)
            assert ours.start == 1
    variants: dict[Literal["karras", "exponential"], str] = {
        "karras": "use_karras_sigmas",
        "exponential": "use_exponential_sigmas",
    }
    for ours_name, theirs_name in variants.items():
        scheduler = as_shipped("UniPCMultistepScheduler", steps, **{theirs_name: True}, **config)
        if not np.isfinite(scheduler.sigmas.numpy()).all():
            continue
        ours = sch.discrete(steps, betas, sigmas=ours_name)
        assert np.allclose(ours.sigma / ours.alpha, scheduler.sigmas.numpy(), rtol=2e-3)
        assert np.abs(ours.t - scheduler.timesteps.numpy()).max() <= 1  # theirs are whole, ours between the trained


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_times_of_lcm_students_are_diffusers(steps: int) -> None:
    scheduler = as_shipped("LCMScheduler", steps)
    levels = sch.discrete(steps, "scaled_linear", spacing="lcm")
    assert list(levels.t) == scheduler.timesteps.tolist()


def test_flow_levels_are_diffusers() -> None:
    """Uniform times are the pipelines'; the scheduler's own default has a last time, which it shifts twice."""
    scheduler = as_shipped("FlowMatchEulerDiscreteScheduler", 5, shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    assert np.allclose(sch.flow(5, 3.0).sigma, scheduler.sigmas.numpy(), rtol=1e-6)
    scheduler.set_timesteps(5)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    ours = sch.flow(5, 3.0, t_min=once, time_scale=1000)
    assert np.allclose(ours.sigma, scheduler.sigmas.numpy(), rtol=1e-5)
    assert np.allclose(ours.t, scheduler.timesteps.numpy(), rtol=1e-5)
    with_flow = as_shipped("DPMSolverMultistepScheduler", 6, use_flow_sigmas=True, flow_shift=2.0)
    assert np.allclose(sch.flow(6, 2.0, t_max=0.999).sigma, with_flow.sigmas.numpy(), rtol=1e-5)
