"""The first evaluation answered without the model, analytically."""
from __future__ import annotations

import pytest
import torch

from problems import FIXED, Counted, Gaussian, needed
from samplers import PATHS, SAMPLERS, k_diffusion_sampler, nfe
from samplers.denoisers import afs

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


def test_a_run_that_does_not_start_at_full_noise_is_refused() -> None:
    with pytest.raises(
            ValueError,
            match=r"starts at sigma = 4, where x holds an image, and not at the model's highest, 14.6"):
        run("dpmpp_2m", "ve", Gaussian("ve"), noise("ve"), FULL["ve"][1:], first_step="afs")


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="first_step = 'mean' is out of range: choose one of evaluate, afs$"):
        k_diffusion_sampler("dpmpp_2m", first_step="mean")
