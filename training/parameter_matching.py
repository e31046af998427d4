"""Moment matching in parameter space: Salimans et al. 2024 (arXiv:2406.04103), algorithm 3.

A student is right if the teacher has nothing to learn from its samples: then the gradient of the teacher's own
loss vanishes on them, as it does on real images. So no auxiliary network is trained; its change by one
infinitesimal, preconditioned step takes the place of auxiliary - teacher:

    nu = -P (grad_theta E_A w(s) |x0 - teacher_theta(z_s)|^2 - m)          a first batch of jumps
    d  = (d teacher_theta(z_s) / d theta) nu                              forward mode, at those of a second
    student:  w(s)^p <x0, stop[d]>

P = 1 / (sqrt(v) + eps) is Adam's, from the teacher's second moments v on real images. m is the mean of that
gradient on real images, which a teacher that has not quite converged still has. Two batches, because the
square of a mean is not the mean of a square. The teacher is not guided: no training loss of its own is at its
least there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from .denoiser import Denoiser, Predictor, edm_weight, per_row
from .distillation import Distillation, from_data, from_itself, module, within_step
from .images import to_float
from .loop import Batch, Plan, generator, noise_like
from .progressive import regression_plan
from .recipe import ParameterMatching

EPS = 1e-8
Parameters = dict[str, Tensor]


def parameter_matching(settings: ParameterMatching, distillation: Distillation) -> Plan:
    """Plan algorithm 3."""
    distillation = replace(distillation, source=from_data if settings.source == "data" else from_itself)
    # Forward mode takes views that other memory layouts do not have.
    theta = {
        name: parameter.detach().clone(memory_format=torch.contiguous_format)
        for name, parameter in module(distillation.teacher).named_parameters()
    }
    mean, square = ({name: torch.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    is_filled = torch.zeros((), dtype=torch.bool)

    def loss(batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        if not is_filled:
            measure(settings, distillation, theta, mean, square)
            is_filled.fill_(True)
        half = len(batch.x) // 2
        first, second = Batch(batch.x[:half], batch.label[:half]), Batch(batch.x[half:], batch.label[half:])
        with torch.no_grad():
            jump = distillation.jump(first, rng)
        slope = teacher_gradient(distillation, theta, jump.x0, jump.z_s, jump.sigma_s, first.label)
        nu = {name: -(slope[name] - mean[name]) / (square[name].sqrt() + EPS) for name in theta}
        jump = distillation.jump(second, rng)
        with torch.no_grad():
            change = moved_by(distillation.teacher, theta, nu, jump.z_s, jump.sigma_s, second.label)
            weight = per_row(edm_weight(jump.sigma_s, distillation.sigma_data)) ** settings.weight_power
        return {"loss": (jump.x0 * weight * change).mean()}

    memory = {f"mean.{name}": value for name, value in mean.items()}
    memory |= {f"square.{name}": value for name, value in square.items()} | {"is_filled": is_filled}
    plan = regression_plan(settings, distillation, loss)
    return replace(plan, turns=(replace(plan.turns[0], beta1=0.0),), memory=memory)


def teacher_gradient(
    distillation: Distillation, theta: Parameters, x0: Tensor, z: Tensor, sigma: Tensor, label: Tensor
) -> Parameters:
    """Gradient of the teacher's training loss at ``theta``, for data ``x0`` seen as ``z``."""
    weight = per_row(edm_weight(sigma, distillation.sigma_data))

    def loss(theta: Parameters) -> Tensor:
        return (weight * (x0 - predict(distillation.teacher, theta, z, sigma, label)) ** 2).mean()

    return grad(loss)(theta)  # type: ignore[no-any-return]


def moved_by(teacher: Predictor, theta: Parameters, nu: Parameters, z: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """How the teacher's prediction changes if ``theta`` moves along ``nu``: a forward-mode product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when forward mode is first used
        change: Tensor = jvp(lambda theta: predict(teacher, theta, z, sigma, label), (theta,), (nu,))[1]
    return change


def predict(teacher: Predictor, theta: Parameters, z: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """The teacher's prediction with other parameters."""
    network, z = module(teacher), z.clone(memory_format=torch.contiguous_format)
    if isinstance(teacher, Denoiser):
        return replace(teacher, network=lambda *inputs: functional_call(network, theta, inputs))(z, sigma, label)
    return functional_call(network, theta, (z, sigma, label))  # type: ignore[no-any-return]


def measure(
    settings: ParameterMatching, distillation: Distillation, theta: Parameters, mean: Parameters, square: Parameters
) -> None:
    """Average the teacher's gradient on real images, and its square, batch by batch."""
    rng, images = generator(distillation.seed, 23), distillation.images
    batches = max(1, settings.moment_images // settings.batch)
    for _ in range(batches):
        rows = torch.randint(len(images.pixels), (settings.batch,), generator=rng).numpy()
        x = to_float(images.pixels[rows]).to(distillation.device)
        label = torch.from_numpy(images.labels[rows]).to(distillation.device)
        step = torch.randint(len(distillation.sigmas), (len(x),), generator=rng)
        sigma = within_step(distillation, step, rng).to(x.device)
        slope = teacher_gradient(distillation, theta, x, x + per_row(sigma) * noise_like(x, rng), sigma, label)
        for name, value in slope.items():
            mean[name].add_(value / batches)
            square[name].add_(value**2 / batches)
