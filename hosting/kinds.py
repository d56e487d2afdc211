"""The kinds of calibration: the statistics of DPM-Solver-v3 and Fitted, and what AMED has learned."""
from __future__ import annotations

import hashlib
import logging
import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..samplers import Amed, Statistics, estimate_statistics, fit_amed, fitted_sigmas, refit_multistep
from ..samplers.catalogue import Sampler
from ..samplers.learning.measure import INTERVALS, nodes
from ..samplers.denoisers import FULL
from ..samplers.learning.fitted import Fitted
from ..samplers.model import PROBE
from ..samplers.learning.refit import FEWEST, LARGEST
from ..samplers.schedule import Level, find_path
from ..samplers.solver import finite
from ..samplers.learning.train_amed import training_cost
from . import canonical
from .events import say
from .library import TAUGHT, Kind, faults, near
from .measuring import Progress, Run, resumable

ELEMENTS, MOST = 6_144, 16
"""Trajectories of an estimate are as many as give so many latent elements to average over, at most 16: 2 for
the emoji model, 1 for Stable Diffusion. One, two and eight for the emoji model gave solvers of the same error
within 15 %, two the best."""

PROMPTS = 12
"""From how many on a refit serves all prompts: on the emoji model, 5 evaluations, 9 prompts led to an error
of 0.18 on 16 images of others, no refit to 0.14, and 12 prompts to 0.13 (by a refit of two weights a
step)."""
LONGEST = 10  # steps that AMED is trained for: at 20 the training took as long as 45 images


class StatisticsKind:
    option, type, attachment = "statistics", Statistics, "lambda_solvers.statistics"
    noun, makes = "statistics", "Measure Model"

    def name(self, about: Mapping[str, Any]) -> str:
        if taught := about.get("hypersolver"):
            return "hypersolver" + "-".join(f"{scale:g}" for scale in taught.get("guidance", []))
        return "fitted" if about.get("fitted") else ""

    def about(self, run: Run) -> dict[str, Any]:
        return {"fitted": True} if _fits(run.options) else {}

    def serves(self, found: Statistics, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        if not found.covers(*filter(finite, schedule)):
            return 0
        if not _fits(options):
            return 1
        if found.root is None:
            return 0
        solver = Fitted(found, options["choose_levels"])
        if solver.learned(schedule) and not _skipped(options):
            return TAUGHT
        return 1 if solver.refitted(schedule) is None else 2

    def cost(self, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        return PROBE + 2 * (INTERVALS + 1) + (INTERVALS - 1 if _fits(options) else 0)

    def images(self, options: Mapping[str, Any], shape: Sequence[int]) -> int:
        return trajectories(shape, 2 if _fits(options) else 1)

    def sampled(self, options: Mapping[str, Any], schedule: list[Level]) -> int:
        return len(schedule) - 1 - _skipped(options)

    def measure(self, run: Run, about: dict[str, Any], partial: Any, *, seed: int = 0,
                intervals: int = INTERVALS,
                samples: int = 0, pool: str = "all") -> Statistics:
        sigmas = table(run)
        grid = [level.sigma for level in nodes(sigmas, intervals, find_path(run.path))]
        run = replace(run, grid=(*grid, 0.0))
        noise = pure_noise(run, samples or self.images(run.options, run.x.shape), seed, sigmas[0])
        progress = Progress("measuring the model's statistics", run, len(noise))
        with resumable("the measurement", partial, run):
            result = estimate_statistics(
                run.denoise, noise, sigmas, intervals=intervals, pool=pool, path=run.path, seed=seed,
                about=about, precision=run.precision, progress=progress, partial=partial,
                fitted=bool(about.get("fitted")))
        say(f"statistics measured in {progress}")
        return result

    def refit(self, run: Run, found: Statistics, steps: int, about: dict[str, Any], partial: Any, *,
              seed: int = 0,
              samples: int = 0) -> Statistics:
        """The statistics with levels and weights for so many steps of the fitted solver, learned from its
        runs.

        On one prompt, they become that prompt's; what several taught is for all, whichever was measured.
        """
        opening = self._check_refit(run, found, steps, about, samples)
        if about["prompts"] == 1:
            found = self.suited(found, about)
            found = replace(found, about={**found.about, "conditions": about["conditions"]})
        elif about["prompts"] < PROMPTS:
            say(f"warning: {about['prompts']} prompts are few: what they teach can harm others. Give "
                f"{PROMPTS} or more, or one alone for itself", logging.WARNING)
        count, highest = samples or refit_images(run.x.shape, about["prompts"]), run.ends[0]
        begins = fitted_sigmas(found.for_another_prompt(), steps, highest, run.path)
        run = replace(run, grid=begins, image=steps)
        progress = Progress("tuning the solver", run, count)
        with resumable("the tuning", partial, run):
            result = refit_multistep(
                run.denoise, pure_noise(run, count, seed), found, steps, path=run.path, start=highest
                if opening else None,
                held_out=max(1, count // 4), progress=progress, precision=run.precision,
                about=about, partial=partial)
        told = result.about["refits"][str(steps - opening)]
        before, after = told["selection"]
        say(f"tuned for {steps} steps in {progress}: error {before:.3g} before, {after:.3g} after, on the "
            "images it was selected by"
            if told["kept"] else f"tuning for {steps} steps found nothing better than the error {before:.3g} "
                                 f"on the images that select, in {progress}: nothing is kept")
        return result

    def _check_refit(self, run: Run, found: Statistics, steps: int, about: Mapping[str, Any],
                     samples: int) -> bool:
        """ValueError for what cannot be refitted; else whether the first evaluation is above the grid."""
        if wrong := faults(found.about, about):
            raise ValueError(f"these statistics were {'; '.join(wrong)}: what they begin with decides what "
                             f"tuning finds. Run {self.makes} on this model at this guidance, and connect "
                             "what it makes")
        opening = not finite(find_path(run.path).level(run.ends[0]))
        if not FEWEST <= steps - opening <= LARGEST:
            raise ValueError(f"steps = {steps} is out of range: on this model choose from {FEWEST + opening} "
                             f"to {LARGEST + opening}; fewer leave nothing to tune, and more need none")
        if samples and samples < (fewest := max(3, about["prompts"])):
            raise ValueError(f"samples = {samples} is too few: choose at least {fewest}, one for each prompt "
                             "and three in all, or 0")
        return opening

    def suited(self, found: Statistics, about: Mapping[str, Any]) -> Statistics:
        """Without b for another prompt, and without a hypersolver for other latents or a guidance beyond
        those that taught it."""
        if found.about.get("conditions") != about["conditions"]:
            found = found.for_another_prompt()
        taught = found.hypersolver
        if taught is None:
            return found
        low, high = taught.guidances
        scale = about["guidance"]
        serves = taught.channels == about["channels"] and near(scale, min(max(scale, low), high))
        return replace(found, hypersolver=replace(taught, guidance=scale) if serves else None)

    @contextmanager
    def ready(self, found: Statistics, run: Run) -> Iterator[Statistics]:
        taught = self.serves(found, run.options, run.path, run.levels) == TAUGHT
        if "b" in found.about and not canonical.named(found.about) and not taught:
            say("statistics of another prompt: l and s are used, b is left out")
        if taught:
            low, high = found.hypersolver.guidances
            say(f"with their hypersolver, trained for {len(run.levels) - 1} steps at guidance {low:.3g} to "
                f"{high:.3g}")
        yield found


class AmedKind:
    option, type, attachment = "trained", Amed, "lambda_solvers.amed"
    noun, makes = "AMED", "Train AMED"

    def name(self, about: Mapping[str, Any]) -> str:
        sigmas = about["sigmas"]
        digits = hashlib.sha256(" ".join(f"{sigma:.3g}" for sigma in sigmas).encode()).hexdigest()[:6]
        first = "" if about["first_step"] == "evaluate" else f"-{about['first_step']}"
        base = about["base"] if about["base"] == "amed" else f"amed_{about['base']}"
        return f"{base}{first}-{len(sigmas) - 1}steps-{digits}"

    def about(self, run: Run) -> dict[str, Any]:
        return {"base": run.options["base"], "sigmas": run.sigmas.tolist(),
                "first_step": _first_step(run.options)}

    def serves(self, found: Amed, options: Mapping[str, Any], path: str, schedule: list[Level]) -> bool:
        wanted = path, options["base"], _first_step(options)
        return (found.about.get("path"), found.base, found.first_step) == wanted and found.fits(schedule)

    def cost(self, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        if len(schedule) - 1 > LONGEST:
            raise ValueError(f"AMED is not trained for {len(schedule) - 1} steps, which takes too long: "
                             f"choose at most {LONGEST} steps, or the fitted sampler, which serves any")
        return training_cost(schedule, first_step=_first_step(options))

    def images(self, options: Mapping[str, Any], shape: Sequence[int]) -> int:
        count = training_images(shape)
        return count + _held_out(count)

    def sampled(self, options: Mapping[str, Any], schedule: list[Level]) -> int:
        return sum(1 + finite(*ends) for ends in pairwise(schedule)) - _skipped(options)

    def measure(self, run: Run, about: dict[str, Any], partial: Any, *, seed: int = 0, samples: int = 0,
                form: str = "table",
                **how: Any) -> Amed:
        self.cost(run.options, run.path, run.levels)  # where it refuses, before the model is asked
        highest, start = run.ends[0], run.levels[0].sigma
        if start < FULL * highest:
            raise ValueError(f"AMED is trained from full noise, and this run starts at sigma = {start:.4g}, "
                             f"where there is an image, and not at the model's highest, {highest:.4g}: "
                             f"{run.remedies['full noise']}")
        count = samples or training_images(run.x.shape)
        held_out = _held_out(count)
        run = replace(run, image=self.sampled(run.options, run.levels))
        noise, progress = pure_noise(run, count + held_out, seed, start), Progress("training AMED", run,
                                                                                   count + held_out)
        with run.middle_block() as block:
            if form == "predictor" and block is None:
                raise ValueError(f"a predictor looks at the middle block of a U-Net, and {about['model']} "
                                 "has none: set form to table")
            run = replace(run, block=block)
            with resumable("the training", partial, run):
                result = fit_amed(
                    run.denoise, noise, run.sigmas, base=about["base"], first_step=about["first_step"],
                    form=form,
                    held_out=held_out, path=run.path, features=block.features if block else None,
                    seed=seed,
                    about=about, progress=progress, precision=run.precision, partial=partial,
                    **how)
        say(summary(result, progress), logging.WARNING if carry_over(result) > WARN_ABOVE else logging.INFO)
        return result

    def suited(self, found: Amed, about: Mapping[str, Any]) -> Amed:
        return found

    @contextmanager
    def ready(self, found: Amed, run: Run) -> Iterator[Amed]:
        """It, and for a predictor with a view of the model's middle block."""
        if found.predictor is None:
            yield found
            return
        with run.middle_block() as block:
            if block is None:
                raise ValueError("this AMED was trained with a predictor on the middle block of "
                                 f"{found.about.get('model')}, and this model has none: train a table for it")
            yield replace(found, features=block.features)


def _fits(options: Mapping[str, Any]) -> bool:
    """Whether a solver with these options is the fitted one, which needs trajectories beside the
    statistics."""
    return "choose_levels" in options


def _first_step(options: Mapping[str, Any]) -> str:
    """How the first evaluation is answered."""
    return options.get("first_step", "evaluate")


def _skipped(options: Mapping[str, Any]) -> bool:
    """Whether the first evaluation is not the model's."""
    return _first_step(options) != "evaluate"


def _held_out(count: int) -> int:
    """Images that test what so many teach."""
    return max(1, count // 4)


STATISTICS_KIND, AMED_KIND = KINDS = (StatisticsKind(), AmedKind())


def kind_for(sampler: Sampler) -> Kind | None:
    """What a solver needs to know of a model, if it does."""
    return next((kind for kind in KINDS if kind.option in sampler.options), None)


def kind_of(found: Any) -> Kind:
    return next(kind for kind in KINDS if isinstance(found, kind.type))


WARN_ABOVE = 1.15
"""`carry_over` from which a training is said not to carry over."""


def carry_over(trained: Amed) -> float:
    """What is left of the untrained error at the last level: on images that did not teach, as a ratio to that
    on those that did."""
    losses = trained.about["losses"]
    others, training = (losses["trained"][part][-1] / losses["untrained"][part][-1]
                        for part in (trained.others, "training"))
    return others / training


def summary(trained: Amed, spent: object) -> str:
    losses = trained.about["losses"]
    before, after = losses["untrained"][trained.others][-1], losses["trained"][trained.others][-1]
    ratio = carry_over(trained)
    warning = "" if ratio <= WARN_ABOVE else (". Warning: against the untrained error that is "
                                              f"{100 * (ratio - 1):.0f} % more than on the training images: "
                                              "use more samples, or fewer steps")
    which = "images held out" if trained.others == "held out" else "the images it was selected by"
    return (f"AMED trained in {spent}: error at the last step {before:.3g} untrained, {after:.3g} trained, "
            f"on {which}{warning}")


def pure_noise(run: Run, count: int, seed: int, sigma: float | None = None) -> Tensor:
    """Starting states of a run at sigma, or at the model's highest level."""
    noise = torch.randn((count, *run.x.shape[1:]),
                        generator=torch.Generator().manual_seed(seed)).to(run.x.device)
    return run.noised(noise, run.ends[0] if sigma is None else sigma)


def table(run: Run) -> list[float]:
    """The levels the model knows, from high to low: the host rounds every other one to them. And those of the
    run beyond them."""
    highest, lowest = run.ends
    beyond = [level.sigma for level in run.levels if level.sigma > highest or 0.0 < level.sigma < lowest]
    return sorted({*(run.known or run.ends), *beyond}, reverse=True)


def trajectories(shape: Sequence[int], fewest: int = 1) -> int:
    """How many an estimate takes. The fitted solver corrects only what holds on one that was left out, so it
    needs two."""
    return _enough(shape, 1, fewest, MOST)


def refit_images(shape: Sequence[int], prompts: int) -> int:
    """How many images a refit looks at, those that select among them: a quarter of what one prompt gets for
    each of several."""
    enough = _enough(shape, 16, 4, 8)
    return max(enough, prompts * (enough // 4))


def training_images(shape: Sequence[int]) -> int:
    """How many images AMED learns from."""
    return _enough(shape, 4, 2, 8)


def _enough(shape: Sequence[int], times: int, fewest: int, most: int) -> int:
    """As many images as have so many times ELEMENTS."""
    return max(fewest, min(most, math.ceil(times * ELEMENTS / math.prod(shape[1:]))))
