"""Damped Gauss-Newton over images: what training lowers, its quadratic model, and the step that is tried
next.

With the residual R of an image and J = dR/du,

    |R(u + d)|^2 = e + 2 g d + d G d,          e = R R,   g = J R,   G = J J^T

and d is that of the least  sum over images of (e + 2 g d + d G d) / (e + floor)  and of a ridge in d.
"""
from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

FLOOR = 0.3  # in mean squared errors
TINY = np.finfo(np.float64).tiny


class Quadratic(NamedTuple):
    """The mean squared error of every image around u: value e [B], slope g [B, k], curvature G [B, k, k].
    float64."""

    e: np.ndarray
    g: np.ndarray
    G: np.ndarray  # noqa: N815  (the letter of the equation)

    @classmethod
    def of(cls, residual: Tensor, slopes: Tensor) -> Quadratic:
        """Of R [B, elements] and J [B, k, elements]."""
        n = residual.shape[1]
        parts = (residual.square().mean(1), torch.einsum("bkn,bn->bk", slopes, residual) / n,
                 torch.einsum("bkn,bln->bkl", slopes, slopes) / n)
        return cls(*(part.double().numpy() for part in parts))


def typical(e: np.ndarray, floor: float) -> float:
    """What training lowers: the mean of log(e + floor) over the images.

    The plain mean is ruled by the few images that end in another place altogether. On exact digits, AMED on
    2M: median error 0.92 and 0.87 of ComfyUI's dpmpp_2m (guidance 1 and 4) with this, 1.16 and 1.02 with the
    plain mean.
    """
    return float(np.log(e + floor).mean())


def damped_step(quadratic: Quadratic, images: slice, floor: float,
                ridge: Callable[[np.ndarray, float], np.ndarray], most: float) -> np.ndarray:
    """d [k], within +-most, by these images. ridge(G, e) [k], of their weighted sums, is added to the
    diagonal of G."""
    e, g, G = (part[images] for part in quadratic)  # noqa: N806
    weight = 1.0 / (e + floor)
    g, G = (np.tensordot(weight, part, 1) for part in (g, G))  # noqa: N806
    least = 1e-12 * G.diagonal().max() + TINY  # so that it is regular, whatever the errors' size
    return np.clip(-np.linalg.solve(G + np.diag(ridge(G, float(weight @ e)) + least), g), -most, most)
