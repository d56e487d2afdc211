"""Every solver converges at its order, on a problem with an exact solution.

On one path: test_identities shows that a run on another is the same run after division by alpha.
"""
from __future__ import annotations

import numpy as np
import pytest
import torch

from problems import (
    ADAPTIVE, ODE, Gaussian, needed, ode, predicting, sigmas_between, serving, smooth_statistics,
    starting_noise)
from samplers import FAMILIES, PATHS, SAMPLERS, k_diffusion_sampler
from samplers.integrand import PREDICTIONS, DataPrediction
from samplers.phi import RULES, midpoint, pseudo_weights, weights
from samplers.sample import advance, combine
from samplers.schedule import levels
from samplers.solver import Multistep
from samplers.learning.fitted import ORDER, Fitted
from samplers.learning.statistics import EmpiricalPrediction

START, END = -2.2, 1.8  # the range in lam: nowhere stiff, everywhere curved
# of several kinds: error terms that cancel for one do not for all
SPREAD = torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)


def order_of(name: str) -> int:
    """The order a solver has: its nominal one, but for the rules that give up a factor (phi.published) or
    a last step."""
    settings = SAMPLERS[name].settings(needed(name))
    if settings.get("fast"):
        return 2  # its last step is of order 1: one local error of O(h^2)
    if SAMPLERS[name].family in ("iPNDM", "Heun (EDM)"):
        return 2  # iPNDM: these steps are equal in lam and not in sigma, where its coefficients are exact
    if SAMPLERS[name].family == "AMED":
        return 1 if settings["base"] == "euler" else 2
    if SAMPLERS[name].family == "Fitted Multistep":
        return ORDER
    if settings.get("corrector", "off") == "full":
        return settings["order"] + 1  # of the predictor; its corrector has one node more
    if settings.get("rule", "taylor") != "taylor" and "lower_order_final" in settings:
        return min(settings["order"], 2)
    return settings.get("order", 1)


def end_error(solver, n: int, path: str) -> float:
    """The error at the end of n steps; multistep histories are seeded with exact evaluations.

    A cold start takes one step of order 1, whose error O(h^2) would hide any higher order.
    """
    problem, gaussian = Gaussian(path, spread=SPREAD), PATHS[path]
    schedule = levels(sigmas_between(START, END, n, path).tolist(), gaussian)
    start = x = starting_noise((2, 3), schedule[0].sigma, path)

    def denoise(x, sigma):
        return problem(x, x.new_full((len(x),), sigma))

    past: list = []
    before = None
    for step in solver.steps(schedule, gaussian):
        values = {-k: m for k, m in enumerate(past, 1)}
        e = step.evaluations[0]
        values[0] = e.x * x + e.denoised * denoise(x, e.at.sigma)
        if before:
            x = combine(x, before, {1 - k: m for k, m in enumerate((values[0], *past))})
        order = ORDER if isinstance(solver, Fitted) else solver.order if isinstance(solver, Multistep) else 1
        seeding = len(past) < order - 1
        before = None if seeding else step.correction
        own = range(len(step.evaluations) - 1, -1, -1)
        x = problem.exact(start, schedule[0].sigma, step.t.sigma) if seeding else advance(
            denoise, x, step, values, {*own, -1, -2, -3})
        past = [values[k] for k in (*own, -1, -2, -3) if k in values][:4]
    return float((x - problem.exact(start, schedule[0].sigma, schedule[-1].sigma)).abs().max())


def slope(solver, path: str, counts=(96, 192)) -> float:
    errors = [end_error(solver, n, path) for n in counts]
    return float(-np.diff(np.log(errors))[-1] / np.diff(np.log(counts))[-1])


@pytest.mark.parametrize("path", ["ve"])
@pytest.mark.parametrize("name", ODE)
def test_the_error_falls_at_the_solver_s_order(name: str, path: str) -> None:
    options = ode(name)
    if "statistics" in options:
        options["statistics"] = serving(name, smooth_statistics())  # its own would leave no error to measure
    solver = SAMPLERS[name].solver(**options)
    assert slope(solver, path) == pytest.approx(order_of(name), abs=0.25)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("path", ["ve"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_solver_is_as_exact_as_its_tolerance_asks(name: str, path: str, prediction: str) -> None:
    sigmas = sigmas_between(START, END, 4, path)
    problem = Gaussian(path)
    x = starting_noise((2, 3), float(sigmas[0]), path)
    exact = problem.exact(x, float(sigmas[0]), float(sigmas[-1]))
    costs = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        calls = []

        def model(x, sigma):
            calls.append(sigma)
            return problem(x, sigma)

        fn = k_diffusion_sampler(name, path, rtol=tolerance, atol=tolerance,
                                 **predicting(name, prediction))
        # one step's error, ten steps
        assert (fn(model, x, sigmas, disable=True) - exact).abs().max() < 10 * tolerance
        costs.append(len(calls))
    assert costs == sorted(costs)


@pytest.mark.parametrize("sigma", [14.6, 80.0, 700.0])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_solver_is_as_exact_from_any_noise_level(name: str, sigma: float) -> None:
    problem = Gaussian(mean=0.5, spread=0.2)
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigma
    result = k_diffusion_sampler(name)(problem, x, torch.tensor([sigma, 0.02], dtype=torch.float64),
                                       disable=True)
    assert (result - problem.exact(x, sigma, 0.02)).square().mean().sqrt() < 0.02


def test_the_published_third_order_rule_is_of_second_order_and_taylor_of_third() -> None:
    """What phi.published says of the authors' own 3M, measured."""
    assert slope(SAMPLERS["dpmpp_3m"].solver(rule="published"), "ve") == pytest.approx(2.0, abs=0.2)
    assert slope(SAMPLERS["dpmpp_3m"].solver(rule="taylor"), "ve") == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("path", ["ve"])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("basis", [weights, pseudo_weights])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_v3_has_its_order_whatever_the_statistics(order: int, basis, extra: int, path: str) -> None:
    """With and without corrector; pseudo differences give up the third order, as they must: m[r0, r1] is a
    mere slope."""
    for corrector in ("off", "full"):
        solver = Multistep(EmpiricalPrediction(smooth_statistics(3)), order, basis=basis, corrector=corrector,
                           corrector_basis=basis, corrector_extra=extra)
        expected = order if basis is weights else min(order, 2)
        assert slope(solver, path) > expected - 0.3, corrector


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_corrector_gives_one_order_more(order: int, rule: str) -> None:
    """UniC, Zhao et al. 2023 (arXiv:2302.04867), Theorem 3.1: than the predictor has, by whatever rule."""
    predictor = 2 if order == 3 and rule in ("midpoint", "published") else order
    for prediction in PREDICTIONS:
        solver = FAMILIES["multistep"].solver(order=order, rule=rule, prediction=prediction, corrector="full")
        assert slope(solver, "ve", (64, 128)) == pytest.approx(predictor + 1, abs=0.3), prediction


def test_half_a_corrector_is_that_of_steps_which_arrive_at_little_noise() -> None:
    path = PATHS["ve"]
    levels = [*(path.at(lam) for lam in (-2.4, -1.5, -0.6, -0.5, 0.4, 1.3)), path.level(0.0)]
    found = {how: [bool(step.correction) for step in
                   Multistep(DataPrediction(), 2, midpoint, corrector=how).steps(levels, path)]
             for how in ("off", "half", "full")}
    assert found == {"off": [False] * 6, "half": [False, False, True, True, False, False],
                     "full": [True, True, True, True, False, False]}


def test_a_corrector_gives_ipndm_the_order_that_its_equal_steps_cost() -> None:
    assert slope(SAMPLERS["ipndm"].solver(corrector="full"), "ve") == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_corrector_lowers_the_error(order: int) -> None:
    plain, corrected = (Multistep(PREDICTIONS["data"], order, corrector=corrector)
                        for corrector in ("off", "full"))
    assert end_error(corrected, 96, "ve") < 0.6 * end_error(plain, 96, "ve")
