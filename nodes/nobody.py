"""The conditions of hosting/canonical.py, nobody's prompt, on a guider of ComfyUI's."""
from __future__ import annotations

import uuid
from contextlib import contextmanager
from typing import Any, Iterator, Mapping

import comfy.samplers
import torch
from torch import Tensor

from ..hosting.canonical import Text, digest, guidance, negative
from . import identity

TEXTS = ("cross_attn", "pooled_output", "conditioning_llama3")  # what encoders say of a prompt


def description(guider: Any) -> dict[str, Any]:
    """Which model a guider samples, and at what; and what `auto` would measure at in place of its prompt."""
    texts = {name: texts for name, (texts, _) in _texts(guider).items()}
    return {**identity.description(guider), "any": digest(texts)}


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
    return {name: ({key: Text.like(cond[key], negative(name)) for key in TEXTS
                    if isinstance(cond.get(key), Tensor)}, cond)
            for name, cond in firsts.items()}


def _guidance(cond: Mapping[str, Any]) -> list[float]:
    """The scale that the model itself is told (FluxGuidance), if it is told one."""
    return [guidance(float(cond["guidance"]))] if cond.get("guidance") is not None else []


def _cond(seed: int, texts: Mapping[str, Text], cond: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """One condition of ComfyUI's, for all of the picture and the whole run."""
    told = {key: text.made(seed).to(run.x.device) for key, text in texts.items()}
    return {**told, **{"guidance": scale for scale in _guidance(cond)}, "model_conds": {},
            "uuid": uuid.uuid4()}
