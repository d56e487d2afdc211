"""Schedules as SIGMAS."""
from __future__ import annotations

import math
import re
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..hosting.kinds import STATISTICS_KIND
from ..samplers import fitted_sigmas
from ..samplers.clocks import CLOCKS, evenly
from ..samplers.schedule import Level, Path, find_path, levels
from ..samplers.solver import finite
from . import picture
from .calibration_socket import SOCKET, needed
from .host import CATEGORY, advanced, one_of, path_of
from .knowledge import FITTED

LISTS, FIT = ("list of sigmas", "list of lambdas"), "fitted"
CHOICES = *CLOCKS, FIT, *LISTS


class LambdaScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaScheduler",
            display_name="Lambda Scheduler",
            category=CATEGORY,
            description="Noise levels at even distances on a clock of your choice, over the model's range, "
                        "as SIGMAS for any sampler; or your own list of levels; or those that lambda_fitted "
                        "uses. With a picture and a table.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: its noise levels are used"),
                SOCKET.Input("calibration", optional=True, tooltip=f"For the clock fitted alone. {FITTED}"),
                io.Combo.Input("clock", options=[*CHOICES], default="lambda", tooltip=(
                    "What is divided evenly. lambda: half the log of the signal-to-noise ratio; sigma: sigma "
                    "/ alpha, with rho 7 that of karras; t: the model's own time, with rho 2 DDIM's "
                    "quadratic; linear, cosine: the time of the continuous VP schedules. fitted: what "
                    "lambda_fitted chooses for a model that was measured; with guidance other samplers "
                    "gained nothing by it over sgm_uniform or beta in our measurements. Or the levels in "
                    "values, as they are")),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip=(
                    "Intervals of the schedule. A list has its own")),
                io.Float.Input("rho", default=1.0, min=0.1, max=100.0, step=0.1, round=False, tooltip=(
                    "The clock is divided after its root of this degree: above 1 levels come closer where it "
                    "shows little. 7 for sigma is EDM's")),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, round=False, tooltip=(
                    "Below 1 the schedule begins where this share of the model's timesteps is left, for "
                    "image to image. Not of a list")),
                advanced(io.Float.Input("sigma_max", default=0.0, min=0.0, max=1e5, step=0.01, round=False,
                                        tooltip="First level; 0 leaves it to denoise")),
                advanced(io.Float.Input("sigma_min", default=0.0, min=0.0, max=1e5, step=0.001, round=False,
                                        tooltip="Last level above 0; 0 is the model's lowest. fitted chooses "
                                                "its own")),
                advanced(io.Boolean.Input("to_zero", default=True, tooltip=(
                    "End with a step to sigma = 0. Off: end at sigma_min, with noise left over"))),
                io.String.Input("values", default="", tooltip=(
                    "Levels from noise to image, for the two lists of clock, between commas or blanks, such "
                    "as 14.6, 3.2, 0.8, 0.1")),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS",
                                      tooltip="For SamplerCustom, SamplerCustomAdvanced or Train AMED"),
                     io.Image.Output(display_name="picture", tooltip=(
                         "Lambda over the steps, and for every level sigma, lambda, the time that the "
                         "network is told, alpha and the signal-to-noise ratio"))],
        )

    @classmethod
    def execute(cls, model: Any, clock: str, steps: int, rho: float, denoise: float, sigma_max: float,
                sigma_min: float, to_zero: bool, values: str, calibration: Any = None) -> io.NodeOutput:
        one_of("clock", clock, CHOICES)
        sampling = model.get_model_object("model_sampling")
        path = find_path(path_of(sampling))
        if not sigma_max and denoise < 1.0:
            sigma_max = float(sampling.percent_to_sigma(1.0 - denoise))
        n = steps + (not to_zero)  # above 0
        if clock == FIT:
            chosen = fitted(calibration, path_of(sampling), n, sigma_max or float(sampling.sigma_max))
        else:
            chosen = (listed(values, clock, path) if clock in LISTS else
                      spaced(sampling, path, clock, n, rho, sigma_max, sigma_min))
        if to_zero and chosen[-1].sigma > 0.0:
            chosen.append(path.level(0.0))
        sigmas = torch.tensor([level.sigma for level in chosen])
        levels(sigmas, path)  # what cannot be sampled is refused here
        times = [float(sampling.timestep(sigma)) if sigma else 0.0 for sigma in sigmas]
        image = picture.schedule(chosen, times)
        return io.NodeOutput(sigmas, image, ui=ui.PreviewImage(image, cls=cls))


def spaced(sampling: Any, path: Path, name: str, n: int, rho: float, sigma_max: float,
           sigma_min: float) -> list[Level]:
    """n levels above 0 of a model's range. Where the clock shows nothing at the first, as lam at sigma = 1
    of a flow, the even distances begin at the model's next level."""
    table = sorted(sampling.sigmas.double().tolist())
    start, end = (path.level(given or own) for given, own in ((sigma_max, table[-1]), (sigma_min, table[0])))
    if not start.sigma > end.sigma:
        raise ValueError(f"sigma_max = {start.sigma:g} must be above sigma_min = {end.sigma:g}: this model's "
                         f"levels are from {table[-1]:g} to {table[0]:g}")
    clock = CLOCKS[name](path, table)
    if math.isfinite(clock.of(start)):
        return evenly(start, end, n, clock, rho)
    second = min(filter(finite, map(path.level, table)))  # by lam
    rest = evenly(second, end, max(2, n - 1), clock, rho)
    return [start, *rest[len(rest) - n + 1:]]


def fitted(calibration: Any, path: str, n: int, start: float) -> list[Level]:
    """The n levels above 0 that the fitted solver would choose. ValueError without a calibration."""
    if calibration is None:
        raise ValueError(f"clock is {FIT}, and no calibration is connected: connect what "
                         f"{STATISTICS_KIND.makes} makes or Load Calibration, or choose another clock")
    found = needed(STATISTICS_KIND, calibration, "the clock fitted")
    return levels(fitted_sigmas(found, n, start, path)[:-1], find_path(path))


def listed(text: str, unit: str, path: Path) -> list[Level]:
    """The levels of a list; ValueError for what is none."""
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError as fault:
        raise ValueError(f"values = {text!r}: {fault}. Give numbers between commas, such as 14.6, 3.2, 0.8, "
                         "0.1") from fault
    if not numbers:
        raise ValueError(f"clock is {unit}, and values is empty: give the levels, such as 14.6, 3.2, 0.8, "
                         "0.1, or choose another clock")
    return levels(numbers, path) if unit == LISTS[0] else [path.at(lam) for lam in numbers]
