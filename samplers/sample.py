"""The loop, and the adaptive loop."""
from __future__ import annotations

import math
from collections.abc import Set
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np
from torch import Tensor

from .denoisers import Denoiser, limited
from .integrand import Evaluation, Span, Update
from .schedule import Level, Path
from .solver import Adaptive, Step, ddim, finite
from .tensors import lincomb, placed, rms

Noise = Callable[[Level, Level], Tensor]
"""noise(s, t) -> a unit-variance increment, shaped like x; those over disjoint spans are independent."""
Observer = Callable[[int, float, Tensor, Tensor], None]
"""observe(i, sigma, x, denoised): the evaluation that opens interval i of the schedule has been made."""


def no_noise(s: Level, t: Level) -> Tensor:
    raise ValueError(f"the step from sigma = {s.sigma:.6g} to {t.sigma:.6g} adds noise, and none is given: "
                     "give noise, such as BrownianNoise(x, seed)")


def sample(denoise: Denoiser, x: Tensor, steps: Sequence[Step], *, noise: Noise = no_noise,
           observe: Observer | None = None, first: int = 0) -> Tensor:
    """Run planned steps, from x at steps[0].s to steps[-1].t; `first` is the number of the first interval.

    The latents are touched once an update, by one linear combination, and nothing here waits for the device,
    but for steps that are planned on the image (AMED's predictor).
    """
    steps = [on_device(step, x) for step in steps]
    memory = max((step.lookback for step in steps), default=0)
    past: list[Tensor] = []
    before = None
    for step in steps:
        here = evaluate(denoise, x, step.evaluations[0], observe, first)
        if before and before.correction:
            x = _corrected(x, before, (here, *past))
        if step.plan:
            step = on_device(step.plan(x, before), x)
        values = {0: here, **{-k: m for k, m in enumerate(past, 1)}}
        del here, past
        latest = range(len(step.evaluations) - 1, -1 - memory, -1)[:memory]
        x = advance(denoise, x, step, values, set(latest), noise, observe, first)
        past = [values[k] for k in latest if k in values]
        values.clear()
        first += step.intervals
        before = step
    return x


def advance(denoise: Denoiser, x: Tensor, step: Step, values: dict[int | Span, Tensor], keep: Set[int],
            noise: Noise = no_noise, observe: Observer | None = None, first: int = 0) -> Tensor:
    """x at step.t.

    `values` holds the evaluations by their numbers, and increments of the noise by their spans. Those it
    lacks are made and entered; those that no later update needs are dropped, but for the ones to `keep`.
    """
    y, seen = x, step.missed.uses if step.missed else ()
    keep = keep.union(seen)
    for k, (evaluation, update) in enumerate(zip(step.evaluations, step.updates)):
        if k not in values:
            values[k] = evaluate(denoise, y, evaluation, observe if k < step.intervals else None, first + k)
        start = y if update.chained else x
        del y  # one latent less while the next one is made
        if update.size:
            update = sized(update, values, noise)
        y = combine(start, update, values)
        del start
        needed = keep.union(*({j for j, _ in later.terms} for later in step.updates[k + 1:]),
                            *({span for span, _ in later.noise} for later in step.updates[k:]))
        for j in values.keys() - needed:
            del values[j]
        for span, std in update.noise:  # once there is room for it
            if span not in values:
                values[span] = noise(*span)
            y = y.addcmul_(values[span], std) if isinstance(std, Tensor) else y.add_(values[span], alpha=std)
    if step.missed:
        y.add_(step.missed(x, [values[k] for k in seen if k in values]))
    return y


def sized(update: Update, values: dict[int | Span, Tensor], noise: Noise) -> Update:
    """The update with the coefficients that its size gives, once its noise is drawn and entered."""
    ((k, coefficient),), ((span, std),) = update.terms, update.noise
    values[span] = noise(*span)
    size = update.size(values[span], values[k])
    return update._replace(terms=((k, coefficient * size**2),), noise=((span, std * size),))


class Place(NamedTuple):
    """A run that may be gone on with: the steps behind it, x, the values kept before it (latest first), and
    those of the evaluations of the step that is next, as far as they were made."""

    done: int
    x: Tensor
    past: tuple[Tensor, ...] = ()
    values: Mapping[int, Tensor] = {}


def onward(denoise: Denoiser, place: Place, step: Step, memory: int) -> tuple[Place, Place]:
    """The place itself with all values of this step, and the place where the step leads, which remembers
    `memory` values.

    What the place knows is not evaluated again.
    """
    values = {**{-k: m for k, m in enumerate(place.past, 1)}, **place.values}
    own = range(len(step.evaluations))
    landed = advance(denoise, place.x, step, values, {*values, *own})
    past = (*(values[k] for k in reversed(own)), *place.past)[:memory]
    return place._replace(values={k: values[k] for k in own}), Place(place.done + 1, landed, past)


def _corrected(x: Tensor, step: Step, latest: Sequence[Tensor]) -> Tensor:
    """x at step.t, once the evaluation there has been made; it and those before it, latest first."""
    n = len(step.evaluations)
    return combine(x, step.correction, {n - k: m for k, m in enumerate(latest)})


def combine(x: Tensor, update: Update, values: Mapping[int, Tensor]) -> Tensor:
    """decay x + sum_k coefficient_k m_k + bias: an update but for its noise."""
    return lincomb((update.decay, x), *((c, values[k]) for k, c in update.terms), bias=update.bias)


def evaluate(denoise: Denoiser, x: Tensor, evaluation: Evaluation, observe: Observer | None = None,
             i: int = 0) -> Tensor:
    """The value kept of one model call, whose answer is shown to the observer as the start of interval i."""
    scale = evaluation.scale
    denoised = denoise(x if isinstance(scale, float) and scale == 1.0 else lincomb((scale, x)),
                       evaluation.at.sigma)
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
        evaluations=tuple(
            e._replace(x=placed(e.x, x), denoised=placed(e.denoised, x), scale=placed(e.scale, x))
            for e in step.evaluations), updates=tuple(map(update, step.updates)), correction=step.correction
        and update(step.correction), missed=step.missed and step.missed.placed(x))


OPENING = 0.1
"""From pure noise (lam = -inf) an adaptive run goes at once to where alpha^2 is so many times its tolerance.
That step errs by alpha^2 / 2 in a state of unit variance (measured on a mixture, from alpha = 0.14 to 0.002),
a twentieth of the tolerance."""
LOWEST = 0.002
"""sigma / alpha from which an adaptive run to 0 goes there at once, if the model's lowest level is not known.
On normal data of spreads 0.02 to 1 that step erred by 1e-3 from 0.01 on, and by 7e-5 from 0.002 on, which
took 3 evaluations more at most tolerances."""


def sample_adaptive(denoise: Denoiser, x: Tensor, levels: Sequence[Level], solver: Adaptive, path: Path, *,
                    lowest: Level | None = None, observe: Observer | None = None) -> Tensor:
    """Integrate from the first to the last of `levels`, choosing the steps on the way.

    The levels between only number the intervals. The error is controlled wherever lam is finite, and down to
    `lowest`, the model's lowest level, in a run to sigma = 0. What is left at either end is one step of
    infinite length, DDIM. One number a step, the error estimate, is awaited from the device.

    FloatingPointError if the error estimate is not finite, or still too large after MOST evaluations.
    """
    if len(levels) < 2:
        return x
    denoise = limited(denoise, solver)
    start, end = levels[0], levels[-1]
    stop = end if finite(end) else lowest or path.at(-math.log(LOWEST))
    s = start
    if not finite(start):
        s = min(stop, path.at(0.5 * math.log(OPENING * max(solver.rtol, solver.atol))))  # by lam
    if s != start:
        x = sample(denoise, x, [ddim(solver.integrand, start, s)], observe=observe)
    if s < stop:  # by lam
        x, s = _adapt(denoise, x, s, stop, levels, solver, path, observe), stop
    if stop != end:
        x = sample(denoise, x, [ddim(solver.integrand, s, end)], observe=observe, first=_interval(levels, s))
    return x


def _interval(levels: Sequence[Level], at: Level) -> int:
    return max(i for i, level in enumerate(levels[:-1]) if level.lam <= at.lam)


def _adapt(denoise: Denoiser, x: Tensor, s: Level, end: Level, levels: Sequence[Level], solver: Adaptive,
           path: Path, observe: Observer | None) -> Tensor:
    h, before = solver.h_init, x / math.hypot(s.alpha, s.sigma)
    values: dict[int | Span, Tensor] = {}
    while s.lam < end.lam:
        interval = _interval(levels, s)
        t = end if s.lam + h >= end.lam else path.at(s.lam + h)
        step, low = solver.step(s, t, path)
        keep = {0, *(k for k, _ in low.terms)}
        high = advance(denoise, x, step, values, keep, observe=observe, first=interval)
        size = math.hypot(t.alpha, t.sigma)
        lower = combine(x, low, values).div_(size)
        error = _error(high / size, lower, before, solver)
        if not math.isfinite(error) or not s.lam < t.lam:
            raise FloatingPointError(
                f"the error estimate of the step from sigma = {s.sigma:.6g} to {t.sigma:.6g} (interval "
                f"{interval}) is {error}: the model returned NaN or infinite values there, or the tolerances "
                f"(rtol = {solver.rtol:g}, atol = {solver.atol:g}) are tighter than its precision")
        # float32, as published
        growth = float(np.float32(error ** (-1.0 / solver.order))) if error else math.inf
        h = min(solver.theta * (t.lam - s.lam) * growth, solver.longest)
        if error <= 1.0:
            x, s, before, values = high, t, lower, _begun(step, values)
            if values and observe and s.lam < end.lam:
                observe(_interval(levels, s), s.sigma, x, lincomb((1.0 / s.alpha, x),
                                                                  (-s.sigma / s.alpha, values[0])))
        else:
            values = {0: values[0]}  # the evaluation at s is the same when the step is tried again
    return x


def _begun(step: Step, values: Mapping[int, Tensor]) -> dict[int | Span, Tensor]:
    """What a step that ends with the noise predicted at t knows of the one that begins there."""
    return {0: values[len(step.evaluations) - 1]} if step.evaluations[-1].at is step.t else {}


def _error(high: Tensor, lower: Tensor, before: Tensor, solver: Adaptive) -> float:
    scale = lower.abs().maximum(before.abs()).mul_(solver.rtol).clamp_(min=solver.atol)
    return float(rms((high - lower) / scale).max())
