"""The loop, and the adaptive loop."""
from __future__ import annotations

import math
from collections.abc import Set
from functools import partial
from typing import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from .integrand import Evaluation, Update
from .schedule import Level, Path
from .solver import Adaptive, Step, ddim, finite
from .tensors import lincomb, placed, rms

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
    steps = [on_device(step, x) for step in steps]
    memory = max((step.lookback for step in steps), default=0)
    past: list[Tensor] = []
    correct = before = None
    for step in steps:
        here = evaluate(denoise, x, step.evaluations[0], observe, first)
        if correct:
            x = correct(here)
        if step.plan:
            step = on_device(step.plan(x, before), x)
        values = {0: here, **{-k: m for k, m in enumerate(past, 1)}}
        del here, past
        correct = step.correction and partial(_correct, x, step.correction, dict(values))
        latest = range(len(step.evaluations) - 1, -1 - memory, -1)[:memory]
        x = advance(denoise, x, step, values, set(latest), observe, first)
        past = [values[k] for k in latest if k in values]
        values.clear()
        if step.std:
            x.add_(noise(*(step.clock or (step.s, step.t))), alpha=step.std)
        first += step.intervals
        before = step
    return x


def advance(denoise: Denoiser, x: Tensor, step: Step, values: dict[int, Tensor], keep: Set[int],
            observe: Observer | None = None, first: int = 0) -> Tensor:
    """x at step.t, without its noise.

    `values` holds the evaluations by their numbers. Those it lacks are made and entered; those that no later update
    needs are dropped, but for the ones to `keep`.
    """
    y = x
    for k, (evaluation, update) in enumerate(zip(step.evaluations, step.updates)):
        if k not in values:
            values[k] = evaluate(denoise, y, evaluation, observe if k < step.intervals else None, first + k)
        start = y if update.chained else x
        del y  # one latent less while the next one is made
        y = combine(start, update, values)
        del start
        needed = keep.union(*({j for j, _ in later.terms} for later in step.updates[k + 1:]))
        for j in values.keys() - needed:
            del values[j]
    return y


def combine(x: Tensor, update: Update, values: Mapping[int, Tensor]) -> Tensor:
    """decay x + sum_k coefficient_k m_k + bias."""
    return lincomb((update.decay, x), *((c, values[k]) for k, c in update.terms), bias=update.bias)


def _correct(x: Tensor, correction: Update, values: Mapping[int, Tensor], there: Tensor) -> Tensor:
    return combine(x, correction, {**values, 1: there})


def evaluate(denoise: Denoiser, x: Tensor, evaluation: Evaluation, observe: Observer | None = None, i: int = 0) -> Tensor:
    """The value kept of one model call, whose answer is shown to the observer as the start of interval i."""
    scale = evaluation.scale
    denoised = denoise(x if isinstance(scale, float) and scale == 1.0 else lincomb((scale, x)), evaluation.at.sigma)
    if observe:
        observe(i, evaluation.at.sigma, x, denoised)
    if isinstance(evaluation.x, float) and (evaluation.x, evaluation.denoised) == (0.0, 1.0):
        return denoised
    return lincomb((evaluation.x, x), (evaluation.denoised, denoised))


def on_device(step: Step, x: Tensor) -> Step:
    """The step with the coefficients that are arrays where x is."""

    def update(u: Update) -> Update:
        return u._replace(decay=placed(u.decay, x), terms=tuple((k, placed(c, x)) for k, c in u.terms),
                          bias=placed(u.bias, x))

    return step._replace(
        evaluations=tuple(e._replace(x=placed(e.x, x), denoised=placed(e.denoised, x), scale=placed(e.scale, x))
                          for e in step.evaluations),
        updates=tuple(map(update, step.updates)), correction=step.correction and update(step.correction))


def sample_adaptive(denoise: Denoiser, x: Tensor, levels: Sequence[Level], solver: Adaptive, path: Path, *,
                    observe: Observer | None = None) -> Tensor:
    """Integrate from the first to the last of `levels`, choosing the steps on the way.

    Only intervals of infinite length, at either end, are taken as the schedule has them. One number a step, the error
    estimate, is awaited from the device.
    """
    if len(levels) < 2:
        return x
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
    s, h = next(iter(levels.values())), solver.h_init
    before = x / math.hypot(s.alpha, s.sigma)
    values: dict[int, Tensor] = {}
    while s.lam < end.lam:
        interval = max(i for i, level in levels.items() if level.lam <= s.lam)
        t = end if s.lam + h >= end.lam else path.at(s.lam + h)
        step, low = solver.step(s, t, path)
        high = advance(denoise, x, step, values, {0, *(k for k, _ in low.terms)}, observe, interval)
        size = math.hypot(t.alpha, t.sigma)
        lower = combine(x, low, values).div_(size)
        error = _error(high / size, lower, before, solver)
        if not math.isfinite(error) or not s.lam < t.lam:
            raise FloatingPointError(
                f"the error estimate of the step from sigma = {s.sigma:.6g} to {t.sigma:.6g} (interval {interval}) is "
                f"{error}: the model returned NaN or infinite values there, or the tolerances (rtol = {solver.rtol:g}, "
                f"atol = {solver.atol:g}) are tighter than its precision")
        growth = float(np.float32(error ** (-1.0 / len(step.evaluations)))) if error else math.inf  # float32, as published
        h = solver.theta * (t.lam - s.lam) * growth
        if error <= 1.0:
            x, s, before, values = high, t, lower, {}
        else:
            values = {0: values[0]}  # the evaluation at s is the same when the step is tried again
    return x


def _error(high: Tensor, lower: Tensor, before: Tensor, solver: Adaptive) -> float:
    scale = lower.abs().maximum(before.abs()).mul_(solver.rtol).clamp_(min=solver.atol)
    return float(rms((high - lower) / scale).max())
