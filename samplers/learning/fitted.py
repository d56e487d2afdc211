"""The fitted solver: nodes and weights for any number of evaluations, from statistics measured once.

The calibrating trajectories (y_i, D_i), y = x / alpha, are kept by their inner products alone
(Statistics.root): every multistep update is a linear combination of such tensors, so its local error on them
is a norm that needs no model. An error made at lam has shrunk to

    gamma(lam) = exp(-int_lam^end damping)

of itself at the end, with the damping measured on errors like a solver's own. Both choices start from
DPM-Solver-v3:

    nodes      minimise  sum_j gamma(lam_j)^2 |v3's error in step j|^2 e^(GRADED log(h_j / h_(j-1))^2)
               exactly, over all paths of n steps through the grid: steps whose lengths change little
               from one to the next
    weights    v3's own, each step's corrected as far as the correction holds on trajectories left out

The last step goes to x0 = D_0 + c (D_-1 - D_0), whatever y is: where the model knows the answer, as in what
inpainting keeps, so does the result. Without y it loses up to 3 % (rms, emoji model), with D_0 alone up to 6
%.

All of it is host arithmetic. What was measured on the way, and what did not help, is in docs/notes.md.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Sequence

import numpy as np

from ..integrand import DataPrediction, Evaluation, Stage, Update
from ..schedule import Level, Path, VarianceExploding, find_path, levels
from ..solver import LONG, SHORT_RUN, Step, ddim, finite
from .hypersolver import Hypersolver
from .statistics import SLACK, EmpiricalPrediction, Statistics, integral

REFINE = 2
"""Candidate nodes to each interval of the calibration's grid, and at least to each evaluation: 2 gave about 5
% less error than 1 on the emoji model."""
MOST = 50
"""Intervals between candidates, unless there are more evaluations: the search's time and memory grow with
the cube."""
POINTS = 16
"""Of the search's quadrature, to each interval between candidates."""
EVEN = 1e-12
"""Squared error that the search adds for a step of one candidate's length, and four times it for two: where
every choice is exact, as on a Gaussian, nodes are even."""
GRADED = 10.0
"""How much the search minds a step longer or shorter than the one before: a factor e^(GRADED log(ratio)^2) on
its squared error, 1.6 for a quarter longer, 122 for twice as long. The error of one step from exact values
says nothing of what a multistep method makes of values that are not: it multiplies their errors where the
length jumps (the classical bound of BDF2 is a ratio of 2.4). With a factor 1 lengths jumped eightfold, and
the runs erred 10 to 40 times as much as was predicted. rms and median against that, in docs/notes.md: two
thirds and 1.0 on exact Gaussians, 0.7 and 0.5 on exact digits; rms 0.85 on the emoji model without
guidance."""
NEAR = 1e-9
"""In lam: levels this close to one another are one."""


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
    error: the predicted rms at the end, to calibrating trajectories that the corrections were not fitted to.
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


def fit_multistep(calibration: Statistics, evaluations: int, *, order: int = 2, start: float | None = None,
                  end: float | None = None) -> Plan:
    """The best nodes for so many evaluations from lam = start to lam = end, and weights for them.

    start: the calibration's first level unless given; end: x0 unless given, else a lam at which noise is
    left.
    """
    return fit_weights(calibration, fit_nodes(calibration, evaluations, start, end), end, order)


def fit_nodes(calibration: Statistics, evaluations: int, start: float | None = None,
              end: float | None = None) -> list[float]:
    """The lam of those nodes alone."""
    check(calibration)
    if evaluations < 1:
        raise ValueError(f"evaluations = {evaluations} is out of range: choose a whole number >= 1")
    lam = _candidates(calibration, evaluations, start, end)
    nodes = range(evaluations) if evaluations >= MOST else _search(calibration, lam, evaluations, end
                                                                   is not None)
    return [float(lam[i]) for i in nodes]


def nodes_to(calibration: Statistics, evaluations: int, start: float, last: float) -> list[float]:
    """The best nodes of which the last is at lam = last."""
    return [*(fit_nodes(calibration, evaluations - 1, start, last) if evaluations > 1 else []), last]


def fit_weights(calibration: Statistics, nodes: Sequence[float], end: float | None = None,
                order: int = 2) -> Plan:
    """Weights for given nodes, in rising lam, by least squares over the calibrating trajectories.

    The features of a step are its y_s and the last `order` values of f (fewer in the last step above 0 if it
    is LONG), those of the last step D_-1 - D_0 alone (with order 1 none); the residual is v3's own. The
    correction is damped by a ridge rho = q / (1 - q) in units of the features' squares, with q the rms that
    an undamped fit leaves on trajectories that it was not fitted to, as a share of v3's: 0 where the fit
    explains everything, infinite (v3 itself) where it explains nothing. With a single trajectory nothing can
    be left out, and v3's weights are kept.
    """
    check(calibration)
    n = len(nodes)
    lam = np.array([*nodes, *([] if end is None else [end])], dtype=np.float64)
    y, denoised = _rows(calibration, lam)
    l = calibration.at("l", lam)  # noqa: E741
    f = (1.0 - l)[:, None] * y - denoised
    shrunk = _shrinking(calibration, lam, end)[1:]
    weights, total = [], 0.0
    orders = _orders(lam, order) if end is None else [order] * n
    for i, (decay, terms, bias) in enumerate(_v3(calibration, lam, orders)):
        residual = decay * y[i] + sum(c * f[i - k] for k, c in enumerate(terms)) - y[i + 1]
        residual[-1] += bias
        features = np.stack([y[i], f[i], *(f[i - k] - f[i] for k in range(1, min(orders[i], i + 1)))])
        c, error = _correction(calibration.root, features, residual)
        change = [c[1] - c[2:].sum(), *c[2:]]
        weights.append(Weights(float(decay + c[0]), tuple(
            float(w + dw) for w, dw in zip([*terms, *[0.0] * (len(change) - len(terms))], change)), bias))
        total += shrunk[i] ** 2 * error
    if end is None:
        feature, residual = denoised[max(n - 2, 0)] - denoised[-1:], denoised[-1] - _last(calibration)
        [c], error = _correction(calibration.root, feature, residual, wanted=order > 1)
        weights.append(Weights(0.0, (float(1.0 - c), float(c))[:n], 0.0))
        total += error
    return Plan(tuple(map(float, lam[:n])), math.inf if end is None else float(end), tuple(map(float, l[:n])),
                tuple(weights), math.sqrt(total))


def planned(calibration: Statistics, nodes: Sequence[float]) -> Plan:
    """v3's own steps of order 2 over given nodes, to x0."""
    lam = np.array(nodes, dtype=np.float64)
    return Plan(tuple(map(float, lam)), math.inf, tuple(map(float, calibration.at("l", lam))),
                (*_v3(calibration, lam, [2] * len(lam)), Weights(0.0, (1.0,), 0.0)), math.nan)


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

    With nodes "given" the schedule is kept; with "chosen" only its first and last level and the number of its
    intervals. A first level without a finite lam leads, by a step of infinite length, to the calibration's
    first.
    """

    calibration: Statistics
    order: int = 2
    nodes: Literal["given", "chosen"] = "given"

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        n = len(levels) - 1
        if n < 1:
            return []
        check(self.calibration)
        self.calibration.check_range(*filter(finite, levels))
        given = self.nodes == "given" or isinstance(self.calibration, Unmeasured)
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
            start, high = levels[0].lam, float(self.calibration.lam[-1])
            nodes = nodes_to(self.calibration.for_another_prompt(), n, start, learned.last(n, start, high))
            return [*opening, *learned.steps([*map(path.at, nodes), levels[-1]], path)]
        if refitted is not None:
            plan = Plan.read(refitted, self.calibration)
        elif given:
            plan = fit_weights(self.calibration, [level.lam for level in levels[:-1]], end, self.order)
        else:
            plan = fit_multistep(self.calibration, n, order=self.order, start=levels[0].lam, end=end)
        return [*opening, *plan.steps(path)]

    def learned(self, levels: Sequence[Level]) -> Hypersolver | None:
        """The calibration's hypersolver, if it serves so many evaluations, from wherever they begin to x0."""
        found, n = self.calibration.hypersolver, len(levels) - 1 - (not finite(levels[0]))
        return found if found and n in found.counts and self._fits(levels) else None

    def _fits(self, levels: Sequence[Level]) -> bool:
        """Whether a run is of the kind that is learned for: with chosen levels, to x0."""
        return self.order == 2 and self.nodes == "chosen" and not finite(levels[-1])

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
    steps = Fitted(calibration, nodes="chosen").steps(schedule, gaussian)
    return [*(step.evaluations[0].at.sigma for step in steps), 0.0]


class Unmeasured(Statistics):
    """Statistics to plan with before a model was measured: they choose no nodes, so a schedule stays as it
    is."""

    def __init__(self) -> None:
        grid = np.linspace(-40.0, 40.0, 5)
        flat = np.zeros_like(grid)
        super().__init__(grid, flat + 1.0, flat, flat, damping=flat, root=np.eye(2 * len(grid) + 1)[None])


def _candidates(calibration: Statistics, evaluations: int, start: float | None,
                end: float | None) -> np.ndarray:
    """Levels from start to end, spaced as the calibration's grid is; as many as are needed, if that is the
    more."""
    grid = calibration.lam
    low, high = grid[0] if start is None else start, grid[-1] if end is None else end
    if high - low < NEAR:
        return np.array([low])
    place = np.interp([low, high], grid, np.arange(len(grid)))
    intervals = max(min(math.ceil(REFINE * max(place[1] - place[0] - NEAR, evaluations)), MOST), evaluations)
    lam = np.interp(np.linspace(*place, intervals + 1), np.arange(len(grid)), grid)
    lam[[0, -1]] = low, high
    return lam


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


def _orders(lam: np.ndarray, order: int) -> list[int]:
    """The order of every step to the last level above 0: lower where that one is long, as in
    solver.Multistep."""
    left = range(len(lam) - 1, 0, -1)
    if len(lam) >= SHORT_RUN or len(lam) == 1:
        return [order] * len(left)
    return [min(order, k + (lam[-1] - lam[-2] <= LONG)) for k in left]


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


def _correction(root: np.ndarray, features: np.ndarray, residual: np.ndarray,
                wanted: bool = True) -> tuple[np.ndarray, float]:
    """Coefficients of the features to add to a step, and the squared error left on trajectories not fitted
    to."""
    design, target = root @ features.T, -(root @ residual)  # [K, M, features], [K, M]
    none = np.zeros(len(features)), float(np.square(target).sum(1).mean())
    if len(root) == 1 or none[1] == 0.0 or not wanted:
        return none
    q = math.sqrt(_left_out(design, target, 0.0) / none[1])
    if q >= 1.0:
        return none
    rho = q / (1.0 - q)
    return _ridge(design, target, rho), _left_out(design, target, rho)


def _left_out(design: np.ndarray, target: np.ndarray, rho: float) -> float:
    """The mean squared error on each trajectory of a fit to the others."""
    others = [_ridge(np.delete(design, k, 0), np.delete(target, k, 0), rho) for k in range(len(design))]
    return float(np.mean([np.square(a @ c - b).sum() for a, b, c in zip(design, target, others)]))


def _ridge(design: np.ndarray, target: np.ndarray, rho: float) -> np.ndarray:
    """c of the least |design c - target|^2 + rho sum_a |design_a|^2 c_a^2, over all trajectories."""
    a, b = design.reshape(-1, design.shape[-1]), target.ravel()
    scale = np.sqrt(np.square(a).sum(0))
    scale[scale == 0.0] = 1.0
    a = np.concatenate([a / scale, math.sqrt(rho) * np.eye(len(scale))])
    return np.linalg.lstsq(a, np.concatenate([b, np.zeros(len(scale))]), rcond=1e-12)[0] / scale


def _search(calibration: Statistics, lam: np.ndarray, n: int, to_end: bool) -> list[int]:
    """Which candidates the best path of n evaluations visits, by dynamic programming over pairs of
    neighbouring nodes."""
    at = np.arange(len(lam))
    cost = _costs(calibration, lam) * _jumps(lam) + EVEN * np.square(at - at[:, None])
    if to_end:
        cost_of_end = np.where(at == at[-1], 0.0, np.inf)
    else:
        off = (_rows(calibration, lam)[1] - _last(calibration)) @ _pooled(calibration).T
        cost_of_end = np.square(off).sum(1) + EVEN * np.square(len(lam) - at)
    best = np.full((len(lam), len(lam)), np.inf)  # [h, i]: of the paths that end in h, i
    best[0, 0] = 0.0
    before = []
    for _ in range(n if to_end else n - 1):
        total = best[:, :, None] + cost
        before.append(total.argmin(0))
        best = total.min(0)
    h, i = np.unravel_index((best + cost_of_end).argmin(), best.shape)
    path = [i]
    for previous in reversed(before):
        h, i = previous[h, i], h
        path.append(i)
    return [int(i) for i in path[::-1]][:n]


def _costs(calibration: Statistics, lam: np.ndarray) -> np.ndarray:
    """[h, i, j]: gamma_j^2 times the squared error of v3's step i -> j with h before it; h = i is the first
    step, from 0.

    v3's coefficients of order 2 (EmpiricalPrediction has the equations), for all triples at once by
    cumulative integrals.
    """
    m = len(lam)
    fine = np.append((lam[:-1, None] + np.diff(lam)[:, None] * np.arange(POINTS) / POINTS).ravel(), lam[-1])
    l, s, b = (calibration.at(name, fine) for name in ("l", "s", "b"))  # noqa: E741
    big_l, big_s = integral(fine, l), integral(fine, s)
    big_b, weight = integral(fine, np.exp(-big_s) * b), np.exp(big_l + big_s)
    m0, m1, mb = (integral(fine, weight * v)[::POINTS] for v in (np.ones_like(fine), fine, big_b))
    l, big_l, big_s, big_b = (v[::POINTS] for v in (l, big_l, big_s, big_b))  # noqa: E741
    h, i, j = np.nonzero((np.arange(m)[:, None, None] <= np.arange(m)[:, None])
                         & (np.arange(m)[:, None] < np.arange(m)))
    keep = (h < i) | (i == 0)
    h, i, j = h[keep], i[keep], j[keep]
    gap = np.where(h < i, lam[i] - lam[h], 1.0)
    zeroth = np.exp(-big_l[i] - big_s[i]) * (m0[j] - m0[i])
    first = np.exp(-big_l[i] - big_s[i]) * (m1[j] - m1[i]) - lam[i] * zeroth
    w_h = np.where(h < i, -first / gap, 0.0)
    decay = np.exp(big_l[i] - big_l[j])
    c_i, c_h = -decay * (zeroth - w_h), -decay * w_h * np.exp(big_s[i] - big_s[h])
    bias = decay * (w_h * np.exp(big_s[i]) * (big_b[h] - big_b[i])
                    - np.exp(-big_l[i]) * (mb[j] - mb[i] - big_b[i] * (m0[j] - m0[i])))
    root = _pooled(calibration)
    y, denoised = (rows @ root.T for rows in _rows(calibration, lam))
    f = (1.0 - l)[:, None] * y - denoised
    error = (decay[:, None] * y[i] + c_i[:, None] * f[i] + c_h[:, None] * f[h] + bias[:, None] * root[:, -1] -
             y[j])
    cost = np.full((m, m, m), np.inf)
    cost[h, i, j] = _shrinking(calibration, lam, lam[-1])[j] ** 2 * np.square(error).sum(1)
    return cost


def _jumps(lam: np.ndarray) -> np.ndarray:
    """[h, i, j]: by how much the cost of a step i -> j grows because it is not as long as h -> i; 1 for a
    first step, h = i."""
    apart = lam - lam[:, None]
    length = np.log(np.where(apart > 0.0, apart, 1.0))
    return np.where(apart[:, :, None] > 0.0, np.exp(GRADED * np.square(length - length[:, :, None])), 1.0)


def _pooled(calibration: Statistics) -> np.ndarray:
    """One root for the mean over the trajectories, [M, M]."""
    return np.linalg.qr(calibration.root.reshape(-1, calibration.root.shape[2]), mode="r") / math.sqrt(
        len(calibration.root))
