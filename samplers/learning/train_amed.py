"""Train AMED by forward evaluations of the model itself: no data set, and no gradients through the model.

Where a run ends depends on three numbers of each step and image, u = (u_r, u_c, u_a). One perturbed run gives
the derivative in each of them; that in u_c of the last step is free. With the residual R = (x - teacher) /
alpha they make a quadratic model of the squared error (gauss_newton),

    |R(u + d)|^2 = e + 2 g d + d G d,

which is all that training needs: damped Gauss-Newton for one u a step (the table), and gradient steps on the
small network that predicts u from the image (the predictor), whose chain rule ends at g + G d. First every
step learns by itself to land where the teacher does, from where the steps before it lead; then they learn
together to end where the teacher ends, which lets one make good what another cannot, and go half way there,
since what must be made good differs between prompts. The teacher is the same trajectory in finer steps. Over
images the mean of log(|R|^2 + floor) is lowered.
"""
from __future__ import annotations

import math
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path as File
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..denoisers import FIRST_STEPS, Denoiser
from ..integrand import DataPrediction
from ..model import PROBE, latents
from ..phi import midpoint
from ..sample import Place, evaluate, on_device, onward, sample
from ..schedule import Level, Path, find_path, levels
from ..solver import Multistep, finite
from .amed import BASES, Amed, Inner, Insertion
from .course import Course
from .gauss_newton import FLOOR, Quadratic, damped_step, typical
from .predictor import Predictor, bounded, unbounded

PARTIAL = "lambda-solvers partial amed 3"
LEARNED = ("r", "c", "a")
TEACHER = 5        # its steps in every interval
# evaluations of the table's training in those of one run: learning together takes what the rest leaves
BUDGET = 15
ALONE = 2          # iterations of every step by itself
MOST_TOGETHER = 3
MEMORY = 4         # values that a base looks back on
DAMPING = {"alone": 0.03, "together": 1.0}
"""In the curvature of each number: 1 halves a step, where more than one step learns. Figures in
docs/notes.md."""
GUESS = {"amed": 0.3}  # r to begin with, where it is not 1/2: AMED's own rule always went below, to 0.13-0.46
ROUNDS, EPOCHS = 4, 300  # for the predictor: how often the run is linearised, and steps of Adam on each
DIFFERENCES = (0.15, 0.05, 0.1)
"""In u. ComfyUI rounds sigma to one of 1000 timesteps: smaller differences in r and a would measure the
rounding."""


Choose = Callable[[int], np.ndarray]
"""choose(i) -> u [1 or B, 3] of interval i, asked after the evaluation that opens it."""


@torch.no_grad()
def fit_amed(model: Callable[..., Tensor], x: Tensor, sigmas: Sequence[float] | Tensor, *, base: str = "amed",
             form: str = "table", first_step: str = "evaluate", teacher: int = TEACHER,
             learn: Sequence[str] = LEARNED, held_out: int = 0, path: str = "ve",
             extra_args: Mapping[str, Any] | None = None, features: Callable[[], Tensor | None] | None = None,
             budget: float = BUDGET, rounds: int = ROUNDS,
             progress: Callable[[int, int, float], None] | None = None, precision: torch.dtype | None = None,
             seed: int = 0, about: Mapping[str, Any] | None = None, partial: File | str | None = None,
             partial_seconds: float = 2.0) -> Amed:
    """(r, c, a) for every step of one schedule, learned from the noises x; forward evaluations of `model`
    alone.

    model(x, sigma[B], **extra_args) returns the denoised x; x [K, ...] is starting noise at sigmas[0], of
    which the last `held_out` images only test what the others teach. base: AMED's own rule or a solver it is
    a plugin of. form: "table", one (r, c, a) a step; "predictor", a small network on top that looks at
    features() -> [K, C, H, W], the model's middle block in its last call. first_step: "afs" leaves out the
    first evaluation. teacher: its steps in every interval. learn: which of r, c, a; the others stay 1/2, 1,
    1. budget: evaluations of a table's training, in those of one run. precision: what the model computes in,
    if not x's dtype.

    The result ends no further from the teacher than the untrained solver on its training images (in the mean
    of `typical`). UnsteadyModel for a model that does not answer for itself. progress(done, total, loss) is
    called after every evaluation and may raise to cancel; `partial` names a file that keeps the steps that
    are done, for a call with the same x, settings and model to go on from. `about` of the result has the rms
    error at every level, untrained and trained, of the images that taught and of the others: "held out" from
    a table's training, a "selection" of predictors.
    """
    gaussian = find_path(path)
    schedule = levels(torch.as_tensor(sigmas).tolist(), gaussian)
    x, dtype = latents(x), x.dtype
    _check(base, form, first_step, teacher, learn, held_out, len(x), features)
    trainable = _trainable(schedule)
    together, total = _effort(schedule, form, first_step, teacher, learn, budget, rounds)
    settings = {
        "lam": [level.lam for level in schedule], "path": path, "base": base, "first_step": first_step,
        "teacher": teacher, "learn": list(learn), "held_out": held_out, "about": dict(about or {}),
        "together": together
    }
    solver = Insertion(Amed.untrained(first_step=first_step), BASES[base])
    training = slice(0, len(x) - held_out)
    guess = unbounded(np.array([[GUESS.get(base, 0.5) if "r" in learn else 0.5, 1.0, 1.0]]))
    course = Course(model, x, schedule, gaussian, kind=PARTIAL, settings=settings, total=total, dtype=dtype,
                    precision=precision, extra_args=extra_args, partial=partial, seconds=partial_seconds,
                    progress=progress)
    with course:
        targets = course.targets(lambda: _teacher(course.denoise, x, schedule, teacher, gaussian))
        student = Student(course.denoise, solver, schedule, gaussian, targets, learn)
        us, losses = _fit_table(student, x,
                                [guess if i in trainable else 0 * guess for i in range(len(schedule) - 1)],
                                together, training, course)
        network = None
        if form == "predictor":
            losses["table"] = losses["trained"]
            network, losses["trained"] = _fit_predictor(student, x, np.concatenate(us), features, training,
                                                        rounds, seed)
    told = {
        **(about or {}), "path": path, "form": form, "learn": list(learn), "teacher": teacher,
        "samples": training.stop, "held_out": held_out, "shape": list(x.shape[1:]), "seed": seed,
        "evaluations": course.spent, "losses": _shown(losses, training, held_out,
                                                      "selection" if form == "predictor" else "held out"),
        "sigmas": [level.sigma
                   for level in schedule], "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    }
    return Amed(np.array(settings["lam"]), bounded(np.concatenate(us)), base, first_step, network, about=told)


def _shown(losses: Mapping[str, list[np.ndarray]], training: slice, held_out: int,
           others: str) -> dict[str, Any]:
    """The rms errors at every level: of the images that taught, and of the others if there are any."""
    parts = {
        "training": training, **({others: slice(training.stop, training.stop + held_out)} if held_out else {})
    }
    return {name: {part: [math.sqrt(row[where].mean()) for row in rows] for part, where in parts.items()}
            for name, rows in losses.items()}


def training_cost(schedule: Sequence[Level], form: str = "table", first_step: str = "evaluate",
                  teacher: int = TEACHER, learn: Sequence[str] = LEARNED, budget: float = BUDGET,
                  rounds: int = ROUNDS) -> int:
    """The most model evaluations that `fit_amed` makes (fewer where an iteration fails); ValueError where
    it refuses."""
    return _effort(schedule, form, first_step, teacher, learn, budget, rounds)[1]


def _effort(schedule: Sequence[Level], form: str, first_step: str, teacher: int, learn: Sequence[str],
            budget: float, rounds: int) -> tuple[list[int], int]:
    """The interval from which on each round's steps learn together, and the evaluations of it all.

    A round of all steps costs about 3/2 of their number in runs. As many of the last steps as the budget
    leaves take part, so that short and long schedules spend alike.
    """
    steps, trainable = len(schedule) - 1, _trainable(schedule)
    cost = [1 + (i in trainable) for i in range(steps)]
    run = sum(cost) - (first_step != "evaluate")
    slopes = len({"r", "a"} & {*learn})

    def linearised(first: int) -> int:
        return sum(len(learn) * sum(cost[i + 1:]) + slopes for i in trainable if i >= first)

    together, total = [], PROBE + teacher * steps + run + sum(
        cost[1:]) + 1 + len(trainable) * ALONE * (slopes + 1)
    for _ in range(MOST_TOGETHER):
        each = {i: linearised(i) + sum(cost[i:]) - 1 for i in trainable[:max(1, len(trainable) - 1)]}
        fitting = [i for i in each if total + each[i] <= budget * run]
        if fitting:
            together.append(fitting[0])
            total += each[fitting[0]]
    if form == "predictor":
        total += rounds * (run + linearised(0)) + run
    return together, total


def _trainable(schedule: Sequence[Level]) -> list[int]:
    found = [i for i, ends in enumerate(pairwise(schedule)) if finite(*ends)]
    if not found:
        raise ValueError(
            f"sigmas = {[level.sigma for level in schedule]} has no interval between two positive levels "
            "inside the path, and AMED learns nothing of others: use more steps")
    return found


def _fit_table(student: Student, x: Tensor, guess: Sequence[np.ndarray], together: Sequence[int],
               training: slice, course: Course) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """The u [1, 3] of every interval: each by itself, then together from every interval of `together` on;
    `Student.errors`."""
    steps, us = len(guess), course.us(guess)
    first = student.run(Place(0, x), lambda i: np.zeros((1, 3)), steps)
    places = [first[0]._replace(values={0: first[0].values[0]})]
    for i in range(steps):
        if course.done <= 1 + i and i in student.trainable:
            known = first[:2] if i == 0 and not guess[0].any() else None
            ahead, (us[i], ) = _gauss_newton(student, places[-1], [us[i]], training, ALONE, DAMPING["alone"],
                                             known)
            course.learned(2 + i, us, student.rms(ahead[-1], training))
        else:
            ahead = student.run(places[-1], us.__getitem__, i + 1)
        places[-1:] = ahead
    for done, i in enumerate(together, 1 + steps):
        if course.done <= done:
            damping = DAMPING["together" if i < max(student.trainable) else "alone"]
            places[i:], us[i:] = _gauss_newton(student, places[i], us[i:], training, 1, damping, places[i:])
            course.learned(1 + done, us, student.rms(places[-1], training))
    losses = {"untrained": student.errors(first), "trained": student.errors(places)}
    ends = [losses[name][-1][training] for name in ("trained", "untrained")]
    floor = FLOOR * ends[1].mean() + 1e-30
    if typical(ends[0], floor) > typical(ends[1], floor):
        us, losses["trained"] = [np.zeros((1, 3)) for _ in us], losses["untrained"]
    return us, losses


class Student:
    """Runs of the solver that is trained, from any place in the schedule and with any u."""

    def __init__(self, denoise: Denoiser, solver: Insertion, schedule: Sequence[Level], path: Path,
                 targets: Mapping[int, Tensor], learn: Sequence[str] = LEARNED,
                 differences: Sequence[float] = DIFFERENCES) -> None:
        self.denoise, self.solver, self.targets = denoise, solver, targets
        self.schedule, self.path = schedule, path
        self.learn, self.differences, self.trainable = learn, differences, set(_trainable(schedule))
        self.before: Sequence[np.ndarray] = ()  # the u of every interval of the last run

    def run(self, place: Place, choose: Choose, end: int, known: Mapping[int, Tensor] | None = None,
            before: Sequence[np.ndarray] | None = None) -> list[Place]:
        """The places from one on to the start of interval `end`; known evaluations of the first interval are
        not made again.

        before: the u of the intervals before the place, which a plugin of a multistep solver looks back on.
        """
        places = [place if known is None else place._replace(values=known)]
        rows = list(self.before if before is None else before)[:place.done]
        for i in range(place.done, end):
            if 0 not in (here := places[-1]).values:
                here = here._replace(values={0: self.open(i, here.x)})
            rows.append(np.asarray(choose(i)))
            taken = self.solver.step(self.schedule, self.path, i, [Inner.of(u, here.x.ndim) for u in rows])
            places[-1:] = onward(self.denoise, here, on_device(taken, here.x), MEMORY)
        self.before = rows
        return places

    def open(self, i: int, x: Tensor) -> Tensor:
        """The value kept of the evaluation that opens an interval; the analytic one if the first is left
        out."""
        first = self.solver.step(self.schedule, self.path, i, [Inner()] * (i + 1)).evaluations[0]
        how = "evaluate" if i else self.solver.trained.first_step
        return evaluate(FIRST_STEPS[how](self.denoise, self.schedule[0]), x, first)

    def error(self, place: Place) -> Tensor:
        """The residual in y, [B, elements]."""
        return ((place.x - self.targets[place.done]) / self.schedule[place.done].alpha).flatten(1)

    def squared(self, place: Place) -> np.ndarray:
        """The mean squared error of every image."""
        return self.error(place).square().mean(1).cpu().double().numpy()

    def errors(self, places: Sequence[Place]) -> list[np.ndarray]:
        """`squared` at every level after the first."""
        return [self.squared(place) for place in places[1:]]

    def rms(self, place: Place, images: slice) -> float:
        return math.sqrt(self.squared(place)[images].mean())

    def quadratic(self, places: Sequence[Place], us: Sequence[np.ndarray]) -> Quadratic:
        """The error at the last place around the u that led there, from a perturbed run for each number
        that is learned."""
        end, start, before = places[-1].done, places[0].done, list(self.before)
        base = self.error(places[-1])
        slopes = []
        for j, place in enumerate(places[:-1]):
            for which, (name, difference) in enumerate(zip(LEARNED, self.differences)):
                if name not in self.learn or place.done not in self.trainable:
                    slopes.append(torch.zeros_like(base).cpu())
                    continue
                moved = us[j] + difference * np.eye(3)[which]
                known = place.values if name == "c" else {0: place.values[0]}
                ahead = self.run(place, lambda i: moved
                                 if i == place.done else us[i - start], end, known, before)
                slopes.append(((self.error(ahead[-1]) - base) / difference).cpu())
        self.before = before
        return Quadratic.of(base.cpu(), torch.stack(slopes, 1))


def _gauss_newton(student: Student, place: Place, us: Sequence[np.ndarray], training: slice, iterations: int,
                  damping: float,
                  known: Sequence[Place] | None = None) -> tuple[list[Place], list[np.ndarray]]:
    """The u [1, 3] of some intervals on, for all images, that lower the error where they end; the places they
    lead to.

    known: the places that these u lead to, if they were run already.
    """
    start, us = place.done, list(us)
    end, before = start + len(us), list(student.before)[:start]
    places = list(known) if known else student.run(place, lambda i: us[i - start], end, before=before)
    floor = FLOOR * student.squared(places[-1])[training].mean() + 1e-30
    quadratic = None
    for _ in range(iterations):
        student.before = [*before, *us]
        quadratic = quadratic or student.quadratic(places, us)
        d = damped_step(quadratic, training, floor, lambda G, e: damping * np.diag(G),
                        1.0)  # noqa: B023, N803
        moved = [u + part for u, part in zip(us, d.reshape(-1, 1, 3))]
        try:
            ahead = student.run(place, lambda i: moved[i - start], end, {0: places[0].values[0]}, before)
        except FloatingPointError:  # so far away that the model's answers are not finite
            ahead = None
        if ahead and typical(student.squared(ahead[-1])[training], floor) < typical(
                student.squared(places[-1])[training], floor):
            us, places, damping, quadratic = moved, ahead, damping / 5, None
        else:
            damping *= 10
    student.before = [*before, *us]
    return places, us


class Seen(NamedTuple):
    """What a run showed the predictor: at every trainable interval (i, the middle block, lam at both ends,
    the table's u), u as it was predicted [B, 3 n], and how the error at the end depends on it."""

    looks: list[tuple[int, Tensor | None, tuple[float, float], np.ndarray]]
    u: np.ndarray
    quadratic: Quadratic


def _fit_predictor(student: Student, x: Tensor, table: np.ndarray, features: Callable[[], Tensor | None],
                   training: slice, rounds: int, seed: int) -> tuple[Predictor, list[np.ndarray]]:
    """The predictor with the least error on the images held out (or, without any, on all), and its errors."""
    network, best, floor = Predictor(seed), None, 0.0
    for round_ in range(rounds + 1):
        places, seen = watched(student, x, table, network, features, linearise=round_ < rounds)
        end = student.squared(places[-1])
        floor = floor or FLOOR * end.mean() + 1e-30  # the first round's, for all
        score = typical(end[training.stop:] if training.stop < len(x) else end, floor)
        if best is None or score < best[0]:
            best = score, network, student.errors(places)
        if seen:
            network = descend(network, seen, training, EPOCHS)
    return best[1:]


def watched(student: Student, x: Tensor, table: np.ndarray, network: Predictor,
            features: Callable[[], Tensor | None], linearise: bool = True) -> tuple[list[Place], Seen | None]:
    """A run with the predictor's u [steps, 3 of the table], and what it showed."""
    looks, us = [], []

    def choose(i: int) -> np.ndarray:
        if i not in student.trainable:
            us.append(np.zeros((len(x), 3)))
            return us[-1]
        skipped = i == 0 and student.solver.trained.first_step != "evaluate"
        seen = None if skipped else features().detach().clone()
        lams = student.schedule[i].lam, student.schedule[i + 1].lam
        looks.append((i, seen, lams, table[i]))
        with torch.no_grad():
            us.append(network(seen, len(x), *lams, table[i]).double().cpu().numpy())
        return us[-1]

    places = student.run(Place(0, x), choose, len(student.schedule) - 1, before=[])
    if not linearise:
        return places, None
    return places, Seen(looks, np.concatenate(us, 1), student.quadratic(places, us))


def descend(network: Predictor, seen: Seen, training: slice, epochs: int, rate: float = 2e-3,
            damping: float = 0.1) -> Predictor:
    """Steps of Adam on the quadratic errors, damped by their distance from where they were made."""
    with torch.inference_mode(False), torch.enable_grad():
        moving = deepcopy(network).requires_grad_()
        adam = torch.optim.Adam(moving.parameters(), rate)
        for _ in range(epochs):
            adam.zero_grad()
            predictor_loss(moving, seen, training, damping).backward()
            adam.step()
    return moving.requires_grad_(False)


def predictor_loss(network: Predictor, seen: Seen, training: slice, damping: float = 0.0) -> Tensor:
    """The mean over the images of (e + 2 g d + d (G + damping diag G) d) / (e + floor), d = u(network) -
    u."""
    like = network.heads.bias
    e, g, G = (torch.from_numpy(part[training].copy()).to(like) for part in seen.quadratic)  # noqa: N806
    u = torch.from_numpy(seen.u.copy()).to(like)
    parts = {
        i: network(None if features is None else features.clone(), len(u), *lams, row) - u[:, 3 * i:3 * i + 3]
        for i, features, lams, row in seen.looks
    }
    d = torch.cat([parts.get(i, u.new_zeros(len(u), 3)) for i in range(u.shape[1] // 3)], 1)[training]
    G = G + damping * torch.diag_embed(G.diagonal(dim1=1, dim2=2))  # noqa: N806
    value = e + 2.0 * (g * d).sum(1) + torch.einsum("bk,bkl,bl->b", d, G, d)
    return (value / (e + FLOOR * e.mean() + 1e-30)).mean()


def _teacher(denoise: Denoiser, x: Tensor, schedule: Sequence[Level], steps: int,
             path: Path) -> dict[int, Tensor]:
    """The teacher's x at every level of the schedule after the first."""
    fine, marks = _refined(schedule, steps, path)
    states = {}

    def observe(i: int, sigma: float, x_now: Tensor, denoised: Tensor) -> None:
        if i in marks:
            states[marks[i]] = x_now

    end = sample(denoise, x,
                 Multistep(DataPrediction(), 2, midpoint, "off").steps(fine, path), observe=observe)
    states[len(schedule) - 1] = end
    return {j: value for j, value in states.items() if j}


def _refined(schedule: Sequence[Level], steps: int, path: Path) -> tuple[list[Level], dict[int, int]]:
    """The teacher's levels, and which of them are the schedule's: place -> level."""
    fine, marks = [], {}
    for j, (s, t) in enumerate(pairwise(schedule)):
        marks[len(fine)] = j
        fine.append(s)
        for share in (k / steps for k in range(1, steps)):
            if finite(s, t):
                fine.append(path.at(s.lam + share * (t.lam - s.lam)))
            elif finite(t):  # from all noise: equal steps in sigma
                fine.append(path.level(s.sigma + share * (t.sigma - s.sigma)))
            else:  # to none: equal ratios, down to one in a hundred
                fine.append(path.at(s.lam + share * math.log(100.0)))
    return [*fine, schedule[-1]], marks


def _check(base: str, form: str, first_step: str, teacher: int, learn: Sequence[str], held_out: int,
           count: int, features: object) -> None:
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
        raise ValueError(
            "a predictor looks at the middle block of a U-Net, and this model has none: choose the table")
