"""Each distillation method on data whose best predictor is known in closed form, so that nothing is owed to a teacher.

A student is mostly a small family of functions that contains the right answer: then the method has to find it, not
to come near it.
"""

import csv
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime import Engine, Request
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import ancestral, consistency, ddim, meng_stochastic
from fewstep.training import Denoiser, Images, TrainingError, load_checkpoint, sample, train
from fewstep.training import recipe as settings_of
from fewstep.training.consistency import consistency_distillation, consistency_tuning, heun_step, lower_level
from fewstep.training.denoiser import Predictor, per_row
from fewstep.training.distillation import Distillation, from_itself, posterior, renoise
from fewstep.training.dkdm import Pool, dkdm
from fewstep.training.exact import Mixture
from fewstep.training.guided import stage_one
from fewstep.training.loop import Batch, Plan, generator
from fewstep.training.matching import diff_instruct, direction, dmd, moment_matching
from fewstep.training.methods import METHODS, method_of
from fewstep.training.output_distillation import output_distillation
from fewstep.training.parameter_matching import moved_by, parameter_matching, predict, teacher_gradient
from fewstep.training.progressive import progressive_plan, subdivided, two_steps
from fewstep.training.reflow import reflow
from fewstep.training.report import evaluate
from fewstep.training.sampling import ve_levels
from fewstep.training.student_bundle import export_checkpoint

SHAPE = (1, 2, 2)
IMAGES = Images(
    np.zeros((4, *SHAPE), np.uint8), np.arange(4) % 2, np.zeros((2, *SHAPE), np.uint8), np.arange(2), ("a", "b")
)
SPREAD = 0.6  # standard deviation of the data where they are normal


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


# --- what is known


class Exact(nn.Module):
    """The best predictor of a mixture of normals in two classes, with the mixture as its parameters."""

    def __init__(self, scale: float = 0.25) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(4, 4, generator=generator(5)))
        self.scale = scale

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        if w is not None:
            free = self(x, sigma, torch.full_like(label, 2))
            return free + per_row(1 + w) * (self(x, sigma, label) - free)  # type: ignore[no-any-return]
        variance = self.scale**2 + sigma[:, None] ** 2
        off = x.reshape(-1, 1, 4) - self.means
        mine = (label[:, None] == 2) | (torch.arange(4) // 2 == label[:, None])
        share = torch.softmax(-(off**2).sum(-1) / (2 * variance) + torch.where(mine, 0.0, -math.inf), 1)
        return (share[..., None] * (self.means + (self.scale**2 / variance)[..., None] * off)).sum(1).reshape(x.shape)

    def data(self, count: int, rng: torch.Generator) -> Batch:
        which = torch.randint(4, (count,), generator=rng)
        x = self.means.detach()[which] + self.scale * torch.randn(count, 4, generator=rng)
        return Batch(x.reshape(-1, *SHAPE), which // 2)

    def even(self, count: int) -> Tensor:
        """Data of which each component has the same number, so that a distance has little noise."""
        means = self.means.detach()[torch.arange(count) % 4]
        return means + self.scale * torch.randn(count, 4, generator=generator(4))


class Normal(nn.Module):
    """The best predictor of data that are normal with a deviation that is its parameter."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        return per_row(self.deviation**2 / (self.deviation**2 + sigma**2)) * x

    def data(self, count: int, rng: torch.Generator) -> Batch:
        x = SPREAD * torch.randn(count, *SHAPE, generator=rng)
        return Batch(x, torch.zeros(count, dtype=torch.int64))


class Gain(nn.Module):
    """A predictor that is a number times the latent: ``gain(parameter, sigma)``."""

    def __init__(self, start: float, gain: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))
        self.gain = gain

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        return per_row(self.gain(self.value, sigma)) * x


class Corrected(nn.Module):
    """The exact predictor and a small network beside it, zero at first."""

    def __init__(self, exact: Exact) -> None:
        super().__init__()
        self.exact = [exact]  # hidden from `parameters`
        last = nn.Linear(48, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(4 + 4 + 2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), last)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            base = self.exact[0](x, sigma, label)
        flat = torch.cat(
            [(x / per_row(1 + sigma)).flatten(1), base.flatten(1), sigma[:, None].log(), label[:, None].float()], 1
        )
        return base + per_row(sigma / (1 + sigma)) * self.net(flat).reshape(x.shape)  # type: ignore[no-any-return]


def made(teacher: Predictor, student: Predictor, auxiliary: Predictor | None = None, **choices: Any) -> Distillation:
    fields: dict[str, Any] = {"sigmas": (5.0, 0.8), "sigma_floor": 0.02, "sigma_data": 1.0, "images": IMAGES}
    return Distillation(teacher, student, auxiliary or student, **(fields | choices))


def take(plan: Plan, data: Callable[[int, torch.Generator], Batch], steps: int) -> list[dict[str, float]]:
    """Carry out a plan as the loop does, without its files."""
    plan = replace(plan, images=steps * plan.batch)
    networks = {turn.name: turn for turn in plan.turns}
    optimizers = {
        name: torch.optim.Adam(turn.network.parameters(), betas=(turn.beta1, 0.99)) for name, turn in networks.items()
    }
    log = []
    for step in range(steps):
        row: dict[str, float] = {}
        for index, turn in enumerate(plan.turns):
            rng = generator(3, step, index)
            for group in optimizers[turn.name].param_groups:
                group["lr"] = turn.learning_rate * plan.rate(step)
            optimizers[turn.name].zero_grad()
            losses = turn.loss(data(plan.batch, rng), rng)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(turn.network.parameters(), 1.0)
            optimizers[turn.name].step()
            row |= {f"{turn.name}.{name}": float(value.detach()) for name, value in losses.items()}
        log.append(row)
    return log


def draw(predictor: Predictor, table: Any, count: int = 4_000, seed: int = 1) -> Tensor:
    return sample(predictor, table, torch.arange(count) % 2, SHAPE, generator(seed), batch=count).flatten(1)


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein distance."""
    directions = torch.nn.functional.normalize(torch.randn(4, 64, generator=generator(9)), dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).pow(2).mean().sqrt())


def test_the_mixture_here_is_that_of_the_tests_of_solvers() -> None:
    exact = Exact()
    known = Mixture(exact.means.detach().double().numpy(), np.full(4, exact.scale), np.full(4, 0.25))
    x = torch.randn(20, *SHAPE, generator=generator(0))
    ours = exact(x, torch.full((20,), 0.7), torch.full((20,), 2)).detach().flatten(1)
    np.testing.assert_allclose(ours.numpy(), known.x0(x.flatten(1).double().numpy(), 1.0, 0.7), atol=1e-5)


# --- prediction types


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow", "edm"])
def test_every_prediction_type_says_the_same_data(prediction: Any) -> None:
    """A network that knows data and noise, asked in its own terms on its own path, gives the data back."""
    x0, eps = torch.randn(2, 6, *SHAPE, generator=generator(1)).double()
    sigma = torch.logspace(-2, 1.5, 6).double()
    alpha = {"flow": 1 / (1 + sigma), "edm": torch.ones(6).double()}.get(prediction, 1 / torch.sqrt(1 + sigma**2))

    def network(scaled: Tensor, t: Tensor, label: Tensor) -> Tensor:
        a, s = per_row(alpha), per_row(alpha * sigma)
        if prediction == "edm":
            c_skip, c_out = 1 / (1 + s**2), s / torch.sqrt(1 + s**2)
            return torch.as_tensor((x0 - c_skip * (x0 + s * eps)) / c_out)
        torch.testing.assert_close(scaled, a * x0 + s * eps)
        said: dict[str, Tensor] = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}
        return said[prediction]

    denoiser = Denoiser(network, 1.0, 2, prediction=prediction)
    torch.testing.assert_close(denoiser(x0 + per_row(sigma) * eps, sigma, torch.zeros(6, dtype=torch.int64)), x0)


# --- the gradient that three methods share


@pytest.mark.parametrize("way", ["moment-matching", "diff-instruct", "dmd"])
def test_the_shared_gradient_is_the_closed_form(way: str) -> None:
    """Normal data, a student ``a * noise``: its auxiliary and so the gradient in ``a`` are known.

    For renoised z_s that is sigma^2 times the gradient of the divergence of the two normals at the level s.
    """
    a, sigma_t, sigma_s, count = 0.9, 4.0, 0.8, 200_000
    keep = (sigma_s / sigma_t) ** 2
    on_noise, spread = (
        (keep * sigma_t + (1 - keep) * a, sigma_s * math.sqrt(1 - keep)) if way == "moment-matching" else (a, sigma_s)
    )
    variance = on_noise**2 + spread**2
    slope = a * on_noise / variance  # of E[x0 | z_s]
    gain = Gain(a, lambda a, sigma: a / sigma_t * torch.ones_like(sigma))
    distillation = made(
        Normal(SPREAD), gain, Gain(0.0, lambda _, sigma: slope * torch.ones_like(sigma)), sigmas=(sigma_t,),
        source=from_itself, draw=posterior if way == "moment-matching" else renoise,
        level=lambda *_: torch.full((count,), sigma_s),
    )  # fmt: skip
    label = torch.zeros(count, dtype=torch.int64)
    jump = distillation.jump(Batch(torch.zeros(count, *SHAPE), label), generator(2))
    with torch.no_grad():
        towards = direction(distillation, jump, label, 0.0, way == "dmd")
        if way == "dmd":
            target = distillation.teacher(jump.z_s, jump.sigma_s, label)
            towards = towards * (jump.x0 - target).abs().mean((1, 2, 3), keepdim=True)
    (jump.x0 * towards).mean().backward()  # type: ignore[no-untyped-call]
    expected = (slope - SPREAD**2 / (SPREAD**2 + sigma_s**2)) * on_noise
    assert gain.value.grad is not None
    assert float(gain.value.grad) == pytest.approx(expected, abs=0.01 * abs(expected) + 1e-3)
    if way != "moment-matching":
        divergence = a * (1 / (SPREAD**2 + sigma_s**2) - 1 / (a**2 + sigma_s**2))
        assert expected == pytest.approx(sigma_s**2 * divergence)


def test_the_gradient_vanishes_where_the_student_is_right() -> None:
    """A student that draws exact samples, and an auxiliary that knows it: the teacher has nothing to add."""
    exact, count = Exact(), 4_000
    known = exact.data(count, generator(1))
    distillation = made(exact, lambda *_: known.x, exact, source=from_itself, draw=renoise, sigmas=(5.0,))
    jump = distillation.jump(Batch(torch.zeros(count, *SHAPE), known.label), generator(2))
    with torch.no_grad():
        assert direction(distillation, jump, known.label, 0.0, False).abs().max() == 0


WAYS: dict[str, tuple[Any, Callable[..., Plan], tuple[float, ...], Any]] = {
    "moment matching": (settings_of.MomentMatching(), moment_matching, (10.0, 1.5), ancestral),
    "moment matching, data-free": (
        settings_of.MomentMatching(source="backward"), moment_matching, (10.0, 1.5), ancestral,
    ),
    "DMD": (settings_of.Dmd(auxiliary_turns=2), dmd, (10.0, 1.5), consistency),
    "Diff-Instruct": (settings_of.DiffInstruct(), diff_instruct, (10.0,), consistency),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_matching_brings_few_steps_to_the_data(way: str) -> None:
    """The student's samples come nearer to the data than the teacher's in as many steps; measured 0.5 times as far."""
    settings, method, sigmas, solver = WAYS[way]
    exact = Exact()
    student, auxiliary = Corrected(exact), Corrected(exact)
    settings = replace(settings, learning_rate=5e-3, auxiliary_learning_rate=2e-2, weight_power=0.0, batch=128)
    distillation = made(exact, student, auxiliary, sigmas=sigmas)
    table, real = solver(ve_levels(sigmas)), exact.even(4_000)
    before = sliced(draw(student, table), real)
    take(method(settings, distillation), exact.data, 250)
    assert sliced(draw(student, table), real) < 0.75 * before


def test_moment_matching_lowers_the_residual_of_its_moments() -> None:
    """The part of ``x0 - teacher(z_s)`` that z_s can tell: what moment matching is to make zero."""
    exact = Exact()
    student = Corrected(exact)
    settings = replace(
        settings_of.MomentMatching(), learning_rate=3e-3, auxiliary_learning_rate=6e-3, weight_power=0.0, batch=128
    )
    distillation = made(exact, student, Corrected(exact))

    def residual() -> float:
        batch = exact.data(8_000, generator(6))
        with torch.no_grad():
            jump = distillation.jump(batch, generator(7))
            said = exact(jump.z_s, jump.sigma_s, batch.label)
        z = (jump.z_s / per_row(1 + jump.sigma_s)).flatten(1)
        first, second = torch.triu_indices(4, 4)
        pairs = z[:, first] * z[:, second]
        features = torch.cat([torch.ones(len(z), 1), z, pairs, said.flatten(1), batch.label[:, None] * z], 1).double()
        off = (jump.x0 - said).flatten(1).double()  # least squares in single precision drops features by chance
        told = features @ torch.linalg.lstsq(features, off).solution
        return float((told**2).mean())

    before = residual()
    take(moment_matching(settings, distillation), exact.data, 500)
    assert residual() < 0.5 * before


# --- in parameter space


def test_the_forward_mode_product_is_a_difference_of_teachers() -> None:
    exact = Exact().double()
    theta = {name: value.detach() for name, value in exact.named_parameters()}
    nu = {"means": torch.randn(4, 4, generator=generator(1)).double()}
    x, sigma = torch.randn(5, *SHAPE, generator=generator(2)).double(), torch.full((5,), 0.9).double()
    label = torch.arange(5) % 3
    ahead, behind = (
        predict(exact, {"means": theta["means"] + h * nu["means"]}, x, sigma, label) for h in (1e-5, -1e-5)
    )
    torch.testing.assert_close(moved_by(exact, theta, nu, x, sigma, label), (ahead - behind) / 2e-5, atol=1e-8, rtol=0)


def test_parameter_matching_leaves_the_teacher_nothing_to_learn() -> None:
    """The teacher's gradient on the student's samples, which vanishes on data, falls to less than a half."""
    exact = Exact()
    student = Corrected(exact)
    settings = replace(
        settings_of.ParameterMatching(), learning_rate=3e-3, weight_power=0.0, batch=256, moment_images=256
    )
    distillation = made(exact, student)
    theta = {name: value.detach() for name, value in exact.named_parameters()}
    plan = parameter_matching(settings, distillation)
    plan.memory["square.means"].fill_(1e-4)
    plan.memory["is_filled"].fill_(True)

    def slope() -> float:
        batch = exact.data(20_000, generator(6))
        with torch.no_grad():
            jump = distillation.jump(batch, generator(7))
        slope = teacher_gradient(distillation, theta, jump.x0, jump.z_s, jump.sigma_s, batch.label)["means"]
        return float(slope.norm())

    before = slope()
    take(plan, exact.data, 150)
    assert slope() < 0.5 * before


# --- progressive and guided


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_progressive_target_is_two_steps_of_the_teacher(steps: int) -> None:
    """A student that predicts the target ends, in N steps, where the teacher ends in 2 N."""
    exact, sigmas = (
        Exact(),
        karras(4, 0.25, 20.0).sigma[:-1].tolist()[:steps] if steps < 4 else karras(4, 0.25, 20.0).sigma[:-1].tolist(),
    )
    fine = (*subdivided(tuple(sigmas), 0.02, 2), 0.0)

    def student(x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        place = int((torch.tensor(fine) - sigma[0]).abs().argmin())
        t, middle, s = (torch.full_like(sigma, fine[place + i]) for i in range(3))
        return two_steps(exact, x, t, middle, s, label)

    twice = draw(exact, ddim(ve_levels(fine[:-1])), 200)
    torch.testing.assert_close(draw(student, ddim(ve_levels(sigmas)), 200), twice, atol=2e-4, rtol=0)


def test_the_progressive_target_is_that_of_the_paper() -> None:
    """Equation (1) of `progressive` against ``(z'' - s/t z) / (1 - s/t)``, in double precision."""
    exact = Exact().double()
    z, label = torch.randn(7, *SHAPE, generator=generator(1)).double() * 3, torch.arange(7) % 3
    t, middle, s = (torch.full((7,), level).double() for level in (3.0, 1.1, 0.4))
    x1 = exact(z, t, label)
    z1 = x1 + 1.1 / 3.0 * (z - x1)
    x2 = exact(z1, middle, label)
    z2 = x2 + 0.4 / 1.1 * (z1 - x2)
    torch.testing.assert_close(two_steps(exact, z, t, middle, s, label), (z2 - 0.4 / 3.0 * z) / (1 - 0.4 / 3.0))


def test_grids_of_halvings_lie_inside_one_another() -> None:
    sigmas = tuple(karras(4, 0.25, 20.0).sigma[:-1])
    for parts in (2, 4, 8):
        assert subdivided(sigmas, 0.02, parts)[::parts] == pytest.approx(sigmas)
        assert subdivided(subdivided(sigmas, 0.02, parts), 0.02, 2) == pytest.approx(
            subdivided(sigmas, 0.02, 2 * parts)
        )


def test_a_small_student_learns_two_steps_in_one() -> None:
    exact = Exact()
    student, sigmas = Corrected(exact), (5.0, 0.8)
    settings = replace(settings_of.Progressive(num_steps=2, start_steps=4), learning_rate=5e-3, batch=128)
    goal = draw(exact, ddim(ve_levels(subdivided(sigmas, 0.02, 2))), 2_000)
    before, table = draw(student, ddim(ve_levels(sigmas)), 2_000), ddim(ve_levels(sigmas))
    take(progressive_plan(settings, made(exact, student, sigmas=sigmas)), exact.data, 300)
    assert (draw(student, table, 2_000) - goal).pow(2).mean() < 0.25 * (before - goal).pow(2).mean()


class Blend(nn.Module):
    """Guided by a sum of Legendre's polynomials in w, of which ``3, 2, 0`` is the exact guided field."""

    def __init__(self, exact: Exact) -> None:
        super().__init__()
        self.exact = [exact]
        self.powers = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        assert w is not None
        u = (w - 2) / 2
        with torch.no_grad():
            asked, free = self.exact[0](x, sigma, label), self.exact[0](x, sigma, torch.full_like(label, 2))
        weight = self.powers[0] + self.powers[1] * u + self.powers[2] * (3 * u**2 - 1) / 2
        return free + per_row(weight) * (asked - free)  # type: ignore[no-any-return]


def test_stage_one_finds_the_guided_field() -> None:
    exact = Exact()
    student = Blend(exact)
    settings = replace(settings_of.Guided(), learning_rate=0.05, batch=128)
    take(stage_one(settings, made(exact, student)), exact.data, 200)
    assert student.powers.tolist() == pytest.approx([3, 2, 0], abs=0.05)


def test_the_stochastic_sampler_keeps_the_marginals_of_a_student_of_two_cells() -> None:
    """Normal data and a student whose step of two cells is the exact flow: the samples deviate as the data do."""
    sigmas = (20.0, 5.0, 1.5, 0.4)
    grid = torch.tensor([*sigmas, 0.0, 0.0])

    def student(x: Tensor, sigma: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        t, past = float(sigma[0]), float(grid[int((grid - sigma[0]).abs().argmin()) + 2])
        flow = math.sqrt((SPREAD**2 + past**2) / (SPREAD**2 + t**2)) * x
        return (flow - past / t * x) / (1 - past / t)

    x = draw(student, meng_stochastic(ve_levels(sigmas)))
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.02)
    noisy = meng_stochastic(ve_levels(sigmas))
    assert (noisy.c[:-1] > 0).all()
    assert noisy.c[-1] == 0


def test_stages_of_guided_distillation() -> None:
    settings = settings_of.Guided(num_steps=4, start_steps=16, stochastic=True)
    sigmas = tuple(karras(4, 0.25, 40.0).sigma[:-1])
    stages = method_of(settings).stages(settings, sigmas)
    assert [(stage.name, len(stage.sigmas)) for stage in stages] == [
        ("student-guided", 16), ("student-8", 8), ("student-4", 4), ("student", 4),
    ]  # fmt: skip
    assert [stage.teaches_itself for stage in stages] == [False, True, True, True]
    alone = replace(settings, start_steps=4, stochastic=False)
    assert [stage.name for stage in method_of(alone).stages(alone, sigmas)] == ["student"]
    assert set(METHODS) == set(settings_of.METHODS)


# --- what learns from the teacher's own trajectories


def test_reflow_straightens_the_coupling() -> None:
    """Normal data: noise and sample are proportional, and the straight field of that coupling is m / (m + sigma)."""
    student = Gain(0.1, lambda m, sigma: m / (m + sigma))
    settings = replace(settings_of.Reflow(), trajectories=256, batch=128, learning_rate=0.02)
    plan = reflow(settings, made(Normal(SPREAD), student, sigmas=(20.0, 5.0, 1.0, 0.2)))
    take(plan, Normal(SPREAD).data, 150)
    ends = plan.memory["trajectories"]
    assert float(student.value.detach()) == pytest.approx(float(ends[:, -1].std() / (ends[:, 0].std() / 20)), rel=0.02)
    assert float(student.value.detach()) == pytest.approx(SPREAD, rel=0.05)


def test_output_distillation_lands_on_the_teachers_sample() -> None:
    """The gain of the last jump is the whole flow's: s / sqrt(s^2 + sigma^2)."""
    student = Gain(0.001, lambda gain, sigma: gain * torch.ones_like(sigma))
    settings = replace(
        settings_of.OutputDistillation(), trajectories=256, teacher_steps=32, batch=128, learning_rate=2e-3
    )
    take(output_distillation(settings, made(Normal(SPREAD), student, sigmas=(5.0,))), Normal(SPREAD).data, 150)
    assert float(student.value.detach()) == pytest.approx(SPREAD / math.hypot(SPREAD, 5.0), rel=0.05)


# --- DKDM


@pytest.mark.parametrize("order", ["dynamic", "shuffled", "iterative"])
def test_dkdm_finds_the_teachers_field_without_data(order: Any) -> None:
    """Another mixture, moved to be the teacher's: the means come back, from the pool alone."""
    teacher, student = Exact(), Exact()
    with torch.no_grad():
        student.means.add_(0.4 * torch.randn(4, 4, generator=generator(8)))
    start = (student.means - teacher.means).norm()
    settings = replace(
        settings_of.Dkdm(), order=order, pool=512, chain_steps=16, sigma_max=5.0, batch=128, learning_rate=0.02
    )
    nothing = Batch(torch.full((128, *SHAPE), math.nan), torch.zeros(128, dtype=torch.int64))
    take(dkdm(settings, made(teacher, student)), lambda *_: nothing, 150)
    assert (student.means - teacher.means).norm() < (0.1 if order != "iterative" else 0.3) * start


def test_the_pool_holds_what_the_teacher_meets_when_it_samples() -> None:
    """Levels stay uniform, and on each level the latents are data plus noise of that level."""
    exact = Exact()
    settings = replace(settings_of.Dkdm(), pool=6_000, chain_steps=12, sigma_max=5.0)
    pool = Pool(settings, made(exact, exact))
    for step in range(30):
        pool.draw(1_000, generator(1, step))
    counts = torch.bincount(pool.row, minlength=12)
    assert counts.max() < 1.35 * counts.min()
    data = exact.data(20_000, generator(3)).x
    for row in range(12):
        here = pool.x[pool.row == row]
        assert float(here.pow(2).mean()) == pytest.approx(float(data.pow(2).mean() + pool.sigma[row] ** 2), rel=0.15)


def test_the_orders_of_dkdm_differ_in_how_rows_stand() -> None:
    for order, levels in (("iterative", {1}), ("shuffled", set(range(20, 65))), ("dynamic", set(range(20, 65)))):
        pool = Pool(replace(settings_of.Dkdm(), order=order), made(Normal(1.0), Normal(1.0)))  # type: ignore[arg-type]
        for step in range(3):
            pool.draw(64, generator(step))
        assert len(pool.x) == (2_048 if order == "dynamic" else 64)
        assert len(set(pool.row.tolist())) in levels


def test_an_unconditional_pool_asks_for_no_class() -> None:
    pool = Pool(settings_of.Dkdm(conditional=False, guidance=0.0, pool=64), made(Normal(1.0), Normal(1.0)))
    assert set(pool.draw(64, generator(0))[2].tolist()) == {2}


# --- consistency


def test_a_heun_step_is_of_second_order() -> None:
    """On normal data the flow is known: halving the step divides the error by eight, a step being O(h^3)."""
    z, label = torch.randn(50, *SHAPE, generator=generator(1)).double(), torch.zeros(50, dtype=torch.int64)
    teacher = Normal(SPREAD).double()
    errors = []
    for h in (0.2, 0.1):
        t, s = (torch.full((50,), level).double() for level in (1.0, 1.0 - h))
        exact = math.sqrt((SPREAD**2 + (1 - h) ** 2) / (SPREAD**2 + 1)) * z
        errors.append(float((heun_step(teacher, z, t, s, label) - exact).detach().norm()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.15)


CONSISTENT = [
    (settings_of.ConsistencyDistillation(chain_steps=32, target_decay=0.5), consistency_distillation, 0.1),
    (settings_of.ConsistencyTuning(), consistency_tuning, 0.2),
]


@pytest.mark.parametrize(("settings", "method", "off"), CONSISTENT, ids=["distillation", "tuning"])
def test_consistency_turns_the_denoiser_into_the_flow(settings: Any, method: Callable[..., Plan], off: float) -> None:
    """The family (s^2 / (s^2 + sigma^2))^(p/2) holds the best denoiser at p = 2, the consistency function at p = 1."""

    def gain(p: Tensor, sigma: Tensor) -> Tensor:
        return (SPREAD**2 / (SPREAD**2 + sigma**2)) ** (p / 2)

    student, target = Gain(2.0, gain), Gain(2.0, gain)
    settings = replace(settings, sigma_max=20.0, learning_rate=0.05, batch=128)
    distillation = made(Normal(SPREAD), student, target, sigmas=(20.0, 1.0), sigma_data=SPREAD)
    take(method(settings, distillation), Normal(SPREAD).data, 300)
    assert float(student.value.detach()) == pytest.approx(1, abs=off)


def test_the_lower_level_of_tuning_rises_to_the_upper() -> None:
    t = torch.logspace(-2, 1.5, 8)
    assert (lower_level(t, 2.0, 0)[:5] == 0).all()
    assert (lower_level(t, 2.0, 10) > 0.99 * t).all()
    s = [lower_level(t, 2.0, stage) for stage in range(8)]
    assert all((below <= above).all() for below, above in pairwise(s))


# --- whole runs


TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "sigma_data": 0.75},
    "network": {"kind": "transformer", "channels": 8, "blocks": 1},  # its graph is quickest to export
    "teacher": {"images": 1_600, "batch": 32, "checkpoint_every": 1_600},
}
SHORT = {"images": 128, "batch": 16, "guidance": 0.0, "checkpoint_every": 128}
RUNS: dict[str, dict[str, Any]] = {
    "moment-matching": {"source": "backward"},
    "parameter-moment-matching": {"moment_images": 32},
    "diff-instruct": {"warm_start_images": 64, "warm_start_trajectories": 32, "warm_start_teacher_steps": 4},
    "dmd": {"auxiliary_turns": 2},
    "progressive": {"num_steps": 2, "start_steps": 8},
    "guided": {"num_steps": 2, "start_steps": 4, "stage_one_images": 64, "stochastic": True},
    "output-distillation": {"trajectories": 32, "teacher_steps": 4},
    "reflow": {"trajectories": 32, "teacher_steps": 4},
    "dkdm": {"pool": 64, "network": {"channels": 8, "blocks": 1, "attention": False}},
    "consistency-distillation": {},
    "consistency-tuning": {},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of digits."""
    out = tmp_path_factory.mktemp("teacher")
    train(settings_of.recipe_from(TINY), out, until="teacher", quiet=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_a_student_of_every_method_is_trained_exported_and_sampled(method: str, teacher: Path, tmp_path: Path) -> None:
    """Its bundle holds the tables it was distilled for, and the engine draws finite samples with the default one."""
    shutil.copy(teacher / "teacher.safetensors", tmp_path)
    recipe = settings_of.recipe_from(TINY | {"student": {"method": method} | SHORT | RUNS[method]})
    path = train(recipe, tmp_path, until="student", quiet=True)
    bundle, parity = export_checkpoint(path, tmp_path / "bundle")
    assert parity.graph_error < 1e-4
    assert bundle.manifest.default_tableau.solver == method_of(recipe.student).solvers[0]
    assert (bundle.manifest.guidance.mode == "embedded") == (method == "guided")
    engine = Engine(bundle)
    futures = engine.submit([Request(seed, bundle.tableau(), 3, None) for seed in range(2)])
    while not all(future.done() for future in futures):
        engine.step()
    assert all(np.isfinite(future.result().pixels).all() for future in futures)


def test_a_student_of_one_step_is_exported_and_judged(teacher: Path, tmp_path: Path) -> None:
    """It has one level and so no range of its own: the tables of more steps are on that of its recipe."""
    shutil.copy(teacher / "teacher.safetensors", tmp_path)
    student = {"method": "moment-matching", "num_steps": 1, "sigma_min": 0.8, **SHORT}
    evaluation = {"classifier_images": 1_000}
    path = train(
        settings_of.recipe_from(TINY | {"student": student, "evaluation": evaluation}),
        tmp_path,
        until="student",
        quiet=True,
    )
    bundle, _ = export_checkpoint(path, tmp_path / "bundle")
    assert bundle.manifest.default_tableau.num_steps == 1
    ours, more = evaluate(path, (None, 2), samples=100, seeds=1)
    assert (ours.num_steps, more.num_steps) == (1, 2)
    (served,) = evaluate(
        tmp_path / "bundle", (2,), classifier=tmp_path / "classifier.safetensors", samples=100, seeds=1
    )
    assert served.num_steps == 2


def test_a_student_that_is_told_no_class_has_no_input_for_one(teacher: Path, tmp_path: Path) -> None:
    """An unconditional pool's student is served and judged without classes, which it has never seen."""
    shutil.copy(teacher / "teacher.safetensors", tmp_path)
    student = {"method": "dkdm", "conditional": False, "pool": 64, **SHORT}
    recipe = settings_of.recipe_from(TINY | {"student": student, "evaluation": {"classifier_images": 1_000}})
    path = train(recipe, tmp_path, until="student", quiet=True)
    network = load_checkpoint(path).network
    assert not any("label" in name for name in network.state_dict())
    bundle, parity = export_checkpoint(path, tmp_path / "bundle")
    assert bundle.manifest.labels is None
    assert parity.graph_error < 1e-4
    (report,) = evaluate(path, samples=100, seeds=1)
    assert report.mean.class_accuracy is None


def test_what_is_no_teacher_is_not_taken_for_one(teacher: Path, tmp_path: Path) -> None:
    shutil.copy(teacher / "teacher.safetensors", tmp_path)
    recipe = settings_of.recipe_from(TINY | {"student": {"method": "moment-matching"} | SHORT})
    train(recipe, tmp_path, until="student", quiet=True).rename(tmp_path / "teacher.safetensors")
    with pytest.raises(
        TrainingError, match=r"teacher.safetensors: is a student of 4 steps, and not what the run calls"
    ):
        train(recipe, tmp_path, until="student", quiet=True)


@pytest.mark.parametrize("method", ["dkdm", "reflow", "consistency-distillation", "consistency-tuning"])
def test_what_a_method_remembers_survives_a_kill(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pool, trajectories, target and stage are in the checkpoint: a run that died goes on to the same weights."""
    longer = (
        {"images": 100 * 16, "checkpoint_every": 50 * 16, "network": None}
        if method == "dkdm"
        else {"images": 100 * 16, "checkpoint_every": 50 * 16}
    )
    recipe = settings_of.recipe_from(TINY | {"student": {"method": method} | SHORT | RUNS[method] | longer})
    for run in ("whole", "killed"):
        (tmp_path / run).mkdir()
        shutil.copy(teacher / "teacher.safetensors", tmp_path / run)
    whole = load_checkpoint(train(recipe, tmp_path / "whole", until="student", quiet=True))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.training.run.save_grid", die)  # just after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed", until="student", quiet=True)
    killed = load_checkpoint(train(recipe, tmp_path / "killed", until="student", quiet=True))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, killed.network.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "column"), [("moment-matching", "auxiliary"), ("dkdm", "student")])
def test_two_processes_distil_one_student(method: str, column: str, teacher: Path, tmp_path: Path) -> None:
    """Each with a share of the batch and noise of its own: the loss is that of one process, and runs repeat exactly."""
    student = {"method": method} | SHORT | RUNS[method] | {"images": 50 * 16, "network": None}
    if method != "dkdm":
        del student["network"]
    recipe = settings_of.recipe_from(TINY | {"student": student})
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for run, processes in (("one", 1), ("two", 2), ("again", 2)):
        (tmp_path / run).mkdir()
        shutil.copy(teacher / "teacher.safetensors", tmp_path / run)
        path = train(recipe, tmp_path / run, until="student", processes=processes, quiet=True)
        with (tmp_path / run / "student" / "log.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        found[run] = float(row[column]), load_checkpoint(path).network.state_dict()
    assert found["two"][0] == pytest.approx(found["one"][0], rel=0.25)
    assert any(not torch.equal(tensor, found["one"][1][name]) for name, tensor in found["two"][1].items())
    for name, tensor in found["two"][1].items():
        assert torch.equal(tensor, found["again"][1][name]), name


def test_settings_that_do_not_fit_together_are_refused() -> None:
    for student, message in (
        ({"method": "progressive", "start_steps": 12}, r"start_steps = 12 should be num_steps times 2, 4, 8"),
        ({"method": "guided", "guidance": 5.0}, r"guidance_min <= guidance <= guidance_max"),
        ({"method": "dmd", "chain_steps": 3}, r"chain_steps is a setting of one of 'dkdm', 'consis.*, not of 'dmd'"),
        (
            {"method": "dkdm", "network": {"chanels": 8}},
            r"\[student.network\] chanels is not a setting; did you mean ch",
        ),
        ({"method": "diff-instruct", "num_steps": 2}, r"num_steps = 2 should be 1$"),
        ({"method": "parameter-moment-matching", "guidance": 1.0}, r"guidance = 1.0 should be 0$"),
        ({"method": "dkdm", "pool": 32}, r"pool = 32 should be at least batch = 64"),
        ({"method": "dkdm", "conditional": False}, r"guidance = 1 is towards a class; of none, give 0"),
    ):
        with pytest.raises(settings_of.RecipeError, match=message):
            settings_of.recipe_from({"name": "a", "student": student})
