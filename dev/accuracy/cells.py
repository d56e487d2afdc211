"""Cells: one sampler, schedule and budget of evaluations, its error for every prompt, kept between runs.

What was measured is kept in folder/kept: a file for each problem and for all that its cells depend on.
ComfyUI's samplers depend on its version, PyTorch's and the problem; ours on this pack's code too. So a second
run measures ours anew, if they changed, and a run that was cut short goes on where it was. The folder can be
deleted at any time.
"""
from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import comfy_host
import environment
import torch
from torch import Tensor

from .problems import (VERSION, Problem, Reference, model_sampling, reference, rms, schedule, starting_noise,
                       starting_x)
from .solvers import REFIT_PROMPTS, Entry, Options, Seen, fitted_statistics, refitted

HERE = Path(__file__).resolve().parent
THEIRS = [HERE / "problems.py", HERE / "cells.py"]
OURS = [HERE / "solvers.py", *sorted((environment.ROOT / "samplers").rglob("*.py")),
        *sorted((environment.ROOT / "nodes").rglob("*.py"))]
COLUMNS = ("problem", "prompt", "guidance", "scheduler", "budget", "evaluations", "steps", "sampler",
           "variant", "start", "rms", "median", "images", "reason")
PLACE = ("prompt", "guidance", "scheduler", "budget", "sampler")  # of a row among those of its problem
Row = dict[str, Any]
Say = Callable[[str], None]


def clock() -> Say:
    started = time.perf_counter()
    return lambda text: print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)


class Cell(NamedTuple):
    entry: Entry
    scheduler: str
    budget: int

    @property
    def steps(self) -> int:
        return self.entry.steps(self.budget)

    def sigmas(self, problem: Problem) -> Tensor:
        return schedule(self.scheduler, self.steps, self.entry.discards, problem.dtype)

    def row(self, problem: Problem, guidance: float) -> Row:
        return {"problem": problem.name, "guidance": guidance, "scheduler": self.scheduler,
                "budget": self.budget, "sampler": self.entry.label, "steps": self.steps,
                "variant": int(self.entry.variant)}


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    rows = list(csv.DictReader(path.open(newline="")))
    for row in rows:
        row |= {key: float(row[key]) for key in ("guidance", "rms", "median", "start") if row[key]}
        row |= {key: int(row[key]) for key in ("budget", "evaluations", "steps", "variant") if row[key]}
    return rows


def write(path: Path, rows: Iterable[Row], mode: str = "w") -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


class Kept:
    """The rows of a problem, and its converged solutions, in files named for what they depend on."""

    def __init__(self, folder: Path, problem: Problem) -> None:
        theirs = digest(THEIRS, {**problem.about, "ComfyUI": VERSION, "torch": torch.__version__})
        ours = digest(OURS, {"theirs": theirs})
        folder.mkdir(parents=True, exist_ok=True)
        self.begins = folder / f"{problem.name}-{theirs}"
        self.files = {False: folder / f"{problem.name}-comfy-{theirs}.csv",
                      True: folder / f"{problem.name}-lambda-{ours}.csv"}
        rows = [row for file in self.files.values() if file.exists() for row in read(file)]
        self.rows = {place(row): row for row in rows}

    def has(self, row: Row, prompts: Iterable[str]) -> bool:
        return all(place({**row, "prompt": prompt}) in self.rows for prompt in prompts)

    def add(self, rows: Sequence[Row], ours: bool) -> None:
        self.rows |= {place(row): row for row in rows}
        write(self.files[ours], rows, mode="a")

    def solution(self, guidance: float, start: float) -> Path:
        return self.begins.with_name(f"{self.begins.name}-guidance-{guidance:g}-sigma-{start:g}.pt")


def digest(files: Iterable[Path], about: Mapping[str, Any]) -> str:
    made = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for file in files:
        made.update(file.read_bytes())
    return made.hexdigest()[:12]


def place(row: Row) -> tuple:
    return tuple(row[key] for key in PLACE)


class Counted(comfy_host.Model):
    """A model that counts its calls, and computes what it was not asked before (to 1e-6 of a pixel's most).

    Nearly all samplers share their first two evaluations, and variants of one sampler many more. What is
    shared counts for each of them; so an error can differ by some 1e-6 of itself with the samplers that were
    measured before.
    """

    def __init__(self, model: comfy_host.Model, remembers: bool) -> None:
        super().__init__(model.denoiser, model.inner_model.inner_model.model_sampling)
        self.remembers, self.known, self.calls = remembers, defaultdict(list), 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        self.calls += 1
        if not self.remembers:
            return self.denoiser(x, sigma)
        known = self.known[float(sigma[0])]
        for earlier, denoised in known:
            if (x - earlier).abs().max() <= 1e-6 * earlier.abs().max():
                return denoised
        known.append((x.clone(), self.denoiser(x, sigma)))
        return known[-1][1]


class Bench:
    """A problem at one guidance: measures cells that are not kept, and once what they learn beforehand."""

    def __init__(self, problem: Problem, guidance: float, kept: Kept, say: Say) -> None:
        self.problem, self.guidance, self.kept, self._say = problem, guidance, kept, say
        self.prompts = [prompt for prompt in problem.prompts for _ in range(problem.noises)]
        self.noise = starting_noise(problem, len(self.prompts), seed=100)
        self.several = len(problem.prompts) > 1
        self.references: dict[float, Reference] = {}
        self.learned: dict[tuple, Options | Exception] = {}

    def say(self, text: str) -> None:
        self._say(f"{self.problem.name}, guidance {self.guidance:g}: {text}")

    def measure(self, cells: Sequence[Cell]) -> list[Row]:
        """The rows of these cells, one for each prompt."""
        cells = [cell for cell in cells if self.several or not cell.entry.own_prompt]
        missing = self._missing(cells, self.problem.prompts)
        shared, own = ([cell for cell in missing if cell.entry.own_prompt == own] for own in (False, True))
        if missing:
            self._converge(missing)
        if shared:
            learn_from = [None if self.several else self.prompts[0]]
            self._session(learn_from, self.prompts, self.noise, shared, self.references)
        for prompt in dict.fromkeys(self.prompts) if own else ():
            at = [i for i, name in enumerate(self.prompts) if name == prompt]
            known = {start: Reference(found.x[at], None) for start, found in self.references.items()}
            self._session([prompt], [prompt] * len(at), self.noise[at], self._missing(own, [prompt]), known)
        return [self.kept.rows[place({**cell.row(self.problem, self.guidance), "prompt": prompt})]
                for cell in cells for prompt in self.problem.prompts]

    def _missing(self, cells: Sequence[Cell], prompts: Sequence[str]) -> list[Cell]:
        return [cell for cell in cells if not self.kept.has(cell.row(self.problem, self.guidance), prompts)]

    def agreement(self) -> float | None:
        """How far two solutions from the highest sigma are apart, made differently; None before that."""
        path = self.kept.solution(self.guidance, round(float(model_sampling().sigma_max), 4))
        return torch.load(path)[1] if path.exists() else None

    def _converge(self, cells: Sequence[Cell]) -> None:
        """The converged solutions from where these cells start."""
        starts = {}
        for cell in cells:
            with contextlib.suppress(ValueError):  # of a schedule that makes another number: the cell says so
                start = float(cell.sigmas(self.problem)[0])
                starts.setdefault(round(start, 4), start)
        for key, start in starts.items():
            path = self.kept.solution(self.guidance, key)
            if key in self.references:
                continue
            if not path.exists():
                found = self.problem.session(self.prompts, self.guidance, lambda model: reference(
                    self.problem, Counted(model, remembers=False), self.noise, start))
                torch.save(tuple(found), path)
                self.say(f"converged from sigma {key:g}")
            self.references[key] = Reference(*torch.load(path))

    def _session(self, learn_from: Sequence[str | None], prompts: Sequence[str], noise: Tensor,
                 cells: Sequence[Cell], references: Mapping[float, Reference]) -> None:
        for entry in dict.fromkeys(cell.entry for cell in cells):
            if entry.calibrate:
                self._calibrated(entry, learn_from)
        training = [cell for cell in cells if cell.entry.train]
        with (training and self.problem.middle_block()) or contextlib.nullcontext() as block:
            for cell in training:
                self._trained(cell, learn_from, block)
            self.problem.session(prompts, self.guidance, lambda model: self._run(
                model, prompts, noise, cells, learn_from, references))

    def _run(self, model: comfy_host.Model, prompts: Sequence[str], noise: Tensor, cells: Sequence[Cell],
             learn_from: Sequence[str | None], references: Mapping[float, Reference]) -> None:
        """The rows of these cells, in one session."""
        at, shared, same = None, None, {}
        for cell in cells:
            if at != (cell.scheduler, cell.budget):
                at, shared = (cell.scheduler, cell.budget), Counted(model, self.problem.remembers)
                self.say(f"{cell.scheduler}, {cell.budget} evaluations")
            options = self.learned.get(learned_key(cell, learn_from, self.several), {})
            looks = isinstance(options, Mapping) and getattr(options.get("trained"), "predictor", None)
            counted = Counted(model, remembers=False) if looks else shared  # memories have no middle block
            again = same if cell.entry.chooses else {}
            rows = errors(cell, self.problem, options, counted, noise, prompts, references, again)
            beginning = cell.row(self.problem, self.guidance)
            self.kept.add([{**beginning, **row} for row in rows], cell.entry.ours)

    def _calibrated(self, entry: Entry, learn_from: Sequence[str | None]) -> None:
        """What an entry learns of the model before; a refit begins with what was measured."""
        seen = seen_by(entry, learn_from, self.several)
        if (entry.calibrate, seen) in self.learned:
            return
        plain = fitted_statistics, tuple(learn_from)
        count = self.problem.calibration_noises
        if entry.calibrate is refitted:
            count = max(self.problem.refit_noises, len(seen) * self.problem.refit_noises // 4)
            self._learn(plain, self.problem.calibration_noises, {})
        self._learn((entry.calibrate, seen), count, self.learned.get(plain, {}))

    def _learn(self, key: tuple, count: int, measured: Options | Exception) -> None:
        if key in self.learned:
            return
        calibrate, seen = key
        sigmas = model_sampling().sigmas.flip(0).to(self.problem.dtype)
        noise, samples = starting_noise(self.problem, count, seed=7), self.problem.calibration_noises

        def body(model):
            counted, x = Counted(model, remembers=False), starting_x(model, noise, sigmas[0])
            try:
                found = dict(calibrate(Seen(counted, x, sigmas, samples, len(seen), self.guidance, measured)))
                if self.several and (None in seen or len(seen) > 1):
                    found["statistics"] = found["statistics"].for_another_prompt()
            except Exception as error:  # must not end the run: its cells say why they are empty
                found = error
            prompts = ", ".join(map(str, seen))
            self.say(f"{calibrate.__name__} of {prompts}: {counted.calls} evaluations of {count} images")
            return found

        prompts = [seen[k % len(seen)] for k in range(count)]
        self.learned[key] = self.problem.session(prompts, self.guidance, body)

    def _trained(self, cell: Cell, learn_from: Sequence[str | None], block: Any) -> None:
        key = learned_key(cell, learn_from, self.several)
        if key in self.learned:
            return
        noise, name = starting_noise(self.problem, self.problem.training_noises, seed=7), cell.entry.name

        def body(model):
            counted = Counted(model, remembers=False)
            try:
                sigmas = cell.sigmas(self.problem)
                x = starting_x(model, noise, sigmas[0])
                found = cell.entry.train(name.removeprefix("lambda/"), counted, x, sigmas, block)
            except Exception as error:  # its cell says why it is empty
                found = error
            self.say(f"{cell.entry.label} trained for {cell.scheduler}, {cell.budget} evaluations: "
                     f"{counted.calls} evaluations of {len(noise)} images")
            return found

        self.learned[key] = self.problem.session([*learn_from] * len(noise), self.guidance, body)


def seen_by(entry: Entry, learn_from: Sequence[str | None], several: bool) -> tuple[str | None, ...]:
    return REFIT_PROMPTS if entry.several and several else tuple(learn_from)


def learned_key(cell: Cell, learn_from: Sequence[str | None], several: bool) -> tuple:
    if cell.entry.train:
        return cell.entry.label, cell.scheduler, cell.budget
    return cell.entry.calibrate, seen_by(cell.entry, learn_from, several)


def errors(cell: Cell, problem: Problem, options: Options | Exception, model: Counted, noise: Tensor,
           prompts: Sequence[str], references: Mapping[float, Reference],
           same: dict[tuple, Tensor]) -> list[Row]:
    """What one run adds to its rows, one for each prompt. `same`: runs that need not be made again."""
    model.calls, x = 0, None
    try:
        if isinstance(options, Exception):
            raise options
        sigmas = cell.sigmas(problem)
        start = round(float(sigmas[0]), 4)
        run = cell.entry.label, cell.steps, start
        if run in same:
            model.calls = cell.entry.cost(cell.steps)
        else:
            same[run] = cell.entry.run(model, starting_x(model, noise, sigmas[0]), sigmas.clone(), **options)
        x = same[run]
        reason = "" if x.isfinite().all() else "not finite"
    except Exception as error:  # recorded, whatever it is: a sampler that fails is a result
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if reason:
        failed = {"rms": math.nan, "median": math.nan, "reason": reason}
        return [{"prompt": prompt, **failed} for prompt in Counter(prompts)]
    exact = cell.entry.cost(cell.steps)
    assert model.calls == exact <= cell.budget, f"{cell} took {model.calls} evaluations, not {exact}"
    error = x - references[start].x
    result = []
    for prompt in Counter(prompts):
        own = error[[i for i, name in enumerate(prompts) if name == prompt]]
        result.append({"prompt": prompt, "evaluations": model.calls, "start": start, "reason": "",
                       "rms": rms(own), "median": float(own.abs().median()),
                       "images": " ".join(f"{rms(image):.4g}" for image in own)})
    return result
