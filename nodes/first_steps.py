"""What models have answered to the first step of earlier seeds."""
from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from torch import Tensor

from ..samplers.denoisers import MeanAnswer
from . import identity

KEPT = 32
_means: OrderedDict[str, MeanAnswer] = OrderedDict()


def answer_of(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict) -> MeanAnswer:
    """The mean of a model with its patches, at a prompt, guidance, shape and level; an empty one the first
    time.

    An inpainted image has none: what is outside its mask is not the model's answer.
    """
    if extra_args.get("denoise_mask") is not None:
        return MeanAnswer()
    key = json.dumps([identity.description(model.inner_model), list(x.shape[1:]), float(sigmas[0])])
    _means[key] = _means.pop(key, None) or MeanAnswer()
    while len(_means) > KEPT:
        _means.popitem(last=False)
    return _means[key]
