"""A hypersolver for a model: its teaching, in a run of ComfyUI's with several prompts."""
from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any, Mapping, Sequence

from ..hosting.events import say
from ..hosting.kinds import PROMPTS, STATISTICS_KIND, pure_noise
from ..hosting.library import faults
from ..hosting.measuring import Progress, resumable
from ..samplers import Statistics, fit_hypersolver, fitted_sigmas, hypersolver_bytes, hypersolver_cost
from ..samplers.learning.train_hypersolver import ROUNDS
from ..samplers.schedule import find_path
from ..samplers.solver import finite
from .guided_run import Run


def teach(run: Run, found: Statistics, steps: Sequence[int], images: int, about: Mapping[str, Any],
          partial: Any, *, seed: int = 0, training: int) -> Statistics:
    """The statistics with a hypersolver for these numbers of steps, taught by so many images of every prompt
    of the run, each at its guidance; as they were if it is of no use at any of them."""
    guidances = run.guider.guidances
    check(found, about, guidances)
    highest, count = run.ends[0], images * run.prompts
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
            iterations=training, seed=seed, progress=progress, precision=run.precision,
            about=about, partial=partial)
    say(summary(result, opening, progress))
    return result if result.hypersolver else found


def check(found: Statistics, about: Mapping[str, Any], guidances: Sequence[float]) -> None:
    """ValueError for statistics of something else; a warning where prompts are few."""
    own = found.about.get("guidance", math.nan)
    nearest = min(max(own, min(guidances)), max(guidances))
    if wrong := faults(found.about, {**about, "guidance": nearest}):
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
