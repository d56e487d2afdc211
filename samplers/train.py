"""Train AMED by forward evaluations of the model itself: no data set, and no gradients through the model.

A step's landing x_t depends on three numbers of the image, u = (u_r, u_c, u_a). One more evaluation each gives its
derivatives in u_r and u_a, none that in u_c, and with the residual R = (x_t - teacher) / alpha_t they make a quadratic
model of the squared error,

    |R(u + d)|^2 = e + 2 g d + d G d,          e = R R,   g = J R,   G = J J^T,   J = dR/du  [3, elements]

which is all that training needs: damped Gauss-Newton for one u a step (the table), and gradient steps on the small network
that predicts u from the image (the predictor), whose chain rule ends at g + G d. Steps are trained in order, each from where
the trained steps before it lead, towards the states of a teacher: the same trajectories in finer steps.
"""
from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as File
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .amed import BASES, Amed, Inner, Insertion
from .first_step import afs, answered
from .integrand import DataPrediction
from .phi import midpoint
from .predictor import Predictor, bounded, unbounded
from .sample import Denoiser, advance, evaluate, on_device, sample
from .schedule import Level, Path, find_path, levels
from .solver import Multistep, finite
from .storage import Partial
from .tensors import per_image

PARTIAL = "lambda-solvers partial amed 1"
LEARNED = ("r", "c", "a")
TEACHER = 8        # its steps in every interval
ITERATIONS = 3     # of Gauss-Newton
ROUNDS, EPOCHS = 4, 300  # for the predictor: how often the steps are linearised, and steps of Adam on each
DIFFERENCES = (0.15, 0.05, 0.1)
"""In u. ComfyUI rounds sigma to one of 1000 timesteps: smaller differences in r and a would measure the rounding."""


class Quadratic(NamedTuple):
    """The mean squared error of every image around u [B, 3]: value e [B], slope g [B, 3], curvature G [B, 3, 3]. float64."""

    u: np.ndarray
    e: np.ndarray
    g: np.ndarray
    G: np.ndarray  # noqa: N815  (the letter of the equation)


class Seen(NamedTuple):
    """What one interval showed the predictor, and how the error depends on what it says."""

    features: Tensor | None
    ends: tuple[float, float]
    table: np.ndarray
    quadratic: Quadratic


def fit_amed(model: Callable[..., Tensor], x: Tensor, sigmas: Sequence[float] | Tensor, *, base: str = "amed",
             form: str = "table", first_step: str = "evaluate", teacher: int = TEACHER, learn: Sequence[str] = LEARNED,
             held_out: int = 0, path: str = "ve", extra_args: Mapping[str, Any] | None = None,
             features: Callable[[], Tensor | None] | None = None, iterations: int = ITERATIONS, rounds: int = ROUNDS,
             progress: Callable[[int, int, float], None] | None = None, seed: int = 0,
             about: Mapping[str, Any] | None = None, partial: File | str | None = None, partial_seconds: float = 2.0) -> Amed:
    """(r, c, a) for every step of one schedule, learned from the noises x; forward evaluations of `model` alone.

    model(x, sigma[B], **extra_args) returns the denoised x; x [K, ...] is starting noise at sigmas[0], of which the last
    `held_out` images only test what the others teach. base: AMED's own rule or a solver it is a plugin of. form: "table",
    one (r, c, a) a step; "predictor", a small network on top that looks at features() -> [K, C, H, W], the model's middle
    block in its last call. first_step: "afs" leaves out the first evaluation. teacher: its steps in every interval.
    learn: which of r, c, a; the others stay 1/2, 1, 1.

    On its training states no step is worse than the untrained one. progress(done, total, loss) is called after every
    evaluation and may raise to cancel; `partial` names a file that keeps the steps that are done. `about` of the result
    has the rms error after every interval, untrained and trained, and those of the images held out.
    """
    gaussian = find_path(path)
    schedule = levels(torch.as_tensor(sigmas).tolist(), gaussian)
    _check(base, form, first_step, teacher, learn, held_out, len(x), features)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    trainable = [i for i, ends in enumerate(pairwise(schedule)) if finite(*ends)]
    if not trainable:
        raise ValueError(f"sigmas = {[level.sigma for level in schedule]} has no interval between two positive levels inside "
                         "the path, and AMED learns nothing of others: use more steps")
    fine, marks = _refined(schedule, teacher, gaussian)
    total = training_cost(schedule, gaussian, form, teacher, learn, iterations, rounds)
    done, loss = 0, math.nan

    def denoise(x_now: Tensor, sigma: float | np.ndarray) -> Tensor:
        nonlocal done
        answer = model(x_now, per_image(sigma, x_now), **dict(extra_args or {})).detach().to(x.dtype)
        done += 1
        if progress:
            progress(min(done, total), total, loss)
        return answer

    key = {"lam": [level.lam for level in schedule], "shape": list(x.shape), "path": path, "base": base, "seed": seed,
           "first_step": first_step, "teacher": teacher, "learn": list(learn), "held_out": held_out, "about": dict(about or {})}
    state = Partial(partial, PARTIAL, key, partial_seconds, x.device)
    kept, first = state.read()
    if not first:
        kept = {f"target.{j}": value for j, value in _teacher(denoise, x, fine, marks, gaussian).items()}
    targets = {int(name[7:]): value for name, value in kept.items() if name.startswith("target.")}
    student = Student(denoise, Insertion(Amed.untrained(first_step=first_step), BASES[base]), schedule, gaussian, targets, learn)
    training = slice(0, len(x) - held_out)
    student.start(x)
    if first:
        done = training_cost(schedule[:first + 1], gaussian, "table", teacher, learn, iterations)
        student.resume(kept, first)
    losses = {name: kept[f"losses.{name}"].tolist() if first else [] for name in ("untrained", "trained")}
    try:
        for i in range(first, len(schedule) - 1 - (not finite(schedule[-1]))):
            if i in trainable:
                u, before, after = _gauss_newton(student, i, training, iterations)
                losses["untrained"].append(before.tolist())
                losses["trained"].append(after.tolist())
                loss = math.sqrt(after[training].mean())
            else:
                u = np.zeros((1, 3))
                student.land(i, u)
            student.take()
            kept |= student.kept() | {f"losses.{name}": torch.tensor(value) for name, value in losses.items()}
            state.write(kept, i + 1)
    except BaseException:  # cancelled: the steps that are done are kept
        state.write(kept, student.done, at_once=True)
        raise
    table = np.concatenate([bounded(np.concatenate(student.u)), np.tile(Inner(), (len(schedule) - 1 - len(student.u), 1))])
    network = None
    if form == "predictor":
        network, trained = _fit_predictor(student, x, table, features, training, rounds, seed)
        losses["table"], losses["trained"] = losses["trained"], trained
    shown = {name: {part: [math.sqrt(np.mean(row[where])) for row in np.asarray(rows)]
                    for part, where in (("training", training), ("held out", slice(len(x) - held_out, len(x))))
                    if part == "training" or held_out} for name, rows in losses.items()}
    result = Amed(np.array([level.lam for level in schedule]), table, base, first_step, network, about={
        **(about or {}), "path": path, "form": form, "learn": list(learn), "teacher": teacher, "samples": len(x),
        "held_out": held_out, "shape": list(x.shape[1:]), "seed": seed, "evaluations": done, "losses": shown,
        "sigmas": [level.sigma for level in schedule], "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    state.remove()
    return result


def training_cost(schedule: Sequence[Level], path: Path, form: str = "table", teacher: int = TEACHER,
                  learn: Sequence[str] = LEARNED, iterations: int = ITERATIONS, rounds: int = ROUNDS) -> int:
    """The most model evaluations that `fit_amed` makes."""
    intervals = len(schedule) - 1 - (not finite(schedule[-1]))
    trained = sum(finite(*ends) for ends in pairwise(schedule))
    slopes = len({"r", "a"} & {*learn})
    total = len(_refined(schedule, teacher, path)[0]) - 1 + intervals + trained * (1 + iterations * (slopes + 1))
    if form == "predictor":
        total += rounds * (intervals + trained * (1 + slopes)) + intervals + trained
    return total


class Student:
    """A run that is trained step by step: where it is, what it remembers, and where any u would lead from here."""

    def __init__(self, denoise: Denoiser, solver: Insertion, schedule: Sequence[Level], path: Path,
                 targets: Mapping[int, Tensor], learn: Sequence[str] = LEARNED,
                 differences: Sequence[float] = DIFFERENCES) -> None:
        self.model, self.solver, self.schedule, self.path, self.targets = denoise, solver, schedule, path, targets
        self.learn, self.differences = learn, differences

    def start(self, x: Tensor) -> None:
        self.x, self.past, self.u, self.denoise = x, [], [], self.model
        if self.solver.trained.first_step == "afs":
            self.denoise = answered(self.model, afs(self.schedule[0]))
        self.here: dict[int, Tensor] = {}

    @property
    def done(self) -> int:
        return len(self.u)

    def look(self, i: int) -> None:
        """Make the evaluation that opens interval i."""
        first = self.solver.step_of_each(self.schedule, self.path, i, [[Inner()]] * (i + 1), self.x.ndim).evaluations[0]
        self.here = {0: evaluate(self.denoise, self.x, first)}

    def land(self, i: int, u: np.ndarray, known: Mapping[int, Tensor] | None = None) -> Tensor:
        """x at the end of interval i with u [1 or B, 3], which `take` will go on from."""
        rows = [[Inner(*map(float, row)) for row in bounded(part)] for part in (*self.u, u)]
        step = on_device(self.solver.step_of_each(self.schedule, self.path, i, rows, self.x.ndim), self.x)
        values = {**{-k: m for k, m in enumerate(self.past, 1)}, **(self.here if known is None else known)}
        own = range(len(step.evaluations))
        landed = advance(self.denoise, self.x, step, values, {*values, *own})
        self.here = {0: values[0]}
        self.landed = landed, [values[k] for k in reversed(own)], u, {k: values[k] for k in own}
        return landed

    def take(self) -> None:
        """Go on from where `land` led last."""
        self.x, latest, u, _ = self.landed
        self.past = [*latest, *self.past][:4]
        self.u.append(u)
        self.here = {}

    def error(self, i: int, landed: Tensor) -> Tensor:
        """The residual in y, [B, elements]."""
        return ((landed - self.targets[i + 1]) / self.schedule[i + 1].alpha).flatten(1)

    def quadratic(self, i: int, u: np.ndarray) -> Quadratic:
        """The error around the u that `land` was last called with, by one evaluation for each of r and a that is learned."""
        there = self.landed
        base = self.error(i, there[0])
        slopes = []
        for which, (name, difference) in enumerate(zip(LEARNED, self.differences)):
            if name not in self.learn:
                slopes.append(torch.zeros_like(base))
                continue
            moved = self.land(i, u + difference * np.eye(3)[which], there[3] if name == "c" else None)
            slopes.append((self.error(i, moved) - base) / difference)
        self.landed = there
        jacobian = torch.stack(slopes, 1)
        n = base.shape[1]
        parts = (base.square().mean(1), torch.einsum("bkn,bn->bk", jacobian, base) / n,
                 torch.einsum("bkn,bln->bkl", jacobian, jacobian) / n)
        return Quadratic(np.broadcast_to(u, (len(base), 3)), *(part.double().cpu().numpy() for part in parts))

    def kept(self) -> dict[str, Tensor]:
        """What `resume` needs."""
        return {"x": self.x, "u": torch.from_numpy(np.concatenate(self.u)), **{f"past.{k}": m for k, m in enumerate(self.past)}}

    def resume(self, kept: Mapping[str, Tensor], first: int) -> None:
        self.x, self.u = kept["x"], list(kept["u"].cpu().numpy()[:, None])
        self.past = [kept[f"past.{k}"] for k in range(4) if f"past.{k}" in kept]
        assert self.done == first
        if first:
            self.denoise = self.model


def _gauss_newton(student: Student, i: int, training: slice, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One u for all images; it, and the mean squared error of every image before and after. Ends landed on it."""
    u = np.zeros((1, 3))
    error = _squared(student, i, student.land(i, u))
    before, best, damping, quadratic = error, student.landed, 0.1, None
    for _ in range(iterations):
        quadratic = quadratic or student.quadratic(i, u)
        g, G = quadratic.g[training].mean(0), quadratic.G[training].mean(0)  # noqa: N806
        d = -np.linalg.solve(G + np.diag(damping * np.diag(G) + 1e-12), g)
        trial = u + np.clip(d, -1.0, 1.0)
        trial_error = _squared(student, i, student.land(i, trial))
        if trial_error[training].mean() < error[training].mean():
            u, error, best, damping, quadratic = trial, trial_error, student.landed, damping / 5, None
        else:
            damping *= 10
            student.landed = best
    student.landed = best
    return u, before, error


def _squared(student: Student, i: int, landed: Tensor) -> np.ndarray:
    return student.error(i, landed).square().mean(1).double().cpu().numpy()


def _fit_predictor(student: Student, x: Tensor, table: np.ndarray, features: Callable[[], Tensor | None], training: slice,
                   rounds: int, seed: int) -> tuple[Predictor, list[list[float]]]:
    """The predictor with the least error on the images held out (or, without any, on all), and its errors."""
    network = Predictor.new(seed)
    rows, best = unbounded(table), None
    for round_ in range(rounds + 1):
        seen, errors = _student_run(student, x, rows, network, features, slopes=round_ < rounds)
        judged = errors[:, training.stop:] if training.stop < len(x) else errors
        score = float(np.log(judged.mean(1)).mean())
        if best is None or score < best[0]:
            best = score, network, errors.tolist()
        if round_ < rounds:
            network = descend(network, seen, training, EPOCHS)
    return best[1:]


def _student_run(student: Student, x: Tensor, rows: np.ndarray, network: Predictor, features: Callable[[], Tensor | None],
                 slopes: bool) -> tuple[list[Seen], np.ndarray]:
    """One run with the predictor's u: what every trainable interval showed, and the errors [interval, image]."""
    seen, errors = [], []
    student.start(x)
    for i, ends in enumerate(pairwise(student.schedule)):
        if i + 1 not in student.targets:
            break
        if not finite(*ends):
            student.land(i, np.zeros((1, 3)))
        else:
            student.look(i)
            what = None if i == 0 and student.solver.trained.first_step != "evaluate" else features().detach().clone()
            lams = ends[0].lam, ends[1].lam
            with torch.no_grad():
                u = network(what, len(x), *lams, rows[i]).double().cpu().numpy()
            errors.append(_squared(student, i, student.land(i, u)))
            if slopes:
                seen.append(Seen(what, lams, rows[i], student.quadratic(i, u)))
        student.take()
    return seen, np.array(errors)


def descend(network: Predictor, seen: Sequence[Seen], training: slice, epochs: int, rate: float = 2e-3,
            damping: float = 0.1) -> Predictor:
    """Steps of Adam on the quadratic errors, damped by their distance from where they were made."""
    with torch.inference_mode(False), torch.enable_grad():
        weights = {name: value.clone().requires_grad_() for name, value in network.weights.items()}
        moving = Predictor(weights)
        adam = torch.optim.Adam(weights.values(), rate)
        for _ in range(epochs):
            adam.zero_grad()
            predictor_loss(moving, seen, training, damping).backward()
            adam.step()
    return Predictor({name: value.detach() for name, value in weights.items()})


def predictor_loss(network: Predictor, seen: Sequence[Seen], training: slice, damping: float = 0.0) -> Tensor:
    """The mean over intervals and images of (e + 2 g d + d (G + damping diag G) d) / mean e, d = u(network) - u."""
    total = network.weights["heads.bias"].new_zeros(())
    for features, (lam_s, lam_t), table, quadratic in seen:
        u, e, g, G = (torch.from_numpy(part[training].copy()).to(total) for part in quadratic)  # noqa: N806
        d = network(None if features is None else features.clone(), len(quadratic.e), lam_s, lam_t, table)[training] - u
        G = G + damping * torch.diag_embed(G.diagonal(dim1=1, dim2=2))  # noqa: N806
        value = e + 2.0 * (g * d).sum(1) + torch.einsum("bk,bkl,bl->b", d, G, d)
        total = total + value.mean() / e.mean()
    return total / len(seen)


def _teacher(denoise: Denoiser, x: Tensor, fine: Sequence[Level], marks: Mapping[int, int], path: Path) -> dict[int, Tensor]:
    """The teacher's x at level j of the schedule, for j >= 1 up to the last of finite lam."""
    states = {}

    def observe(i: int, sigma: float, x_now: Tensor, denoised: Tensor) -> None:
        if i in marks:
            states[marks[i]] = x_now

    end = sample(denoise, x, Multistep(DataPrediction(), 2, midpoint, "off").steps(fine, path), observe=observe)
    states[marks[len(fine) - 1]] = end
    return {j: value for j, value in states.items() if j}


def _refined(schedule: Sequence[Level], teacher: int, path: Path) -> tuple[list[Level], dict[int, int]]:
    """The teacher's levels to the last of finite lam, and at which of them level j of the schedule stands."""
    fine, marks = [], {}
    for j, (s, t) in enumerate(pairwise(schedule)):
        marks[len(fine)] = j
        fine.append(s)
        shares = [k / teacher for k in range(1, teacher)]
        if finite(s, t):
            fine += [path.at(s.lam + share * (t.lam - s.lam)) for share in shares]
        elif finite(t):  # from all noise: equal steps in sigma
            fine += [path.level(s.sigma + share * (t.sigma - s.sigma)) for share in shares]
        else:
            return fine, marks
    marks[len(fine)] = len(schedule) - 1
    return [*fine, schedule[-1]], marks


def _check(base: str, form: str, first_step: str, teacher: int, learn: Sequence[str], held_out: int, count: int,
           features: object) -> None:
    for name, value, choices in (("base", base, tuple(BASES)), ("form", form, ("table", "predictor")),
                                 ("first_step", first_step, ("evaluate", "afs"))):
        if value not in choices:
            raise ValueError(f"{name} = {value!r} is out of range: choose one of {', '.join(choices)}")
    if not learn or not {*learn} <= {*LEARNED}:
        raise ValueError(f"learn = {tuple(learn)} is out of range: choose some of r, c, a")
    if teacher < 2:
        raise ValueError(f"teacher = {teacher} is out of range: choose a whole number from 2")
    if not 0 <= held_out < count:
        raise ValueError(f"held_out = {held_out} is out of range: of {count} noises choose 0 to {count - 1}")
    if form == "predictor" and features is None:
        raise ValueError("a predictor looks at the middle block of a U-Net, and this model has none: choose the table")
