"""The solvers: each is a function from noise levels to a `Tableau`, citing its paper and equation.

    x[i+1] = a[i] * x[i] + sum_j b[i, j] * m[i-j] + c[i] * noise                                  (1)

Each is written once as ordinary code and compiled by `tracer`; nobody expands algebra by hand. All end in the
same way: at ``sigma = 0`` the answer is the last ``x0`` itself (or, in a method that extrapolates eps, its
extrapolation).

    one_step             ddim, ancestral, euler, flow_euler, consistency, lcm, tcd
    runge_kutta          heun with churn, flow_heun
    adams                pndm, ipndm, deis
    meng                 meng_stochastic, of guided students
    dpm                  dpm_solver and dpmpp, single-step, multistep and SDE
    predictor_corrector  unipc, sa_solver
"""

from collections.abc import Callable
from functools import partial

from ..schedules import Levels
from ..tableau import Tableau
from .adams import deis, ipndm, pndm
from .dpm import (
    dpm_solver,
    dpm_solver_2m,
    dpm_solver_2m_sde,
    dpm_solver_3m,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_3m_sde,
    dpmpp_3s,
)
from .meng import meng_stochastic
from .one_step import ancestral, consistency, ddim, ddpm, euler, euler_ancestral, flow_euler, lcm, tcd
from .predictor_corrector import sa_solver, unipc
from .runge_kutta import flow_heun, heun

# By the name of the table they make with their defaults.
SOLVERS: dict[str, Callable[[Levels], Tableau]] = {
    "ancestral": ancestral,
    "consistency": consistency,
    "ddim": ddim,
    "ddpm": ddpm,
    **{f"deis_{order}": partial(deis, order=order) for order in range(4)},
    **{f"deis_rho_{order}": partial(deis, order=order, variable="rho") for order in range(1, 4)},
    **{f"deis_log_rho_{order}": partial(deis, order=order, variable="log_rho") for order in range(1, 4)},
    **{f"dpm_solver_{order}": partial(dpm_solver, order=order) for order in range(1, 4)},
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_2m_sde": dpm_solver_2m_sde,
    "dpm_solver_3m": dpm_solver_3m,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_3s": dpmpp_3s,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "flow_euler": flow_euler,
    "flow_heun": flow_heun,
    "heun": heun,
    **{f"ipndm_{order}": partial(ipndm, order=order) for order in range(1, 5)},
    "lcm": lcm,
    "meng_stochastic": meng_stochastic,
    "pndm": pndm,
    "pndm_rk": partial(pndm, runge_kutta=True),
    "sa_solver": sa_solver,
    "tcd": tcd,
    "unipc_2": partial(unipc, order=2),
    "unipc_3": partial(unipc, order=3),
}

_ADAPTS = (
    "chooses its steps by the error it sees on each sample, so nobody knows beforehand how many there will be or at "
    "which levels, and a table's rows are fixed; run it once elsewhere and make a table on the levels it accepted"
)
_GOES_BACK = (
    "adds noise inside a step and goes back to before it, so a second latent would have to be kept; dpmpp_2m_sde and "
    "sa_solver add noise and need none"
)
_ITERATES = "repeats a step until it converges, and a table's rows are fixed; name a solver with that many rows"

# Samplers that people ask for and that no table can be, with the reason.
WITHOUT_TABLE: dict[str, str] = {
    **dict.fromkeys(("dpm_adaptive", "dpm_solver_adaptive", "rk45", "rk23", "dopri5", "bosh3", "ode45"), _ADAPTS),
    **dict.fromkeys(("dpmpp_sde", "seeds_2", "seeds_3"), _GOES_BACK),
    **dict.fromkeys(("paradigms", "picard", "parataa"), _ITERATES),
}


def why_no_table(name: str) -> str | None:
    """Why a sampler of that name cannot be had, if it is one of those that no table can be."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_").replace("++", "pp")
    return WITHOUT_TABLE.get(plain)


__all__ = [
    "SOLVERS",
    "WITHOUT_TABLE",
    "ancestral",
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_2m",
    "dpm_solver_2m_sde",
    "dpm_solver_3m",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_3s",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "heun",
    "ipndm",
    "lcm",
    "meng_stochastic",
    "pndm",
    "sa_solver",
    "tcd",
    "unipc",
    "why_no_table",
]
