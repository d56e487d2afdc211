"""What an inpainting keeps: where the model's answer is known, so is the result."""
from __future__ import annotations

import functools

import pytest
import torch

from problems import Gaussian, needed
from samplers import PATHS, SAMPLERS, Statistics, estimate_statistics, k_diffusion_sampler, refit_multistep
from test_calibrate import mixture, noise

SCHEDULES = {
    "ve": [[14.6, 5.0, 1.5, 0.4, 0.0], [14.6, 6.0, 3.0, 1.6, 0.9, 0.4, 0.1, 0.0], [2.2, 1.0, 0.5, 0.2, 0.0]],
    "flow": [[1.0, 0.9, 0.6, 0.2, 0.0], [0.8, 0.7, 0.5, 0.2, 0.0]]
}
ENDS = {"ve": [14.6, 0.03], "flow": [1.0, 0.97, 0.03]}
KEPT = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
KEPT[..., :2] = True


@functools.cache
def measured(path: str, refitted: bool = False) -> Statistics:
    if refitted:
        start = 1.0 if path == "flow" else None
        return refit_multistep(mixture(path=path), noise(6, ENDS[path][0], seed=3), measured(path), 4,
                               path=path, start=start)
    return estimate_statistics(mixture(path=path), noise(6, ENDS[path][0]), ENDS[path], path=path,
                               fitted=True)


def inpainting(path: str, latent: torch.Tensor, eps: torch.Tensor):
    """As ComfyUI's KSamplerX0Inpaint: the model sees the latent, noised anew, where it is kept, and
    answers the latent there."""
    model = mixture(path=path)

    def denoise(x, sigma, **extra):
        level = PATHS[path].level(float(sigma[0]))
        return torch.where(KEPT, latent,
                           model(torch.where(KEPT, level.alpha * latent + level.sigma * eps, x), sigma))

    return denoise


@pytest.mark.parametrize("refitted", [False, True])
@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_solver_returns_exactly_what_is_kept(name: str, path: str, refitted: bool) -> None:
    if refitted and name != "fitted_chosen":
        return
    options = {
        **needed(name),
        **({"statistics": measured(path, refitted)} if "statistics" in SAMPLERS[name].options else {})
    }
    generator = torch.Generator().manual_seed(3)
    latent, eps = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigmas in SCHEDULES[path]:
        start = PATHS[path].level(sigmas[0])
        result = k_diffusion_sampler(name, path, **options)(inpainting(path, latent, eps),
                                                            start.alpha * latent + start.sigma * eps,
                                                            torch.tensor(sigmas, dtype=torch.float64),
                                                            extra_args={"seed": 5}, disable=True)
        torch.testing.assert_close(result[..., :2], latent[..., :2], rtol=0, atol=1e-9)
        assert not torch.allclose(result[..., 2:], latent[..., 2:], atol=0.1)


@pytest.mark.parametrize("name", ["fitted", "fitted_chosen"])
def test_a_constant_answer_is_the_result_whatever_x_was(name: str) -> None:
    """Fitted to trajectories on which y would tell something of what the last image lacks."""
    model = Gaussian(spread=torch.linspace(0.01, 0.6, 48, dtype=torch.float64).reshape(3, 4, 4))
    found = estimate_statistics(model, noise(4), [14.6, 0.03], fitted=True)
    for n in (1, 2, 3, 5, 8):
        sigmas = torch.tensor([14.6 * 0.6**i for i in range(n)] + [0.0], dtype=torch.float64)
        x = noise(2, seed=n) * 100
        result = k_diffusion_sampler(name, statistics=found)(lambda x, sigma: torch.full_like(x, 0.25), x,
                                                             sigmas, disable=True)
        torch.testing.assert_close(result, torch.full_like(x, 0.25), rtol=0, atol=1e-10)
