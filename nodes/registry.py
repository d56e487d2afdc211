"""From the catalogue to ComfyUI: names in every sampler list, and a SAMPLER node for every family."""
from __future__ import annotations

import logging
from typing import Callable

import comfy.samplers
from comfy.k_diffusion import sampling as comfy_sampling
from comfy_api.latest import io
from torch import Tensor

from ..samplers import FAMILIES, SAMPLERS
from ..samplers.families import Option, Sampler
from . import calibration, events, identity
from .calibrating import SOCKETS, advanced
from .calibration import Kind, Run
from .host import sampler_function
from .kinds import KINDS
from .names import NAMES

CATEGORY = "Lambda Solvers"


def register() -> None:
    """Append our names to ComfyUI's sampler lists, in place, once. What others have there is left alone."""
    # One list under three names, unless another pack has replaced one of them by a copy.
    lists = (comfy.samplers.KSampler.SAMPLERS, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSAMPLER_NAMES)
    for name, entry in NAMES.items():
        there = hasattr(comfy_sampling, f"sample_{name}") or any(name in names for names in lists)
        if there and not listed(name):
            logging.warning("Lambda Solvers: ComfyUI or another pack has a sampler named %s already. It is left "
                            "alone, and ours is not in the lists: use its node", name)
            continue
        setattr(comfy_sampling, f"sample_{name}", calibrated(SAMPLERS[entry]))
        for names in lists:
            if name not in names:
                names.append(name)


def listed(name: str) -> Sampler | None:
    """Our sampler that ComfyUI runs under a name of its lists, if it is ours that it runs."""
    function = getattr(comfy_sampling, f"sample_{name}", None) if name in NAMES else None
    return getattr(function, "lambda_solvers", None)


def sampler_nodes() -> list[type[io.ComfyNode]]:
    return [_node(family) for family in FAMILIES.values()]


def _node(family: Sampler) -> type[io.ComfyNode]:
    """The SAMPLER node of one family: a widget for every option, and one call."""
    node_id = "LambdaSampler" + family.name.capitalize()

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=f"{family.title} (Lambda)",
                category=CATEGORY,
                description=f"{family.help}\n\n{family.citation}",
                inputs=[*(_input(name, option) for name, option in family.options.items()), *_more(family)],
                outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom or SamplerCustomAdvanced")],
            )

        @classmethod
        def execute(cls, calibration: str = "auto", **options) -> io.NodeOutput:
            family.settings({**family.stand_ins, **options})  # an inadmissible value is refused here, on its node
            return io.NodeOutput(comfy.samplers.KSAMPLER(calibrated(family, calibration), extra_options=options))

    Node.__name__ = Node.__qualname__ = node_id
    return Node


def kind_of(sampler: Sampler) -> Kind | None:
    """What a solver needs to know of a model, if it does."""
    return next((kind for kind in KINDS if kind.option in sampler.options), None)


def calibrated(sampler: Sampler, how: str | None = None) -> Callable[..., Tensor]:
    """The sampler's function for KSAMPLER; one that needs a calibration finds or measures it first."""
    function, kind = sampler_function(sampler), kind_of(sampler)
    if kind is None:
        return _observed(sampler, function, None)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        if len(sigmas) < 2:
            return x  # nothing to do, so nothing to measure
        given = options.pop(kind.option, None)
        defaults = {name: option.default for name, option in sampler.options.items()}
        run = Run(model, x, sigmas, extra_args or {}, {**sampler.fixed, **defaults, **options})
        name, found = calibration.calibration_for(kind, run, given, how or calibration.rule())
        suited = kind.suited(found, identity.conditions(run.guider))
        events.use(kind.option, events.Used(name, found, suited))
        with kind.ready(suited, run) as ready:
            return function(model, x, sigmas, extra_args, callback, disable, **{kind.option: ready}, **options)

    return _observed(sampler, sample, calibration.description)


def _observed(sampler: Sampler, function: Callable[..., Tensor], describe: Callable | None) -> Callable[..., Tensor]:
    """The function, telling of its runs, and known as ours."""
    sample = events.observed(function, describe)
    sample.lambda_solvers = sampler
    return sample


def _more(family: Sampler) -> list[io.Input]:
    """What a node has beside the solver's own options."""
    kind = kind_of(family)
    if kind is None:
        return []
    return [io.Combo.Input("calibration", options=list(calibration.RULES), default="auto", tooltip=(
        f"Without {kind.title} connected or attached: auto takes a saved one of this model and guidance, or measures and saves "
        "one once, at no prompt in particular; every prompt measures each new prompt, which is more exact; saved only never "
        "measures; never uses none but a given one"))]


def _input(name: str, option: Option) -> io.Input:
    """The widget of one option."""
    for kind, socket in SOCKETS.items():
        if option.kind is kind.type:
            return socket.Input(name, optional=True, tooltip=(
                f"From {kind.makes} or Load {kind.title}; without, as `calibration` says"))
    said = {"default": option.default, "tooltip": f"{option.help}. {option.range.capitalize()}; default {option.default}."}
    if option.choices:
        widget = io.Combo.Input(name, options=list(option.choices), **said)
    elif option.kind is bool:
        widget = io.Boolean.Input(name, **said)
    elif option.kind is int:
        widget = io.Int.Input(name, min=option.low, max=option.high, **said)
    else:
        widget = io.Float.Input(name, min=option.low, max=option.high, step=option.step, round=False, **said)
    return advanced(widget) if option.advanced else widget
