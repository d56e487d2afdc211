"""The noise of stochastic solvers: the same image alone, in any batch, on any schedule; and the right
distribution."""
from __future__ import annotations

import math

import pytest
import torch

from problems import Gaussian, needed, reference_mixture, sigmas_between, smooth_statistics
from samplers import FAMILIES, PATHS, SAMPLERS, k_diffusion_sampler
from samplers.integrand import DataPrediction
from samplers.noise import BrownianNoise
from samplers.sample import sample, sample_adaptive
from samplers.solver import (
    DPM_2S, DPM_2S_TAYLOR, DPM_3S_TAYLOR, HEUN, Adaptive, Churned, Multistep, Singlestep)
from samplers.learning.statistics import EmpiricalPrediction

STOCHASTIC = [name for name, sampler in SAMPLERS.items() if "eta" in sampler.options
              and sampler.options["eta"].default]
EVERY_STOCHASTIC = pytest.mark.parametrize("name", STOCHASTIC)

SDE = DataPrediction(1.0)
PLANNED = {  # solvers of the SDE, and the weak order of each
    "order 1": (Multistep(SDE, 1), 1),
    "order 2": (Multistep(SDE, 2), 2),
    "order 1 with corrector": (Multistep(SDE, 1, corrector="full"), 2),
    "order 2 with corrector": (Multistep(SDE, 2, corrector="full"), 2),
    "2M with corrector": (FAMILIES["sde"].solver(order=2, eta=1.0, corrector="full"), 2),
    "2S midpoint": (Singlestep(SDE, DPM_2S), 2),
    "2S": (Singlestep(SDE, DPM_2S_TAYLOR), 2),
    "3S": (Singlestep(SDE, DPM_3S_TAYLOR), 2),
    "Heun": (Singlestep(SDE, HEUN), 2),
}
EVERY_PLANNED = pytest.mark.parametrize("solver", [solver for solver, _ in PLANNED.values()], ids=PLANNED)


def run(name: str, x, sigmas, seed: int | list[int] | None, path: str = "ve", **options):
    return k_diffusion_sampler(name, path, **needed(name), **options)(
        Gaussian(path), x, sigmas, disable=True, extra_args={} if seed is None else {"seed": seed})


@EVERY_STOCHASTIC
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_image_k_is_the_same_alone_and_in_any_batch(name: str, path: str) -> None:
    sigmas = torch.tensor([14.6, 5.0, 1.0, 0.3, 0.0] if path == "ve" else [1.0, 0.9, 0.6, 0.2, 0.0])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * float(sigmas[0])
    batch = run(name, x, sigmas, seed=11, path=path)
    for k in range(4):
        torch.testing.assert_close(run(name, x[k:k + 1], sigmas, seed=11 + k, path=path), batch[k:k + 1],
                                   rtol=0, atol=1e-6)


def test_every_image_may_have_a_seed_of_its_own() -> None:
    x, sigmas = torch.ones(3, 3, 8, 8) * 5, torch.tensor([5.0, 1.0, 0.3, 0.0])
    batch = run("dpmpp_2m_sde", x, sigmas, [21, 4, 21])
    torch.testing.assert_close(batch[1:2], run("dpmpp_2m_sde", x[:1], sigmas, 4), rtol=0, atol=1e-6)
    assert torch.equal(batch[0], batch[2])
    with pytest.raises(ValueError, match="2 seeds are given for 3 images"):
        run("dpmpp_2m_sde", x, sigmas, [21, 4])


@EVERY_STOCHASTIC
def test_the_seed_decides(name: str) -> None:
    x, sigmas = torch.ones(1, 3, 8, 8) * 5, torch.tensor([5.0, 1.0, 0.3, 0.0])
    assert torch.equal(run(name, x, sigmas, 1), run(name, x, sigmas, 1))
    assert not torch.equal(run(name, x, sigmas, 1), run(name, x, sigmas, 2))
    assert run(name, x, sigmas, 2**64 - 1).isfinite().all()
    torch.manual_seed(4)
    first = run(name, x, sigmas, None)
    assert not torch.equal(first, run(name, x, sigmas, None))
    torch.manual_seed(4)
    assert torch.equal(first, run(name, x, sigmas, None))


def test_increments_have_unit_variance_and_those_of_disjoint_intervals_are_independent() -> None:
    noise = BrownianNoise(torch.zeros(1, 200_000), seed=0)
    level = PATHS["ve"].level
    parts = [noise(level(a), level(b)) for a, b in ((80.0, 10.0), (10.0, 9.5), (9.5, 0.4), (0.4, 0.002))]
    for i, a in enumerate(parts):
        assert abs(float(a.std()) - 1) < 0.01 and abs(float(a.mean())) < 0.01
        assert all(abs(float((a * b).mean())) < 0.01 for b in parts[:i])


def test_a_finer_schedule_adds_up_to_the_coarser_one() -> None:
    noise, at = BrownianNoise(torch.zeros(1, 1000), seed=3), PATHS["flow"].at
    whole = noise(at(-2.0), at(1.0)) * 3**0.5
    parts = noise(at(-2.0), at(-1.25)) * 0.75**0.5 + noise(at(-1.25), at(1.0)) * 2.25**0.5
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    fresh = BrownianNoise(torch.zeros(1, 1000), seed=3)  # the order of questions does not matter
    torch.testing.assert_close(fresh(at(-1.25), at(1.0)), noise(at(-1.25), at(1.0)), rtol=0, atol=1e-6)


def test_a_step_too_short_for_the_noise_is_refused() -> None:
    noise, at = BrownianNoise(torch.zeros(1, 10), seed=3), PATHS["ve"].at
    with pytest.raises(ValueError, match="too short for its noise.*fewer steps"):
        noise(at(0.0), at(0.0001))


@EVERY_STOCHASTIC
def test_a_finer_schedule_refines_the_same_image(name: str) -> None:
    """Strong convergence: the distance to a far finer run of the same seed falls with the step."""
    x = torch.randn(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9
    runs = {n: run(name, x, sigmas_between(-2.2, 3.0, n, "ve"), seed=5) for n in (20, 40, 80, 640)}
    errors = [float((runs[n] - runs[640]).square().mean().sqrt()) for n in (20, 40, 80)]
    assert errors[1] < 0.75 * errors[0] and errors[2] < 0.75 * errors[1]
    assert errors[2] < 0.2 * float(runs[640].std())


@EVERY_STOCHASTIC
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_the_result_is_distributed_as_the_data(name: str, eta: float, path: str) -> None:
    """Weak convergence on N(0.7, 0.4^2), many elements of one item standing for many samples."""
    start = PATHS[path].at(-2.2)
    x = start.alpha * 0.7 + (start.alpha**2 * 0.16 + start.sigma**2) ** 0.5 * torch.randn(
        1, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = run(name, x, sigmas_between(-2.2, 4.0, 120, path), seed=9, path=path,
                 eta=eta) / PATHS[path].at(4.0).alpha
    assert abs(float(result.mean()) - 0.7) < 0.02
    assert abs(float(result.std()) - 0.4) < (0.03 if name in ("dpmpp_sde", "ddpm") else 0.015)


def test_ve_and_flow_share_the_noise_of_a_seed() -> None:
    ve, flow = (BrownianNoise(torch.zeros(1, 50), seed=3) for _ in range(2))
    a = ve(PATHS["ve"].at(-1.0), PATHS["ve"].at(0.5))
    torch.testing.assert_close(a, flow(PATHS["flow"].at(-1.0), PATHS["flow"].at(0.5)), rtol=0, atol=1e-5)


def test_a_negative_or_missing_item_never_shares_noise() -> None:
    noise = BrownianNoise(torch.zeros(3, 1000), seed=7)
    xi = noise(PATHS["ve"].at(-1.0), PATHS["ve"].at(0.5))
    assert max(abs(float((xi[0] * xi[k]).mean())) for k in (1, 2)) < 0.15


def drawn(count: int, std: float):
    return std * torch.randn(1, count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def planned(solver, path: str, n: int, x, noise, model=None, start: float = -2.2, end: float = 4.0):
    """A solver that is not in the catalogue, over n intervals of equal length in lam."""
    model = model or Gaussian(path)
    steps = solver.steps([PATHS[path].at(start + (end - start) * i / n) for i in range(n + 1)], PATHS[path])
    return sample(lambda x, sigma: model(x, x.new_full((len(x),), sigma)), x, steps, noise=noise)


def moment_errors(solver, path: str, n: int) -> tuple[float, float]:
    """Of the mean and the spread of N(0, 0.4^2) by the SDE, without any draw: x holds its coefficients over
    the start and all increments. The mean of x given x_s is x_s alpha_s v_t / (alpha_t v_s), with v = alpha^2
    0.4^2 + sigma^2."""
    start, end = PATHS[path].at(-2.2), PATHS[path].at(4.0)
    sources: dict = {}

    def noise(s, t):
        unit = torch.zeros(1, 3 * n + 2, dtype=torch.float64)
        unit[0, sources.setdefault((s, t), 1 + len(sources))] = 1.0
        return unit

    x = torch.zeros(1, 3 * n + 2, dtype=torch.float64)
    before, after = (level.alpha**2 * 0.16 + level.sigma**2 for level in (start, end))
    x[0, 0] = before**0.5
    result = planned(solver, path, n, x, noise, Gaussian(path, mean=0.0))
    kept = start.alpha * after / (end.alpha * before)
    return (abs(float(result[0, 0] / x[0, 0]) / kept - 1.0), abs(float(result.norm()) / after**0.5 - 1.0))


def std_error(solver, path: str, n: int) -> float:
    return moment_errors(solver, path, n)[1]


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize(("solver", "order"), PLANNED.values(), ids=PLANNED)
def test_the_variance_is_right_at_the_solver_s_weak_order(solver, order: int, path: str) -> None:
    """Exactly, for a linear model: every stage's noise is of one path, and a corrector keeps it."""
    errors = [std_error(solver, path, n) for n in (48, 96)]
    assert errors[0] < (0.07 if order == 1 else 0.015)
    assert errors[0] / errors[1] > 2**order * (0.9 if order == 1 else 0.88)


@pytest.mark.parametrize("rule", ["midpoint", "taylor"])
@pytest.mark.parametrize("c2", [0.25, 0.5, 1.0])
def test_the_singlestep_sde_has_the_right_mean_and_variance_to_order_two_with_any_c2(rule: str,
                                                                                     c2: float) -> None:
    """The mean exactly: of normal data the denoised image is a martingale of the SDE, and every stage keeps
    it. Short steps, as with midpoint and c2 = 0.25 two parts of the variance's error nearly cancel in long
    ones."""
    solver = FAMILIES["singlestep"].solver(order=2, rule=rule, c2=c2, eta=1.0)
    (mean, long), (same, short) = (moment_errors(solver, "ve", n) for n in (192, 384))
    assert max(mean, same) < 1e-12
    assert long < 1e-3 and long / short > 2**2 * 0.94


def test_noise_of_noise_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="eta = 1 adds noise, and prediction = 'noise' has none: set"):
        FAMILIES["singlestep"].solver(prediction="noise", eta=1.0)


@EVERY_PLANNED
def test_drawn_noise_has_that_variance(solver) -> None:
    x = drawn(40_000, (0.16 + math.exp(4.4)) ** 0.5)
    result = planned(solver, "ve", 24, x, BrownianNoise(x, 9), Gaussian("ve", mean=0.0))
    exact = (0.16 + math.exp(-8.0)) ** 0.5
    assert abs(float(result.std()) / exact - 1.0) == pytest.approx(std_error(solver, "ve", 24), abs=0.015)


@EVERY_PLANNED
def test_the_noise_of_every_stage_is_that_of_the_image_s_own_seed(solver) -> None:
    x = 9.0 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = planned(solver, "ve", 6, x, BrownianNoise(x, 11))
    for k in range(3):
        alone = planned(solver, "ve", 6, x[k:k + 1], BrownianNoise(x[k:k + 1], 11 + k))
        torch.testing.assert_close(alone, batch[k:k + 1], rtol=0, atol=1e-6)


@EVERY_PLANNED
def test_every_stage_refines_the_same_image(solver) -> None:
    """Strong convergence to a far finer run of another solver on the same path."""
    x = drawn(300, 9.0)
    fine = planned(Multistep(SDE, 2), "ve", 640, x, BrownianNoise(x, 5), end=3.0)
    runs = [planned(solver, "ve", n, x, BrownianNoise(x, 5), end=3.0) for n in (20, 40, 80)]
    errors = [float((result - fine).square().mean().sqrt()) for result in runs]
    assert errors[1] < 0.75 * errors[0] and errors[2] < 0.75 * errors[1]
    assert errors[2] < 0.2 * float(fine.std())


def test_a_corrector_keeps_the_noise_though_a_second_draw_would_be_another() -> None:
    x, spans, generator = drawn(20_000, 9.0), [], torch.Generator().manual_seed(0)

    def noise(s, t):
        spans.append((s, t))
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    for solver in (Multistep(SDE, 2, corrector="full"), Singlestep(SDE, DPM_2S_TAYLOR)):
        spans.clear()
        result = planned(solver, "ve", 48, x, noise)
        assert len(spans) == len(set(spans)) and abs(float(result.std()) - 0.4) < 0.015


def test_planned_noise_is_never_left_out() -> None:
    x = torch.ones(1, 3)
    levels = [PATHS["ve"].level(sigma) for sigma in (3.0, 1.0, 0.3)]
    for solver in (Multistep(SDE, 1), Singlestep(SDE, DPM_2S)):
        with pytest.raises(ValueError, match="from sigma = 3 to .* adds noise, and none is given: give"):
            sample(lambda x, sigma: x * 0, x, solver.steps(levels, PATHS["ve"]))
    with pytest.raises(ValueError, match="adds noise, and none is given"):
        adaptive = Adaptive(SDE, DPM_2S, 0.05, 0.0078, 0.05, 0.9)
        sample_adaptive(lambda x, sigma: x * 0, x, levels, adaptive, PATHS["ve"])


def test_churn_raises_a_step_with_all_that_is_in_it() -> None:
    """Bias and noise too: a run of v3 or of the SDE is the same on every path after division by alpha."""
    for integrand in (EmpiricalPrediction(smooth_statistics()), SDE):
        results = []
        for path in PATHS:
            start, end = PATHS[path].at(-2.5), PATHS[path].at(3.0)
            x = reference_mixture("ve")[1] * 12.0 * start.alpha
            churned, noise = Churned(Singlestep(integrand, DPM_2S_TAYLOR), 8.0, 0.0, 1e6,
                                     1.0), BrownianNoise(x, 3)
            results.append(
                planned(churned, path, 8, x, noise,
                        reference_mixture(path)[0], -2.5, 3.0) / end.alpha)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_churn_is_at_the_levels_of_its_window_both_ends_included(path: str) -> None:
    levels = [PATHS[path].at(-math.log(ratio)) for ratio in (9.0, 5.0, 2.0, 1.0, 0.5, 0.1)]
    low, high = (level.sigma / level.alpha for level in (levels[3], levels[1]))
    steps = Churned(Singlestep(SDE, DPM_2S_TAYLOR), 8.0, low, high, 1.0).steps(levels, PATHS[path])
    raised = [step.t.lam < level.lam for step, level in zip(steps, levels[1:])]
    assert raised == [True, True, True, False, False]


def test_a_churned_run_that_stops_early_is_at_the_schedule_s_last_level() -> None:
    x, sigmas = drawn(20_000, (0.16 + 81.0) ** 0.5), sigmas_between(-math.log(9.0), 0.0, 20, "ve")
    result = k_diffusion_sampler("heun", s_churn=40.0)(Gaussian(mean=0.0), x, sigmas, {"seed": 1},
                                                       disable=True)
    assert float(result.std()) == pytest.approx((0.16 + 1.0) ** 0.5, abs=0.02)
