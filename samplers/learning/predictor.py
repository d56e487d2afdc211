"""AMED's predictor: (r, c, a) of a step from the two times and what the model's middle block holds of the
image.

    middle block [B, C, H, W] -> mean over C -> 8 x 8 -> 64 -> 128 -> 4  \\
    lam_s -> sin, cos (8) -> 4                                           -> 12 -> 1 each, added to
    lam_t -> sin, cos (8) -> 4                                          /         the table's (u_r, u_c, u_a)

    r = sigmoid(u_r),    c = 1 + C_BOUND tanh(u_c),    a = 1 + A_BOUND tanh(u_a)

Zhou et al. 2024 (arXiv:2312.00094), section 3.4 and appendix: 8,947 parameters. Ours is a correction of a
table that was fitted first, starts as 0, pools to 8 x 8 whatever the resolution, and normalises the 64
values.
"""
from __future__ import annotations

import math
from functools import partial
from typing import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, layer_norm, silu
from torch.nn.utils import skip_init

from .storage import CalibrationError

C_BOUND, A_BOUND = 0.5, 0.5
GRID, HIDDEN, NARROW, WAVES = 8, 128, 4, 8


def bounded(u: np.ndarray) -> np.ndarray:
    """(r, c, a) of (u_r, u_c, u_a), along the last axis."""
    return np.stack([1.0 / (1.0 + np.exp(-u[..., 0])), 1.0 + C_BOUND * np.tanh(u[..., 1]),
                     1.0 + A_BOUND * np.tanh(u[..., 2])], axis=-1)


def unbounded(rca: np.ndarray) -> np.ndarray:
    """(u_r, u_c, u_a) of (r, c, a)."""
    edge = 1.0 - 1e-9
    return np.stack([np.log(rca[..., 0] / (1.0 - rca[..., 0])),
                     np.arctanh(np.clip((rca[..., 1] - 1.0) / C_BOUND, -edge, edge)),
                     np.arctanh(np.clip((rca[..., 2] - 1.0) / A_BOUND, -edge, edge))], axis=-1)


def pooled(features: Tensor) -> Tensor:
    """[B, 64] of a middle block's [B, C, H, W]: its mean over the channels on an 8 x 8 grid, normalised."""
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    grid = adaptive_avg_pool2d(precise.mean(1, keepdim=True), GRID).flatten(1)
    return layer_norm(grid, grid.shape[1:])


class Predictor(torch.nn.Module):
    """The small network, on the CPU."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        """Random, but for its last layer: it predicts the table."""
        super().__init__()
        layer = partial(skip_init, torch.nn.Linear, dtype=dtype)
        self.trunk = torch.nn.ModuleList([layer(GRID * GRID, HIDDEN), layer(HIDDEN, NARROW)])
        self.s, self.t, self.heads = layer(WAVES, NARROW), layer(WAVES, NARROW), layer(3 * NARROW, 3)
        generator = torch.Generator().manual_seed(seed)
        for name, own in self.requires_grad_(False).named_parameters():
            if own.ndim == 1 or name == "heads.weight":
                own.zero_()
            else:
                own.normal_(generator=generator).div_(math.sqrt(own.shape[1]))

    def forward(self, features: Tensor | None, count: int, lam_s: float, lam_t: float,
                table: np.ndarray) -> Tensor:
        """(u_r, u_c, u_a) of every image, [B, 3]; without features (no evaluation was made) those of 0."""
        like = self.heads.bias
        seen = like.new_zeros(count, GRID * GRID) if features is None else pooled(features).to(like)
        times = [end(_waves(lam, like)).expand(count, -1) for end, lam in ((self.s, lam_s), (self.t, lam_t))]
        trunk = self.trunk[1](silu(self.trunk[0](seen)))
        return self.heads(torch.cat([trunk, *times], 1)) + torch.as_tensor(table).to(like)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.state_dict().items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Predictor:
        network = cls()
        for name, own in network.state_dict().items():
            shape, found = list(own.shape), list(arrays[name].shape) if name in arrays else "nothing"
            if found != shape:
                raise CalibrationError(f"the predictor's {name} is {found}: it must have shape {shape}")
            if not np.isfinite(arrays[name]).all():
                raise CalibrationError(f"the predictor's {name} has values that are not finite")
        # whatever numbers a file holds, a module's are floating
        weights = {name: torch.from_numpy(np.ascontiguousarray(value, np.result_type(value, np.float32)))
                   for name, value in arrays.items()}
        network.load_state_dict(weights, strict=False, assign=True)
        return network.requires_grad_(False)


def _waves(lam: float, like: Tensor) -> Tensor:
    phase = lam * 2.0 ** -torch.arange(WAVES // 2, dtype=torch.float64)
    return torch.cat([phase.sin(), phase.cos()]).to(like)
