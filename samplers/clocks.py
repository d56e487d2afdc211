"""Where the levels of a schedule fall: at even distances on a clock.

A clock is a number that falls or rises with the level all the way. With c(level) the clock, n levels from
`start` to `end` have

    c_i^(1/rho) = c_start^(1/rho) + i / (n - 1) (c_end^(1/rho) - c_start^(1/rho)),   i = 0 .. n - 1

    clock      rho    c                                        who
    lambda     1      lam                                      Lu et al. 2022 (arXiv:2206.00927), section 3.4
    sigma      7      sigma / alpha                            Karras et al. 2022 (arXiv:2206.00364), eq. (5)
    t          1, 2   place in the model's table of levels     Song et al. 2021 (arXiv:2010.02502), app. D.2
    linear     1, 2   t of  log alpha = - 19.9 t^2 / 4 - t / 20     Song et al. 2021 (arXiv:2011.13456)
    cosine     1, 2   t of  alpha ~ cos((t + s) / (1 + s) pi / 2)   Nichol & Dhariwal 2021 (arXiv:2102.09672)
"""
from __future__ import annotations

import math
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np

from .schedule import Level, Path

BETA_0, BETA_1 = 0.1, 20.0
OFFSET = 0.008  # s of the cosine schedule


class Clock(NamedTuple):
    """What a clock shows at a level, not finite where it shows nothing, and the level where it shows that."""

    of: Callable[[Level], float]
    level: Callable[[float], Level]


def table(path: Path, sigmas: Sequence[float]) -> Clock:
    """t = k / N at the k-th lowest of N levels, and linear in log(sigma) between them, as in ComfyUI.

    ValueError for levels beyond the table.
    """
    known = np.log(np.sort(np.asarray(sigmas, dtype=np.float64)))
    times = np.arange(1, len(known) + 1) / len(known)

    def of(level: Level) -> float:
        if not known[0] - 1e-6 <= math.log(level.sigma) <= known[-1] + 1e-6:
            raise ValueError(f"sigma = {level.sigma:.6g} is beyond the model's levels, which are from "
                             f"{math.exp(known[0]):.6g} to {math.exp(known[-1]):.6g}: choose one of them, or "
                             "another clock than t")
        return float(np.interp(math.log(level.sigma), known, times))

    return Clock(of, lambda t: path.level(math.exp(np.interp(t, times, known))))


def linear(path: Path, sigmas: Sequence[float]) -> Clock:
    slope = BETA_1 - BETA_0

    def of(level: Level) -> float:
        decay = 0.5 * math.log1p(math.exp(-2.0 * level.lam))  # - log alpha of a VP state
        return 4.0 * decay / (BETA_0 + math.sqrt(BETA_0**2 + 4.0 * slope * decay))

    return Clock(of, lambda t: path.at(-0.5 * math.log(math.expm1(t * (0.5 * slope * t + BETA_0)))))


def cosine(path: Path, sigmas: Sequence[float]) -> Clock:
    full = math.cos(OFFSET / (1.0 + OFFSET) * math.pi / 2.0)

    def of(level: Level) -> float:
        alpha = 1.0 / math.sqrt(1.0 + math.exp(-2.0 * level.lam))
        return math.acos(alpha * full) * 2.0 * (1.0 + OFFSET) / math.pi - OFFSET

    def level(t: float) -> Level:
        alpha = math.cos((t + OFFSET) / (1.0 + OFFSET) * math.pi / 2.0) / full
        return path.at(math.log(alpha) - 0.5 * math.log((1.0 - alpha) * (1.0 + alpha)))

    return Clock(of, level)


CLOCKS: Mapping[str, Callable[[Path, Sequence[float]], Clock]] = {
    "lambda": lambda path, sigmas: Clock(lambda level: level.lam, path.at),
    "sigma": lambda path, sigmas: Clock(lambda level: math.exp(-level.lam), lambda c: path.at(-math.log(c))),
    "t": table, "linear": linear, "cosine": cosine,
}
"""By name, of a path and the model's own levels."""


def evenly(start: Level, end: Level, n: int, clock: Clock, rho: float = 1.0) -> list[Level]:
    """n levels from start to end, both among them (n = 1: the start).

    A start where the clock shows nothing (sigma = 1 of a flow) has no even distance to anything: ValueError.
    """
    ends = [clock.of(level) for level in (start, end)]
    if not all(map(math.isfinite, ends)):
        raise ValueError(f"the clock goes from {ends[0]:g} to {ends[1]:g} between sigma = {start.sigma:g} "
                         f"and {end.sigma:g}: begin and end between pure noise and 0")
    if rho != 1.0 and min(ends) < 0.0:
        raise ValueError(f"rho = {rho:g} is out of range for a clock that shows {min(ends):.3g}: set rho to "
                         "1, or choose the clock sigma or t")
    first, last = (c if rho == 1.0 else c ** (1.0 / rho) for c in ends)
    inner = [first + (last - first) * i / (n - 1) for i in range(1, n - 1)]
    return [start, *(clock.level(u if rho == 1.0 else u**rho) for u in inner), end][:n]
