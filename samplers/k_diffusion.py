"""The solvers in k-diffusion's calling convention, which ComfyUI's is too."""
from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, Callable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .families import Sampler, find
from .noise import BrownianNoise
from .sample import sample, sample_adaptive
from .schedule import find_path, levels
from .solver import Adaptive


def k_diffusion_sampler(name: str, path: str = "ve", **options: Any) -> Callable[..., Tensor]:
    """fn(model, x, sigmas, extra_args=None, callback=None, disable=None) -> x at sigmas[-1], for a name of SAMPLERS.

    model(x, sigma[B], **extra_args) returns the denoised x. callback gets a dict with x, i, sigma, sigma_hat, denoised
    after the evaluation that opens interval i. x is [B, ...] noise at sigmas[0] plus signal, in any floating dtype: the
    model sees that dtype, the solver works in at least float32, and x is left as it was. sigmas strictly decrease.
    Stochastic solvers take their seed from extra_args["seed"], or draw one from torch's generator.

    ValueError for an unknown name, path or option, an option out of range, or unusable sigmas;
    FloatingPointError if the model returned NaN or infinity, naming the step.
    """
    return k_diffusion_function(find(name), path, options)


def k_diffusion_function(sampler: Sampler, path: str, options: Mapping[str, Any],
                         noise_scale: float = 1.0) -> Callable[..., Tensor]:
    """`k_diffusion_sampler` for any entry of the catalogue; noise_scale is the standard deviation of the model's noise."""
    settings = sampler.settings(options)
    solver = sampler.build(**settings)
    gaussian = find_path(path)

    def fn(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any] | None = None,
           callback: Callable[[dict], None] | None = None, disable: bool | None = None) -> Tensor:
        schedule = levels(torch.as_tensor(sigmas).tolist(), gaussian)
        n = len(schedule) - 1
        work = torch.promote_types(x.dtype, torch.float32)
        extra = dict(extra_args or {})
        sums: list[Tensor] = []
        at: list[float] = []

        def denoise(x_now: Tensor, sigma: float) -> Tensor:
            denoised = model(x_now.to(x.dtype), x.new_full((len(x),), sigma), **extra)
            if denoised.shape != x.shape:
                raise ValueError(f"the model returned shape {list(denoised.shape)} at sigma = {sigma:.6g} for x of shape "
                                 f"{list(x.shape)}: it must return the denoised x")
            denoised = denoised.to(work)
            sums.append(denoised.sum())  # NaN and infinity survive a sum; looked at once, after the run
            at.append(sigma)
            return denoised

        with tqdm(total=n, disable=disable) as bar:

            def observe(i: int, sigma: float, x_now: Tensor, denoised: Tensor) -> None:
                bar.update(i - bar.n)
                if callback is not None:
                    level = x_now.new_full((), sigma)
                    callback({"x": x_now, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})

            def check() -> None:
                for sigma, total in zip(at, torch.stack(sums).tolist()):
                    if not math.isfinite(total):
                        i = bisect_right([-level.sigma for level in schedule], -sigma)
                        raise FloatingPointError(
                            f"the model returned NaN or infinite values in step {i} of {n}, at sigma = {sigma:.6g}: run "
                            "it in a higher precision (float32 or bfloat16), or lower the guidance")

            start = x.to(work)
            if isinstance(solver, Adaptive):
                try:
                    result = sample_adaptive(denoise, start, schedule, solver, gaussian, observe=observe)
                except FloatingPointError:
                    check()
                    raise
            else:
                steps = solver.steps(schedule, gaussian)
                noise = None
                if any(step.std for step in steps):
                    noise = BrownianNoise(start, _seed(extra), x.device if settings["noise_device"] == "gpu" else "cpu",
                                          noise_scale)
                result = sample(denoise, start, steps, noise=noise, observe=observe)
            if sums and not x.is_meta:
                check()
            bar.update(n - bar.n)
        return result.to(x.dtype)

    return fn


def _seed(extra_args: Mapping[str, Any]) -> int:
    seed = extra_args.get("seed")
    return int(torch.randint(2**63 - 1, ()).item()) if seed is None else int(seed)
