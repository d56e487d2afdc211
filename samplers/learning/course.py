"""The course of all that is measured or learned: counted, cancellable, and gone on with where it was cut
short."""
from __future__ import annotations

import functools
import math
from pathlib import Path as File
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..model import DELTA, Known, check_precision, finite_answer, probe
from ..schedule import Level, Path
from ..solver import finite
from .storage import Partial

ELEMENTS = 16_384
"""Of each image, drawn at random and once, that are looked at on the host: of trajectories, for the inner
products that the fitted solver gets (3 MB of host memory in float32 with 24 intervals, whatever the size of
the latents), of runs, and of the probe."""


class Sampled:
    """The elements of a latent that are looked at on the host: all, or a random choice that is always the
    same."""

    def __init__(self, x: Tensor, seed: int) -> None:
        size = x[0].numel()
        self.places = None
        if size > ELEMENTS:
            chance = torch.randperm(size, generator=torch.Generator().manual_seed(seed + 2))
            self.places = chance[:ELEMENTS].to(x.device)

    def of(self, *tensors: Tensor) -> Tensor:
        """Their sampled elements in host memory, [len(tensors), K, elements]."""
        flat = [v.flatten(1) for v in tensors]
        return torch.stack(flat if self.places is None else [v[:, self.places] for v in flat]).cpu()


class Course:
    """What a measurement or a training has spent and found; a file keeps it, so that one that was cut short
    goes on.

    First the model is probed (model.probe, UnsteadyModel), on x at the middle of `levels`. What the file
    holds is taken up if it is of the same x and settings, and if the model answers the probe as it did then:
    it may be another by now.

    The parts that follow are done one after the other; `done` is how many are behind it. Every evaluation is
    counted and told to progress(done, total, the last loss), which may raise to cancel. A model that may be
    asked for some of the images, and is told images=[...], is probed with the first `probed`. It sees the
    dtype of the x that was given, whatever the arithmetic around it; `precision`, what it computes in, is
    that dtype unless it is told.
    """

    def __init__(self, model: Callable[...,
                                       Tensor], x: Tensor, levels: Sequence[Level], path: Path, *, kind: str,
                 settings: Mapping[str,
                                   Any], total: int, dtype: torch.dtype, precision: torch.dtype | None = None,
                 extra_args: Mapping[str, Any] | None = None, partial: File | str | None = None,
                 seconds: float = 0.0, progress: Callable[[int, int, float], None] | None = None,
                 probed: int | None = None) -> None:
        self.model, self.extra_args, self.dtype = model, dict(extra_args or {}), dtype
        self.precision, self.progress, self.total = precision or dtype, progress, total
        check_precision(self.precision)
        self.kept, self.done, self.loss = {}, 0, math.nan
        self.images, self.asked = len(x), 0  # of a whole evaluation, and in all
        self.device = x.device
        own = {"dtype": str(dtype), "precision": str(self.precision)}
        self.file = Partial(partial, kind, x, {**settings, **own}, seconds)
        inner = [level for level in levels if finite(level)]
        self.middle = path.at((inner[0].lam + inner[-1].lam) / 2)
        some = {} if probed is None else {"images": list(range(min(probed, len(x))))}
        self._take_up(self._probe(x[:probed], levels[0], some))

    def _probe(self, x: Tensor, start: Level, more: Mapping[str, Any]) -> Known:
        """The model's answer to x, scaled to the middle level: which model it is. Some elements of it."""
        there = (x * (self.middle.sigma / start.sigma)).to(self.dtype).to(x.dtype)
        denoise = functools.partial(self.denoise, **more)
        known = probe(denoise, there, self.middle.sigma, self.middle.alpha * self.delta(self.middle),
                      lambda: denoise(x, start.sigma), self.precision)
        return Known(Sampled(x, 0).of(known.answer)[0], known.tolerance.cpu())

    def _take_up(self, known: Known) -> None:
        kept, done = self.file.read()
        if done and known.same(kept["probe"].cpu()):
            self.kept, self.done, self.asked = kept, done, int(kept["asked"])
        else:
            self.kept = {"probe": known.answer}

    def delta(self, level: Level) -> float:
        """How far y = x / alpha is moved for a derivative."""
        return DELTA[self.precision](level.sigma / level.alpha)

    @property
    def spent(self) -> int:
        """Evaluations of all images."""
        return self.asked // self.images

    def denoise(self, x: Tensor, sigma: float | np.ndarray, **more: Any) -> Tensor:
        """D(x); more: for the model, beside extra_args."""
        denoised = finite_answer(self.model, x.to(self.dtype), sigma, {**self.extra_args, **more})
        self.asked += len(x)
        self.tell()
        return denoised

    def tell(self) -> None:
        """How far it is; the place where it may be cancelled."""
        if self.progress:
            self.progress(min(self.spent, self.total), self.total, self.loss)

    def keep(self, done: int, found: Mapping[str, Tensor], at_once: bool = False) -> None:
        """All that was found when a part was done, in place of what was kept before."""
        self.done = done
        self.kept = {**found, "probe": self.kept["probe"], "asked": torch.tensor(self.asked)}
        self.file.write(self.kept, done, at_once)

    def targets(self, teach: Callable[[], Mapping[int, Tensor]]) -> dict[int, Tensor]:
        """The first part of a training: the teacher's states, kept or made."""
        if not self.done:
            self.keep(1, {f"target.{j}": value for j, value in teach().items()}, at_once=True)
        return {int(name[7:]): value.to(self.device)
                for name, value in self.kept.items() if name.startswith("target.")}

    def us(self, guess: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What was learned so far: u [1, 3] of every interval, or a refit's shapes."""
        return list(self.kept["u"].cpu().numpy()) if "u" in self.kept else list(guess)

    def learned(self, done: int, us: Sequence[np.ndarray], loss: float) -> None:
        self.loss = loss
        self.keep(done, {**self.kept, "u": torch.from_numpy(np.stack(us))})

    def __enter__(self) -> Course:
        return self

    def __exit__(self, *fault: Any) -> None:
        if not fault[0]:
            self.file.remove()
        elif self.done:  # cancelled: the parts that are done are kept
            self.file.write(self.kept, self.done, at_once=True)
