"""DDIM, DDPM and Analytic-DPM: their published equations, and the variance they leave."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from problems import Gaussian, gaussian_statistics, reference_mixture, starting_noise
from samplers import FAMILIES, PATHS, Statistics, estimate_statistics, k_diffusion_sampler
from samplers.integrand import AncestralPrediction, DataPrediction
from samplers.learning.statistics import AnalyticPrediction
from samplers.noise import BrownianNoise
from samplers.schedule import levels
from samplers.solver import Multistep

SIGMAS = {"ve": [14.6, 5.0, 1.2, 0.6, 0.05], "flow": [0.97, 0.8, 0.5, 0.3, 0.04],
          "vp": [0.999, 0.9, 0.6, 0.3, 0.05]}
SPREAD = 0.4


def run(name: str, path: str, sigmas, model=None, **options):
    x = reference_mixture("ve")[1] * 3.0
    return k_diffusion_sampler(name, path, **options)(
        model or reference_mixture(path)[0], x, torch.tensor(sigmas, dtype=torch.float64),
        extra_args={"seed": 5}, disable=True)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_its_equation_in_alpha_bar(eta: float) -> None:
    """Song et al. 2021 (arXiv:2010.02502), eqs. (12) and (16), in a VP state."""
    model, x = reference_mixture("vp")[0], reference_mixture("ve")[1] * 3.0
    noise = BrownianNoise(x, 5)
    for s, t in zip(*(levels(part, PATHS["vp"]) for part in (SIGMAS["vp"][:-1], SIGMAS["vp"][1:]))):
        a, b = s.alpha**2, t.alpha**2
        std = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        denoised = model(x, x.new_full((len(x),), s.sigma))
        eps = (x - math.sqrt(a) * denoised) / math.sqrt(1 - a)
        x = math.sqrt(b) * denoised + math.sqrt(1 - b - std**2) * eps + std * noise(s, t)
    torch.testing.assert_close(run("ddim", "vp", SIGMAS["vp"], eta=eta), x, rtol=0, atol=1e-12)


def test_ddpm_is_its_equation_in_beta() -> None:
    """Ho et al. 2020 (arXiv:2006.11239), Algorithm 2, with the variance of eq. (7)."""
    model, x = reference_mixture("vp")[0], reference_mixture("ve")[1] * 3.0
    noise = BrownianNoise(x, 5)
    for s, t in zip(*(levels(part, PATHS["vp"]) for part in (SIGMAS["vp"][:-1], SIGMAS["vp"][1:]))):
        kept = (s.alpha / t.alpha) ** 2  # 1 - beta
        beta, bar, before = 1 - kept, s.alpha**2, t.alpha**2
        eps = (x - s.alpha * model(x, x.new_full((len(x),), s.sigma))) / s.sigma
        x = (x - beta / math.sqrt(1 - bar) * eps) / math.sqrt(kept) + math.sqrt(
            (1 - before) / (1 - bar) * beta) * noise(s, t)
    torch.testing.assert_close(run("ddpm", "vp", SIGMAS["vp"]), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_ddim_with_all_its_noise_is_ddpm_and_the_first_order_sde(path: str) -> None:
    ends = [*SIGMAS[path], 0.0]
    expected = run("dpmpp_sde", path, ends, eta=1.0)
    torch.testing.assert_close(run("ddpm", path, ends), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(run("ddim", path, ends, eta=1.0), expected, rtol=0, atol=1e-12)


def test_in_short_steps_its_noise_is_that_of_the_sde_with_the_square_of_eta() -> None:
    """So with any order it is a solver of that SDE, whose distribution is the same for every eta."""
    for eta in (0.3, 0.8, 1.0):
        errors = [abs(AncestralPrediction(eta).damping(h) / DataPrediction(eta**2).damping(h) - 1)
                  for h in (0.02, 0.01)]
        assert errors[0] < 0.02 and (eta == 1.0 or errors[0] / errors[1] == pytest.approx(2.0, abs=0.05))


def test_more_than_all_noise_is_refused_as_ddim_s() -> None:
    with pytest.raises(ValueError, match="eta = 1.5 is out of range.*all of which is 1.*or law sde"):
        FAMILIES["sde"].solver(law="ddim", eta=1.5)
    assert FAMILIES["sde"].solver(law="sde", eta=1.5)


def variances(integrand, path: str, spread: float = SPREAD, sigmas=None) -> list[tuple[float, float]]:
    """Of a run on N(0, spread^2), at every level after the first: what it leaves, and what is right.

    Without any draw: D is linear, and so is every update.
    """
    schedule = levels(sigmas or SIGMAS[path], PATHS[path])
    right = [level.alpha**2 * spread**2 + level.sigma**2 for level in schedule]
    found, variance = [], right[0]
    for step, exact in zip(Multistep(integrand, 1).steps(schedule, PATHS[path]), right[1:]):
        [update], s = step.updates, step.s
        gain = s.alpha * spread**2 / (s.alpha**2 * spread**2 + s.sigma**2)
        through = update.decay + sum(c for _, c in update.terms) * gain
        variance = through**2 * variance + sum(std**2 for _, std in update.noise)
        found.append((variance, exact))
    return found


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_on_normal_data_analytic_dpm_has_the_exact_variance_after_steps_of_any_size(path: str,
                                                                                    eta: float) -> None:
    lam = np.array([PATHS[path].level(sigma).lam for sigma in SIGMAS[path]])
    ratio = np.exp(-2 * lam)
    exact = Statistics(lam, ratio / (SPREAD**2 + ratio), 0 * lam, 0 * lam)
    for variance, right in variances(AnalyticPrediction(eta, 1.0, exact), path):
        assert variance == pytest.approx(right, rel=1e-12)
    plain = [variance / right for variance, right in variances(AncestralPrediction(eta), path)]
    assert min(plain) < 0.9  # what DDPM and DDIM lack


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_gamma_one_analytic_dpm_is_ddim(eta: float) -> None:
    ends = [*SIGMAS["flow"], 0.0]
    ours = run("analytic_dpm", "flow", ends, eta=eta, statistics=Statistics.constant())
    assert torch.equal(ours, run("ddim", "flow", ends, eta=eta))


def test_a_measurement_of_two_trajectories_is_enough() -> None:
    """For images of few steps that are spread as the data."""
    x = starting_noise((4, 100, 100), 14.6, "ve")
    found = estimate_statistics(Gaussian("ve"), x[:2, :32, :32], [14.6, 0.03])
    sigmas = torch.tensor([14.6, 2.0, 0.5, 0.1], dtype=torch.float64)
    spreads = {name: float(k_diffusion_sampler(name, **options)(
        Gaussian("ve"), x, sigmas, extra_args={"seed": 1}, disable=True).std()) for name, options in (
            ("analytic_dpm", {"statistics": found}), ("ddpm", {}))}
    right = math.hypot(SPREAD, 0.1)
    assert spreads["analytic_dpm"] == pytest.approx(right, rel=0.01) and spreads["ddpm"] < 0.7 * right


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_the_mean_square_of_eps_is_one_less_the_mean_slope_of_an_exact_denoiser(sigma: float) -> None:
    """Gamma = l, on draws of a mixture of points at -1 and 1."""
    generator = torch.Generator().manual_seed(2)
    x0, eps = (torch.randn(100_000, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x0.sign() + sigma * eps
    denoised = torch.tanh(x / sigma**2)
    gamma, slope = ((x - denoised) / sigma).square().mean(), (1 - denoised**2).mean() / sigma**2
    assert float(gamma) == pytest.approx(1.0 - float(slope), abs=0.01)


@pytest.mark.parametrize(("gamma", "half_range", "right"), [
    (1.3, np.inf, 0.0), (-0.2, np.inf, 2.0), (0.0, 1.0, 1.0), (0.75, np.inf, 1.0), (0.75, 0.5, 0.5)])
def test_the_variance_is_kept_within_the_published_bounds(gamma: float, half_range: float,
                                                          right: float) -> None:
    """Bao et al. 2022 (arXiv:2201.06503), Theorem 2: of the data's own range too."""
    measured = Statistics.constant(l=gamma)
    integrand = AnalyticPrediction(1.0, 1.0, measured, half_range)
    assert integrand.spread(PATHS["ve"].level(2.0)) == pytest.approx(right, abs=1e-12)


def test_from_pure_noise_the_variance_is_that_of_the_lowest_level_that_was_measured() -> None:
    integrand = AnalyticPrediction(1.0, 1.0, gaussian_statistics())
    assert integrand.spread(PATHS["flow"].level(1.0)) == pytest.approx(SPREAD, rel=1e-3)
    found = variances(integrand, "flow", sigmas=[1.0, 0.8, 0.3])
    assert all(variance == pytest.approx(right, rel=1e-3) for variance, right in found)


def test_levels_that_were_not_measured_are_refused() -> None:
    narrow = Statistics.constant(lam=(-1.0, 5.0))
    with pytest.raises(ValueError, match="statistics cover lambda from -1.000 to 5.000.*goes to"):
        run("analytic_dpm", "ve", [14.6, 1.0], statistics=narrow)
