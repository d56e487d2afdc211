"""Noise for stochastic solvers: one Brownian path per image, the same in any batch, on any device, on any
schedule."""
from __future__ import annotations

from typing import Sequence

import torch
import torchsde
from torch import Tensor

from .schedule import Level
from .solver import CLOCK
from .tensors import moved

CELLS_PER_LAM = 4096  # a power of two: every time the path is asked for is then a node of the tree

CACHED = 24           # increments kept on the way down the tree: half of torchsde's, and no slower


class BrownianNoise:
    """Unit-variance increments xi(s, t) = (W(lam_t) - W(lam_s)) / sqrt(lam_t - lam_s) of a Brownian path W.

    W runs in lam, over a fixed range, so it depends neither on the schedule nor on the path of the run: a
    finer schedule refines the same noise, and VE, VP and flow runs of one seed share it. Image k of a batch
    has a W of its own, keyed by seed + k, or by the k-th of several seeds, drawn in float32 on `device` (the
    CPU unless told: then no GPU changes the image) and moved to the latents. So it is the image of that seed
    alone, on purpose: the WebUI's convention. ComfyUI's own samplers draw one noise for the whole batch.

    W is a tree of halvings (torchsde); times are rounded to its nodes, and the variance is that of the
    rounded interval, so the increments keep unit variance and independence exactly.
    """

    def __init__(self, x: Tensor, seed: int | Sequence[int], device: torch.device | str = "cpu",
                 scale: float = 1.0) -> None:
        seeds = ([int(own) for own in seed] if isinstance(seed, Sequence) else
                 [int(seed) + k for k in range(len(x))])
        if len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds are given for {len(x)} images: give one for each, or the "
                             "first one's alone")
        self.like = x
        self.scale = scale
        self.trees = [
            torchsde.BrownianInterval(t0=0.0, t1=2.0 * CLOCK * CELLS_PER_LAM, size=tuple(x.shape[1:]),
                                      dtype=torch.float32, device=device, entropy=own % 2**64, tol=0.5,
                                      halfway_tree=True, pool_size=24, cache_size=CACHED)
            for own in seeds
        ]

    def __call__(self, s: Level, t: Level) -> Tensor:
        start, end = (round((min(max(level.lam, -CLOCK), CLOCK) + CLOCK) * CELLS_PER_LAM)
                      for level in (s, t))
        if not start < end:
            raise ValueError(
                f"the step from sigma = {s.sigma:.6g} to {t.sigma:.6g} is too short for its noise: "
                f"stochastic steps are at least {1 / CELLS_PER_LAM:.1g} in lambda, between -{CLOCK:g} and "
                f"{CLOCK:g}; use fewer steps")
        xi = torch.stack([tree(start, end) for tree in self.trees]).mul_(self.scale * (end - start) ** -0.5)
        if xi.device != self.like.device and self.like.is_cuda:
            xi = xi.pin_memory()  # a pageable copy would wait for the GPU
        return moved(xi, self.like.device).to(self.like.dtype)
