"""Refit the fitted solver for one number of evaluations on the model itself: levels and weights together.

`fitted` chooses levels and weights from measured trajectories, as if each step started on one. Here the
solver's own run is what counts. ORDER + 1 numbers of every step are free, from DPM-Solver-v3's weights c of
order 2 on the chosen levels,

    lam + u_0 gap,   c_k + u_(k+1) C  (k = 1 .. ORDER - 1),   sum_k c_k = (1 + u_1) C,        C = c_0 + c_1

(place, extrapolations and scale; of the last step place and first extrapolation alone), and forward
differences of the run in each of them make the residual at the end linear, R + J u. A few rounds of damped
Gauss-Newton lower its square over a few images. The teacher is the same solver in many steps. b of the
statistics is left out: what is learned without it was better on its own prompt and on others.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path as File
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..integrand import DataPrediction
from ..model import PROBE, latents
from ..sample import Denoiser, Place, onward, sample
from ..schedule import Path, find_path
from ..solver import Step, ddim
from .course import Course, Sampled
from .fitted import Plan, check, fit_multistep, planned
from .gauss_newton import FLOOR, Quadratic, damped_step, typical
from .statistics import Statistics
from .storage import digest

PARTIAL = "lambda-solvers partial refit 3"
TEACHER = 40  # its evaluations
ROUNDS, AGAIN = 2, 3  # how often slopes are taken, and how often they serve again
FEWEST, LARGEST = 3, 15
DAMPING = 0.1  # of u, in mean squared errors
MOST = 0.4     # of a number in one round: neighbouring levels cannot meet
ORDER = 3      # evaluations that a step weighs, its own among them
DIFFERENCES = 0.1, *[0.05] * ORDER


class Shape(NamedTuple):
    """What is free: numbers [1 + ORDER, n], row 0 the level lam of every step. No level may be above
    `top`."""

    numbers: np.ndarray
    top: float

    @classmethod
    def of(cls, lam: Sequence[float], top: float) -> Shape:
        """v3's weights on these levels."""
        return cls(np.vstack([lam, np.zeros((ORDER, len(lam)))]), top)

    @property
    def lam(self) -> np.ndarray:
        return self.numbers[0]

    def moved(self, places: Sequence[tuple[int, int]], u: Sequence[float]) -> Shape:
        """With u added at these places (row, step)."""
        numbers = self.numbers.copy()
        gaps = np.diff(self.lam, append=2 * self.lam[-1] - self.lam[-2])
        for (row, k), by in zip(places, u):
            numbers[row, k] += by if row else by * gaps[k if by > 0 else k - 1]
        return self._replace(numbers=np.vstack([np.minimum(numbers[0], self.top), numbers[1:]]))

    def plan(self, calibration: Statistics) -> Plan:
        """v3's steps of order 2 on these levels, scaled and bent."""
        steps = planned(calibration, self.lam)
        weights = []
        for i, (u, step) in enumerate(zip(self.numbers[1:].T, steps.weights)):
            total, earlier = sum(step.terms), u[1:i + 1] * sum(step.terms)
            earlier[:len(step.terms) - 1] += step.terms[1:]
            weights.append(
                step._replace(terms=(float((1.0 + u[0]) * total - earlier.sum()), *earlier.tolist())))
        return replace(steps, weights=tuple(weights))


@torch.no_grad()
def refit_multistep(model: Callable[..., Tensor], x: Tensor, calibration: Statistics, evaluations: int, *,
                    path: str = "ve", start: float | None = None, held_out: int = 1, rounds: int = ROUNDS,
                    extra_args: Mapping[str, Any] | None = None,
                    progress: Callable[[int, int, float], None] | None = None,
                    precision: torch.dtype | None = None, about: Mapping[str, Any] | None = None,
                    partial: File | str | None = None) -> Statistics:
    """The calibration with a plan for so many evaluations from full noise to x0, fitted to runs of `model`.

    model(x, sigma[B], **extra_args) returns the denoised x; x [K, ...] is noise at the calibration's first
    level, or at sigma = start above it (1 of a flow), from which the first of the evaluations leads there.
    The last `held_out` images only select: of the plans on the way, each better than the one before on the
    others, the best on those is kept, or none if none is better than v3's weights on the chosen levels; by
    the mean of log(error^2 + floor). `about` of the result has the errors of both parts, of "training" and of
    "selection": on others a plan will err a little more. Forward evaluations alone: at most `refit_cost` of
    them, each announced by progress(done, total, error), which may raise to cancel. precision: what the model
    computes in, if not x's dtype. `partial` names a file that keeps the teacher and every round that is done,
    for a call with the same x, settings and model to go on from. about: what is refitted, of which "prompts",
    how many the images have, says whether the plan is for all prompts (Statistics.for_another_prompt).
    ValueError for a number that leaves nothing to fit, for fewer than three images, and for a calibration
    that was not measured for fitting; UnsteadyModel for a model that does not answer for itself.
    """
    check(calibration)
    x, dtype = latents(x), x.dtype
    n = _count(evaluations, start is not None, len(x), held_out)
    gaussian = find_path(path)
    plain = calibration.for_another_prompt()
    about = dict(about or {})
    settings = {"evaluations": evaluations, "path": path, "start": start, "held_out": held_out,
                "rounds": rounds, "about": about, "of": digest(plain.arrays())}
    highest, lowest = (gaussian.at(float(lam)) for lam in calibration.lam[[0, -1]])
    opening = [] if start is None else [gaussian.level(start)]
    course = Course(model, x, [*opening, highest, lowest], gaussian, kind=PARTIAL, settings=settings,
                    total=refit_cost(evaluations, rounds, bool(opening)), dtype=dtype, precision=precision,
                    extra_args=extra_args, partial=partial, progress=progress)
    x = sample(course.denoise, x, [ddim(DataPrediction(), level, highest) for level in opening])
    shape = Shape.of(fit_multistep(plain, n).lam, float(calibration.lam[-1]))
    with course:
        target = course.targets(lambda: {0: sample(
            course.denoise, x, planned(plain, fit_multistep(plain, TEACHER).lam).steps(gaussian))})[0]
        runs = _Runs(course.denoise, plain, gaussian, x, target, len(x) - held_out)
        before = now = best = runs.of(shape)
        runs.floor = FLOOR * before.squares[runs.training].mean() + 1e-30
        if course.done > 1:
            now, best = (runs.of(shape._replace(numbers=numbers)) for numbers in course.us(()))
        for done in range(course.done, rounds + 1):
            start_of_round, slopes = now, runs.slopes(now)
            for shares in ((1.0, 0.5, 0.25), *[(1.0, )] * AGAIN):
                [course.loss] = runs.errors(now)["training"]
                found = runs.better(now, slopes, shares)
                if found is None:
                    break
                now = found
                best = min(best, now, key=lambda state: runs.left(state, runs.held))
            if now is start_of_round:
                break
            course.learned(done + 1, [now.shape.numbers, best.shape.numbers], course.loss)
    kept = runs.left(best, runs.held) < runs.left(before, runs.held)
    told = {**runs.errors(before, best), "prompts": about.get("prompts", 1), "kept": kept,
            "evaluations": course.spent, "images": len(x)}
    plans = {key: rows for key, rows in calibration.plans.items() if key != n}
    if kept:
        plans[n] = best.shape.plan(plain).rows()
    refits = {**calibration.about.get("refits", {}), str(n): told}
    return replace(calibration, plans=plans, about={**calibration.about, "refits": refits})


def _count(evaluations: int, opening: bool, images: int, held_out: int) -> int:
    """Of how many evaluations the plan is, the opening one apart."""
    n = evaluations - opening
    if not FEWEST <= n <= LARGEST:
        raise ValueError(
            f"evaluations = {evaluations} is out of range: choose from {FEWEST + evaluations - n} to "
            f"{LARGEST + evaluations - n}; fewer leave nothing to fit, and more need none")
    if held_out < 1 or images - held_out < 2:
        raise ValueError(
            f"x has {images} images with held_out = {held_out}: give at least two to learn from and one to "
            "select by")
    return n


def refit_cost(evaluations: int, rounds: int = ROUNDS, opening: bool = False) -> int:
    """The most evaluations that refit_multistep makes."""
    n = evaluations - opening
    slopes = sum(n - k - (row > 0) for row, k in _free(n))
    return PROBE + opening + TEACHER + n + rounds * (slopes + (3 + AGAIN) * n)


def _free(n: int) -> list[tuple[int, int]]:
    """The places of Shape.numbers that n steps leave free: not the first level, or weights of what is not yet
    there; and of the last step, to x0, only what two images leave."""
    return [(row, k) for row in range(1 + ORDER) for k in range(max(row - 1, row == 0), n - (row in (1, 3)))]


class State(NamedTuple):
    """A run of a shape: where it was, and what it missed of the target, [B, elements that are looked at]."""

    shape: Shape
    places: tuple[Place, ...]
    residual: np.ndarray

    @property
    def squares(self) -> np.ndarray:
        """The mean squared error of every image."""
        return np.square(self.residual).mean(1)


class Slopes(NamedTuple):
    """How the residual depends on each free number (row, step): values [numbers, B, elements]."""

    of: tuple[tuple[int, int], ...]
    values: np.ndarray


class _Runs:
    """Runs of a shape from the start, or from any place on, and what is better of them."""

    floor: float  # of a squared error, that of the images to learn from

    def __init__(self, denoise: Denoiser, calibration: Statistics, path: Path, x: Tensor, target: Tensor,
                 training: int) -> None:
        self.denoise, self.calibration, self.path = denoise, calibration, path
        self.x, self.target, self.sampled = x, target, Sampled(target, 0)
        self.training, self.held = slice(0, training), slice(training, len(x))

    def of(self, shape: Shape) -> State:
        steps = shape.plan(self.calibration).steps(self.path)
        return State(shape, *self._ahead(steps, (Place(0, self.x),)))

    def tried(self, shape: Shape) -> State | None:
        """The same for a shape that may be a bad one: None where it leads the model to answers that are
        not finite."""
        try:
            return self.of(shape)
        except FloatingPointError:
            return None

    def left(self, state: State, part: slice) -> float:
        """The error of these images."""
        return typical(state.squares[part], self.floor)

    def errors(self, *states: State) -> dict[str, list[float]]:
        """Of the images to learn from, and of those to select by."""
        return {name: [float(np.sqrt(state.squares[part].mean())) for state in states]
                for name, part in (("training", self.training), ("selection", self.held))}

    def better(self, now: State, slopes: Slopes, shares: Sequence[float]) -> State | None:
        """The first of these shares of a Gauss-Newton step that leaves less error on the images to learn
        from."""
        around = Quadratic.of(torch.from_numpy(now.residual),
                              torch.from_numpy(slopes.values).transpose(0, 1))
        u = damped_step(around, self.training, self.floor,
                        lambda G, e: np.full(len(G), DAMPING * e), MOST)  # noqa: N803
        tried = (self.tried(now.shape.moved(slopes.of, share * u)) for share in shares)
        return next((state for state in tried
                     if state and self.left(state, self.training) < self.left(now, self.training)), None)

    def slopes(self, state: State) -> Slopes:
        """By forward differences: runs from where a number first matters."""
        free, rows = _free(len(state.shape.lam)), []
        for row, k in free:
            # the last level stays in the grid
            by = DIFFERENCES[row] * (-1.0 if (row, k) == (0, len(state.shape.lam) - 1) else 1.0)
            steps = state.shape.moved([(row, k)], [by]).plan(self.calibration).steps(self.path)
            first = k - (row == 0)
            rows.append((self._ahead(steps, state.places[:first + 1])[1] - state.residual) / by)
        return Slopes(tuple(free), np.stack(rows))

    def _ahead(self, steps: Sequence[Step], places: tuple[Place,
                                                          ...]) -> tuple[tuple[Place, ...], np.ndarray]:
        """The places, with those of a run from the last of them to the end, and the residual there."""
        for step in steps[places[-1].done:]:
            places = (*places[:-1], *onward(self.denoise, places[-1], step, ORDER - 1))
        return places, self.sampled.of(places[-1].x - self.target)[0].double().numpy()
