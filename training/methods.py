"""Every method by the name a recipe calls it, and how its student is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .consistency import consistency_distillation, consistency_tuning
from .distillation import Distillation, Stage
from .dkdm import dkdm, other_network
from .guided import guided_stages
from .loop import Plan
from .matching import diff_instruct, dmd, moment_matching
from .output_distillation import output_distillation, warm_started
from .parameter_matching import parameter_matching
from .progressive import progressive_stages
from .recipe import Guided, Student, WarmStarted
from .reflow import reflow

Grid = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """How a student is made and sampled."""

    stages: Callable[[Any, Grid], list[Stage]]  # (the method's settings, the student's levels)
    solvers: tuple[str, ...]  # tables it is served with, by name in `runtime.solvers`; the first is the default
    any_steps: bool = True  # whether it may be sampled on other numbers of steps than its own


def single(plan: Callable[[Any, Distillation], Plan], **needs: bool) -> Callable[[Student, Grid], list[Stage]]:
    """The stages of a method that has one, or two with a warm start."""

    def stages(settings: Student, sigmas: Grid) -> list[Stage]:
        stage = Stage("student", sigmas, plan, settings.images, **needs)  # type: ignore[arg-type]
        return warm_started(settings, stage) if isinstance(settings, WarmStarted) else [stage]

    return stages


def _dkdm(settings: Any, sigmas: Grid) -> list[Stage]:
    config = partial(other_network, settings)
    return [replace(stage, config=config) for stage in single(dkdm, from_scratch=True)(settings, sigmas)]


METHODS: dict[str, Method] = {
    "moment-matching": Method(single(moment_matching, has_auxiliary=True), ("ancestral", "ddim")),
    "parameter-moment-matching": Method(single(parameter_matching), ("ancestral", "ddim")),
    "diff-instruct": Method(single(diff_instruct, has_auxiliary=True), ("consistency",), any_steps=False),
    "dmd": Method(single(dmd, has_auxiliary=True), ("consistency",), any_steps=False),
    "progressive": Method(progressive_stages, ("ddim",), any_steps=False),
    "guided": Method(guided_stages, ("ddim",), any_steps=False),
    "output-distillation": Method(single(output_distillation), ("ddim",), any_steps=False),
    "reflow": Method(single(reflow), ("ddim",)),
    "dkdm": Method(_dkdm, ("dpmpp_2m", "ddim", "ancestral")),
    "consistency-distillation": Method(single(consistency_distillation, has_auxiliary=True), ("consistency",)),
    "consistency-tuning": Method(single(consistency_tuning), ("consistency",)),
}


def method_of(settings: Student) -> Method:
    """The method of a recipe's ``[student]`` table."""
    method = METHODS[settings.method]
    if isinstance(settings, Guided):
        if settings.stochastic:
            return replace(method, solvers=("meng_stochastic",))
        if settings.start_steps == settings.num_steps:  # stage 1 alone knows every level
            return replace(method, solvers=("dpmpp_2m", "ddim"), any_steps=True)
    return method
