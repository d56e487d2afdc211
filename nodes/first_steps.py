"""The first step that the model does not answer: the means that are kept, and the nodes that wrap a sampler."""
from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from ..samplers.first_step import MeanAnswer
from . import identity

KEPT = 32
_means: OrderedDict[str, MeanAnswer] = OrderedDict()


def answer_of(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict) -> MeanAnswer:
    """The mean of a model with its patches, at a prompt, guidance, shape and level; an empty one the first time.

    An inpainted image has none: what is outside its mask is not the model's answer.
    """
    if extra_args.get("denoise_mask") is not None:
        return MeanAnswer()
    key = json.dumps([identity.description(model.inner_model), list(x.shape[1:]), float(sigmas[0])])
    _means[key] = _means.pop(key, None) or MeanAnswer()
    while len(_means) > KEPT:
        _means.popitem(last=False)
    return _means[key]


def _wrapper(word: str, title: str, first_step: str, description: str) -> type[io.ComfyNode]:
    class Node(io.ComfyNode):
        sets = {"first_step": first_step}

        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=f"Lambda{word}", display_name=title, category="Lambda Solvers", description=description,
                inputs=[io.Sampler.Input("sampler", tooltip="A sampler of this pack")],
                outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom or SamplerCustomAdvanced")])

        @classmethod
        def execute(cls, sampler: Any) -> io.NodeOutput:
            function = getattr(sampler, "sampler_function", None)
            if not hasattr(function, "lambda_solvers"):
                raise ValueError(f"{title} wraps samplers of this pack, and this is {getattr(function, '__name__', sampler)}: "
                                 "connect one of the Lambda Solvers nodes, or KSamplerSelect with one of our names")
            options = {**sampler.extra_options, **cls.sets}
            function.lambda_solvers.settings({**function.lambda_solvers.stand_ins, **options})
            return io.NodeOutput(comfy.samplers.KSAMPLER(function, extra_options=options, inpaint_options=sampler.inpaint_options))

    Node.__name__ = Node.__qualname__ = word
    return Node


NODES: list[type[io.ComfyNode]] = [
    _wrapper("AnalyticFirstStep", "Analytic First Step", "afs",
             "Leaves out a sampler's first evaluation: at full noise the answer is set analytically. Dockhorn et al. 2022 "
             "(arXiv:2210.05475). Worth it where sigma_max is very high; not for img2img."),
    _wrapper("MeanFirstStep", "Mean First Step", "mean",
             "Leaves out a sampler's first evaluation from the second seed of a prompt on: the answer is the mean of what the model "
             "said to the first. Kept in memory, for one prompt, guidance and size; not for img2img."),
]
