"""Equations between solvers, and problems they solve exactly."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad

from problems import (ADAPTIVE, FIXED, ODE, Counted, Gaussian, gaussian_statistics, needed, ode,
                      predicting, reference_mixture, serving, starting_noise)
from samplers import FAMILIES, PATHS, SAMPLERS, Statistics, k_diffusion_sampler
from samplers.learning.amed import Insertion
from samplers.catalogue import find
from samplers.learning.fitted import Fitted
from samplers.k_diffusion import k_diffusion_function
from samplers.score_sde import PredictorCorrector
from samplers.solver import Multistep

FULL = {"ve": [14.6, 7.0, 3.0, 1.2, 0.6, 0.2, 0.03, 0.0], "flow": [1.0, 0.93, 0.8, 0.6, 0.4, 0.2, 0.05, 0.0],
        "vp": [1.0, 0.99, 0.9, 0.7, 0.4, 0.2, 0.05, 0.0]}


def run(name: str, path: str, sigmas, x, model=None, **options):
    fn = k_diffusion_sampler(name, path, **{**needed(name), **options})
    return fn(model or reference_mixture(path)[0], x, torch.as_tensor(sigmas, dtype=torch.float64),
              extra_args={"seed": 5}, disable=True)


def start(path: str, sigma: float):
    return reference_mixture(path)[1] * (sigma**2 + PATHS[path].level(sigma).alpha ** 2) ** 0.5


@pytest.mark.parametrize("name", ["dpmpp_1m", "dpm_1m"])
@pytest.mark.parametrize("path", PATHS)
def test_the_first_order_solver_is_ddim_which_is_euler_in_sigma_over_alpha(name: str, path: str) -> None:
    sigmas = FULL[path][1:]
    x = start(path, sigmas[0])
    model, gaussian = reference_mixture(path)[0], PATHS[path]
    y = x / gaussian.level(sigmas[0]).alpha
    for s, t in zip(map(gaussian.level, sigmas), map(gaussian.level, sigmas[1:])):
        denoised = model(y * s.alpha, torch.full((len(y),), s.sigma, dtype=torch.float64))
        y = y + (t.sigma / t.alpha - s.sigma / s.alpha) * (y - denoised) / (s.sigma / s.alpha)
    torch.testing.assert_close(run(name, path, sigmas, x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_ve_vp_and_flow_are_one_run_after_division_by_alpha(name: str) -> None:
    lams = [-2.5, -1.6, -0.9, 0.1, 0.8, 1.5, 2.6, 3.5]
    results = []
    for path in PATHS:
        there = [PATHS[path].at(lam) for lam in lams]
        x = start("ve", PATHS["ve"].at(lams[0]).sigma) * there[0].alpha
        results.append(run(name, path, [level.sigma for level in there], x) / there[-1].alpha)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_run_is_one_run_on_every_path_too(name: str, prediction: str) -> None:
    """It takes the same steps, since its tolerance is that of a state of unit variance."""
    results, counts = [], []
    for path in PATHS:
        first, last = map(PATHS[path].at, (-4.4, 3.9))
        model, x = Counted(reference_mixture(path)[0]), start("ve", PATHS["ve"].at(-4.4).sigma) * first.alpha
        results.append(
            run(name, path, [first.sigma, last.sigma], x, model, **predicting(name, prediction)) / last.alpha)
        counts.append(model.calls)
    assert len(set(counts)) == 1
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)  # step lengths are in float32


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].family == "DPM-Solver++ SDE"
                                  and name != "analytic_dpm"])
def test_the_sde_without_noise_is_the_ode(name: str, path: str) -> None:
    same = {key: SAMPLERS[name].settings({})[key] for key in ("order", "rule", "corrector")}
    x = start(path, FULL[path][0])
    ode = k_diffusion_function(FAMILIES["multistep"], path, same)
    expected = ode(reference_mixture(path)[0], x, torch.tensor(FULL[path], dtype=torch.float64), disable=True)
    torch.testing.assert_close(run(name, path, FULL[path], x, eta=0.0), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("path", PATHS)
def test_singlestep_of_order_one_is_multistep_of_order_one(path: str, prediction: str) -> None:
    x, sigmas = start(path, FULL[path][0]), torch.tensor(FULL[path], dtype=torch.float64)
    results = [k_diffusion_function(FAMILIES[family], path, {"order": 1, "prediction": prediction, **fast})(
        reference_mixture(path)[0], x, sigmas, disable=True)
        for family, fast in (("singlestep", {}), ("multistep", {}), ("singlestep", {"fast": True}))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ODE)
def test_a_constant_denoiser_is_solved_exactly_by_steps_of_any_size(name: str, path: str) -> None:
    gaussian, sigmas = PATHS[path], FULL[path][1:-1]
    x = start(path, sigmas[0])
    target = torch.linspace(-2, 2, x.numel(), dtype=torch.float64).reshape(x.shape)
    options = {
        **ode(name), **({
            "statistics": serving(name, Statistics.constant(1.0, 0.0, 0.0))
        } if "statistics" in needed(name) else {})
    }
    result = run(name, path, sigmas, x, model=lambda x, sigma, **extra: target, **options)
    s, t = gaussian.level(sigmas[0]), gaussian.level(sigmas[-1])
    torch.testing.assert_close(result, t.alpha * target + t.sigma * (x - s.alpha * target) / s.sigma, rtol=0,
                               atol=1e-9)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s"])
def test_a_polynomial_denoiser_is_integrated_exactly_once_the_history_is_full(name: str) -> None:
    """D a polynomial in lam, of degree below the order, whatever x: exact but for the steps that start the
    history."""
    order = SAMPLERS[name].fixed["order"]
    lams = [-1.5, -0.8, -0.3, 0.4, 1.3, 1.9]
    warm = order - 1 if name.endswith("m") else 0

    def d(lam: float) -> float:
        return sum((0.7 - 0.5 * p) * lam**p for p in range(order))

    sigmas = [math.exp(-lam) for lam in lams]
    seen = []
    x = torch.full((1, 1), 1.3, dtype=torch.float64)
    result = k_diffusion_sampler(name, rule="taylor", lower_order_final="off")(
        lambda x, sigma: torch.full_like(x, d(-math.log(float(sigma)))), x,
        torch.tensor(sigmas, dtype=torch.float64), callback=lambda seen_: seen.append(seen_["x"].clone()),
        disable=True) if warm else k_diffusion_sampler(
            name, rule="taylor")(lambda x, sigma: torch.full_like(x, d(-math.log(float(sigma)))), x,
                                 torch.tensor(sigmas, dtype=torch.float64),
                                 callback=lambda seen_: seen.append(seen_["x"].clone()), disable=True)
    s, t = lams[warm], lams[-1]
    integral = quad(lambda lam: math.exp(lam - t) * d(lam), s, t, epsabs=1e-13, epsrel=1e-13)[0]
    assert float(result) == pytest.approx(math.exp(s - t) * float(seen[warm]) + integral, abs=1e-12)


@pytest.mark.parametrize("curves", [(1.0, 0.0, 0.0), (0.0, -1.0, 0.0)], ids=["DPM-Solver++", "DPM-Solver"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_v3_contains_dpm_solver(order: int, path: str, curves) -> None:
    x, sigmas = start(path, FULL[path][1]), torch.tensor(FULL[path][1:], dtype=torch.float64)
    results = [
        k_diffusion_function(FAMILIES[name], path, options)(reference_mixture(path)[0], x, sigmas,
                                                            disable=True)
        for name, options in (
            ("v3", {"statistics": Statistics.constant(*curves), "order": order, "corrector": "off"}),
            ("multistep", {"order": order, "rule": "taylor", "prediction": "data" if curves[0] else "noise"}))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-8)


def test_v3_with_the_exact_statistics_of_a_linear_model_is_exact_in_any_step() -> None:
    problem = Gaussian("ve")
    x, sigmas = starting_noise((2, 3), 10.0, "ve"), torch.tensor([10.0, 1.5, 0.05], dtype=torch.float64)
    result = k_diffusion_sampler("dpm_solver_v3", statistics=gaussian_statistics())(problem, x, sigmas,
                                                                                    disable=True)
    # the curves are linear in pieces
    torch.testing.assert_close(result, problem.exact(x, 10.0, 0.05), rtol=0, atol=2e-4)


def test_the_2s_midpoint_uses_only_the_middle_evaluation() -> None:
    step = find("dpmpp_2s").solver().steps([PATHS["ve"].level(2.0), PATHS["ve"].level(1.0)], PATHS["ve"])[0]
    assert [k for k, _ in step.updates[-1].terms] == [1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=9, unique=True).filter(
    lambda s: all(b - a > 1e-3 for a, b in zip(sorted(s), sorted(s)[1:]))), st.sampled_from(FIXED))
def test_a_run_may_be_cut_anywhere_when_the_solver_has_no_memory(sigmas: list[float], name: str) -> None:
    """Leftover noise: two runs in a row are one run, for singlestep solvers and first order; the SDE's noise
    included, but not that of a corrector, which is drawn on a clock of the run's own."""
    sampler = SAMPLERS[name]
    solver = sampler.solver(**needed(name))
    base = solver.base if isinstance(solver, Insertion) else solver
    if sampler.fixed.get("fast") or isinstance(solver, (PredictorCorrector, Fitted)) or (
            isinstance(base, Multistep) and base.order > 1):
        return
    sigmas = sorted(sigmas, reverse=True)
    x = start("flow", sigmas[0])
    cut = len(sigmas) // 2
    half = run(name, "flow", sigmas[:cut + 1], x)
    torch.testing.assert_close(run(name, "flow", sigmas[cut:], half), run(name, "flow", sigmas, x), rtol=0,
                               atol=1e-9)
