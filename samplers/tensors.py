"""The one place where coefficients meet latents."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.amp import autocast

Coefficient = float | np.ndarray | Tensor
"""A host float; or an array that broadcasts over the channels or elements of one latent, a tensor once it
is `placed`."""


def moved(v: Tensor, device: torch.device) -> Tensor:
    """v on a device; not waited for where that is safe, on CUDA. MPS would read what is freed by then
    (PyTorch's issue 189690)."""
    return v.to(device, non_blocking=device.type == "cuda")


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Arithmetic in the dtypes it is written in. A host may have autocast around a whole job (A1111): that
    computes in half precision, and keeps its copies of weights until the job ends, whatever they learn."""
    return autocast(device.type, enabled=False) if device.type in ("cuda", "cpu") else nullcontext()


def placed(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """The coefficient where x is and in its precision; done before the loop, so that no step waits for a
    copy.

    ValueError for an array that does not belong to latents of this shape, which would stretch them or scale
    the wrong axis.
    """
    if isinstance(coefficient, np.ndarray):
        own = tuple(x.shape)[x.ndim - coefficient.ndim:]
        if not x.ndim - 1 <= coefficient.ndim <= x.ndim or any(size not in (1, of)
                                                               for size, of in zip(coefficient.shape, own)):
            raise ValueError(
                f"coefficients of shape {list(coefficient.shape)} do not fit x of shape {list(x.shape)}: "
                "statistics by channel or element serve only latents like those they were measured on; "
                "measure with pool = 'all', which serves every shape")
        return moved(torch.from_numpy(coefficient).to(x.dtype), x.device)
    return coefficient


def lincomb(*terms: tuple[Coefficient, Tensor], bias: Coefficient = 0.0) -> Tensor:
    """sum_k c_k v_k + bias as a new tensor; float coefficients stay on the host, so nothing is copied or
    waited for."""
    (c, v), *rest = [term for term in terms if isinstance(term[0], Tensor) or term[0] != 0.0] or terms[:1]
    total = v * c
    for c, v in rest:
        total = total.addcmul_(v, c) if isinstance(c, Tensor) else total.add_(v, alpha=c)
    return total if isinstance(bias, float) and bias == 0.0 else total.add_(bias)


def per_image(value: float | np.ndarray, x: Tensor) -> Tensor:
    """One number for every image of x, [B] in its dtype: the same for all, or their own."""
    return x.new_full(
        (len(x), ), value) if isinstance(value, float) else torch.from_numpy(value).flatten().to(x)


def rms(v: Tensor) -> Tensor:
    """The root mean square of every batch item, [B]."""
    return v.flatten(1).square().mean(1).sqrt()
