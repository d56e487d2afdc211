"""Predictor-corrector samplers of the reverse SDE: Song et al. 2021 (arXiv:2011.13456), Algorithms 1-5.

A predictor is one step of the reverse SDE, discretised where its authors do: in X = a y, y = x / alpha, with
varsigma = sigma / alpha the noise of y, Sigma = a varsigma that of X, and the score S = (a_s D - X_s) /
Sigma_s^2:

    SDE       a                                   Sigma           d log a / d lam
    ve        1                                   varsigma        0
    vp        1 / sqrt(1 + varsigma^2)            sqrt(1 - a^2)   1 - a^2
    sub-vp    (sqrt(4 + varsigma^2) - varsigma) / 2    1 - a^2    (1 - a^2) / (1 + a^2)

The forward SDE leads from t back to s as  X_s = rho X_t + G xi,  rho = a_s / a_t,  G^2 = a_s^2 (varsigma_s^2
- varsigma_t^2). So on any path of the model each is a run of the same levels.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Mapping, NamedTuple, Sequence

from torch import Tensor

from .integrand import DataPrediction, Evaluation, Span, Update
from .schedule import Level, Path
from .solver import Step, ddim, finite, ticks


class Coordinates(NamedTuple):
    """a of an SDE's own state, and d log a / d lam, at varsigma."""

    scale: Callable[[float], float]
    rate: Callable[[float], float]


def _sub_vp(varsigma: float) -> float:
    return 2.0 / (math.sqrt(4.0 + varsigma**2) + varsigma)


SDES: Mapping[str, Coordinates] = {
    "ve": Coordinates(lambda v: 1.0, lambda v: 0.0),
    "vp": Coordinates(lambda v: 1.0 / math.hypot(1.0, v), lambda v: v**2 / (1.0 + v**2)),
    "sub-vp": Coordinates(_sub_vp, lambda v: (1.0 - _sub_vp(v) ** 2) / (1.0 + _sub_vp(v) ** 2)),
}


class Move(NamedTuple):
    """X_t = decay X_s + gain S + std xi."""

    decay: float
    gain: float
    std: float


def reverse_diffusion(s: Level, t: Level, sde: Coordinates) -> Move:
    """The forward step's own discretisation, reversed: eq. (46) of the paper; Algorithms 2 and 3."""
    rho, variance = _forward(s, t, sde)
    return Move(2.0 - rho, variance, math.sqrt(variance))


def ancestral(s: Level, t: Level, sde: Coordinates) -> Move:
    """The mean of X_t given X_s and D, with the noise published: of ve the posterior's, G Sigma_t / Sigma_s
    (eq. 47); of vp that of the forward step, G (eq. 4), and so of sub-vp, for which none is published."""
    rho, variance = _forward(s, t, sde)
    std = math.sqrt(variance)
    if sde is SDES["ve"]:
        std *= math.exp(s.lam - t.lam)
    return Move(1.0 / rho, variance / rho, std)


def euler_maruyama(s: Level, t: Level, sde: Coordinates) -> Move:
    """One step of Euler-Maruyama with lam for the time."""
    h, varsigma = t.lam - s.lam, math.exp(-s.lam)
    variance = 2.0 * h * (sde.scale(varsigma) * varsigma) ** 2
    return Move(1.0 + h * sde.rate(varsigma), variance, math.sqrt(variance))


PREDICTORS: Mapping[str, Callable[[Level, Level, Coordinates], Move]] = {
    "reverse diffusion": reverse_diffusion, "ancestral": ancestral, "euler-maruyama": euler_maruyama}


def _forward(s: Level, t: Level, sde: Coordinates) -> tuple[float, float]:
    """rho and G^2."""
    a = sde.scale(math.exp(-s.lam))
    return (a / sde.scale(math.exp(-t.lam)),
            a**2 * math.exp(-2.0 * s.lam) * -math.expm1(-2.0 * (t.lam - s.lam)))


@dataclass(frozen=True)
class SignalToNoise:
    """k = sqrt(2) r |xi| / |eps| of every image, or with the means of both norms over the batch."""

    r: float
    pooled: bool = False

    def __call__(self, xi: Tensor, eps: Tensor) -> Tensor:
        ratio, noise = (v.flatten(1).norm(dim=1) for v in (xi, eps))
        size = ratio.mean() / noise.mean() if self.pooled else ratio / noise
        return (math.sqrt(2.0) * self.r * size).reshape(-1, *[1] * (xi.ndim - 1))


@dataclass(frozen=True)
class PredictorCorrector:
    """At every level so many steps of Langevin's dynamics, and then the predictor to the next.

        X <- X + e S + sqrt(2 e) xi,   e = 2 rho^2 (r |xi| / |S|)^2,   rho^2 = 1 for ve, 1 - beta for vp

    Song et al. 2021, Algorithms 4 and 5. With eps = (x - alpha D) / sigma it is the same in all coordinates:

        x <- x + sigma (- k^2 eps + sqrt(2) k xi),   k = sqrt(2) rho r |xi| / |eps|

    As in the authors' code the corrector comes before the predictor of the same level. A step of infinite
    length is DDIM, without corrector: the last one shows D. Each image has its own norms, so that it does not
    depend on the others, as the algorithms say for one image; `pooled` takes the means of the norms over the
    batch, as the authors' code does. What a corrector adds has a noise of its own, on a clock as Churned's,
    and then the predictor's is on it too.
    """

    predictor: str
    sde: str
    corrector_steps: int
    snr: float
    pooled: bool = False

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        each, n = self.corrector_steps + 1, len(levels) - 1
        clock = ticks(each * n)
        return [self._step(*levels[i:i + 2], clock[each * i:each * (i + 1)]) for i in range(n)]

    def _step(self, s: Level, t: Level, clock: Sequence[Span]) -> Step:
        if not finite(s, t):
            return ddim(DataPrediction(), s, t)
        *correctors, last = clock if self.corrector_steps else [(s, t)]
        eps = Evaluation(s, 1.0 / s.sigma, -s.alpha / s.sigma)
        evaluations = (*[eps] * len(correctors), Evaluation(s, 0.0, 1.0))
        size = SignalToNoise(self.snr * _forward(s, t, SDES[self.sde])[0], self.pooled)
        std = math.sqrt(2.0) * s.sigma
        langevin = (Update(s, 1.0, ((k, -s.sigma),), noise=((span, std),), chained=True, size=size)
                    for k, span in enumerate(correctors))
        return Step(evaluations, (*langevin, self._predicted(s, t, len(correctors), last)))

    def _predicted(self, s: Level, t: Level, k: int, span: Span) -> Update:
        """The predictor from X to x at both ends, with D of evaluation k."""
        sde = SDES[self.sde]
        decay, gain, std = PREDICTORS[self.predictor](s, t, sde)
        varsigma = math.exp(-s.lam)
        a_s, a_t = sde.scale(varsigma), sde.scale(math.exp(-t.lam))
        pull = gain / (a_s * varsigma) ** 2
        back = t.alpha / a_t
        return Update(t, back * (decay - pull) * a_s / s.alpha, ((k, back * pull * a_s),),
                      noise=((span, back * std),), chained=True)
