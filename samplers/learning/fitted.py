"""The fitted solver: levels and weights for any number of evaluations, from statistics measured once.

The calibrating trajectories (y_i, D_i), y = x / alpha, are kept by their inner products alone
(Statistics.root): every multistep update is a linear combination of such tensors, so what it misses on them,
e, is known without a model. So is where a run ends that is off by d at its levels: its f is off by kappa d,
and

    d_(i+1) = decay d_i + sum_k terms[k] kappa_(i-k) d_(i-k) + e_i,        kappa = damping - l

so that in short steps d dies out with the damping that was measured, on errors like a solver's own. Both
choices start from DPM-Solver-v3:

    levels     even in lam or in (sigma / alpha)^(1 / rho). The last one and then rho are chosen of a few, for
               the least  |d at x0|^2 + CHANCE^2 sum_j gamma_j^2 |e_j|^2,  gamma_j what is left of an error at
               lam_j in the end: exp(-int_(lam_j) damping)
    weights    v3's own with one more value of f, each step's corrected as far as the correction holds on
               trajectories left out

The last step goes to x0 = D_0 + c (D_-1 - D_0), whatever y is: where the model knows the answer, as in what
inpainting keeps, so does the result. Without y it loses up to 3 % (rms, emoji model), with D_0 alone up to 6
%.

All of it is host arithmetic. What was measured on the way, and what did not help, is in docs/notes.md.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Iterable, NamedTuple, Sequence

import numpy as np

from ..clocks import CLOCKS, evenly
from ..integrand import DataPrediction, Evaluation, Stage, Update
from ..schedule import Level, Path, VarianceExploding, find_path, levels
from ..solver import LONG, SHORT_RUN, Step, ddim, finite
from .hypersolver import Hypersolver, spaced
from .statistics import SLACK, EmpiricalPrediction, Statistics, integral
from .storage import digest

ORDER = 2
"""Of v3's steps. Of order 3 they err more (docs/notes.md)."""
EVEN = ("lambda", 1.0), ("sigma", 12.0), ("sigma", 7.0)
"""Clocks, and their rho, on which levels are even (clocks.CLOCKS)."""
HIGHEST = 0.7
"""Of the way from the model's lowest level back to the run's first, in lam: where the last evaluation is at
most."""
PLACES = 11
"""Levels that are tried for it."""
SHORTEST = 1e-3
"""In lam: a run to x0 of several evaluations, from wherever it begins, goes as far at least."""
CHANCE = 0.4
"""The share of what each step misses that does not add up with its sign, as the calibrating trajectories say,
but by chance, on others."""
LEAST = 1e-5
"""Of the ridge: a step that is explained but for rounding must not have weights that rounding decides."""


class Weights(NamedTuple):
    """One step in y = x / alpha:  y_t = decay y_s + sum_k terms[k] f_(s-k) + bias,  f = (1 - l) y - D.

    The last step, to x0, is sum_k terms[k] D_(s-k), of at most two terms whose sum is 1; its decay and bias
    are 0.
    """

    decay: float
    terms: tuple[float, ...]
    bias: float


@dataclass(frozen=True)
class Plan:
    """A run of the fitted solver: where the model is asked, each step's weights, and the error to expect.

    lam [n]: the nodes, rising; end: where the last step arrives, inf for x0. l [n]: the curve l at the nodes.
    error: the rms at the end that is to be expected, as the levels are chosen by it (above).
    """

    lam: tuple[float, ...]
    end: float
    l: tuple[float, ...]  # noqa: E741
    weights: tuple[Weights, ...]
    error: float

    @classmethod
    def read(cls, rows: np.ndarray, calibration: Statistics) -> Plan:
        """The plan, to x0, that `rows` was made of."""
        weights = tuple(
            Weights(decay, tuple(terms[:i + 1]), bias)
            for i, (_, decay, *terms, bias) in enumerate(rows.tolist()))
        return cls(tuple(rows[:, 0].tolist()), math.inf, tuple(map(float, calibration.at("l", rows[:, 0]))),
                   weights, math.nan)

    def rows(self) -> np.ndarray:
        """[n, 3 + order]: lam, decay, the terms and bias of every step."""
        order = max(len(w.terms) for w in self.weights)
        return np.array([[lam, w.decay, *w.terms, *[0.0] * (order - len(w.terms)), w.bias]
                         for lam, w in zip(self.lam, self.weights)])

    def steps(self, path: Path) -> list[Step]:
        """The plan as steps of the loop, on any path."""
        at = [path.at(lam) for lam in self.lam]
        arrivals = [*at[1:], path.at(self.end) if math.isfinite(self.end) else path.level(0.0)]
        return [self._step(i, s, t) for i, (s, t) in enumerate(zip(at, arrivals))]

    def _step(self, i: int, s: Level, t: Level) -> Step:
        """What is kept of an evaluation is f; but D of the last two, where the last step takes D."""
        (decay, terms, bias), l, last = self.weights[i], self.l[i], len(self.lam) - 1  # noqa: E741
        if math.isfinite(self.end) or i < last - 1:
            evaluation = Evaluation(s, (1.0 - l) / s.alpha, -1.0)
        else:
            evaluation = Evaluation(s, 0.0, 1.0)
            if i < last:  # its own f, from y and D
                decay, terms = decay + (1.0 - l) * terms[0], (-terms[0], *terms[1:])
        terms = tuple((-k, t.alpha * c) for k, c in enumerate(terms))
        return Step((evaluation,), (Update(t, t.alpha * decay / s.alpha, terms, t.alpha * bias),))


def fit_multistep(calibration: Statistics, evaluations: int, *, start: float | None = None,
                  end: float | None = None) -> Plan:
    """The best levels for so many evaluations from lam = start to lam = end, and weights for them.

    start: the calibration's first level unless given; end: x0 unless given, else a lam at which noise is
    left. It takes some tenths of a second, so the last plans are kept.
    """
    check(calibration)
    if evaluations < 1:
        raise ValueError(f"evaluations = {evaluations} is out of range: choose a whole number >= 1")
    low, high = (float(usual if given is None else given)
                 for given, usual in zip((start, end), calibration.lam[[0, -1]]))
    return _chosen(Numbers(calibration, digest(calibration.arrays())), evaluations, low, high, end)


@dataclass(frozen=True)
class Numbers:
    """Statistics, equal to others of the same numbers."""

    calibration: Statistics = field(compare=False)
    digest: str


@lru_cache(64)
def _chosen(numbers: Numbers, evaluations: int, low: float, high: float, end: float | None) -> Plan:
    """Of a few even spacings the one that is expected to err least."""
    calibration = numbers.calibration
    many = evaluations + (end is not None)

    def best(choices: Iterable[tuple[str, float, float]]) -> Plan:
        return min((fit_weights(calibration, _even(low, last, many, clock, rho)[:evaluations], end)
                    for clock, rho, last in choices), key=lambda plan: plan.error)

    if end is not None or evaluations == 1:
        return best((*even, high) for even in EVEN)
    high = max(high, low + SHORTEST)
    lasts = high - (high - low) * np.linspace(0.0, HIGHEST, PLACES)
    found = best((*EVEN[-1], last) for last in lasts.tolist())
    return min(found, best((*even, found.lam[-1]) for even in EVEN[:-1]), key=lambda plan: plan.error)


def _even(low: float, high: float, n: int, clock: str, rho: float) -> list[float]:
    """n values of lam from low to high."""
    path = VarianceExploding()
    return [level.lam for level in evenly(path.at(low), path.at(high), n, CLOCKS[clock](path, ()), rho)]


def fit_weights(calibration: Statistics, nodes: Sequence[float], end: float | None = None) -> Plan:
    """Weights for given nodes, in rising lam, by least squares over the calibrating trajectories.

    The features of a step are its y_s and the last ORDER + 1 values of f, one more than v3's own step has
    (and of those it has fewer in the last step above 0 if it is LONG); that of the last step is D_-1 - D_0
    alone. The residual is v3's own. The correction is damped by a ridge
    rho = q / (1 - q), at least LEAST, in units of the features' squares, with q the rms that an undamped fit
    leaves on trajectories that it was not fitted to, as a share of v3's: near 0 where the fit explains
    everything, infinite (v3 itself) where it explains nothing. With a single trajectory nothing can be left
    out, and v3's weights are kept.
    """
    check(calibration)
    n = len(nodes)
    lam = np.array([*nodes, *([] if end is None else [end])], dtype=np.float64)
    y, denoised = _rows(calibration, lam)
    l = calibration.at("l", lam)  # noqa: E741
    f = (1.0 - l)[:, None] * y - denoised
    off, damping = np.zeros((len(lam), y.shape[1])), np.interp(lam, calibration.lam, calibration.damping)
    shrunk = _shrinking(calibration, lam, end)[1:]
    weights, missed = [], 0.0
    orders = _orders(lam) if end is None else [ORDER] * n
    for i, (decay, terms, bias) in enumerate(_v3(calibration, lam, orders)):
        own = decay * y[i] + sum(c * f[i - k] for k, c in enumerate(terms)) - y[i + 1]
        own[-1] += bias
        features = np.stack([y[i], f[i], *(f[i - k] - f[i] for k in range(1, min(orders[i], i) + 1))])
        c, error = _correction(calibration.root, features, own)
        change = [c[1] - c[2:].sum(), *c[2:]]
        decay += c[0]
        terms = [w + dw for w, dw in zip([*terms, *[0.0] * (len(change) - len(terms))], change)]
        off[i + 1] = own + c @ features + decay * off[i] + sum(
            w * (damping - l)[i - k] * off[i - k] for k, w in enumerate(terms))
        missed += shrunk[i] ** 2 * error
        weights.append(Weights(float(decay), tuple(map(float, terms)), bias))
    arrived = off[-1]
    if end is None:
        before, x0 = max(n - 2, 0), _last(calibration)
        feature, residual = denoised[before] - denoised[-1:], denoised[-1] - x0
        [c], error = _correction(calibration.root, feature, residual)
        weights.append(Weights(0.0, (float(1.0 - c), float(c))[:n], 0.0))
        seen = denoised + (1.0 - damping)[:, None] * off
        arrived = seen[-1] + c * (seen[before] - seen[-1]) - x0
        missed += error
    error = math.sqrt(np.square(calibration.root @ arrived).sum(1).mean() + CHANCE**2 * missed)
    return Plan(tuple(map(float, lam[:n])), math.inf if end is None else float(end), tuple(map(float, l[:n])),
                tuple(weights), error)


def planned(calibration: Statistics, nodes: Sequence[float]) -> Plan:
    """v3's own steps over given nodes, to x0."""
    lam = np.array(nodes, dtype=np.float64)
    return Plan(tuple(map(float, lam)), math.inf, tuple(map(float, calibration.at("l", lam))),
                (*_v3(calibration, lam, [ORDER] * len(lam)), Weights(0.0, (1.0,), 0.0)), math.nan)


def check(calibration: Statistics) -> None:
    """ValueError if the statistics were measured without what a fit needs."""
    if calibration.root is None or calibration.damping is None:
        raise ValueError(
            "these statistics serve DPM-Solver-v3 only: they lack the inner products and the damping that "
            "the fitted solver needs; measure again with fitted on (Measure Model, or "
            "estimate_statistics(fitted=True))")


@dataclass(frozen=True)
class Fitted:
    """DPM-Solver-v3 with fitted nodes and weights; one evaluation a step.

    Levels that are `chosen` keep of a schedule the first and the last one and the number of intervals. A
    first level without a finite lam leads, by a step of infinite length, to the calibration's
    first.
    """

    calibration: Statistics
    chosen: bool = True

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        n = len(levels) - 1
        if n < 1:
            return []
        check(self.calibration)
        self.calibration.check_range(*filter(finite, levels))
        given = not self.chosen or isinstance(self.calibration, Unmeasured)
        refitted, learned = self.refitted(levels), self.learned(levels)
        end = levels[-1].lam if finite(levels[-1]) else None
        opening = []
        if not finite(levels[0]):
            first = levels[1] if given else path.at(float(self.calibration.lam[0]))
            opening = [ddim(DataPrediction(), levels[0], first if n > 1 else levels[-1])]
            levels, n = [first, *levels[2 if given else 1:]], n - 1
            if n == 0:
                return opening
        if learned:
            last = learned.last(n, levels[0].lam, float(self.calibration.lam[-1]))
            return [*opening, *learned.steps(spaced(levels[0], path.at(last), n, path), path)]
        if refitted is not None:
            plan = Plan.read(refitted, self.calibration)
        elif given:
            plan = fit_weights(self.calibration, [level.lam for level in levels[:-1]], end)
        else:
            plan = fit_multistep(self.calibration, n, start=levels[0].lam, end=end)
        return [*opening, *plan.steps(path)]

    def learned(self, levels: Sequence[Level]) -> Hypersolver | None:
        """The calibration's hypersolver, if it serves so many evaluations, from wherever they begin to x0."""
        found, n = self.calibration.hypersolver, len(levels) - 1 - (not finite(levels[0]))
        return found if found and n in found.counts and self._fits(levels) else None

    def _fits(self, levels: Sequence[Level]) -> bool:
        """Whether a run is of the kind that is learned for: with chosen levels, to x0."""
        return self.chosen and not finite(levels[-1])

    def refitted(self, levels: Sequence[Level]) -> np.ndarray | None:
        """The calibration's plan that was learned for such a run: of as many evaluations, from full noise
        to x0."""
        full = not finite(levels[0])
        rows = self.calibration.plans.get(len(levels) - 1 - full)
        fits = rows is not None and self._fits(levels)
        return rows if fits and (full or abs(levels[0].lam - rows[0, 0]) <= SLACK) else None


def fitted_sigmas(calibration: Statistics, evaluations: int, start: float, path: str = "ve") -> list[float]:
    """The nodes chosen for so many evaluations from sigma = start to 0, as a schedule for any solver:
    evaluations + 1 sigmas."""
    if evaluations < 1:
        raise ValueError(f"evaluations = {evaluations} is out of range: choose a whole number >= 1")
    gaussian = find_path(path)
    first = gaussian.level(start)
    inside = np.linspace(first.lam if finite(first) else calibration.lam[0], calibration.lam[-1],
                         evaluations)[finite(first):]
    schedule = levels([start, *(gaussian.at(lam).sigma for lam in inside[:evaluations - 1].tolist()), 0.0],
                      gaussian)
    steps = Fitted(calibration).steps(schedule, gaussian)
    return [*(step.evaluations[0].at.sigma for step in steps), 0.0]


class Unmeasured(Statistics):
    """Statistics to plan with before a model was measured: they choose no nodes, so a schedule stays as it
    is."""

    def __init__(self) -> None:
        grid = np.linspace(-40.0, 40.0, 5)
        flat = np.zeros_like(grid)
        super().__init__(grid, flat + 1.0, flat, flat, damping=flat, root=np.eye(2 * len(grid) + 1)[None])


def _rows(calibration: Statistics, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and D at lam as combinations of root's columns, [len(lam), M] each: cubic in lam through the four
    nearest grid points."""
    grid = calibration.lam
    first = np.clip(np.searchsorted(grid, lam) - 2, 0, len(grid) - 4)
    at = first[:, None] + np.arange(4)
    gap = lam[:, None] - grid[at]
    basis = np.stack([
        np.prod([gap[:, j] / (grid[at[:, k]] - grid[at[:, j]]) for j in range(4) if j != k], axis=0)
        for k in range(4)
    ], axis=1)
    y, denoised = np.zeros((2, len(lam), calibration.root.shape[2]))
    np.put_along_axis(y, at, basis, axis=1)
    np.put_along_axis(denoised, len(grid) + at, basis, axis=1)
    return y, denoised


def _last(calibration: Statistics) -> np.ndarray:
    """x0, which the trajectories' last denoised image stands for."""
    return np.eye(calibration.root.shape[2])[2 * len(calibration.lam) - 1]


def _shrinking(calibration: Statistics, lam: np.ndarray, end: float | None) -> np.ndarray:
    """gamma of errors at lam: what is left of them at `end`, or else at the end of the trajectories."""
    grid = calibration.lam
    total = integral(grid, calibration.damping)
    return np.exp(np.interp(lam, grid, total) - np.interp(grid[-1] if end is None else end, grid, total))


def _orders(lam: np.ndarray) -> list[int]:
    """The order of every step to the last level above 0: lower where that one is long, as in
    solver.Multistep."""
    left = range(len(lam) - 1, 0, -1)
    if len(lam) >= SHORT_RUN or len(lam) == 1:
        return [ORDER] * len(left)
    return [min(ORDER, k + (lam[-1] - lam[-2] <= LONG)) for k in left]


def _v3(calibration: Statistics, lam: np.ndarray, orders: Sequence[int]) -> list[Weights]:
    """DPM-Solver-v3's steps of these orders from each level to the next."""
    integrand, ve = EmpiricalPrediction(calibration), VarianceExploding()
    at = [ve.at(float(v)) for v in lam]
    result = []
    for i in range(len(lam) - 1):
        past = {-k: at[i - k] for k in range(min(orders[i], i + 1))}
        update = integrand.update(at[i], at[i + 1], Stage(tuple(past)), past)
        result.append(Weights(update.decay, tuple(c for _, c in update.terms), float(update.bias)))
    return result


def _correction(root: np.ndarray, features: np.ndarray, residual: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of the features to add to a step, and the squared error left on trajectories not fitted
    to."""
    rows = np.linalg.qr(root @ np.stack([*features, -residual]).T, mode="r")
    design, target = rows[..., :-1], rows[..., -1]
    none = np.zeros(len(features)), float(np.square(target).sum(1).mean())
    if len(root) == 1 or none[1] == 0.0:
        return none
    q = math.sqrt(_left_out(design, target, 0.0) / none[1])
    if q >= 1.0:
        return none
    rho = max(q / (1.0 - q), LEAST)
    return _ridge(design.reshape(-1, len(features)), target.ravel(), rho), _left_out(design, target, rho)


def _left_out(design: np.ndarray, target: np.ndarray, rho: float) -> float:
    """The mean squared error on each trajectory of a fit to the others."""
    count = len(design)
    others = np.array([[k for k in range(count) if k != left] for left in range(count)])
    c = _ridge(design[others].reshape(count, -1, design.shape[-1]), target[others].reshape(count, -1), rho)
    return float(np.square((design @ c[..., None])[..., 0] - target).sum(1).mean())


def _ridge(a: np.ndarray, b: np.ndarray, rho: float) -> np.ndarray:
    """c of the least |a c - b|^2 + rho sum_k |a_k|^2 c_k^2, a_k the columns of a; of each of a batch."""
    scale = np.sqrt(np.square(a).sum(-2, keepdims=True))
    scale[scale == 0.0] = 1.0
    damped = np.broadcast_to(math.sqrt(rho) * np.eye(a.shape[-1]), (*a.shape[:-2], *a.shape[-1:] * 2))
    inverse = np.linalg.pinv(np.concatenate([a / scale, damped], -2), rcond=1e-12)[..., :a.shape[-2]]
    return (inverse @ b[..., None])[..., 0] / scale[..., 0, :]
