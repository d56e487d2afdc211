"""Our names in the WebUI's lists."""
from __future__ import annotations

import functools
import logging

from modules import sd_samplers, sd_samplers_common

from ..hosting.names import NAMES
from ..samplers import SAMPLERS
from .sampler import LambdaSampler

TITLES = {
    "lambda_2m": "Lambda 2M",
    "lambda_3m": "Lambda 3M",
    "lambda_2m_sde": "Lambda 2M SDE",
    "lambda_3m_sde": "Lambda 3M SDE",
    "lambda_v3": "Lambda v3",
    "lambda_fitted": "Lambda Fitted",
    "lambda_amed": "Lambda AMED",
    "lambda_amed_2m": "Lambda AMED 2M",
}
"""As the WebUI shows a name. None may end in a schedule type's: what precedes it would count as the name."""


def samplers() -> None:
    """Append our samplers to the WebUI's, in place; those of an earlier load are replaced."""
    for name, title in TITLES.items():
        there = sd_samplers.all_samplers_map.get(title)
        if there is not None and not hasattr(there.constructor, "lambda_solvers"):
            logging.warning("Lambda Solvers: there is a sampler named %s already. It is left alone, and ours "
                            "is not in the list", title)
            continue
        ours = _data(name, title)
        if there is None:
            sd_samplers.all_samplers.append(ours)
        else:
            sd_samplers.all_samplers[sd_samplers.all_samplers.index(there)] = ours
        sd_samplers.all_samplers_map[title] = ours
    sd_samplers.set_samplers()
    sd_samplers.get_sampler_and_scheduler.cache_clear()  # which remembers what names stood for


def _data(name: str, title: str) -> sd_samplers_common.SamplerData:
    """As the WebUI's lists hold a sampler."""
    solver = SAMPLERS[NAMES[name]]
    constructor = functools.partial(LambdaSampler, solver)
    constructor.lambda_solvers = solver
    twice = {"second_order": True} if solver.evaluations_per_step == 2 else {}  # it counts the model's calls
    return sd_samplers_common.SamplerData(title, constructor, [name], twice)
