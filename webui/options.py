"""The options of our samplers in the WebUI: what the panel, the infotext and the X/Y/Z plot know of them."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Mapping, NamedTuple

from ..samplers import SAMPLERS
from ..samplers.catalogue import FIRST_STEP, Option, Sampler
from ..samplers.denoisers import FULL


class Setting(NamedTuple):
    """An option of some of our samplers, for all of them at once."""

    label: str  # in the panel, in the infotext, and of the axis
    option: Option


PANEL: Mapping[str, Setting] = {
    "eta": Setting("Lambda eta", SAMPLERS["dpmpp_2m_sde"].options["eta"]),
    "first_step": Setting("Lambda first step", replace(
        FIRST_STEP, choices=("evaluate", "afs"), help=(
            "How the first evaluation at full noise is answered. evaluate: by the model; afs: analytically, "
            "at no cost, which suits models with a very high sigma_max. Image to image is evaluated"))),
}


def defaults() -> dict[str, Any]:
    return {name: setting.option.default for name, setting in PANEL.items()}


def choose(p: Any, values: Mapping[str, Any]) -> None:
    """What the panel says for a job, but for what an axis of the X/Y/Z plot says; and no word in the infotext
    of an earlier one, which may be another sampler's."""
    p.lambda_solvers = {**values, **getattr(p, "lambda_solvers_axes", {})}
    for setting in PANEL.values():
        p.extra_generation_params.pop(setting.label, None)


def vary(name: str) -> Callable[[Any, Any, Any], None]:
    """What an axis of the X/Y/Z plot does to a job."""

    def apply(p: Any, value: Any, values: Any) -> None:
        p.lambda_solvers_axes = {**getattr(p, "lambda_solvers_axes", {}), name: value}

    return apply


def chosen(p: Any, solver: Sampler, start: float, highest: float) -> dict[str, Any]:
    """The options of a run that starts at a level: those that the solver has, and a first step only at full
    noise."""
    said = {**defaults(), **getattr(p, "lambda_solvers", {})}
    if start < FULL * highest:
        said["first_step"] = PANEL["first_step"].option.default
    for name, value in said.items():
        PANEL[name].option.check(PANEL[name].label, value)
    return {name: value for name, value in said.items() if name in solver.options}


def note(p: Any, solver: Sampler, used: Mapping[str, Any]) -> None:
    """Into the infotext, what of a run's options is not the default."""
    for name, value in used.items():
        if value != PANEL[name].option.default:
            p.extra_generation_params[PANEL[name].label] = value


def restored(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """What the panel shows for an infotext: what it says, or the default that it leaves out."""
    setting = PANEL[name]
    return lambda told: setting.option.kind(told.get(setting.label, setting.option.default))
