"""What the catalogue is made of: options and their ranges, samplers, and how a function becomes a family.

families.py fills FAMILIES and SAMPLERS; nodes, tests, the table of docs/solvers.md and `nfe` iterate over
them.
"""
from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from .denoisers import FIRST_STEPS
from .learning.amed import Amed, Insertion
from .learning.fitted import Fitted
from .schedule import find_path, levels
from .score_sde import PredictorCorrector
from .solver import Adaptive, Churned, Grouped, Multistep, Singlestep

Solver = Multistep | Singlestep | Grouped | Adaptive | Churned | PredictorCorrector | Insertion | Fitted


@dataclass(frozen=True)
class Option:
    """One setting: its kind (int, float or a choice), range, and what it does."""

    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    advanced: bool = False
    kind: type = str
    default: Any = None
    stand_in: Any = None  # for planning without running, where a value must be given to run
    where: tuple[tuple[str, Any], ...] = ()  # it counts only where these other options have these values

    @property
    def range(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.kind is bool:
            return "true or false"
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.low:g} to {self.high:g}"

    def check(self, name: str, value: Any) -> Any:
        """`value` if it is admissible, numpy's numbers as Python's.

        ValueError naming the option, the value and the range if it is not.
        """
        if isinstance(value, (np.number, np.bool_)):
            value = value.item()
        if self.stand_in is not None:
            if not isinstance(value, self.kind):
                raise ValueError(f"{name} = {value!r}: give {self.help}")
            return value
        if self.kind is bool:
            good = isinstance(value, bool)
        elif self.choices:
            good = value in self.choices
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            good = (whole or
                    (self.kind is float and isinstance(value, float))) and self.low <= value <= self.high
        if not good:
            raise ValueError(f"{name} = {value!r} is out of range: choose {self.range}")
        return value


@dataclass(frozen=True)
class Sampler:
    """A solver to choose: a family, or a name that stands for some of its options. What SAMPLERS and
    FAMILIES hold."""

    name: str
    title: str
    help: str
    family: str
    citation: str
    options: Mapping[str, Option]
    fixed: Mapping[str, Any]
    build: Callable[..., Solver]

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: what the name fixes, what is given, and defaults. ValueError if one is not
        admissible."""
        for name in options:
            if name in self.fixed:
                raise ValueError(
                    f"{name} is not an option of {self.name}, which stands for {name} = "
                    f"{self.fixed[name]!r}: choose another sampler of the family {self.family}")
            if name not in self.options:
                raise ValueError(
                    f"{self.name} has no option {name!r}: choose from {', '.join(self.options) or 'none'}")
        given = {name: options.get(name, option.default) for name, option in self.options.items()}
        return {**self.fixed, **{
            name: option.check(name, given[name]) for name, option in self.options.items()}}

    def solver(self, **options: Any) -> Solver:
        return self.solver_of(self.settings(options))

    def solver_of(self, settings: Mapping[str, Any]) -> Solver:
        """The solver of all settings but first_step, which is the denoiser's.

        A hypersolver learned from what the model answers first: it is left out where something else does.
        """
        chosen = {name: value for name, value in settings.items() if name != "first_step"}
        found = chosen.get("statistics")
        if found is not None and found.hypersolver and settings["first_step"] != "evaluate":
            chosen["statistics"] = replace(found, hypersolver=None)
        return self.build(**chosen)

    def first_step(self, settings: Mapping[str, Any]) -> str:
        """How the first evaluation is answered: as set, or as an AMED that was trained with afs needs it."""
        chosen, trained = settings["first_step"], settings.get("trained")
        if trained is None or trained.base is None or chosen == trained.first_step:
            return chosen
        if chosen == "evaluate":
            return trained.first_step
        raise ValueError(
            f"first_step = {chosen!r}, but this AMED was trained with {trained.first_step}: train one with "
            f"{chosen}, or set first_step to evaluate, which follows the training")

    @property
    def evaluations_per_step(self) -> int | None:
        """Model evaluations on each interval of finite length; None if they depend on the model
        (adaptive)."""
        total = nfe(self.name, range(13, 0, -1))
        return None if total is None else total // 12

    @property
    def draws(self) -> bool:
        """Whether it adds noise, with its defaults."""
        solver = self.solver(**self.stand_ins)
        return not isinstance(solver, Adaptive) and any(
            step.noisy for step in solver.steps(levels([9.0, 3.0, 1.0], find_path("ve")), find_path("ve")))

    @property
    def stand_ins(self) -> dict[str, Any]:
        """Values for the options without which nothing can run, enough to plan."""
        return {name: option.stand_in for name, option in self.options.items() if option.stand_in is not None}


class Preset(NamedTuple):
    """A name in a family: the options it stands for, other defaults, when to reach for it, and whose it is
    if not all of the family's."""

    title: str
    when: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = {}
    citation: str = ""


FIRST_STEP = Option(
    "How the first evaluation of a run at full noise is answered. evaluate: by the model (AMED: as it was "
    "trained); afs: analytically, at no cost, worth it at a sigma_max near 100. A hypersolver is left out "
    "then", choices=tuple(FIRST_STEPS), advanced=True, default="evaluate")

FAMILIES: dict[str, Sampler] = {}
SAMPLERS: dict[str, Sampler] = {}


def family(title: str, citation: str,
           presets: Mapping[str, Preset]) -> Callable[[Callable[..., Solver]], Callable]:
    """Enter the decorated function and its presets into the catalogue."""

    def enter(build: Callable[..., Solver]) -> Callable[..., Solver]:
        options = {}
        for name, parameter in inspect.signature(build, eval_str=True).parameters.items():
            kind, option = typing.get_args(parameter.annotation)
            options[name] = replace(option, kind=kind, default=parameter.default)
        options["first_step"] = FIRST_STEP
        paragraphs = [" ".join(part.split()) for part in inspect.getdoc(build).split("\n\n")]
        whole = Sampler(build.__name__, title, "\n\n".join(paragraphs), title, citation, options, {}, build)
        FAMILIES[whole.name] = whole
        for name, preset in presets.items():
            SAMPLERS[name] = replace(whole, name=name, title=preset.title, help=preset.when,
                                     options=dict(_free(options, preset)), fixed=preset.fixed,
                                     citation=preset.citation or citation)
        return build

    return enter


def _free(options: Mapping[str, Option], preset: Preset) -> Iterator[tuple[str, Option]]:
    """The options that a preset leaves open: not those that never count with what it fixes."""
    for name, option in options.items():
        never = any(preset.fixed.get(other, value) != value for other, value in option.where)
        if name in preset.fixed or never:
            continue
        where = tuple(pair for pair in option.where if pair[0] not in preset.fixed)
        yield name, replace(option, default=preset.defaults.get(name, option.default), where=where)


def find(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def nfe(name: str, steps: int | Sequence[float], path: str = "ve", **options: Any) -> int | None:
    """Model evaluations of a run, without running it; None if they depend on the model (adaptive solvers).

    steps: the number of intervals of a schedule from the path's highest sigma to 0, as KSampler's; or the
    sigmas themselves. A first step that the model does not answer counts 0.
    """
    sampler, gaussian = find(name), find_path(path)
    settings = sampler.settings({**sampler.stand_ins, **options})
    if isinstance(trained := settings.get("trained"), Amed):
        settings["trained"] = replace(trained, interpolate=True)  # the count is the same on every schedule
    if isinstance(steps, (str, float)):
        raise ValueError(f"steps = {steps!r}: give a whole number of intervals, or the sigmas")
    if isinstance(steps, Integral):
        if steps < 0:
            raise ValueError(f"steps = {steps} is out of range: choose a whole number >= 0")
        steps = [k / max(1, steps) for k in range(steps, -1, -1)]  # sigma = 1: where a flow begins
        if "statistics" in settings:
            settings["statistics"] = sampler.stand_ins["statistics"]  # the count is theirs, on every schedule
    solver = sampler.solver_of(settings)
    if isinstance(solver, Adaptive):
        return None
    planned = solver.steps(levels(steps, gaussian), gaussian)
    skipped = bool(planned) and sampler.first_step(settings) != "evaluate"
    return sum(len(step.evaluations) for step in planned) - skipped
