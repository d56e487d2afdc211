"""A schedule type: the noise levels where so few steps leave the least error on a model that was measured."""
from __future__ import annotations

import logging
from typing import Any

import torch
from modules import sd_schedulers

from ..hosting import library
from ..hosting.kinds import STATISTICS_KIND
from ..samplers import fitted_sigmas
from ..samplers.schedule import find_path, levels
from . import checkpoint

NAME, LABEL = "lambda_fitted", "Lambda Fitted"
_running: list[Any] = []


def append() -> None:
    """Append ours to the WebUI's schedule types, in place; one of an earlier load is replaced."""
    listed, ours = sd_schedulers.schedulers, sd_schedulers.Scheduler(NAME, LABEL, sigmas,
                                                                     need_inner_model=True)
    there = sd_schedulers.schedulers_map.get(LABEL)
    if there is None:
        listed.append(ours)
    elif there.name == NAME:
        listed[listed.index(there)] = ours
    else:
        logging.warning("Lambda Solvers: there is a schedule type named %s already. It is left alone, and "
                        "ours is not in the list", LABEL)
        return
    sd_schedulers.schedulers_map.update({NAME: ours, LABEL: ours})


def begin(p: Any) -> None:
    """A job begins: the WebUI makes schedules without saying for which."""
    _running[:] = [p]


def sigmas(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    """n levels and 0, as the WebUI's schedules are; ValueError where no saved file serves the model at the
    job's guidance."""
    path, about = checkpoint.path(inner_model), checkpoint.of_job(_running[0])
    usual = levels([*torch.linspace(float(sigma_max), float(sigma_min), n).tolist(), 0.0], find_path(path))
    options = {"nodes": "chosen", "order": 2}
    found = library.choice(STATISTICS_KIND, about, "saved only", options, path, usual)
    if found is None:
        raise ValueError(f"no saved statistics for {about['model']} at guidance {about['guidance']:g}: make "
                         "one picture with the sampler Lambda Fitted and another schedule type, which "
                         "measures the model")
    return torch.tensor(fitted_sigmas(found[1], n, float(sigma_max), path), dtype=torch.float32,
                        device=device)
