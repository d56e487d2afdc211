"""AMED: one inner evaluation in every step, at a place that was learned, and what is learned.

In y = x / alpha and varsigma = sigma / alpha, with (r, c, a) learned for the step s -> t:

    varsigma_m = varsigma_t^r varsigma_s^(1 - r)             s --------- m ------ t     lam_m = lam_s + r h
    y_m = y_s + (varsigma_m - varsigma_s) eps_s              0           1
    eps_m = (y_m - D(y_m, a varsigma_m)) / varsigma_m
    y_t = y_s + c (varsigma_t - varsigma_s) eps_m

Zhou et al. 2024, AMED-Solver (arXiv:2312.00094), sections 3.2-3.3: trajectories lie almost in a plane, so one
inner direction is almost exact for the step. As a plugin m is one more node of another solver, which steps to
m and on to t by its own rule; c scales the last direction. With (r, c, a) = (1/2, 1, 1) AMED is DPM-Solver-2.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..integrand import DataPrediction, NoisePrediction, Stage
from ..phi import adams, midpoint
from ..schedule import Level, Number, Path
from ..solver import Multistep, Step, ddim, finite, joined, step
from .predictor import Predictor, bounded, unbounded
from .record import Record, array, group, said
from .storage import CalibrationError

FORMAT = "lambda-solvers amed 2"
SLACK = 0.01  # in lam, between a schedule and the one that was trained


class Inner(NamedTuple):
    """What is learned of one step: the place, the factor on the direction, and the factor on the told
    varsigma."""

    r: Number = 0.5
    c: Number = 1.0
    a: Number = 1.0

    @classmethod
    def of(cls, u: np.ndarray, ndim: int) -> Inner:
        """Of u [1, 3], for all images; or [B, 3], arrays over latents of so many axes."""
        return cls(*(float(column[0]) if len(u) == 1 else column.reshape(-1, *[1] * (ndim - 1))
                     for column in bounded(u).T))


class Pair(NamedTuple):
    """A singlestep base: the stages that land on m and on t."""

    to_m: Stage
    to_t: Stage


BASES: Mapping[str, Pair | Multistep] = {
    "amed": Pair(Stage((0,)), Stage((1,))),
    "dpm_2": Pair(Stage((0,)), Stage((0, 1), midpoint)),
    "euler": Multistep(NoisePrediction(), 1),
    "ipndm": Multistep(NoisePrediction(), 4, lower_order_final="off", basis=adams),
    "ipndm_2": Multistep(NoisePrediction(), 2, lower_order_final="off", basis=adams),
    "ipndm_3": Multistep(NoisePrediction(), 3, lower_order_final="off", basis=adams),
    "dpm_2m": Multistep(NoisePrediction(), 2, midpoint),
    "dpm_3m": Multistep(NoisePrediction(), 3, midpoint),
    "dpmpp_2m": Multistep(DataPrediction(), 2, midpoint),
    "dpmpp_3m": Multistep(DataPrediction(), 3, midpoint),
}
"""AMED's own rule, and the solvers it is a plugin of."""


@dataclass(frozen=True, eq=False)
class Amed(Record, format=FORMAT):
    """What was learned for one schedule: a table, and on top of it perhaps a predictor that looks at the
    image.

    lam [n+1]: half-log-SNR of the schedule's levels, increasing, of which the first may be -inf and the last
    inf; table [n, 3]: (r, c, a) of every interval (unused where it has infinite length). All float64.
    features() -> [B, C, H, W], the model's middle block in its last call, or None; only a predictor asks for
    it.
    """

    lam: np.ndarray = array(lambda n: (n,), infinite=True)
    table: np.ndarray = array(lambda n: (n - 1, len(Inner._fields)))
    base: str | None = said(None)  # any
    first_step: str = said("evaluate")
    predictor: Predictor | None = group("predictor", Predictor.arrays, Predictor.of_arrays, lambda: None)
    interpolate: bool = False
    features: Callable[[], Tensor | None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None and self.base not in BASES:
            raise CalibrationError(f"base = {self.base!r} is unknown: choose one of {', '.join(BASES)}")
        if self.first_step not in ("evaluate", "afs"):
            raise CalibrationError(f"first_step = {self.first_step!r} is unknown: choose evaluate or afs")
        errors = dict.fromkeys(filter(None, ("training", self.others)), len(self.table))
        told = self.about.get("losses", {}).values()
        if any({part: len(values) for part, values in each.items()} != errors for each in told):
            raise CalibrationError(
                f"about.losses must have {len(self.table)} errors of the same images in every part: train "
                "anew, or get the file anew")
        bad = (self.table <= 0) | (self.table >= (1, math.inf, math.inf))
        if bad.any():
            i = int(bad.any(1).argmax())
            raise CalibrationError(
                f"table[{i}] = {self.table[i].tolist()}: r must be between 0 and 1, c and a above 0")

    @property
    def others(self) -> str | None:
        """What the losses call the images that did not teach, if there are any: "held out", or a
        "selection"."""
        return next((part for part in self.about.get("losses", {}).get("trained", {}) if part != "training"),
                    None)

    @classmethod
    def untrained(cls, schedule: Sequence[Level] | None = None, base: str | None = None,
                  first_step: str = "evaluate") -> Amed:
        """(1/2, 1, 1) in every interval; without a schedule for all of them."""
        lam = np.array([level.lam for level in schedule]) if schedule else np.array([-math.inf, math.inf])
        return cls(lam, np.tile(np.array(Inner()), (len(lam) - 1, 1)), base, first_step,
                   interpolate=not schedule)

    def fits(self, schedule: Sequence[Level]) -> bool:
        """Whether the schedule is the one that was trained."""
        return len(schedule) == len(self.lam) and all(level.lam == lam or abs(level.lam - lam) <= SLACK
                                                      for level, lam in zip(schedule, self.lam))

    def inner(self, schedule: Sequence[Level]) -> list[Inner]:
        """(r, c, a) of every interval; ValueError if the schedule is not the one that was trained."""
        lam = np.array([level.lam for level in schedule])
        if not self.interpolate:
            if not self.fits(schedule):
                raise ValueError(
                    f"this AMED was trained for {_shown(self.lam)}, and the schedule is {_shown(lam)}: train "
                    "it for this schedule (its scheduler, steps and denoise), use the trained one, or allow "
                    "interpolation")
            return [Inner(*row) for row in self.table.tolist()]
        middles, rows = _middles(self.lam), unbounded(self.table)
        known = np.isfinite(middles)
        if not known.any():
            return [Inner()] * (len(lam) - 1)
        # intervals of infinite length are not asked
        at = np.nan_to_num(_middles(lam), nan=0.0, posinf=0.0, neginf=0.0)
        values = [np.interp(at, middles[known], row[known]) for row in rows.T]
        return [Inner(*row) for row in bounded(np.stack(values, axis=1)).tolist()]

    def predict(self, s: Level, t: Level, inner: Inner, answered: bool, x: Tensor) -> Inner:
        """(r, c, a) of one interval for every image of x, from the table's and what the model's middle block
        holds; nothing of that where the model has not answered yet."""
        if self.features is None:
            raise ValueError(
                "this AMED has a predictor, which looks at the model's middle block, and nothing shows it: "
                "give it features, dataclasses.replace(trained, features=...), or use its table alone, "
                "replace(trained, predictor=None)")
        seen = self.features() if answered else None
        with torch.no_grad():
            moved = self.predictor(seen, len(x), s.lam, t.lam, unbounded(np.array(inner)))
        return Inner.of(moved.double().cpu().numpy(), x.ndim)


def _middles(lam: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (lam[1:] + lam[:-1]) / 2


def _shown(lam: np.ndarray) -> str:
    return f"{len(lam) - 1} steps over sigma / alpha = {', '.join(f'{value:.4g}' for value in np.exp(-lam))}"


@dataclass(frozen=True)
class Insertion:
    """A base with one learned node more in every interval of finite length. Those of infinite length are
    DDIM.

    answered() says whether the model has answered in this run, and not something else for it (first_step).
    """

    trained: Amed
    base: Pair | Multistep
    answered: Callable[[], bool] = lambda: True

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        inner = self.trained.inner(levels)
        nodes, opens = _nodes(levels, path, inner)
        result = [self._step(nodes, first, path, known) for first, known in zip(opens, inner)]

        def plan(i: int, x: Tensor, before: Step | None) -> Step:
            known = before.told if before and before.told else inner[:i]
            predicted = (*known, self.trained.predict(*levels[i:i + 2], inner[i], self.answered(), x))
            return self.step(levels, path, i, predicted)._replace(told=predicted)

        looks = self.trained.predictor is not None
        return [step._replace(plan=partial(plan, i)) if looks and len(step.evaluations) > 1 else step
                for i, step in enumerate(result)]

    def step(self, levels: Sequence[Level], path: Path, i: int, inner: Sequence[Inner]) -> Step:
        """Interval i, of which inner[:i + 1] must be known."""
        nodes, opens = _nodes(levels, path, inner)
        return self._step(nodes, opens[i], path, inner[i])

    def _step(self, nodes: Sequence[Level], first: int, path: Path, inner: Inner) -> Step:
        if not finite(*nodes[first:first + 2]):
            return ddim(DataPrediction(), *nodes[first:first + 2])
        straight = (step(NoisePrediction(), nodes[first:first + 3], self.base)
                    if isinstance(self.base, Pair) else
                    joined(*(self.base.step(nodes, first + k) for k in (0, 1))))
        return _bent(straight, inner, path)


def _nodes(levels: Sequence[Level], path: Path, inner: Sequence[Inner]) -> tuple[list[Level], list[int]]:
    """The levels with the inner node of every interval, and the number of the one that opens each.

    r = 1/2 where it is not known, since no step depends on later ones.
    """
    nodes, opens = [], []
    for (s, t), (r, *_) in zip(pairwise(levels), [*inner, *[Inner()] * len(levels)]):
        opens.append(len(nodes))
        nodes += [s, path.at(s.lam + r * (t.lam - s.lam))] if finite(s, t) else [s]
    return [*nodes, levels[-1]], opens


def _bent(step: Step, inner: Inner, path: Path) -> Step:
    """The model is told a varsigma_m where x is at varsigma_m, and c scales the last direction."""
    first, second = step.evaluations
    if np.any(inner.a != 1.0):
        told = path.at(second.at.lam - np.log(inner.a))
        second = second._replace(at=told, scale=told.alpha / second.at.alpha)
    *others, last = step.updates
    last = last._replace(terms=tuple((k, inner.c * value) for k, value in last.terms))
    return step._replace(evaluations=(first, second), updates=(*others, last))
