"""Models of ComfyUI's own classes around networks of a few numbers, and runs of its own guiders on them."""
from __future__ import annotations

import importlib
import sys
import types
from typing import Any, Callable

import torch
from torch import Tensor

from comfy_host import comfy_sampling, pack

IMAGE, VIDEO = (4, 40, 40), (16, 9, 8, 8)  # so large that two trajectories are enough


def part(name: str) -> types.ModuleType:
    """A module of the pack, as ComfyUI has it."""
    return importlib.import_module(f"{pack().__name__}.{name}")


class Network(torch.nn.Module):
    """Data near +-1, around what the conditions say. Every call is remembered; more images than `most` are
    too many."""

    dtype = torch.float32

    def __init__(self, most: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.most, self.calls = most, []
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(24, 16, generator=generator), requires_grad=False)
        self.middle_block = torch.nn.ModuleList([torch.nn.Identity()])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict,
                **more: Any) -> Tensor:
        conds = len(transformer_options["cond_or_uncond"])
        sigma = transformer_options["sigmas"]
        told = transformer_options.get("sample_sigmas", torch.zeros(0))
        self.calls.append(
            types.SimpleNamespace(images=len(x) // conds, sigma=sigma.tolist(), told=told.tolist(),
                                  context=context[:, 0, 0].tolist(), shape=list(x.shape)))
        if self.most and len(x) // conds > self.most:
            import comfy.model_management
            raise comfy.model_management.OOM_EXCEPTION(f"{len(x) // conds} images are too many")
        for block in self.middle_block:
            x = block(x)
        s = torch.cat([sigma] * conds).view(-1, *[1] * (x.ndim - 1))
        full = x * (s.square() + 1.0).sqrt()
        shift = context.mean((1, 2)).view_as(s)
        denoised = shift + torch.tanh((full - shift) / (s.square() + 0.3))
        return (full - denoised) / s


def model(network: torch.nn.Module, video: bool = False) -> Any:
    """A MODEL, as a loader makes it."""
    comfy_sampling()
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Tiny(comfy.supported_models_base.BASE):
        latent_format = comfy.latent_formats.Wan21 if video else comfy.latent_formats.LatentFormat

    made = comfy.model_base.BaseModel(Tiny({"disable_unet_model_creation": True}))
    made.diffusion_model = network
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu)


def prompt(value: float, images: int = 1, **more: Any) -> list:
    """A CONDITIONING whose tensor has this value everywhere, or for each image one more."""
    values = value + torch.arange(images, dtype=torch.float32).view(-1, 1, 1)
    return [[values.expand(images, 4, 8).contiguous(), more]]


def guider(patcher: Any, positive: list, negative: list, cfg: float = 3.0) -> Any:
    import comfy.samplers
    made = comfy.samplers.CFGGuider(patcher)
    made.set_conds(positive, negative)
    made.set_cfg(cfg)
    return made


def in_a_run(made: Any, use: Callable[[Any], Any], batch: int = 1, shape: tuple[int, ...] = IMAGE,
             steps: int = 5) -> Any:
    """What `use` makes of the Run that a sampler is called with: such a batch and schedule."""
    found = []

    def function(model, x, sigmas, extra_args, callback, disable, **options):
        found.append(use(part("nodes.guided_run").Run(model, x, sigmas, extra_args, {})))
        return x

    sampled(made, function, batch, shape, steps)
    return found[0]


def sampled(made: Any, function: Callable, batch: int = 1, shape: tuple[int, ...] = IMAGE, steps: int = 5,
            **options: Any) -> Tensor:
    """A run of a sampler function on a guider."""
    import comfy.samplers
    sampling = made.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "karras", steps)
    noise = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))
    sampler = comfy.samplers.KSAMPLER(function, extra_options=options)
    with torch.inference_mode():
        return made.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)


def listed(name: str) -> Callable:
    """The sampler function of a name in KSampler's list."""
    pack()
    return getattr(sys.modules["comfy.k_diffusion.sampling"], f"sample_{name}")
