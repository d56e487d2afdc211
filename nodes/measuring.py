"""A run of ComfyUI's in which the model is measured: asked in parts, without caches, counted, cancellable."""
from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..samplers.model import UnsteadyModel
from ..samplers.schedule import Level, find_path, levels
from . import identity
from .events import say
from .host import following, latent_for, nested, path_of
from .middle_block import MiddleBlock

PROMPT = "lambda_solvers.prompt"  # in model_options, of the images of a call
NESTED = ("this model's latents are nested (several in one, such as video and sound): one calibration cannot "
          "hold for all of them")


@dataclass
class Pace:
    """What a run comes to while it measures."""

    sigma: float = math.inf  # asked last
    batch: int = 0           # images at once, after memory did not suffice for the run's own
    calls: int = 0           # of the model
    called: Callable[[], None] = lambda: None  # after each of them


@dataclass(frozen=True)
class Run:
    """What a sampler function was called with; `model` is what ComfyUI hands to it."""

    model: Any
    x: Tensor
    sigmas: Tensor
    extra_args: dict
    options: Mapping[str, Any]
    grid: Sequence[float] = ()         # the levels that a measurement goes over, if they are not the run's
    prompts: int = 1                   # image k of a measurement has prompt k modulo so many
    block: MiddleBlock | None = None   # what is watched meanwhile
    image: int | None = None           # evaluations of one image, where one will be sampled
    pace: Pace = field(default_factory=Pace)

    @property
    def guider(self) -> Any:
        return self.model.inner_model

    @property
    def patcher(self) -> Any:
        return self.guider.model_patcher

    @property
    def path(self) -> str:
        return path_of(self.patcher.get_model_object("model_sampling"))

    @property
    def levels(self) -> list[Level]:
        return levels(self.sigmas.tolist(), find_path(self.path))

    @property
    def batch(self) -> int:
        """How many images the model is asked for at once."""
        return self.pace.batch or len(self.x)

    def calls(self, images: int) -> int:
        """How often the model is called for one evaluation of so many images."""
        return sum(math.ceil(len(range(prompt, images, self.prompts)) / self.batch)
                   for prompt in range(self.prompts))

    def denoise(self, x: Tensor, sigma: Tensor, images: Sequence[int] | None = None) -> Tensor:
        """The model function that is being sampled, without its inpainting mask and caches, for any number of
        images; sigma [B]. images [B]: their numbers, if they are not all from the first on, in order.

        ComfyUI has reserved memory for the run's own batch, so the model is asked for just so many images
        at once, those of one prompt; if there are fewer, they are repeated. Every call is told the levels
        that are measured.

        What is learned from many runs begins each of them with the hooks at their first keyframes, which
        never go back by themselves.
        """
        if hooks := self._hooks():
            if (now := float(sigma.max())) > self.pace.sigma:
                self._rewind(hooks)
            self.pace.sigma = now
        if self.block:
            self.block.begin()
        of = [k % self.prompts for k in (range(len(x)) if images is None else images)]
        rows, answers = [], []
        for prompt in sorted({*of}):
            left = [row for row, own in enumerate(of) if own == prompt]
            while left:
                few, answer = self._answer(x, sigma, left, prompt)
                rows += few
                answers.append(answer)
                left = left[len(few):]
                if self.block:
                    self.block.keep(len(few))
        found = torch.cat(answers)
        return found if self.prompts == 1 else found[torch.tensor(rows).argsort()]

    def _answer(self, x: Tensor, sigma: Tensor, rows: list[int], prompt: int) -> tuple[list[int], Tensor]:
        """The first of these rows, as many as one call takes, and what the model says to them."""
        batch = self.batch
        few = rows[:batch]
        asked = (few * batch)[:batch]
        try:
            return few, self._ask(x[asked], sigma[asked], prompt)[:len(few)]
        except Exception as fault:
            if not out_of_memory(fault):
                raise
            if self.pace.batch or batch == 1:
                raise comfy.model_management.OOM_EXCEPTION(
                    f"out of memory while measuring the model, {batch} image{'s' * (batch > 1)} at once: "
                    "measure at a smaller size, which serves larger ones too (a run of a smaller latent, or "
                    "the node that measures), with a batch of 1, or make room on the device. The fault was: "
                    f"{fault}") from fault
        self.pace.batch = batch // 2  # not above, where the fault still holds what did not fit
        say(f"warning: out of memory while measuring {batch} images at once: going on with {batch // 2}. "
            "Measure with a smaller batch to avoid this", logging.WARNING)
        comfy.model_management.soft_empty_cache()
        return self._answer(x, sigma, rows, prompt)

    def _ask(self, x: Tensor, sigma: Tensor, prompt: int) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        grid = self.grid or self.sigmas.tolist()
        told = following(self.extra_args, [*grid, *sigma.tolist()])
        options = {**identity.without_caches(told.get("model_options", {})), PROMPT: prompt}
        answer = self.guider(x, sigma, model_options=options, seed=self.extra_args.get("seed"))
        self.pace.calls += 1
        self.pace.called()
        return answer

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
            self._rewind(self._hooks())

    def _hooks(self) -> list[Any]:
        return [hook for conds in self.guider.conds.values() for cond in conds if "hooks" in cond
                for hook in cond["hooks"].hooks]

    def _rewind(self, hooks: list[Any]) -> None:
        if hooks:
            self.patcher.clean_hooks()  # weights of the last keyframe
        for hook in hooks:
            hook.initialize_timesteps(self.guider.inner_model)


def out_of_memory(fault: Exception) -> bool:
    """Whether a fault says so; newer ComfyUI knows more kinds of it."""
    known = getattr(comfy.model_management, "is_oom", None)
    return known(fault) if known else isinstance(fault, comfy.model_management.OOM_EXCEPTION)


USUAL = 20  # steps of an image, where none is sampled


def as_long_as(calls: float, image: int | None) -> str:
    """So many calls of the model, in images of `image` evaluations."""
    count = max(1, round(calls / (image or USUAL)))
    return f"as long as {count} image{'s' * (count > 1)}" + ("" if image else f" of {USUAL} steps")


TIMED = 3  # calls of the model, the first of which may be slow: then its pace is known


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


class Progress:
    """ComfyUI's progress bar and a line on the node, for `progress(done, total, ...)`; a place where Cancel
    takes hold, as every call of the model is.

    calls: of the model, the most there can be, where all evaluations are not of all images. What they cost is
    said before the first, and in time as soon as the pace is known. As text: what it took, after the last.
    """

    def __init__(self, what: str, run: Run, images: int, calls: int = 0) -> None:
        self.what, self.run, self.images, self.calls = what, run, images, calls
        self.bar, self.start, self.done, self.total = None, time.monotonic(), 0, 1
        self.before = run.pace.calls
        if calls:
            say(f"{what}: {as_long_as(calls, run.image)}")
            run.pace.called = self._called

    def __call__(self, done: int, total: int, loss: float = math.nan) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)
        self.done, self.total = done, total
        left = self._seconds(total - done)
        error = "" if math.isnan(loss) else f", error {loss:.3g}"
        say(f"{self.what}: evaluation {done} of {total}, {self._cost(total)}{error}, "
            + (f"{left:.0f} s left" if left < 600 else f"{left / 60:.0f} min left"))

    def _called(self) -> None:
        if self.run.pace.calls - self.before == TIMED:
            say(f"{self.what}: {self._cost(self.total)}, about {duration(self._seconds(self.total))}")

    def _of(self, evaluations: int) -> float:
        """In calls of the model."""
        each = self.calls / self.total if self.calls else self.run.calls(self.images)
        return evaluations * each

    def _cost(self, evaluations: int) -> str:
        return as_long_as(self._of(evaluations), self.run.image)

    def _seconds(self, evaluations: int) -> float:
        """What these take at the pace so far."""
        made = self.run.pace.calls - self.before
        return (time.monotonic() - self.start) / max(made, 1) * self._of(evaluations)

    def __str__(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s, {self._cost(self.done)}"


@contextmanager
def resumable(what: str, partial: Path | None, run: Run) -> Iterator[None]:
    """Says after Cancel whether the next run goes on from there.

    ValueError for a model that does not answer for itself, naming what other nodes have put around it.
    """
    try:
        yield
    except UnsteadyModel as fault:
        named = ", ".join(identity.changed(run.patcher)) or "nothing that ComfyUI knows of"
        raise ValueError(f"{fault}. Other nodes have put around this model: {named}. Bypass the node that "
                         "did it and measure; given the result (by the nodes Load and Apply behind the "
                         "model), a sampler needs no measuring, and the node may be switched on "
                         "again") from fault
    except comfy.model_management.InterruptProcessingException:
        kept = partial is not None and partial.exists()
        say(f"{what} was cancelled; the next run {'goes on from there' if kept else 'begins anew'}")
        raise


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
            self.cfg * self.shares[k], model_options=model_options, seed=seed)


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
