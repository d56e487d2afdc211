"""The model, asked in k-diffusion's convention: what x and the answer must be, and what is said if they are not."""
from __future__ import annotations

from typing import Any, Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from .tensors import per_image


class UnsteadyModel(ValueError):
    """A model that does not answer for itself: something remembers, skips or makes up its answers."""


def latents(x: Tensor) -> Tensor:
    """x in at least float32; ValueError if it holds no images, or whole numbers."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give latents in a floating dtype, such as torch.float32")
    if not x.ndim or not len(x):
        raise ValueError(f"x has shape {list(x.shape)}: give at least one image, [B, ...]")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def answer(model: Callable[..., Tensor], x: Tensor, sigma: float | np.ndarray, extra_args: Mapping[str, Any]) -> Tensor:
    """D = model(x, sigma[B], **extra_args) in at least float32; ValueError if its shape is not that of x."""
    denoised = model(x, per_image(sigma, x), **extra_args)
    if denoised.shape != x.shape:
        raise ValueError(f"the model returned shape {list(denoised.shape)} at sigma = {np.max(sigma):.6g} for x of shape "
                         f"{list(x.shape)}: it must return the denoised x")
    return denoised.to(torch.promote_types(x.dtype, torch.float32))


def finite_answer(model: Callable[..., Tensor], x: Tensor, sigma: float | np.ndarray, extra_args: Mapping[str, Any]) -> Tensor:
    """The same for a measurement: FloatingPointError if it is not finite, at the cost of waiting for the device."""
    denoised = answer(model, x, sigma, extra_args)
    if not denoised.sum().isfinite():  # NaN and infinity survive a sum
        raise not_finite(np.max(sigma))
    return denoised


def not_finite(sigma: float, where: str = "") -> FloatingPointError:
    return FloatingPointError(f"the model returned NaN or infinite values{where} at sigma = {sigma:.6g}: run it in a higher "
                              "precision (float32 or bfloat16), or lower the guidance")
