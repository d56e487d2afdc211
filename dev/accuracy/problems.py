"""What is solved: three models, their noise, the core schedulers' levels, and the converged solutions.

    gaussians   exact denoiser: 50 Gaussians in 3x16x16, float64; guidance towards 10 of them
    digits      exact denoiser: 1797 coloured 8x8 digits of std 0.05, float64; guidance towards the threes
    emoji       dev/tiny_emoji as ComfyUI runs it: loader, text encoder, guider and timestep rounding, float32
"""
from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Sequence

import comfy_host
import environment
import torch
from torch import Tensor

S = comfy_host.comfy_sampling()  # ComfyUI's modules can be imported from here on
import comfy.samplers  # noqa: E402
from comfyui_version import __version__ as VERSION  # noqa: E402, F401

SCHEDULERS = tuple(comfy.samplers.SCHEDULER_NAMES)
EXACT_STEPS = 2000  # of an exact problem's converged solution
TINY_EMOJI = environment.ROOT / "dev" / "tiny_emoji"
CHECKPOINT = TINY_EMOJI / "checkpoints" / "tiny_emoji.safetensors"


Body = Callable[[comfy_host.Model], Any]  # of a session


@dataclass
class Mixture:
    """Posterior mean of isotropic Gaussians, by matrix products: tests/problems.py has the plain form."""

    means: Tensor  # [K, d]
    stds: Tensor   # [K]

    def __post_init__(self) -> None:
        self.squares = self.means.square().sum(1)

    def restricted(self, keep: Tensor) -> Mixture:
        return Mixture(self.means[keep], self.stds[keep])

    def __call__(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        y = x.flatten(1)
        variance = self.stds**2 + sigma[:, None] ** 2                                             # [B, K]
        distance = y.square().sum(1, keepdim=True) - 2 * y @ self.means.T + self.squares          # [B, K]
        posterior = (-0.5 * distance / variance - 0.5 * y.shape[1] * variance.log()).softmax(1)
        gain = posterior * self.stds**2 / variance
        return ((posterior - gain) @ self.means + gain.sum(1, keepdim=True) * y).reshape(x.shape)


def model_sampling() -> Any:
    """Stable Diffusion's sigmas, 0.029 to 14.6."""
    return comfy_host.sampling_of("ModelSamplingDiscrete", "EPS")


@dataclass
class Exact:
    """A mixture as a model with guidance: D_u + g (D_c - D_u), D_c the mixture of some of its components."""

    name: str
    mixture: Mixture
    chosen: Tensor  # bool [K]
    prompt: str
    shape: tuple[int, ...]
    noises: int
    guidances: tuple[float, ...] = (1.0, 4.0)
    dtype: torch.dtype = torch.float64
    remembers: bool = False
    calibration_noises: int = 32
    refit_noises: int = 32
    training_noises: int = 40

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,)

    @property
    def about(self) -> dict[str, Any]:
        """What it is beyond this file's text."""
        return {"name": self.name, "noises": self.noises}

    def middle_block(self) -> None:
        """There is none."""

    def session(self, prompts: Sequence[str], guidance: float, body: Body) -> Any:
        conditional = self.mixture.restricted(self.chosen)

        def denoiser(x, sigma, **extra):
            y, level = x.to(self.dtype), sigma.to(self.dtype)
            denoised = conditional(y, level)
            if guidance != 1.0:
                free = self.mixture(y, level)
                denoised = free + guidance * (denoised - free)
            return denoised.to(x.dtype)

        return body(comfy_host.Model(denoiser, model_sampling()))


def gaussians(noises: int) -> Exact:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(50, 3, 4, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").clamp(-1.5, 1.5) / 1.5
    stds = 0.05 + 0.15 * torch.rand(50, generator=generator, dtype=torch.float64)
    mixture = Mixture(smooth.flatten(1), stds)
    return Exact("gaussians", mixture, torch.arange(50) < 10, "10 of 50", (3, 16, 16), noises)


def digits(noises: int) -> Exact:
    from sklearn.datasets import load_digits
    data = load_digits()
    generator = torch.Generator().manual_seed(2)
    ink = torch.as_tensor(data.images, dtype=torch.float64)[:, None] / 16  # [K, 1, 8, 8]
    paper, pen = 0.6 * torch.rand(2, len(ink), 3, 1, 1, generator=generator, dtype=torch.float64)
    colour = (0.4 + paper) * (1 - ink) + (pen - 1) * ink
    mixture = Mixture(colour.flatten(1), torch.full((len(ink),), 0.05, dtype=torch.float64))
    return Exact("digits", mixture, torch.as_tensor(data.target == 3), "threes", (3, 8, 8), noises)


class Emoji:
    """The tiny emoji checkpoint in ComfyUI's own classes. Images of one batch have prompts of their own."""

    name = "emoji"
    shape = (3, 32, 32)
    dtype = torch.float32
    remembers = True
    calibration_noises, refit_noises, training_noises = 2, 8, 10  # as the nodes choose for its size

    def __init__(self, prompts: tuple[str, ...], guidances: tuple[float, ...], noises: int,
                 stride: int = 2, second: bool = True) -> None:
        self.prompts, self.guidances, self.noises, self.stride = prompts, guidances, noises, stride
        self.second = second  # whether the converged solution is held against another
        spec = importlib.util.spec_from_file_location("tiny_emoji", TINY_EMOJI / "__init__.py",
                                                      submodule_search_locations=[str(TINY_EMOJI)])
        sys.modules["tiny_emoji"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # enters the model's family into ComfyUI's list
        import comfy.sd
        self.model, self.clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(CHECKPOINT), output_vae=False, output_clip=True)

    @property
    def about(self) -> dict[str, Any]:
        """What it is beyond this file's text."""
        return {"name": self.name, "prompts": self.prompts, "noises": self.noises, "stride": self.stride,
                "checkpoint": hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()}

    def middle_block(self) -> Any:
        comfy_host.pack()
        return sys.modules["custom_nodes_x_lambda-solvers.nodes.middle_block"].MiddleBlock(self.model)

    def cond(self, prompts: Sequence[str | None], negative: bool = False) -> list:
        """A cond with one prompt for each image; None: nobody's, as `auto` measures at."""
        if None in prompts:
            canonical = sys.modules[f"{comfy_host.pack().__name__}.hosting.canonical"]
            made = canonical.Text.like(self.cond([""])[0][0], negative).made(int(not negative))
            return [[made.repeat(len(prompts), 1, 1), {}]]
        each = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(words))[0][0] for words in prompts]
        return [[torch.cat(each), {}]]

    def session(self, prompts: Sequence[str], guidance: float, body: Body) -> Any:
        """body(model) within a guider's run; prompts has one entry for each image of its batches."""
        result = []

        class Inside(comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
                       denoise_mask=None, disable_pbar=False):
                host = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
                host.latent_image, host.noise = latent_image, noise
                bound = {**extra_args, "denoise_mask": None}
                result.append(body(comfy_host.Model(lambda x, sigma, **extra: host(x, sigma, **bound),
                                                    model_wrap.inner_model.model_sampling)))
                return noise

        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.cond(prompts), self.cond([None if None in prompts else ""], negative=True))
        guider.set_cfg(guidance)
        empty = torch.zeros(len(prompts), *self.shape)
        guider.sample(empty, empty, Inside(), torch.tensor([14.6, 0.0]), disable_pbar=True)
        return result[0]


Problem = Exact | Emoji


def starting_noise(problem: Problem, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *problem.shape, generator=generator, dtype=problem.dtype)


def starting_x(model: comfy_host.Model, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noise as KSAMPLER scales it, for an empty latent."""
    sampling = model.inner_model.inner_model.model_sampling
    full = math.isclose(float(sampling.sigma_max), float(sigma), rel_tol=1e-5)
    return sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), full)


def schedule(scheduler: str, n: int, discards: bool, dtype: torch.dtype) -> Tensor:
    """n intervals as KSampler makes them. ValueError where the scheduler makes another number."""
    sigmas = comfy.samplers.calculate_sigmas(model_sampling(), scheduler, n + discards)
    if discards:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    if len(sigmas) != n + 1:
        raise ValueError(f"{scheduler} makes {len(sigmas) - 1} intervals of {n} steps")
    return sigmas.to(dtype)


def fine(start: float, n: int, dtype: torch.dtype) -> Tensor:
    """n intervals uniform in lambda from `start` to the model's lowest sigma, and one to 0."""
    low = float(model_sampling().sigma_min)
    return torch.tensor([*(start * (low / start) ** (i / (n - 1)) for i in range(n)), 0.0], dtype=dtype)


class Reference(NamedTuple):
    x: Tensor
    agreement: float | None  # rms to a second reference of another method


def reference(problem: Problem, model: comfy_host.Model, noise: Tensor, start: float) -> Reference:
    """The converged solution by dpmpp_2m; from sigma_max held against a second one.

    ComfyUI rounds sigma to the model's 1000 timesteps, and the emoji network is rough from one to the next:
    two grids of 300 steps differ by 2e-3 whatever the method, so a few hundred steps do not converge. The
    reference visits every second timestep, which is within 3e-4 of visiting all, and is held against 1000
    steps uniform in lambda. The exact problems are smooth: their reference is held against heun.
    """
    def run(function, sigmas):
        return function(model, starting_x(model, noise, sigmas[0]), sigmas, extra_args={}, disable=True)

    highest = math.isclose(start, float(model_sampling().sigma_max), rel_tol=1e-4)
    if isinstance(problem, Exact):
        x = run(S.sample_dpmpp_2m, fine(start, EXACT_STEPS, problem.dtype))
        other = run(S.sample_heun, fine(start, EXACT_STEPS // 2, problem.dtype)) if highest else None
    else:
        every = [sigma for sigma in reversed(model_sampling().sigmas.tolist()) if sigma <= start * 1.0001]
        stride = problem.stride if highest else 4  # ddim_uniform's cells are few and their errors large
        x = run(S.sample_dpmpp_2m, torch.tensor([*every[:-1:stride], every[-1], 0.0]))
        second = fine(start, len(every) // (problem.stride - 1), problem.dtype)
        other = run(S.sample_dpmpp_2m, second) if highest and problem.second else None
    return Reference(x, None if other is None else rms(other - x))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
