"""The tracer: a solver's code and its table are the same sampler, and what is no table is refused with the reason."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from fewstep.runtime import Levels, TableauError
from fewstep.runtime.prediction import FORMS, Form, form_weights
from fewstep.runtime.schedules import Level, karras, vp_linear
from fewstep.runtime.tracer import Linear, Trace, trace
from fewstep.training.exact import Mixture, run

Array = NDArray[np.float64]
Code = Callable[[Any], Any]  # a solver, for a `Trace` or for arrays

MIXTURE = Mixture.random(dimensions=5, components=3)
LEVELS = vp_linear(5, t_max=0.9)


class Both(NamedTuple):
    """What `Arrays` answers, as `Trace` does."""

    x0: Array
    eps: Array


class Arrays:
    """Runs a solver's code as it stands, on the mixture."""

    def __init__(self, scale: float) -> None:
        self._generator = np.random.default_rng(0)
        self._start = scale * self._generator.standard_normal(5)
        self.noises: list[Array] = []

    def start(self) -> Array:
        return self._start

    def noise(self) -> Array:
        self.noises.append(self._generator.standard_normal(5))
        return self.noises[-1]

    def __call__(self, x: Array, level: Level) -> Both:
        x0 = MIXTURE.x0(x, level.alpha, level.sigma)
        return Both(x0, (x - level.alpha * x0) / level.sigma)


def runge_kutta_3(levels: Levels) -> Code:
    """Kutta's third-order method over two steps of the grid at a time: a base point and two stages."""

    def solve(net: Any) -> Any:
        x = net.start()
        for i in (0, 2):
            first, middle, last = (levels[j] for j in (i, i + 1, i + 2))
            h = last.ratio - first.ratio
            k1 = net(x, first).eps
            k2 = net(middle.alpha * (x / first.alpha + (middle.ratio - first.ratio) * k1), middle).eps
            k3 = net(last.alpha * (x / first.alpha + h * (2 * k2 - k1)), last).eps
            x = last.alpha * (x / first.alpha + h / 6 * (k1 + 4 * k2 + k3))
        return net(x, levels[4]).x0

    return solve


def noisy_multistep(levels: Levels) -> Code:
    """Two predictions back, fresh noise at each step, a step that starts over from pure noise."""

    def solve(net: Any) -> Any:
        x, old = net.start(), None
        for i, (here, there) in enumerate(levels.steps()):
            x0 = net(x, here).x0
            guess = x0 if old is None else 1.5 * x0 - 0.5 * old
            old = x0
            if there.sigma:
                kept = 0.0 if i == 1 else 0.6
                eps = (x - here.alpha * guess) / here.sigma
                x = there.alpha * guess + there.sigma * (kept * eps + (1 - kept**2) ** 0.5 * net.noise())
            else:
                x = x0
        return x

    return solve


@pytest.mark.parametrize(("code", "form"), [*((runge_kutta_3, form) for form in FORMS), (noisy_multistep, "x0")])
def test_the_table_is_the_code(code: Callable[[Levels], Code], form: Form) -> None:
    """The code run on arrays and its table end in the same sample."""
    table = trace("toy", form, LEVELS, code(LEVELS))
    arrays = Arrays(table.initial_scale)
    expected = code(LEVELS)(arrays)
    noises = iter(arrays.noises)
    ours = run(table, MIXTURE.x0, arrays.start(), lambda _: next(noises))[-1]
    assert np.abs(ours - expected).max() < 1e-12 * np.abs(expected).max() * LEVELS[0].ratio


def test_a_base_point_costs_no_latent_and_no_place() -> None:
    """Three stages from one base: three predictions are kept, and each stage's own weight of x is a ratio of alphas."""
    table = trace("rk3", "eps", LEVELS, runge_kutta_3(LEVELS))
    assert table.num_steps == 7
    assert table.num_places == 3
    visited = [0, 1, 2, 2, 3, 4, 4]
    assert np.allclose(table.alpha[:-1], LEVELS.alpha[visited])
    assert np.allclose(table.a, table.alpha[1:] / table.alpha[:-1])


def test_the_window_is_the_solvers_own_in_its_own_form_only() -> None:
    """A slope extrapolated in eps reaches two back in eps, and to the first row in x0."""

    def solve(net: Trace) -> Linear:
        x = net.start()
        slopes: list[Linear] = []
        for here, there in LEVELS.steps():
            slopes = [net(x, here).eps, *slopes][:2]
            slope = slopes[0] if len(slopes) == 1 else 1.5 * slopes[0] - 0.5 * slopes[1]
            x = there.alpha * (x / here.alpha + (there.ratio - here.ratio) * slope)
        return x

    assert trace("ab2", "eps", LEVELS, solve).num_places == 2
    assert trace("ab2", "x0", LEVELS, solve).num_places == 5


def test_looking_back_past_noise_is_for_one_form_only() -> None:
    """An old x0 in terms of eps holds the latent before the noise."""
    with pytest.raises(TableauError, match="keep the history in the form in which the solver looks back"):
        trace("toy", "eps", LEVELS, noisy_multistep(LEVELS))


def test_what_cancels_is_gone() -> None:
    """A thousand rows, each written as a detour over its base: no weight is left of what cancels."""
    levels = vp_linear(300)

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in levels.steps():
            x0, eps = net(x, here)
            x = x + (there.alpha * x0 - x) + there.sigma * eps
        return x

    table = trace("detour", "x0", levels, solve)
    assert table.history == 1
    assert np.allclose(table.a, levels.sigma[1:] / levels.sigma[:-1], rtol=1e-13)


def test_noise_at_the_start_joins_the_initial_noise() -> None:
    """Levels may ask for another initial scale, and a solver may add noise before its first call."""

    def solve(net: Trace) -> Linear:
        x = net.start() + 3.0 * net.noise() + 4.0 * net.noise()
        return net(x, Level(1.0, 13.0, 0.0)).x0

    levels = Levels(np.ones(2), np.array([12.0, 0.0]), np.zeros(1))
    table = trace("toy", "x0", levels, solve)
    assert (table.initial_scale, table.start) == (13.0, None)
    moved = Levels(levels.alpha, levels.sigma, levels.t, start=10.0)
    assert trace("toy", "x0", moved, solve).start == pytest.approx(125**0.5)


def test_noise_inside_a_step_that_goes_back_is_refused() -> None:
    """DPM-Solver++ SDE with two stages, k-diffusion's sample_dpmpp_sde, would need a second saved latent."""

    def solve(net: Trace) -> Linear:
        x = net.start()
        for here, there in karras(3).steps():
            x0, eps = net(x, here)
            if there.sigma == 0:
                return x0
            middle = Level(1.0, (here.sigma * there.sigma) ** 0.5, 0.0)
            inner = x0 + middle.sigma * (0.8 * eps + 0.6 * net.noise())
            x0_inner = net(inner, middle).x0
            x = x0_inner + there.sigma * (0.8 * (x - x0_inner) / here.sigma + 0.6 * net.noise())
        raise AssertionError

    with pytest.raises(TableauError, match=r"^dpmpp_sde: row 1 needs an earlier latent again .*: noise was added in "):
        trace("dpmpp_sde", "x0", karras(3), solve)


Act = Callable[[Any], object]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: x * x, "multiplies two latents"),
        (lambda x: x / x, "divides by a latent"),
        (lambda x: 1 / x, "divides by a latent"),
        (lambda x: x**2, "raises a latent to a power"),
        (lambda x: abs(x), "takes the size of a latent"),
        (lambda x: x < x, "compares latents"),
        (lambda x: x == x, "compares latents"),
        (lambda x: 1 if x else 2, "lets a latent decide what it does"),
        (lambda x: float(x), "needs the value of a latent"),
        (lambda x: x + 1, "adds a number to a latent"),
        (lambda x: x - 1, "adds a number to a latent"),
        (lambda x: np.float64(2) + x, "adds a number to a latent"),
        (lambda x: x * "a", "scales a latent by a str"),
        (lambda x: x * np.ones(3), "scales a latent by a ndarray"),
    ],
)
def test_steps_that_adapt_to_the_sample_are_refused(act: Act, message: str) -> None:
    def solve(net: Trace) -> Linear:
        x0 = net(net.start(), karras(1)[0]).x0
        act(x0)
        return x0

    expected = rf"^toy: the solver {message}; a table holds fixed weights, so steps cannot adapt to the sample$"
    with pytest.raises(TableauError, match=expected):
        trace("toy", "x0", karras(1), solve)


def test_numbers_of_numpy_are_numbers() -> None:
    x = Linear({0: Decimal(3)})
    for y in (np.float64(2) * x, x * np.float64(2), 2 * x, x + x, x / 0.5, -(-2 * x), 3 * x - x):
        assert y.weights == {0: 6}


def test_code_that_is_no_solver_is_refused() -> None:
    with pytest.raises(TableauError, match=r"^toy: the solver must call the network and return a latent$"):
        trace("toy", "x0", karras(1), lambda net: net.start())
    with pytest.raises(TableauError, match=r"^toy: the solver gives the network what is no latent; "):
        trace("toy", "x0", karras(1), lambda net: net(1.0, karras(1)[0]).x0)  # type: ignore[arg-type]
    with pytest.raises(TableauError, match=r"^toy: eps says nothing new at alpha = 0, sigma = 1$"):
        trace("toy", "eps", karras(1), lambda net: net(net.start(), Level(0.0, 1.0, 0.0)).x0)


def test_a_window_that_no_memory_holds_is_refused() -> None:
    """The mean of all predictions so far, over twenty rows."""
    levels = karras(20)

    def solve(net: Trace) -> Linear:
        x, total = net.start(), Linear({})
        for i, (here, there) in enumerate(levels.steps()):
            total = total + net(x, here).x0
            mean = (1 / (i + 1)) * total
            x = mean + there.sigma / here.sigma * (x - mean)
        return x

    with pytest.raises(TableauError, match=r"^toy: reads 20 predictions back, a table may read 16$"):
        trace("toy", "x0", levels, solve)


def test_a_solver_that_misses_its_levels_must_say_so() -> None:
    """Noise of half the size a level asks for."""

    def solve(net: Trace) -> Linear:
        high, low = karras(2)[0], Level(1.0, 1.0, 0.0)
        return net(net(net.start(), high).x0 + 0.5 * net.noise(), low).x0

    with pytest.raises(TableauError, match=r"^toy: row 0 misses the variance of its level by -0\.000117$"):
        trace("toy", "x0", karras(2), solve)
    table = trace("toy", "x0", karras(2), solve, inexact=True, options={"noise": 0.5})
    assert table.residual == pytest.approx(0.75 / 80**2)
    assert table.provenance == {"noise": "0.5"}


def test_forms_and_code_agree_on_what_a_prediction_is() -> None:
    """The tracer's x0 and eps are those that `prediction.form_weights` defines."""
    for form in FORMS:
        x, m = Linear({0: Decimal(1)}), Linear({1: Decimal(1)})
        x0, eps = Trace(form)(x, Level(0.6, 0.8, 0.0))
        p, q = form_weights(form, 0.6, 0.8)
        for k, expected in enumerate(((0.6 * x0 + 0.8 * eps) - x, (p * x0 + q * eps) - m)):
            assert all(abs(float(weight)) < 1e-15 for weight in expected.weights.values()), (form, k)
