"""Train a hypersolver by forward evaluations of the model: no data set, and no gradients through the model.

A teacher of many steps shows the true trajectory: x* and D* at any level. Lessons are runs of some images
over a few levels. Each step of a lesson shows what it sees, v, and what it misses,

    r = (x*_t - the solver's x_t) / alpha_t

In the first lessons every step begins on the true trajectory, which costs nothing beyond the teacher. Then
the network is trained, and the solver makes runs of its own with it, begins each step where the one before
it led, and learns to lead back to x* too. Training lowers the mean of |g - r / rho|^2 / (1 + |r / rho|^2).
Whole prompts are held out: in the end, runs of their images with the network and without decide at what
numbers of steps it serves. """
from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial as bound
from pathlib import Path as File
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..integrand import DataPrediction
from ..model import PROBE, latents
from ..sample import Place, combine, on_device, onward, sample
from ..schedule import Level, Path, find_path
from ..solver import Step, ddim
from .course import Course
from .fitted import check, fit_multistep
from .gauss_newton import FLOOR, typical
from .hypersolver import SOLVER, Conditions, Hypersolver, Network, flat, terms, views
from .statistics import Statistics
from .storage import digest

PARTIAL = "lambda-solvers partial hypersolver 1"
STEPS = 4, 5, 6, 7, 8, 9, 10
TEACHER = 48       # its evaluations
SHOWN = 3          # lessons on the true trajectory that each image is in
ROUNDS = 2         # of lessons of the solver's own runs
INSIDE = 0.15      # of a lesson's images begin at a level between, as image to image does
DEEPEST = 0.7      # of the way to the last level, in lam, where they begin at most
HELD_OUT = 8       # every eighth prompt
COMPARED = 16      # images of them that are run in the end, at most
CROP = 48          # places of an image that are kept, each way
ITERATIONS = 6000  # after what was shown, and after each round
LOOKS = 10         # in these, at how it does on prompts held out: the best of them is kept
BATCH, RATE, DECAY, WARM, AVERAGED = 8, 3e-3, 1e-3, 100, 0.995
LEAST = 1.0        # in the loss


class Lesson(NamedTuple):
    """Runs of some images over these levels, the last of sigma = 0."""

    levels: tuple[Level, ...]
    images: list[int]


def lessons(calibration: Statistics, path: Path, groups: Sequence[Sequence[int]], steps: Sequence[int],
            seed: int) -> Iterator[Lesson]:
    """Each group of images is in one of them; at every number of steps some begin inside."""
    generator = torch.Generator().manual_seed(seed)
    order = [groups[k] for k in torch.randperm(len(groups), generator=generator).tolist()]
    for k, n in enumerate(steps):
        mine = order[k::len(steps)]
        few, deep = int(INSIDE * len(mine)), DEEPEST * float(torch.rand((), generator=generator))
        for images, share in ((mine[few:], 0.0), (mine[:few], deep)):
            lam = calibration.lam[0] + share * (calibration.lam[-1] - calibration.lam[0])
            if images:
                yield Lesson(schedule(calibration, path, n, lam), sorted(sum(images, [])))


def schedule(calibration: Statistics, path: Path, n: int, start: float) -> tuple[Level, ...]:
    """The levels that n steps from lam = start to sigma = 0 go over."""
    return (*map(path.at, fit_multistep(calibration, n, start=start).lam), path.level(0.0))


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
                    precision=precision, extra_args={**(extra_args or {}), "images": list(range(len(x)))},
                    partial=partial, seconds=30.0, progress=progress)
    alone = [[k] for k in range(len(x))]
    together = [[k for k in range(len(x)) if prompts[k] == name] for name in dict.fromkeys(prompts)]
    sets = [list(lessons(plain, gaussian, alone if k < SHOWN else together, steps, seed + k))
            for k in range(SHOWN + rounds)]  # the model is asked for images of one prompt at once
    runs = [Lesson(schedule(plain, gaussian, n, highest.lam), _held(prompts)[:COMPARED]) for n in steps]
    school = School(course, x, opening, gaussian, highest, lowest, guidances, {*_held(prompts)},
                    [sum(sets[:SHOWN], []), *sets[SHOWN:]], runs, iterations, seed)
    with course:
        kept, parts = school.taken_up(course.kept), school.parts()
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
    compared = 2 * sum(steps) * min(COMPARED, len(_held(prompts))) / len(prompts)
    return math.ceil(PROBE + opening + TEACHER + rounds * sum(steps) / len(steps) + compared)


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
    if rounds < 0:
        raise ValueError(f"rounds = {rounds} is out of range: choose a whole number from 0")


Found = dict[str, Tensor]
"""What the parts of a course leave to those behind them."""


@dataclass(frozen=True)
class School:
    """What is taught to whom, in parts that are done one after the other."""

    course: Course
    x: Tensor
    opening: Sequence[Level]
    path: Path
    highest: Level
    lowest: Level
    guidances: Sequence[float]
    held: set[int]
    rounds: Sequence[Sequence[Lesson]]
    runs: Sequence[Lesson]
    iterations: int
    seed: int

    def parts(self) -> list[Callable[[Found], None]]:
        teaching = [bound(self.teach, i) for i in range(TEACHER)]
        learning = [part for k, taught in enumerate(self.rounds) for part in (
            *(bound(self.attend, k, j) for j in range(len(taught))), bound(self.train, k))]
        return [self.begin, *teaching, *learning, *(bound(self.compare, k) for k in range(len(self.runs)))]

    def taken_up(self, kept: Mapping[str, Tensor]) -> Found:
        """What was kept: where the model is asked again on its device, the rest in host memory."""
        return {name: value.to(self.x.device if name in ("begin", "x", "before", "denoised") else "cpu")
                for name, value in kept.items()}

    def begin(self, found: Found) -> None:
        steps = [ddim(DataPrediction(), level, self.highest) for level in self.opening]
        found["begin"] = found["x"] = sample(self.course.denoise, self.x, steps)

    @property
    def grid(self) -> list[Level]:
        """The teacher's levels, and sigma = 0."""
        lams = np.linspace(self.highest.lam, self.lowest.lam, TEACHER).tolist()
        return [*map(self.path.at, lams), self.path.level(0.0)]

    def teach(self, i: int, found: Found) -> None:
        """One step of the teacher, and of the step before it x* at the levels that lessons ask for."""
        grid, x, old = self.grid, found["x"], found.get("denoised")
        denoised = self.course.denoise(x, grid[i].sigma)
        if i:
            self._note(found, grid[i - 1], grid[i], found["before"], old, denoised)
        if i == TEACHER - 1:
            self._note(found, grid[i], grid[i + 1], x, denoised, denoised)
            for name in ("x", "before", "denoised"):
                del found[name]
        else:
            update = SOLVER.step(grid, i).updates[0]
            found |= {"x": combine(x, update, {0: denoised, -1: old}), "before": x, "denoised": denoised}

    def _note(self, found: Found, s: Level, t: Level, x: Tensor, denoised: Tensor, then: Tensor) -> None:
        """x* and D* between s and t, D* by the line through both; at sigma = 0 they are one."""
        for name, images, at in self._asked():
            if not s.lam <= at.lam < t.lam and not at.sigma == t.sigma:
                continue
            h, whole, answer = at.lam - s.lam, t.lam - s.lam, denoised[images]
            change = (then - denoised)[images]
            if name.startswith("d"):
                found[name] = self.crop(answer + h / whole * change, images)
                continue
            bend = (h - 1.0 + math.exp(-h)) / whole if at.sigma else 0.0
            there = (at.sigma / s.sigma * x[images] + at.alpha * (1.0 - math.exp(-h)) * answer
                     + at.alpha * bend * change)
            found[name] = there.cpu() if name.startswith("start") else self.crop(there, images)

    def _asked(self) -> Iterator[tuple[str, list[int], Level]]:
        """Name, images and level of all that is needed of the teacher: x* of every lesson; where it is shown,
        D* too; where a run of its own begins, all of x*."""
        for k, taught in enumerate(self.rounds):
            for j, (levels, images) in enumerate(taught):
                if k and levels[0] != self.highest:
                    yield f"start.{k}.{j}", images, levels[0]
                for i, level in enumerate(levels):
                    yield f"x.{k}.{j}.{i}", images, level
                    if not k and level.sigma:
                        yield f"d.{k}.{j}.{i}", images, level
        yield "end", self.runs[0].images, self.path.level(0.0)

    def crop(self, v: Tensor, images: Sequence[int]) -> Tensor:
        """Some places of each of these images, always the same, in host memory."""
        if v.ndim < 4 or max(v.shape[-2:]) <= CROP:
            return v.cpu()
        rows = []
        for row, image in zip(v, images):
            generator = torch.Generator().manual_seed(self.seed * 100_003 + image)
            for axis in (-2, -1):
                spare = max(0, row.shape[axis] - CROP)
                row = row.narrow(axis, int(torch.randint(spare + 1, (), generator=generator)),
                                 min(CROP, row.shape[axis]))
            rows.append(row)
        return torch.stack(rows).cpu()

    def attend(self, k: int, j: int, found: Found) -> None:
        """One lesson: what its steps see, and what they miss."""
        levels, images = self.rounds[k][j]
        went = (self.shown if k == 0 else self.own)(k, j, found)
        targets, seen = [found.pop(f"x.{k}.{j}.{i}") for i in range(len(levels))], []
        for i, (step, (x, answers)) in enumerate(zip(SOLVER.steps(levels, self.path), went)):
            landed = combine(x, step.updates[0], {-n: answer for n, answer in enumerate(answers)})
            v, r = views(x, step.s, answers), flat((targets[i + 1] - landed) / step.t.alpha)
            c = torch.tensor([[*Conditions.of(levels, i, self.guidances[image]), image in self.held]
                              for image in images])
            seen.append((v.half(), r.half(), c.repeat_interleave(len(v) // len(c), 0)))
        found |= {f"{name}.{k}.{j}": torch.cat(parts) for name, parts in zip("vrc", zip(*seen))}

    def shown(self, k: int, j: int, found: Found) -> list[tuple[Tensor, list[Tensor]]]:
        """x and the answers D_s, D_-1, D_-2 of every step, on the true trajectory."""
        n = len(self.rounds[k][j].levels) - 1
        answers = [found.pop(f"d.{k}.{j}.{i}") for i in range(n)]
        return [(found[f"x.{k}.{j}.{i}"], answers[max(0, i - 2):i + 1][::-1]) for i in range(n)]

    def own(self, k: int, j: int, found: Found) -> list[tuple[Tensor, list[Tensor]]]:
        """The same, where the solver's own run is."""
        levels, images = self.rounds[k][j]
        denoise = bound(self.course.denoise, images=images)
        start = found.pop(f"start.{k}.{j}", found["begin"][images]).to(self.x.device)
        place, went = Place(0, start), []
        for step in self.steps(levels, images, found):
            here, place = onward(denoise, place, on_device(step, place.x), 2)
            answers = [here.values[0], *here.past][:len(went) + 1]
            went.append((self.crop(here.x, images), [self.crop(answer, images) for answer in answers]))
        return went

    def steps(self, levels: Sequence[Level], images: Sequence[int], found: Found) -> list[Step]:
        """The hypersolver's, with what the network has learned so far."""
        guided = replace(self.learned(found), guidance=[self.guidances[image] for image in images])
        return guided.steps(levels, self.path)

    def train(self, k: int, found: Found) -> None:
        """The network, on all that was seen so far."""
        names = [f"{i}.{j}" for i in range(k + 1) for j in range(len(self.rounds[i]))]
        v, r, c = (torch.cat([found[f"{which}.{name}"] for name in names]) for which in "vrc")
        c, held = c[:, :-1], c[:, -1] > 0.0
        with torch.inference_mode(False), torch.enable_grad():
            network = Network(v.shape[2], seed=self.seed)
            if "bounds" in found:
                network.load_state_dict({name[4:]: value.float().clone() for name, value in found.items()
                                         if name.startswith("net.")})
            else:
                network.sizes.copy_(sizes(v, r, c))
            network, self.course.loss = trained(
                network.to(self.x.device), *([part[rows] for part in (v, r, c)] for rows in (~held, held)),
                self.iterations, self.seed + k, self._tell)
        found |= {f"net.{name}": value.cpu() for name, value in network.state_dict().items()}
        found["bounds"] = torch.stack([c.amin(0), c.amax(0)]).double()

    def _tell(self, loss: float) -> None:
        self.course.loss = loss
        self.course.tell()

    def learned(self, found: Found, counts: Sequence[int] = ()) -> Hypersolver:
        weights = {name[4:]: value if name.endswith("sizes") else value.half()
                   for name, value in found.items() if name.startswith("net.")}
        return Hypersolver(weights, found["bounds"].numpy(), tuple(counts))

    def compare(self, k: int, found: Found) -> None:
        """The mean squared errors of the images that select, without the network and with it."""
        levels, images = self.runs[k]
        ends = [sample(bound(self.course.denoise, images=images), found["begin"][images], steps)
                for steps in (SOLVER.steps(levels, self.path), self.steps(levels, images, found))]
        errors = [(self.crop(end, images) - found["end"]).flatten(1).square().mean(1) for end in ends]
        found[f"errors.{k}"] = torch.stack(errors).double()


def sizes(v: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Of rho and scale [1 + VIEWS, TERMS]: a fit to the logs of the rms of what was seen, a little damped."""
    parts = torch.cat([r[:, None], v], 1).float().flatten(2).square().mean(2)  # [M, 1 + VIEWS]
    logs, of = 0.5 * (parts + 1e-10).log().clamp(min=-12.0), terms(c)
    return torch.linalg.solve(of.T @ of + 1e-2 * torch.eye(of.shape[1]), of.T @ logs).T


def trained(network: Network, taught: Sequence[Tensor], held: Sequence[Tensor], iterations: int, seed: int,
            tell: Callable[[float], None]) -> tuple[Network, float]:
    """Of the networks on its way down, each the mean over the last steps, the one that errs least on what was
    held out, and how much. By AdamW; images are mirrored at random. taught, held: v, r and c."""
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    mean = copy.deepcopy(network)
    best = copy.deepcopy(network), left(network, *held)
    device, looks = network.sizes.device, {round(iterations * (k + 1) / LOOKS) for k in range(LOOKS)}
    for k in range(1, iterations + 1):
        rows = torch.randint(len(taught[0]), (BATCH,), generator=generator)
        batch = [part[rows].to(device).float() for part in taught]
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
        if k in looks and (now := left(mean, *held)) < best[1]:
            best = copy.deepcopy(mean), now
    return best


def loss(network: Network, v: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """|g - r / rho|^2 / (LEAST + |r / rho|^2), means over each image, [B]."""
    by = network.modulation(c)
    target = r / by.rho[:, None, None, None]
    error, size = ((part.square().mean((1, 2, 3))) for part in (network(v, by) - target, target))
    return error / (LEAST + size)


@torch.no_grad()
def left(network: Network, v: Tensor, r: Tensor, c: Tensor) -> float:
    """The rms loss, 1 of a network that answers 0."""
    device, total, none = network.sizes.device, 0.0, 0.0
    for rows in torch.arange(len(v)).split(64):
        batch = [part[rows].to(device).float() for part in (v, r, c)]
        total += float(loss(network, *batch).sum())
        size = (batch[1] / network.modulation(batch[2]).rho[:, None, None, None]).square().mean((1, 2, 3))
        none += float((size / (LEAST + size)).sum())
    return math.sqrt(total / none) if none else math.nan
