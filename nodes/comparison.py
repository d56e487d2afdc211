"""Samplers side by side: the steps that fit a budget of model evaluations, counted runs, and the converged solution."""
from __future__ import annotations

import inspect
import math
import weakref
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Any, Callable, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER
from torch import Tensor

from ..samplers import PATHS, SAMPLERS
from ..samplers.schedule import Path
from .host import latent_for, path_of, sampler_function
from .sampling import calibrated, listed

OURS = "lambda/"


# --- what to compare --------------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """A sampler with its options. `rehearsal` is the same one, but for what would have to be calibrated first."""

    label: str
    sampler: KSAMPLER
    rehearsal: KSAMPLER
    listed: str  # the name for which KSampler makes its schedules


def parse(text: str) -> list[Entry]:
    """A sampler a line: `name`, or `name, option=value, option=value`. ValueError naming the line that is none."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("samplers is empty: write one sampler on each line, such as lambda_2m")
    return [_entry(line) for line in dict.fromkeys(lines)]


def _entry(line: str) -> Entry:
    name, *given = (part.strip() for part in line.split(","))
    options = {}
    for part in given:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"samplers: {part!r} in the line {line!r} is no option: write name, option=value")
        options[key] = _value(value)
    names = comfy.samplers.KSampler.SAMPLERS
    ours = listed(name) or (SAMPLERS.get(name.removeprefix(OURS)) if name not in names else None)
    if ours:
        try:
            ours.settings({**ours.stand_ins, **options})
        except ValueError as error:
            raise ValueError(f"samplers: the line {line!r}: {error}") from None
        if options.get("first_step") == "mean":
            raise ValueError(f"samplers: the line {line!r}: the mean is learned from other seeds, and here all runs have one noise, whose own "
                             "answer it would be: write evaluate or afs")
        return Entry(line, KSAMPLER(calibrated(ours), options), KSAMPLER(sampler_function(ours), {**ours.stand_ins, **options}),
                     name if name in names else "euler")
    if name not in names:
        raise ValueError(f"samplers: unknown sampler {name!r}: write a name of KSampler's list ({', '.join(names)}) or of "
                         f"ours ({', '.join(OURS + known for known in SAMPLERS)})")
    sampler = comfy.samplers.sampler_object(name)
    known = [key for key, parameter in inspect.signature(sampler.sampler_function).parameters.items()
             if isinstance(parameter.default, (int, float, str)) and key != "disable"]
    for key in options:
        if key not in known:
            raise ValueError(f"samplers: the line {line!r}: ComfyUI's {name} has no option {key!r}: choose from "
                             f"{', '.join(known) or 'none'}" + (f", or write {OURS}{name}" if name in SAMPLERS else ""))
    sampler.extra_options = {**sampler.extra_options, **options}
    return Entry(line, sampler, sampler, name)


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse_schedulers(text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = comfy.samplers.SCHEDULER_NAMES
    wrong = [name for name in found if name not in known]
    if wrong or not found:
        fault = f"unknown {wrong[0]!r}" if wrong else "empty"
        raise ValueError(f"schedulers = {text!r}: {fault}: write names between commas, of {', '.join(known)}")
    return found


MOST_EVALUATIONS = 1000


def parse_budgets(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and 1 <= int(part) <= MOST_EVALUATIONS)]
    if wrong or not parts:
        fault = f"{wrong[0]!r} is out of range" if wrong else "empty"
        raise ValueError(f"evaluations = {text!r}: {fault}: write whole numbers from 1 to {MOST_EVALUATIONS} between commas, "
                         "such as 5, 8, 10")
    return sorted(set(map(int, parts)))


# --- runs -------------------------------------------------------------------------------------------------------------

class Counted:
    """A model that tells of every call. Everything else of it is as it was."""

    def __init__(self, model: Any, called: Callable[[], None]) -> None:
        self.model, self.called = model, called

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        denoised = self.model(*arguments, **named)
        self.called()
        return denoised

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Rehearsal(comfy.samplers.CFGGuider):
    """The denoiser x / 2 in the model's place: no network, no patches, no wrappers.

    ComfyUI loads the model for a run; newer versions do so anew each time. The first rehearsal is enough.
    """

    def __init__(self, model: Any) -> None:
        bare = model.clone()
        bare.wrappers, bare.callbacks = {}, {}
        super().__init__(bare)
        self.model_options = {"transformer_options": {"wrappers": {WrappersMP.PREPARE_SAMPLING: {None: [self._prepared]}}}}
        self.loaded = False

    def _prepared(self, executor: Any, model: Any, noise_shape: Any, conds: Any, **named: Any) -> tuple[Any, Any, list]:
        if self.loaded:
            return model.model, conds, []
        self.loaded = True
        return executor(model, noise_shape, conds, **named)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None = None) -> Tensor:
        return comfy.samplers.cfg_function(self.inner_model, x / 2, x / 2, self.cfg, x, sigma, model_options)


class Outcome(NamedTuple):
    samples: Tensor  # on the CPU
    evaluations: int
    calibration: int  # evaluations besides those of the sampler itself


class Bench:
    """One model, prompt, guidance and noise, on which every sampler runs as KSampler would run it."""

    def __init__(self, model: Any, positive: list, negative: list, cfg: float, latent: dict, seed: int,
                 denoise: float) -> None:
        self.model, self.seed, self.denoise = model, seed, denoise
        self.latent = latent_for(model, latent)
        self.noise = comfy.sample.prepare_noise(self.latent, seed, latent.get("batch_index"))
        self.mask = latent.get("noise_mask")
        self.predictions = 0

        def predict(executor, *arguments, **named):
            self.predictions += 1
            return executor(*arguments, **named)

        counting = model.clone()
        counting.add_wrapper(WrappersMP.PREDICT_NOISE, predict)
        self.real, self.stage = comfy.samplers.CFGGuider(counting), Rehearsal(model)
        for guider in (self.real, self.stage):
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)

    def sigmas(self, entry: Entry, scheduler: str, steps: int) -> Tensor:
        """KSampler's own schedule: without the last but one sigma for some, and the end of a longer one if denoise < 1."""
        return comfy.samplers.KSampler(self.model, steps, "cpu", sampler=entry.listed, scheduler=scheduler,
                                       denoise=self.denoise).sigmas

    def rehearse(self, sampler: KSAMPLER, sigmas: Tensor, seed: int = 0) -> Outcome:
        """A run on the denoiser x / 2, for the number of calls: it costs no evaluation and asks nothing of the sampler."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._run(self.stage, sampler, sigmas, seed, lambda: None)

    def run(self, sampler: KSAMPLER, sigmas: Tensor, called: Callable[[], None]) -> Outcome:
        before = self.predictions
        outcome = self._run(self.real, sampler, sigmas, self.seed, called)
        return outcome._replace(calibration=self.predictions - before - outcome.evaluations)

    def _run(self, guider: comfy.samplers.CFGGuider, sampler: KSAMPLER, sigmas: Tensor, seed: int,
             called: Callable[[], None]) -> Outcome:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            called()

        def function(model, *arguments, **named):
            return sampler.sampler_function(Counted(model, count), *arguments, **named)

        samples = guider.sample(self.noise, self.latent, KSAMPLER(function, sampler.extra_options, sampler.inpaint_options),
                                sigmas, denoise_mask=self.mask, disable_pbar=True, seed=seed)
        return Outcome(samples.float().cpu(), calls, 0)


# --- the plan ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """One sampler on one scheduler within one budget, as planned, and as it went."""

    entry: Entry
    scheduler: str
    budget: int | None  # None: an adaptive sampler, which spends what it likes
    stochastic: bool = False
    sigmas: Tensor | None = None
    planned: int = 0
    outcome: Outcome | None = None
    error: float = math.nan
    fault: str = ""

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def plan(bench: Bench, entry: Entry, schedulers: list[str], budgets: list[int]) -> list[Cell]:
    """The cells of a sampler, each with the most steps that its budget allows."""
    try:
        four, eight = (bench.rehearse(entry.rehearsal, bench.sigmas(entry, "karras", n)) for n in (4, 8))
        other = bench.rehearse(entry.rehearsal, bench.sigmas(entry, "karras", 4), seed=1)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        return [Cell(entry, scheduler, budget, fault=fault_of(error)) for scheduler in schedulers for budget in budgets]
    stochastic = not torch.equal(four.samples, other.samples)
    adaptive = four.evaluations == eight.evaluations
    return [_planned(bench, Cell(entry, scheduler, budget, stochastic), max(budgets))
            for scheduler in schedulers for budget in ([None] if adaptive else budgets)]


def _planned(bench: Bench, cell: Cell, most: int) -> Cell:
    entry, scheduler, budget = cell.entry, cell.scheduler, cell.budget

    def cost(steps: int) -> int:
        return bench.rehearse(entry.rehearsal, bench.sigmas(entry, scheduler, steps)).evaluations

    try:
        steps = bisect_right(range(1, budget + 2), budget, key=cost) if budget else most  # one more where the first is not evaluated
        if not steps:
            return replace(cell, fault=f"one step costs more than {budget} evaluations")
        sigmas = bench.sigmas(entry, scheduler, steps)
        if not (sigmas.isfinite().all() and sigmas[0] > 0):
            return replace(cell, fault=f"{scheduler} makes no schedule of {steps} steps: {sigmas.tolist()}")
        return replace(cell, sigmas=sigmas, planned=cost(steps))
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        return replace(cell, fault=fault_of(error))


def fault_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measured(bench: Bench, cell: Cell, reference: Tensor, called: Callable[[], None]) -> Cell:
    """The cell with what came out; a sampler that fails is a result too. Only Cancel goes through."""
    try:
        outcome = bench.run(cell.entry.sampler, cell.sigmas, called)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        return replace(cell, fault=fault_of(error))
    if not outcome.samples.isfinite().all():
        return replace(cell, fault=f"NaN or infinite values after {outcome.evaluations} evaluations")
    return replace(cell, outcome=outcome, error=distance(outcome.samples, reference))


def distance(samples: Tensor, reference: Tensor) -> float:
    """rms of the difference, as a share of the reference's standard deviation."""
    return float((samples - reference).square().mean().sqrt() / reference.std())


# --- the converged solution -------------------------------------------------------------------------------------------

class Reference(NamedTuple):
    samples: Tensor
    evaluations: int
    doubt: float  # distance to a second one, by another method with half as many evaluations


def start_of(sigmas: Tensor) -> float:
    """What schedules must share to have one solution: log sigma at the start, to 1e-4."""
    return round(math.log(float(sigmas[0])), 4)


def reference_sigmas(levels: list[float], path: Path, start: float, steps: int) -> list[float]:
    """`start`, then the model's own levels, as evenly in lambda as there are any, then 0.

    The model's own, because ComfyUI rounds every other sigma to one of them: on these nothing is rounded. Measured on the
    emoji model, guidance 3 and 7, against all of its 1000 levels: dpmpp_3m with 90 of 100 steps is within 0.003 of the
    image's standard deviation; half evenly in time it was within 0.02.
    """
    below = [sigma for sigma in levels if 0.0 < sigma < start * (1 - 1e-4)]
    if not below:
        return [start, 0.0]
    lam = [path.level(sigma).lam for sigma in below]
    places = {bisect_left(lam, lam[0] + i / (steps - 2) * (lam[-1] - lam[0]), hi=len(lam) - 1) for i in range(steps - 1)}
    return [start, *(below[place] for place in sorted(places)), 0.0]


def grids(bench: Bench, start: float, evaluations: int) -> list[tuple[str, Tensor]]:
    """The two runs behind a reference: sampler and schedule."""
    sampling = bench.model.get_model_object("model_sampling")
    levels = sorted(sampling.sigmas.tolist(), reverse=True)
    return [(name, torch.tensor(reference_sigmas(levels, PATHS[path_of(sampling)], start, steps)))
            for name, steps in (("dpmpp_3m", evaluations), ("dpmpp_2m", evaluations // 2))]


def solve(bench: Bench, runs: list[tuple[str, Tensor]], called: Callable[[], None]) -> Reference:
    (samples, evaluations, _), (other, *_) = (bench.run(KSAMPLER(sampler_function(SAMPLERS[name])), sigmas, called)
                                              for name, sigmas in runs)
    return Reference(samples, evaluations, distance(other, samples))


class References:
    """The last few references, for the same objects that ComfyUI hands out as long as nothing upstream has changed."""

    MOST = 12

    def __init__(self) -> None:
        self.kept: list[tuple[weakref.ref, tuple, tuple, Reference]] = []

    def find(self, model: Any, inputs: tuple, numbers: tuple) -> Reference | None:
        for known, objects, values, reference in self.kept:
            if known() is model and values == numbers and all(a is b for a, b in zip(objects, inputs)):
                return reference
        return None

    def keep(self, model: Any, inputs: tuple, numbers: tuple, reference: Reference) -> None:
        alive = [entry for entry in self.kept if entry[0]() is not None]
        self.kept = [*alive[1 - self.MOST:], (weakref.ref(model), inputs, numbers, reference)]
