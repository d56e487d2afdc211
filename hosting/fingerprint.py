"""Which checkpoint a network has, and which text it is told: in digits that are the same in every host,
session and precision."""
from __future__ import annotations

import hashlib
from typing import Iterator, Mapping

import torch
from torch import Tensor

TENSORS, VALUES = 16, 64  # what is sampled: the signs of so many values of so many tensors
BESIDE = ("scale", "comfy_quant", "codebook")  # in the names of what stands beside quantised weights
NETWORK = "diffusion_model."  # how the names of its weights begin


def of(name: str, stored: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> str:
    """Twelve hex digits for an unpatched checkpoint: its class, its matrices' names and shapes, and signs of
    their values.

    Signs, because they survive every format: the float32, float16 and float8 file of a checkpoint have one
    fingerprint, a fine-tune of it another; of packed formats (GGUF, nvfp4) the packed bytes. Matrices,
    because vectors and the scales of quantised weights have other names in other versions of ComfyUI. Of
    weights that a loader keeps elsewhere (on the meta device) the shapes alone count.
    """
    digest = hashlib.sha256(name.encode())
    for part in network({key: value for key, value in stored.items() if key.startswith(NETWORK)}, originals):
        digest.update(part)
    return digest.hexdigest()[:12]


def stored(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters, and the buffers that are saved; a state_dict of GGUF has meta tensors instead."""
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def network(state: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Iterator[bytes]:
    """The matrices of a network, their originals where they are patched: shapes, and signs of some values."""
    weights = {name: value for name, value in state.items()
               if len(value.shape) > 1 and not any(word in name for word in BESIDE)}
    for name in sorted(weights):
        yield f"{name}{list(weights[name].shape)}".encode()
    large = sorted((name for name, value in weights.items() if not value.is_meta),
                   key=lambda name: (-weights[name].numel(), name))[:256]
    for name in large[::max(1, len(large) // TENSORS)][:TENSORS]:
        yield signs(originals.get(name, weights[name]))


def text(tensor: Tensor) -> bytes:
    """What a condition's tensor says."""
    values = some(tensor, 4096)
    mean = values.mean()
    return f"{list(tensor.shape)} {mean:.2g}".encode() + torch.signbit(values - mean).numpy().tobytes()


def signs(tensor: Tensor) -> bytes:
    """The signs of some values; of packed bytes (uint8) all that they say."""
    values = some(tensor, VALUES)
    packed = getattr(tensor, "_qdata", tensor).dtype == torch.uint8
    return (values if packed else torch.signbit(values)).numpy().tobytes()


def some(tensor: Tensor, values: int) -> Tensor:
    """So many of a tensor's values, evenly spread; on the CPU, in float32."""
    held = getattr(tensor, "_qdata", tensor)  # what ComfyUI's quantised tensors hold
    flat = held.as_subclass(Tensor).detach().reshape(-1)  # GGUF's have rules of their own for tensors
    places = torch.linspace(0, flat.numel() - 1, min(values, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()
