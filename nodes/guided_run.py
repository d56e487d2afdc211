"""A run of ComfyUI's in which the model is measured: without caches, under its guider's conditions."""
from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..hosting import measuring
from ..samplers.learning.measure import INTERVALS
from . import identity, nobody
from .host import following, latent_for, nested, path_of
from .middle_block import MiddleBlock

PROMPT = "lambda_solvers.prompt"  # in model_options, of the images of a call
NESTED = ("this model's latents are nested (several in one, such as video and sound): one calibration cannot "
          "hold for all of them")


@dataclass(frozen=True)
class Run(measuring.Run):
    """What ComfyUI calls a sampler function with."""

    cancelled = comfy.model_management.InterruptProcessingException
    remedies = {
        "saved only": ("run {makes} once, connect what Load Calibration hands out, or set measure to auto "
                       "(on the sampler's node; for KSampler in ComfyUI's settings, Lambda Solvers)"),
        "full noise": ("choose a scheduler and settings that start there (denoise 1, start_at_step 0), or "
                       "train for the whole schedule and allow interpolation in the AMED node"),
        "unsteady": ("Other nodes have put around this model: {changed}. Bypass the node that did it and "
                     "measure; given the result (by Load Calibration behind the model), a sampler "
                     "needs no measuring, and the node may be switched on again"),
    }

    @property
    def guider(self) -> Any:
        return self.model.inner_model

    @property
    def patcher(self) -> Any:
        return self.guider.model_patcher

    @property
    def sampling(self) -> Any:
        return self.patcher.get_model_object("model_sampling")

    @property
    def path(self) -> str:
        return path_of(self.sampling)

    @property
    def ends(self) -> tuple[float, float]:
        return float(self.sampling.sigma_max), float(self.sampling.sigma_min)

    @property
    def known(self) -> Sequence[float]:
        sigmas = getattr(self.sampling, "sigmas", None)
        return () if sigmas is None or len(sigmas) < 2 * INTERVALS else sigmas.tolist()

    @property
    def precision(self) -> torch.dtype:
        """float16 or bfloat16 as ComfyUI chose, or float32 for anything finer."""
        dtype = self.patcher.model.manual_cast_dtype or self.patcher.model.get_dtype()
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    @property
    def guided(self) -> str:
        return f"{type(self.guider).__name__} is {self.guider.cfg!r}"

    def description(self) -> dict[str, Any]:
        return nobody.description(self.guider)

    def changed(self) -> list[str]:
        return identity.changed(self.patcher)

    def attached(self, kind: Any) -> Any:
        return self.patcher.get_attachment(kind.attachment)

    def noised(self, noise: Tensor, sigma: float) -> Tensor:
        """As ComfyUI makes it of an empty latent."""
        return self.sampling.noise_scaling(noise.new_tensor([sigma]), noise, torch.zeros_like(noise),
                                           max_denoise=True)

    def ask(self, x: Tensor, sigma: Tensor, prompt: int) -> Tensor:
        """Without its inpainting mask and caches; every call is told the levels that are measured."""
        self.check()
        grid = self.grid or self.sigmas.tolist()
        told = following(self.extra_args, [*grid, *sigma.tolist()])
        options = {**identity.without_caches(told.get("model_options", {})), PROMPT: prompt}
        return self.guider(x, sigma, model_options=options, seed=self.extra_args.get("seed"))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The guider as it is at the start of a run, and again afterwards: without caches, and with its hooks
        at their first keyframes. ValueError for latents that cannot be measured.
        """
        if nested(self.guider):
            raise ValueError(f"{NESTED}. Choose a sampler that needs none, such as lambda_2m")
        options = self.guider.model_options
        self.guider.model_options = identity.without_caches(options)
        try:
            yield
        finally:
            self.guider.model_options = options
            self.rewind()

    def at_no_prompt(self) -> AbstractContextManager[None]:
        return nobody.conditions(self)

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def show(self, done: int, total: int) -> None:
        if self.pace.bar is None or self.pace.bar.total != total:
            self.pace.bar = comfy.utils.ProgressBar(total)
        self.pace.bar.update_absolute(done, total)

    def middle_block(self) -> AbstractContextManager[MiddleBlock | None]:
        block = MiddleBlock(self.patcher)
        return block if block.exists else nullcontext()

    def out_of_memory(self, fault: Exception) -> bool:
        """Newer ComfyUI knows more kinds of it."""
        known = getattr(comfy.model_management, "is_oom", None)
        return known(fault) if known else isinstance(fault, comfy.model_management.OOM_EXCEPTION)

    def free_memory(self) -> None:
        comfy.model_management.soft_empty_cache()

    def rewind(self) -> None:
        """The hooks to their first keyframes: they never go back by themselves."""
        hooks = [hook for conds in self.guider.conds.values() for cond in conds if "hooks" in cond
                 for hook in cond["hooks"].hooks]
        if hooks:
            self.patcher.clean_hooks()  # weights of the last keyframe
        for hook in hooks:
            hook.initialize_timesteps(self.guider.inner_model)


class Measuring(comfy.samplers.Sampler):
    """A sampler that makes no image: it measures the model it is given."""

    def __init__(self, measure: Callable[[Run], None], sigmas: Tensor) -> None:
        self.measure, self.sigmas = measure, sigmas

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        wrapped = type("Guided", (), {"inner_model": model_wrap})()
        run = Run(wrapped, noise, self.sigmas, extra_args, {}, prompts=len(model_wrap.shares))
        with run.apart():
            self.measure(run)
        return noise


class SeveralPrompts(comfy.samplers.CFGGuider):
    """A guider with several prompts, of which a call names the one that it is for.

    Each is guided at its share of the guider's scale.
    """

    def set_prompts(self, positives: Sequence[Any], negative: Any, shares: Sequence[float] = ()) -> None:
        self.shares = shares or [1.0] * len(positives)
        named = {_positive(k): cond for k, cond in enumerate(positives)}
        self.inner_set_conds({"negative": negative, **named})

    @property
    def guidances(self) -> list[float]:
        """Of every prompt."""
        return [self.cfg * share for share in self.shares]

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        k = model_options[PROMPT]
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], self.conds[_positive(k)],
            self.guidances[k], model_options=model_options, seed=seed)


def _positive(k: int) -> str:
    return f"positive.{k}" if k else "positive"


def measured(model: Any, positives: Sequence[Any], negative: Any, cfg: float, latent: dict, seed: int,
             sigmas: Tensor | None,
             measure: Callable[[Run], Any], shares: Sequence[float] = ()) -> Any:
    """What `measure` makes of a model under these conditions, in a run of ComfyUI's own.

    The latent's batch says how many images are evaluated at once; shares: the guidance of every prompt, as a
    multiple of cfg, if it is not cfg.
    """
    guider = SeveralPrompts(model)
    guider.set_prompts(positives, negative, shares)
    guider.set_cfg(cfg)
    if latent["samples"].is_nested:
        raise ValueError(NESTED)
    samples = latent_for(model, latent)
    sampling = model.get_model_object("model_sampling")
    ends = torch.tensor([float(sampling.sigma_max), float(sampling.sigma_min)])
    result: list[Any] = []
    guider.sample(torch.zeros_like(samples), samples, Measuring(lambda run: result.append(measure(run)),
                                                              ends if sigmas is None else sigmas), ends,
                  disable_pbar=True, seed=seed)
    return result[0]
