"""The loop, and the adaptive loop."""
from __future__ import annotations

import math
from collections.abc import Set
from typing import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from .schedule import Level, Path
from .solver import Adaptive, Step, Update, ddim, finite
from .tensors import lincomb, rms

Denoiser = Callable[[Tensor, float], Tensor]
"""denoise(x, sigma) -> the model's estimate of x0."""
Noise = Callable[[Level, Level], Tensor]
"""noise(s, t) -> a unit-variance increment over the interval, shaped like x."""
Observer = Callable[[int, float, Tensor, Tensor], None]
"""observe(i, sigma, x, denoised): the evaluation that opens interval i of the schedule has been made."""


def sample(denoise: Denoiser, x: Tensor, steps: Sequence[Step], *, noise: Noise | None = None,
           observe: Observer | None = None, first: int = 0) -> Tensor:
    """Run planned steps, from x at steps[0].s to steps[-1].t; `first` is the number of the first interval.

    The latents are touched once an update, by one linear combination, and nothing here waits for the device.
    """
    memory = max((step.lookback for step in steps), default=0)
    past: list[Tensor] = []
    for step in steps:
        known = {-k: m for k, m in enumerate(past, 1)}
        x, values = advance(denoise, x, step, known, keep={0} if memory else set(), observe=_from(first, observe))
        past = [*values.values(), *past][:memory]
        del known, values
        if step.std:
            x.add_(noise(step.s, step.t), alpha=step.std)
        first += step.intervals
    return x


def advance(denoise: Denoiser, x: Tensor, step: Step, known: Mapping[int, Tensor], keep: Set[int],
            observe: Observer | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """x at step.t without its noise, and the evaluations named in `keep`; those in `known` are not made again."""
    values = dict(known)
    level, y = step.s, x
    for k, update in enumerate(step.updates):
        if k not in values:
            denoised = denoise(y, level.sigma)
            if observe and k < step.intervals:
                observe(k, level.sigma, y, denoised)
            values[k] = step.integrand.value(y, denoised, level)
            del denoised
        del y  # one latent less while the next one is made
        y, level = combine(x, update, values), update.to
        needed = keep.union(*({j for j, _ in later.terms} for later in step.updates[k + 1:]))
        values = {j: m for j, m in values.items() if j in needed}
    return y, values


def combine(x: Tensor, update: Update, values: Mapping[int, Tensor]) -> Tensor:
    """decay x + sum_k coefficient_k m_k."""
    return lincomb((update.decay, x), *((c, values[k]) for k, c in update.terms))


def sample_adaptive(denoise: Denoiser, x: Tensor, levels: Sequence[Level], solver: Adaptive, path: Path, *,
                    observe: Observer | None = None) -> Tensor:
    """Integrate from the first to the last of `levels`, choosing the steps on the way.

    Only intervals of infinite length, at either end, are taken as the schedule has them. One number a step, the error
    estimate, is awaited from the device.
    """
    inner = [i for i, level in enumerate(levels) if finite(level)]
    if inner[:1] != [0]:
        x = sample(denoise, x, [ddim(solver.integrand, *levels[:2])], observe=observe)
    if inner:
        x = _adapt(denoise, x, {i: levels[i] for i in inner}, solver, path, observe)
    if len(levels) - 1 not in inner and len(levels) > 2:
        x = sample(denoise, x, [ddim(solver.integrand, *levels[-2:])], observe=observe, first=len(levels) - 2)
    return x


def _adapt(denoise: Denoiser, x: Tensor, levels: Mapping[int, Level], solver: Adaptive, path: Path,
           observe: Observer | None) -> Tensor:
    *_, end = levels.values()
    s, h, before = next(iter(levels.values())), solver.h_init, x
    known: dict[int, Tensor] = {}
    while s.lam < end.lam:
        interval = max(i for i, level in levels.items() if level.lam <= s.lam)
        t = end if s.lam + h >= end.lam else path.at(s.lam + h)
        step, low = solver.step(s, t, path)
        high, values = advance(denoise, x, step, known, {0, *(k for k, _ in low.terms)}, _from(interval, observe))
        lower = combine(x, low, values)
        error = _error(high, lower, before, solver)
        if not math.isfinite(error) or not s.lam < t.lam:
            raise FloatingPointError(
                f"the error estimate of the step from sigma = {s.sigma:.6g} to {t.sigma:.6g} (interval {interval}) is "
                f"{error}: the model returned NaN or infinite values there, or the tolerances (rtol = {solver.rtol:g}, "
                f"atol = {solver.atol:g}) are tighter than its precision")
        growth = float(np.float32(error ** (-1.0 / step.evaluations))) if error else math.inf  # float32, as published
        h = solver.theta * (t.lam - s.lam) * growth
        if error <= 1.0:
            x, s, before, known = high, t, lower, {}
        else:
            known = {0: values[0]}  # the evaluation at s is the same when the step is tried again
    return x


def _error(high: Tensor, lower: Tensor, before: Tensor, solver: Adaptive) -> float:
    scale = lower.abs().maximum(before.abs()).mul_(solver.rtol).clamp_(min=solver.atol)
    return float(rms((high - lower) / scale).max())


def _from(first: int, observe: Observer | None) -> Observer | None:
    """`observe`, for a step that counts its own evaluations from 0."""
    return observe and (lambda k, *seen: observe(first + k, *seen))
