"""The conditions that `auto` measures at: nobody's prompt, the same for every run of a model at a guidance.

What one prompt was measured for would else depend on which one came first: the same workflow and seed made
other images, 0.16 of their standard deviation apart, in another folder. A prompt's place is taken by random
numbers of a text's size, a negative's by zeros, and the guidance by the nearest of a few. Of the fixed
choices tried on the emoji model (4 prompts, 5 and 8 evaluations, docs/notes.md) this one was the best with
guidance, and behind statistics of another prompt by a tenth to a fifth, without guidance too. Who wants more
measures every prompt, or one by hand.
"""
from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Mapping, NamedTuple

import torch
from torch import Tensor

NAME = "any"  # how the digest of these conditions begins
LENGTHS = (1, 4, 8, 77, 256, 512)
"""Tokens: the largest that a text has. They are few, so that a longer prompt seldom counts as another model,
and those that encoders pad a text to, which some models want."""
NORMAL_MEDIAN = 0.6745  # of |v|


class Text(NamedTuple):
    """Random numbers, or zeros (scale 0), in the place of an encoded text."""

    shape: tuple[int, ...]
    scale: float

    @classmethod
    def like(cls, text: Tensor, negative: bool) -> Text:
        """Of its size: the tokens to a length of LENGTHS, the median of |v| to a power of 2. Tokens of zeros
        do not count."""
        *_, width = shape = (1, *text.shape[1:])
        if len(shape) > 2:
            shape = (*shape[:-2], max(n for n in LENGTHS if n <= max(1, shape[-2])), width)
        told = text.detach().abs().reshape(-1, width)
        told = told[told.amax(1) > 0].float()
        if negative or not len(told):
            return cls(shape, 0.0)
        return cls(shape, 2.0 ** round(math.log2(float(told.median()) / NORMAL_MEDIAN)))

    def made(self, seed: int) -> Tensor:
        return self.scale * torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


def guidance(scale: float) -> float:
    """The scale to measure at: the nearest in steps of a quarter below 2, a half below 5, 1 below 10, and 2
    from there."""
    step = next((step for limit, step in ((2.0, 0.25), (5.0, 0.5), (10.0, 1.0)) if abs(scale) < limit), 2.0)
    return step * round(scale / step) if math.isfinite(scale) else scale


def digest(texts: Mapping[str, Mapping[str, Text]]) -> str:
    """The name of these conditions, which says what of a run they depend on: hardly anything.

    Not the scale: a prompt may lie at the border of two powers of 2, and its neighbour beyond.
    """
    told = {name: sorted((key, text.shape) for key, text in found.items())
            for name, found in texts.items() if not negative(name)}
    return f"{NAME}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]}"


def negative(name: str) -> bool:
    """Whether a condition of this name is what guidance leads away from."""
    return "negative" in name


def instead(about: Mapping[str, Any]) -> dict[str, Any]:
    """A run's description, as if it were of these conditions."""
    return {**about, "conditions": about["any"], "guidance": guidance(about["guidance"]),
            "distilled": [scale if scale is None else guidance(scale) for scale in about["distilled"]]}


def named(about: Mapping[str, Any]) -> bool:
    """Whether a description is of these conditions."""
    return str(about.get("conditions", "")).startswith(NAME)


def same(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a file is of just what is wanted (`instead`): near ones would depend on what else was
    measured."""
    return all(about.get(key) == wanted[key] for key in ("conditions", "guidance", "distilled"))
