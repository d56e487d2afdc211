"""The model, asked in k-diffusion's convention: what x and the answer must be, and what is said if they
are not."""
from __future__ import annotations

import math
from typing import Any, Callable, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tensors import per_image, rms


def latents(x: Tensor) -> Tensor:
    """x in at least float32; ValueError if it holds no images, or whole numbers."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give latents in a floating dtype, such as torch.float32")
    if not x.ndim or not len(x):
        raise ValueError(f"x has shape {list(x.shape)}: give at least one image, [B, ...]")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def answer(model: Callable[..., Tensor], x: Tensor, sigma: float | np.ndarray,
           extra_args: Mapping[str, Any]) -> Tensor:
    """D = model(x, sigma[B], **extra_args) in at least float32; ValueError if its shape is not that of x."""
    denoised = model(x, per_image(sigma, x), **extra_args)
    if denoised.shape != x.shape:
        raise ValueError(
            f"the model returned shape {list(denoised.shape)} at sigma = {np.max(sigma):.6g} for x of shape "
            f"{list(x.shape)}: it must return the denoised x")
    return denoised.to(torch.promote_types(x.dtype, torch.float32))


def finite_answer(model: Callable[..., Tensor], x: Tensor, sigma: float | np.ndarray,
                  extra_args: Mapping[str, Any]) -> Tensor:
    """The same for a measurement: FloatingPointError if it is not finite, at the cost of waiting for the
    device."""
    denoised = answer(model, x, sigma, extra_args)
    if not denoised.sum().isfinite():  # NaN and infinity survive a sum
        raise not_finite(np.max(sigma))
    return denoised


def not_finite(sigma: float, where: str = "") -> FloatingPointError:
    return FloatingPointError(
        f"the model returned NaN or infinite values{where} at sigma = {sigma:.6g}: run it in a higher "
        "precision (float32 or bfloat16), or lower the guidance")


class UnsteadyModel(ValueError):
    """A model whose answer depends on more than it is asked: something remembers, and answers in its
    place."""


DELTA: Mapping[torch.dtype, Callable[[float], float]] = {
    # y moves by delta: far enough that D changes by more than the model's own rounding
    torch.float64: lambda ratio: 1e-5 * math.sqrt(1.0 + ratio**2),
    torch.float32: lambda ratio: 1e-3 * math.sqrt(1.0 + ratio**2),
    torch.float16: lambda ratio: 0.03 * ratio,
    torch.bfloat16: lambda ratio: 0.1 * ratio,
}
PROBE = 4      # its evaluations
REPEATS = 0.1  # of how far the answer moves when x does: further apart, two answers to one x are not the same
JUMPS = 30.0   # times as far as x no answer moves


def check_precision(precision: torch.dtype) -> None:
    if precision not in DELTA:
        known = ", ".join(str(dtype).rpartition(".")[2] for dtype in DELTA)
        raise ValueError(
            f"precision = {precision} is out of range: choose what the model computes in, one of {known}; "
            "weights in float8 are computed with in one of these")


def signs(like: Tensor, seed: int) -> Tensor:
    """1 or -1 for every element, at random but always the same."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8).to(like) * 2 - 1


class Known(NamedTuple):
    """A model's answer to a probe, [B, ...], and how far apart for each image [B] another one's is."""

    answer: Tensor
    tolerance: Tensor

    def same(self, other: Tensor) -> bool:
        return other.shape == self.answer.shape and bool((rms(other - self.answer) <= self.tolerance).all())


def probe(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigma: float, delta: float,
          elsewhere: Callable[[], object], precision: torch.dtype) -> Known:
    """D(x), of a model that was asked for x, elsewhere, for x + d and again for x; d is delta with random
    signs.

    A cache answers what it was asked before, or x and what the network added then, or computes a part, as
    long as sigma is nearly the same. So the first answer is the network's own; so is the one after
    `elsewhere`, at another level; and the last, so soon after it, is a cache's. sigma is in the middle of the
    range: a true denoiser approaches D = x at low levels, a constant at high ones, and caches leave out the
    first and last steps.

    UnsteadyModel if the answer moves exactly as x does, or not at all (but that of a flat image, which knows
    no x), or much too far, or if the two answers to x are apart.
    """
    d = delta * signs(x, 0)
    first = denoise(x, sigma)
    elsewhere()
    moved = denoise(x + d, sigma)
    again = denoise(x, sigma)
    for before in (first, again):
        change = moved - before
        check_own(change, d, x, sigma, precision)
        if ((rms(change) == 0.0) & (before.flatten(1).std(1) > 0.0)).any():
            raise unsteady(f"at sigma = {sigma:.4g} its answer to another x is the same")
        if (rms(change) > JUMPS * delta).any():
            raise unsteady(f"at sigma = {sigma:.4g} its answer jumps when x hardly moves")
    known = Known(first, (REPEATS * rms(moved - again)).maximum(4.0 * torch.finfo(precision).eps * rms(x)))
    if not known.same(again):
        raise unsteady(f"at sigma = {sigma:.4g} it gave two answers to the same x")
    return known


def check_own(change: Tensor, d: Tensor, x: Tensor, sigma: float, precision: torch.dtype) -> None:
    """UnsteadyModel if the answer to some image of x changed by d, to rounding, as x did: x and something
    stored."""
    rounding = (torch.finfo(precision).eps * rms(x)).clamp(1e-3 * rms(d), 0.03 * rms(d))
    if (rms(change - d) <= rounding).any():
        raise unsteady(f"at sigma = {sigma:.4g} its answer moves exactly as x does")


def unsteady(what: str) -> UnsteadyModel:
    return UnsteadyModel(
        f"the model does not answer for itself: {what}. Something between keeps earlier answers (a cache "
        "such as TeaCache, or one that skips layers or steps), and what is measured through it would be "
        "wrong: switch it off while measuring")
