"""A solver of ours as one of the WebUI's k-diffusion samplers."""
from __future__ import annotations

from typing import Any, Callable, Mapping

from modules.sd_samplers_kdiffusion import KDiffusionSampler
from torch import Tensor

from ..samplers.catalogue import Sampler
from ..samplers.k_diffusion import k_diffusion_function
from . import options


class LambdaSampler(KDiffusionSampler):
    """The WebUI's own sampler, which makes schedule, noise, progress and interruption, with our solver."""

    def __init__(self, solver: Sampler, sd_model: Any) -> None:
        self.solver = solver
        super().__init__(self.run, sd_model)

    def run(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any],
            callback: Callable | None = None, disable: bool | None = None) -> Tensor:
        """The function that the WebUI calls in the place of k-diffusion's. It reads the names of these
        arguments: what it knows under another one (eta, n, sigma_min, ...) it would hand over too."""
        path, ends = path_of(self.model_wrap), self.model_wrap.sigmas
        sigmas, highest = steps(sigmas, path), float(ends[-1])
        chosen = options.chosen(self.p, self.solver, float(sigmas[0]), highest)
        fn = k_diffusion_function(self.solver, path, chosen, sigma_max=highest, sigma_min=float(ends[0]))
        options.note(self.p, self.solver, chosen)
        told = {**extra_args, "seed": seeds(self.p)}
        return fn(without_seed(model), x.float(), sigmas, told, callback, disable).to(x.dtype)


def path_of(model_wrap: Any) -> str:
    """The Gaussian path of a model: "flow" where x = (1 - sigma) x0 + sigma eps, else "ve"."""
    if hasattr(model_wrap, "predictor"):  # Forge
        return "flow" if model_wrap.predictor.prediction_type == "const" else "ve"
    return "flow" if getattr(model_wrap.inner_model, "is_sd3", False) else "ve"


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


def seeds(p: Any) -> list[int]:
    """Of every image of the batch that is being made: its noise does not depend on the others."""
    return [int(seed) for seed in p.all_seeds[p.iteration * p.batch_size:(p.iteration + 1) * p.batch_size]]


def without_seed(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The WebUI's denoiser, which takes no seed."""
    return lambda x, sigma, *, seed, **told: model(x, sigma, **told)
