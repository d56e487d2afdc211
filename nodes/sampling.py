"""From the catalogue to ComfyUI: names in every sampler list, and SAMPLER nodes."""
from __future__ import annotations

import logging
from functools import partial
from itertools import starmap
from typing import Any, Callable

import comfy.samplers
from comfy.k_diffusion import sampling as comfy_sampling
from comfy_api.latest import io
from torch import Tensor

from ..hosting import events, library
from ..hosting.kinds import kind_for
from ..hosting.library import RULES, Kind
from ..hosting.names import EVERYDAY, NAMES, NODES, node_id
from ..samplers import FAMILIES, SAMPLERS
from ..samplers.catalogue import Option, Sampler
from ..samplers.denoisers import THRESHOLDS
from . import nobody, settings
from .calibration_socket import SOCKET, needed
from .guided_run import Run
from .host import CATEGORY, SPECIAL, advanced, around, guided_by_step, one_of, sampler_function


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
                category=CATEGORY if family.name in EVERYDAY else SPECIAL,
                description=f"{family.help}\n\n{family.citation}",
                inputs=[*(_sockets(kind) if kind else []), *starmap(_input, options.items()),
                        *(_measure(kind) if kind else [])],
                outputs=[_output()],
            )

        @classmethod
        def execute(cls, measure: str = "auto", calibration: Any = None, **options) -> io.NodeOutput:
            one_of("measure", measure, RULES)
            if calibration is not None:
                options[kind.option] = needed(kind, calibration, f"{title} (Lambda)")
            family.settings({**family.stand_ins,
                             **options})  # an inadmissible value is refused here, on its node
            return io.NodeOutput(comfy.samplers.KSAMPLER(calibrated(family, measure), extra_options=options))

    Node.__name__ = Node.__qualname__ = node_id(family.name)
    return Node


def calibrated(sampler: Sampler, how: str | None = None) -> Callable[..., Tensor]:
    """The sampler's function for KSAMPLER, known as ours and telling of its runs; one that needs a
    calibration finds or measures it first."""
    function, kind = sampler_function(sampler), kind_for(sampler)

    def prepared(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        if len(sigmas) < 2:
            return x  # nothing to do, so nothing to measure
        given = options.pop(kind.option, None)
        defaults = {name: option.default for name, option in sampler.options.items()}
        run = Run(model, x, sigmas, extra_args or {}, {**sampler.fixed, **defaults, **options})
        with library.provided(kind, run, given, how or settings.rule()) as ready:
            return function(model, x, sigmas, extra_args, callback, disable, **{kind.option: ready},
                            **options)

    sample = events.observed(prepared, nobody.description) if kind else events.observed(function, None)
    sample.lambda_solvers = sampler
    return sample


def _condition(option: Option) -> str:
    """When an option counts, before what it does."""
    wanted = " and ".join(f"{name} {str(value).lower() if isinstance(value, bool) else value}"
                          for name, value in option.where)
    return f"For {wanted} alone. " if wanted else ""


def _sockets(kind: Kind) -> list[io.Input]:
    """The socket of a node whose solver needs a calibration, beside the solver's own options."""
    return [SOCKET.Input("calibration", optional=True, tooltip=(
        f"From {kind.makes} or Load Calibration. Without: what is attached to the model, or as "
        "`measure` says"))]


def _measure(kind: Kind) -> list[io.Input]:
    return [io.Combo.Input("measure", optional=True, options=list(RULES), default=RULES[0], tooltip=(
        f"Without {kind.noun} connected or attached: auto takes a saved file of this model and guidance, or "
        "measures and saves one once, at no prompt in particular; every prompt measures each new prompt, "
        "which is more exact; saved only never measures"))]


def _input(name: str, option: Option) -> io.Input:
    """The widget of one option."""
    said = {"default": option.default, "tooltip": f"{_condition(option)}{option.help}. "
                                                  f"{option.range.capitalize()}; default {option.default}."}
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


class SamplerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaOptions",
            display_name="Sampler Options",
            category=SPECIAL,
            description="Changes what a sampler gets for the model's answers: all kept within bounds "
                        "(dynamic: Saharia et al. 2022, Imagen, arXiv:2205.11487), or guided by CFG++ "
                        "(Chung et al. 2024, arXiv:2406.08070).",
            inputs=[
                io.Sampler.Input("sampler", tooltip=(
                    "Any sampler; cfg_pp not for DPM-Solver-v3, Fitted and AMED")),
                io.Combo.Input("threshold", options=list(THRESHOLDS), default="off", tooltip=(
                    "Keeps the denoised image of every step within bounds, for models of pixels at high "
                    "guidance. dynamic: what goes beyond the quantile is cut off, and the image scaled "
                    "down to bound; static: it is clamped to bound")),
                io.Float.Input("quantile", default=0.995, min=0.01, max=1.0, step=0.001, round=False,
                               tooltip=("Of the dynamic threshold: the share of an image's values that is "
                                        "kept, where it goes beyond bound")),
                io.Float.Input("bound", default=1.0, min=0.01, max=1000.0, step=0.01, round=False, tooltip=(
                    "What a threshold keeps the image within, from -bound to bound: 1 for pixels. Latents "
                    "have no known range")),
                io.Boolean.Input("cfg_pp", optional=True, default=False, tooltip=(
                    "CFG++: guidance as strong as the step is short, so that it moves the image and leaves "
                    "the noise alone. cfg is then its scale: from 0 to 1 as published, higher guides "
                    "more")),
            ],
            outputs=[_output()])

    @classmethod
    def execute(cls, sampler: Any, threshold: str, quantile: float, bound: float,
                cfg_pp: bool = False) -> io.NodeOutput:
        if not isinstance(sampler, comfy.samplers.KSAMPLER):
            raise ValueError("Sampler Options wraps ComfyUI's KSAMPLER, and this is a "
                             f"{type(sampler).__name__}: connect KSamplerSelect or the node of a sampler")
        if cfg_pp:
            sampler = guided_by_step(sampler)
        bounded = THRESHOLDS[one_of("threshold", threshold, THRESHOLDS)]
        return io.NodeOutput(around(sampler, partial(bounded, quantile=quantile, bound=bound))
                             if bounded else sampler)
