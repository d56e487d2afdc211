"""How near the images of few evaluations are to the converged ones, as distributions.

    python dev/benchmark.py distribution --images 1000 --seconds 280

The emoji model, the prompts that no hypersolver has seen in turn, each image of a noise of its own; the
distance is that of features.py. ComfyUI's samplers are on the scheduler that suits them best at this
guidance. Images are kept on disk in parts of PART, so a run goes on where the last one ended, after --seconds
or for another reason; the table is of all images that every cell has.
"""
from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import comfy_host
import torch
from samplers import Statistics, k_diffusion_sampler, load_calibration
from torch import Tensor

from .cells import Counted, Kept
from .features import energy, features
from .hypersolver import UNSEEN
from .problems import Emoji, S, model_sampling, schedule, starting_noise, starting_x
from .solvers import Entry, Seen, entries, fitted_statistics, hypersolved

PART, STRIDE = 12, 16  # images at once; timesteps of a converged image
CONVERGED = "converged"
CHOICES = {"comfy/euler": "beta", "comfy/dpmpp_2m": "sgm_uniform", "comfy/lms": "beta",
           "comfy/ipndm_v": "beta", "comfy/uni_pc_bh2": "sgm_uniform", "lambda/fitted_chosen": "karras",
           "lambda/fitted_chosen hypersolver": "karras"}
"""Samplers, and of five schedulers the one with the least rms error at guidance 7, by `benchmark.py hyper`;
of the last two's only the range counts."""
GUIDANCE, BUDGETS = 7.0, (4, 5, 6, 8)
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver", "dpmpp_2m")
OURS = {"lambda_2m_sde": "dpmpp_2m_sde", "lambda_3m_sde": "dpmpp_3m_sde", "lambda_2m": "dpmpp_2m"}
SDE_GUIDANCE, SDE_BUDGETS, SDE_SCHEDULER = 3.0, (10, 20), "karras"


class Made(NamedTuple):
    """One row of a table: run(model, noise, evaluations, **options) -> images, with what it learned
    before."""

    label: str
    ours: bool
    run: Callable[..., Tensor]
    options: Callable[[], Mapping[str, Any]] = dict


class Images:
    """Those of one guidance, and where they are kept."""

    def __init__(self, problem: Emoji, guidance: float, kept: Kept) -> None:
        self.problem, self.guidance = problem, guidance
        self.stems = {False: kept.begins.name, True: kept.files[True].stem}
        self.folder = kept.begins.parent

    def path(self, ours: bool, what: str) -> Path:
        return self.folder / f"{self.stems[ours]}-guidance-{self.guidance:g}-{what}"

    def part(self, column: Made, k: int) -> Path:
        name = re.sub("[^a-z0-9_]+", "-", column.label.lower())
        return self.path(column.ours, f"{name}-{k * PART}-to-{(k + 1) * PART - 1}.pt")

    def make(self, columns: Sequence[Made], budgets: Sequence[int], images: int, seconds: float) -> None:
        """Those that are missing, until the time is over."""
        start = time.perf_counter()
        for k in range(-(-images // PART)):
            for column in columns:
                path = self.part(column, k)
                if path.exists():
                    continue
                if time.perf_counter() - start > seconds:
                    return
                prompts = [UNSEEN[i % len(UNSEEN)] for i in range(k * PART, (k + 1) * PART)]
                noise = starting_noise(self.problem, PART, seed=10_000 + k)
                options = column.options()
                found = self.problem.session(prompts, self.guidance, lambda model: self.run(
                    column, Counted(model, remembers=True), noise, budgets, options))
                torch.save(found, path)
                print(f"{time.perf_counter() - start:6.0f} s  part {k}, {column.label}", flush=True)

    @staticmethod
    def run(column: Made, model: Counted, noise: Tensor, budgets: Sequence[int],
            options: Mapping[str, Any]) -> dict[int, Tensor]:
        each = budgets if column.label != CONVERGED else (0,)
        return {budget: column.run(model, noise, budget, **options).clamp(-1.0, 1.0).half()
                for budget in each}

    def read(self, column: Made) -> list[dict[int, Tensor]]:
        """Its parts, as far as there is none missing."""
        found = []
        while (path := self.part(column, len(found))).exists():
            found.append(torch.load(path))
        return found

    def table(self, columns: Sequence[Made], budgets: Sequence[int], images: int) -> Iterator[str]:
        parts = [self.read(column) for column in columns]
        count = min(images // PART, *map(len, parts))
        if count == 0:
            yield "no image is there in all cells yet"
            return
        seen = {(column.label, budget): features(torch.cat([part[budget] for part in of[:count]]))
                for column, of in zip(columns, parts) for budget in of[0]}
        yield (f"{count * PART} images, guidance {self.guidance:g}: 10^4 E^2 to the converged ones, and its "
               f"standard error\n\n| sampler | {' | '.join(map(str, budgets))} |\n|"
               + "---|" * (1 + len(budgets)))
        for column in columns:
            if column.label != CONVERGED:
                far = [energy(seen[column.label, budget], seen[CONVERGED, 0]) for budget in budgets]
                cells = [f"{1e4 * value:.1f} ({1e4 * error:.1f})" for value, error in far]
                yield f"| {column.label} | {' | '.join(cells)} |"


def converged(model: Counted, noise: Tensor, budget: int) -> Tensor:
    """By dpmpp_2m over every STRIDE-th timestep."""
    every = model_sampling().sigmas.flip(0)
    levels = torch.cat([every[:-1:STRIDE], every[-1:], torch.zeros(1)])
    return S.sample_dpmpp_2m(model, starting_x(model, noise, levels[0]), levels, extra_args={}, disable=True)


def few(entry: Entry, scheduler: str, options: Callable[[], Mapping[str, Any]]) -> Made:
    def run(model: Counted, noise: Tensor, budget: int, **learned: Any) -> Tensor:
        levels = schedule(scheduler, entry.steps(budget), entry.discards, noise.dtype)
        return entry.run(model, starting_x(model, noise, levels[0]), levels, **learned)

    return Made(entry.label, entry.ours, run, options)


def stochastic(label: str, function: Callable[..., Tensor]) -> Made:
    def run(model: Counted, noise: Tensor, budget: int) -> Tensor:
        torch.manual_seed(7)
        levels = schedule(SDE_SCHEDULER, budget, False, noise.dtype)
        return function(model, starting_x(model, noise, levels[0]), levels, extra_args={"seed": int(
            noise.flatten()[0].abs() * 1e6)}, disable=True)

    return Made(label, label in OURS, run)


def columns_of_few(images: Images) -> list[Made]:
    learns = {fitted_statistics: lambda: {"statistics": measured(images)}, None: dict,
              hypersolved: lambda: hypersolved(Seen(*[None] * 5, images.guidance, {}))}
    known = {entry.label: entry for entry in entries(("core", "calibrated", "hypersolver"))}
    return [Made(CONVERGED, False, converged),
            *(few(known[label], scheduler, functools.cache(learns[known[label].calibrate]))
              for label, scheduler in CHOICES.items())]


def measured(images: Images) -> Statistics:
    """What `auto` measures of the model, kept too."""
    path, problem = images.path(True, "statistics.safetensors"), images.problem
    if not path.exists():
        levels, count = model_sampling().sigmas.flip(0), problem.calibration_noises

        def body(model: comfy_host.Model) -> Statistics:
            x = starting_x(model, starting_noise(problem, count, seed=7), levels[0])
            seen = Seen(Counted(model, remembers=False), x, levels, count, 1, images.guidance, {})
            return fitted_statistics(seen)["statistics"]

        problem.session([None] * count, images.guidance, body).save(path)
    return load_calibration(path).for_another_prompt()


def emoji(out: Path) -> tuple[Emoji, Kept]:
    problem = Emoji(UNSEEN, (GUIDANCE,), 1, stride=STRIDE, second=False)
    return problem, Kept(out / "kept", problem)


def distribution(out: Path, images: int, seconds: float) -> None:
    torch.set_num_threads(1)
    problem, kept = emoji(out)
    found = Images(problem, GUIDANCE, kept)
    tell(found, columns_of_few(found), BUDGETS, images, seconds)


def stochastic_emoji(out: Path, images: int, seconds: float) -> None:
    """Samplers with noise, and two without."""
    problem, kept = emoji(out)
    columns = [Made(CONVERGED, False, converged),
               *(stochastic(f"ComfyUI's {name}", getattr(S, f"sample_{name}")) for name in STOCHASTIC),
               *(stochastic(label, k_diffusion_sampler(name)) for label, name in OURS.items())]
    tell(Images(problem, SDE_GUIDANCE, kept), columns, SDE_BUDGETS, images, seconds)


def tell(found: Images, columns: Sequence[Made], budgets: Sequence[int], images: int, seconds: float) -> None:
    with torch.inference_mode():
        found.make(columns, budgets, images, seconds)
        print("\n".join(found.table(columns, budgets, images)))
