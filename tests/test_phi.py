"""phi-functions, moments and weights."""
from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given, strategies as st

from samplers.phi import RULES, bh1, bh2, midpoint, phi, published, taylor, weights

NODES = st.lists(st.floats(-3, 1), min_size=1, max_size=4).filter(
    lambda r: all(abs(a - b) > 0.05 for i, a in enumerate(r) for b in r[:i]))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [0.0, 1e-12, -1e-5, 0.3, -0.999, 0.999, 1.0, -1.001, 2.5, -7.0, 12.0, -40.0])
def test_phi_agrees_with_fifty_digits_on_both_sides_of_the_switch(k: int, z: float) -> None:
    with mpmath.workdps(50):
        term = lambda j, k: mpmath.mpf(z) ** j / mpmath.factorial(j + k)  # noqa: E731
        exact = (mpmath.nsum(lambda j: term(j, k), [0, mpmath.inf], method="direct") if abs(z) < 30
                 else (mpmath.exp(z) - sum(term(j, 0) for j in range(k))) / mpmath.mpf(z) ** k)
        assert phi(k, z) == pytest.approx(float(exact), rel=2e-14)


@given(NODES, st.floats(-4, 4))
def test_weights_have_the_moments_they_were_made_from(nodes: list[float], z: float) -> None:
    moments = taylor(len(nodes), z)
    w = weights(nodes, moments)
    scale = sum(abs(v) for v in w) * max(1.0, max(abs(r) for r in nodes)) ** len(nodes) + 1
    for p, moment in enumerate(moments):
        assert sum(wj * r**p for wj, r in zip(w, nodes)) == pytest.approx(moment, abs=1e-12 * scale)


@given(st.floats(-6, 6).filter(lambda z: abs(z) > 1e-3), st.integers(0, 3))
def test_taylor_moments_integrate_powers_against_the_exponential(z: float, p: int) -> None:
    exact = mpmath.quad(lambda u: z * mpmath.exp(-z * (1 - u)) * u**p, [0, 1])
    assert taylor(4, z)[p] == pytest.approx(float(exact), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("z", [-2.0, -0.1, 0.7, math.inf])
def test_every_rule_is_exact_for_a_constant(rule, z: float) -> None:
    n = 1 if math.isinf(z) else 3
    assert sum(weights([0.0, -0.8, -2.0][:n], rule(n, z))) == pytest.approx(-math.expm1(-z), rel=1e-13)


def test_the_rules_differ_where_their_docstrings_say() -> None:
    assert published(2, 0.8) == taylor(2, 0.8) and midpoint(3, 0.8) == published(3, 0.8)
    assert midpoint(2, 0.8)[1] == pytest.approx(-math.expm1(-0.8) / 2)
    assert taylor(3, 0.8)[2] == pytest.approx(2 * published(3, 0.8)[2])
    assert bh1(2, 0.8)[1] == 0.4 and bh2(2, 0.8)[1] == midpoint(2, 0.8)[1]
    assert bh1(4, 0.8) == bh2(4, 0.8) == taylor(4, 0.8)
