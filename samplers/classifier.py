"""Classifier guidance: a classifier of noisy images, and what it adds to a denoiser's answer.

    score(x | y) = score(x) + grad log p(y | x)                    (Bayes; Song et al. 2021, eq. (14))
    D = (x + sigma^2 score) / alpha                                (Tweedie)
    D(x | y) = D + s sigma^2 / alpha grad log p(y | x, sigma)      with a scale s of the classifier's part

Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithm 2, adds the same to eps. The gradient is by the sampler's
own x = alpha x0 + sigma eps, on every path.

The classifier is guided-diffusion's `EncoderUNetModel` with attention pooling, the first half of its U-Net:

    t -> sinusoids -> time_embed
    x -> input_blocks: a convolution, then residual blocks told t, some with attention, some that halve x
      -> middle_block: residual, attention, residual
      -> out: norm, SiLU, attention from the mean to every place -> logits

read from the names and shapes of a file's tensors. Two numbers are in no shape. guided-diffusion has 32
groups in a norm and 64 channels in a head; another classifier names its own in the file's metadata, as
`groups` and `head_channels`, and may name its classes there: `classes`, a list in JSON.
"""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Callable, Mapping

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import (Conv1d, Conv2d, GroupNorm, Identity, Linear, Module, ModuleList, Parameter, Sequential,
                      SiLU)

GROUPS, HEAD = 32, 64
Shapes = Mapping[str, tuple[int, ...]]


class ClassifierError(ValueError):
    """A file that is no such classifier; the message says what does not fit."""


def gradient(log_p: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grad_x log p [B] of x [B, ...], whatever the mode of the caller."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # a clone: what was made in inference mode has no gradients
        return torch.autograd.grad(log_p(x).sum(), x)[0]


def shift(grad: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """sigma^2 / alpha grad log p; 0 where alpha is 0, and x only noise. sigma and alpha [B, 1, ...]."""
    return torch.where(alpha > 0, sigma**2 / alpha, 0.0) * grad


class Residual(Module):
    """x' + f(x', t): norm, SiLU, convolution, twice; t scales and shifts between, or only shifts.

    x' is x, of half the size if it `halves`."""

    def __init__(self, shapes: Shapes, groups: int, halves: bool) -> None:
        super().__init__()
        (out, channels, *_), (told, time) = shapes["in_layers.2.weight"], shapes["emb_layers.1.weight"]
        self.halves, self.scales = halves, told == 2 * out
        self.in_layers = Sequential(GroupNorm(groups, channels), SiLU(),
                                    Conv2d(channels, out, 3, padding=1))
        self.emb_layers = Sequential(SiLU(), Linear(time, told))
        self.out_layers = Sequential(GroupNorm(groups, out), SiLU(), Identity(),
                                     Conv2d(out, out, 3, padding=1))
        kernel = shapes.get("skip_connection.weight", (0, 0, 1))[-1]
        self.skip_connection = (Identity() if out == channels else
                                Conv2d(channels, out, kernel, padding=kernel // 2))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.halves:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h, told = conv(h), self.emb_layers(emb)[:, :, None, None]
        if self.scales:
            scale, shift = told.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(x) + h


class Attention(Module):
    """x + attention among all places."""

    def __init__(self, channels: int, groups: int, head: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm = GroupNorm(groups, channels)
        self.qkv = Conv1d(channels, 3 * channels, 1)
        self.proj_out = Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).unbind(2)
        return (flat + self.proj_out(attended(q, k, v))).view_as(x)


class Halving(Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class Entry(Conv2d):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x)


class AttentionPool(Module):
    """What the mean of all places attends to among them and itself."""

    def __init__(self, places: int, channels: int, classes: int, head: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.positional_embedding = Parameter(torch.empty(channels, places))
        self.qkv_proj = Conv1d(channels, 3 * channels, 1)
        self.c_proj = Conv1d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.features(x)[:, :, None])[:, :, 0]

    def features(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        flat = torch.cat([flat.mean(2, keepdim=True), flat], 2) + self.positional_embedding
        q, k, v = self.qkv_proj(flat).unflatten(1, (3, self.heads, -1)).unbind(1)
        return attended(q[..., :1], k, v)[:, :, 0]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, channels, places] -> [B, heads channels, places]."""
    q, k, v = (part.transpose(2, 3) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


class Classifier(Module):
    """log p(y | x, t) of x as the network sees it, [B, channels, size, size], at its timesteps t [B]."""

    def __init__(self, shapes: Shapes, groups: int = GROUPS, head: int = HEAD,
                 names: tuple[str, ...] = ()) -> None:
        super().__init__()
        entries = count(shapes)
        halves = halvings(shapes, entries)
        self.width, self.names = shapes["time_embed.0.weight"][1], names

        def block(prefix: str, halves: bool = False) -> Module:
            own = within(shapes, prefix)
            if "in_layers.2.weight" in own:
                return Residual(own, groups, halves)
            if "qkv.weight" in own:
                return Attention(own["qkv.weight"][1], groups, head)
            if "op.weight" in own:
                return Halving(own["op.weight"][0])
            out, channels, *_ = own["weight"]
            return Entry(channels, out, 3, padding=1)

        hidden = shapes["time_embed.0.weight"][0]
        self.time_embed = Sequential(Linear(self.width, hidden), SiLU(), Linear(hidden, hidden))
        self.input_blocks = ModuleList(
            ModuleList(block(f"input_blocks.{k}.{j}.", k in halves)
                       for j in parts(shapes, f"input_blocks.{k}.")) for k in range(entries))
        self.middle_block = ModuleList(block(f"middle_block.{k}.") for k in range(3))
        channels, places = shapes["out.2.positional_embedding"]
        self.out = Sequential(GroupNorm(groups, channels), SiLU(),
                              AttentionPool(places, channels, shapes["out.2.c_proj.weight"][0], head))
        self.channels, self.classes = shapes["input_blocks.0.0.weight"][1], len(self.out[2].c_proj.weight)
        self.size = math.isqrt(places - 1) * 2**len(halves)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.encoded(x, t)).log_softmax(1)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """What the logits are a linear function of, [B, F]."""
        norm, act, pool = self.out
        return pool.features(act(norm(self.encoded(x, t))))

    def encoded(self, x: Tensor, t: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.channels, self.size, self.size):
            raise ValueError(f"this classifier is for images of {self.channels} x {self.size} x {self.size} "
                             f"(as the model sees them), and these are {' x '.join(map(str, x.shape[1:]))}: "
                             "choose that size, or a classifier for this model")
        emb = self.time_embed(sinusoids(t, self.width))
        for blocks in (*self.input_blocks, self.middle_block):
            for part in blocks:
                x = part(x, emb)
        return x

    def label(self, name: str) -> int:
        """The number of a class, by its name in the file or by itself; ValueError if there is none."""
        name = name.strip()
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < self.classes:
            return int(name)
        named = f", or one of {', '.join(self.names)}" if self.names else ""
        raise ValueError(f"label = {name!r}: this classifier knows the numbers 0 to {self.classes - 1}"
                         f"{named}")


def sinusoids(t: Tensor, width: int) -> Tensor:
    """cos, then sin, of t at width / 2 frequencies from 1 to 1/10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


# --- reading ----------------------------------------------------------------------------------------------


def within(shapes: Shapes, prefix: str) -> Shapes:
    return {name[len(prefix):]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def parts(shapes: Shapes, prefix: str) -> list[str]:
    """The numbers that names go on with behind a prefix."""
    return sorted({name.partition(".")[0] for name in within(shapes, prefix)})


def count(shapes: Shapes) -> int:
    return len(parts(shapes, "input_blocks."))


def halvings(shapes: Shapes, entries: int) -> set[int]:
    """Which input blocks halve the image: those that are a convolution of stride 2; or else every p-th.

    A residual block that halves has the tensors of any other. But all levels have p - 1 blocks and one that
    halves after them, only the first of a level changes the channels, and all or none of a level attend.
    """
    if strided := {k for k in range(entries) if f"input_blocks.{k}.0.op.weight" in shapes}:
        return strided
    wider = {k for k in range(entries) if f"input_blocks.{k}.0.skip_connection.weight" in shapes}
    attend = {k for k in range(entries) if f"input_blocks.{k}.1.qkv.weight" in shapes}

    def fits(p: int) -> bool:
        levels = [set(range(max(1, k + 1) if k else 1, k + p)) for k in range(0, entries, p)]
        inner = set().union(*levels)
        return (wider | attend <= inner and all(len(level & attend) in (0, len(level)) for level in levels)
                and all(k % p == 1 for k in wider))

    periods = [p for p in range(2, entries + 1) if entries % p == 0 and fits(p)]
    if len(periods) != 1:
        raise ClassifierError(
            f"{entries} input blocks of which {sorted(attend)} have attention and {sorted(wider)} change the "
            "channels: it cannot be told which of them halve the image. guided-diffusion's classifiers have "
            "the same number of blocks at every size, and attention at the smaller ones")
    return set(range(periods[0], entries, periods[0]))


def load_classifier(path: Path) -> Classifier:
    """The classifier of a safetensors file, in float32; ClassifierError naming what does not fit."""
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        return _built(tensors, metadata)
    except FileNotFoundError:
        raise ClassifierError(f"{path.name} does not exist") from None
    except (OSError, SafetensorError) as fault:
        raise ClassifierError(f"{path.name} is no safetensors file, or was cut short ({fault}): convert it, "
                              "or get it anew") from None
    except ClassifierError as fault:
        raise ClassifierError(f"{path.name} is no classifier of guided-diffusion's layout (EncoderUNetModel "
                              f"with attention pooling): {fault}") from None


NEEDED = {"time_embed.0.weight": 2, "time_embed.2.weight": 2, "input_blocks.0.0.weight": 4,
          "middle_block.0.in_layers.2.weight": 4, "middle_block.1.qkv.weight": 3,
          "middle_block.2.in_layers.2.weight": 4, "out.2.positional_embedding": 2, "out.2.c_proj.weight": 3}
"""Tensors that say how large it is, with their dimensions."""


def _built(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Classifier:
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    for name, dimensions in NEEDED.items():
        if len(shapes.get(name, ())) != dimensions:
            found = f"has {len(shapes[name])}" if name in shapes else "is missing"
            raise ClassifierError(f"{name} of {dimensions} dimensions {found}")
    groups, head, names = _told(metadata)
    try:
        with torch.device("meta"):
            made = Classifier(shapes, groups, head, names)
    except (KeyError, IndexError, ValueError) as fault:
        if isinstance(fault, ClassifierError):
            raise
        raise ClassifierError(f"its tensors make no network ({fault})") from None
    expected = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            one, other = (list(of[name]) if name in of else "none" for of in (shapes, expected))
            raise ClassifierError(f"{name} is {one} and should be {other}")
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ClassifierError(f"{bad[0]} is not finite")
    if names and len(names) != made.classes:
        raise ClassifierError(f"its metadata name {len(names)} classes, and it has {made.classes}")
    with torch.inference_mode(False):
        made.load_state_dict(tensors, assign=True)
        return made.requires_grad_(False)


def _told(metadata: Mapping[str, str]) -> tuple[int, int, tuple[str, ...]]:
    """Groups, channels of a head, and names of classes, as a file's metadata say."""
    try:
        groups, head = (int(metadata.get(name, usual)) for name, usual in (("groups", GROUPS),
                                                                           ("head_channels", HEAD)))
        names = tuple(json.loads(metadata.get("classes", "[]")))
    except (ValueError, TypeError) as fault:
        raise ClassifierError(f"its metadata cannot be read ({fault})") from None
    if groups < 1 or head < 1 or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ClassifierError(f"its metadata say groups = {groups}, head_channels = {head} and classes "
                              f"{names}: two whole numbers above 0 and a list of names are asked for")
    return groups, head, names
