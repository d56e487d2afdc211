"""Adaptive runs: from the first level to the last whatever lies between, at the tolerance, and with an
end."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import RK45
from scipy.integrate._ivp.rk import rk_step

from problems import ADAPTIVE, Counted, Gaussian, predicting, reference_mixture, starting_noise
from samplers import FAMILIES, PATHS, k_diffusion_sampler
from samplers.denoisers import MOST
from samplers.sample import LOWEST, advance, combine

EVERY_ADAPTIVE = pytest.mark.parametrize("name", ADAPTIVE)
TIGHT = {"rtol": 1e-4, "atol": 1e-4}


class Recorded(Counted):
    def __init__(self, model) -> None:
        super().__init__(model)
        self.sigmas: list[float] = []

    def __call__(self, x, sigma, **extra):
        self.sigmas.append(float(sigma[0]))
        return super().__call__(x, sigma)


def run(name: str, path: str, sigmas, model=None, x=None, callback=None, sigma_min=None, **options):
    x = starting_noise((2, 3, 4, 4), sigmas[0], path) if x is None else x
    fn = k_diffusion_sampler(name, path, sigma_min=sigma_min, **options)
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return fn(model or Gaussian(path), x, sigmas, callback=callback, disable=True)


def apart(a, b) -> float:
    return float((a - b).square().mean().sqrt())


def ends(path: str) -> tuple[float, float]:
    """The highest and the lowest level of a usual model."""
    return (14.6, 0.03) if path == "ve" else (1.0, 0.003)


@EVERY_ADAPTIVE
@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("known", [True, False], ids=["lowest level known", "not known"])
def test_one_interval_from_pure_noise_to_zero_is_a_whole_run(name: str, path: str, known: bool) -> None:
    high, low = ends(path)
    x = starting_noise((2, 3, 4, 4), high, path)
    exact = 2e-3 if known else 2e-4  # the step from sigma = 0.03 to 0 leaves 0.0011
    for options, tolerance in (({}, 0.03), (TIGHT, exact)):
        model = Counted(Gaussian(path))
        result = run(name, path, [high, 0.0], model, x, sigma_min=low if known else None, **options)
        assert apart(result, Gaussian(path).exact(x, high, 0.0)) < tolerance
        assert 10 < model.calls < 400


@EVERY_ADAPTIVE
@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("start", [1.0, 0.4, 0.1], ids=lambda share: f"from {share}")
@pytest.mark.parametrize("end", [0.0, 0.05])
def test_the_sigmas_between_only_number_the_intervals(name: str, path: str, start: float, end: float) -> None:
    """From pure noise and from an image; to 0 and to leftover noise."""
    high, low = ends(path)
    start *= high
    between = [[], [0.9], [0.5, 0.2, 0.1], [0.9, 0.5, 0.01]]
    x, results, models = starting_noise((2, 3, 4, 4), start, path), [], []
    for shares in between:
        models.append(Recorded(Gaussian(path)))
        sigmas = [start, *(end + (start - end) * share for share in shares), end]
        results.append(run(name, path, sigmas, models[-1], x, sigma_min=low))
    for result, model in zip(results[1:], models[1:]):
        assert torch.equal(result, results[0]) and model.sigmas == models[0].sigmas
    assert apart(results[0], Gaussian(path).exact(x, start, end)) < 0.03


@EVERY_ADAPTIVE
def test_the_error_is_controlled_to_the_model_s_lowest_level(name: str) -> None:
    """[14.6, 3, 0] was 0.57 off at this tolerance: it went from 3 to 0 in one step."""
    x = starting_noise((2, 3, 4, 4), 14.6, "ve")
    for sigma_min, lowest in ((0.03, 0.03), (0.3, 0.3), (None, LOWEST)):
        model = Recorded(Gaussian())
        result = run(name, "ve", [14.6, 3.0, 0.0], model, x, sigma_min=sigma_min, **TIGHT)
        assert model.sigmas[-1] == pytest.approx(lowest) == min(model.sigmas)
        exact = Gaussian().exact(x, 14.6, 0.0)
        level = torch.full((2,), lowest, dtype=torch.float64)
        landed = Gaussian()(Gaussian().exact(x, 14.6, lowest), level)  # DDIM to 0 is D
        assert apart(result, landed) < 2e-4
        assert apart(result, exact) < (0.1 if lowest == 0.3 else 2e-3)


@EVERY_ADAPTIVE
@pytest.mark.parametrize("sigma", [0.03, 0.01])
def test_a_run_that_begins_at_the_lowest_level_or_below_it_is_one_step(name: str, sigma: float) -> None:
    model, x = Recorded(Gaussian()), starting_noise((2, 3, 4, 4), sigma, "ve")
    result = run(name, "ve", [sigma, 0.0], model, x, sigma_min=0.03)
    denoised = Gaussian()(x, torch.full((2,), sigma, dtype=torch.float64))
    assert model.sigmas == [sigma] and torch.equal(result, denoised)


@EVERY_ADAPTIVE
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_a_run_that_ends_above_zero_ends_there_below_the_lowest_level_too(name: str, path: str) -> None:
    high, end = ends(path)[0], 0.001
    x = starting_noise((2, 3, 4, 4), high, path)
    result = run(name, path, [high, 0.5, end], x=x, sigma_min=0.1, **TIGHT)
    assert apart(result, Gaussian(path).exact(x, high, end)) < 2e-4


@EVERY_ADAPTIVE
@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize(("mean", "spread"), [(0.7, 0.4), (0.0, 1.0), (0.5, 0.2)])
def test_the_result_is_within_the_tolerance_from_any_level(name: str, prediction: str, mean, spread) -> None:
    """A step over nearly all of the way was accepted where its orders agreed by chance: up to 2.07 off."""
    problem, generator = Gaussian("ve", mean, spread), torch.Generator().manual_seed(0)
    for start in (1.3**k for k in range(17)):
        noise = torch.randn(2, 300, generator=generator, dtype=torch.float64)
        x = mean + (spread**2 + start**2) ** 0.5 * noise
        result = run(name, "ve", [start, 0.05], problem, x, **predicting(name, prediction))
        assert apart(result, problem.exact(x, start, 0.05)) < 0.05


@EVERY_ADAPTIVE
@pytest.mark.parametrize("tolerance", [0.05, 1e-3, 1e-5])
def test_the_opening_from_pure_noise_errs_less_than_the_tolerance(name: str, tolerance: float) -> None:
    problem, x = reference_mixture("flow")
    fine = [1.0, *(PATHS["flow"].at(-10.0 + 20.0 * i / 1000).sigma for i in range(1001)), 0.0]
    exact = k_diffusion_sampler("dpmpp_3s", "flow")(problem, x, fine, disable=True)
    result = run(name, "flow", [1.0, 0.0], problem, x, rtol=tolerance, atol=tolerance)
    assert apart(result, exact) < tolerance + 2e-5  # what the step from LOWEST to 0 leaves


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "rk45"])  # which is content with it
def test_a_run_of_a_model_too_coarse_for_the_tolerance_has_an_end_and_says_what_to_do(name: str) -> None:
    x = 14.6 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rounding = Counted(lambda x, sigma: Gaussian()(x, sigma).bfloat16().float())
    with pytest.raises(FloatingPointError, match=(
            "after 2000 evaluations the run is at sigma = .*rtol = 1e-05, atol = 1e-06.*bfloat16 is exact to "
            "about 0.004.*raise rtol and atol, run the model in float32, or choose a solver with a fixed")):
        run(name, "ve", [14.6, 0.0], rounding, x, rtol=1e-5, atol=1e-6)
    assert rounding.calls == MOST
    rounding.calls = 0
    run(name, "ve", [14.6, 0.0], rounding, x)
    assert rounding.calls < 100


@EVERY_ADAPTIVE
def test_the_tightest_tolerances_are_within_the_bound(name: str) -> None:
    problem, x = reference_mixture("ve")
    model = Counted(problem)
    run(name, "ve", [80.0, 0.0], model, 80.0 * x, sigma_min=0.002, rtol=1e-5, atol=1e-6)
    assert (150 if name == "rk45" else 300) < model.calls < 0.75 * MOST


@EVERY_ADAPTIVE
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_the_callback_and_the_bar_follow_the_schedule(name: str, path: str, capsys) -> None:
    high, low = ends(path)
    sigmas, seen = [high, *(high * share for share in (0.5, 0.2, 0.05)), 0.0], []
    run(name, path, sigmas, sigma_min=low, callback=lambda info: seen.append(
        (info["i"], float(info["sigma"]))))
    intervals = [i for i, _ in seen]
    assert intervals == sorted(intervals) and {0, 3} <= set(intervals)
    assert all(sigmas[i] >= sigma > sigmas[i + 1] - 1e-12 for i, sigma in seen)
    x = starting_noise((1, 1, 2, 2), high, path)
    k_diffusion_sampler(name, path)(Gaussian(path), x, torch.tensor(sigmas), disable=False)
    assert "4/4" in capsys.readouterr().err


@EVERY_ADAPTIVE
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_a_first_step_that_is_skipped_is_the_only_one(name: str, path: str) -> None:
    high, low = ends(path)
    sigmas = []
    for options in ({}, {"first_step": "afs"}):
        model = Recorded(Gaussian(path))
        run(name, path, [high, 0.0], model, sigma_min=low, **options)
        sigmas.append(model.sigmas)
    assert sigmas[0][0] == high and high not in sigmas[1] and sigmas[1][0] > 0.1


@pytest.mark.parametrize("sigma_min", [0.0, -1.0, math.nan])
def test_a_lowest_level_that_is_none_is_refused(sigma_min: float) -> None:
    with pytest.raises(ValueError, match="sigma_min = .*: give the model's lowest noise level above 0"):
        k_diffusion_sampler("dpm_adaptive_23", sigma_min=sigma_min)
    k_diffusion_sampler("dpmpp_2m", sigma_min=sigma_min)  # which has no use for it


@pytest.mark.parametrize("path", ["ve", "flow"])
def test_rk45_is_scipy_s_step_in_sigma_over_alpha(path: str) -> None:
    """Both orders of one step, by scipy's own function; and what is known at its end begins the next."""
    problem, gaussian = reference_mixture(path)[0], PATHS[path]
    s, t = gaussian.at(0.2), gaussian.at(0.9)
    x = reference_mixture(path)[1]

    def slope(varsigma: float, y: np.ndarray) -> np.ndarray:
        level = gaussian.at(-math.log(varsigma))
        state = level.alpha * torch.from_numpy(y.reshape(x.shape))
        denoised = problem(state, state.new_full((len(x),), level.sigma))
        return ((state - level.alpha * denoised) / level.sigma).numpy().ravel()

    start, end = math.exp(-s.lam), math.exp(-t.lam)
    y = (x / s.alpha).numpy().ravel()
    stages = np.empty((7, y.size))
    landed, _ = rk_step(slope, start, y, slope(start, y), end - start, RK45.A, RK45.B, RK45.C, stages)
    step, low = FAMILIES["adaptive"].solver(method="rk45").step(s, t, gaussian)
    values: dict = {}
    denoise = lambda x, sigma: problem(x, x.new_full((len(x),), sigma))  # noqa: E731
    high = advance(denoise, x, step, values, set(range(7)))
    np.testing.assert_allclose((high / t.alpha).numpy().ravel(), landed, atol=1e-12)
    lower = landed - (end - start) * RK45.E @ stages
    np.testing.assert_allclose((combine(x, low, values) / t.alpha).numpy().ravel(), lower, atol=1e-12)
    np.testing.assert_allclose(values[6].numpy().ravel(), slope(end, landed), atol=1e-12)


def test_rk45_takes_six_evaluations_a_step_and_spends_fewer_at_tight_tolerances() -> None:
    x, calls = starting_noise((2, 3, 4, 4), 14.6, "ve"), {}
    for name in ("rk45", "dpm_adaptive_23"):
        model = Counted(Gaussian())
        result = run(name, "ve", [14.6, 0.0], model, x, sigma_min=0.002, rtol=1e-5, atol=1e-5)
        assert apart(result, Gaussian().exact(x, 14.6, 0.0)) < 1e-5
        calls[name] = model.calls
    assert calls["rk45"] % 6 == 2 and calls["rk45"] < 0.8 * calls["dpm_adaptive_23"]
