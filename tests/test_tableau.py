"""Tables: what must hold at birth, their files, and the solvers held against closed forms and published loops."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.kernels import normals, pack_rows, step_reference
from fewstep.runtime import Levels, Tableau, TableauError
from fewstep.runtime.prediction import FORMS, Form, Prediction, form_weights
from fewstep.runtime.schedules import flow, karras, vp_cosine
from fewstep.runtime.solvers import ancestral, ddim, dpmpp_2m, heun
from fewstep.runtime.tableau import MAX_HISTORY, MAX_ROWS

Array = NDArray[np.float64]
Solver = Callable[[Levels], Tableau]
SOLVERS: list[Solver] = [ddim, ancestral, dpmpp_2m, heun]
DETERMINISTIC: list[Solver] = [ddim, dpmpp_2m, heun]


def with_signal(levels: Levels) -> Levels:
    """The levels, but for a first one of pure noise: log-SNR has no value there."""
    if levels.alpha[0] > 1e-3:
        return levels
    return Levels(levels.alpha[1:], levels.sigma[1:], levels.t[1:])


def run(tableau: Tableau, x: Array, x0_of: Callable[[Array, float, float], Array], noise: Array | None = None) -> Array:
    """Every level's latent, ``[rows + 1, ...]``, by equation (1) in float64 with a network that predicts x0."""
    assert tableau.form == "x0"
    latents, said = [x], []
    for i in range(tableau.num_steps):
        said.append(x0_of(x, float(tableau.alpha[i]), float(tableau.sigma[i])))
        x = tableau.a[i] * x
        for j in range(min(tableau.history, i + 1)):
            x = x + tableau.b[i, j] * said[i - j]
        if noise is not None:
            x = x + tableau.c[i] * noise[i]
        latents.append(x)
    return np.array(latents)


def two_points(x: Array, alpha: float, sigma: float) -> Array:
    """The exact denoiser of data that is -1 or 1, each half the time."""
    return np.tanh(alpha * x / sigma**2)


# --- the solvers


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2)])
def test_order(solver: Solver, order: int) -> None:
    """The error falls as h ** order on Gaussian data, where the flow is known exactly."""
    spread = 0.5
    steps = np.array([20, 40, 80, 160])
    errors = []
    for n in steps:
        tableau = solver(karras(int(n), sigma_min=0.02, sigma_max=10.0))
        x = run(tableau, np.ones(1), lambda x, alpha, sigma: x * spread**2 / (spread**2 + sigma**2))
        before_last = np.flatnonzero(tableau.sigma == tableau.sigma[tableau.sigma > 0].min())[0]
        exact = np.sqrt((spread**2 + tableau.sigma[before_last] ** 2) / (spread**2 + tableau.sigma[0] ** 2))
        errors.append(abs(float(x[before_last, 0]) - exact))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@given(
    num_steps=st.integers(1, 12),
    path=st.sampled_from([karras, vp_cosine, flow]),
    solver=st.sampled_from(SOLVERS),
    point=st.floats(-3, 3),
    seed=st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_with_one_data_point_every_solver_is_exact(
    num_steps: int, path: Callable[[int], Levels], solver: Solver, point: float, seed: int
) -> None:
    """However few its steps, and at every level on the way: a deterministic solver keeps the noise it started from."""
    levels = path(num_steps + 1) if path is not karras else path(num_steps)
    tableau = solver(with_signal(levels))
    rng = np.random.default_rng(seed)
    eps, fresh = rng.standard_normal(5), rng.standard_normal((tableau.num_steps, 5))
    start = tableau.alpha[0] * point + tableau.sigma[0] * eps
    x = run(tableau, start, lambda x, alpha, sigma: np.full_like(x, point), fresh)
    assert x[-1] == pytest.approx(np.full(5, point), abs=1e-12)
    if not tableau.is_stochastic:
        wanted = tableau.alpha[:, None] * point + tableau.sigma[:, None] * eps
        assert np.abs(x - wanted).max() < 1e-12 * max(1, tableau.sigma[0])


@pytest.mark.parametrize("levels", [karras(9), with_signal(vp_cosine(9)), with_signal(flow(9))])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0])
def test_ancestral_keeps_the_marginal_of_gaussian_data(levels: Levels, spread: float) -> None:
    """The law of total variance: what a row leaves out is the spread of x0 given x, times b squared, and no more."""
    tableau = ancestral(levels)
    marginal = tableau.alpha**2 * spread**2 + tableau.sigma**2
    gain = tableau.alpha[:-1] * spread**2 / marginal[:-1]  # E[x0 | x] = gain * x
    left = spread**2 - gain**2 * marginal[:-1]  # Var[x0 | x]
    b = tableau.b[:, 0]
    reached = (tableau.a + b * gain) ** 2 * marginal[:-1] + b**2 * left + tableau.c**2
    assert reached == pytest.approx(marginal[1:], rel=1e-12, abs=1e-15)


def test_ddim_is_its_papers_equation_12() -> None:
    levels = with_signal(vp_cosine(8))
    alpha, sigma = levels.alpha, levels.sigma
    x = np.linspace(-2, 2, 7)
    got = run(ddim(levels), x, two_points)
    for i in range(len(levels.t)):
        x0 = two_points(x, alpha[i], sigma[i])
        eps = (x - alpha[i] * x0) / sigma[i]
        x = alpha[i + 1] * x0 + sigma[i + 1] * eps
        assert got[i + 1] == pytest.approx(x, abs=1e-12)


def test_ancestral_is_ddpm() -> None:
    """Ho et al. 2020, eq. 6 and 7: the mean from x0 and x, the variance beta-tilde, in their alpha-bar notation."""
    levels = with_signal(vp_cosine(8))
    bar, bar_ = levels.alpha[:-1] ** 2, levels.alpha[1:] ** 2
    beta = 1 - bar / bar_
    tableau = ancestral(levels)
    assert tableau.b[:, 0] == pytest.approx(np.sqrt(bar_) * beta / (1 - bar), abs=1e-12)
    assert tableau.a == pytest.approx(np.sqrt(1 - beta) * (1 - bar_) / (1 - bar), abs=1e-12)
    assert tableau.c**2 == pytest.approx((1 - bar_) / (1 - bar) * beta, abs=1e-12)


@pytest.mark.parametrize("levels", [karras(9, 0.05, 10.0), with_signal(vp_cosine(9))])
def test_dpmpp_2m_is_the_published_loop(levels: Levels) -> None:
    """Lu et al. 2022, algorithm 2, written from log-SNR as k-diffusion does."""
    alpha, sigma = levels.alpha, levels.sigma
    x = np.linspace(-2, 2, 7) * sigma[0]
    got = run(dpmpp_2m(levels), x, two_points)
    before: Array | None = None
    for i in range(len(levels.t) - 1):
        h = np.log(alpha[i + 1] / sigma[i + 1]) - np.log(alpha[i] / sigma[i])
        x0 = two_points(x, alpha[i], sigma[i])
        d = x0
        if before is not None:
            r = (np.log(alpha[i] / sigma[i]) - np.log(alpha[i - 1] / sigma[i - 1])) / h
            d = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x, before = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * d, x0
        assert got[i + 1] == pytest.approx(x, abs=1e-11)
    assert got[-1] == pytest.approx(two_points(x, alpha[-2], sigma[-2]), abs=1e-11)


def test_heun_is_edms_loop() -> None:
    """Karras et al. 2022, algorithm 1, which keeps the base point that the table does without."""
    sigma = karras(6, 0.05, 10.0).sigma
    tableau = heun(karras(6, 0.05, 10.0))
    x = np.linspace(-2, 2, 7) * sigma[0]
    got = run(tableau, x, two_points)
    for i in range(6):
        d = (x - two_points(x, 1, sigma[i])) / sigma[i]
        euler = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] > 0:
            d_ = (euler - two_points(euler, 1, sigma[i + 1])) / sigma[i + 1]
            x = x + (sigma[i + 1] - sigma[i]) * (d + d_) / 2
            assert got[2 * (i + 1)] == pytest.approx(x, abs=1e-11)
        else:
            assert got[-1] == pytest.approx(euler, abs=1e-11)
    assert tableau.num_steps == 2 * 6 - 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_tables_of_few_rows_are_whole(solver: Solver, num_steps: int) -> None:
    """The warm-up and the last row need no more rows than there are."""
    tableau = solver(karras(num_steps))
    assert tableau.num_steps == (2 * num_steps - 1 if solver is heun else num_steps)
    assert tableau.a[-1] == pytest.approx(0) or solver is heun
    assert tableau.is_stochastic == (solver is ancestral and num_steps > 1)


def test_the_first_row_of_heun_needs_signal() -> None:
    with pytest.raises(ValueError, match=r"^heun: the first level must hold some signal, alpha > 0$"):
        heun(Levels(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.0]), np.array([1.0, 0.5])))


# --- prediction types and the kernel's rows

TYPES: list[Any] = [*FORMS, "edm"]


@given(
    type_=st.sampled_from(TYPES),
    form=st.sampled_from(FORMS),
    angle=st.floats(0.05, 1.5),
    scale=st.floats(0.1, 3),
    x0=st.floats(-2, 2),
    eps=st.floats(-2, 2),
)
def test_any_form_can_be_had_from_any_network(
    type_: Any, form: Form, angle: float, scale: float, x0: float, eps: float
) -> None:
    alpha, sigma = (1.0, scale) if type_ == "edm" else (scale * np.cos(angle), scale * np.sin(angle))
    x = alpha * x0 + sigma * eps
    if type_ == "edm":  # Karras et al. 2022, eq. 7, solved for F
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / np.hypot(sigma, 0.5)
        output = (x0 - c_skip * x) / c_out
    else:
        p, q = form_weights(type_, alpha, sigma)
        output = p * x0 + q * eps
    k_x, k_m = Prediction(type_).to_form(form, alpha, sigma)
    want_x0, want_eps = form_weights(form, alpha, sigma)
    assert k_x * x + k_m * output == pytest.approx(want_x0 * x0 + want_eps * eps, rel=1e-9, abs=1e-9)


def test_a_form_the_output_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x0 cannot be had from eps at alpha = 0, sigma = 1$"):
        Prediction("eps").to_form("x0", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"^an edm network is defined for alpha = 1, not 0\.5$"):
        Prediction("edm").to_form("x0", 0.5, 1.0)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_kernel_runs_the_table_whatever_the_network_predicts(solver: Solver, type_: Any) -> None:
    """All output types of one denoiser give the float64 trajectory; history starts as NaN, so dead slots show."""
    tableau = solver(karras(6, 0.05, 10.0))
    prediction = Prediction(type_)
    rows = tableau.step_rows(prediction)
    table = pack_rows(rows, tableau.history)
    x, scaled = np.full((1, 32), np.nan, np.float32), np.empty((1, 32), np.float32)
    history = np.full((1, tableau.history, 32), np.nan, np.float32)
    seed, guidance, none = np.array([3], np.uint64), np.ones(1, np.float32), np.full(1, -1, np.int32)

    def step(row: int, raw: NDArray[np.float32]) -> None:
        step_reference(table, np.array([row], np.int32), x, history, raw, none, guidance, seed, scaled)

    step(0, x)
    noises = []
    start = x[0].astype(np.float64)
    for i in range(tableau.num_steps):
        alpha, sigma = float(tableau.alpha[i]), float(tableau.sigma[i])
        assert scaled[0] == pytest.approx(prediction.c_in(alpha, sigma) * x[0], rel=1e-6)
        assert table["t"][i + 1] == np.float32(tableau.t[i])
        latent = x[0].astype(np.float64)
        x0 = two_points(latent, alpha, sigma)
        p, q = prediction.weights(alpha, sigma)
        step(i + 1, (p * x0 + q * (latent - alpha * x0) / sigma).astype(np.float32)[None])
        noises.append(np.zeros(32))
        if tableau.c[i]:
            noises[-1] = normals(seed, np.array([rows[i + 1].noise_id]), 32)[0].astype(np.float64)
    wanted = run(tableau, start, two_points, np.array(noises))[-1]
    assert np.abs(x[0] - wanted).max() < 1e-4


# --- schedules


@given(num_steps=st.integers(2, 50), sigma_min=st.floats(1e-3, 0.5), sigma_max=st.floats(1, 100), rho=st.floats(1, 9))
def test_karras_levels_fall_from_sigma_max_to_sigma_min_and_zero(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float
) -> None:
    levels = karras(num_steps, sigma_min, sigma_max, rho)
    assert levels.sigma[0] == pytest.approx(sigma_max)
    assert levels.sigma[-2] == pytest.approx(sigma_min)
    assert levels.sigma[-1] == 0
    assert (np.diff(levels.sigma) < 0).all()
    assert (levels.alpha == 1).all()
    assert levels.t == pytest.approx(np.log(levels.sigma[:-1]) / 4)


@pytest.mark.parametrize(("path", "total"), [(vp_cosine, lambda a, s: a**2 + s**2), (flow, lambda a, s: a + s)])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_levels_stay_on_their_path(
    path: Callable[[int], Levels], total: Callable[[Array, Array], Array], num_steps: int
) -> None:
    levels = path(num_steps)
    assert total(levels.alpha, levels.sigma) == pytest.approx(np.ones(num_steps + 1), abs=1e-12)
    assert (np.diff(levels.sigma) < 0).all()
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)


def test_the_shift_of_a_flow_moves_times_toward_noise() -> None:
    """Esser et al. 2024, eq. 23: in the odds of noise to data the shift is a factor."""
    plain, shifted = flow(10), flow(10, shift=3.0)
    inside = slice(1, -1)
    assert shifted.sigma[inside] / shifted.alpha[inside] == pytest.approx(3 * plain.sigma[inside] / plain.alpha[inside])


@pytest.mark.parametrize("path", [karras, vp_cosine, flow])
def test_a_schedule_of_no_steps_is_refused(path: Callable[[int], Levels]) -> None:
    with pytest.raises(ValueError, match=r"^num_steps: 0, must be at least 1$"):
        path(0)


def test_a_schedule_with_its_ends_crossed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sigma_min 2 and sigma_max 1 must satisfy 0 < sigma_min <= sigma_max$"):
        karras(4, sigma_min=2, sigma_max=1)


# --- what must hold at birth


def toy(**changes: Any) -> Tableau:
    """A valid table of two rows, with some fields changed."""
    entries = {
        "name": "toy", "form": "x0", "alpha": [1, 1, 1], "sigma": [4.0, 1, 0], "t": [0.3, 0], "a": [0.25, 0],
        "b": [[0.75, 0], [1, 0]], "c": [0, 0],
    }  # fmt: skip
    return Tableau(**{**entries, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../toy"}, r"'\.\./toy' is no name for a table: 1 to 64 of A-Z a-z 0-9 \. _ \+ -"),
        ({"form": "score"}, "toy: form 'score' is not one of x0, eps, v, flow"),
        ({"a": [0.5, 0]}, "toy: row 0 misses the mean of its level by 0.25"),
        ({"a": [0.5, 0], "b": [[0.5, 0], [1, 0]]}, "toy: row 0 misses the variance of its level by 0.188"),
        ({"c": [0.5, 0]}, "toy: row 0 misses the variance of its level by 0.0156"),
        ({"b": [[0.75, 0], [0.5, 0.25]]}, "toy: row 1 misses the mean of its level by -0.25"),
        ({"b": [[0.5, 0.25], [1, 0]]}, "toy: row 0 reads a prediction from before the first row"),
        ({"sigma": [4, 1, 0.5]}, "toy: the last row must end at sigma = 0, not 0.5"),
        ({"c": [0, 0.1]}, "toy: the last row must add no noise, c = 0.1"),
        ({"alpha": [1, 1, 0]}, "toy: the last row must end at data, not at alpha = 0"),
        ({"sigma": [4, -1, 0]}, r"toy: sigma\[1\] is negative: -1"),
        ({"alpha": [-1, 1, 1]}, r"toy: alpha\[0\] is negative: -1"),
        ({"sigma": [1e300, 1, 0]}, r"toy: sigma\[0\] is too large for float32"),
        ({"t": [0.3, -1e39]}, r"toy: t\[1\] is too large for float32"),
        ({"start": 1e39}, r"toy: start 1e\+39 is not a positive number of float32"),
        ({"start": 10**400}, "toy: start 10{79} is not a positive number of float32"),
        ({"residual": 10**400}, "toy: residual 10{79} is not a small positive number"),
        ({"clip": (-1, 10**400)}, "toy: clip has a bound that is too large for float32"),
        ({"sigma": [0, 0, 0]}, "toy: row 0 misses the variance of its level by nan"),
        ({"t": [0.3, np.nan]}, r"toy: t\[1\] is not finite"),
        ({"b": [[np.inf, 0], [1, 0]]}, r"toy: b\[0, 0\] is not finite"),
        ({"t": [0.3]}, r"toy: t has shape \[1\], 2 rows need 2"),
        ({"alpha": [1, 1]}, r"toy: alpha has shape \[2\], 2 rows need 3"),
        ({"alpha": 1.0}, r"toy: alpha has shape \[\], 2 rows need 3"),
        ({"c": [[0, 0], [0, 0]]}, r"toy: c has shape \[2, 2\], 2 rows need 2"),
        ({"b": [0.75, 1]}, r"toy: b has shape \[2\], must be \[rows, 1 to 16\]"),
        ({"b": np.zeros((2, MAX_HISTORY + 1))}, r"toy: b has shape \[2, 17\], must be \[rows, 1 to 16\]"),
        ({"b": [[1, 0]]}, r"toy: b has shape \[1, 2\], 2 rows need 2"),
        ({"a": []}, "toy: 0 rows, must be 1 to 1024"),
        ({"a": np.zeros(MAX_ROWS + 1)}, "toy: 1025 rows, must be 1 to 1024"),
        ({"a": [[0.25, 0]]}, "toy: 0 rows, must be 1 to 1024"),
        ({"residual": -1.0}, "toy: residual -1.0 is not a small positive number"),
        ({"residual": np.nan}, "toy: residual nan is not a small positive number"),
        ({"clip": (1.0, 1.0)}, r"toy: clip \(1\.0, 1\.0\) is not \(lower, upper\)"),
    ],
)
def test_a_table_that_cannot_be_one_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TableauError, match=f"^{message}$"):
        toy(**changes)


def test_a_learned_table_may_miss_by_the_residual_it_declares_and_no_more() -> None:
    b = [[0.75 + 1e-3, 0], [1, 0]]
    assert toy(b=b, residual=1e-3).residual == 1e-3
    with pytest.raises(TableauError, match=r"^toy: row 0 misses the mean of its level by 0\.001$"):
        toy(b=b, residual=0.9e-3)


def test_a_table_cannot_be_altered() -> None:
    given_in = np.array([0.25, 0])
    tableau = toy(a=given_in)
    given_in[0] = 9
    assert tableau.a[0] == 0.25
    with pytest.raises(ValueError, match="read-only"):
        tableau.a[0] = 1


@pytest.mark.parametrize("form", FORMS)
def test_the_invariants_hold_in_every_form(form: Form) -> None:
    """DDIM's first row written in each form: the row is right, so it is taken; with one weight off it is not."""
    alpha, sigma = np.array([0.6, 0.8, 1.0]), np.array([0.8, 0.6, 0.0])
    a, b = np.zeros(2), np.zeros((2, 1))
    for i in range(2):
        k_x, k_m = Prediction(form).to_form("x0", float(alpha[i]), float(sigma[i]))
        ratio = sigma[i + 1] / sigma[i]
        weight = alpha[i + 1] - ratio * alpha[i]
        a[i], b[i, 0] = ratio + weight * k_x, weight * k_m
    assert Tableau("toy", form, alpha, sigma, np.zeros(2), a, b, np.zeros(2)).form == form
    with pytest.raises(TableauError, match=r"^toy: row [01] misses the (mean|variance) of its level by "):
        Tableau("toy", form, alpha, sigma, np.zeros(2), a, b + 0.1, np.zeros(2))


# --- files

FITTED = {"weights_sha256": "ab" * 32, "provenance": {"from": "a test", "method": "none"}, "clip": (-1.0, 1.0)}


@pytest.mark.parametrize("tableau", [toy(**FITTED), toy(residual=0.5), *(solver(karras(5)) for solver in SOLVERS)])
def test_a_file_comes_back_as_the_same_table_and_the_same_bytes(tableau: Tableau, tmp_path: Path) -> None:
    tableau.save(tmp_path / "table")
    again = Tableau.load(tmp_path / "table")
    assert again.to_bytes() == tableau.to_bytes() == (tmp_path / "table").read_bytes()
    assert again.sha256 == tableau.sha256
    for name in ("alpha", "sigma", "t", "a", "b", "c"):
        assert getattr(again, name).tobytes() == getattr(tableau, name).tobytes()
    for name in ("name", "form", "residual", "clip", "weights_sha256", "provenance"):
        assert getattr(again, name) == getattr(tableau, name)


def test_the_order_of_provenance_does_not_change_the_file() -> None:
    one, two = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert toy(provenance=one).sha256 == toy(provenance=two).sha256


def file_with(header: Any = None, arrays: Any = None, **entries: Any) -> bytes:
    """The file of `toy` with some header entries replaced, or the whole header, or its arrays."""
    data = toy().to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fewstep_tableau"])
    said = {key: value for key, value in {**said, **entries}.items() if value != "left out"}
    text = json.dumps(said if header is None else header)
    return safetensors.numpy.save(arrays or safetensors.numpy.load(data), {"fewstep_tableau": text})


def as_float32() -> dict[str, Any]:
    arrays = safetensors.numpy.load(toy().to_bytes())
    return arrays | {"a": arrays["a"].astype(np.float32)}


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("table", toy().to_bytes())
    return out.getvalue()


class Trap:
    """Unpickling this ends the test."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a table file was unpickled",)


NO_TABLE = "is not a fewstep table"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", NO_TABLE),
        (b"\0" * 7, NO_TABLE),
        (b"\xff" * 64, NO_TABLE),
        (b"not a table at all, only some text", NO_TABLE),
        (pickle.dumps(Trap()), NO_TABLE),
        (zipped(), NO_TABLE),
        (toy().to_bytes()[:-1], NO_TABLE),
        (toy().to_bytes() + b"\0", NO_TABLE),
        (toy().to_bytes()[:40], NO_TABLE),
        (safetensors.numpy.save({"a": np.zeros(3)}), NO_TABLE),
        (safetensors.numpy.save({"a": np.zeros(3)}, {"fewstep_tableau": "{"}), NO_TABLE),
        (file_with(header=[]), NO_TABLE),
        (file_with(header=3), NO_TABLE),
        (file_with(format=2), "table format 2, this version reads 1"),
        (file_with(code="print()"), "unknown or missing entries: code"),
        (file_with(clip="left out"), "unknown or missing entries: clip"),
        (file_with(arrays={"a": np.zeros(2)}), "unknown or missing entries: alpha, b, c, sigma, t"),
        (file_with(name=7), "name is 7"),
        (file_with(weights_sha256=None), "weights_sha256 is None"),
        (file_with(provenance=[1]), r"provenance is \[1\]"),
        (file_with(residual=True), "residual is True"),
        (file_with(clip="ab"), "clip is 'ab'"),
        (file_with(clip=[1]), r"clip is \[1\], not two numbers"),
        (file_with(clip=["a", "b"]), r"clip is \['a', 'b'\], not two numbers"),
        (file_with(start=10**400), "start 10+ is not a positive number of float32"),
        (file_with(provenance={"seed": 7}), "provenance: 'seed' is 7, not a text"),
        (file_with(provenance={"by": "\ud800"}), NO_TABLE),
        (file_with(arrays=as_float32()), "a is float32, not float64"),
        (safetensors.numpy.save({"a": np.zeros(3)}, {"fewstep_tableau": "[" * 100_000 + "]" * 100_000}), NO_TABLE),
        (file_with(name="a/b"), "'a/b' is no name for a table: 1 to 64 of A-Z a-z 0-9 . _ [+] -"),
        (file_with(form="score"), "toy: form 'score' is not one of x0, eps, v, flow"),
    ],
)
def test_a_file_that_holds_no_table_is_refused_in_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(TableauError, match=message) as caught:
        Tableau.load(path)
    assert "\n" not in str(caught.value)
    assert "bad.safetensors" in str(caught.value)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableauError, match=r"none: cannot be read: No such file or directory$"):
        Tableau.load(tmp_path / "none")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_an_altered_file_is_refused_or_another_valid_table(data: st.DataObject) -> None:
    """No byte of a file can be changed so that anything but a `TableauError` comes of it."""
    original = dpmpp_2m(karras(4)).to_bytes()
    spoiled = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    try:
        tableau = Tableau.from_bytes(bytes(spoiled))
    except TableauError:
        return
    assert tableau.num_steps >= 1
