"""Which model a guider samples: its checkpoint, what has been patched onto it, and its prompts; stable over
runs, precision and offloading."""
from __future__ import annotations

import functools
import hashlib
import math
import types
from typing import Any, Callable, Iterator, Mapping

import comfy.clip_vision
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.controlnet import ControlBase
from comfy.hooks import HookGroup
from torch import Tensor

from ..hosting import fingerprint as checkpoint
from ..samplers.learning.storage import plain

LEVELS = (0.05, 0.3, 0.9, 3.0, 10.0)  # at which a sampling class is looked at
PACK = __name__.rpartition(".nodes.")[0] + "."  # this pack's own modules
CACHES = ("easycache", "lazycache")  # ComfyUI's wrappers that answer in the model's place, by their keys
SAME = (*CACHES, "torch.compile")  # wrappers that leave the model what it is


class Ruled(comfy.samplers.CFGGuider):
    """A guider of this pack that adds something to ComfyUI's rule."""

    rule: str  # what, as a file says it


def description(guider: Any) -> dict[str, Any]:
    """The model, guidance and prompt of a guider, as a file says what it was measured on."""
    patcher = guider.model_patcher
    digits = fingerprint(patcher)
    return {"model": f"{type(patcher.model.model_config).__name__}-{digits}", "fingerprint": digits,
            "patches": [*map(plain, [*patches(patcher), *guiding(guider)])], "strengths": strengths(patcher),
            "guidance": guidance(guider), "distilled": distilled(guider), "conditions": conditions(guider)}


def fingerprint(patcher: Any) -> str:
    """That of the unpatched checkpoint (hosting/fingerprint.py)."""
    originals = {**{name: kept[0] for name, kept in patcher.hook_backup.items()},
                 **{name: kept.weight for name, kept in patcher.backup.items()}}
    name = type(patcher.model.model_config).__name__
    return checkpoint.of(name, checkpoint.stored(patcher.model), originals)


def patches(patcher: Any) -> list[str]:
    """What makes the model another one than its checkpoint, a line each; the same in every session."""
    return [*_weights(patcher), *_injected(patcher), *changed(patcher), *_sampling(patcher)]


def _weights(patcher: Any) -> Iterator[str]:
    """A line for the weight patches (LoRAs), at any strengths: how many weights, and a hash of the values."""
    if patcher.patches:
        digest = hashlib.sha256()
        for name in _patched(patcher):
            digest.update(name.encode())
            for _, content, *_ in patcher.patches[name]:
                for tensor in _tensors(content):
                    digest.update(checkpoint.signs(tensor))
        yield f"{len(patcher.patches)} weights ({digest.hexdigest()[:8]})"


def _injected(patcher: Any) -> Iterator[str]:
    """A line for what comes around the weights when a run begins (a LoRA that bypasses them, functions of
    single weights), with a hash of the tensors and numbers that it holds."""
    around = {**patcher.injections, "weight functions": [*patcher.weight_wrapper_patches.items()]}
    for kind, what in around.items():
        if not what:
            continue
        held = [*_held(what)]
        tensors = [thing for thing in held if isinstance(thing, Tensor)]
        digest = hashlib.sha256(repr([thing for thing in held if not isinstance(thing, Tensor)]).encode())
        for tensor in tensors[::max(1, len(tensors) // checkpoint.TENSORS)]:
            digest.update(checkpoint.signs(tensor))
        yield f"injected {kind} ({digest.hexdigest()[:8]})"


def strengths(patcher: Any) -> list[float]:
    """The strength of every patch on the weights that `_weights` looks at, in their order."""
    return [float(strength) for name in _patched(patcher) for strength, *_ in patcher.patches[name]]


def _patched(patcher: Any) -> list[str]:
    """Some of the weights that are patched, always the same ones."""
    names = sorted(patcher.patches)
    return names[::max(1, len(names) // checkpoint.TENSORS)]


def changed(patcher: Any) -> list[str]:
    """The functions that other nodes put into the model (FreeU, RescaleCFG, ...), by their names alone: not
    what they were set to."""
    names = {f"{name} replaced" for name in patcher.object_patches if name != "model_sampling"}
    wrappers = [functions for keyed in patcher.wrappers.values() for key, functions in keyed.items()
                if key not in SAME]
    for function in _callables([patcher.model_options, wrappers]):
        module, name = (getattr(function, word, getattr(type(function), word))
                        for word in ("__module__", "__qualname__"))
        if not str(module).startswith(PACK):
            names.add(f"{name.replace('.<locals>', '')} of {str(module).rpartition('.')[2]}")
    return sorted(names)


def _sampling(patcher: Any) -> Iterator[str]:
    """How the network is asked and read, if a node has changed that; its levels alone make it no other
    model."""
    if "model_sampling" not in patcher.object_patches:
        return
    now = patcher.get_model_object("model_sampling")
    own = patcher.object_patches_backup.get("model_sampling", patcher.model.model_sampling)
    if _asked(now) != _asked(own):
        classes = ", ".join(c.__name__ for c in type(now).__bases__)
        yield f"sampled as {classes} ({hashlib.sha256(_asked(now)).hexdigest()[:8]})"


def _asked(sampling: Any) -> bytes:
    """At a few levels: what the network is told of sigma and of x = 1, and what is made of the answers 0 and
    1."""
    sigma, one = torch.tensor(LEVELS), torch.ones(len(LEVELS), 1, 1, 1)
    told = [sampling.timestep(sigma), sampling.calculate_input(sigma, one),
            *(sampling.calculate_denoised(sigma, answer * one, one) for answer in (0.0, 1.0))]
    return " ".join(f"{value:.3g}"
                    for value in torch.cat([part.flatten().float().cpu() for part in told]).tolist()).encode()


def guiding(guider: Any) -> list[str]:
    """A line for a guider with a rule of its own (two scales, perpendicular negatives, ...): its class and
    its numbers."""
    if isinstance(guider, Ruled):
        return [f"guided by {guider.rule}"]
    if _plain(guider):
        return []
    numbers = [f"{name} {value:g}" for name, value in _numbers(guider, switches=True).items()]
    if math.isnan(guidance(guider)):
        numbers.append(f"cfg {hashlib.sha256(repr(_listed(guider.cfg)).encode()).hexdigest()[:8]}")
    models = [fingerprint(value) for _, value in sorted(vars(guider).items())
              if isinstance(value, comfy.model_patcher.ModelPatcher) and value is not guider.model_patcher]
    return [f"guided by {type(guider).__name__}: {', '.join([*numbers, *models])}"]


def _plain(guider: Any) -> bool:
    """Whether a guider goes by ComfyUI's own rule, cond + (scale - 1) (cond - uncond)."""
    kind = type(guider)
    return kind.predict_noise is comfy.samplers.CFGGuider.predict_noise or kind.__module__.startswith(PACK)


def guidance(guider: Any) -> float:
    """The scale of a guider; NaN for one that changes from step to step: several numbers, a function."""
    try:
        return float(guider.cfg)
    except (TypeError, ValueError, RuntimeError):  # the last two: a tensor of several
        return math.nan


def _listed(cfg: Any) -> Any:
    """A scale of several numbers as they are, a function by its name."""
    if callable(cfg) and not isinstance(cfg, Tensor):
        return getattr(cfg, "__qualname__", type(cfg).__qualname__)
    return cfg.tolist() if hasattr(cfg, "tolist") else cfg


def distilled(guider: Any) -> list[float | None]:
    """The scales that the model itself is told (FluxGuidance), where conditions name any; None: of none."""
    told = {cond["guidance"] for conds in _used(guider).values() for cond in conds if "guidance" in cond}
    return [None] * (None in told) + sorted(float(scale) for scale in told if scale is not None)


def _used(guider: Any) -> dict[str, list[dict]]:
    """The conditions that are evaluated: at guidance 1 ComfyUI leaves the negative ones out."""
    leaves_out = not guider.model_options.get("disable_cfg1_optimization", False)
    if _plain(guider) and leaves_out and math.isclose(guidance(guider), 1.0):
        return {name: conds for name, conds in guider.original_conds.items() if name != "negative"}
    return guider.original_conds


def without_caches(model_options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options without the wrappers that answer in its place."""
    transformer = model_options.get("transformer_options", {})
    wrappers = {kind: {key: functions for key, functions in keyed.items() if key not in CACHES}
                for kind, keyed in transformer.get("wrappers", {}).items()}
    return {**model_options, "transformer_options": {**transformer, "wrappers": wrappers}}


def conditions(guider: Any) -> str:
    """Eight hex digits for the prompts and whatever else conditions a guider, but for `distilled` scales."""
    digest = hashlib.sha256()
    for name, conds in sorted(_used(guider).items()):
        for cond in conds:
            digest.update(name.encode())
            for part in _told({key: value for key, value in cond.items() if key != "guidance"}):
                digest.update(part)
    return digest.hexdigest()[:8]


def _told(content: Any) -> Iterator[bytes]:
    """What a condition says, in a form that does not depend on precision: its numbers, words, and the signs
    of its tensors."""
    if isinstance(content, Tensor):
        yield checkpoint.text(content)
    elif isinstance(content, (int, float, str)):
        yield str(content).encode()
    elif isinstance(content, (tuple, list)):
        for part in content:
            yield from _told(part)
    elif isinstance(content, dict):
        for key in sorted(content, key=str):
            yield str(key).encode()
            yield from _told(content[key])
    elif isinstance(content, HookGroup):
        for hook in content.hooks:
            frames = [(frame.strength, frame.start_percent, frame.guarantee_steps)
                      for frame in hook.hook_keyframe.keyframes]
            yield from _told([type(hook).__name__, frames, _numbers(hook),
                              *list(_tensors(getattr(hook, "weights", None)))[:checkpoint.TENSORS]])
    elif isinstance(content, ControlBase):
        yield from _told([type(content).__name__, content.strength, content.timestep_percent_range,
                          content.cond_hint_original,
                          content.previous_controlnet])
        for network in (getattr(content, name, None)
                        for name in ("control_model", "t2i_model", "control_weights")):
            if network is not None:
                yield from checkpoint.network(
                    network if isinstance(network, Mapping) else checkpoint.stored(network), {})
    elif isinstance(content, comfy.clip_vision.Output):
        yield from _told(vars(content))
    else:
        for tensor in _tensors(content):
            yield from _told(tensor)


def _numbers(thing: Any, switches: bool = False) -> dict[str, float]:
    """The numbers that an object carries, and its switches if asked: those of a hook change once it was
    used."""
    return {name: value for name, value in sorted(vars(thing).items())
            if isinstance(value, (int, float)) and (switches or not isinstance(value, bool))}


def _callables(content: Any) -> Iterator[Callable]:
    """The functions in nested dicts and lists."""
    if isinstance(content, Mapping):
        for part in content.values():
            yield from _callables(part)
    elif isinstance(content, (tuple, list)):
        for part in content:
            yield from _callables(part)
    elif isinstance(content, functools.partial):
        yield from _callables(content.func)
    elif callable(content):
        yield content


def _held(thing: Any, depth: int = 20) -> Iterator[Any]:
    """The tensors in things, the numbers and words beside them in lists and tables, and what functions close
    over; not those of networks, which may be the model's own."""
    if isinstance(thing, (Tensor, int, float, str)):
        yield thing
    elif isinstance(thing, (torch.nn.Module, comfy.model_patcher.ModelPatcher)) or not depth:
        return
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _held(part, depth - 1)
    elif isinstance(thing, Mapping):
        yield from _held([*thing.items()], depth - 1)
    elif isinstance(thing, types.FunctionType):
        yield from _held([cell.cell_contents for cell in thing.__closure__ or ()], depth - 1)
    elif isinstance(thing, types.MethodType):
        yield from _held(thing.__self__, depth - 1)
    else:  # what it counts for itself may change from run to run
        own = [value for value in getattr(thing, "__dict__", {}).values()
               if not isinstance(value, (int, float, str))]
        yield from _held(own, depth - 1)


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors of one patch, whatever holds them (a tuple, a dict, or an adapter with weights)."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (tuple, list)):
        for part in content:
            yield from _tensors(part)
    elif isinstance(content, Mapping):
        for key in sorted(content, key=str):
            yield from _tensors(content[key])
    elif hasattr(content, "weights"):
        yield from _tensors(content.weights)
