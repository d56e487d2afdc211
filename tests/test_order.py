"""Every solver converges at its order, on a problem with an exact solution, on every path."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from problems import Gaussian, sigmas_between, starting_noise
from samplers import PATHS, SAMPLERS, k_diffusion_sampler
from samplers.sample import advance
from samplers.schedule import levels
from samplers.solver import Adaptive, Multistep, Step

START, END = -2.2, 1.8  # the range in lam: nowhere stiff, everywhere curved
SPREAD = torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)  # of several kinds: error terms that cancel for one do not for all


def order_of(name: str) -> int:
    """The order a solver has: its nominal one, but for the rules that give up a factor (phi.published) or a last step."""
    settings = SAMPLERS[name].settings({})
    if SAMPLERS[name].family == "DPM-Solver Fast":
        return 2  # its last step is of order 1: one local error of O(h^2)
    if settings["rule"] != "taylor" and "lower_order_final" in settings:
        return min(settings["order"], 2)
    return settings["order"]


def error(name: str, n: int, path: str) -> float:
    """The error at the end of n steps; multistep histories are seeded with exact evaluations.

    A cold start takes one step of order 1, whose error O(h^2) would hide any higher order.
    """
    sampler, problem, gaussian = SAMPLERS[name], Gaussian(path, spread=SPREAD), PATHS[path]
    solver = sampler.solver(**({"eta": 0.0} if "eta" in sampler.options else {}))
    schedule = levels(sigmas_between(START, END, n, path).tolist(), gaussian)
    x = starting_noise((2, 3), schedule[0].sigma, path)
    final = problem.exact(x, schedule[0].sigma, schedule[-1].sigma)

    def denoise(x, sigma):
        return problem(x, x.new_full((len(x),), sigma))

    past: list = []
    start = x
    for step in solver.steps(schedule, gaussian):
        known = {-k: m for k, m in enumerate(past, 1)}
        if isinstance(solver, Multistep) and step.lookback < solver.order - 1:
            _, values = advance(denoise, x, step, known, {0})
            x = problem.exact(start, schedule[0].sigma, step.t.sigma)
        else:
            x, values = advance(denoise, x, step, known, {0})
        past = [values[0], *past][:3]
    return float((x - final).abs().max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if not isinstance(SAMPLERS[name].solver(), Adaptive)])
def test_the_error_falls_at_the_solver_s_order(name: str, path: str) -> None:
    counts = np.array([48, 96, 192])
    errors = np.array([error(name, n, path) for n in counts])
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert abs(slopes[-1] - order_of(name)) < 0.25, f"errors {errors}, slopes {slopes}"


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if isinstance(SAMPLERS[name].solver(), Adaptive)])
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

        fn = k_diffusion_sampler(name, path, rtol=tolerance, atol=tolerance, prediction=prediction)
        assert (fn(model, x, sigmas, disable=True) - exact).abs().max() < 10 * tolerance  # one step's error, ten steps
        costs.append(len(calls))
    assert costs == sorted(costs)


def test_the_published_third_order_rule_is_of_second_order_and_taylor_of_third() -> None:
    """What phi.published says of the authors' own 3M, measured."""
    def slope(rule: str) -> float:
        problem, gaussian, e = Gaussian("ve", spread=SPREAD), PATHS["ve"], []
        for n in (96, 192):
            schedule = levels(sigmas_between(START, END, n, "ve").tolist(), gaussian)
            start = x = starting_noise((2, 3), schedule[0].sigma, "ve")
            past: list = []
            for i, step in enumerate(SAMPLERS["dpmpp_3m"].solver(rule=rule).steps(schedule, gaussian)):
                x, values = advance(lambda x, sigma: problem(x, x.new_full((len(x),), sigma)), x, step,
                                    {-k: m for k, m in enumerate(past, 1)}, {0})
                if i < 2:
                    x = problem.exact(start, schedule[0].sigma, step.t.sigma)
                past = [values[0], *past][:2]
            e.append(float((x - problem.exact(start, schedule[0].sigma, schedule[-1].sigma)).abs().max()))
        return math.log2(e[0] / e[1])

    assert slope("published") == pytest.approx(2.0, abs=0.2)
    assert slope("taylor") == pytest.approx(3.0, abs=0.2)
