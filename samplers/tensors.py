"""The one place where coefficients meet latents."""
from __future__ import annotations

from torch import Tensor


def lincomb(*terms: tuple[float, Tensor]) -> Tensor:
    """sum_k c_k v_k as a new tensor; the coefficients are host floats, so nothing is copied and nothing waits."""
    (c, v), *rest = [term for term in terms if term[0] != 0.0] or terms[:1]
    total = v * c
    for c, v in rest:
        total.add_(v, alpha=c)
    return total


def rms(v: Tensor) -> Tensor:
    """The root mean square of every batch item, [B]."""
    return v.flatten(1).square().mean(1).sqrt()
