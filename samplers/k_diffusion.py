"""The solvers in k-diffusion's calling convention, which ComfyUI's is too."""
from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .catalogue import Sampler, find
from .denoisers import FIRST_STEPS, check_full_noise
from .learning.amed import Insertion
from .model import answer, latents, not_finite
from .noise import BrownianNoise
from .sample import Noise, Observer, no_noise, sample, sample_adaptive
from .schedule import Level, find_path, levels
from .solver import Adaptive, Step, finite


def k_diffusion_sampler(name: str, path: str = "ve", *, sigma_max: float | None = None,
                        sigma_min: float | None = None, **options: Any) -> Callable[..., Tensor]:
    """fn(model, x, sigmas, extra_args=None, callback=None, disable=None) -> x at sigmas[-1], for a name of
    SAMPLERS.

    model(x, sigma[B], **extra_args) returns the denoised x. callback gets a dict with x, i, sigma, sigma_hat,
    denoised after the evaluation that opens interval i. x is [B, ...] noise at sigmas[0] plus signal, in any
    floating dtype: the model sees that dtype, the solver works in at least float32, and x is left as it was.
    sigmas strictly decrease. No graph is kept (torch.no_grad), as in k-diffusion. Stochastic solvers take
    their seed from extra_args["seed"], or draw one from torch's generator. The noise of image k of a batch is
    that of seed + k alone (or of the k-th of several seeds), on purpose: the WebUI's convention. ComfyUI's
    own samplers draw one noise for the batch.

    sigma_max is the model's highest level: with it, a first_step that is not evaluated is refused in runs
    that start lower. sigma_min is its lowest above 0: down to there an adaptive run to 0 controls its error
    (sample.LOWEST if not given).

    ValueError for an unknown name, path or option, an option out of range, or unusable sigmas;
    FloatingPointError if the model returned NaN or infinity, naming the step, or if an adaptive run finds no
    end.
    """
    return k_diffusion_function(find(name), path, options, sigma_max=sigma_max, sigma_min=sigma_min)


Follow = Callable[[Mapping[str, Any], Sequence[float]], Mapping[str, Any]]
"""follow(extra_args, sigmas) -> extra_args for the model, in which the host tells it the levels of a run."""


def k_diffusion_function(sampler: Sampler, path: str, options: Mapping[str, Any], *, noise_scale: float = 1.0,
                         sigma_max: float | None = None, sigma_min: float | None = None,
                         follow: Follow | None = None) -> Callable[..., Tensor]:
    """`k_diffusion_sampler` for any entry of the catalogue.

    noise_scale: the standard deviation of the model's noise. follow: told the levels that the solver goes
    over, which need not be the schedule's; for an evaluation between two of them (a step's inner one) with
    that one too.
    """
    settings = sampler.settings(options)
    solver, first_step = sampler.solver_of(settings), sampler.first_step(settings)
    gaussian = find_path(path)
    lowest = None if sigma_min is None else gaussian.level(float(sigma_min))
    if isinstance(solver, Adaptive) and lowest and not finite(lowest):
        raise ValueError(f"sigma_min = {sigma_min}: give the model's lowest noise level above 0, or None")

    @torch.no_grad()
    def fn(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
           extra_args: Mapping[str, Any] | None = None, callback: Callable[[dict], None] | None = None,
           disable: bool | None = None) -> Tensor:
        schedule, start, extra = levels(sigmas, gaussian), latents(x), dict(extra_args or {})
        denoise = _Denoiser(model, x, extra, schedule)
        if first_step != "evaluate":
            check_full_noise(schedule[0], sigma_max)
        answering = FIRST_STEPS[first_step](denoise, schedule[0])
        with tqdm(total=len(schedule) - 1, disable=disable) as bar:
            observe = _observer(bar, callback, dict(zip((level.sigma for level in schedule), sigmas)))
            with denoise:
                if isinstance(solver, Adaptive):
                    denoise.follow([level.sigma for level in schedule], follow)
                    result = sample_adaptive(answering, start, schedule, solver, gaussian, lowest=lowest,
                                             observe=observe)
                else:
                    run = (replace(solver, answered=lambda: bool(denoise.seen))
                           if isinstance(solver, Insertion) else solver)
                    steps = run.steps(schedule, gaussian)
                    noise = _noise(steps, start, settings, extra, noise_scale)
                    denoise.follow(_followed(steps), follow)
                    result = sample(answering, start, steps, noise=noise, observe=observe)
            bar.update(bar.total - bar.n)
        return result.to(x.dtype)

    return fn


def _observer(bar: tqdm, callback: Callable[[dict], None] | None, known: Mapping[float, Any]) -> Observer:
    """What moves the bar, and tells the callback; of a level that is `known` the schedule's own number."""

    def observe(i: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        bar.update(i - bar.n)
        if callback is not None:
            level = known.get(sigma)
            level = level if isinstance(level, Tensor) else x.new_full((), sigma)
            callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})

    return observe


def _noise(steps: Sequence[Step], x: Tensor, settings: Mapping[str, Any], extra_args: Mapping[str, Any],
           scale: float) -> Noise:
    """What planned steps need: none, or that of the seed."""
    if not any(step.noisy for step in steps):
        return no_noise
    seed = extra_args.get("seed")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())
    return BrownianNoise(x, seed, x.device if settings["noise_device"] == "gpu" else "cpu", scale)


def _followed(steps: Sequence[Step]) -> list[float]:
    """The levels at which planned steps begin or pass one of the schedule's, and the last one's end."""
    begun = [evaluation.at.sigma for step in steps for evaluation in step.evaluations[:step.intervals]]
    return [*begun, *(step.t.sigma for step in steps[-1:])]


class _Denoiser:
    """A k-diffusion model as denoise(x, sigma): its dtype outside, at least float32 inside, and what it
    said checked."""

    def __init__(self, model: Callable[..., Tensor], x: Tensor, extra_args: Mapping[str, Any],
                 schedule: Sequence[Level]) -> None:
        self.model, self.like, self.extra_args = model, x, extra_args
        self.falling = [-level.sigma for level in schedule]
        self.seen: list[tuple[float, Tensor]] = []
        self.told: Callable[[set[float]], Mapping[str, Any]] = lambda sigmas: extra_args

    def follow(self, sigmas: Sequence[float], follow: Follow | None) -> None:
        """The run goes over these levels."""
        if follow:
            told, known = follow(self.extra_args, sigmas), {*sigmas}
            self.told = lambda more: told if more <= known else follow(self.extra_args, [*sigmas, *more])

    def __call__(self, x: Tensor, sigma: float | np.ndarray) -> Tensor:
        denoised = answer(self.model, x.to(self.like.dtype), sigma, self.told({*np.ravel(sigma).tolist()}))
        self.seen.append((float(np.max(sigma)), denoised.sum()))  # NaN and infinity survive a sum
        return denoised

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *fault: Any) -> None:
        """FloatingPointError naming the first step that was not finite, the sooner cause of another one. Once
        a run: it waits for the device."""
        if not self.seen or self.like.is_meta or kind not in (None, FloatingPointError):
            return
        sigmas, sums = zip(*self.seen)
        steps = len(self.falling) - 1
        for sigma, total in zip(sigmas, torch.stack(sums).tolist()):
            if not math.isfinite(total):
                step = min(bisect_right(self.falling, -sigma), steps)  # one may ask at its end
                raise not_finite(sigma, f" in step {step} of {steps},")
