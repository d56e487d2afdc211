"""From the catalogue to ComfyUI: names in every sampler list, and a SAMPLER node for every family."""
from __future__ import annotations

from typing import Callable

import comfy.samplers
from comfy.k_diffusion import sampling as comfy_sampling
from comfy_api.latest import io
from torch import Tensor

from ..samplers import FAMILIES, SAMPLERS, Statistics
from ..samplers.families import Option, Sampler
from . import calibration
from .host import sampler_function
from .names import NAMES
from .statistics import STATISTICS, advanced

CATEGORY = "Lambda Solvers"


def register() -> None:
    """Append our names to ComfyUI's sampler lists, in place, once. Nothing of ComfyUI's own is replaced."""
    for name, entry in NAMES.items():
        setattr(comfy_sampling, f"sample_{name}", _calibrated(SAMPLERS[entry]))
        # One list under three names, unless another pack has replaced one of them by a copy.
        for names in (comfy.samplers.KSampler.SAMPLERS, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSAMPLER_NAMES):
            if name not in names:
                names.append(name)


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
                outputs=[io.Sampler.Output(display_name="SAMPLER")],
            )

        @classmethod
        def execute(cls, calibration: str = "auto", **options) -> io.NodeOutput:
            family.settings({**family.stand_ins, **options})  # an inadmissible value is refused here, on its node
            function = _calibrated(family, calibration)
            return io.NodeOutput(comfy.samplers.KSAMPLER(function, extra_options=options))

    Node.__name__ = Node.__qualname__ = node_id
    return Node


def _calibrated(sampler: Sampler, how: str | None = None) -> Callable[..., Tensor]:
    """The sampler's function for KSAMPLER; one that needs statistics finds or measures them first."""
    function = sampler_function(sampler)
    if "statistics" not in sampler.options:
        return function

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, statistics=None, **options):
        statistics = calibration.statistics_for(model, x, extra_args or {}, statistics, how or calibration.rule(),
                                                 fitted=sampler.build is FAMILIES["fitted"].build)
        return function(model, x, sigmas, extra_args, callback, disable, statistics=statistics, **options)

    return sample


def _more(family: Sampler) -> list[io.Input]:
    """What a node has beside the solver's own options."""
    if "statistics" not in family.options:
        return []
    return [io.Combo.Input("calibration", options=list(calibration.RULES), default="auto", tooltip=(
        "Without statistics connected or attached: auto takes saved ones of this model and guidance, or measures and saves "
        "them once (about 50 evaluations); every prompt measures each new prompt, which is more exact; saved only never "
        "measures; never uses none but given ones"))]


def _input(name: str, option: Option) -> io.Input:
    """The widget of one option."""
    if option.kind is Statistics:
        return STATISTICS.Input(name, optional=True, tooltip=(
            "From Estimate or Load Solver Statistics; without, as `calibration` says"))
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
