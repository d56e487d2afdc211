"""The quadrature every solver uses: phi-functions, the moments made of them, and the weights they imply.

A step of length h in lam integrates an exponential against what the model said at nodes r_j = (lam_j - lam_s)
/ h. Its weights w_j are fixed by moments M_p:

    sum_j w_j r_j^p = M_p,   p = 0 .. n - 1

z = h is data prediction (DPM-Solver++), z = -h noise prediction (DPM-Solver), z = (1 + eta) h the SDE.
"""
from __future__ import annotations

import math
from typing import Callable, Mapping, Sequence

from .schedule import elementwise, expm1

Rule = Callable[[int, float], Sequence[float]]
"""rule(n, z) -> the moments M_0 .. M_(n-1) of an n-node quadrature."""
Basis = Callable[[Sequence[float], Sequence], list]
"""basis(nodes, moments) -> weights: how values at nodes become a polynomial, `weights` or
`pseudo_weights`."""


@elementwise
def phi(k: int, z: float) -> float:
    """phi_k(z) = int_0^1 e^((1-u) z) u^(k-1) / (k-1)! du;  phi_1(z) = (e^z - 1) / z.

    phi_(k+1)(z) = (phi_k(z) - 1/k!) / z, except near 0, where the subtraction cancels and the power series
    sum_j z^j / (j + k)! is used. Hochbruck & Ostermann 2010, Acta Numerica 19, eqs. (2.9)-(2.12).
    """
    if abs(z) < 1.0:
        term = total = 1.0 / math.factorial(k)
        j = k
        while abs(term) > 1e-17 * abs(total):
            j += 1
            term *= z / j
            total += term
        return total
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def taylor(n: int, z: float) -> list[float]:
    """M_p = z p! phi_(p+1)(-z): exact for polynomials of degree < n, hence of order n."""
    return [factor * math.factorial(p) for p, factor in enumerate(published(n, z))]


def published(n: int, z: float) -> list[float]:
    """M_p = z phi_(p+1)(-z), as in the authors' third-order multistep code and k-diffusion's 3M SDE.

    For n <= 2 this is `taylor`. For n = 3 the factor 2! is missing there: the published 3M halves the second
    derivative, so it is of order 2 with a small error constant. (LuChengTHU/dpm-solver, multistep third
    update.)
    """
    return [-expm1(-z)] + [z * phi(p + 1, -z) for p in range(1, n)]


def midpoint(n: int, z: float) -> list[float]:
    """`published`, but with M_1 = M_0 / 2 for two nodes: the 2M and 2S of Lu et al. 2022b (arXiv:2211.01095,
    Alg. 1-2).

    This is k-diffusion's and ComfyUI's dpmpp_2m, and the authors' solver_type "dpmsolver".
    """
    moments = published(n, z)
    return _half(moments, moments[0])


def bh1(n: int, z: float) -> list[float]:
    """`taylor`, but with M_1 = z / 2 for two nodes: UniPC with B(h) = h, Zhao et al. 2023 (arXiv:2302.04867).

    Their B(h) cancels wherever the weights are solved for; it is left where one weight is set to 1 / 2.
    """
    return _half(taylor(n, z), z)


def bh2(n: int, z: float) -> list[float]:
    """`taylor`, but with M_1 = M_0 / 2 for two nodes, as in `midpoint`: UniPC with B(h) = e^h - 1."""
    moments = taylor(n, z)
    return _half(moments, moments[0])


def _half(moments: list[float], whole: float) -> list[float]:
    """The same, but with M_1 = whole / 2 for two nodes."""
    return [moments[0], whole / 2.0] if len(moments) == 2 else moments


RULES: Mapping[str, Rule] = {"midpoint": midpoint, "taylor": taylor, "published": published, "bh1": bh1,
                             "bh2": bh2}


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w with sum_j w_j r_j^p = M_p: the moments applied to the Lagrange basis polynomials of the nodes r."""
    result = []
    for j, at in enumerate(nodes):
        basis = [1.0]  # ascending coefficients of prod_(i != j) (r - r_i) / (r_j - r_i)
        for i, other in enumerate(nodes):
            if i != j:
                scale = 1.0 / (at - other)
                basis = [scale * (lower - other * same) for lower, same in zip([0.0, *basis], [*basis, 0.0])]
        result.append(sum(c * m for c, m in zip(basis, moments)))
    return result


ADAMS = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def adams(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The Adams-Bashforth weights of equal steps, whatever the nodes: M_0 (1), (3, -1) / 2, (23, -16, 5) /
    12, ...

    The improved PNDM: Zhang & Chen 2022 (arXiv:2204.13902), section 3.3, after Liu et al. 2022
    (arXiv:2202.09778).
    """
    return [moments[0] * c for c in ADAMS[len(nodes) - 1]]


def trapezoid(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The mean of all values: M_0 / n each."""
    return [moments[0] / len(nodes)] * len(nodes)


def pseudo_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w of sum_p M_p m[r_0, ..., r_p]: leading divided differences in place of the polynomial's derivatives.

    The "pseudo order" of DPM-Solver-v3 (Zheng et al. 2023, arXiv:2310.13268, section 3.3). For one or two
    nodes, with r_0 = 0, this is `weights`.
    """
    result = []
    for j, at in enumerate(nodes):
        # m_j enters m[r_0, ..., r_p] with 1 / prod_(i <= p, i != j) (r_j - r_i), if j <= p
        total, scale = 0.0, 1.0
        for p, moment in enumerate(moments):
            if p != j:
                scale /= at - nodes[p]
            if p >= j:
                total = total + moment * scale
        result.append(total)
    return result
