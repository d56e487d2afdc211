"""Predictor and corrector of Score SDE: the published algorithms, and the variance that they leave."""
from __future__ import annotations

import math

import pytest
import torch

from problems import Counted, Gaussian, reference_mixture, sigmas_between, starting_noise
from samplers import FAMILIES, PATHS, k_diffusion_sampler, nfe
from samplers.noise import BrownianNoise
from samplers.sample import advance
from samplers.schedule import levels
from samplers.score_sde import PREDICTORS, SDES, PredictorCorrector
from samplers.solver import ticks
from test_noise import std_error

EVERY_PREDICTOR = pytest.mark.parametrize("predictor", PREDICTORS)
EVERY_SDE = pytest.mark.parametrize("sde", SDES)
R = 0.16


def run(x, sigmas, path: str = "ve", seed=5, model=None, **options):
    fn = k_diffusion_sampler("pc", path, **options)
    return fn(model or reference_mixture(path)[0], x, torch.as_tensor(sigmas, dtype=torch.float64),
              extra_args={"seed": seed}, disable=True)


def score(path: str, x, level):
    """(alpha D - x) / sigma^2."""
    denoised = reference_mixture(path)[0](x, torch.full((len(x),), level.sigma, dtype=torch.float64))
    return (level.alpha * denoised - x) / level.sigma**2


def norm(v, pooled: bool):
    norms = v.flatten(1).norm(dim=1)
    return (norms.mean().expand(len(v)) if pooled else norms).view(-1, *[1] * (v.ndim - 1))


def published(x, sigmas, path: str, m: int, pooled: bool):
    """Algorithms 2 and 4 (VE), 3 and 5 (VP), as they are printed: reverse diffusion, with z of our clock."""
    noise, at = BrownianNoise(x, 5), levels(sigmas, PATHS[path])
    clock = iter(ticks((len(at) - 1) * (m + 1)))
    for s, t in zip(at, at[1:]):
        beta = 0.0 if path == "ve" else 1.0 - (s.alpha / t.alpha) ** 2
        for _ in range(m):
            g, z = score(path, x, s), noise(*next(clock))
            e = 2.0 * (1.0 - beta) * (R * norm(z, pooled) / norm(g, pooled)) ** 2
            x = x + e * g + (2.0 * e).sqrt() * z
        g, z = score(path, x, s), noise(*(next(clock) if m else (s, t)))
        if path == "ve":
            x = x + (s.sigma**2 - t.sigma**2) * g + math.sqrt(s.sigma**2 - t.sigma**2) * z
        else:
            x = (2.0 - math.sqrt(1.0 - beta)) * x + beta * g + math.sqrt(beta) * z
    return x


@pytest.mark.parametrize("norms", ["image", "batch"])
@pytest.mark.parametrize("m", [0, 1, 3])
@pytest.mark.parametrize("path", ["ve", "vp"])
def test_it_is_the_published_algorithm(path: str, m: int, norms: str) -> None:
    sigmas = [14.6, 9.0, 4.0, 1.5, 0.6, 0.2] if path == "ve" else [0.999, 0.98, 0.9, 0.6, 0.3, 0.1]
    x = reference_mixture(path)[1] * sigmas[0]
    ours = run(x, sigmas, path, sde=path, corrector_steps=m, norms=norms)
    torch.testing.assert_close(ours, published(x, sigmas, path, m, norms == "batch"), rtol=0, atol=1e-10)


def test_ancestral_steps_are_ddpm_s_of_ve_and_song_s_of_vp() -> None:
    x, sigmas = 9.0 * reference_mixture("ve")[1], [9.0, 4.0, 1.5, 0.6, 0.2]
    ddpm = k_diffusion_sampler("ddpm")(reference_mixture("ve")[0], x, sigmas,
                                       extra_args={"seed": 5}, disable=True)
    torch.testing.assert_close(run(x, sigmas, predictor="ancestral", corrector_steps=0), ddpm, rtol=0,
                               atol=1e-11)
    s, t = levels([0.9, 0.6], PATHS["vp"])
    x, beta = reference_mixture("vp")[1], 1.0 - (s.alpha / t.alpha) ** 2
    expected = (x + beta * score("vp", x, s)) / math.sqrt(1.0 - beta) + math.sqrt(beta) * BrownianNoise(
        x, 5)(s, t)
    torch.testing.assert_close(
        run(x, [s.sigma, t.sigma], "vp", predictor="ancestral", sde="vp", corrector_steps=0), expected,
        rtol=0, atol=1e-11)


@EVERY_SDE
@EVERY_PREDICTOR
@pytest.mark.parametrize("m", [0, 2])
def test_ve_vp_and_flow_models_are_one_run_after_division_by_alpha(predictor: str, sde: str, m: int) -> None:
    lams, results = [-2.5, -1.6, -0.9, 0.1, 0.8, 1.5], []
    for path in PATHS:
        there = [PATHS[path].at(lam) for lam in lams]
        x = reference_mixture(path)[1] * 12.0 * there[0].alpha
        results.append(run(x, [level.sigma for level in there], path, predictor=predictor, sde=sde,
                           corrector_steps=m) / there[-1].alpha)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


@EVERY_SDE
@EVERY_PREDICTOR
def test_the_variance_of_a_predictor_is_right_at_weak_order_one(predictor: str, sde: str) -> None:
    """Of normal data, without any draw; sub-VP's a and Sigma = 1 - a^2 are those of its own SDE."""
    errors = [std_error(PredictorCorrector(predictor, sde, 0, 0.0), "ve", n) for n in (48, 96)]
    assert errors[0] < 0.07 and errors[0] / errors[1] > 1.9
    for varsigma in (0.01, 1.0, 50.0):
        a = SDES["sub-vp"].scale(varsigma)
        assert a * varsigma == pytest.approx(1.0 - a**2, rel=1e-9)


@EVERY_SDE
def test_the_rate_of_an_sde_is_the_slope_of_its_scale(sde: str) -> None:
    scale, rate = SDES[sde]
    for lam in (-3.0, 0.0, 2.0):
        slope = (math.log(scale(math.exp(-lam - 1e-5))) - math.log(scale(math.exp(-lam + 1e-5)))) / 2e-5
        assert rate(math.exp(-lam)) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("r", [0.2, 0.4])
def test_langevin_steps_lead_to_the_right_variance_but_for_a_share_of_r_squared(r: float) -> None:
    """From wherever: x <- (1 - e / v) x + sqrt(2 e) xi with e = 2 r^2 v^2 / V has V = v (1 + r^2) for
    ever."""
    pair = levels([1.0, 0.9], PATHS["ve"])
    [step] = PredictorCorrector("ancestral", "ve", 10, r).steps(pair, PATHS["ve"])
    langevin = step._replace(evaluations=step.evaluations[:-1], updates=step.updates[:-1])
    for start in (0.5, 2.0):
        x = start * starting_noise((1, 20_000), 1.0, "ve")
        for seed in range(2 + round(1.0 / r**2 / 4)):
            x = advance(lambda x, sigma: Gaussian(mean=0.0)(x, x.new_full((1,), sigma)), x, langevin, {},
                        set(), BrownianNoise(x, seed))
        assert float(x.var()) / 1.16 == pytest.approx(1.0 + r**2, rel=0.04)


@pytest.mark.parametrize("options", [{}, {"sde": "vp", "snr": 0.05},
                                     {"predictor": "ancestral", "sde": "sub-vp"}])
def test_the_result_is_distributed_as_the_data(options: dict) -> None:
    x = starting_noise((1, 20_000), float(sigmas_between(-2.2, 4.0, 1, "ve")[0]), "ve")
    result = run(x, sigmas_between(-2.2, 4.0, 100, "ve"), model=Gaussian(), **options)
    assert abs(float(result.mean()) - 0.7) < 0.02 and abs(float(result.std()) - 0.4) < 0.02


def test_a_corrector_mends_what_is_wrong_at_the_start() -> None:
    """Of too wide a start the predictor keeps more than the corrected run."""
    sigmas = sigmas_between(0.5, 3.0, 20, "ve")
    x = 3.0 * starting_noise((1, 20_000), float(sigmas[0]), "ve")
    spread = [float(run(x, sigmas, model=Gaussian(), corrector_steps=m).std()) for m in (0, 2)]
    assert spread[0] - 0.4 > 1.8 * (spread[1] - 0.4) > 0.0


def test_image_k_is_that_of_its_seed_alone_unless_norms_are_the_batch_s() -> None:
    x, sigmas = starting_noise((3, 2, 4, 4), 9.0, "ve", dtype=torch.float32), [9.0, 2.0, 0.5, 0.0]
    for norms, same in (("image", True), ("batch", False)):
        batch = run(x, sigmas, seed=11, model=Gaussian(), norms=norms, corrector_steps=2)
        for k in range(3):
            alone = run(x[k:k + 1], sigmas, seed=11 + k, model=Gaussian(), norms=norms, corrector_steps=2)
            assert torch.allclose(alone, batch[k:k + 1], rtol=0, atol=1e-5) == same
    assert not torch.equal(run(x, sigmas, seed=1, model=Gaussian()), run(x, sigmas, seed=2, model=Gaussian()))


@pytest.mark.parametrize("m", [0, 1, 3])
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_every_corrector_step_is_an_evaluation_and_the_callback_sees_intervals(m: int, path: str) -> None:
    sigmas = [14.6, 5.0, 1.0, 0.3, 0.0] if path == "ve" else [1.0, 0.9, 0.6, 0.2, 0.0]
    model, seen, x = Counted(Gaussian(path)), [], starting_noise((2, 3), sigmas[0], path)
    fn = k_diffusion_sampler("pc", path, corrector_steps=m)
    result = fn(model, x, sigmas, {"seed": 1}, lambda info: seen.append(info["i"]), disable=True)
    assert result.isfinite().all()
    assert seen == [0, 1, 2, 3]
    assert model.calls == nfe("pc", sigmas, path, corrector_steps=m) == (
        3 * (m + 1) + 1 if path == "ve" else 2 * (m + 1) + 2)


@pytest.mark.parametrize(("option", "value", "admissible"), [
    ("predictor", "heun", "one of reverse diffusion, ancestral, euler-maruyama"),
    ("sde", "edm", "one of ve, vp, sub-vp"), ("corrector_steps", 11, "a whole number from 0 to 10"),
    ("snr", -0.1, "a number from 0 to 1"), ("norms", "all", "one of image, batch")])
def test_what_is_out_of_range_is_named(option: str, value, admissible: str) -> None:
    with pytest.raises(ValueError, match=f"{option} = {value!r} is out of range: choose {admissible}"):
        FAMILIES["pc"].solver(**{option: value})
