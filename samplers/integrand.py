"""What is interpolated between evaluations, and the exact linear flow that goes with it.

With m the interpolated value, every update of this package is

    x_t = decay x_s + sum_j coefficient_j m_j + bias + sum_i std_i xi_i,     m = p x + q D,   xi_i ~ N(0, 1)

and an integrand is the choice of m (p, q) and of the coefficients for given nodes. The exponential ones have

    coefficient_j = gain w_j,       w = weights(r, rule(n, z)),         r_j = (lam_j - lam_s) / h
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Callable, Mapping, NamedTuple, Protocol

from torch import Tensor

from .phi import Basis, Rule, taylor, weights
from .schedule import Level, Number, largest
from .tensors import Coefficient


class Stage(NamedTuple):
    """The evaluations a polynomial passes through, by number, and how it is integrated."""

    uses: tuple[int, ...]
    rule: Rule = taylor
    basis: Basis = weights


class Evaluation(NamedTuple):
    """Where the model is asked, and the value m = x x + denoised D that is kept of its answer.

    D is the model's answer to scale x at sigma = at.sigma: both belong to the level of x, unless the model is
    told another.
    """

    at: Level
    x: Coefficient
    denoised: Coefficient
    scale: Coefficient = 1.0


Span = tuple[Level, Level]
"""A stretch of the Brownian path, whose increment over it has unit variance."""


class Update(NamedTuple):
    """x at `to` = decay x_s + sum_k coefficient_k m_k + bias + sum_i std_i xi_i.

    With a size k(xi, m) it has one of each, as far as k says: decay x_s + k^2 coefficient m + k std xi.

    `terms` names the evaluations k, and `noise` the increments xi_i by their spans: updates of one step that
    name the same span get the same increment.
    A chained update takes the x that the update before it made, in place of x_s.
    """

    to: Level
    decay: Coefficient
    terms: tuple[tuple[int, Coefficient], ...]
    bias: Coefficient = 0.0
    noise: tuple[tuple[Span, float], ...] = ()
    chained: bool = False
    size: Callable[[Tensor, Tensor], Tensor] | None = None


class Integrand(Protocol):
    def evaluation(self, at: Level) -> Evaluation: ...

    def update(self, s: Level, to: Level, stage: Stage, at: Mapping[int, Level]) -> Update:
        """The finished coefficients of one stage from s.

        at[k] is the level of evaluation k; those of the step itself are numbered from 0 on.
        """


class Flow(NamedTuple):
    """The coefficients of one step s -> t of an exponential integrand, before its quadrature is chosen."""

    decay: Number
    gain: Number
    z: Number
    std: float


class Exponential:
    """An integrand whose linear part has constant coefficients in lam: its quadrature is made of
    phi-functions."""

    def flow(self, s: Level, t: Level) -> Flow:
        raise NotImplementedError

    def update(self, s: Level, to: Level, stage: Stage, at: Mapping[int, Level]) -> Update:
        h = to.lam - s.lam
        decay, gain, z, std = self.flow(s, to)
        w = stage.basis([(at[k].lam - s.lam) / h for k in stage.uses], stage.rule(len(stage.uses), z))
        # a weight that is 0 but for rounding would cost a pass over the latents
        least = 1e-14 * max(largest(abs(wk)) for wk in w)
        return Update(to, decay,
                      tuple((k, gain * wk) for k, wk in zip(stage.uses, w) if largest(abs(wk)) > least),
                      noise=self._noise(s, to, at) if std else ())

    def _noise(self, s: Level, to: Level, at: Mapping[int, Level]) -> tuple[tuple[Span, float], ...]:
        """What comes in between s and `to`, span by span of the step's own levels, and shrinks on as x does:

            sum over spans a -> b of  decay_(b -> to) std_(a -> b) xi_(a -> b)

        So the stages of a step are states of one path of the SDE. As in SEEDS (Gonzalez et al. 2023,
        arXiv:2305.14267).
        """
        inner = sorted({level for k, level in at.items() if k > 0 and s.lam < level.lam < to.lam})
        return tuple(((a, b), self.flow(b, to).decay * self.flow(a, b).std)
                     for a, b in pairwise([s, *inner, to]))


@dataclass(frozen=True)
class DataPrediction(Exponential):
    """m = D, the denoised image: DPM-Solver++ and, with eta > 0, SDE-DPM-Solver++.

        x_t = (sigma_t / sigma_s) e^(-eta h) x_s + alpha_t int e^(...) D dlam
              + sigma_t sqrt(1 - e^(-2 eta h)) s_noise xi

    Lu et al. 2022b (arXiv:2211.01095), Proposition 4.1; the SDE is theirs for eta = 1, and the ODE for eta =
    0. Finite at both ends: a step of infinite length with one node is DDIM, x_t = (sigma_t / sigma_s) x_s +
    alpha_t D.
    """

    eta: float = 0.0
    s_noise: float = 1.0

    def evaluation(self, at: Level) -> Evaluation:
        return Evaluation(at, 0.0, 1.0)

    def damping(self, h: Number) -> Number:
        """How much more than by the ODE x forgets over a step of length h: eta h, in units of lam."""
        return self.eta * h if self.eta else 0.0  # not 0 * inf

    def flow(self, s: Level, t: Level) -> Flow:
        h = t.lam - s.lam
        damping = self.damping(h)
        return Flow(decay=t.sigma / s.sigma * math.exp(-damping), gain=t.alpha, z=h + damping,
                    std=t.sigma * math.sqrt(-math.expm1(-2.0 * damping)) * self.s_noise if damping else 0.0)


@dataclass(frozen=True)
class AncestralPrediction(DataPrediction):
    """m = D, with eta as DDIM counts it: the share of the ancestral noise, 0 DDIM and 1 DDPM.

        varsigma_t sqrt(1 - e^(-2 damping)) = kappa = eta varsigma_t sqrt(1 - varsigma_t^2 / varsigma_s^2),
        so  e^(-2 damping) = 1 - eta^2 (1 - e^(-2h)),      varsigma = sigma / alpha

    Of order 1 the update is  y_t = D + sqrt(varsigma_t^2 - kappa^2) / varsigma_s (y_s - D) + kappa xi,  Song
    et al. 2021 (arXiv:2010.02502), eqs. (12) and (16); it is k-diffusion's euler_ancestral. With eta = 1 the
    damping is h: one and the same as the SDE. In short steps it is that of the SDE with eta^2.
    """

    def __post_init__(self) -> None:
        if self.eta > 1.0:
            raise ValueError(f"eta = {self.eta:g} is out of range for DDIM's noise, all of which is 1: "
                             "choose a number from 0 to 1, or law sde")

    def damping(self, h: Number) -> Number:
        kept = (1.0 - self.eta**2) + self.eta**2 * math.exp(-2.0 * h)
        return -0.5 * math.log(kept) if kept else math.inf


@dataclass(frozen=True)
class NoisePrediction(Exponential):
    """m = eps = (x - alpha D) / sigma: DPM-Solver.

        x_t = (alpha_t / alpha_s) x_s - sigma_t int e^(...) eps dlam

    Lu et al. 2022 (arXiv:2206.00927), eq. (3.4). Only for steps of finite length.
    """

    def evaluation(self, at: Level) -> Evaluation:
        return Evaluation(at, 1.0 / at.sigma, -at.alpha / at.sigma)

    def flow(self, s: Level, t: Level) -> Flow:
        return Flow(decay=t.alpha / s.alpha, gain=t.sigma, z=s.lam - t.lam, std=0.0)


PREDICTIONS = {"data": DataPrediction(), "noise": NoisePrediction()}
