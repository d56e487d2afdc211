"""Noise for stochastic solvers: one Brownian path per image, the same in any batch, on any device, on any schedule."""
from __future__ import annotations

import math

import torch
import torchsde
from torch import Tensor

from .schedule import Level


class BrownianNoise:
    """Unit-variance increments xi(s, t) = (W(u_s) - W(u_t)) / sqrt(u_s - u_t) of a Brownian path W, u = 1 / (1 + e^lam).

    The clock u is the flow path's sigma, whatever the path of the run: it stays in [0, 1], so the tree of random
    numbers does not depend on the schedule. A finer schedule refines the same path, and VE, VP and flow runs of one
    seed share it. Image k of a batch has a tree of its own, keyed by seed + k, drawn on `device` (the CPU unless told:
    then the image does not depend on the GPU either) and moved to where the latents are.
    """

    def __init__(self, x: Tensor, seed: int, device: torch.device | str = "cpu", scale: float = 1.0) -> None:
        self.like = x
        self.scale = scale
        blank = torch.zeros(x.shape[1:], dtype=x.dtype, device=device)
        self.trees = [torchsde.BrownianTree(0.0, blank, 1.0, entropy=(seed + k) % 2**64) for k in range(len(x))]

    def __call__(self, s: Level, t: Level) -> Tensor:
        u_s, u_t = (1.0 / (1.0 + math.exp(level.lam)) for level in (s, t))
        xi = torch.stack([tree(u_t, u_s) for tree in self.trees]).mul_(self.scale * (u_s - u_t) ** -0.5)
        if xi.device == self.like.device:
            return xi
        pinned = xi.pin_memory() if self.like.is_cuda else xi  # a pageable copy would wait for the GPU
        return pinned.to(self.like.device, non_blocking=True)
