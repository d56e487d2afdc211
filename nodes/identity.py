"""Which checkpoint a MODEL is, and what has been patched onto it: stable over runs, precision and offloading."""
from __future__ import annotations

import hashlib
from typing import Any, Iterator

import torch
from torch import Tensor

TENSORS, VALUES = 16, 64  # what is sampled: the signs of so many values of so many tensors


def fingerprint(patcher: Any) -> str:
    """Twelve hex digits for the unpatched checkpoint: its class, its tensors' names and shapes, and signs of its values.

    Signs, because they survive every floating-point format: the float32, float16 and float8 file of a checkpoint have one
    fingerprint, a fine-tune of it another.
    """
    weights = {name: value for name, value in patcher.model.state_dict().items() if name.startswith("diffusion_model.")}
    digest = hashlib.sha256(type(patcher.model.model_config).__name__.encode())
    for name in sorted(weights):
        digest.update(f"{name}{list(weights[name].shape)}".encode())
    large = sorted((name for name in weights if weights[name].is_floating_point() and weights[name].ndim > 1),
                   key=lambda name: (-weights[name].numel(), name))[:256]
    for name in large[::max(1, len(large) // TENSORS)][:TENSORS]:
        backup = patcher.backup.get(name)
        digest.update(_signs(weights[name] if backup is None else backup.weight))
    return digest.hexdigest()[:12]


def patches(patcher: Any) -> list[str]:
    """One line for every set of weight patches (LoRAs): how many weights, at what strength, and a hash of their values."""
    sets: dict[float, list[str]] = {}
    for name in sorted(patcher.patches):
        for strength, *_ in patcher.patches[name]:
            sets.setdefault(float(strength), []).append(name)
    lines = []
    for strength, names in sorted(sets.items()):
        digest = hashlib.sha256()
        for name in names[::max(1, len(names) // TENSORS)]:
            digest.update(name.encode())
            for value, content, *_ in patcher.patches[name]:
                if float(value) == strength:
                    for tensor in _tensors(content):
                        digest.update(_signs(tensor))
        lines.append(f"{len(set(names))} weights at strength {strength:g} ({digest.hexdigest()[:8]})")
    return lines


def conditions(guider: Any) -> str:
    """Eight hex digits for the prompts and whatever else conditions a guider: the signs of all their tensors."""
    digest = hashlib.sha256()
    for name in sorted(guider.original_conds):
        for cond in guider.original_conds[name]:
            for key in sorted(cond):
                digest.update(f"{name}.{key}".encode())
                if isinstance(cond[key], (int, float, str)):
                    digest.update(str(cond[key]).encode())
                for tensor in _tensors(cond[key]):
                    digest.update(str(list(tensor.shape)).encode() + _signs(tensor, 4096))
    return digest.hexdigest()[:8]


def title(patcher: Any, digits: str) -> str:
    """A name to show for the model with this fingerprint."""
    return f"{type(patcher.model.model_config).__name__}-{digits}"


def _signs(tensor: Tensor, values: int = VALUES) -> bytes:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(values, flat.numel()), dtype=torch.float64).long()
    return torch.signbit(flat[places.to(flat.device)].float()).cpu().numpy().tobytes()


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors of one patch, whatever holds them (a tuple, or an adapter with weights)."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (tuple, list)):
        for part in content:
            yield from _tensors(part)
    elif hasattr(content, "weights"):
        yield from _tensors(content.weights)
