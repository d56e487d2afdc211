"""A hypersolver for a model: its teaching, in a run of the host's with several prompts."""
from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Mapping, Sequence

from ..samplers import Statistics, fit_hypersolver, fitted_sigmas, hypersolver_bytes, hypersolver_cost
from ..samplers.learning.train_hypersolver import ROUNDS, spread
from ..samplers.schedule import find_path
from ..samplers.solver import finite
from . import library
from .events import say
from .kinds import PROMPTS, STATISTICS_KIND, pure_noise
from .measuring import Progress, Run, resumable


@dataclass(frozen=True)
class Lessons:
    """What a hypersolver is to be taught with: so many images of every prompt, over a range of guidances, for
    numbers of steps, and how long the network is trained."""

    prompts: Sequence[str]
    images: int
    cfg_low: float
    cfg_high: float
    fewest: int
    most: int
    training: int
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for what cannot be taught."""
        if self.cfg_low > self.cfg_high or self.fewest > self.most:
            raise ValueError(f"cfg_low = {self.cfg_low:g} and cfg_high = {self.cfg_high:g}, fewest = "
                             f"{self.fewest} and most = {self.most}: the first of each two must not be above "
                             "the second")
        if len(self.prompts) < 2:
            raise ValueError(f"prompts has {len(self.prompts)} lines: write two at least, one a line, and "
                             "better a hundred, since some are held out to test what the others teach")

    @property
    def middle(self) -> float:
        """The guidance of the levels and statistics below it."""
        return math.sqrt(self.cfg_low * self.cfg_high)

    @property
    def guidances(self) -> list[float]:
        """Of every prompt."""
        return spread(self.cfg_low, self.cfg_high, len(self.prompts))


def lines(prompts: str) -> list[str]:
    """One prompt a line, blank ones left out."""
    return [line.strip() for line in prompts.splitlines() if line.strip()]


def beneath(run: Run) -> Statistics:
    """What `lambda_fitted` would be given in a run of this model."""
    run = replace(run, options={"choose_levels": True})
    return library.calibration_for(STATISTICS_KIND, run, None, "auto").found


def teach(run: Run, found: Statistics, lessons: Lessons, about: Mapping[str, Any]) -> Statistics:
    """The statistics with a hypersolver, taught by images of every prompt of the run, each at its guidance;
    as they were if it is of no use at any number of steps."""
    guidances, steps, seed = lessons.guidances, range(lessons.fewest, lessons.most + 1), lessons.seed
    check(found, about, guidances)
    partial = library.unfinished(STATISTICS_KIND, about, "hypersolver", lessons.images, lessons.fewest,
                                 lessons.most, seed, lessons.training)
    highest, count = run.ends[0], lessons.images * run.prompts
    opening = not finite(find_path(run.path).level(highest))
    prompts = [k % run.prompts for k in range(count)]
    plain, counts = replace(found, hypersolver=None), [n - opening for n in steps]
    run = replace(run, grid=fitted_sigmas(plain.for_another_prompt(), max(steps), highest, run.path))
    kept = hypersolver_bytes(run.x.shape, prompts, counts)
    say(f"the hypersolver's training keeps {kept / 1e9:.2g} GB in host memory, and on disk until it is done")
    progress = Progress("training the hypersolver", run, count, calls(run, prompts, counts, opening))
    with resumable("the training", partial, run):
        result = fit_hypersolver(
            run.denoise, pure_noise(run, count, seed), plain, guidance=[guidances[k] for k in prompts],
            prompts=prompts, steps=counts, path=run.path, start=highest if opening else None,
            iterations=lessons.training, seed=seed, progress=progress, precision=run.precision,
            about=about, partial=partial)
    say(summary(result, opening, progress))
    return result if result.hypersolver else found


def check(found: Statistics, about: Mapping[str, Any], guidances: Sequence[float]) -> None:
    """ValueError for statistics of something else; a warning where prompts are few."""
    own = found.about.get("guidance", math.nan)
    nearest = min(max(own, min(guidances)), max(guidances))
    if wrong := library.faults(found.about, {**about, "guidance": nearest}):
        raise ValueError(f"these statistics were {'; '.join(wrong)}: a hypersolver goes with their levels. "
                         f"Leave calibration unconnected, or run {STATISTICS_KIND.makes} on this model at a "
                         f"guidance from {min(guidances):g} to {max(guidances):g} and connect what it makes")
    if len(guidances) < PROMPTS:
        say(f"warning: {len(guidances)} prompts are few: what they teach can harm others. Give {PROMPTS} or "
            "more", logging.WARNING)


def calls(run: Run, prompts: Sequence[int], counts: Sequence[int], opening: bool) -> int:
    """How often the model is called at most: in a lesson, each of its images may be the only one of its
    prompt."""
    runs, whole = (hypersolver_cost(prompts, counts, rounds, opening) for rounds in (0, ROUNDS))
    return runs * run.calls(len(prompts)) + (whole - runs) * len(prompts)


def summary(result: Statistics, opening: bool, spent: object) -> str:
    kept = result.hypersolver.counts if result.hypersolver else ()
    errors = ", ".join(f"{int(n) + opening} steps {without:.3g} and {having:.3g}"
                       for n, (without, having) in result.about["hypersolver"]["selection"].items())
    said = f"hypersolver trained in {spent}: error on prompts held out, without and with it: {errors}"
    if not kept:
        return f"{said}. It is better at none, and nothing is kept"
    return f"{said}. It is used for {', '.join(str(n + opening) for n in kept)} steps"
