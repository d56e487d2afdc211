"""The first evaluation answered without the model: analytically, or by the mean of earlier answers."""
from __future__ import annotations

import pytest
import torch

from problems import FIXED, Counted, Gaussian, needed
from samplers import PATHS, SAMPLERS, k_diffusion_sampler, nfe
from samplers.denoisers import MeanAnswer, afs

FULL = {"ve": [14.6, 4.0, 1.0, 0.2, 0.0], "flow": [1.0, 0.7, 0.4, 0.1, 0.0], "vp": [1.0, 0.8, 0.4, 0.1, 0.0]}


def run(name: str, path: str, model, x, sigmas=None, **options):
    fn = k_diffusion_sampler(name, path, sigma_max=FULL[path][0], **{**needed(name), **options})
    return fn(model, x, torch.tensor(sigmas or FULL[path], dtype=torch.float64), extra_args={"seed": 3},
              disable=True)


def noise(path: str, seed: int = 0, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64) * FULL[path][0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_afs_is_nearly_right_for_normal_data_and_costs_one_evaluation_less(name: str, path: str) -> None:
    problem = Counted(Gaussian(path, mean=0.0, spread=1.0))
    expected = run(name, path, problem, noise(path))
    calls, problem.calls = problem.calls, 0
    result = run(name, path, problem, noise(path), first_step="afs")
    if name in FIXED:
        # exact where all is noise
        torch.testing.assert_close(result, expected, rtol=0, atol=0.5 if path == "ve" else 1e-9)
    assert problem.calls == calls - 1 or name not in FIXED
    if name in FIXED:
        assert problem.calls == nfe(name, FULL[path], path, first_step="afs", **needed(name))


def test_afs_takes_x_for_noise_scaled_to_unit_variance() -> None:
    x = noise("ve")
    for path in PATHS:
        for lam in (-3.0, 0.0, 2.0):
            level = PATHS[path].at(lam)
            eps = x / (level.alpha**2 * 0.25 + level.sigma**2) ** 0.5
            torch.testing.assert_close(
                afs(level, 0.5)(x, level.sigma), (x - level.sigma * eps) / level.alpha, rtol=0, atol=1e-9)
    assert not afs(PATHS["flow"].level(1.0))(x, 1.0).any()


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_2s", "dpmpp_2m_sde", "amed", "dpm_adaptive_23"])
def test_the_mean_is_learned_by_the_first_run_and_used_by_the_next(name: str, path: str) -> None:
    problem, mean = Counted(Gaussian(path)), MeanAnswer()
    plain = run(name, path, Gaussian(path), noise(path))
    torch.testing.assert_close(run(name, path, problem, noise(path), first_step="mean", mean=mean), plain)
    assert mean.count == 2
    calls, problem.calls = problem.calls, 0
    run(name, path, problem, noise(path, 1, 5), first_step="mean", mean=mean)  # another batch size
    assert mean.count == 2 and (problem.calls == calls - 1 or name not in FIXED)
    answers = Gaussian(path)(noise(path), torch.full((2,), FULL[path][0], dtype=torch.float64))
    torch.testing.assert_close(
        mean(noise(path)).double(),
        answers.mean(0).expand(2, -1, -1, -1), rtol=0, atol=1e-6)


def test_a_mean_that_learns_more_is_the_mean_of_all() -> None:
    mean, batches = MeanAnswer(), [torch.randn(n, 3, 4) for n in (1, 3, 2)]
    for batch in batches:
        mean.learn(batch)
    torch.testing.assert_close(mean.mean, torch.cat(batches).mean(0))


def test_a_mean_of_another_shape_is_refused_though_it_might_broadcast() -> None:
    mean = MeanAnswer()
    run("dpmpp_2m", "ve", Gaussian("ve"), noise("ve")[:, :1], first_step="mean", mean=mean)
    for x in (noise("ve"), noise("ve")[:, :1, :2], noise("ve")[:, 0], noise("ve")[:, None, :1]):
        with pytest.raises(ValueError,
                           match=r"learned images of shape \[1, 4, 4\], and x has \[.*\]: give every"):
            run("dpmpp_2m", "ve", Gaussian("ve"), x, first_step="mean", mean=mean)
        with pytest.raises(ValueError, match="has learned images of shape"):
            mean.learn(x)
    run("dpmpp_2m", "ve", Gaussian("ve"), noise("ve", 1, 5)[:, :1], first_step="mean", mean=mean)
    assert mean.count == 2


@pytest.mark.parametrize("first_step", ["afs", "mean"])
def test_a_run_that_does_not_start_at_full_noise_is_refused(first_step: str) -> None:
    with pytest.raises(
            ValueError,
            match=r"starts at sigma = 4, where x holds an image, and not at the model's highest, 14.6"):
        run("dpmpp_2m", "ve", Gaussian("ve"), noise("ve"), FULL["ve"][1:], first_step=first_step,
            mean=MeanAnswer())


def test_what_is_missing_or_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="first_step = 'mean' needs mean"):
        k_diffusion_sampler("dpmpp_2m", first_step="mean")
    with pytest.raises(ValueError,
                       match="first_step = 'skip' is out of range: choose one of evaluate, afs, mean"):
        k_diffusion_sampler("dpmpp_2m", first_step="skip")
