"""What is interpolated between evaluations, and the exact linear flow that goes with it.

With m the interpolated value, every update of this package is

    x_t = decay x_s + gain sum_j w_j m_j + std xi,      w = weights(r, rule(n, z)),   xi ~ N(0, 1)

and an integrand is the choice of m, decay, gain, z and std.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .schedule import Level
from .tensors import lincomb


class Flow(NamedTuple):
    """The coefficients of one step s -> t, before its quadrature is chosen."""

    decay: float
    gain: float
    z: float
    std: float


class Integrand(Protocol):
    eta: float

    def value(self, x: Tensor, denoised: Tensor, at: Level) -> Tensor:
        """m, from the state and the model's answer at one level."""

    def flow(self, s: Level, t: Level) -> Flow:
        """The exact part of the step s -> t."""


@dataclass(frozen=True)
class DataPrediction:
    """m = D, the denoised image: DPM-Solver++ and, with eta > 0, SDE-DPM-Solver++.

        x_t = (sigma_t / sigma_s) e^(-eta h) x_s + alpha_t int e^(...) D dlam + sigma_t sqrt(1 - e^(-2 eta h)) s_noise xi

    Lu et al. 2022b (arXiv:2211.01095), Proposition 4.1; the SDE is theirs for eta = 1, and the ODE for eta = 0.
    Finite at both ends: a step of infinite length with one node is DDIM, x_t = (sigma_t / sigma_s) x_s + alpha_t D.
    """

    eta: float = 0.0
    s_noise: float = 1.0

    def value(self, x: Tensor, denoised: Tensor, at: Level) -> Tensor:
        return denoised

    def flow(self, s: Level, t: Level) -> Flow:
        h = t.lam - s.lam
        damping = self.eta * h if self.eta else 0.0  # not 0 * inf
        return Flow(decay=t.sigma / s.sigma * math.exp(-damping), gain=t.alpha, z=h + damping,
                    std=t.sigma * math.sqrt(-math.expm1(-2.0 * damping)) * self.s_noise)


@dataclass(frozen=True)
class NoisePrediction:
    """m = eps = (x - alpha D) / sigma: DPM-Solver.

        x_t = (alpha_t / alpha_s) x_s - sigma_t int e^(...) eps dlam

    Lu et al. 2022 (arXiv:2206.00927), eq. (3.4). Only for steps of finite length.
    """

    eta: float = 0.0

    def value(self, x: Tensor, denoised: Tensor, at: Level) -> Tensor:
        return lincomb((1.0 / at.sigma, x), (-at.alpha / at.sigma, denoised))

    def flow(self, s: Level, t: Level) -> Flow:
        return Flow(decay=t.alpha / s.alpha, gain=t.sigma, z=s.lam - t.lam, std=0.0)


PREDICTIONS = {"data": DataPrediction(), "noise": NoisePrediction()}
