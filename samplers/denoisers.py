"""Denoisers around a denoiser: the first evaluation at full noise answered without the model, a limit to
how many there are, a bound on what is answered, and guidance by the length of the step.

At the highest level x is almost nothing but noise. The analytic first step (AFS) takes it for that:

    D = (x - sigma eps) / alpha,   eps = x / sqrt(alpha^2 sigma_data^2 + sigma^2)

Dockhorn et al. 2022 (arXiv:2210.05475), section 3.3, and Zhou et al. 2024 (arXiv:2312.00094).
"""
from __future__ import annotations

import math
from itertools import count
from typing import Callable, Mapping

from torch import Tensor

from .schedule import Level
from .solver import Adaptive

Denoiser = Callable[[Tensor, float], Tensor]
"""denoise(x, sigma) -> the model's estimate of x0."""
FULL = 0.99  # of the model's highest sigma
MOST = 2000
"""Evaluations of an adaptive run at most. The tightest tolerances took up to 1,455 on exact problems."""


def opened(denoise: Denoiser, first: Denoiser) -> Denoiser:
    """A denoiser whose first call another one answers."""
    answers = iter([first])
    return lambda x, sigma: next(answers, denoise)(x, sigma)


def afs(start: Level, sigma_data: float = 1.0) -> Denoiser:
    """The analytic answer at a level: x is taken for noise, scaled to unit variance; 0 where x is all
    noise."""
    alpha, sigma = start.alpha, start.sigma
    gain = alpha * sigma_data**2 / (root := math.hypot(alpha * sigma_data, sigma)) / (root + sigma)
    return lambda x, sigma: x * gain


FIRST_STEPS: Mapping[str, Callable[[Denoiser, Level], Denoiser]] = {
    "evaluate": lambda denoise, start: denoise,
    "afs": lambda denoise, start: opened(denoise, afs(start)),
}
"""How the first evaluation of a run from a level may be answered."""


def check_full_noise(start: Level, sigma_max: float | None) -> None:
    """ValueError if a run does not start at full noise."""
    if sigma_max is not None and start.sigma < FULL * sigma_max:
        raise ValueError(
            f"the first step cannot be skipped: the run starts at sigma = {start.sigma:.4g}, where x holds "
            f"an image, and not at the model's highest, {sigma_max:.4g}: set first_step to evaluate, or "
            "denoise to 1"
        )


def dynamic(denoised: Tensor, quantile: float, bound: float) -> Tensor:
    """Dynamic thresholding, of each image by itself:

        clip(D, -s, s) bound / s,     s = max(bound, the quantile of |D|)

    Saharia et al. 2022, Imagen (arXiv:2205.11487), section 2.3: quantile 0.995, bound 1 for pixels from -1 to
    1. The quantile is the value of that rank, from below, so nothing is interpolated; images of any size, and
    no wait for the device.
    """
    size = denoised[0].numel()
    rank = min(size, max(1, math.ceil(quantile * size)))
    s = denoised.flatten(1).abs().kthvalue(rank, dim=1).values.clamp(min=bound)
    s = s.view(-1, *[1] * (denoised.ndim - 1))
    return denoised.maximum(-s).minimum(s) * (bound / s)


def static(denoised: Tensor, quantile: float, bound: float) -> Tensor:
    """clip(D, -bound, bound), whatever the quantile."""
    return denoised.clamp(-bound, bound)


THRESHOLDS: Mapping[str, Callable[[Tensor, float, float], Tensor] | None] = {
    "off": None, "dynamic": dynamic, "static": static}
"""How an answer may be kept within bounds."""


def plus(denoised: Tensor, unconditional: Tensor, ratio: Tensor) -> Tensor:
    """CFG++: guidance as strong as the step to come is short, of any solver.

        D_u + (D - D_u) / (1 - ratio),     D = D_u + w (D_c - D_u),   0 <= w <= 1,
        ratio = varsigma_t / varsigma_s of the step's levels,  varsigma = sigma / alpha

    So the first-order step is  y_t = D + ratio (y_s - D_u),  y = x / alpha: towards the guided image by the
    unguided noise. Chung et al. 2024 (arXiv:2406.08070), Algorithm 2. ratio: one for each image.
    """
    strength = (1.0 / (1.0 - ratio)).to(denoised.dtype)
    return unconditional + strength.view(-1, *[1] * (denoised.ndim - 1)) * (denoised - unconditional)


def limited(denoise: Denoiser, solver: Adaptive) -> Denoiser:
    """FloatingPointError after MOST evaluations: the tolerances of an adaptive run are too tight."""
    calls = count(1)

    def counted(x: Tensor, sigma: float) -> Tensor:
        if next(calls) > MOST:
            raise FloatingPointError(
                f"after {MOST} evaluations the run is at sigma = {sigma:.6g} only: its tolerances (rtol = "
                f"{solver.rtol:g}, atol = {solver.atol:g}) are too tight for this model, or finer than its "
                "precision (a model in bfloat16 is exact to about 0.004, in float16 to 0.0005): raise rtol "
                "and atol, run the model in float32, or choose a solver with a fixed number of steps")
        return denoise(x, sigma)

    return counted
