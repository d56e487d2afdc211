"""Refit the fitted solver for one number of evaluations on the model itself: levels and weights together.

`fitted` chooses levels and weights from measured trajectories, as if each step started on one. Here the solver's own run is
what counts. Three numbers of every step are free, from DPM-Solver-v3's weights c on the chosen levels,

    c_1 = c_1 + b C,   c_0 = (1 + a) C - c_1,   C = c_0 + c_1,        lam = lam + nu gap

(scale, extrapolation and place), and forward differences of the run in each of them make the residual at the end linear,
R + J u. Damped Gauss-Newton, one or two rounds, lowers its square over a few images of one prompt. The teacher is the same
solver in many steps. b of the statistics is left out: what is learned without it was better on its own prompt and on others.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .calibrate import Sampled
from .fitted import Plan, Weights, check, fit_multistep, planned
from .integrand import DataPrediction
from .sample import Denoiser, combine, evaluate, sample
from .schedule import Path, find_path
from .solver import Step, ddim
from .statistics import Statistics
from .train import FLOOR, Counted, typical

TEACHER = 40  # its evaluations
ROUNDS = 2
FEWEST, LARGEST = 3, 15
DAMPING = 0.1  # of u, in mean squared errors
MOST = 0.4     # of a number in one round: neighbouring levels cannot meet
DIFFERENCES = {"a": 0.05, "b": 0.05, "nu": 0.1}


class Shape(NamedTuple):
    """What is free, for every step: its level, scale and extrapolation, float64 [n] each. No level may be above `top`."""

    lam: np.ndarray
    a: np.ndarray
    b: np.ndarray
    top: float

    def moved(self, kinds: Sequence[tuple[str, int]], u: np.ndarray) -> Shape:
        lam, a, b = self.lam.copy(), self.a.copy(), self.b.copy()
        gaps = np.diff(self.lam, append=2 * self.lam[-1] - self.lam[-2])
        for (kind, k), by in zip(kinds, u):
            if kind == "nu":
                lam[k] += by * gaps[k if by > 0 else k - 1]
            else:
                {"a": a, "b": b}[kind][k] += by
        return Shape(np.minimum(lam, self.top), a, b, self.top)

    def plan(self, calibration: Statistics) -> Plan:
        """v3's steps of order 2 on these levels, scaled and bent."""
        steps = planned(calibration, self.lam)
        weights = []
        for a, b, step in zip(self.a, self.b, steps.weights):
            total = sum(step.terms)
            before = sum(step.terms[1:]) + b * total
            terms = (1.0 + a) * total - before, before
            weights.append(Weights(step.decay, terms[:len(step.terms) + (b != 0.0)], step.bias))
        return replace(steps, weights=tuple(weights))


class Place(NamedTuple):
    """A run after the evaluation of a step: x, and the values kept of this evaluation and the one before it."""

    x: Tensor
    past: tuple[Tensor, ...]


def refit_multistep(model: Callable[..., Tensor], x: Tensor, calibration: Statistics, evaluations: int, *, path: str = "ve",
                    start: float | None = None, held_out: int = 1, rounds: int = ROUNDS,
                    extra_args: Mapping[str, Any] | None = None,
                    progress: Callable[[int, int, float], None] | None = None) -> Statistics:
    """The calibration with a plan for so many evaluations from full noise to x0, fitted to runs of `model`.

    model(x, sigma[B], **extra_args) returns the denoised x; x [K, ...] is noise at the calibration's first level, or at
    sigma = start above it (1 of a flow), from which the first of the evaluations leads there. The last `held_out` images only
    test. The plan is kept if it lowers the mean of log(error^2 + floor) of those and of the others; else the calibration is
    returned without one, and its `about` says so. Forward evaluations alone: at most `refit_cost` of them, each announced by
    progress(done, total, error), which may raise to cancel. ValueError for a number that leaves nothing to fit, for fewer
    than three images, and for a calibration that was not measured for fitting.
    """
    check(calibration)
    n = evaluations - (start is not None)
    if not FEWEST <= n <= LARGEST:
        raise ValueError(f"evaluations = {evaluations} is out of range: choose from {FEWEST + evaluations - n} to "
                         f"{LARGEST + evaluations - n}; fewer leave nothing to fit, and more need none")
    if held_out < 1 or len(x) - held_out < 2:
        raise ValueError(f"x has {len(x)} images with held_out = {held_out}: give at least two to learn from and one to test")
    gaussian = find_path(path)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    counted = Counted(model, extra_args, x.dtype, progress, refit_cost(evaluations, rounds, start is not None))
    plain = calibration.for_another_prompt()
    if start is not None:
        first = gaussian.at(float(calibration.lam[0]))
        x = sample(counted.denoise, x, [ddim(DataPrediction(), gaussian.level(start), first)])
    target = sample(counted.denoise, x, planned(plain, fit_multistep(plain, TEACHER).lam).steps(gaussian))
    training = slice(0, len(x) - held_out)
    shape = Shape(np.array(fit_multistep(plain, n).lam), np.zeros(n), np.zeros(n), float(calibration.lam[-1]))
    run = _Runs(counted.denoise, plain, gaussian, target)
    places, residual = run.of(shape, x)
    before = best = _squares(residual)
    floor = FLOOR * best[training].mean()
    for _ in range(rounds):
        counted.loss = float(np.sqrt(best[training].mean()))
        kinds, jacobian = run.slopes(shape, places, residual)
        u = _step(jacobian[:, training], residual[training], best[training] + floor)
        for share in (1.0, 0.5, 0.25):
            tried = shape.moved(kinds, share * u)
            ahead = run.of(tried, x)
            squares = _squares(ahead[1])
            if typical(squares[training], floor) < typical(best[training], floor):
                shape, (places, residual), best = tried, ahead, squares
                break
        else:
            break
    parts = {"training": training, "held out": slice(training.stop, len(x))}
    losses = {name: [float(np.sqrt(rows[part].mean())) for rows in (before, best)] for name, part in parts.items()}
    better = all(typical(best[part], floor) < typical(before[part], floor) for part in parts.values())
    refits = {**calibration.about.get("refits", {}), str(n): {**losses, "kept": better, "evaluations": counted.spent, "images": len(x)}}
    plans = {key: rows for key, rows in calibration.plans.items() if key != n}
    if better:
        plans[n] = shape.plan(plain).rows()
    return replace(calibration, plans=plans, about={**calibration.about, "refits": refits})


def refit_cost(evaluations: int, rounds: int = ROUNDS, opening: bool = False) -> int:
    """The most evaluations that refit_multistep makes."""
    n = evaluations - opening
    slopes = sum(n - 1 - k for k in range(n - 1)) + sum(n - 1 - k for k in range(1, n)) + sum(n - k for k in range(1, n))
    return opening + TEACHER + n + rounds * (slopes + 3 * n)


class _Runs:
    """Runs of a shape from its start, or from any place on, and what they miss of the target."""

    def __init__(self, denoise: Denoiser, calibration: Statistics, path: Path, target: Tensor) -> None:
        self.denoise, self.calibration, self.path, self.target = denoise, calibration, path, target
        self.sampled = Sampled(target, 0)

    def of(self, shape: Shape, x: Tensor) -> tuple[list[Place], np.ndarray]:
        """Every place of the run from x, and the residual [B, elements that are looked at] at its end."""
        steps = shape.plan(self.calibration).steps(self.path)
        places = [Place(x, (evaluate(self.denoise, x, steps[0].evaluations[0]),))]
        return places, self._ahead(steps, 0, places)

    def slopes(self, shape: Shape, places: Sequence[Place],
               residual: np.ndarray) -> tuple[list[tuple[str, int]], np.ndarray]:
        """The derivative of the residual in every free number, [numbers, B, elements]: runs from where it first matters."""
        n = len(shape.lam)
        kinds = [*(("a", k) for k in range(n - 1)), *(("b", k) for k in range(1, n)), *(("nu", k) for k in range(1, n))]
        rows = []
        for kind, k in kinds:
            by = DIFFERENCES[kind] * (-1.0 if (kind, k) == ("nu", n - 1) else 1.0)  # the last level stays in the grid
            steps = shape.moved([(kind, k)], np.array([by])).plan(self.calibration).steps(self.path)
            first = k - (kind == "nu")
            rows.append((self._ahead(steps, first, list(places[:first + 1])) - residual) / by)
        return kinds, np.stack(rows)

    def _ahead(self, steps: Sequence[Step], first: int, places: list[Place]) -> np.ndarray:
        """The residual at the end of a run from the place of step `first` on; the places are entered."""
        for step, following in zip(steps[first:], [*steps[first + 1:], None]):
            x, past = places[-1]
            x = combine(x, step.updates[0], {-k: value for k, value in enumerate(past)})
            if following:
                places.append(Place(x, (evaluate(self.denoise, x, following.evaluations[0]), past[0])))
        return self.sampled.of(x - self.target)[0].double().numpy()


def _step(jacobian: np.ndarray, residual: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """u of the least  sum_m |R_m + J_m u|^2 / scale_m + DAMPING |u|^2 (the first term at u = 0),  within +-MOST."""
    weight = 1.0 / scale / residual.shape[1]
    normal = np.einsum("pme,qme,m->pq", jacobian, jacobian, weight)
    slope = np.einsum("pme,me,m->p", jacobian, residual, weight)
    damping = DAMPING * float(np.einsum("me,me,m->", residual, residual, weight))
    return np.clip(-np.linalg.solve(normal + damping * np.eye(len(slope)), slope), -MOST, MOST)


def _squares(residual: np.ndarray) -> np.ndarray:
    """The mean squared error of every image."""
    return np.square(residual).mean(1)
