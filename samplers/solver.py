"""Solvers as data: which evaluations each step uses, and the finished coefficients of every step.

A solver turns the levels of a schedule into a list of Steps before anything is evaluated. A Step names its
evaluations by number: 0 is the one at its start, 1, 2, ... are its own inner ones in order, -1, -2, ... those
of the steps before, latest first. So a multistep method is a stage that uses (0, -1, -2), a singlestep method
a row of stages with inner levels:

    Multistep of order 3    s_-2 ---- s_-1 ---- s -------> t        Stage((0, -1, -2))
    DPM_3S                                      s --o--o-> t        Stage((0,)), Stage((0, 1)), Stage((0, 2))
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Callable, Iterator, Literal, Mapping, NamedTuple, Protocol, Sequence

import numpy as np
from scipy.integrate import RK45
from torch import Tensor

from .integrand import DataPrediction, Evaluation, Integrand, Span, Stage, Update
from .phi import Basis, Rule, midpoint, taylor, trapezoid, weights
from .schedule import Level, Path, VarianceExploding, largest


class Residual(Protocol):
    """What a step misses, told by what it saw: to add to x at t, of x at s and the values it uses that are
    there."""

    uses: tuple[int, ...]  # numbers of evaluations, its own first

    def placed(self, x: Tensor) -> Residual:
        """On x's device; ValueError if it is not of such latents."""

    def __call__(self, x: Tensor, values: Sequence[Tensor]) -> Tensor: ...


class Step(NamedTuple):
    """One step of a run: evaluation k, then update k, and so on; the last update arrives at t.

    A correction goes from the x that arrived at t, noise and all, to that of the same step with the
    evaluation at t among its nodes: the next step's first, numbered after the step's own. A step with a plan
    is replaced by what plan(x, before) returns after its first evaluation, when that depends on what the
    model said; `before` is the step taken before it, and `told` what the plan of that one has to tell it.
    What it missed is added at t.
    """

    evaluations: tuple[Evaluation, ...]
    updates: tuple[Update, ...]
    # how many of the schedule's intervals it covers; its inner levels are then the schedule's own
    intervals: int = 1
    correction: Update | None = None
    plan: Callable[[Tensor, Step | None], Step] | None = None
    told: tuple = ()
    missed: Residual | None = None

    @property
    def s(self) -> Level:
        return self.evaluations[0].at

    @property
    def t(self) -> Level:
        return self.updates[-1].to

    @property
    def noisy(self) -> bool:
        return any(update.noise for update in self.updates)

    @property
    def lookback(self) -> int:
        """How many evaluations from before it, and from before the one that corrects it, are needed."""
        corrected = self.correction.terms if self.correction else ()
        return max(0, *(-k for update in self.updates for k, _ in update.terms),
                   *(len(self.evaluations) - k for k, _ in corrected),
                   *(-k for k in (self.missed.uses if self.missed else ())))


class Tableau(NamedTuple):
    """A singlestep method: stage i lands on s + c_i h, the last one on t."""

    c: tuple[float, ...]
    stages: tuple[Stage, ...]
    embedded: Stage | None = None  # a lower order from the same evaluations, for the error estimate


ORDER_1 = Tableau((), (Stage((0,)),))
DPM_2S = Tableau((1 / 2,), (Stage((0,)), Stage((0, 1), midpoint)), embedded=Stage((0,)))
DPM_3S = Tableau((1 / 3, 2 / 3), (Stage((0, )), Stage((0, 1)), Stage((0, 2))), embedded=Stage((0, 1),
                                                                                              midpoint))
DPM_2S_TAYLOR = Tableau((1 / 2,), (Stage((0,)), Stage((0, 1))), embedded=Stage((0,)))
DPM_3S_TAYLOR = Tableau((1 / 3, 2 / 3), (Stage((0, )), Stage((0, 1)), Stage((0, 1, 2))), embedded=Stage(
    (0, 1)))

TABLEAUX: Mapping[tuple[int, str], Tableau] = {
    (1, "midpoint"): ORDER_1, (2, "midpoint"): DPM_2S, (3, "midpoint"): DPM_3S,
    (1, "taylor"): ORDER_1, (2, "taylor"): DPM_2S_TAYLOR, (3, "taylor"): DPM_3S_TAYLOR,
}
"""Lu et al. 2022 (arXiv:2206.00927), Algorithms 1-2, and 2022b (arXiv:2211.01095), Algorithm 1; "taylor"
takes the polynomial through all evaluations where the published methods take a difference quotient."""


HEUN = Tableau((1.0,), (Stage((0,)), Stage((0, 1), basis=trapezoid)))
"""Heun's method in sigma: the mean of eps at both ends. Karras et al. 2022 (arXiv:2206.00364), Algorithm
1."""


def step(integrand: Integrand, nodes: Sequence[Level], stages: Sequence[Stage], past: Sequence[Level] = (),
         intervals: int = 1, corrector: Stage | None = None) -> Step:
    """The step over nodes = (s, inner levels ..., t); past are the levels at the starts of earlier steps,
    latest first."""
    s, at = nodes[0], _numbered(nodes, past)
    updates = tuple(integrand.update(s, to, stage, at) for to, stage in zip(nodes[1:], stages))
    return Step(tuple(integrand.evaluation(level) for level in nodes[:-1]), updates, intervals,
                corrector and _change(updates[-1], integrand.update(s, nodes[-1], corrector, at)))


def _change(made: Update, better: Update) -> Update:
    """From the x of one update to that of another of the same step.

    Their decay and their noise are the same, and stay in x: as in SA-Solver (Xue et al. 2023,
    arXiv:2309.05019), whose corrector adds the noise of its predictor again.
    """
    change = dict(better.terms)
    for k, c in made.terms:
        change[k] = change.get(k, 0.0) - c
    return Update(made.to, 1.0, tuple(change.items()), better.bias - made.bias)


def _numbered(nodes: Sequence[Level], past: Sequence[Level]) -> dict[int, Level]:
    return {**dict(enumerate(nodes)), **{-k: level for k, level in enumerate(past, 1)}}


def joined(first: Step, second: Step) -> Step:
    """Two steps as one: the inner evaluation is that of the second, and its update goes on from the
    first's."""
    terms = tuple((k + 1, c) for k, c in second.updates[0].terms)
    return first._replace(evaluations=first.evaluations + second.evaluations,
                          updates=first.updates + (second.updates[0]._replace(terms=terms, chained=True),))


def ddim(integrand: Integrand, s: Level, t: Level) -> Step:
    """The first-order step in data prediction, which stays finite from lam = -inf and to lam = +inf."""
    flow = integrand if isinstance(integrand, DataPrediction) else DataPrediction()
    return step(flow, (s, t), ORDER_1.stages)


CLEAN = 2.0
"""sigma / alpha = 0.135. Without the lower order a last long step to there spoils a run: on exact digits,
time-uniform steps to sigma 0.03, the error of v3 was 0.68 without and 0.05 with it, that of 2M 0.18 and
0.07."""

SHORT_RUN, LONG = 15, 1.7
"""Steps of a run that still lowers its order, as the authors advise; and from what length in lambda, a factor
5.5 in sigma / alpha, the last step is of order 1. Figures in docs/notes.md."""

CORRECTOR_HALF = -0.5
"""Where the time of the usual models is 1/2: lam = -0.48 for Stable Diffusion (sigma 1.62), 0 for
unshifted flow."""


def finite(*ends: Level) -> bool:
    return all(math.isfinite(largest(end.lam)) for end in ends)


@dataclass(frozen=True)
class Multistep:
    """Adams methods in lam: the polynomial through the last `order` evaluations; one evaluation a step.

    The order rises from 1 at the start. With lower_order_final it falls again towards the end: "on" to 1 in
    the last step of finite length; "auto" to 1 there if that step is LONG, else to 2, in runs of fewer than
    SHORT_RUN steps that end clean, lam > CLEAN: to sigma = 0, or to the model's lowest sigma. Runs that stop
    before go on elsewhere, as with leftover noise, and nothing ends there. What was said earlier holds for a
    long way with a model that has not made up its mind, and near the end it has: there the polynomial through
    earlier answers goes astray, the farther the step goes.

    A corrector repeats every step s -> t with the evaluation at t among its nodes s, t, s_-1, ..., at no
    further model call; it has corrector_extra nodes more than the predictor. "half" keeps it to lam >=
    CORRECTOR_HALF. UniC, Zhao et al. 2023 (arXiv:2302.04867), section 3.
    """

    integrand: Integrand
    order: int
    rule: Rule = taylor
    lower_order_final: Literal["auto", "on", "off"] = "auto"
    basis: Basis = weights
    corrector: Literal["off", "full", "half"] = "off"
    corrector_rule: Rule = taylor
    corrector_basis: Basis = weights
    corrector_extra: int = 1

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        return [self.step(levels, i) for i in range(len(levels) - 1)]

    def step(self, levels: Sequence[Level], i: int) -> Step:
        """Interval i of the schedule."""
        n, (s, t) = len(levels) - 1, levels[i:i + 2]
        if not finite(s, t):
            return ddim(self.integrand, s, t)
        # lam = -inf carries no slope
        past = [level for level in reversed(levels[max(0, i + 1 - self.order):i]) if finite(level)]
        order = min(self.order, 1 + len(past), self._highest(levels, i))
        predictor = Stage(tuple(range(0, -order, -1)), self.rule, self.basis)
        corrector = Stage((0, 1, *range(-1, -order, -1))[:order + self.corrector_extra],
                          self.corrector_rule, self.corrector_basis)
        corrects = i + 1 < n and finite(levels[i + 2]) and 1 in corrector.uses and (
            self.corrector == "full" or (self.corrector == "half" and t.lam >= CORRECTOR_HALF))
        return step(self.integrand, (s, t), (predictor, ), past[:order - 1],
                    corrector=corrector if corrects else None)

    def _highest(self, levels: Sequence[Level], i: int) -> int:
        """The highest order that lower_order_final leaves to interval i."""
        n = len(levels) - 1
        last = n - 1 if finite(levels[n]) else n - 2  # the last interval of finite length
        if self.lower_order_final == "on":
            return last - i + 1
        if self.lower_order_final == "off" or n >= SHORT_RUN or levels[n].lam <= CLEAN:
            return self.order
        # the longest of a batch sets it for all
        return last - i + 1 + (largest(levels[last + 1].lam - levels[last].lam) <= LONG)


@dataclass(frozen=True)
class Singlestep:
    """One tableau on every interval of the schedule, its inner levels between the schedule's own."""

    integrand: Integrand
    tableau: Tableau

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        return [
            self.step(s, t, path) if finite(s, t) else ddim(self.integrand, s, t) for s, t in pairwise(levels)
        ]

    def step(self, s: Level, t: Level, path: Path) -> Step:
        h = t.lam - s.lam
        inner = [t if c == 1.0 else path.at(s.lam + c * h) for c in self.tableau.c]
        return step(self.integrand, (s, *inner, t), self.tableau.stages)


CLOCK = 16.0  # noise is drawn over lam in -CLOCK .. CLOCK: sigma from 9e6 to 1e-7


def ticks(n: int) -> list[Span]:
    """n equal spans of the Brownian path, for noise that is of no stretch of lam."""
    ends = [VarianceExploding().at(-CLOCK + 2.0 * CLOCK * k / max(1, n)) for k in range(n + 1)]
    return list(pairwise(ends))


@dataclass(frozen=True)
class Churned:
    """A singlestep method with Langevin-like churn: between two steps x is raised to a higher, noised level.

        varsigma_hat = varsigma (1 + gamma),   y_hat = y + s_noise sqrt(varsigma_hat^2 - varsigma^2) xi,
        gamma = min(s_churn / n, sqrt(2) - 1)  where  s_tmin <= varsigma <= s_tmax,  else 0

    Karras et al. 2022 (arXiv:2206.00364), Algorithm 2. Theirs raises the start too, above the model's highest
    level; the start is pure noise already, and ours leaves it. The end of a run is where the schedule ends.
    """

    method: Singlestep
    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        n = len(levels) - 1
        gamma = min(self.s_churn / max(1, n), math.sqrt(2.0) - 1.0)
        result, s = [], levels[0]
        for clock, t in zip(ticks(n), levels[1:]):  # a step may end above s
            step = self.method.steps([s, t], path)[0]
            s = t
            if gamma > 0.0 and t is not levels[-1] and self.s_tmin <= t.sigma / t.alpha <= self.s_tmax:
                s = path.at(t.lam - math.log1p(gamma))
                std = self.s_noise * math.sqrt(gamma * (2.0 + gamma)) * s.alpha * t.sigma / t.alpha
                step = _raised(step, s, (clock, std))
            result.append(step)
        return result


def _raised(step: Step, to: Level, noise: tuple[Span, float]) -> Step:
    """The step, and then noise up to a higher level."""
    *others, last = step.updates
    scale = to.alpha / last.to.alpha
    terms, before = (tuple((k, scale * c) for k, c in what) for what in (last.terms, last.noise))
    return step._replace(updates=(*others, last._replace(
        to=to, decay=scale * last.decay, terms=terms, bias=scale * last.bias, noise=(*before, noise))))


@dataclass(frozen=True)
class Grouped:
    """Singlestep methods over groups of intervals: a k-stage step takes k intervals of the schedule.

    The schedule's own levels are the inner ones, so a schedule of n intervals costs n evaluations:
    "DPM-Solver-fast", Lu et al. 2022 (arXiv:2206.00927), sec. 3.4 (orders 3, 3, ..., then what is left of the
    budget).
    """

    integrand: Integrand
    order: int
    rule: str

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        result, start = [], 0
        for size in self._sizes(levels):
            nodes = levels[start:start + size + 1]
            start += size
            result.append(step(self.integrand, nodes, TABLEAUX[size, self.rule].stages, intervals=size)
                          if finite(*nodes) else ddim(self.integrand, *nodes))
        return result

    def _sizes(self, levels: Sequence[Level]) -> Iterator[int]:
        """How many intervals each step takes; an interval of infinite length stands alone."""
        n = len(levels) - 1
        if n and not finite(levels[0]):
            yield 1
            n -= 1
        to_zero = n and not finite(levels[-1])
        groups = _orders(n, self.order)
        if to_zero and groups[-1] > 1:
            groups[-1:] = [groups[-1] - 1, 1]
        yield from groups


def _orders(n: int, order: int) -> list[int]:
    """Orders that spend exactly n evaluations and end low: 3, 3, ..., 3, 2, 1 / 3, ..., 3, 1 / 3, ..., 3,
    2."""
    whole, rest = divmod(n, order)
    if order == 3 and rest == 0 and whole:
        return [3] * (whole - 1) + [2, 1]
    return [order] * whole + [rest] * (rest > 0)


LONGEST = 1.0
"""In lam: a factor e in sigma / alpha. On normal data and a mixture, sigma from 1 to 70 to 0.03, the worst
run of DPM-Solver-23 was 0.61 off without a limit, 0.037 with 2, 0.012 with 1.5 and 0.0075 with 1, at 19, 17,
18 and 21 evaluations on average."""


@dataclass(frozen=True)
class Adaptive:
    """A tableau with an embedded lower order; the step length follows from the difference of the two.

        error = max over the batch of  RMS( (u_high - u_low) / max(atol, rtol max(|u_low|, |u_before|)) ),
        u = x / sqrt(alpha^2 + sigma^2),   u_before: u_low of the last accepted step;
        a step with error <= 1 is accepted;   h <- min(theta h error^(-1/order), longest, what is left)

    Lu et al. 2022 (arXiv:2206.00927), appendix C: DPM-Solver-12 and -23. Theirs is a VP state, where u is x.
    In a VE state x would allow rtol |x_before| = rtol sigma for any step away from sigma: from sigma = 80
    they accepted one step to the end, 1.8 off. Their steps have no longest: after short ones, whose error is
    0 but for rounding, the next went over the whole range, where two orders may agree by chance. Of 135 runs
    on normal data, sigma from 1 to 66 to 0.05, DPM-Solver-23 had 29 off by more than its tolerance of 0.05,
    at most by 2.07.
    """

    integrand: Integrand
    tableau: Tableau
    rtol: float
    atol: float
    h_init: float
    theta: float
    longest: float = LONGEST

    @property
    def order(self) -> int:
        return len(self.tableau.stages)

    def step(self, s: Level, t: Level, path: Path) -> tuple[Step, Update]:
        """The step s -> t, and the update of the embedded lower order."""
        high = Singlestep(self.integrand, self.tableau).step(s, t, path)
        at = _numbered([evaluation.at for evaluation in high.evaluations], ())
        return high, self.integrand.update(s, t, self.tableau.embedded, at)


class Butcher(NamedTuple):
    """An explicit Runge-Kutta method: nodes c, stages a, weights b, and e = b less those of the lower order.

    e has one weight more, for the slope at the end, which begins the next step.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    e: np.ndarray
    order: int


DORMAND_PRINCE = Butcher(RK45.A, RK45.B, RK45.C, RK45.E, 5)
"""Dormand & Prince 1980, the pair of orders 5 and 4, with scipy.integrate's coefficients."""


@dataclass(frozen=True)
class RungeKutta(Adaptive):
    """The probability-flow ODE in y = x / alpha by a Runge-Kutta pair, under the same control of its steps.

        dy / dvarsigma = eps,   y_t = y_s + (varsigma_t - varsigma_s) sum_k b_k eps_k,   varsigma = e^-lam

    Song et al. 2021 (arXiv:2011.13456), section 4.3, who take it on the ODE in t.
    """

    tableau: Butcher

    @property
    def order(self) -> int:
        return self.tableau.order

    def step(self, s: Level, t: Level, path: Path) -> tuple[Step, Update]:
        a, b, c, e, _ = self.tableau
        start, end = (math.exp(-level.lam) for level in (s, t))

        def update(to: Level, weights: Sequence[float]) -> Update:
            scale = to.alpha * (end - start)
            return Update(to, to.alpha / s.alpha,
                          tuple((k, scale * float(w)) for k, w in enumerate(weights) if w))

        inner = [path.at(-math.log(start + float(node) * (end - start))) if node < 1.0 else t
                 for node in c[1:]]
        stages = [update(to, row[:k]) for k, (to, row) in enumerate(zip(inner, a[1:]), 1)]
        at = [self.integrand.evaluation(level) for level in (s, *inner, t)]
        stay = Update(t, 1.0, (), chained=True)
        return Step(tuple(at), (*stages, update(t, b), stay)), update(t, np.append(b, 0.0) - e)
