"""ComfyUI's conventions: which path a loaded model is on, and a solver as a sampler function of KSAMPLER."""
from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Iterable, Mapping, Sequence

import comfy.model_sampling
import comfy.sample
import torch
from comfy.model_patcher import set_model_options_post_cfg_function
from comfy.samplers import KSAMPLER
from comfy_api.latest import io
from torch import Tensor

from ..hosting.kinds import kind_for
from ..samplers.catalogue import Sampler
from ..samplers.denoisers import plus
from ..samplers.k_diffusion import k_diffusion_function
from ..samplers.tensors import moved

REFUSED = {
    "IMG_TO_IMG": "it maps an image to an image and does not denoise",
    "V_PREDICTION_DDPM": "its network and its sampler disagree on what x is",
}
"""What the names of sampling classes begin with that no schedule in lambda fits; newer ComfyUI has several of
each."""


CATEGORY = "Lambda Solvers"
SPECIAL = "Lambda Solvers/special"  # what seldom pays, or is for one kind of model


def advanced(widget: io.Input) -> io.Input:
    widget.extra_dict = {"advanced": True}  # not an argument yet in ComfyUI 0.3.75
    return widget


def path_of(model_sampling: object) -> str:
    """The Gaussian path of ComfyUI's sampling class: "flow" for CONST, "ve" for the classes that see x0 +
    sigma eps.

    ValueError naming the class if it is neither.
    """
    names = [c.__name__ for c in type(model_sampling).__mro__]
    for beginning, reason in REFUSED.items():
        for name in names:
            if name.startswith(beginning):
                raise ValueError(f"Lambda Solvers cannot sample a model of sampling class {name}: {reason}. "
                                 "Choose one of ComfyUI's own samplers, such as euler")
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return "flow"
    if isinstance(model_sampling, (comfy.model_sampling.EPS, comfy.model_sampling.COSMOS_RFLOW)):
        return "ve"
    raise ValueError("Lambda Solvers does not know the sampling class of this model "
                     f"({', '.join(names[:-1])}): it knows EPS, V_PREDICTION, EDM, X0, COSMOS_RFLOW (sigma "
                     "schedules) and CONST (flow). Choose one of ComfyUI's own samplers, such as euler")


def noise_scale(model_sampling: object) -> float:
    """The standard deviation of a model's noise: in newer ComfyUI some flow models have more than 1."""
    return getattr(model_sampling, "noise_scale", 1.0)


def latent_for(model: Any, latent: dict) -> Tensor:
    """The samples of a LATENT, an empty one in the shape that KSampler gives it for this model.

    Newer ComfyUI changes its size too, by what the LATENT says of itself, under the names of the function's
    arguments.
    """
    fix = comfy.sample.fix_empty_latent_channels
    return fix(model, latent["samples"],
               **{name: latent[name] for name in inspect.signature(fix).parameters if name in latent})


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """A choice, looked at again: ComfyUI before 0.27 lets any pass that an API prompt has."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is no choice: choose one of {', '.join(choices)}")
    return value


def following(extra_args: Mapping[str, Any] | None, sigmas: Sequence[float]) -> dict[str, Any]:
    """extra_args that tell nodes which look their step up that a run goes over these levels, in new dicts."""
    options = (extra_args or {}).get("model_options", {})
    transformer = options.get("transformer_options", {})
    if "sample_sigmas" not in transformer:
        return dict(extra_args or {})
    own = transformer["sample_sigmas"]
    told = moved(torch.tensor(sigmas, dtype=own.dtype).unique().flip(0), own.device)
    transformer = {**transformer, "sample_sigmas": told}
    return {**extra_args, "model_options": {**options, "transformer_options": transformer}}


def nested(guider: Any) -> bool:
    """Whether a guider that is sampling has latents of several kinds, which ComfyUI has packed into one."""
    told = [cond.get("model_conds", {}) for conds in guider.conds.values() for cond in conds]
    return any("latent_shapes" in named and len(named["latent_shapes"].cond) > 1 for named in told)


class _Around:
    """A model whose answers go through a function. Everything else of it is as it was."""

    def __init__(self, model: Any, passed: Callable[[Tensor], Tensor]) -> None:
        self.model, self.passed = model, passed

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        return self.passed(self.model(*arguments, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def around(sampler: KSAMPLER, passed: Callable[[Tensor], Tensor]) -> KSAMPLER:
    """A sampler, whosever, for whom the model's answers go through a function. What it measures before, it
    asks the model itself."""
    @functools.wraps(sampler.sampler_function)
    def function(model: Any, *arguments: Any, **named: Any) -> Tensor:
        return sampler.sampler_function(_Around(model, passed), *arguments, **named)

    return KSAMPLER(function, sampler.extra_options, sampler.inpaint_options)


def guided_by_step(sampler: KSAMPLER) -> KSAMPLER:
    """A sampler, whosever, whose guidance is that of CFG++: an evaluation belongs to the interval of the
    schedule that it begins or lies in. Not for one of ours that learns what the model says beforehand."""
    ours = getattr(sampler.sampler_function, "lambda_solvers", None)

    @functools.wraps(sampler.sampler_function)
    def function(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, *arguments: Any,
                 **named: Any) -> Tensor:
        if ours and kind_for(ours):
            raise ValueError("cfg_pp is another guidance in every step, and what this sampler learned "
                             "beforehand is of one: connect a sampler without calibration, such as "
                             "Multistep, or set cfg_pp to false")
        path = path_of(model.inner_model.model_patcher.get_model_object("model_sampling"))
        levels = sigmas.float()
        noise = levels / (1.0 - levels) if path == "flow" else levels
        ratios = noise[1:] / noise[:-1]

        def guided(said: dict) -> Tensor:
            if said["uncond"] is None:
                raise ValueError("cfg_pp needs the model's answer to the negative prompt, and this guider "
                                 "has none: use KSampler or CFGGuider, or set cfg_pp to false")
            after = torch.searchsorted(-levels[:-1], said["sigma"].float() * -(1.0 - 1e-5), right=True)
            return plus(said["denoised"], said["uncond_denoised"], ratios[after.clamp(min=1) - 1])

        options = set_model_options_post_cfg_function(extra_args["model_options"].copy(), guided,
                                                      disable_cfg1_optimization=True)
        told = {**extra_args, "model_options": options}
        return sampler.sampler_function(model, x, sigmas, told, *arguments, **named)

    return KSAMPLER(function, sampler.extra_options, sampler.inpaint_options)


def sampler_function(sampler: Sampler) -> Callable[..., Tensor]:
    """The function ComfyUI's KSAMPLER calls; its extra_options are the sampler's options."""

    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None,
               callback: Callable | None = None, disable: bool | None = None, **options: Any) -> Tensor:
        model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        fn = k_diffusion_function(
            sampler, path_of(model_sampling), options, noise_scale=noise_scale(model_sampling),
            follow=following, sigma_max=float(model_sampling.sigma_max),
            sigma_min=float(model_sampling.sigma_min))
        return fn(model, x.float(), sigmas, extra_args=extra_args, callback=callback,
                  disable=disable).to(x.dtype)

    return sample
