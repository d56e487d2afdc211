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
import uuid
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, NamedTuple

import comfy.samplers
import torch
from torch import Tensor

NAME = "any"  # how the digest of these conditions begins
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 77, 128, 256, 512)
"""Tokens: the largest that a text has, so that a longer prompt seldom counts as another model."""
TEXTS = ("cross_attn", "pooled_output", "conditioning_llama3")  # what encoders say of a prompt
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


def digest(guider: Any) -> str:
    """The name of these conditions, which says what of a run they depend on: hardly anything."""
    told = {name: sorted(texts.items()) for name, (texts, _) in _texts(guider).items() if not _negative(name)}
    return f"{NAME}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]}"


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


@contextmanager
def conditions(run: Any) -> Iterator[None]:
    """The guider of a run under these conditions, and again as it was; ValueError where a model takes
    none."""
    guider = run.guider
    before = guider.conds, guider.cfg
    made = {name: [_cond(k, texts, cond, run)]
            for k, (name, (texts, cond)) in enumerate(sorted(_texts(guider).items()))}
    try:
        guider.conds = comfy.samplers.process_conds(
            guider.inner_model, run.x, made, run.x.device, latent_image=torch.zeros_like(run.x),
            seed=run.extra_args.get("seed"))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as fault:  # this model's own code
        raise ValueError("auto measures at nobody's prompt, and this model takes none without more than a "
                         f"text ({type(fault).__name__}: {fault}): set measure to every prompt") from fault
    guider.cfg = guidance(guider.cfg)
    try:
        yield
    finally:
        guider.conds, guider.cfg = before


def _texts(guider: Any) -> dict[str, tuple[dict[str, Text], Mapping[str, Any]]]:
    """The texts that each of a guider's conditions begins with, and that condition."""
    firsts = {name: conds[0] for name, conds in guider.original_conds.items() if conds}
    return {name: ({key: Text.like(cond[key], _negative(name)) for key in TEXTS
                    if isinstance(cond.get(key), Tensor)}, cond)
            for name, cond in firsts.items()}


def _negative(name: str) -> bool:
    return "negative" in name


def _guidance(cond: Mapping[str, Any]) -> list[float]:
    """The scale that the model itself is told (FluxGuidance), if it is told one."""
    return [guidance(float(cond["guidance"]))] if cond.get("guidance") is not None else []


def _cond(seed: int, texts: Mapping[str, Text], cond: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """One condition of ComfyUI's, for all of the picture and the whole run."""
    told = {key: text.made(seed).to(run.x.device) for key, text in texts.items()}
    return {**told, **{"guidance": scale for scale in _guidance(cond)}, "model_conds": {},
            "uuid": uuid.uuid4()}
