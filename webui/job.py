"""A job of the WebUI's in which the model is measured, and everything else left as it was."""
from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import torch
from modules import devices, sd_samplers_common, shared
from torch import Tensor

from ..hosting import canonical, measuring
from ..samplers.learning.measure import INTERVALS
from . import checkpoint

STATE = "sampling_step", "current_latent", "current_image", "current_image_sampling_step"
"""What every call of the model moves, of the WebUI's state."""


@dataclass(frozen=True)
class Run(measuring.Run):
    """What the WebUI calls a sampler function with; `model` is its CFGDenoiser."""

    sampler: Any = None
    each: Sequence[Mapping[str, Any]] = ()  # where there are several prompts: the arguments of each

    cancelled = sd_samplers_common.InterruptedException
    remedies = {
        "saved only": ("set Lambda calibration to auto once, in the panel Lambda Solvers, or put a file "
                       "there that was made by ComfyUI's node {makes}"),
        "full noise": ("choose another sampler for image to image, such as Lambda Fitted"),
        "unsteady": ("Extensions have put around this model: {changed}. Switch off the one that did it, or "
                     "choose a sampler that measures nothing, such as Lambda 2M"),
    }

    @property
    def path(self) -> str:
        return self.sampler.path

    @property
    def ends(self) -> tuple[float, float]:
        sigmas = self.sampler.model_wrap.sigmas
        return float(sigmas[-1]), float(sigmas[0])

    @property
    def known(self) -> Sequence[float]:
        sigmas = self.sampler.model_wrap.sigmas
        return sigmas.tolist() if len(sigmas) >= 2 * INTERVALS else ()

    @property
    def precision(self) -> torch.dtype:
        """float16 or bfloat16 as the WebUI chose, or float32 for anything finer."""
        own = getattr(getattr(checkpoint.unet(), "model", None), "computation_dtype", None)
        dtype = own or devices.dtype_unet
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    @property
    def guided(self) -> str:
        return f"job is {checkpoint.guidance(self.sampler.p, self.extra_args)}"

    def description(self) -> dict[str, Any]:
        return checkpoint.description(self.sampler.p, self.extra_args)

    def changed(self) -> list[str]:
        return checkpoint.changed()

    def noised(self, noise: Tensor, sigma: float) -> Tensor:
        return noise * (sigma if self.path == "flow" else math.hypot(1.0, sigma))

    def ask(self, x: Tensor, sigma: Tensor, prompt: int) -> Tensor:
        """At the first step, where no prompt has changed yet."""
        self.check()
        self.model.step = 0
        told = {**self.extra_args, **(self.each[prompt] if self.each else {})}
        return self.model(x, sigma, **{**told, **checkpoint.few(told, len(x))})

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Also torch's random numbers: with masks and prompts that change the picture would else be another
        one than without a measurement."""
        refuse(self.sampler.p, self.model)
        devices_used = [self.x.device] if self.x.device.type == "cuda" else []
        state = {name: getattr(shared.state, name) for name in STATE if hasattr(shared.state, name)}
        with (torch.random.fork_rng(devices_used), temporarily(shared.state, **state),
              temporarily(self.model, step=self.model.step),
              temporarily(self.sampler, last_latent=getattr(self.sampler, "last_latent", None)),
              temporarily(checkpoint.unet(), controlnet_linked_list=None)):  # Forge's ControlNets
            yield

    @contextmanager
    def at_no_prompt(self) -> Iterator[None]:
        p, extra, before = self.sampler.p, self.extra_args, dict(self.extra_args)
        scale = canonical.guidance(checkpoint.guidance(p, extra))
        extra.update(checkpoint.nobody(extra), cond_scale=scale)
        try:
            with temporarily(p, hr_cfg=scale):
                yield
        finally:
            extra.update(before)

    @contextmanager
    def at_its_prompt(self) -> Iterator[None]:
        if checkpoint.scheduled(self.extra_args):
            raise ValueError("the model is not measured at a prompt that changes from step to step, or at "
                             "several joined by AND: set Lambda calibration to auto, which measures at "
                             "nobody's")
        yield

    def check(self) -> None:
        if shared.state.interrupted or shared.state.skipped:
            raise self.cancelled

    def show(self, done: int, total: int) -> None:
        """The lines say it (hosting/events.py): the WebUI's bar is the picture's."""


@contextmanager
def temporarily(holder: Any, **values: Any) -> Iterator[None]:
    """Attributes that are set for a while; those that the holder has not are left out."""
    before = {name: getattr(holder, name) for name in values if hasattr(holder, name)}
    try:
        for name in before:
            setattr(holder, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)


def refuse(p: Any, model: Any) -> None:
    """ValueError for a job in which the model does not answer for itself alone."""
    faults = {
        "a mask (inpainting)": model.mask is not None,
        "a refiner": bool(getattr(p, "refiner_checkpoint_info", None)),
        "Negative Guidance minimum sigma": getattr(p, "s_min_uncond", 0) > 0,
        "Ignore negative prompt during early sampling": getattr(shared.opts, "skip_early_cond", 0) > 0,
    }
    if found := [what for what, there in faults.items() if there]:
        raise ValueError(f"the model is not measured in a job with {' and '.join(found)}: make one picture "
                         "with the same model, guidance and LoRAs without, which saves what is measured, or "
                         "choose a sampler that measures nothing, such as Lambda 2M")


class Listener:
    """Shows at the progress bar what samplers say."""

    def said(self, text: str) -> None:
        shared.state.textinfo = text

    def ran(self, run: Any) -> None: """Nothing is kept of a run."""
