"""Samplers side by side: the steps that fit a budget, counted runs, and the converged solution."""
from __future__ import annotations

import importlib
import inspect
import math
import weakref
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER
from torch import Tensor

from ..hosting import events
from ..samplers import PATHS, SAMPLERS
from ..samplers.schedule import Path
from .host import around, latent_for, path_of, sampler_function
from .sampling import calibrated, listed

OURS = "lambda/"


# --- what to compare ----------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """A sampler with its options.

    `rehearsal` is the same one, but for what would have to be calibrated first.
    """

    label: str
    sampler: KSAMPLER
    rehearsal: KSAMPLER
    listed: str  # the name for which KSampler makes its schedules


def parse(text: str) -> list[Entry]:
    """A sampler a line: `name`, or `name, option=value, option=value`.

    ValueError naming the line that is none.
    """
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
            raise ValueError(f"samplers: {part!r} in the line {line!r} is no option: write name, "
                             f"option=value")
        options[key] = _value(value)
    names = comfy.samplers.KSampler.SAMPLERS
    ours = listed(name) or (SAMPLERS.get(name.removeprefix(OURS)) if name not in names else None)
    if ours:
        try:
            ours.settings({**ours.stand_ins, **options})
        except ValueError as error:
            raise ValueError(f"samplers: the line {line!r}: {error}") from None
        return Entry(line, KSAMPLER(calibrated(ours), options),
                     KSAMPLER(sampler_function(ours), {**ours.stand_ins, **options}),
                     name if name in names else "euler")
    if name not in names:
        raise ValueError(f"samplers: unknown sampler {name!r}: write a name of KSampler's list "
                         f"({', '.join(names)}) "
                         f"or of ours ({', '.join(OURS + known for known in SAMPLERS)})")
    sampler = comfy.samplers.sampler_object(name)
    known = [key for key, parameter in inspect.signature(sampler.sampler_function).parameters.items()
             if isinstance(parameter.default, (int, float, str)) and key != "disable"]
    for key in options:
        if key not in known:
            raise ValueError(f"samplers: the line {line!r}: ComfyUI's {name} has no option {key!r}: choose "
                             f"from "
                             f"{', '.join(known) or 'none'}"
                             + (f", or write {OURS}{name}" if name in SAMPLERS else ""))
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


class Table(NamedTuple):
    """A schedule of one of ComfyUI's scheduler nodes, with its setting: for which models, or how made."""

    label: str
    node: Any
    setting: Mapping[str, Any]
    fewest: int
    path: str  # of the models that it is for

    def sigmas(self, steps: int, denoise: float) -> Tensor:
        """So many steps, and below 1 the end of a longer schedule, as KSampler takes its own."""
        total = steps if denoise > 0.9999 else int(steps / denoise)
        if total < self.fewest:
            raise ValueError(f"{self.label} begins at {self.fewest} steps")
        return self.node.execute(**self.setting, steps=total, denoise=1.0).result[0][-(steps + 1):]


TABLES = {
    "align_your_steps": ("nodes_align_your_steps", "AlignYourStepsScheduler", "ve"),
    "gits": ("nodes_gits", "GITSScheduler", "ve"),
    "optimal_steps": ("nodes_optimalsteps", "OptimalStepsScheduler", "flow"),
}


def table(name: str) -> Table | None:
    """The table that a scheduler's name stands for, name:setting; None if it stands for none.

    ValueError if it cannot.
    """
    kind, _, given = (part.strip() for part in name.partition(":"))
    if kind not in TABLES:
        return None
    module, class_name, path = TABLES[kind]
    try:  # only now, as a ComfyUI may have none
        node = getattr(importlib.import_module("comfy_extras." + module), class_name)
    except (ImportError, AttributeError) as fault:
        raise ValueError(f"schedulers: this ComfyUI has no {class_name} ({fault}): leave {name} "
                         f"out") from fault
    setting, steps, *_ = node.define_schema().inputs
    admissible = {str(value): value for value in getattr(setting, "options", None) or ()} or {
        f"{setting.min + k * setting.step:.2f}": round(setting.min + k * setting.step, 2)
        for k in range(round((setting.max - setting.min) / setting.step) + 1)}
    spelled = given if given in admissible else _hundredths(given)
    if spelled not in admissible:
        raise ValueError(f"schedulers: {name!r}: write {kind}: and one of {', '.join(admissible)}, such as "
                         f"{kind}:{list(admissible)[-1]}")
    return Table(f"{kind}:{spelled}", node, {setting.id: admissible[spelled]}, steps.min, path)


def _hundredths(text: str) -> str:
    try:
        return f"{float(text):.2f}"
    except ValueError:
        return text


def parse_schedulers(text: str) -> list[str]:
    """KSampler's schedulers and tables, between commas. ValueError naming the one that is none."""
    known = comfy.samplers.SCHEDULER_NAMES
    found = {}
    for name in filter(None, map(str.strip, text.split(","))):
        if not (name in known or (made := table(name))):
            raise ValueError(f"schedulers = {text!r}: unknown {name!r}: write names between commas, of "
                             f"{', '.join(known)}, or {', '.join(TABLES)}, each with a colon and its setting")
        found[name if name in known else made.label] = None
    if not found:
        raise ValueError(f"schedulers = {text!r}: empty: write names between commas, of {', '.join(known)}")
    return list(found)


MOST_EVALUATIONS = 1000


def parse_budgets(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts
             if not (part.isascii() and part.isdigit() and 1 <= int(part) <= MOST_EVALUATIONS)]
    if wrong or not parts:
        fault = f"{wrong[0]!r} is out of range" if wrong else "empty"
        raise ValueError(f"evaluations = {text!r}: {fault}: write whole numbers from 1 to {MOST_EVALUATIONS} "
                         f"between "
                         "commas, such as 5, 8, 10")
    return sorted(set(map(int, parts)))


# --- runs ---------------------------------------------------------------------------------------------------

class Rehearsal(comfy.samplers.CFGGuider):
    """The denoiser x / 2 in the model's place: no network, no patches, no wrappers.

    ComfyUI loads the model for a run; newer versions do so anew each time. The first rehearsal is enough.
    """

    def __init__(self, model: Any) -> None:
        bare = model.clone()
        bare.wrappers, bare.callbacks = {}, {}
        super().__init__(bare)
        prepare = {WrappersMP.PREPARE_SAMPLING: {None: [self._prepared]}}
        self.model_options = {"transformer_options": {"wrappers": prepare}}
        self.loaded = False

    def _prepared(self, executor: Any, model: Any, noise_shape: Any, conds: Any,
                  **named: Any) -> tuple[Any, Any, list]:
        if self.loaded:
            return model.model, conds, []
        self.loaded = True
        return executor(model, noise_shape, conds, **named)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None = None) -> Tensor:
        return comfy.samplers.cfg_function(self.inner_model, x / 2, x / 2, self.cfg, x, sigma, model_options)


class Outcome(NamedTuple):
    samples: Tensor  # on the CPU
    evaluations: int
    calibration: int = 0  # evaluations besides those of the sampler itself
    used: Mapping[str, Any] = {}  # what it was given of a model, by its option


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
        """KSampler's own schedule: without the last but one sigma for some, an end below denoise 1.

        Or that of a table; ValueError if it is not for this model.
        """
        if named := table(scheduler):
            sampling = self.model.get_model_object("model_sampling")
            sigmas = named.sigmas(steps, self.denoise)
            highest, path = float(sampling.sigma_max), path_of(sampling)
            if path != named.path or sigmas[0] > 1.001 * highest:
                raise ValueError(f"{scheduler} is not for this model: it starts at sigma {sigmas[0]:.4g} on "
                                 f"path "
                                 f"{named.path}, the model at {highest:.4g} on path {path}")
            return sigmas
        return comfy.samplers.KSampler(self.model, steps, "cpu", sampler=entry.listed, scheduler=scheduler,
                                       denoise=self.denoise).sigmas

    def rehearse(self, sampler: KSAMPLER, sigmas: Tensor, seed: int = 0) -> Outcome:
        """A run on the denoiser x / 2, for the number of calls: it costs no evaluation of the model."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._run(self.stage, sampler, sigmas, seed, lambda: None)

    def run(self, sampler: KSAMPLER, sigmas: Tensor, called: Callable[[], None]) -> Outcome:
        before = self.predictions
        with events.noting() as notes:
            outcome = self._run(self.real, sampler, sigmas, self.seed, called)
        return outcome._replace(calibration=self.predictions - before - outcome.evaluations,
                                used={option: used.found for option, used in notes.used.items()})

    def _run(self, guider: comfy.samplers.CFGGuider, sampler: KSAMPLER, sigmas: Tensor, seed: int,
             called: Callable[[], None]) -> Outcome:
        calls = 0

        def count(denoised: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            called()
            return denoised

        samples = guider.sample(self.noise, self.latent, around(sampler, count), sigmas,
                                denoise_mask=self.mask, disable_pbar=True, seed=seed)
        return Outcome(samples.float().cpu(), calls)


# --- the plan -----------------------------------------------------------------------------------------------

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
        fault = fault_of(error)
        return [Cell(entry, scheduler, budget, fault=fault) for scheduler in schedulers for budget in budgets]
    stochastic = not torch.equal(four.samples, other.samples)
    adaptive = four.evaluations == eight.evaluations
    return [_planned(bench, Cell(entry, scheduler, budget, stochastic), max(budgets))
            for scheduler in schedulers for budget in ([None] if adaptive else budgets)]


def _planned(bench: Bench, cell: Cell, most: int) -> Cell:
    entry, scheduler, budget = cell.entry, cell.scheduler, cell.budget

    def cost(steps: int) -> int:
        return bench.rehearse(entry.rehearsal, bench.sigmas(entry, scheduler, steps)).evaluations

    try:  # one step more than the budget, where the first is not evaluated
        steps = bisect_right(range(1, budget + 2), budget, key=cost) if budget else most
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


# --- the converged solution ---------------------------------------------------------------------------------

class Reference(NamedTuple):
    samples: Tensor
    evaluations: int
    doubt: float  # distance to a second one, by another method with half as many evaluations


def start_of(sigmas: Tensor) -> float:
    """What schedules must share to have one solution: log sigma at the start, to 1e-4."""
    return round(math.log(float(sigmas[0])), 4)


def reference_sigmas(levels: list[float], path: Path, start: float, steps: int) -> list[float]:
    """`start`, then the model's own levels, as evenly in lambda as there are any, then 0.

    The model's own, because ComfyUI rounds every other sigma to one of them: on these nothing is rounded.
    Measured on the emoji model, guidance 3 and 7, against all of its 1000 levels: dpmpp_3m with 90 of 100
    steps is within 0.003 of the     image's standard deviation; half evenly in time it was within 0.02.
    """
    below = [sigma for sigma in levels if 0.0 < sigma < start * (1 - 1e-4)]
    if not below:
        return [start, 0.0]
    lam = [path.level(sigma).lam for sigma in below]
    wanted = (lam[0] + i / (steps - 2) * (lam[-1] - lam[0]) for i in range(steps - 1))
    places = {bisect_left(lam, value, hi=len(lam) - 1) for value in wanted}
    return [start, *(below[place] for place in sorted(places)), 0.0]


def grids(bench: Bench, start: float, evaluations: int) -> list[tuple[str, Tensor]]:
    """The two runs behind a reference: sampler and schedule."""
    sampling = bench.model.get_model_object("model_sampling")
    levels = sorted(sampling.sigmas.tolist(), reverse=True)
    return [(name, torch.tensor(reference_sigmas(levels, PATHS[path_of(sampling)], start, steps)))
            for name, steps in (("dpmpp_3m", evaluations), ("dpmpp_2m", evaluations // 2))]


def solve(bench: Bench, runs: list[tuple[str, Tensor]], called: Callable[[], None]) -> Reference:
    one, other = (bench.run(KSAMPLER(sampler_function(SAMPLERS[name])), sigmas, called)
                  for name, sigmas in runs)
    return Reference(one.samples, one.evaluations, distance(other.samples, one.samples))


class References:
    """The last few references, by the objects that ComfyUI hands out while nothing upstream changes."""

    MOST = 12

    def __init__(self) -> None:
        self.kept: list[tuple[weakref.ref, tuple, tuple, Reference]] = []

    def find(self, model: Any, inputs: tuple, numbers: tuple) -> Reference | None:
        for known, objects, values, reference in self.kept:
            if known() is model and values == numbers and all(a is b for a, b in zip(objects, inputs)):
                return reference
        return None

    def keep(self, model: Any, inputs: tuple, numbers: tuple, reference: Reference) -> None:
        """As long as the model is there: the inputs may hold a ControlNet."""
        known = weakref.ref(model, self._gone)
        self.kept = [*self.kept[1 - self.MOST:], (known, inputs, numbers, reference)]

    def _gone(self, known: weakref.ref) -> None:
        self.kept = [entry for entry in self.kept if entry[0] is not known]
