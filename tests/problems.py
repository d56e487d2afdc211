"""Problems with known answers: denoisers in closed form, and the exact solution where there is one.

Every denoiser takes (x, sigma[B], **extra) as k-diffusion's models do, and is built for one path.
"""
from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplers import SAMPLERS, Amed, Statistics, estimate_statistics
from samplers.schedule import PATHS

REFERENCE = json.loads((Path(__file__).parent / "reference" / "official_outputs.json").read_text())


def alpha_of(sigma: Tensor, path: str) -> Tensor:
    return {"ve": torch.ones_like(sigma), "flow": 1 - sigma,
            "vp": (1 - sigma * sigma).clamp(min=0).sqrt()}[path]


def column(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


@dataclass
class Gaussian:
    """Data N(mean, spread^2), mean and spread per element: D is linear in x and the ODE has a closed-form
    solution.

    x_t = alpha_t m + (x_s - alpha_s m) sqrt(v_t / v_s),  v = alpha^2 c^2 + sigma^2.
    """

    path: str = "ve"
    mean: float | Tensor = 0.7
    spread: float | Tensor = 0.4

    def __call__(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        sigma = column(sigma, x)
        alpha = alpha_of(sigma, self.path)
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def exact(self, x: Tensor, s: float, t: float) -> Tensor:
        a, b = PATHS[self.path].level(s), PATHS[self.path].level(t)
        v = [level.alpha**2 * self.spread**2 + level.sigma**2 for level in (a, b)]
        return b.alpha * self.mean + (x - a.alpha * self.mean) * (torch.as_tensor(v[1] / v[0]) ** 0.5)


@dataclass
class Mixture:
    """The posterior mean of a mixture of isotropic Gaussians."""

    means: Tensor    # [K, d]
    stds: Tensor     # [K]
    weights: Tensor  # [K]
    path: str = "ve"

    def __call__(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        y = x.flatten(1)
        sigma = sigma[:, None]
        alpha = alpha_of(sigma, self.path)
        variance = (alpha * self.stds) ** 2 + sigma**2                                    # [B, K]
        offset = y[:, None, :] - alpha[..., None] * self.means                            # [B, K, d]
        log_p = self.weights.log(
        ) - 0.5 * offset.square().sum(-1) / variance - 0.5 * y.shape[1] * variance.log()
        posterior = log_p.softmax(1)
        mean = self.means + (alpha * self.stds**2 / variance)[..., None] * offset
        return (posterior[..., None] * mean).sum(1).reshape(x.shape)


class Counted:
    """A model that counts its calls."""

    def __init__(self, model) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x, sigma, **extra):
        self.calls += 1
        return self.model(x, sigma)


def reference_mixture(path: str) -> tuple[Mixture, Tensor]:
    """The problem of tests/reference, and its unit-variance starting noise."""
    problem = REFERENCE["problem"]
    means, stds, weights, noise = (torch.tensor(problem[k], dtype=torch.float64)
                                   for k in ("means", "stds", "weights", "x_T"))
    return Mixture(means, stds, weights, path), noise.reshape(problem["shape"])


def sigmas_between(start: float, end: float, n: int, path: str) -> Tensor:
    """n intervals, uniform in lam, from lam = start to lam = end."""
    return torch.tensor([PATHS[path].at(start + (end - start) * i / n).sigma for i in range(n + 1)],
                        dtype=torch.float64)


def starting_noise(shape: tuple[int, ...], sigma: float, path: str, seed: int = 0,
                   dtype=torch.float64) -> Tensor:
    """A draw of x at sigma for the default Gaussian problem."""
    generator = torch.Generator().manual_seed(seed)
    eps, x0 = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (PATHS[path].level(sigma).alpha * (0.7 + 0.4 * x0) + sigma * eps).to(dtype)


def smooth_statistics(seed: int = 0) -> Statistics:
    """Smooth random curves of the size real ones have, on a fine grid over lam in [-12, 12]."""
    lam = np.linspace(-12.0, 12.0, 2001)
    phase, speed = np.random.default_rng(seed).uniform((0.0,), (6.0,), (2, 3))
    l, s, b = (np.sin(0.15 * (1 + v) * lam + p) for v, p in zip(speed, phase))
    return Statistics(lam, 0.5 + 0.3 * l, 0.4 * s, 0.2 * b)


def gaussian_statistics(mean: float = 0.7, spread: float = 0.4) -> Statistics:
    """The exact statistics of `Gaussian`: D is linear, f = -mean l depends on lam alone, so s = 0 and b =
    f'."""
    lam = np.linspace(-12.0, 12.0, 2001)
    noise = np.exp(-2 * lam)
    l = noise / (spread**2 + noise)  # noqa: E741
    return Statistics(lam, l, 0 * lam, 2 * mean * noise * spread**2 / (spread**2 + noise) ** 2)


@functools.cache
def fitted_statistics() -> Statistics:
    """Measured on five trajectories of the reference's mixture: a solver fitted to them has weights that
    are not v3's."""
    model, noise = reference_mixture("ve")
    x = torch.randn((5, *noise.shape[1:]), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return estimate_statistics(model, x * math.exp(5.0), [math.exp(5.0), math.exp(-6.0)], fitted=True)


def needed(name: str) -> dict:
    """Values for the options a solver of the catalogue cannot do without."""
    statistics = fitted_statistics() if SAMPLERS[name].family == "Fitted Multistep" else gaussian_statistics()
    known = {"statistics": statistics, "trained": Amed.untrained()}
    return {option: value for option, value in known.items() if option in SAMPLERS[name].options}


def serving(name: str, statistics: Statistics) -> Statistics:
    """Statistics for a solver of the catalogue. The fitted one gets a single trajectory, of zeros, and so
    keeps v3's weights."""
    if SAMPLERS[name].family != "Fitted Multistep":
        return statistics
    coarse = statistics.on(np.linspace(-5.0, 6.0, 65))
    size = 2 * len(coarse.lam) + 1
    return replace(coarse, damping=np.zeros(len(coarse.lam)), root=np.zeros((1, size, size)))


def ode(name: str) -> dict:
    """Options that make a solver of the catalogue one of the ODE, and able to run."""
    noise = {option: 0.0 for option in ("eta", "s_noise") if option in SAMPLERS[name].options}
    return {**needed(name), **noise}


FIXED = [name for name in SAMPLERS if SAMPLERS[name].evaluations_per_step is not None]
"""The solvers with a planned number of steps: all but the adaptive ones."""
ODE = [name for name in FIXED if SAMPLERS[name].family != "Predictor-Corrector"]
"""Those that `ode` makes solvers of the ODE: a predictor of the reverse SDE has another drift."""
ADAPTIVE = [name for name in SAMPLERS if name not in FIXED]


def predicting(name: str, prediction: str) -> dict:
    """The option that chooses it, of a solver that has the choice."""
    return {"prediction": prediction} if "prediction" in SAMPLERS[name].options else {}
