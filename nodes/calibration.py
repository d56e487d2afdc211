"""Statistics for the model being sampled: given, attached, saved before, or measured now."""
from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from typing import Any, Callable

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ..samplers import Statistics, estimate_statistics
from ..samplers.calibrate import INTERVALS
from . import identity, store
from .host import noise_scale, path_of

ATTACHMENT = "lambda_solvers.statistics"
RULES = ("auto", "every prompt", "saved only", "never")
VARIABLE = "LAMBDA_SOLVERS_CALIBRATION"
ELEMENTS, MOST = 6_144, 16
"""Trajectories are as many as give so many latent elements to average over, at most 16: 2 for the emoji model, 1 for
Stable Diffusion. One, two and eight for the emoji model gave solvers of the same error within 15 %, two the best."""


def rule() -> str:
    """What a sampler in a list does without statistics: the environment variable, or auto."""
    value = os.environ.get(VARIABLE, RULES[0])
    if value not in RULES:
        raise ValueError(f"the environment variable {VARIABLE} is {value!r}: choose one of {', '.join(RULES)}")
    return value


def statistics_for(model: Any, x: Tensor, extra_args: dict, given: Statistics | None, how: str,
                   fitted: bool = False) -> Statistics:
    """The statistics to sample `model` with; `model` is what ComfyUI hands to a sampler function.

    In this order: those given to the node; those attached to the MODEL; a saved file of the same checkpoint, patches and
    guidance (for "every prompt", of the same prompt too); and, if `how` is auto or every prompt, new ones, measured on this
    very model function and saved. Those of another prompt are used without b. `fitted` asks for statistics that serve the
    fitted solver; saved ones that do not are measured again and replaced.
    """
    guider = model.inner_model
    patcher, guidance = guider.model_patcher, float(guider.cfg)
    statistics = given or patcher.get_attachment(ATTACHMENT)
    conditions = identity.conditions(guider)
    if statistics is not None:
        _warn_if_foreign(statistics, patcher, guidance)
        return _fitted(statistics, conditions)
    if how == "never":
        raise ValueError("this sampler needs the model's statistics, and measuring them is switched off: add the node "
                         "Load Solver Statistics or Estimate Solver Statistics and connect it to the sampler node, or put "
                         "Apply Solver Statistics behind the model")
    about = description(guider)
    saved = store.find(about, exactly=how == "every prompt", fitted=fitted)
    if saved:
        name, statistics = saved
        say(f"statistics: {name}")
        return _fitted(statistics, conditions)
    if how == "saved only":
        raise ValueError(f"no saved statistics for {about['model']} at guidance {guidance:g} in {store.directory()}: run "
                         "Estimate Solver Statistics and Save Solver Statistics once, or set calibration to auto")
    name = file_name(about)
    say(f"no saved statistics for {about['model']} at guidance {guidance:g}: measuring them once")
    statistics = measure(model, x, extra_args, about, seed=0, fitted=fitted,
                         partial=store.place("partial/" + name).with_suffix(".part"))
    try:
        statistics.save(store.place(name), overwrite=fitted)
    except FileExistsError:  # somebody measured the same model meanwhile
        logging.info("Lambda Solvers: %s was saved by another run", name)
    say(f"statistics measured and saved: {name}")
    return statistics


def description(guider: Any) -> dict[str, Any]:
    """What a file says of the model, guidance and prompt it was measured on."""
    patcher = guider.model_patcher
    fingerprint = identity.fingerprint(patcher)
    return {"model": identity.title(patcher, fingerprint), "fingerprint": fingerprint,
            "patches": identity.patches(patcher), "guidance": float(guider.cfg), "conditions": identity.conditions(guider)}


def file_name(about: dict[str, Any]) -> str:
    """The name under which statistics are saved unless another is given: one for each model, patches, guidance, prompt."""
    patched = hashlib.sha256("".join(about["patches"]).encode()).hexdigest()[:6] if about.get("patches") else ""
    return "-".join(filter(None, [about.get("model", "model"), patched, f"cfg{about.get('guidance', 1.0):g}",
                                  about.get("conditions", "")]))


def measure(model: Any, x: Tensor, extra_args: dict, about: dict[str, Any], *, seed: int, intervals: int = INTERVALS,
            samples: int = 0, pool: str = "all", partial: Any = None, fitted: bool = False) -> Statistics:
    """Statistics of the model function that is being sampled, without its inpainting mask."""
    guider = model.inner_model
    sampling = guider.model_patcher.get_model_object("model_sampling")
    path = path_of(sampling)
    sigmas = table(sampling)
    count = samples or trajectories(x.shape)
    noise = torch.randn((count, *x.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(x.device)
    noise = noise * (noise_scale(sampling) if path == "flow" else math.sqrt(1.0 + sigmas[0] ** 2))
    bar, start = None, time.monotonic()

    def denoise(x_now: Tensor, sigma: Tensor) -> Tensor:
        return guider(x_now, sigma, model_options=extra_args.get("model_options", {}), seed=extra_args.get("seed"))

    def progress(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)
        left = (time.monotonic() - start) / done * (total - done)
        say(f"measuring the model's statistics: evaluation {done} of {total}, {left:.0f} s left")

    try:
        result = estimate_statistics(denoise, noise, sigmas, intervals=intervals, pool=pool, path=path, seed=seed, about=about,
                                     precision=precision_of(guider.model_patcher), progress=progress, partial=partial,
                                     fitted=fitted)
    except BaseException:
        say("the measurement was interrupted; the next run goes on from there")
        raise
    say(f"statistics measured in {result.about['evaluations']} evaluations")
    return result


def table(sampling: Any) -> list[float]:
    """The levels the model knows, from high to low: ComfyUI rounds every other one to them."""
    sigmas = getattr(sampling, "sigmas", None)
    if sigmas is None or len(sigmas) < 2 * INTERVALS:
        return [float(sampling.sigma_max), float(sampling.sigma_min)]
    return sorted((float(sigma) for sigma in sigmas), reverse=True)


def trajectories(shape: torch.Size) -> int:
    return max(1, min(MOST, math.ceil(ELEMENTS / math.prod(shape[1:]))))


def precision_of(patcher: Any) -> torch.dtype:
    """What the model computes in: float16 or bfloat16 as ComfyUI chose, or float32 for anything finer."""
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def say(text: str, level: int = logging.INFO) -> None:
    """Show a line on the node that is running, and write it to the log (but for the count while measuring)."""
    context = get_executing_context()
    if PromptServer.instance is not None and context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)
    if not text.startswith("measuring"):
        logging.log(level, "Lambda Solvers: %s", text)


def _fitted(statistics: Statistics, conditions: str) -> Statistics:
    """The part of the statistics that holds for the prompt being sampled."""
    if statistics.about.get("conditions") == conditions:
        return statistics
    say("statistics of another prompt: l and s are used, b is left out")
    return statistics.for_another_prompt()


def _warn_if_foreign(statistics: Statistics, patcher: Any, guidance: float) -> None:
    about = statistics.about
    faults = []
    fingerprint = identity.fingerprint(patcher)
    if about.get("fingerprint", "") != fingerprint:
        faults.append(f"they are of {about.get('model', 'an unnamed model')}, and this is "
                      f"{identity.title(patcher, fingerprint)}")
    elif about.get("patches", []) != identity.patches(patcher):
        faults.append(f"they were measured with the patches {about.get('patches') or 'none'}, and this model has "
                      f"{identity.patches(patcher) or 'none'}")
    if not store.near(float(about.get("guidance", math.nan)), guidance):
        faults.append(f"they are for guidance {about.get('guidance', 'unknown')}, and this is {guidance:g}")
    for fault in faults:
        say(f"warning: these statistics may not fit: {fault}. Measure new ones with Estimate Solver Statistics",
            logging.WARNING)


class Measuring(comfy.samplers.Sampler):
    """A sampler that makes no image: it measures the model it is given."""

    def __init__(self, run: Callable[[Any, Tensor, dict], None]) -> None:
        self.run = run

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        wrapped = type("Guided", (), {"inner_model": model_wrap})()
        self.run(wrapped, noise, extra_args)
        return noise
