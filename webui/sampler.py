"""A solver of ours as one of the WebUI's k-diffusion samplers."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping

from modules.sd_samplers_kdiffusion import KDiffusionSampler
from torch import Tensor

from ..hosting import events, library
from ..hosting.kinds import kind_for
from ..samplers.catalogue import Sampler
from ..samplers.k_diffusion import k_diffusion_function
from . import checkpoint, options, settings_page, training
from .job import Run


class LambdaSampler(KDiffusionSampler):
    """The WebUI's own sampler, which makes schedule, noise, progress and interruption, with our solver."""

    def __init__(self, solver: Sampler, sd_model: Any) -> None:
        self.solver = solver
        super().__init__(self.run, sd_model)

    @property
    def path(self) -> str:
        return checkpoint.path(self.model_wrap)

    def run(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any],
            callback: Callable | None = None, disable: bool | None = None) -> Tensor:
        """The function that the WebUI calls in the place of k-diffusion's. It reads the names of these
        arguments: what it knows under another one (eta, n, sigma_min, ...) it would hand over too."""
        check_second_pass(self.p)
        sigmas, highest = steps(sigmas, self.path), float(self.model_wrap.sigmas[-1])
        chosen = options.chosen(self.p, self.solver, float(sigmas[0]), highest)
        options.note(self.p, chosen)

        def sample(**known: Any) -> Tensor:
            fn = k_diffusion_function(self.solver, self.path, {**chosen, **known}, sigma_max=highest,
                                      sigma_min=float(self.model_wrap.sigmas[0]))
            told = {**extra_args, "seed": seeds(self.p)}
            return fn(without_seed(model), x.float(), sigmas, told, callback, disable).to(x.dtype)

        kind = kind_for(self.solver)
        if kind is None:
            return sample()
        defaults = {name: option.default for name, option in self.solver.options.items()}
        run = Run(model, x.float(), sigmas, dict(extra_args), {**self.solver.fixed, **defaults, **chosen},
                  sampler=self)
        how = options.rule(self.p) or settings_page.rule()
        with events.noting() as notes, commented(self.p, notes):
            if training.teach(run):
                how = library.RULES[0]  # whoever trains may measure
            with library.provided(kind, run, None, how) as ready:
                options.note_calibration(self.p, how, notes.used[kind.option].told())
                return sample(**{kind.option: ready})


def steps(sigmas: Tensor, path: str) -> Tensor:
    """A schedule that ends in one 0: of flow models some of the WebUI's end in two.

    ValueError for one that is not of the model's path.
    """
    while len(sigmas) > 2 and sigmas[-1] == sigmas[-2] == 0.0:
        sigmas = sigmas[:-1]
    if path == "flow" and sigmas[0] > 1.0:
        raise ValueError(f"the schedule starts at sigma = {float(sigmas[0]):.4g}, and this model's levels go "
                         "from 1 to 0: choose the schedule type Simple, Beta, Normal or SGM Uniform")
    return sigmas


def check_second_pass(p: Any) -> None:
    """ValueError in the first pass for a second one that AMED is not trained for."""
    if not getattr(p, "enable_hr", False) or p.is_hr_pass or p.denoising_strength >= 1.0:
        return
    if (p.hr_sampler_name or p.sampler_name).startswith("Lambda AMED"):
        raise ValueError("AMED is trained from full noise, and the second pass of Hires. fix begins lower: "
                         "choose another Hires sampling method, such as Lambda Fitted")


@contextmanager
def commented(p: Any, notes: events.Notes) -> Iterator[None]:
    """What is said meanwhile stands below the picture, also of an interrupted job: by then the progress bar
    is gone."""
    try:
        yield
    finally:
        for text, _ in notes.said:
            p.comment(text)


def seeds(p: Any) -> list[int]:
    """Of every image of the batch that is being made: its noise does not depend on the others."""
    return [int(seed) for seed in p.all_seeds[p.iteration * p.batch_size:(p.iteration + 1) * p.batch_size]]


def without_seed(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The WebUI's denoiser, which takes no seed."""
    return lambda x, sigma, *, seed, **told: model(x, sigma, **told)
