"""From the catalogue to ComfyUI: names in every sampler list, and a SAMPLER node for every family."""
from __future__ import annotations

import comfy.samplers
from comfy.k_diffusion import sampling as comfy_sampling
from comfy_api.latest import io

from ..samplers import FAMILIES, SAMPLERS
from ..samplers.families import Option, Sampler
from .host import sampler_function

CATEGORY = "Lambda Solvers"

NAMES = {
    "lambda_2m": "dpmpp_2m",
    "lambda_3m": "dpmpp_3m",
    "lambda_2m_sde": "dpmpp_2m_sde",
    "lambda_3m_sde": "dpmpp_3m_sde",
}
"""What stands in KSampler's list, and the catalogue's name of it. At most ten, and forever: workflows carry them."""


def register() -> None:
    """Append our names to ComfyUI's sampler lists, in place, once. Nothing of ComfyUI's own is replaced."""
    for name, entry in NAMES.items():
        setattr(comfy_sampling, f"sample_{name}", sampler_function(SAMPLERS[entry]))
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
                inputs=[_input(name, option) for name, option in family.options.items()],
                outputs=[io.Sampler.Output(display_name="SAMPLER")],
            )

        @classmethod
        def execute(cls, **options) -> io.NodeOutput:
            family.settings(options)  # an inadmissible value is refused here, on the node that has it
            return io.NodeOutput(comfy.samplers.KSAMPLER(sampler_function(family), extra_options=options))

    Node.__name__ = Node.__qualname__ = node_id
    return Node


def _input(name: str, option: Option) -> io.Input:
    """The widget of one option."""
    said = {"default": option.default, "tooltip": f"{option.help}. {option.range.capitalize()}; default {option.default}."}
    if option.choices:
        widget = io.Combo.Input(name, options=list(option.choices), **said)
    elif option.kind is int:
        widget = io.Int.Input(name, min=option.low, max=option.high, **said)
    else:
        widget = io.Float.Input(name, min=option.low, max=option.high, step=option.step, round=False, **said)
    if option.advanced:
        widget.extra_dict = {"advanced": True}  # not an argument yet in ComfyUI 0.3.75
    return widget
