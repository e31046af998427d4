"""Hooks: what depends on the sample changes the sample that asked for it, whatever its solver, and no other's bits."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray

from fewstep.kernels import normals
from fewstep.runtime import Bundle, Engine, Preview, Request, Tableau
from fewstep.runtime.backends import OnnxBackend
from fewstep.runtime.call import CallError, requests_of
from fewstep.runtime.hooks import DynamicThreshold, GuidanceRescale, Hook, Output, hooks_of
from fewstep.runtime.schedules import karras
from fewstep.runtime.solvers import euler, heun, ipndm

Pixels = NDArray[np.float32]
HOOKS = hooks_of(dynamic_thresholding=0.9, guidance_rescale=0.7)


def output(x0: Pixels, **said: Any) -> Output:
    """An output that is the data themselves."""
    return Output(**{"raw": x0, "conditional": x0, "x": np.zeros_like(x0), "to_x0": (0.0, 1.0), **said})


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_thresholding_is_imagens(quantile: float) -> None:
    """As diffusers has it."""
    x0 = np.random.default_rng(0).normal(0, 2, 64).astype(np.float32)
    config = {"thresholding": True, "dynamic_thresholding_ratio": quantile, "sample_max_value": 3.0}
    made: Any = diffusers.DPMSolverMultistepScheduler
    scheduler = made(**config)
    theirs = scheduler._threshold_sample(torch.from_numpy(x0).reshape(1, 1, 8, 8)).numpy().reshape(-1)
    assert np.abs(DynamicThreshold(quantile, most=3.0)(output(x0)).raw - theirs).max() < 1e-6


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_gives_the_deviation_back(share: float) -> None:
    """All of it with a share of 1, and for the rest it stands between."""
    guided, conditional = np.random.default_rng(0).normal(0, [[3], [1]], (2, 64)).astype(np.float32)
    ours = GuidanceRescale(share)(output(guided, conditional=conditional)).raw
    assert ours.std() == pytest.approx(share * conditional.std() + (1 - share) * guided.std(), rel=1e-5)
    assert np.allclose(ours / ours.std(), guided / guided.std(), atol=1e-5)


def test_what_there_is_nothing_to_change_in_keeps_its_bits() -> None:
    """Data within bounds, a network that knows nothing of the data yet, no guidance, no deviation."""
    small = np.linspace(-1, 1, 64, dtype=np.float32)
    for unchanged in (output(small), output(9 * small, to_x0=None)):
        assert DynamicThreshold()(unchanged) is unchanged
    for unchanged in (output(small), output(np.ones(64, np.float32), conditional=small)):
        assert GuidanceRescale()(unchanged) is unchanged


def plain_loop(bundle: Bundle, request: Request) -> Pixels:
    """One sample, one network call at a time, in float64 but for the network; hooks act on what it says."""
    manifest, tableau = bundle.manifest, request.tableau
    assert manifest.labels is not None
    prediction, scale = manifest.output.prediction(), request.guidance or manifest.guidance.default
    backend = OnnxBackend(bundle.network, 2, manifest.sample_shape, 1)

    def noise(number: int) -> NDArray[np.float64]:
        elements = int(np.prod(manifest.sample_shape))
        return np.asarray(normals(np.array([request.seed], np.uint64), np.array([number]), elements)[0], np.float64)

    x = tableau.initial_scale * noise(0)
    history: list[NDArray[np.float64]] = []
    for i in range(tableau.num_steps):
        alpha, sigma = float(tableau.alpha[i]), float(tableau.sigma[i])
        backend.inputs["x"][:2] = (prediction.c_in(alpha, sigma) * x).reshape(manifest.sample_shape)
        backend.inputs["t"][:2] = tableau.t[i]
        backend.inputs["label"][:2] = request.label, manifest.labels.null
        conditional, unconditional = backend(2).reshape(2, -1).copy()
        guided = conditional
        if manifest.guidance.mode == "classifier-free" and scale != 1:
            guided = unconditional + np.float32(scale) * (conditional - unconditional)
        said = Output(guided, conditional, x.astype(np.float32), prediction.to_form("x0", alpha, sigma))
        for hook in request.hooks:
            said = hook(said)
        k_x, k_m = prediction.to_form(tableau.form, alpha, sigma)
        history = [k_x * x + k_m * said.raw.astype(np.float64), *history]
        x = tableau.a[i] * x + sum(float(b) * m for b, m in zip(tableau.b[i], history, strict=False))
        x = x + tableau.c[i] * noise(i + 1)
    return x.reshape(manifest.sample_shape).astype(np.float32)


TABLES = {
    "euler": euler(karras(5)),
    "ipndm_4": ipndm(karras(6)),
    "heun": heun(karras(3)),
}  # kept as eps, and two stages


@pytest.mark.parametrize("solver", ["ddim", "ancestral", "dpmpp_2m", *TABLES])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_hooks_act_on_every_solver_alike(solver: str, scale: float, guided: Bundle) -> None:
    """The engine's sample is the plain loop's, with and without; and hooks make a difference."""
    tableau = TABLES[solver] if solver in TABLES else guided.tableau(solver, 4)
    engine = Engine(guided, threads=1)
    request = Request(3, tableau, 5, scale)
    plain, hooked = (engine.generate([replace(request, hooks=hooks)])[0].pixels for hooks in ((), HOOKS))
    assert np.abs(plain - hooked).max() > 1e-2
    for pixels, hooks in ((plain, ()), (hooked, HOOKS)):
        assert np.abs(pixels - plain_loop(guided, replace(request, hooks=hooks))).max() < 2e-3


def test_hooked_or_not_a_sample_has_the_bits_that_it_has_alone(guided: Bundle) -> None:
    """200 samples with and without hooks, of every solver, joining and leaving at every step."""
    rng = np.random.default_rng(0)
    tables = [*guided.tableaus.values(), *TABLES.values()]
    choices: list[tuple[Hook, ...]] = [(), (), HOOKS, hooks_of(0.99), hooks_of(None, 0.5)]

    def some() -> Request:
        tableau: Tableau = tables[rng.integers(len(tables))]
        scale = float(rng.choice([1.0, 2.5]))
        return Request(int(rng.integers(2**40)), tableau, int(rng.integers(10)), scale, hooks=choices[rng.integers(5)])

    requests = [some() for _ in range(200)]
    alone = Engine(guided, threads=1, max_rows=1)
    together = Engine(guided, threads=1, max_rows=7)
    for one, other in zip(alone.generate(requests), together.generate(requests), strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_previews_show_what_hooks_made(guided: Bundle) -> None:
    seen: list[Preview] = []
    engine = Engine(guided, threads=1)
    asked = Request(3, guided.tableau("ddim", 4), 5, 3.0, hooks=hooks_of(dynamic_thresholding=0.5))
    engine.submit([asked], lambda _, preview: seen.append(preview))
    while engine.step():
        pass
    assert [preview.step for preview in seen] == [1, 2, 3]
    assert max(np.abs(preview.pixels).max() for preview in seen) <= 1 + 1e-4


def test_what_cannot_be_had_is_refused_by_its_field(baked: Bundle, guided: Bundle) -> None:
    request = Request(0, guided.tableau("ddim", 2), 1)
    for hook, student, message in (
        (GuidanceRescale(1.5), guided, r"^guidance_rescale: 1\.5, must be 0 to 1$"),
        (DynamicThreshold(0.0), guided, r"^dynamic_thresholding: 0, must be above 0 and at most 1$"),
        (GuidanceRescale(), baked, r"^guidance_rescale: digits is not guided by a second call, so there is no output"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(student, threads=1).submit([replace(request, hooks=(hook,))])
    with pytest.raises(CallError, match=r"^dynamic_threshold is not a parameter; did you mean dynamic_thresholding"):
        requests_of(Engine(guided, threads=1), {}, {"label": 1, "dynamic_threshold": 0.9}, 4)
    (asked,), _ = requests_of(
        Engine(guided, threads=1), {}, {"label": 1, "guidance_rescale": 0.7, "dynamic_thresholding": 0.9}, 4
    )
    assert asked.hooks == HOOKS


def test_hooks_over_http(serving: Callable[..., AbstractContextManager[Any]], make_bundle: Callable[..., Path]) -> None:
    """OpenAI's client, our words in its extra body."""
    with serving(make_bundle(is_guided=True), make_bundle()) as (_, (host, port)):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)

        def ask(**body: Any) -> str | None:
            answer = client.images.generate(prompt="5", extra_body={"seed": 3, "solver": "ddim", **body})
            assert answer.data
            return answer.data[0].b64_json

        assert len({ask(), ask(dynamic_thresholding=0.5), ask(guidance_rescale=0.7)}) == 3
        with pytest.raises(openai.BadRequestError, match=r"dynamic_thresholding: 2, must be above 0"):
            ask(dynamic_thresholding=2)
        with pytest.raises(openai.BadRequestError, match="is not guided by a second call"):
            ask(model="digits", guidance_rescale=0.7)


def test_hooks_on_the_command_line(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """They change the picture, and what a student cannot do is one line."""

    def generate(name: str, student: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fewstep", "generate", str(student), "--num", "2", "--solver", "ddim"]
        return subprocess.run(
            [*command, *flags, "-o", str(tmp_path / name)], capture_output=True, text=True, check=False
        )

    student = make_bundle(is_guided=True)
    for name, flags in (
        ("plain.png", ()),
        ("hooked.png", ("--dynamic-thresholding", "0.5", "--guidance-rescale", "1")),
    ):
        assert generate(name, student, *flags).returncode == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "hooked.png").read_bytes()
    refused = generate("none.png", make_bundle(), "--guidance-rescale", "1")
    assert refused.returncode != 0
    assert refused.stderr.startswith("fewstep: --guidance-rescale: digits is not guided by a second call")
