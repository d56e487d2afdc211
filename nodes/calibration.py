"""What a solver needs to know of the model being sampled: given, attached, saved before, or measured now.

How it comes to a run is the same for every kind of it (kinds.py says which there are).
"""
from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Protocol, Sequence

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..samplers.model import UnsteadyModel
from ..samplers.schedule import Level, find_path, levels
from . import canonical, identity, settings, store
from .events import say
from .host import following, latent_for, nested, path_of
from .middle_block import MiddleBlock
from .settings import RULES

VARIABLE = "LAMBDA_SOLVERS_CALIBRATION"
PROMPT = "lambda_solvers.prompt"  # in model_options, of the images of a call
NESTED = ("this model's latents are nested (several in one, such as video and sound): one calibration cannot "
          "hold for all of them")


@dataclass
class Pace:
    """What a run comes to while it measures."""

    sigma: float = math.inf  # asked last
    batch: int = 0           # images at once, after memory did not suffice for the run's own


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

    def calls(self, images: int) -> int:
        """How often the model is called for one evaluation of so many images."""
        return sum(math.ceil(len(range(prompt, images, self.prompts)) / len(self.x))
                   for prompt in range(self.prompts))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The model function that is being sampled, without its inpainting mask and caches, for any number of
        images; sigma [B].

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
        images, answers = [], []
        for prompt in range(self.prompts):
            left = list(range(len(x)))[prompt::self.prompts]
            while left:
                few, answer = self._answer(x, sigma, left, prompt)
                images += few
                answers.append(answer)
                left = left[len(few):]
                if self.block:
                    self.block.keep(len(few))
        found = torch.cat(answers)
        return found if self.prompts == 1 else found[torch.tensor(images).argsort()]

    def _answer(self, x: Tensor, sigma: Tensor, images: list[int], prompt: int) -> tuple[list[int], Tensor]:
        """The first of these images, as many as one call takes, and what the model says to them."""
        batch = self.pace.batch or len(self.x)
        few = images[:batch]
        rows = (few * batch)[:batch]
        try:
            return few, self._ask(x[rows], sigma[rows], prompt)[:len(few)]
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
        return self._answer(x, sigma, images, prompt)

    def _ask(self, x: Tensor, sigma: Tensor, prompt: int) -> Tensor:
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


class Kind(Protocol):
    """Something a solver needs to know of a model."""

    option: str         # the solver's option that takes it
    type: type          # what it is: it has `about`, arrays(), save(path, overwrite) and load(path)
    attachment: str     # its name on a MODEL
    noun: str           # in sentences
    makes: str          # the node that measures it

    def name(self, about: Mapping[str, Any]) -> str:
        """What a file's name says of it, beside model and guidance."""
    def about(self, run: Run) -> dict[str, Any]:
        """What its description says of a run, beside model, guidance and prompt."""
    def serves(self, found: Any, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        """How well one of the right model and guidance serves a run with these options of the solver: 0 not
        at all, 1 as any other, 2 it was learned for just such a run."""
    def cost(self, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        """Evaluations to measure one, each of `images`; ValueError where it would be refused."""
    def images(self, options: Mapping[str, Any], shape: Sequence[int]) -> int:
        """How many it looks at for latents of this shape, [B, ...]."""
    def sampled(self, options: Mapping[str, Any], schedule: list[Level]) -> int:
        """Evaluations of one image that is sampled with it."""
    def measure(self, run: Run, about: dict[str, Any], partial: Any) -> Any: """A new one."""
    def suited(self, found: Any, conditions: str) -> Any:
        """As much of one as holds for the prompt with this digest."""
    def ready(self, found: Any, run: Run) -> AbstractContextManager[Any]:
        """It, as the solver needs it while it runs."""
    def draw(self, found: Any) -> Tensor: """Its picture, [1, H, W, 3]."""


def rule() -> str:
    """What a sampler in a list does without a calibration: the environment variable, else ComfyUI's settings,
    else auto."""
    value, where = os.environ.get(VARIABLE), f"the environment variable {VARIABLE}"
    if not value:
        value, where = settings.read(settings.CALIBRATION) or RULES[0], f"the setting {settings.CALIBRATION}"
    if value not in RULES:
        raise ValueError(f"{where} is {value!r}: choose one of {', '.join(RULES)}")
    return value


def calibration_for(kind: Kind, run: Run, given: Any, how: str) -> tuple[str, Any]:
    """What to sample `run` with, after its name: its file's, or where else it came from (events.Used).

    In this order: what was given to the node; what is attached to the MODEL; a saved file that `choice`
    takes; and, if `how` is auto or every prompt, a new one, measured on this very model function and saved:
    for auto at nobody's prompt (canonical.py).
    """
    for where, found in (("given", given), ("attached", run.patcher.get_attachment(kind.attachment))):
        if found is not None:
            warn(kind, found, run)
            return where, found
    if how == "never":
        raise ValueError(f"this sampler needs {kind.noun}, and measuring is switched off: add the node Load "
                         f"Calibration or {kind.makes} and connect it to the sampler node, or put Apply "
                         "Calibration behind the model")
    own = described(kind, run)
    saved = choice(kind, own, how, run.options, run.path, run.levels)
    if saved:
        name, found = saved
        say(f"{kind.noun}: {name}")
        return name.removesuffix(store.ENDING), found
    sought = wanted(own, how)
    of = f"{sought['model']} at guidance {sought['guidance']:g}"
    if how == "saved only":
        raise ValueError(f"no saved {kind.noun} for {of} in {store.directory()} serves this run: run "
                         f"{kind.makes} once, or set measure to auto (on the sampler's node; for KSampler in "
                         "ComfyUI's settings, Lambda Solvers)")
    run = replace(run, image=kind.sampled(run.options, run.levels))
    calls = kind.cost(run.options, run.path, run.levels) * run.calls(kind.images(run.options, run.x.shape))
    say(f"no saved {kind.noun} for {of} serves this run: measuring once, {as_long_as(calls, run.image)}")
    with run.apart(), measuring_at(kind, run, how) as about:
        result = kind.measure(run, about, store.partial(file_name(kind, about)))
    path = kept(kind, result)
    if path is None:
        return "measured", result
    say(f"{kind.noun} saved: {path.stem}")
    return path.stem, result


@contextmanager
def measuring_at(kind: Kind, run: Run, how: str) -> Iterator[dict[str, Any]]:
    """The guider of a run under the conditions that `how` measures at; what its description says then."""
    about = dict(wanted(described(kind, run), how))
    with canonical.conditions(run) if how == "auto" else nullcontext():
        yield about


def kept(kind: Kind, result: Any) -> Path | None:
    """The file of its usual name in which a calibration is saved; None, with a warning, where nothing can be
    written."""
    try:
        path = store.spare(file_name(kind, result.about), result)
        result.save(path, overwrite=True)
    except OSError as fault:
        say(f"warning: {kind.noun} measured, but not saved ({fault}): the next run measures "
            "again", logging.WARNING)
        return None
    return path


def description(guider: Any) -> dict[str, Any]:
    """Which model a guider samples, and at what; and what `auto` would measure at in place of its prompt."""
    return {**identity.description(guider), "any": canonical.digest(guider)}


def choice(kind: Kind, about: Mapping[str, Any], how: str, options: Mapping[str, Any], path: str,
           schedule: list[Level]) -> tuple[str, Any] | None:
    """The saved file that a run of this description takes, and what is in it; None if it takes none.

    It is of the same checkpoint and patches, at near strengths and guidance; for auto measured at nobody's
    prompt, for "every prompt" at the run's own; or, whatever the rule, learned for all prompts and just such
    a run. Of several those that serve best, then those of the same prompt, then of the nearest guidance, then
    those that were measured for no more than is needed, then the newest.
    """
    sought, found = wanted(about, how), []
    rules = {"auto": lambda told: canonical.same(told, sought),
             "every prompt": lambda told: told.get("conditions") == sought["conditions"]}
    measured_for = rules.get(how, lambda told: True)
    for name in store.listed():
        content = store.read(kind.type, name)
        if content is None or not of_one_model(content.about, sought):
            continue
        well = kind.serves(kind.suited(content, sought["conditions"]), options, path, schedule)
        if well == 2 or well and measured_for(content.about):
            rank = (-well, content.about.get("conditions") != sought["conditions"],
                    abs(content.about["guidance"] - sought["guidance"]), bool(content.about.get("fitted")))
            found.append((rank, content.about.get("created", ""), name, content))
    found.sort(key=lambda entry: entry[1:3], reverse=True)
    return min(found, key=lambda entry: entry[0])[2:] if found else None


def wanted(about: Mapping[str, Any], how: str) -> Mapping[str, Any]:
    """What a file should say of itself to serve a run of this description."""
    return canonical.instead(about) if how == "auto" else about


def described(kind: Kind, run: Run) -> dict[str, Any]:
    """The description of a run, with what the kind adds; ValueError for a guidance that is no number."""
    about = description(run.guider)
    if math.isnan(about["guidance"]):
        raise ValueError(f"the guidance of this {type(run.guider).__name__} is {run.guider.cfg!r}, and "
                         f"{kind.noun} hold for one number: set one, give the sampler what {kind.makes} made "
                         "at a number, or choose a sampler that needs none, such as lambda_2m")
    return {**about, **kind.about(run)}


def file_name(kind: Kind, about: Mapping[str, Any]) -> str:
    """The name of a file unless another is given: one for each model, patches, guidance, prompt, and what the
    kind adds."""
    strengths = [f" {strength:.3g}" for strength in _numbers(about, "strengths")]
    patches = "".join([*about.get("patches", []), *strengths])
    patched = hashlib.sha256(patches.encode()).hexdigest()[:6] if patches else ""
    distilled = "".join(f"-guidance{scale:g}" for scale in _numbers(about, "distilled"))
    prompt = "" if canonical.named(about) else about.get("conditions", "")
    return "-".join(filter(None, [about.get("model", "model"), patched, kind.name(about),
                                  f"cfg{about.get('guidance', 1.0):g}{distilled}", prompt]))


USUAL = 20  # steps of an image, where none is sampled


def as_long_as(calls: float, image: int | None) -> str:
    """So many calls of the model, in images of `image` evaluations."""
    count = max(1, round(calls / (image or USUAL)))
    return f"as long as {count} image{'s' * (count > 1)}" + ("" if image else f" of {USUAL} steps")


class Progress:
    """ComfyUI's progress bar and a line on the node, for `progress(done, total, ...)`; the place where Cancel
    takes hold.

    As text: what it took, after the last call.
    """

    def __init__(self, what: str, run: Run, images: int) -> None:
        self.what, self.image, self.each = what, run.image, run.calls(images)
        self.bar, self.start, self.done, self.made = None, time.monotonic(), 0, 0

    def __call__(self, done: int, total: int, loss: float = math.nan) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)
        self.done, self.made = done, self.made + 1
        left = (time.monotonic() - self.start) / self.made * (total - done)
        error = "" if math.isnan(loss) else f", error {loss:.3g}"
        say(f"{self.what}: evaluation {done} of {total}, {as_long_as(total * self.each, self.image)}{error}, "
            f"{left:.0f} s left")

    def __str__(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s, {as_long_as(self.done * self.each, self.image)}"


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


NUMBERS = {"guidance": 0.1, "distilled": 0.1, "strengths": 0.0}
"""What of a description need only be near, and how far apart beyond a tenth: 0.8 and 0.88 of a LoRA are near,
0.1 and 0.2 are not."""


def near(a: float, b: float, apart: float = 0.1) -> bool:
    """Numbers close enough to share statistics: within a tenth, and `apart` more, for small ones."""
    return abs(a - b) <= apart + 0.1 * max(abs(a), abs(b))


def alike(key: str, about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two descriptions agree in one of NUMBERS: one number, or as many; None stands for none."""
    def close(x: Any, y: Any) -> bool:
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            return near(x, y, NUMBERS[key])
        return x is None and y is None

    a, b = (told.get(key, []) for told in (about, wanted))
    a, b = (value if isinstance(value, list) else [value] for value in (a, b))
    return len(a) == len(b) and all(map(close, a, b))


def of_one_model(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a calibration of one description holds for the other, but for the prompt."""
    return all(about.get(key) == wanted[key] for key in ("fingerprint", "patches")) and all(
        alike(key, about, wanted) for key in NUMBERS)


def faults(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Why a calibration made for `about` may not serve `wanted`, both as `identity.description` has them; the
    prompt apart."""
    found = []
    if about.get("fingerprint", "") != wanted["fingerprint"]:
        found.append(f"measured on {about.get('model', 'an unnamed model')}, and this is {wanted['model']}")
    elif about.get("patches", []) != wanted["patches"]:
        found.append(f"measured with the patches {about.get('patches') or 'none'}, and this model has "
                     f"{wanted['patches'] or 'none'}")
    elif not alike("strengths", about, wanted):
        found.append(f"measured with patches at strength {_listed(about, 'strengths')}, and here it is "
                     f"{_listed(wanted, 'strengths')}")
    if not alike("guidance", about, wanted):
        here = "changes from step to step" if math.isnan(wanted["guidance"]) else f"is {wanted['guidance']:g}"
        found.append(f"measured for guidance {about.get('guidance', 'unknown')}, and this {here}")
    if not alike("distilled", about, wanted):
        found.append(f"measured for distilled guidance {_listed(about, 'distilled')}, and this is "
                     f"{_listed(wanted, 'distilled')}")
    return found


def _listed(about: Mapping[str, Any], key: str) -> str:
    return ", ".join(dict.fromkeys(f"{value:g}" for value in _numbers(about, key))) or "none"


def _numbers(about: Mapping[str, Any], key: str) -> list[float]:
    """Those in a list of a description, which may come from anyone's file."""
    found = about.get(key)
    return [value for value in found if isinstance(value, (int, float))] if isinstance(found, list) else []


def warn(kind: Kind, found: Any, run: Run) -> None:
    """Say why a calibration that was given may not fit the run, if it may not."""
    for fault in faults(found.about, identity.description(run.guider)):
        say(f"warning: the {kind.noun} may not fit: {fault}. Measure anew with {kind.makes}", logging.WARNING)


class Measuring(comfy.samplers.Sampler):
    """A sampler that makes no image: it measures the model it is given."""

    def __init__(self, measure: Callable[[Run], None], sigmas: Tensor) -> None:
        self.measure, self.sigmas = measure, sigmas

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        wrapped = type("Guided", (), {"inner_model": model_wrap})()
        run = Run(wrapped, noise, self.sigmas, extra_args, {}, prompts=model_wrap.prompts)
        with run.apart():
            self.measure(run)
        return noise


class SeveralPrompts(comfy.samplers.CFGGuider):
    """A guider with several prompts, of which a call names the one that it is for."""

    def set_prompts(self, positives: Sequence[Any], negative: Any) -> None:
        self.prompts = len(positives)
        named = {_positive(k): cond for k, cond in enumerate(positives)}
        self.inner_set_conds({"negative": negative, **named})

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        positive = self.conds[_positive(model_options[PROMPT])]
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], positive, self.cfg,
            model_options=model_options, seed=seed)


def _positive(k: int) -> str:
    return f"positive.{k}" if k else "positive"


def measured(model: Any, positives: Sequence[Any], negative: Any, cfg: float, latent: dict, seed: int,
             sigmas: Tensor | None,
             measure: Callable[[Run], Any]) -> Any:
    """What `measure` makes of a model under these conditions, in a run of ComfyUI's own.

    The latent's batch says how many images are evaluated at once.
    """
    guider = SeveralPrompts(model)
    guider.set_prompts(positives, negative)
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
