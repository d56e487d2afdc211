"""How near the images of stochastic samplers are to the data, as distributions, against evaluations.

    python dev/benchmark.py stochastic

The data are a mixture of 20 Gaussians in 3 x 2 x 2, whose denoiser is exact. The distance of COUNT images to
as many draws of the data is the sliced Wasserstein distance (the root of the mean square, over the same
directions, of the distance between sorted projections). Draws of the data have it to other draws too: that is
the floor. All samplers start from the same draws of noise, on levels of Stable Diffusion's range.
"""
from __future__ import annotations

import math
from typing import Any, Callable

import comfy_host
import torch
from samplers import PATHS, SAMPLERS, Statistics, estimate_statistics, k_diffusion_sampler
from samplers.clocks import CLOCKS, evenly
from torch import Tensor

from .problems import Mixture

COUNT, DIRECTIONS, SHAPE = 10_000, 200, (3, 2, 2)
BUDGETS = (10, 20, 30)
HIGH, LOW = 14.6146, 0.0292
SCHEDULES = {"karras": ("sigma", 7.0), "exponential": ("lambda", 1.0)}
CORE = {"euler_ancestral": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 1, "er_sde": 1, "sa_solver": 1, "seeds_2": 2}
"""ComfyUI's, with their evaluations in a step of finite length."""
OURS = {  # label: name and options
    "lambda_2m_sde": ("dpmpp_2m_sde", {}),
    "lambda_3m_sde": ("dpmpp_3m_sde", {}),
    "2M SDE, eta 1, as published": ("dpmpp_2m_sde", {"eta": 1.0, "corrector": "off"}),
    "2M SDE, eta 1, full corrector": ("dpmpp_2m_sde", {"eta": 1.0, "corrector": "full"}),
    "2M SDE, no corrector": ("dpmpp_2m_sde", {"corrector": "off"}),
    "2M SDE, full corrector": ("dpmpp_2m_sde", {"corrector": "full"}),
    "3M SDE, eta 1, as published": ("dpmpp_3m_sde", {"eta": 1.0}),
    "2S SDE": ("dpmpp_2s_sde", {}),
    "ddpm": ("ddpm", {}),
    "ddim, eta 0.5": ("ddim", {"eta": 0.5}),
    "analytic_dpm": ("analytic_dpm", {}),
    "without noise: dpmpp_2m": ("dpmpp_2m", {}),
}


def mixture() -> Mixture:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(20, math.prod(SHAPE), generator=generator, dtype=torch.float64).clamp(-1.5, 1.5) / 1.5
    return Mixture(means, 0.05 + 0.15 * torch.rand(20, generator=generator, dtype=torch.float64))


def drawn(data: Mixture, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(data.means), (COUNT,), generator=generator)
    noise = torch.randn(COUNT, data.means.shape[1], generator=generator, dtype=torch.float64)
    return data.means[chosen] + data.stds[chosen, None] * noise


def distance(one: Tensor, other: Tensor) -> float:
    """Sliced Wasserstein."""
    directions = torch.randn(one.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(5),
                             dtype=torch.float64)
    directions /= directions.norm(dim=0)
    apart = (one @ directions).sort(0).values - (other @ directions).sort(0).values
    return float(apart.square().mean().sqrt())


def schedule(name: str, steps: int) -> Tensor:
    """Levels to 0 in so many steps."""
    path, (clock, rho) = PATHS["ve"], SCHEDULES[name]
    found = evenly(path.level(HIGH), path.level(LOW), steps, CLOCKS[clock](path, [LOW, HIGH]), rho)
    return torch.tensor([*(level.sigma for level in found), 0.0], dtype=torch.float64)


class Problem:
    """The mixture as a model, and the same starts and draws of the data for every sampler."""

    def __init__(self) -> None:
        self.data = data = mixture()

        def model(x: Tensor, sigma: Tensor, **extra) -> Tensor:
            """Of one image whose elements are COUNT draws, as a sampler's noise is made for each image
            anew."""
            return data(x.view(COUNT, *SHAPE), sigma.expand(COUNT)).view(x.shape)

        self.host = comfy_host.Model(model, comfy_host.sampling_of("ModelSamplingDiscrete", "EPS"))
        self.start = drawn(data, 3) + HIGH * torch.randn(COUNT, math.prod(SHAPE), dtype=torch.float64,
                                                         generator=torch.Generator().manual_seed(4))
        self.target = drawn(data, 1)

    def statistics(self) -> Statistics:
        return estimate_statistics(self.data, self.start[:64].view(64, *SHAPE), [HIGH, LOW])

    def ours(self, name: str, **options: Any) -> Callable[..., Tensor]:
        known = {"statistics": self.statistics()} if "statistics" in SAMPLERS[name].options else {}
        return k_diffusion_sampler(name, **options, **known)

    def distance(self, run: Callable[..., Tensor], scheduler: str, steps: int) -> float:
        torch.manual_seed(7)
        images = run(self.host, self.start.view(1, COUNT, *SHAPE).clone(), schedule(scheduler, steps),
                     extra_args={"seed": 7}, disable=True)
        return distance(images.view(COUNT, -1), self.target)


def theirs(name: str) -> Callable[..., Tensor]:
    return getattr(comfy_host.comfy_sampling(), f"sample_{name}")


def stochastic() -> None:
    torch.set_num_threads(1)
    problem = Problem()
    heads = [f"{name}, {budget}" for name in SCHEDULES for budget in BUDGETS]
    print(f"floor, data to data: {distance(drawn(problem.data, 2), problem.target):.4f}\n")
    print("|", " | ".join(["sampler", *heads]), "|\n|" + "---|" * (1 + len(heads)))
    columns = [(label, problem.ours(name, **options), SAMPLERS[name].evaluations_per_step)
               for label, (name, options) in OURS.items()]
    columns += [(f"ComfyUI's {name}", theirs(name), evaluations) for name, evaluations in CORE.items()]
    for label, run, evaluations in columns:
        cells = [f"{problem.distance(run, name, -(-budget // evaluations)):.4f}"
                 for name in SCHEDULES for budget in BUDGETS]
        print("|", " | ".join([label, *cells]), "|", flush=True)
