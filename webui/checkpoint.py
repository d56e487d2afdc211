"""Which model a job of the WebUI's samples: its checkpoint, what has been put onto it, and its prompts."""
from __future__ import annotations

import hashlib
from typing import Any, Iterator, Mapping, Sequence

import torch
from modules import prompt_parser, shared
from torch import Tensor

from ..hosting import canonical, fingerprint
from ..hosting.canonical import Text, digest
from ..samplers.learning.storage import plain

POOLED = 1280
"""Of an SDXL condition's vector, what the text says; behind it are the sizes. Of others all of it is text."""


def description(p: Any, extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """As a file says what it was measured on; the same in ComfyUI for the same checkpoint, without LoRAs."""
    name, digits = checkpoint()
    loras = [lora(items) for items in networks(p)]
    return {"model": f"{name}-{digits}", "fingerprint": digits,
            "patches": [*map(plain, [*(patch for patch, _ in loras), *changed()])],
            "strengths": [strength for _, strengths in loras for strength in strengths],
            "guidance": guidance(p, extra_args), "distilled": distilled(extra_args),
            "conditions": conditions(p, extra_args),
            "any": digest({"positive": texts(positive(extra_args), False)})}


def networks(p: Any) -> list[list[str]]:
    """What a prompt says of every LoRA: its name, and strengths behind it. The second pass may have its
    own."""
    told = getattr(p, "hr_extra_network_data", None) if getattr(p, "is_hr_pass", False) else None
    if told is None:
        told = p.extra_network_data or {}
    return [network.items for name in ("lora", "lyco") for network in told.get(name, [])]


def lora(items: Sequence[str]) -> tuple[str, list[float]]:
    """How a LoRA is named, and its strengths; what else extensions read from a prompt belongs to the name."""
    strengths, others = [], []
    for item in items[1:]:
        key, _, value = item.rpartition("=")
        try:
            strengths.append(float(value)) if key in ("", "te", "unet", "dyn") else others.append(item)
        except ValueError:
            others.append(item)
    return " ".join(["LoRA", items[0], *others]), strengths


def path(model_wrap: Any) -> str:
    """The Gaussian path of the model: "flow" where x = (1 - sigma) x0 + sigma eps, else "ve"."""
    if hasattr(model_wrap, "predictor"):  # Forge
        return "flow" if model_wrap.predictor.prediction_type == "const" else "ve"
    return "flow" if getattr(model_wrap.inner_model, "is_sd3", False) else "ve"


def unet() -> Any:
    """The patched network of Forge and reForge; None in A1111, which has none."""
    return getattr(getattr(shared.sd_model, "forge_objects", None), "unet", None)


def checkpoint() -> tuple[str, str]:
    """The class of the model, and its fingerprint: of Forge's weights, which ComfyUI's are too; else of the
    file."""
    patched = unet()
    if patched is None:
        digits = shared.sd_model.sd_model_hash or shared.sd_model.sd_checkpoint_info.hash  # with --no-hashing
        return type(shared.sd_model).__name__, digits
    config = getattr(shared.sd_model, "model_config", None) or patched.model.model_config
    kept = getattr(patched, "lora_loader", patched).backup
    originals = {name: getattr(value, "weight", value) for name, value in kept.items()}
    name = type(config).__name__
    return name, fingerprint.of(name, fingerprint.stored(patched.model), originals)


def changed() -> list[str]:
    """The functions that extensions have put into the model, by their names."""
    options = getattr(unet(), "model_options", {})
    return sorted({getattr(function, "__qualname__", type(function).__qualname__)
                   for function in _callables(options)})


def guidance(p: Any, extra_args: Mapping[str, Any]) -> float:
    """The scale of a job; Forge's second pass has one of its own."""
    own = getattr(p, "hr_cfg", None) if getattr(p, "is_hr_pass", False) else None
    return float(extra_args["cond_scale"] if own is None else own)


def positive(extra_args: Mapping[str, Any]) -> Any:
    """The first prompt's condition: a tensor, or several by name."""
    return extra_args["cond"].batch[0][0].schedules[0].cond


def texts(cond: Any, negative: bool) -> dict[str, Text]:
    """What nobody's prompt is in the place of a condition (hosting/canonical.py), by ComfyUI's names."""
    if isinstance(cond, Tensor):  # ComfyUI has the token besides that ends the text; no model is told it
        return {"cross_attn": Text.like(cond[None], negative),
                "pooled_output": Text.like(cond[-1:], negative)}
    told = {"cross_attn": Text.like(cond["crossattn"][None], negative)}
    if "vector" in cond:
        words = POOLED if shared.sd_model.is_sdxl else None
        told["pooled_output"] = Text.like(cond["vector"][None, :words], negative)
    return told


def distilled(extra_args: Mapping[str, Any]) -> list[float]:
    """The scale that the model itself is told, if it is told one."""
    cond = positive(extra_args)
    return [_told(cond)] if isinstance(cond, Mapping) and "guidance" in cond else []


def _told(cond: Mapping[str, Any]) -> float:
    return float(cond["guidance"].flatten()[0])


def conditions(p: Any, extra_args: Mapping[str, Any]) -> str:
    """Eight hex digits for the prompts; at guidance 1 the negative ones say nothing."""
    told = hashlib.sha256()
    sides = [extra_args["cond"]] + [extra_args["uncond"]] * (guidance(p, extra_args) != 1.0)
    for tensor in _tensors(sides):
        told.update(fingerprint.text(tensor))
    return told.hexdigest()[:8]


def scheduled(extra_args: Mapping[str, Any]) -> bool:
    """Whether prompts change from step to step, or are several at once."""
    prompts = [each.schedules for several in extra_args["cond"].batch for each in several]
    several = any(len(each) > 1 for each in extra_args["cond"].batch)
    return several or any(len(each) > 1 for each in [*prompts, *(extra_args["uncond"] or [])])


def nobody(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of a run in which nobody's prompt is in the place of every image's."""
    cond, uncond = extra_args["cond"], extra_args["uncond"]
    made = _made(positive(extra_args), False)
    parsed = prompt_parser.ComposableScheduledPromptConditioning
    entry = cond.batch[0][0].schedules[0]._replace(cond=made)
    batch = [[parsed([entry])] for _ in cond.batch]
    other = None if uncond is None else [
        [uncond[0][0]._replace(cond=_made(uncond[0][0].cond, True))] for _ in uncond]
    return {"cond": prompt_parser.MulticondLearnedConditioning(cond.shape, batch), "uncond": other}


def few(extra_args: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The conditions of so many of a run's images, the first ones."""
    cond, uncond, image = (extra_args[name] for name in ("cond", "uncond", "image_cond"))
    return {"cond": prompt_parser.MulticondLearnedConditioning((count,), cond.batch[:count]),
            "uncond": None if uncond is None else uncond[:count],
            "image_cond": image[:count] if isinstance(image, Tensor) else image}


def _made(cond: Any, negative: bool) -> Any:
    """Random numbers in the place of a condition's texts, zeros of a negative one's; what else it says is
    kept."""
    found = {name: text.made(int(not negative)) for name, text in texts(cond, negative).items()}
    if isinstance(cond, Tensor):
        return found["cross_attn"][0].to(cond)
    made = {**cond, "crossattn": found["cross_attn"][0].to(cond["crossattn"])}
    if "vector" in cond:
        pooled, vector = found["pooled_output"][0].to(cond["vector"]), cond["vector"].clone()
        vector[:len(pooled)] = pooled
        made["vector"] = vector
    if "guidance" in cond:
        made["guidance"] = torch.full_like(cond["guidance"], canonical.guidance(_told(cond)))
    return type(cond)(made)


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors of conditions, however the WebUI's classes nest them."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for name in sorted(content):
            yield from _tensors(content[name])
    elif isinstance(content, (list, tuple)):
        for part in content:
            yield from _tensors(part)
    elif hasattr(content, "batch"):
        yield from _tensors(content.batch)
    elif hasattr(content, "schedules"):
        yield from _tensors(content.schedules)


def _callables(content: Any) -> Iterator[Any]:
    """The functions in nested dicts and lists."""
    if isinstance(content, Mapping):
        for part in content.values():
            yield from _callables(part)
    elif isinstance(content, (list, tuple)):
        for part in content:
            yield from _callables(part)
    elif callable(content):
        yield content
