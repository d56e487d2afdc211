"""From the catalogue to ComfyUI: names in every sampler list, and SAMPLER nodes."""
from __future__ import annotations

import logging
from itertools import starmap
from typing import Any, Callable

import comfy.samplers
from comfy.k_diffusion import sampling as comfy_sampling
from comfy_api.latest import io
from torch import Tensor

from ..hosting import events, library
from ..hosting.kinds import kind_for
from ..hosting.library import RULES, Kind
from ..hosting.names import NAMES, NODES, node_id
from ..samplers import FAMILIES, SAMPLERS
from ..samplers.catalogue import Option, Sampler
from ..samplers.denoisers import threshold
from . import canonical, settings
from .host import CATEGORY, advanced, around, sampler_function
from .kinds import SOCKET, needed
from .measuring import Run


def register() -> None:
    """Append our names to ComfyUI's sampler lists, in place, once. What others have there is left alone."""
    # One list under three names, unless another pack has replaced one of them by a copy.
    lists = (comfy.samplers.KSampler.SAMPLERS, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSAMPLER_NAMES)
    for name, entry in NAMES.items():
        there = hasattr(comfy_sampling, f"sample_{name}") or any(name in names for names in lists)
        if there and not listed(name):
            logging.warning("Lambda Solvers: ComfyUI or another pack has a sampler named %s already. It is "
                            "left alone, and ours is not in the lists: use its node", name)
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
    return [_node(FAMILIES[name], title) for name, title in NODES.items()]


def _node(family: Sampler, title: str) -> type[io.ComfyNode]:
    """The SAMPLER node of one family: a widget for every option, and one call."""
    kind = kind_for(family)

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            options = {name: option for name, option in family.options.items() if not kind
                       or name != kind.option}
            return io.Schema(
                node_id=node_id(family.name),
                display_name=f"{title} (Lambda)",
                category=CATEGORY,
                description=f"{family.help}\n\n{family.citation}",
                inputs=[*(_calibration(kind) if kind else []), *starmap(_input, options.items())],
                outputs=[_output()],
            )

        @classmethod
        def execute(cls, measure: str = "auto", calibration: Any = None, **options) -> io.NodeOutput:
            if calibration is not None:
                options[kind.option] = needed(kind, calibration, f"{title} (Lambda)")
            family.settings({**family.stand_ins,
                             **options})  # an inadmissible value is refused here, on its node
            return io.NodeOutput(comfy.samplers.KSAMPLER(calibrated(family, measure), extra_options=options))

    Node.__name__ = Node.__qualname__ = node_id(family.name)
    return Node


def calibrated(sampler: Sampler, how: str | None = None) -> Callable[..., Tensor]:
    """The sampler's function for KSAMPLER; one that needs a calibration finds or measures it first."""
    function, kind = sampler_function(sampler), kind_for(sampler)
    if kind is None:
        return _observed(sampler, function, None)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        if len(sigmas) < 2:
            return x  # nothing to do, so nothing to measure
        given = options.pop(kind.option, None)
        defaults = {name: option.default for name, option in sampler.options.items()}
        run = Run(model, x, sigmas, extra_args or {}, {**sampler.fixed, **defaults, **options})
        with library.provided(kind, run, given, how or settings.rule()) as ready:
            return function(model, x, sigmas, extra_args, callback, disable, **{kind.option: ready},
                            **options)

    return _observed(sampler, sample, canonical.description)


def _observed(sampler: Sampler, function: Callable[..., Tensor],
              describe: Callable | None) -> Callable[..., Tensor]:
    """The function, telling of its runs, and known as ours."""
    sample = events.observed(function, describe)
    sample.lambda_solvers = sampler
    return sample


def _calibration(kind: Kind) -> list[io.Input]:
    """The inputs of a node whose solver needs a calibration, beside the solver's own options."""
    return [
        SOCKET.Input("calibration", optional=True, tooltip=(
            f"From {kind.makes} or Load Calibration. Without: what is attached to the model, or as `measure` "
            "says")),
        io.Combo.Input("measure", options=list(RULES), default=RULES[0], tooltip=(
            f"Without {kind.noun} connected or attached: auto takes a saved file of this model and guidance, "
            "or measures and saves one once, at no prompt in particular; every prompt measures each new "
            "prompt, which is more exact; saved only never measures; never uses none but given ones")),
    ]


def _input(name: str, option: Option) -> io.Input:
    """The widget of one option."""
    said = {"default": option.default, "tooltip": f"{option.help}. {option.range.capitalize()}; default "
                                                  f"{option.default}."}
    if option.choices:
        widget = io.Combo.Input(name, options=list(option.choices), **said)
    elif option.kind is bool:
        widget = io.Boolean.Input(name, **said)
    elif option.kind is int:
        widget = io.Int.Input(name, min=option.low, max=option.high, **said)
    else:
        widget = io.Float.Input(name, min=option.low, max=option.high, step=option.step, round=False, **said)
    return advanced(widget) if option.advanced else widget


def _output() -> io.Output:
    return io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom or SamplerCustomAdvanced")


class FirstStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaFirstStep",
            display_name="First Step",
            category=CATEGORY,
            description="Leaves out a sampler's first evaluation, where x is nothing but noise. afs: "
                        "Dockhorn et al. 2022 (arXiv:2210.05475). Not for img2img.",
            inputs=[
                io.Sampler.Input("sampler", tooltip="A sampler of this pack"),
                io.Combo.Input("mode", options=["afs", "mean"], default="afs", tooltip=(
                    "afs: answered analytically, worth it where sigma_max is very high. mean: from the "
                    "second seed of a prompt on, by the mean of what the model said to the first; kept in "
                    "memory, for one prompt, guidance and size")),
            ],
            outputs=[_output()])

    @classmethod
    def execute(cls, sampler: Any, mode: str) -> io.NodeOutput:
        function = getattr(sampler, "sampler_function", None)
        if not hasattr(function, "lambda_solvers"):
            raise ValueError("First Step wraps samplers of this pack, and this is "
                             f"{getattr(function, '__name__', sampler)}: connect one of the Lambda Solvers "
                             "nodes, or KSamplerSelect with one of our names")
        options = {**sampler.extra_options, "first_step": mode}
        function.lambda_solvers.settings({**function.lambda_solvers.stand_ins, **options})
        return io.NodeOutput(comfy.samplers.KSAMPLER(function, extra_options=options,
                                                     inpaint_options=sampler.inpaint_options))


class Threshold(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaThreshold",
            display_name="Threshold",
            category=CATEGORY,
            description="Keeps the denoised image of every step within bounds, for models of pixels at high "
                        "guidance. Dynamic thresholding: Saharia et al. 2022, Imagen (arXiv:2205.11487).",
            inputs=[
                io.Sampler.Input("sampler", tooltip="Any sampler, ComfyUI's own included"),
                io.Float.Input("quantile", default=0.995, min=0.0, max=1.0, step=0.001, round=False, tooltip=(
                    "Share of an image's values that is kept, where it goes beyond floor: the rest is cut "
                    "off, and the image scaled down to floor. 0: it is clamped to floor, without a scale")),
                io.Float.Input("floor", default=1.0, min=0.01, max=1000.0, step=0.01, round=False, tooltip=(
                    "What the image is kept within, from -floor to floor: 1 for pixels. Latents have no "
                    "known range")),
            ],
            outputs=[_output()])

    @classmethod
    def execute(cls, sampler: Any, quantile: float, floor: float) -> io.NodeOutput:
        if not isinstance(sampler, comfy.samplers.KSAMPLER):
            raise ValueError(f"Threshold wraps ComfyUI's KSAMPLER, and this is a {type(sampler).__name__}: "
                             "connect KSamplerSelect or the node of a sampler")
        return io.NodeOutput(around(sampler, lambda denoised: threshold(denoised, quantile, floor)))
