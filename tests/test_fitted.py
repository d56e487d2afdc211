"""The fitted solver: exact where a multistep method can be, v3 where nothing more is known, and the best
nodes there are."""
from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from problems import Gaussian, fitted_statistics, reference_mixture, starting_noise
from samplers import (PATHS, Statistics, CalibrationError, estimate_statistics, fit_multistep,
                      k_diffusion_sampler)
from samplers.learning import course, measure
from samplers.learning.fitted import CHANCE, EVEN, HIGHEST, _correction, _even, fit_weights, fitted_sigmas
from samplers.integrand import DataPrediction
from samplers.phi import midpoint
from samplers.sample import sample
from samplers.schedule import levels
from samplers.solver import Multistep
from test_calibrate import mixture, noise


@pytest.fixture
def exact(monkeypatch) -> None:
    """Nothing is damped that the trajectories explain wholly."""
    monkeypatch.setattr("samplers.learning.fitted.LEAST", 0.0)


def calibration(model=None, x=None, **how) -> Statistics:
    return estimate_statistics(model or mixture(),
                               noise(6) if x is None else x, [14.6, 0.03], fitted=True, **how)


def teacher(model, x: torch.Tensor, statistics: Statistics, path: str = "ve") -> torch.Tensor:
    """Where the calibrating trajectory ends for this noise."""
    grid = [PATHS[path].at(lam) for lam in statistics.lam]
    return run(model, x, Multistep(DataPrediction(), 2, midpoint, "off").steps(grid, PATHS[path]))


def run(model, x: torch.Tensor, steps) -> torch.Tensor:
    return sample(lambda y, sigma: model(y, y.new_full((len(y),), sigma)), x, steps)


@pytest.mark.parametrize("path", ["ve", "vp"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 20])
@pytest.mark.usefixtures("exact")
def test_a_gaussian_is_solved_exactly_in_any_number_of_steps(n: int, path: str) -> None:
    """Its denoiser is linear, so the trajectories' step from anywhere to anywhere is a combination of y_s and
    f_s. Between the points of the grid what is known of D is interpolated."""
    ends = {"ve": [14.6, 0.03], "vp": [0.998, 0.03]}[path]
    model = Gaussian(path)
    found = estimate_statistics(model, starting_noise((4, 3, 4, 4), ends[0], path), ends, path=path,
                                fitted=True)
    x = starting_noise((2, 3, 4, 4), ends[0], path, seed=9)
    goal = teacher(model, x, found, path)
    end = float(found.lam[-1])
    given = found.lam[np.linspace(0, 24, n + 1).astype(int)[:-1]]
    for plan, near in ((fit_weights(found, given, end), 1e-8), (fit_multistep(found, n, end=end), 5e-4)):
        assert len(plan.lam) == n and plan.error < 1e-8
        torch.testing.assert_close(run(model, x, plan.steps(PATHS[path])), goal, rtol=0, atol=near)


@pytest.mark.usefixtures("exact")
def test_the_weights_of_a_polynomial_integrand_are_recovered() -> None:
    """D = a + b lam + c lam^2: y = a + b (lam - 1) + c (lam^2 - 2 lam + 2) + d e^-lam, for which three values
    of D are enough. v3's weights are wrong for it, with s that it does not have."""
    a, b, c, d = np.random.default_rng(0).normal(size=(4, 4, 50))
    lam = np.linspace(-2.0, 3.0, 11)
    t = lam[:, None, None]
    denoised, y = a + b * t + c * t**2, a + b * (t - 1) + c * (t**2 - 2 * t + 2) + d * np.exp(-t)
    pairs = [torch.as_tensor(np.stack(pair)) for pair in zip(y, denoised)]
    flat = np.ones_like(lam)
    found = Statistics(lam, flat, 0.3 * flat, 0 * flat, damping=flat, root=measure._roots(pairs))
    nodes = [0, 2, 3, 6, 8]
    plan = fit_weights(found, lam[nodes], float(lam[-1]))
    exact = Multistep(DataPrediction(), 3, lower_order_final="off").steps(
        [PATHS["ve"].at(lam[i]) for i in [*nodes, 10]], PATHS["ve"])
    for fitted, step in list(zip(plan.steps(PATHS["ve"]), exact))[2:]:  # the first have not the history
        update, goal = fitted.updates[0], step.updates[0]
        assert update.decay == pytest.approx(goal.decay, abs=1e-9)
        # f = -D
        assert [(k, -w) for k, w in update.terms] == [(k, pytest.approx(w, abs=1e-9)) for k, w in goal.terms]


def test_the_levels_err_least_of_those_that_are_tried() -> None:
    found = calibration(intervals=8)
    low, high = map(float, found.lam[[0, -1]])
    for n in (2, 5, 9):
        plan = fit_multistep(found, n)
        tried = {last: fit_weights(found, _even(low, last, n, *EVEN[-1])).error
                 for last in np.linspace(high, high - HIGHEST * (high - low), 6).tolist()}
        assert plan.error <= min(tried.values())
        assert plan.error == min(fit_weights(found, _even(low, plan.lam[-1], n, *even)).error
                                 for even in EVEN)
        assert plan == fit_weights(found, plan.lam)


def test_the_error_to_expect_is_that_of_the_run_on_what_was_measured(monkeypatch) -> None:
    """Where the model's answer hardly depends on x hardly anything is fed back, and errors of steps add up as
    they are: the run of the plan on the calibrating noise ends as far from the trajectory's end as was
    said."""
    monkeypatch.setattr("samplers.learning.fitted.CHANCE", 0.0)
    a, b = np.random.default_rng(1).normal(size=(2, 3, 4, 4))

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        lam = -float(sigma[0].log())
        return torch.as_tensor(a * math.tanh(lam) + b * math.sin(lam)) + 0.01 * x

    x = noise(3)
    found = calibration(model, x)
    goal = model(teacher(model, x, found), torch.tensor([math.exp(-found.lam[-1])]))
    for n in (3, 6):
        plan = fit_multistep(found, n)
        left = run(model, x, plan.steps(PATHS["ve"])) - goal
        assert float(left.square().mean().sqrt()) == pytest.approx(plan.error, rel=0.1)


def test_of_what_steps_miss_a_share_is_by_chance_and_adds_up_as_squares(monkeypatch) -> None:
    found = calibration(x=noise(4))
    nodes = fit_multistep(found, 5).lam

    def square(share: float) -> float:
        monkeypatch.setattr("samplers.learning.fitted.CHANCE", share)
        return fit_weights(found, nodes).error ** 2

    usual, signed, whole = square(CHANCE), square(0.0), square(1.0)
    assert usual - signed == pytest.approx(CHANCE**2 * (whole - signed)) and whole > 1.1 * signed


def test_a_single_trajectory_proves_nothing_and_leaves_v3() -> None:
    found = calibration(x=noise(1))
    x, sigmas = noise(3, seed=5), torch.tensor([14.6, 5.0, 1.5, 0.4, 0.1, 0.0], dtype=torch.float64)
    results = [k_diffusion_sampler(name, statistics=found)(mixture(), x, sigmas, disable=True)
               for name in ("fitted", "dpm_solver_v3")]
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("exact")
def test_a_correction_is_made_only_where_it_holds_on_trajectories_left_out() -> None:
    """One feature, v, and a residual that is 2 v on every trajectory; or 2 v on one and -2 v on the other."""
    v, residual = np.array([[1.0, 0.0]]), np.array([0.0, 1.0])
    same, other = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, -2.0], [0.0, 0.0]])
    assert _correction(np.stack([same, same]), v, residual) == (pytest.approx(-2.0), pytest.approx(0.0))
    assert _correction(np.stack([same, other]), v, residual) == (0.0, 4.0)
    part = np.array([[1.0, 1.0], [0.0, 0.0]])  # the same direction, half as far: between the two
    c, left = _correction(np.stack([same, part]), v, residual)
    assert -1.5 < c < 0.0 < left < 2.5


def test_the_error_to_expect_is_that_on_trajectories_which_were_left_out() -> None:
    """Of three, by four features, of which one explains a part of all."""
    root = np.random.default_rng(1).normal(size=(3, 8, 8))
    residual, features = np.eye(8)[0] + 2.0 * np.eye(8)[1], np.eye(8)[1:5]
    c, left = _correction(root, features, residual)
    fitted_to = np.square((root @ features.T) @ c + root @ residual).sum(1).mean()
    assert c.any() and 1.2 * fitted_to < left < np.square(root @ residual).sum(1).mean()


def test_the_error_falls_as_evaluations_are_added_and_is_below_v3_s() -> None:
    model, found = mixture(), calibration(x=noise(16))
    x = noise(16, seed=5)
    fine = torch.tensor([14.6 * (0.03 / 14.6) ** (i / 600) for i in range(601)] + [0.0], dtype=torch.float64)
    goal = k_diffusion_sampler("dpmpp_2m")(model, x, fine, disable=True)

    def error(name: str, n: int, **options) -> float:
        sigmas = torch.tensor([14.6 * (0.03 / 14.6)**(i / (n - 1)) for i in range(n)] + [0.0],
                              dtype=torch.float64)
        result = k_diffusion_sampler(name, statistics=found, **options)(model, x, sigmas, disable=True)
        return float((result - goal).abs().median())

    errors = [error("fitted_chosen", n) for n in (4, 8, 16)]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert math.log2(errors[0] / errors[1]) > 2.0  # at least of order 2 from 4 to 8
    for n, mine in zip((4, 8, 16), errors):
        assert mine < error("dpm_solver_v3", n)


def test_flow_and_ve_are_one_solver_after_x_over_alpha() -> None:
    found = calibration()
    ratios = [10.0, 4.0, 1.0, 0.3, 0.05]
    x = noise(3, 10.0, seed=2)
    for name in ("fitted", "fitted_chosen"):
        ve = k_diffusion_sampler(name, statistics=found)(
            mixture(), x, torch.tensor(ratios, dtype=torch.float64), disable=True)
        flow = k_diffusion_sampler(name, "flow", statistics=found)(mixture(path="flow"), x / 11.0,
                                                                   torch.tensor([r / (1 + r) for r in ratios],
                                                                                dtype=torch.float64),
                                                                   disable=True)
        torch.testing.assert_close(flow * 1.05, ve, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("path", "sigmas"), [
    ("ve", [14.6, 3.0, 1.0, 0.5, 0.0]),             # a whole run
    ("ve", [2.2, 1.0, 0.7, 0.5, 0.0]),              # image to image
    ("ve", [14.6, 3.0, 1.0, 0.777]),                # leftover noise
    ("flow", [1.0, 0.9, 0.6, 0.2, 0.0])])
def test_chosen_nodes_keep_the_ends_and_the_number_of_evaluations(path: str, sigmas: list[float]) -> None:
    ends = {"ve": [14.6, 0.03], "flow": [1.0, 0.97, 0.03]}[path]
    model = mixture(path=path)
    found = estimate_statistics(model, noise(4, ends[0]), ends, path=path, fitted=True)
    seen = []

    def watched(x, sigma):
        seen.append(float(sigma[0]))
        return model(x, sigma)

    result = k_diffusion_sampler("fitted_chosen", path, statistics=found)(
        watched, noise(2, sigmas[0], seed=1), torch.tensor(sigmas, dtype=torch.float64), disable=True)
    assert seen[0] == pytest.approx(sigmas[0]) and len(seen) == len(sigmas) - 1
    assert seen == sorted(seen, reverse=True) and seen[-1] > sigmas[-1] and result.isfinite().all()


def test_the_damping_of_a_gaussian_s_errors_is_its_l() -> None:
    found = calibration(Gaussian(), starting_noise((4, 3, 4, 4), 14.6, "ve"))
    assert np.abs(found.damping - found.l)[2:].max() < 1e-6
    assert found.about["evaluations"] == 77


def test_what_a_fit_needs_is_saved_and_an_old_file_serves_v3_alone(tmp_path) -> None:
    found = calibration(intervals=8)
    found.save(tmp_path / "new.safetensors")
    again = Statistics.load(tmp_path / "new.safetensors")
    assert np.array_equal(again.root, found.root) and np.array_equal(again.damping, found.damping)
    assert fit_multistep(again, 5).lam == fit_multistep(found, 5).lam
    replace(found, root=None, damping=None).save(tmp_path / "old.safetensors")
    old = Statistics.load(tmp_path / "old.safetensors")
    x, sigmas = noise(1), torch.tensor([14.6, 1.0, 0.0], dtype=torch.float64)
    assert k_diffusion_sampler("dpm_solver_v3", statistics=old)(mixture(), x, sigmas,
                                                                disable=True).isfinite().all()
    with pytest.raises(ValueError, match=r"serve DPM-Solver-v3 only.*measure again with fitted on"):
        k_diffusion_sampler("fitted", statistics=old)(mixture(), x, sigmas, disable=True)
    with pytest.raises(CalibrationError,
                       match=r"root has shape \[6, 18, 18\]: it must be \[trajectories, 19, 19\]"):
        replace(found, root=found.root[:, 1:, 1:])


def test_of_large_latents_a_random_part_is_kept_and_is_enough(monkeypatch) -> None:
    x = noise(64).reshape(4, 3, 16, 16)
    model = Gaussian(spread=torch.linspace(0.1, 0.9, 768, dtype=torch.float64).reshape(3, 16, 16))
    whole = calibration(model, x)
    monkeypatch.setattr(course, "ELEMENTS", 200)
    part, again = calibration(model, x), calibration(model, x)
    assert np.array_equal(part.root, again.root)
    norms = [np.square(statistics.root[:, :, 50]).sum(1) for statistics in (whole, part)]
    assert np.allclose(norms, 1.0)  # of the constant 1, per element
    energies = [np.square(statistics.root).sum((0, 1)) for statistics in (whole, part)]
    assert np.abs(energies[1] / energies[0] - 1).max() < 0.2
    assert fit_multistep(part, 6).error == pytest.approx(fit_multistep(whole, 6).error, rel=0.3)


def test_a_cancelled_calibration_goes_on_where_it_was(tmp_path) -> None:
    expected, partial = calibration(intervals=12), tmp_path / "x.part"

    def cancel_at(k: int):
        def progress(done: int, total: int) -> None:
            if done == k:
                raise KeyboardInterrupt
        return progress

    for stop in (3, 8, 20, 21, 22):
        with pytest.raises(KeyboardInterrupt):
            calibration(intervals=12, partial=partial, progress=cancel_at(stop))
    counts: list[tuple[int, int]] = []
    found = calibration(intervals=12, partial=partial, progress=lambda *count: counts.append(count))
    assert counts[4][0] > 18 and counts[-1] == (41, 41)
    for name in ("l", "s", "b", "damping", "root"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_any_number_of_evaluations_has_nodes_of_its_own() -> None:
    """More than the grid has levels, and from low noise on, where it has few."""
    found = calibration(intervals=8)
    high = float(found.lam[-1])
    for n, start in ((1, None), (18, None), (60, None), (9, 2.5), (2, high), (5, high + 0.005)):
        plan = fit_multistep(found, n, start=start)
        assert len(plan.lam) == n and all(b > a for a, b in itertools.pairwise(plan.lam))
        assert plan.lam[0] == pytest.approx(found.lam[0] if start is None else start)


def test_where_every_choice_is_exact_nodes_are_even() -> None:
    found = calibration(intervals=8)
    plan = fit_multistep(replace(found, root=np.zeros_like(found.root)), 9)
    assert np.diff(plan.lam) == pytest.approx(np.diff(found.lam)[0], abs=0.6 * np.diff(found.lam)[0])


def test_the_chosen_nodes_serve_any_solver() -> None:
    found = calibration(intervals=8)
    sigmas = fitted_sigmas(found, 5, 14.6)
    assert [math.log(1 / s)
            for s in sigmas[:-1]] == pytest.approx(fit_multistep(found, 5, start=math.log(1 / 14.6)).lam)
    assert sigmas[-1] == 0.0
    for start, count in ((14.6, 60), (0.05, 3), (0.05, 1)):
        sigmas = fitted_sigmas(found, count, start)
        assert len(sigmas) == count + 1 and sigmas[0] == pytest.approx(start) and sigmas[-1] == 0.0
    for count in (0, -1):
        with pytest.raises(ValueError,
                           match=f"evaluations = {count} is out of range: choose a whole number >= 1"):
            fitted_sigmas(found, count, 14.6)
    for count in (1, 2, 3):
        assert len(fitted_sigmas(found, count, 1.0, "flow")) == count + 1
    flow = fitted_sigmas(found, 5, 1.0, "flow")  # sigma = 1 has no lam: one node less
    assert flow[0] == 1.0 and [math.log((1 - s) / s)
                               for s in flow[1:-1]] == pytest.approx(fit_multistep(found, 4).lam)


def test_impossible_requests_are_refused_each_with_its_remedy() -> None:
    found = calibration(intervals=8)
    with pytest.raises(ValueError, match="evaluations = 0 is out of range: choose a whole number >= 1"):
        fit_multistep(found, 0)
    with pytest.raises(ValueError, match="pool = 'channel' with fitted = True"):
        calibration(intervals=8, pool="channel")
    with pytest.raises(ValueError, match="the statistics cover lambda"):
        k_diffusion_sampler("fitted", statistics=found)(mixture(), noise(1), torch.tensor([99.0, 1.0, 0.0]),
                                                        disable=True)
    with pytest.raises(ValueError, match="the statistics cover lambda"):
        fit_multistep(found, 4, start=-9.0)
    assert levels([14.6, 0.0], PATHS["ve"])[0].lam == pytest.approx(found.lam[0])


def test_the_catalogue_s_stand_in_has_weights_that_are_fitted_and_nearly_as_good_as_v3_s() -> None:
    """What tests of the whole catalogue run (problems.needed) is the fitted solver, and not v3 by another
    name. On this mixture it is no better than v3: that its weights are right is for the tests of exact
    problems above."""
    found, model = fitted_statistics(), reference_mixture("ve")[0]
    x = torch.randn(
        (32, *reference_mixture("ve")[1].shape[1:]), generator=torch.Generator().manual_seed(8)) * 60.0
    fine, few = (torch.tensor([60.0 * (0.02 / 60.0) ** (i / n) for i in range(n + 1)]) for n in (300, 7))
    exact = k_diffusion_sampler("dpmpp_3s")(model, x.double(), fine.double(), disable=True)
    error = {}
    for kind, statistics in (("fitted", found), ("v3's", replace(found, root=np.zeros_like(found.root[:1])))):
        result = k_diffusion_sampler("fitted", statistics=statistics)(model, x.double(), few.double(),
                                                                      disable=True)
        error[kind] = float((result - exact).square().mean().sqrt())
    assert error["fitted"] < 1.25 * error["v3's"] and abs(error["fitted"] / error["v3's"] - 1) > 0.05, error
