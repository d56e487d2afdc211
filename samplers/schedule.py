"""Noise levels, and the Gaussian paths that turn the host's sigma into half-log-SNR and back.

On every path the sampler's state is x = alpha x0 + sigma eps; a path is the curve (alpha, sigma), and

    lam = log(alpha / sigma)      half the log of the signal-to-noise ratio
                                  (Lu et al. 2022, arXiv:2206.00927, sec. 3)

is the time in which all solvers of this package work. In y = x / alpha and varsigma = sigma / alpha the three
paths are one and the same: dy / dvarsigma = eps.

    path                  alpha              sigma in        who
    VarianceExploding     1                  [0, inf)        k-diffusion, EDM; ComfyUI's eps, v and EDM models
    RectifiedFlow         1 - sigma          [0, 1]          SD3, Flux and other flow models (ComfyUI's CONST)
    VariancePreserving    sqrt(1 - sigma^2)  [0, 1]          DDPM / score-SDE states, schedules stated in t

The ends are levels too: sigma = 0 has lam = +inf, and sigma = 1 (alpha = 0) of a flow or VP path has lam =
-inf. All numbers are Python floats (float64, on the host), or float64 arrays where every image has its own.
"""
from __future__ import annotations

import math
from functools import wraps
from typing import Callable, Mapping, NamedTuple, Protocol, Sequence

import numpy as np
from torch import Tensor

Number = float | np.ndarray
"""A float; or an array [B, 1, ...] that broadcasts over latents, a number of its own for every image."""


def elementwise(f: Callable[..., float]) -> Callable[..., Number]:
    """f, whose last argument may be an array: then f of every element, the same as of that alone."""
    each = np.vectorize(f, otypes=[float])
    return wraps(f)(lambda *z: (each if isinstance(z[-1], np.ndarray) else f)(*z))


def largest(value: Number) -> float:
    return float(value.max()) if isinstance(value, np.ndarray) else value


exp, expm1, sqrt = map(elementwise, (math.exp, math.expm1, math.sqrt))


class Level(NamedTuple):
    """One noise level of a path: x = alpha x0 + sigma eps, lam = log(alpha / sigma)."""

    lam: Number
    alpha: Number
    sigma: Number


class Path(Protocol):
    """A Gaussian path, parametrised both ways: level(at(lam).sigma).lam == lam."""

    sigma_limit: float  # the highest sigma there is

    def level(self, sigma: float) -> Level: ...

    def at(self, lam: Number) -> Level: ...


class VarianceExploding:
    """alpha = 1: x = x0 + sigma eps, lam = -log(sigma)."""

    sigma_limit = math.inf

    def level(self, sigma: float) -> Level:
        return Level(-_log(sigma), 1.0, sigma)

    def at(self, lam: Number) -> Level:
        return Level(lam, 1.0, exp(-lam))


ROUNDING = 2.0**-22
"""Hosts compute schedules in float32: a shifted flow's highest level comes out beside 1 by a rounding or two,
and is 1."""


class RectifiedFlow:
    """alpha = 1 - sigma: x = (1 - sigma) x0 + sigma eps, lam = log((1 - sigma) / sigma)."""

    sigma_limit = 1.0 + ROUNDING

    def level(self, sigma: float) -> Level:
        sigma = 1.0 if abs(sigma - 1.0) <= ROUNDING else sigma
        return Level(_log(1.0 - sigma) - _log(sigma), 1.0 - sigma, sigma)

    def at(self, lam: Number) -> Level:
        return Level(lam, _logistic(lam), _logistic(-lam))


class VariancePreserving:
    """alpha^2 + sigma^2 = 1."""

    sigma_limit = 1.0

    def level(self, sigma: float) -> Level:
        alpha = math.sqrt((1.0 - sigma) * (1.0 + sigma))
        return Level(_log(alpha) - _log(sigma), alpha, sigma)

    def at(self, lam: Number) -> Level:
        return Level(lam, sqrt(_logistic(2.0 * lam)), sqrt(_logistic(-2.0 * lam)))


PATHS: Mapping[str, Path] = {"ve": VarianceExploding(), "flow": RectifiedFlow(), "vp": VariancePreserving()}


def find_path(name: str) -> Path:
    if name not in PATHS:
        raise ValueError(f"unknown path {name!r}: choose one of {', '.join(PATHS)}")
    return PATHS[name]


def levels(sigmas: Sequence[float] | Tensor | np.ndarray, path: Path) -> list[Level]:
    """The levels of a sampling schedule: sigmas strictly decreasing, finite, within [0, path.sigma_limit].

    Raises ValueError naming the first value that is not, what is admissible, and what to do.
    """
    shape = sigmas.shape if isinstance(sigmas, Tensor) else np.shape(sigmas)
    if len(shape) != 1:
        raise ValueError(f"sigmas has shape {list(shape)}: give one list of noise levels from high to low, "
                         "shape [n + 1] for n steps, which all images of a batch share")
    sigmas = sigmas.tolist() if isinstance(sigmas, Tensor) else [float(sigma) for sigma in sigmas]
    if not sigmas:
        raise ValueError(
            "sigmas is empty: give the noise levels from the start to the end, at least one number")
    found: list[Level] = []
    for i, sigma in enumerate(sigmas):
        if not math.isfinite(sigma):
            raise ValueError(
                f"sigmas[{i}] = {sigma}: every sigma must be a finite number; check the scheduler")
        if sigma < 0:
            raise ValueError(
                f"sigmas[{i}] = {sigma:.6g} is negative: noise levels are >= 0; check the scheduler")
        if sigma > path.sigma_limit:
            raise ValueError(
                f"sigmas[{i}] = {sigma:.6g} is above {path.sigma_limit:g}, the highest noise level of a "
                f"{type(path).__name__} path: use this model's own scheduler, or path='ve' for Karras/EDM "
                "sigmas"
            )
        found.append(path.level(float(sigma)))
        if i and found[i].sigma >= found[i - 1].sigma:
            fault, remedy = (("repeats", "remove the repeated value, or ask the scheduler for fewer steps")
                             if found[i].sigma == found[i - 1].sigma else
                             ("is above", "sort the sigmas from high to low (unsampling is not supported)"))
            raise ValueError(f"sigmas must strictly decrease, but sigmas[{i}] = {sigma:.6g} {fault} "
                             f"sigmas[{i - 1}] = {sigmas[i - 1]:.6g}: {remedy}")
    return found


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


@elementwise
def _logistic(lam: float) -> float:
    """1 / (1 + e^-lam), without overflow and with full relative precision in both tails."""
    if lam >= 0.0:
        return 1.0 / (1.0 + math.exp(-lam))
    e = math.exp(lam)
    return e / (1.0 + e)
