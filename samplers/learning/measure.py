"""Measure a model's statistics by forward evaluations of the model itself: no data set, no gradients.

A few trajectories of the model run along a grid in lam, by second-order steps. At each node one more
evaluation, at y + delta v with random signs v, gives v (D(y + delta v) - D(y)) / delta, whose mean is the
mean of diag dD/dy (Hutchinson); the differences of f along the trajectory give f'. Averages over images,
space and (unless told) channels do the rest, so the result does not depend on the resolution, and a single
direction's rounding error in half precision averages out. The definitions are those of statistics.py; the
published code for them was never released.
"""
from __future__ import annotations

import math
import time
from pathlib import Path as File
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..integrand import DataPrediction
from ..model import PROBE, check_own, latents, signs
from ..phi import midpoint
from ..sample import combine, sample
from ..schedule import Level, Path, find_path, levels
from ..solver import Multistep, ddim, finite
from ..tensors import lincomb, rms
from .course import Course, Sampled
from .statistics import Statistics

INTERVALS = 24
"""Of the grid. On the emoji model 16, 24 and 40 gave solvers of the same error; on exact digits (guidance 4,
10 steps uniform in time) the median error was 0.0033, 0.0022, 0.0019 with 16, 24, 40, and 0.016 for
DPM-Solver++(2M)."""
PARTIAL = "lambda-solvers partial statistics 2"
POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "all": Tensor.mean, "channel": lambda v: v.mean((0, *range(2, v.ndim)), keepdim=True)[0],
    "none": lambda v: v.mean(0)
}
"""What one number of the statistics is the mean of."""


@torch.no_grad()
def estimate_statistics(model: Callable[..., Tensor], x: Tensor, sigmas: Sequence[float] | Tensor, *,
                        intervals: int = INTERVALS, samples: int | None = None, pool: str = "all",
                        path: str = "ve", extra_args: Mapping[str, Any] | None = None,
                        progress: Callable[[int, int], None] | None = None,
                        precision: torch.dtype | None = None, seed: int = 0,
                        about: Mapping[str, Any] | None = None, partial: File | str | None = None,
                        partial_seconds: float = 2.0, fitted: bool = False) -> Statistics:
    """The statistics of `model` over the range of `sigmas`; 4 + 2 (intervals + 1) evaluations of the batch,
    or one more.

    `fitted` measures what the fitted solver needs too: inner products of the trajectory's tensors, at no
    evaluations, and `damping` by intervals - 1 more: 77 in all with the default. It needs pool "all".

    model(x, sigma[B], **extra_args) returns the denoised x; x [K, ...] is starting noise at sigmas[0], one
    trajectory each. samples: how many of them; more than x has are drawn like it. sigmas: the model's whole
    table of levels, of which the ones nearest to a grid uniform in lam are taken, or just its first and last
    (positive) level. pool: one number for all, for every channel, or for every element. precision: what the
    model computes in, if not x's dtype.

    UnsteadyModel for a model that does not answer for itself. progress(done, total) is called after every
    evaluation and may raise to cancel. `partial` names a file that keeps what was measured, at most every
    `partial_seconds`; a call with the same x, settings and model goes on from it, and it is gone at the end.
    """
    _check(pool, fitted, intervals)
    gaussian = find_path(path)
    schedule = nodes(torch.as_tensor(sigmas).tolist(), intervals, gaussian)
    grid = [level for level in schedule if finite(level)]
    x, dtype = _trajectories(latents(x), samples, seed), x.dtype
    total = PROBE + len(schedule) + len(grid) + fitted * (len(grid) - 2)
    settings = {
        "grid": [level.lam for level in grid], "pool": pool, "seed": seed, "path": path, "fitted": fitted,
        "about": dict(about or {})
    }
    course = Course(model, x, schedule, gaussian, kind=PARTIAL, settings=settings, total=total,
                    dtype=dtype, precision=precision, extra_args=extra_args, partial=partial,
                    seconds=partial_seconds, progress=progress
                    and (lambda done, total, loss: progress(done, total)))
    with course:
        found = _along(course, schedule, grid, gaussian, x, POOLS[pool], seed, fitted)
    curves = {name: np.stack([found[f"{name}.{i}"].cpu().double().numpy() for i in range(len(grid))])
              for name in ("l", "s", "b", "s_alone", *["damping"] * fitted)}
    if fitted:
        curves["root"] = _roots([found[f"pair.{i}"] for i in range(len(grid))])
    return Statistics(
        np.array(settings["grid"]), **curves, about={
            **(about or {}), "path": path, "pool": pool, "samples": len(x), "shape": list(x.shape[1:]),
            "seed": seed, "evaluations": total, "precision": str(course.precision),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        })


def _check(pool: str, fitted: bool, intervals: int) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool = {pool!r} is out of range: choose one of {', '.join(POOLS)}")
    if fitted and pool != "all":
        raise ValueError(f"pool = {pool!r} with fitted = True: the fitted solver has one weight for all "
                         "elements; choose all")
    if intervals < 4:
        raise ValueError(f"intervals = {intervals} is out of range: choose a whole number from 4")


def _along(course: Course, schedule: Sequence[Level], grid: Sequence[Level], path: Path, x: Tensor,
           pooled: Callable[[Tensor], Tensor], seed: int, fitted: bool) -> dict[str, Tensor]:
    """What is found along trajectories from x, by name and node ("l.3"), from where the course stands on."""
    steps, sampled = Multistep(DataPrediction(), 2, midpoint, "off").steps(grid, path), Sampled(x, seed)
    # sigma = 1 of a flow: a step of infinite length to the first node
    opening = [ddim(DataPrediction(), level, grid[0]) for level in schedule[:-len(grid)]]
    if course.done:
        kept = {name: value if name.startswith("pair.") else value.to(x.device)
                for name, value in course.kept.items()}
    else:
        kept = {"x": sample(course.denoise, x, opening)}
    for i in range(course.done, len(grid)):
        denoised = _measured(kept, course, grid, i, pooled, seed)
        if fitted:
            kept[f"pair.{i}"] = sampled.of(kept["x"] / grid[i].alpha, denoised)
            _late(kept, grid, i, denoised, course.denoise)
        _regress(kept, grid, i, pooled)
        if i < len(grid) - 1:
            values = {0: denoised, -1: kept.get("denoised")}
            kept |= {"x": combine(kept["x"], steps[i].updates[0], values), "denoised": denoised}
            kept.pop(f"f.{i - 2}", None)
            course.keep(i + 1, kept)
    return kept


def _measured(kept: dict[str, Tensor], course: Course, grid: Sequence[Level], i: int,
              pooled: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """D at one node, by two evaluations; l and f of it are entered."""
    x, level = kept["x"], grid[i]
    denoised = course.denoise(x, level.sigma)
    d = level.alpha * course.delta(level) * signs(x, seed * 1_000_003 + i)
    change = course.denoise(x + d, level.sigma) - denoised
    if level.lam <= course.middle.lam:
        check_own(change, d, x, level.sigma, course.precision)
    slope, y = pooled(level.alpha * change / d), x / level.alpha
    kept[f"l.{i}"] = 1.0 - slope
    kept[f"f.{i}"] = slope.to(y) * y - denoised
    return denoised


def nodes(sigmas: Sequence[float], intervals: int, path: Path) -> list[Level]:
    """About uniform in lam from the first to the last positive level; on given levels where there are enough
    of them.

    A first level without a finite lam (sigma = 1 of a flow) comes before the grid.
    """
    given = levels(sorted(set(sigmas), reverse=True), path)
    inner = [level for level in given if finite(level)]
    if len(inner) < 2:
        raise ValueError(
            f"sigmas = {list(sigmas)} has {len(inner)} levels inside the path: give the model's table of "
            "levels, or at least its first and last, between pure noise and 0")
    lams = np.linspace(inner[0].lam, inner[-1].lam, intervals + 1)
    if len(inner) > intervals:
        known = np.array([level.lam for level in inner])
        inner = [inner[i] for i in sorted({int(np.abs(known - lam).argmin()) for lam in lams})]
    else:
        inner = [inner[0], *map(path.at, lams[1:-1]), inner[-1]]
    return inner if finite(given[0]) else [given[0], *inner]


def _trajectories(x: Tensor, samples: int | None, seed: int) -> Tensor:
    if samples is None or samples == len(x):
        return x
    if samples < 1:
        raise ValueError(f"samples = {samples} is out of range: choose a whole number from 1")
    more = torch.randn((max(0, samples - len(x)), *x.shape[1:]),
                       generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([x[:samples], more.to(x) * rms(x).mean()])


def _regress(kept: dict[str, Tensor], grid: Sequence[Level], i: int,
             pooled: Callable[[Tensor], Tensor]) -> None:
    """Enter s, b and s_alone where only node i was missing: the regression of f' on f, with f' from the
    parabola through three nodes, of which the middle one is the nearest."""
    points = (i - 2, i - 1, i)
    for at in (k for k in points if min(max(k, 1), len(grid) - 2) == i - 1):
        weights = _slope_weights([grid[k].lam for k in points], grid[at].lam)
        f, slope = kept[f"f.{at}"], sum(kept[f"f.{k}"] * c for k, c in zip(points, weights))
        mean, mean_slope = pooled(f), pooled(slope)
        variance, covariance = pooled((f - mean).square()), pooled((f - mean) * (slope - mean_slope))
        s = torch.where(variance > 1e-10 * mean**2, covariance / variance, 0.0)
        kept[f"s.{at}"], kept[f"b.{at}"] = s, mean_slope - s * mean
        kept[f"s_alone.{at}"] = pooled(f * slope) / pooled(f.square()).clamp(min=1e-30)


def _slope_weights(nodes_: Sequence[float], at: float) -> list[float]:
    """The derivative at a point of the parabola through three nodes, as weights of its values."""
    a, b, c = nodes_
    return [(2 * at - b - c) / ((a - b) * (a - c)), (2 * at - a - c) / ((b - a) * (b - c)),
            (2 * at - a - b) / ((c - a) * (c - b))]


def _late(kept: dict[str, Tensor], grid: Sequence[Level], i: int, denoised: Tensor,
          denoise: Callable[[Tensor, float], Tensor]) -> None:
    """One node of a second trajectory, which errs as a solver of few steps does: by answers one node old.

    With d its distance from the first one (in x / alpha) and d' that of its denoised images, damping = 1 -
    <d, d'> / <d, d>, the mean over the trajectories. The mean diagonal of the Jacobian says nothing of this:
    on the emoji model 1 - diag is 1 nearly everywhere, while the errors of solvers stop dying out half way.
    Both trajectories agree in the first two nodes.
    """
    level, x, late = grid[i], kept.get("late.x", kept["x"]), denoised
    if i > 1:
        late = denoise(x, level.sigma)
        d, response = ((x - kept["x"]) / level.alpha).flatten(1), (late - denoised).flatten(1)
        kept[f"damping.{i}"] = 1.0 - ((d * response).sum(1) / d.square().sum(1).clamp(min=1e-30)).mean()
    if i == 2:
        kept["damping.0"] = kept["damping.1"] = kept["damping.2"]
    if i < len(grid) - 1:
        following = grid[i + 1]
        ratio = following.sigma / level.sigma
        old = kept.get("late.denoised", denoised)
        kept["late.x"] = lincomb((ratio, x), (following.alpha - level.alpha * ratio, old))
        kept["late.denoised"] = late


def _roots(pairs: Sequence[Tensor]) -> np.ndarray:
    """Statistics.root, by a QR decomposition: twice the digits that a Gram matrix would keep."""
    y, denoised = torch.stack([pair.cpu() for pair in pairs]).double().unbind(1)  # each [N+1, K, elements]
    v = torch.cat([y, denoised, torch.ones_like(y[:1])]).permute(1, 2, 0)         # [K, elements, M]
    upper = torch.linalg.qr(v, mode="r").R / math.sqrt(v.shape[1])
    return torch.nn.functional.pad(upper, (0, 0, 0, v.shape[2] - upper.shape[1])).numpy()
