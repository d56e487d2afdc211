"""The options of our samplers in the WebUI: what the panel, the infotext and the X/Y/Z plot know of them."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Mapping, NamedTuple

from ..hosting.library import RULES
from ..samplers import SAMPLERS
from ..samplers.catalogue import FIRST_STEP, Option, Sampler
from ..samplers.denoisers import FULL


class Setting(NamedTuple):
    """An option of some of our samplers, for all of them at once."""

    label: str  # in the panel, in the infotext, and of the axis
    option: Option


RULE, AS_SET = "calibration", "as in the settings"
USED = "Lambda calibration file"  # in the infotext
PANEL: Mapping[str, Setting] = {
    "eta": Setting("Lambda eta", replace(SAMPLERS["dpmpp_2m_sde"].options["eta"], help=(
        "Of the SDE samplers: the share of noise. 1 is the diffusion SDE, 0 the ODE (no noise)"))),
    "first_step": Setting("Lambda first step", replace(
        FIRST_STEP, help=f"{FIRST_STEP.help}. Image to image is evaluated")),
    RULE: Setting("Lambda calibration", Option(
        "Of v3, Fitted and AMED, which must know the model. auto: what was saved for this model and "
        "guidance, or measured once, at no prompt in particular; every prompt: of each prompt; saved only: "
        "never measure", choices=(AS_SET, *RULES), default=AS_SET)),
}


def defaults() -> dict[str, Any]:
    return {name: setting.option.default for name, setting in PANEL.items()}


def choose(p: Any, values: Mapping[str, Any]) -> None:
    """What the panel says for a job, but for what an axis of the X/Y/Z plot says; and no word in the infotext
    of an earlier one, which may be another sampler's."""
    p.lambda_solvers = {**values, **getattr(p, "lambda_solvers_axes", {})}
    for label in (USED, *(setting.label for setting in PANEL.values())):
        p.extra_generation_params.pop(label, None)


def vary(name: str) -> Callable[[Any, Any, Any], None]:
    """What an axis of the X/Y/Z plot does to a job."""

    def apply(p: Any, value: Any, values: Any) -> None:
        p.lambda_solvers_axes = {**getattr(p, "lambda_solvers_axes", {}), name: value}

    return apply


def said(p: Any) -> dict[str, Any]:
    """Every option of a job. ValueError naming one that is out of range."""
    found = {**defaults(), **getattr(p, "lambda_solvers", {})}
    return {name: PANEL[name].option.check(PANEL[name].label, value) for name, value in found.items()}


def chosen(p: Any, solver: Sampler, start: float, highest: float) -> dict[str, Any]:
    """The options of a run that starts at a level: those that the solver has, and a first step only at full
    noise."""
    found = said(p)
    if start < FULL * highest:
        found["first_step"] = PANEL["first_step"].option.default
    return {name: value for name, value in found.items() if name in solver.options}


def rule(p: Any) -> str | None:
    """What the panel says of calibrations, if it is not the settings that do."""
    found = said(p)[RULE]
    return None if found == AS_SET else found


def note(p: Any, used: Mapping[str, Any]) -> None:
    """Into the infotext, what of a run's options is not the default."""
    for name, value in used.items():
        if value != PANEL[name].option.default:
            p.extra_generation_params[PANEL[name].label] = value


def note_calibration(p: Any, how: str, used: Mapping[str, str]) -> None:
    """Into the infotext, by which rule which calibration was used: the settings may be others tomorrow. Of
    two passes both, if they differ."""
    told = p.extra_generation_params
    files = [*filter(None, [told.get(USED)]), f"{used['name']} {used['digest']}"]
    told.update({PANEL[RULE].label: how, USED: "; ".join(dict.fromkeys("; ".join(files).split("; ")))})


def restored(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """What the panel shows for an infotext: what it says, or the default that it leaves out."""
    setting = PANEL[name]
    return lambda told: setting.option.kind(told.get(setting.label, setting.option.default))
