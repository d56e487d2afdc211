"""Train a hypersolver by forward evaluations of the model: no data set, and no gradients through the model.

A teacher of many steps shows the true trajectory: x* and D* at any level. Lessons are runs of some images
over a few levels, of which the last is a random one. Each step of a lesson shows what it sees, v, and what it
misses,

    r = (x*_t - the solver's x_t) / alpha_t

In the first lessons every step begins on the true trajectory, which costs nothing beyond the teacher. Then
the network is trained, and the solver makes runs of its own with it, begins each step where the one before
it led, and learns to lead back to x* too. The weights w are those of least squares; training lowers the mean
of |what is left|^2 / (rho^2 + |r|^2), each over an image.
How far such runs end from x* tells where the last level is best, for every number of steps and guidance;
the next ones have theirs near it.
Whole prompts are held out: in the end, runs of their images with the network, and by the fitted solver
without, decide at what numbers of steps it serves. """
from __future__ import annotations

import copy
import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from functools import partial as bound
from pathlib import Path as File
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..integrand import DataPrediction
from ..model import PROBE, latents
from ..sample import Place, combine, on_device, onward, sample
from ..schedule import Level, Path, find_path
from ..solver import ddim
from ..tensors import as_written
from .course import Course
from .fitted import Fitted, check
from .gauss_newton import FLOOR, typical
from .hypersolver import (EXACT, SHALLOW, SOLVER, TERMS, VIEWS, Conditions, Hypersolver, Modulation, Network,
                          error_of, flat, last_of, over, spaced, terms, views)
from .statistics import Statistics
from .storage import digest

PARTIAL = "lambda-solvers partial hypersolver 5"
STEPS = 4, 5, 6, 7, 8, 9, 10
TEACHER = 24       # its evaluations, at least
FINER = 2.4        # so many times the most steps that are learned, at least
PROBED = 8         # images that show which model it is
SHOWN = 3          # lessons on the true trajectory that each image is in
ROUNDS = 2         # of lessons of the solver's own runs
LESSON = 16        # images of a lesson
INSIDE = 7         # every seventh that is shown begins at a level between, as image to image does
DEEPEST = 0.7      # of the way to the last level, in lam, where they begin at most
NEARBY = 0.7       # in lam: how far from what was best the last level is at most, after the first round
USUAL = -3.2, 0.7, -3.9, 0.9  # of `error_of`, on the emoji model
TRUST = 20.0       # in them: what so many runs weigh
OUTLIER = 20.0     # times as far off as usual, no run counts for more
HELD_OUT = 8       # every eighth prompt
COMPARED = 16      # images of them that are run in the end, at most
CROP = 48          # places of an image that are kept, each way; of a video one frame
ITERATIONS = 6000  # after the last round; half as many before it, each time
LOOKS = 10         # in these, at how it does on prompts held out: the best of them is kept
BATCH, RATE, DECAY, WARM, AVERAGED = 8, 3e-3, 1e-3, 100, 0.995
LEAST = 1.0        # in the loss
DAMPED = 1e-3      # of the mean square, in least squares
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
NEAR = 1e-9


class Lesson(NamedTuple):
    """Runs of some images of n steps, from this share of the way to the lowest level, in lam; `place` in 0 ..
    1 is by how much the last level is far down."""

    images: list[int]
    n: int
    start: float
    place: float


def lessons(groups: Sequence[Sequence[int]], steps: Sequence[int], seed: int,
            inside: int = 0) -> list[Lesson]:
    """Each group of images is in one of them, neighbours together; of the lessons every `inside`th begins
    inside."""
    generator = torch.Generator().manual_seed(seed)
    images = sum(map(len, groups))
    count = min(len(groups), max(len(steps), math.ceil(images / LESSON)))
    order, begin = torch.randperm(count, generator=generator).tolist(), torch.rand(2, generator=generator)
    result = []
    for j, part in zip(order, np.array_split(np.arange(len(groups)), count)):
        begins = inside and j % inside == inside - 1
        deep = DEEPEST * ((float(begin[0]) + j * GOLDEN) % 1.0) if begins else 0.0
        place = (float(begin[1]) + j // len(steps) * GOLDEN) % 1.0  # of each number of steps all over
        result.append(Lesson(sorted(k for i in part for k in groups[i]), steps[j % len(steps)], deep, place))
    return result


def spread(low: float, high: float, count: int) -> list[float]:
    """So many guidances from low to high, even in their logs.

    They are in the order of the multiples of sqrt 2 modulo 1: those of every few prompts that follow one
    another, and of every eighth, which are held out, are spread over the range too.
    """
    order = sorted(range(count), key=lambda k: k * math.sqrt(2.0) % 1.0)
    rank = {k: place / max(count - 1, 1) for place, k in enumerate(order)}
    return [low * (high / low) ** rank[k] for k in range(count)]


@torch.no_grad()
def fit_hypersolver(model: Callable[..., Tensor], x: Tensor, calibration: Statistics, *,
                    guidance: float | Sequence[float] = 1.0, prompts: Sequence[int] | None = None,
                    steps: Sequence[int] = STEPS, path: str = "ve", start: float | None = None,
                    rounds: int = ROUNDS, iterations: int = ITERATIONS, seed: int = 0,
                    extra_args: Mapping[str, Any] | None = None,
                    progress: Callable[[int, int, float], None] | None = None,
                    precision: torch.dtype | None = None, about: Mapping[str, Any] | None = None,
                    partial: File | str | None = None) -> Statistics:
    """The calibration with a hypersolver for these numbers of steps, trained on runs of `model`.

    model(x, sigma[B], images=[...], **extra_args) returns the denoised x of these of the images. x [K, ...]
    is noise at the calibration's first level, or at sigma = start above it (1 of a flow), from which a
    first evaluation leads there. prompts [K]: which prompt each image has, if not its own; guidance, one or
    [K]: at what the model guides it.

    Forward evaluations alone, about `hypersolver_cost` of all images, each announced by progress(done,
    total, loss), which may raise to cancel, and so may it while the network is trained. `partial` names a
    file that keeps every part that is done, for a call with the same x, settings and model to go on from.
    The calibration comes back as it was if nothing was better with the network; `about` of it has the
    errors of the images that select, without it and with it. ValueError for fewer than two prompts, for
    numbers of steps that no run has, and for a calibration that was not measured for fitting; UnsteadyModel
    for a model that does not answer for itself. """
    check(calibration)
    x, dtype = latents(x), x.dtype
    prompts = list(range(len(x))) if prompts is None else list(prompts)
    guidances = np.broadcast_to(np.asarray(guidance, dtype=np.float64), len(x)).tolist()
    _check(len(x), prompts, steps, rounds)
    gaussian, plain = find_path(path), replace(calibration.for_another_prompt(), hypersolver=None)
    highest, lowest = (gaussian.at(float(lam)) for lam in calibration.lam[[0, -1]])
    opening = [] if start is None else [gaussian.level(start)]
    settings = {
        "guidance": guidances, "prompts": prompts, "steps": list(steps), "path": path, "start": start,
        "rounds": rounds, "iterations": iterations, "seed": seed, "about": dict(about or {}),
        "of": digest(plain.arrays())
    }
    course = Course(model, x, [*opening, highest, lowest], gaussian, kind=PARTIAL, settings=settings,
                    total=hypersolver_cost(prompts, steps, rounds, bool(opening)), dtype=dtype,
                    precision=precision, extra_args=extra_args, partial=partial, seconds=30.0,
                    progress=progress, probed=PROBED)
    school = School(course, x.cpu(), opening, gaussian, plain, guidances, prompts, tuple(steps),
                    _curriculum(prompts, steps, rounds, seed, guidances), iterations, seed)
    with course:
        kept, parts = dict(course.kept), school.parts()
        for i in range(course.done, len(parts)):
            parts[i](kept)
            course.keep(i + 1, kept)
    errors = {n: kept[f"errors.{k}"].numpy() for k, n in enumerate(steps)}
    counts = tuple(n for n, (without, having) in errors.items()
                   if typical(having, FLOOR * without.mean()) < typical(without, FLOOR * without.mean()))
    told = {"images": len(x), "prompts": len({*prompts}), "guidance": [min(guidances), max(guidances)],
            "evaluations": course.spent,
            "selection": {str(n): np.sqrt(both.mean(1)).tolist() for n, both in errors.items()}}
    learned = school.learned(kept, counts) if counts else calibration.hypersolver
    return replace(calibration, hypersolver=learned,
                   about={**calibration.about, "hypersolver": told})


def hypersolver_cost(prompts: Sequence[int], steps: Sequence[int] = STEPS, rounds: int = ROUNDS,
                     opening: bool = False) -> int:
    """The evaluations of all images that fit_hypersolver makes, rounded up; which prompt each of them has."""
    runs = sum(lesson.n * len(lesson.images) for own in _curriculum(prompts, steps, rounds, 0)[1:]
               for lesson in own) / len(prompts)
    compared = 2 * sum(steps) * min(COMPARED, len(_held(prompts))) / len(prompts)
    probe = PROBE * min(PROBED, len(prompts)) / len(prompts)
    return math.ceil(probe + opening + teachers(steps) + runs + compared)


def teachers(steps: Sequence[int]) -> int:
    """The teacher's evaluations, where these are learned."""
    return max(TEACHER, math.ceil(FINER * max(steps)))


def hypersolver_bytes(shape: Sequence[int], prompts: Sequence[int], steps: Sequence[int] = STEPS,
                      rounds: int = ROUNDS) -> int:
    """What fit_hypersolver keeps of latents of this shape, in host memory, and once on disk until it is
    done."""
    channels, *sizes = shape[1:]
    taught = sum(_curriculum(prompts, steps, rounds, 0), [])
    rows = sum(lesson.n * len(lesson.images) for lesson in taught)
    kept = 2 * channels * math.prod(_kept(sizes)) * ((VIEWS + 1) * rows + teachers(steps) * len(prompts))
    return kept + 3 * 4 * channels * math.prod(sizes) * len(prompts)


def _kept(sizes: Sequence[int]) -> list[int]:
    """How many places, each way, are kept of an image of these sizes, or of a video of these frames and
    sizes."""
    return list(map(min, sizes, {2: (CROP, CROP), 3: (1, CROP, CROP)}.get(len(sizes), sizes)))


def _curriculum(prompts: Sequence[int], steps: Sequence[int], rounds: int, seed: int,
                guidances: Sequence[float] | None = None) -> list[list[Lesson]]:
    """The lessons that are shown, and those of every round. The model is asked for images of one prompt at
    once in these, and for those of like guidance in one lesson."""
    alone, together = [[k] for k in range(len(prompts))], _together(range(len(prompts)), prompts)
    together.sort(key=lambda images: guidances[images[0]] if guidances else 0.0)
    order = [torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed + k)).tolist()
             for k in range(SHOWN)]
    shown = [lessons([alone[k] for k in order[i]], steps, seed + i, INSIDE) for i in range(SHOWN)]
    return [sum(shown, []), *(lessons(together, steps, seed + SHOWN + k) for k in range(rounds))]


def _together(images: Sequence[int], prompts: Sequence[int]) -> list[list[int]]:
    """These images by prompt."""
    return [[k for k in images if prompts[k] == name] for name in dict.fromkeys(prompts[k] for k in images)]


def _held(prompts: Sequence[int]) -> list[int]:
    """The images of the prompts that are held out."""
    names = sorted({*prompts})
    away = {*(names[HELD_OUT - 1::HELD_OUT] or names[-1:])}
    return [k for k, prompt in enumerate(prompts) if prompt in away]


def _check(count: int, prompts: Sequence[int], steps: Sequence[int], rounds: int) -> None:
    if len(prompts) != count:
        raise ValueError(f"prompts names {len(prompts)}, and x has {count} images: name one for each")
    if len({*prompts}) < 2:
        raise ValueError("all images have one prompt: give at least two, since whole prompts are held out")
    if not steps or any(not 2 <= n <= 50 for n in steps) or len({*steps}) < len(steps):
        raise ValueError(f"steps = {list(steps)} is out of range: choose different whole numbers from 2 to "
                         "50")
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} is out of range: choose a whole number from 1")


Found = dict[str, Tensor]
"""What the parts of a course leave to those behind them."""


@dataclass(frozen=True)
class School:
    """What is taught to whom, in parts that are done one after the other. All that is found is in host
    memory; the model is asked on the device."""

    course: Course
    x: Tensor
    opening: Sequence[Level]
    path: Path
    calibration: Statistics
    guidances: Sequence[float]
    prompts: Sequence[int]
    counts: tuple[int, ...]
    rounds: Sequence[Sequence[Lesson]]
    iterations: int
    seed: int

    def parts(self) -> list[Callable[[Found], None]]:
        teaching = [bound(self.teach, i) for i in range(self.teacher)]
        learning = [part for k, taught in enumerate(self.rounds) for part in (
            *(bound(self.attend, k, j) for j in range(len(taught))), bound(self.train, k))]
        return [self.begin, *teaching, *learning, *(bound(self.compare, k) for k in range(len(self.counts)))]

    @cached_property
    def batches(self) -> list[list[int]]:
        """All images, a lesson's or so at once, those of a prompt together."""
        groups = _together(range(len(self.x)), self.prompts)
        parts = np.array_split(np.arange(len(groups)), min(len(groups), math.ceil(len(self.x) / LESSON)))
        return [sum((groups[i] for i in part), []) for part in parts]

    def begin(self, found: Found) -> None:
        steps, begin = [ddim(DataPrediction(), level, self.grid[0]) for level in self.opening], self.x.clone()
        for images in self.batches:
            denoise = bound(self.course.denoise, images=images)
            begin[images] = sample(denoise, self.x[images].to(self.course.device), steps).cpu()
        found["begin"] = found["x"] = begin

    @property
    def teacher(self) -> int:
        """Its evaluations."""
        return teachers(self.counts)

    @cached_property
    def grid(self) -> tuple[Level, ...]:
        """The teacher's levels, and sigma = 0."""
        return self.to(self.teacher, *map(float, self.calibration.lam[[0, -1]]))

    def teach(self, i: int, found: Found) -> None:
        """One step of the teacher. Its answers are kept, in half precision: they tell its whole way."""
        update, now, answers = SOLVER.step(self.grid, i).updates[0], self.x.clone(), torch.zeros_like(self.x)
        for images in self.batches:
            x = found["x"][images].to(self.course.device)
            answer = self.course.denoise(x, self.grid[i].sigma, images=images).half()
            kept = self.crop(answer, images)
            if "answers" not in found:
                found["answers"] = torch.zeros(self.teacher, len(self.x), *kept.shape[1:],
                                               dtype=torch.half)
            found["answers"][i, images] = kept
            values = {0: answer.to(x.dtype)}
            if i:
                values[-1] = found["before"][images].to(self.course.device)
            now[images], answers[images] = combine(x, update, values).cpu(), values[0].cpu()
        found |= {"x": now, "before": answers}
        if i == self.teacher - 1:
            del found["x"], found["before"]

    def truth(self, images: Sequence[int], found: Found) -> Callable[[Level], tuple[Tensor, Tensor]]:
        """x* and D* of these images at any level, D* by the line through its neighbours; at sigma = 0 they
        are one."""
        answers, xs = found["answers"][:, images].to(self.x.dtype), []
        for i in range(self.teacher):
            values = {0: answers[i - 1], -1: answers[max(i - 2, 0)]}
            xs.append(combine(xs[-1], SOLVER.step(self.grid, i - 1).updates[0], values) if i else
                      self.crop(found["begin"][images], images))

        def at(level: Level) -> tuple[Tensor, Tensor]:
            if not level.sigma:
                return answers[-1], answers[-1]
            i = bisect_right(self.grid, level.lam + NEAR, key=lambda there: there.lam) - 1
            s, answer, h = self.grid[i], answers[i], level.lam - self.grid[i].lam
            if i == self.teacher - 1:
                return xs[i], answer
            whole, change = self.grid[i + 1].lam - s.lam, answers[i + 1] - answer
            moved = (1.0 - math.exp(-h)) * answer + (h - 1.0 + math.exp(-h)) / whole * change
            return level.sigma / s.sigma * xs[i] + level.alpha * moved, answer + h / whole * change

        return at

    def crop(self, v: Tensor, images: Sequence[int]) -> Tensor:
        """Some places of each of these images, always the same, in host memory."""
        sizes = _kept(v.shape[2:])
        if sizes == list(v.shape[2:]):
            return v.cpu()
        rows = []
        for row, image in zip(v, images):
            generator = torch.Generator().manual_seed(self.seed * 100_003 + image)
            for axis, size in enumerate(sizes, 1):
                begin = int(torch.randint(row.shape[axis] - size + 1, (), generator=generator))
                row = row.narrow(axis, begin, size)
            rows.append(row)
        return torch.stack(rows).cpu()

    def levels(self, k: int, lesson: Lesson, found: Found) -> tuple[Level, ...]:
        """Of a lesson of this round. The last above 0 is anywhere from SHALLOW of the way on, and after the
        first round near to what was best in those before."""
        low, high = map(float, self.calibration.lam[[0, -1]])
        start = low + lesson.start * (high - low)
        shallow = start + SHALLOW * (high - start)
        last = shallow + lesson.place * (high - shallow)
        if k > 1:
            best = last_of(found["end"].numpy(), lesson.n, start, high,
                           [self.guidances[image] for image in lesson.images])
            last = min(max(best + NEARBY * (2.0 * lesson.place - 1.0), shallow), high)
        return self.to(lesson.n, start, last)

    def to(self, n: int, start: float, last: float) -> tuple[Level, ...]:
        return tuple(spaced(self.path.at(start), self.path.at(last), n, self.path))

    def attend(self, k: int, j: int, found: Found) -> None:
        """One lesson: what its steps see, and what they miss."""
        lesson = self.rounds[k][j]
        levels, truth = self.levels(k, lesson, found), self.truth(lesson.images, found)
        went = self.own(levels, lesson.images, found, f"{k}.{j}", truth) if k else self.shown(levels, truth)
        seen, held = [], {*_held(self.prompts)}
        for i, (step, (x, answers)) in enumerate(zip(SOLVER.steps(levels, self.path), went)):
            landed = combine(x, step.updates[0], {-n: answer for n, answer in enumerate(answers)})
            v, r = views(x, step.s, answers), flat((truth(step.t)[0] - landed) / step.t.alpha)
            c = torch.tensor([[*Conditions.of(levels, i, self.guidances[image]), image in held]
                              for image in lesson.images])
            seen.append((v.half(), r.half(), c.repeat_interleave(len(v) // len(c), 0)))
        found |= {f"{name}.{k}.{j}": torch.cat(parts) for name, parts in zip("vrc", zip(*seen))}

    def shown(self, levels: Sequence[Level],
              truth: Callable[[Level], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, list[Tensor]]]:
        """x and the answers D_s, D_-1, D_-2 of every step, on the true trajectory."""
        true = [truth(level) for level in levels[:-1]]
        return [(x, [answer for _, answer in true[max(0, i - 2):i + 1]][::-1])
                for i, (x, _) in enumerate(true)]

    def own(self, levels: Sequence[Level], images: Sequence[int], found: Found, name: str,
            truth: Callable[[Level], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, list[Tensor]]]:
        """The same, where the solver's own run is; and how far from the truth it ends."""
        denoise = bound(self.course.denoise, images=list(images))
        place, went = Place(0, found["begin"][images].to(self.course.device)), []
        for step in self.guided(images, found).steps(levels, self.path):
            here, place = onward(denoise, place, on_device(step, place.x), 2)
            answers = [here.values[0], *here.past][:len(went) + 1]
            went.append((self.crop(here.x, images), [self.crop(answer, images) for answer in answers]))
        error = (self.crop(place.x, images) - truth(levels[-1])[0]).flatten(1).square().mean(1)
        found[f"ends.{name}"] = torch.tensor([
            (len(levels) - 1, levels[-2].lam, self.guidances[image], math.sqrt(square))
            for image, square in zip(images, error.tolist())], dtype=torch.float64)
        return went

    def guided(self, images: Sequence[int], found: Found) -> Hypersolver:
        """What was learned so far, at the guidances of these images."""
        return replace(self.learned(found), guidance=[self.guidances[image] for image in images])

    def train(self, k: int, found: Found) -> None:
        """The network, on all that was seen so far."""
        names = [f"{i}.{j}" for i in range(k + 1) for j in range(len(self.rounds[i]))]
        v, r = (Rows([found[f"{which}.{name}"] for name in names]) for which in "vr")
        c = torch.cat([found[f"c.{name}"] for name in names])
        taught, held = (torch.nonzero(c[:, -1] == away).flatten() for away in (0.0, 1.0))
        device = self.course.device
        with torch.inference_mode(False), torch.enable_grad(), as_written(device):
            c = c[:, :-1].clone()
            network = Network(self.x.shape[1]).begun(self.seed)
            if "bounds" in found:
                network.load_state_dict({name[4:]: value.float().clone() for name, value in found.items()
                                         if name.startswith("net.")})
            settle(network, v, r, c, taught)
            network, self.course.loss = trained(
                network.to(device), (v, r, c), taught, held,
                self.iterations // (1 if k == len(self.rounds) - 1 else 2), self.seed + k, self._tell)
        found |= {f"net.{name}": value.cpu() for name, value in network.state_dict().items()}
        found["bounds"] = torch.stack([c.amin(0), c.amax(0)]).double()
        ends = [found[f"ends.{name}"] for name in names[len(self.rounds[0]):]]  # of the solver's own runs
        found["end"] = (ending(torch.cat(ends), float(self.calibration.lam[0])) if ends else
                        torch.tensor(USUAL, dtype=torch.float64))

    def _tell(self, loss: float) -> None:
        self.course.loss = loss
        self.course.tell()

    def learned(self, found: Found, counts: Sequence[int] = ()) -> Hypersolver:
        weights = {name[4:]: value if name[4:] in EXACT else value.half()
                   for name, value in found.items() if name.startswith("net.")}
        return Hypersolver(weights, found["bounds"].numpy(), found["end"].numpy(), tuple(counts))

    def compare(self, k: int, found: Found) -> None:
        """The mean squared errors of the images that select, by the fitted solver alone and with the
        network."""
        n, (low, high), errors = self.counts[k], map(float, self.calibration.lam[[0, -1]]), []
        without = Fitted(self.calibration).steps(self.to(n, low, high), self.path)
        for images in _together(_held(self.prompts)[:COMPARED], self.prompts):
            guided, denoise = self.guided(images, found), bound(self.course.denoise, images=images)
            having = guided.steps(self.to(n, low, guided.last(n, low, high)), self.path)
            begin = found["begin"][images].to(self.course.device)
            ends = [self.crop(sample(denoise, begin, steps), images)
                    for steps in (without, having)]
            true = found["answers"][-1, images].to(self.x.dtype)
            errors.append(torch.stack([(end - true).flatten(1).square().mean(1) for end in ends]))
        found[f"errors.{k}"] = torch.cat(errors, 1).double()


def ending(runs: Tensor, start: float) -> Tensor:
    """The numbers of `error_of`, of whole runs from lam = start [M, 4]: n, the last level's lam, the
    guidance, and how far from the truth it ended.

    By likelihood, errors being spread about their mean as by a gamma distribution: it is the mean that is to
    be small, where what is far off counts most, and not that of the log. Whatever few runs cannot tell is as
    USUAL. """
    with torch.inference_mode(False), torch.enable_grad():
        n, lam, guidance, error = runs.clone().unbind(1)
        usual = torch.tensor(USUAL, dtype=torch.float64)
        end = usual.clone().requires_grad_()
        descent = torch.optim.LBFGS([end], max_iter=300, line_search_fn="strong_wolfe")

        def missing() -> Tensor:
            descent.zero_grad()
            mean = error_of(end, n, start, lam, guidance)
            off = (error / mean).clamp(max=OUTLIER) + mean.log()
            total = off.mean() + TRUST / len(runs) * (end - usual).square().sum()
            total.backward()
            return total

        descent.step(missing)
    return end.detach()


class Rows:
    """Those of several tensors, as if they were of one: gigabytes, which are not copied."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts, self.begins = parts, np.cumsum([0, *map(len, parts)])

    def __getitem__(self, rows: Tensor) -> Tensor:
        places = np.searchsorted(self.begins, rows, side="right") - 1
        return torch.stack([self.parts[i][row - int(self.begins[i])]
                            for i, row in zip(places, rows.tolist())])


@torch.no_grad()
def settle(network: Network, v: Rows, r: Rows, c: Tensor, taught: Tensor) -> None:
    """The sizes, a fit to the logs of the rms of what was seen in these rows, a little damped; and the
    weights w, by least squares that count each row by 1 / (whole^2 + |r|^2)."""
    basis, parts = terms(c[taught]), taught.split(256)

    def fitted(values: Tensor) -> Tensor:
        logs = 0.5 * (values + 1e-10).log().clamp(min=-12.0)
        return torch.linalg.solve(basis.T @ basis + 1e-2 * torch.eye(TERMS), basis.T @ logs).mT

    def seen(rows: Tensor) -> tuple[Tensor, Tensor, Modulation]:
        by, u, aim = network.modulation(c[rows]), v[rows].float(), r[rows].float()
        return u / over(by.scale, u), aim / over(by.whole, aim), by

    network.sizes[2:] = fitted(torch.cat([v[rows].float().flatten(2).square().mean(2) for rows in parts]))
    network.sizes[:1] = fitted(torch.cat([r[rows][:, None].float().flatten(2).square().mean(2)
                                          for rows in parts]))
    gram, product = torch.zeros(TERMS, VIEWS, TERMS, VIEWS).double(), torch.zeros(TERMS, VIEWS).double()
    for rows, of in zip(parts, basis.double().split(256)):
        u, aim, _ = seen(rows)
        share = 1.0 / (LEAST + aim.square().mean((1, 2, 3))) / aim[0].numel()
        inner = torch.einsum("bichw,bjchw,b->bij", u, u, share).double()
        gram += torch.einsum("bk,bl,bij->kilj", of, of, inner)
        product += torch.einsum("bk,bi->ki", of, torch.einsum("bichw,bchw,b->bi", u, aim, share).double())
    gram, product = gram.flatten(2).flatten(0, 1), product.flatten()
    damped = gram + DAMPED * gram.diagonal().mean() * torch.eye(len(gram)).double()
    network.weights.copy_(torch.linalg.solve(damped, product).view(TERMS, VIEWS).T)
    left = []
    for rows in parts:
        u, aim, by = seen(rows)
        rest = over(by.whole, aim) * (aim - (over(by.weights, u) * u).sum(1))
        left.append(rest[:, None].flatten(2).square().mean(2))
    network.sizes[1:2] = fitted(torch.cat(left))


def trained(network: Network, seen: Sequence[Rows | Tensor], taught: Tensor, held: Tensor, iterations: int,
            seed: int, tell: Callable[[float], None]) -> tuple[Network, float]:
    """Of the networks on its way down, each the mean over the last steps, the one that errs least on what was
    held out, and how much. By AdamW; images are mirrored at random. seen: v, r and c; taught, held: rows."""
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    mean = copy.deepcopy(network)
    best = copy.deepcopy(network), left(network, seen, held)
    device, looks = network.sizes.device, {round(iterations * (k + 1) / LOOKS) for k in range(LOOKS)}
    for k in range(1, iterations + 1):
        rows = taught[torch.randint(len(taught), (BATCH,), generator=generator)]
        batch = [part[rows].to(device).float() for part in seen]
        if torch.rand((), generator=generator) < 0.5:
            batch[:2] = [part.flip(-1) for part in batch[:2]]
        fade = 0.5 * (1.0 + math.cos(math.pi * (k - 1) / iterations))
        adam.param_groups[0]["lr"] = RATE * min(1.0, k / WARM) * fade
        adam.zero_grad()
        missed = loss(network, *batch).mean()
        missed.backward()
        adam.step()
        with torch.no_grad():
            for average, value in zip(mean.parameters(), network.parameters()):
                average.lerp_(value, 1.0 - AVERAGED)
        if k % 20 == 1:
            tell(math.sqrt(float(missed.detach())))
        if k in looks and (now := left(mean, seen, held)) < best[1]:
            best = copy.deepcopy(mean), now
    return best


def loss(network: Network, v: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """|network - r|^2 / (LEAST rho^2 + |r|^2), means over each image, [B]."""
    by = network.modulation(c)
    error, size = ((part / over(by.rho, part)).square().mean((1, 2, 3)) for part in (network(v, by) - r, r))
    return error / (LEAST + size)


@torch.no_grad()
def left(network: Network, seen: Sequence[Rows | Tensor], held: Tensor) -> float:
    """The rms loss over these rows, 1 of a network that answers 0."""
    device, total, none = network.sizes.device, 0.0, 0.0
    for rows in held.split(64):
        batch = [part[rows].to(device).float() for part in seen]
        total += float(loss(network, *batch).sum())
        size = (batch[1] / over(network.modulation(batch[2]).rho, batch[1])).square().mean((1, 2, 3))
        none += float((size / (LEAST + size)).sum())
    return math.sqrt(total / none) if none else math.nan
