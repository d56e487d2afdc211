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
from dataclasses import dataclass
from typing import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, layer_norm, linear, silu

from .storage import CalibrationError

C_BOUND, A_BOUND = 0.5, 0.5
GRID, HIDDEN, NARROW, WAVES = 8, 128, 4, 8
SHAPES: Mapping[str, tuple[int, ...]] = {
    "trunk.0.weight": (HIDDEN, GRID * GRID), "trunk.0.bias": (HIDDEN,),
    "trunk.1.weight": (NARROW, HIDDEN), "trunk.1.bias": (NARROW,),
    "s.weight": (NARROW, WAVES), "s.bias": (NARROW,), "t.weight": (NARROW, WAVES), "t.bias": (NARROW,),
    "heads.weight": (3, 3 * NARROW), "heads.bias": (3,),
}


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


@dataclass(frozen=True)
class Predictor:
    """The small network; weights [...] by the names of SHAPES, on the CPU."""

    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, shape in SHAPES.items():
            if name not in self.weights or tuple(self.weights[name].shape) != shape:
                found = list(self.weights[name].shape) if name in self.weights else "nothing"
                raise CalibrationError(f"the predictor's {name} is {found}: it must have shape {list(shape)}")
            if not self.weights[name].isfinite().all():
                raise CalibrationError(f"the predictor's {name} has values that are not finite")

    @classmethod
    def new(cls, seed: int = 0, dtype: torch.dtype = torch.float32) -> Predictor:
        """Random, but for its last layer: it predicts the table."""
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.zeros(shape, dtype=dtype) if len(shape) == 1 or name == "heads.weight" else
            torch.randn(shape, generator=generator, dtype=dtype) / math.sqrt(shape[1])
            for name, shape in SHAPES.items()
        }
        return cls(weights)

    def __call__(self, features: Tensor | None, count: int, lam_s: float, lam_t: float,
                 table: np.ndarray) -> Tensor:
        """(u_r, u_c, u_a) of every image, [B, 3]; without features (no evaluation was made) those of 0."""
        w = self.weights
        like = w["heads.bias"]
        seen = like.new_zeros(count, GRID * GRID) if features is None else pooled(features).to(like)
        trunk = linear(silu(linear(seen, w["trunk.0.weight"], w["trunk.0.bias"])), w["trunk.1.weight"],
                       w["trunk.1.bias"])
        times = [linear(_waves(lam, like), w[f"{end}.weight"], w[f"{end}.bias"]).expand(count, -1)
                 for end, lam in (("s", lam_s), ("t", lam_t))]
        heads = linear(torch.cat([trunk, *times], 1), w["heads.weight"], w["heads.bias"])
        return heads + torch.as_tensor(table).to(like)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy() for name, value in self.weights.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Predictor:
        return cls({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()})


def _waves(lam: float, like: Tensor) -> Tensor:
    phase = lam * 2.0 ** -torch.arange(WAVES // 2, dtype=torch.float64)
    return torch.cat([phase.sin(), phase.cos()]).to(like)
