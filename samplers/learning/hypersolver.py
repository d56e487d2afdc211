"""The hypersolver: what a step of DPM-Solver++(2M) misses, told by a small network from what the step saw.

    y_t = (the solver's y_t) + whole(c) bounded(w(c) . u) + rho(c) bounded(g(u; c)),     u = v / scale(c),
    y = x / alpha,  varsigma = sigma / alpha

    v  y_s / sqrt(1 + varsigma_s^2),  D_s,  D_s - D_-1,  D_-1 - D_-2      (0 where there is none)
    c  what is known of the step before it is made: `Conditions`
    w  a number for each part of v: better weights for this step
    g  u -> 3x3 -> + 3x3 -> + 3x3 of every second place -> 3x3, of 48 channels with SiLU, each with a factor
       and a shift that c tells:  c -> 64 -> 2 x 48 for every layer

w is a polynomial in c; so are the logs of whole, rho and scale, the sizes of all that is missed, of what w
leaves, and of the parts of v: the network sees and answers numbers near 1. It sees 11 x 11 places, so it
serves every size of image; it is one for all steps, numbers of steps and guidances, and in y one for all
paths.

The idea is that of Poli et al. 2020, "Hypersolvers" (arXiv:2007.09601): a solver, and a network for its
residual.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Conv2d, Linear, Module, ModuleList
from torch.nn.functional import conv2d, linear, silu

from ..clocks import CLOCKS, evenly
from ..integrand import DataPrediction
from ..phi import midpoint
from ..schedule import Level, Path
from ..solver import Multistep, Step
from ..tensors import as_written, moved
from .storage import CalibrationError

SOLVER = Multistep(DataPrediction(), 2, midpoint)
VIEWS, TERMS = 4, 16  # parts of v; terms of the polynomial
WIDTH, HIDDEN = 48, 64
DILATIONS = 1, 2      # of the layers in the middle
EXACT = "weights", "sizes"  # what is kept in full precision: they are few
RHO = 7.0             # a run's levels are even in varsigma^(1 / RHO): Karras et al. 2022, eq. (5)
BOUND = 6.0           # of both answers, in units of their sizes: hardly anything that was taught is beyond
AT_ONCE = 2**16       # places, for each of which the network needs some dozen numbers: four times 128 x 128


class Conditions(NamedTuple):
    """c, numbers near -2 .. 2. The ratios are of noise levels, varsigma_t / varsigma_s: of this step, of the
    one before and of the one before that; 0 to sigma = 0, 1 where there is no step."""

    lam: float
    ratio: float
    before: float
    earlier: float
    first: float
    second: float
    last: float
    guidance: float

    @classmethod
    def of(cls, levels: Sequence[Level], i: int, guidance: float) -> Conditions:
        """Of step i over these levels, of which the run began at the first."""
        ratios = (math.exp(levels[j].lam - levels[j + 1].lam) if j >= 0 else 1.0 for j in (i, i - 1, i - 2))
        return cls(levels[i].lam / 2.5, *(1.5 * (2.0 * ratio - 1.0) for ratio in ratios), float(i == 0),
                   float(i == 1), float(levels[i + 1].sigma == 0.0), math.log(max(guidance, 0.1)))


def terms(c: Tensor) -> Tensor:
    """The terms of the polynomial in c [B, 8], [B, TERMS]."""
    lam, ratio, before, _, first, second, last, guidance = c.unbind(1)
    return torch.stack([torch.ones_like(lam), lam, lam**2, lam**3, ratio, ratio**2, ratio * lam, before,
                        first, second, last, last * lam, guidance, guidance**2, guidance * lam,
                        guidance * lam**2], 1)


class Modulation(NamedTuple):
    """All that c decides, for each of a batch: the layers' factors and shifts [B, 2 layers width], the
    weights w [B, VIEWS], whole and rho [B], and the scale of each part of v [B, VIEWS]."""

    layers: Tensor
    weights: Tensor
    whole: Tensor
    rho: Tensor
    scale: Tensor


class Network(Module):
    """w, g, and their sizes, for latents of so many channels. It is on no device until it is begun or loaded:
    torch's own initial values would move everybody's random numbers."""

    def __init__(self, channels: int, width: int = WIDTH) -> None:
        super().__init__()
        with torch.device("meta"):
            self.enter = Conv2d(VIEWS * channels, width, 3, padding=1)
            self.middle = ModuleList(Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
            self.leave = Conv2d(width, channels, 3, padding=1)
            self.told = ModuleList((Linear(len(Conditions._fields), HIDDEN),
                                    Linear(HIDDEN, 2 * (1 + len(DILATIONS)) * width)))
            self.register_buffer("weights", torch.zeros(VIEWS, TERMS))
            self.register_buffer("sizes", torch.zeros(2 + VIEWS, TERMS))  # of whole, rho and scale

    @torch.no_grad()
    def begun(self, seed: int = 0) -> Network:
        """It with random numbers, so that it answers 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, value in self.to_empty(device="cpu").state_dict().items():
            silent = value.ndim == 1 or name in ("leave.weight", "told.1.weight", "weights", "sizes")
            value.copy_(torch.zeros(()) if silent else torch.randn(value.shape, generator=generator)
                        / math.sqrt(3.0 * value[0].numel()))
        return self

    def modulation(self, c: Tensor) -> Modulation:
        """Of c [B, 8]."""
        (inner, outer), of = self.told, terms(c)
        whole, rho, *scale = (of @ self.sizes.T).exp().unbind(1)
        told = linear(silu(linear(c, inner.weight, inner.bias)), outer.weight, outer.bias)
        return Modulation(told, of @ self.weights.T, whole, rho, torch.stack(scale, 1))

    def forward(self, v: Tensor, by: Modulation) -> Tensor:
        """What is missed in y [B, C, H, W] of v [B, VIEWS, C, H, W]."""
        factors, shifts = by.layers[:, :, None, None].unflatten(1, (2, 1 + len(self.middle), -1)).unbind(1)
        u = v / over(by.scale, v)
        h = silu(convolved(self.enter, u.flatten(1, 2)) * (1.0 + factors[:, 0]) + shifts[:, 0])
        for k, layer in enumerate(self.middle, 1):
            h = h + silu(convolved(layer, h) * (1.0 + factors[:, k]) + shifts[:, k])
        easy, rest = (over(by.weights, u) * u).sum(1), convolved(self.leave, h)
        return over(by.whole, easy) * bounded(easy) + over(by.rho, rest) * bounded(rest)


def convolved(layer: Conv2d, h: Tensor) -> Tensor:
    """layer(h), by no method of a class that a host may have changed (A1111's manual cast)."""
    return conv2d(h, layer.weight, layer.bias, padding=layer.padding, dilation=layer.dilation)


def bounded(answer: Tensor) -> Tensor:
    """Within -BOUND .. BOUND."""
    return BOUND * torch.tanh(answer / BOUND)


def over(number: Tensor, like: Tensor) -> Tensor:
    """A number of each image, or of each of its parts, to multiply like with."""
    return number.reshape(*number.shape, *[1] * (like.ndim - number.ndim))


def views(x: Tensor, at: Level, answers: Sequence[Tensor]) -> Tensor:
    """v [B, VIEWS, C, H, W] of x at a level and of D_s, D_-1, D_-2 as far as they are there; float32,
    frames as images of the batch."""
    d = [flat(answer) for answer in answers]
    parts = [flat(x) / math.hypot(at.alpha, at.sigma), d[0], *(a - b for a, b in zip(d, d[1:]))]
    return torch.stack([*parts, *[torch.zeros_like(d[0])] * (VIEWS - len(parts))], 1)


def spaced(start: Level, last: Level, n: int, path: Path) -> list[Level]:
    """The levels of n evaluations, of which the last is at `last`, and sigma = 0."""
    return [*evenly(start, last, n, CLOCKS["sigma"](path, ()), RHO), path.level(0.0)]


def flat(x: Tensor) -> Tensor:
    """[B, C, H, W] of latents [B, C, ...]: frames are images, and what has no height has one row."""
    x = x.float()
    if x.ndim > 4:
        x = x.movedim(1, -3).flatten(0, -4)
    return x if x.ndim == 4 else x.reshape(len(x), x.shape[1], -1, x.shape[-1])


def unflat(h: Tensor, like: Tensor) -> Tensor:
    """The latents in the shape and dtype of `like` that `flat` made into h."""
    if like.ndim > 4:
        h = h.unflatten(0, (len(like), *like.shape[2:-2])).movedim(-3, 1)
    return h.reshape(like.shape).to(like.dtype)


@dataclass(frozen=True)
class Missed:
    """What a step s -> t misses in x, as solver.Residual."""

    network: Network
    by: Modulation
    s: Level
    t: Level
    uses: tuple[int, ...]

    def placed(self, x: Tensor) -> Missed:
        """ValueError for latents of other channels than those it learned from."""
        learned, own = self.network.leave.out_channels, x.shape[1] if x.ndim > 2 else 0
        if own != learned:
            raise ValueError(f"this hypersolver was trained on latents of {learned} channels, and x has "
                             f"shape {list(x.shape)}: train one on this model")
        by = Modulation(*(moved(value, x.device) for value in self.by))
        return replace(self, network=self.network.to(x.device), by=by)

    @torch.no_grad()
    def __call__(self, x: Tensor, answers: Sequence[Tensor]) -> Tensor:
        """To add to x at t; of x at s, and of D_s, D_-1, D_-2 as far as they are there.

        In a last step nothing is missed where D did not move since the step before: what inpainting keeps is
        kept exactly.
        """
        v = views(x, self.s, answers)
        frames, some = len(v) // len(x), max(1, AT_ONCE // v[0, 0, 0].numel())
        by = [value.expand(len(x), *value.shape[1:]).repeat_interleave(frames, 0).split(some)
              for value in self.by]
        with as_written(x.device):
            missed = self.t.alpha * torch.cat(list(map(self.network, v.split(some), map(Modulation, *by))))
        if self.t.sigma == 0.0 and len(answers) > 1:
            missed = missed * (flat(answers[0]) != flat(answers[1])).any(1, keepdim=True)
        return unflat(missed, x)


@dataclass(frozen=True, eq=False)
class Hypersolver:
    """A network that was trained, on the CPU, and what for.

    weights: of a Network, by its names. bounds [2, 8]: the lowest and highest conditions that taught it;
    others count as the nearest of them. end [4]: what tells where the last
    evaluation is, see `error_of`. counts: the numbers of steps at which it was better than without,
    on prompts held out. guidance: of the run, or of each image; without one, the middle of those that
    taught. """

    weights: Mapping[str, Tensor]
    bounds: np.ndarray
    end: np.ndarray
    counts: tuple[int, ...]
    guidance: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        """CalibrationError for what no network has."""
        enter = self.weights.get("enter.weight")
        if enter is None or enter.ndim != 4 or not 1 <= len(enter) <= 1024 or not enter.shape[1]:
            raise CalibrationError("the hypersolver's enter.weight must have shape [width, 4 channels, 3, 3]")
        shapes = {name: value.shape for name, value in self._empty().state_dict().items()}
        for name in shapes.keys() | self.weights.keys():
            found = self.weights.get(name, torch.empty(0)).shape
            if shapes.get(name) != found:
                raise CalibrationError(f"the hypersolver's {name} has shape {list(found)}: it must be "
                                       f"{list(shapes.get(name, []))}")
        size = (2, len(Conditions._fields))
        if self.bounds.shape != size or (self.bounds[0] > self.bounds[1]).any():
            raise CalibrationError(
                f"the hypersolver's bounds must be the lowest and the highest, {list(size)}")
        if self.end.shape != (4,):
            raise CalibrationError(f"the hypersolver's end has shape {list(self.end.shape)}: it must be [4]")
        if any(not 1 <= n <= 1000 for n in self.counts):
            raise CalibrationError(f"the hypersolver's counts = {list(self.counts)} must be from 1 to 1000")

    def _empty(self) -> Network:
        width, seen = self.weights["enter.weight"].shape[:2]
        return Network(seen // VIEWS, width)

    def network(self) -> Network:
        network = self._empty()
        network.load_state_dict({name: value.float().contiguous() for name, value in self.weights.items()},
                                assign=True)  # in one order, whether trained just now or read
        return network.requires_grad_(False)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.weights["leave.bias"].shape[0]

    @property
    def guidances(self) -> tuple[float, float]:
        """The lowest and highest that taught."""
        low, high = np.exp(self.bounds[:, Conditions._fields.index("guidance")]).tolist()
        return low, high

    @property
    def each(self) -> list[float]:
        """The guidance of the run, or of each image."""
        told = math.sqrt(math.prod(self.guidances)) if self.guidance is None else self.guidance
        return [float(guidance) for guidance in np.ravel(told)]

    def last(self, n: int, start: float, high: float) -> float:
        """Where the last of n evaluations is, in lam, see `last_of`."""
        return last_of(self.end, n, start, high, np.clip(self.each, *self.guidances).tolist())

    def steps(self, levels: Sequence[Level], path: Path) -> list[Step]:
        """The solver's steps over these levels, each with what it misses."""
        network, each = self.network(), self.each
        result = []
        for i, step in enumerate(SOLVER.steps(levels, path)):
            c = np.clip([Conditions.of(levels, i, guidance) for guidance in each], *self.bounds)
            by = network.modulation(torch.from_numpy(c).float())
            result.append(step._replace(missed=Missed(network, by, step.s, step.t, (0, -1, -2)[:i + 1])))
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file holds: the weights in half precision, but for the few that decide sizes."""
        weights = {name: value.numpy().astype(np.float32 if name in EXACT else np.float16)
                   for name, value in self.weights.items()}
        counts = np.array(self.counts, dtype=np.int64)
        return {**weights, "bounds": self.bounds, "end": self.end, "counts": counts}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Hypersolver:
        arrays = dict(arrays)
        try:
            bounds, end = (arrays.pop(name).astype(np.float64) for name in ("bounds", "end"))
            counts = arrays.pop("counts").ravel().tolist()
            weights = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        except (KeyError, TypeError) as fault:
            raise CalibrationError(f"the hypersolver is not whole: {fault}") from None
        return cls(weights, bounds, end, tuple(int(n) for n in counts))


SHALLOW = 0.5  # of the way to the model's lowest level, in lam: nearer, no run has its last evaluation
TRIED = 200    # places where it may be


def error_of(end: Tensor, n: Tensor | int, start: float, lam: Tensor, guidance: Tensor) -> Tensor:
    """What n evaluations from lam = start to lam, and the step from there to x0, are expected to err:

        e^(a + a' g - lam) + e^(b + b' g) h^2,       h = (lam - start) / (n - 1),  g = log guidance

    The first is what the last step misses, of first order in varsigma = e^-lam, the second what the steps
    before it do, of second order in their length. end: a, a', b, b'. """
    h, g = (lam - start) / (n - 1), guidance.clamp(min=0.1).log()
    return (end[0] + end[1] * g - lam).exp() + (end[2] + end[3] * g).exp() * h**2


def last_of(end: np.ndarray, n: int, start: float, high: float, guidances: Sequence[float]) -> float:
    """Where the last of n evaluations is, in lam, of a run that begins at lam = start and may go to high:
    where the error is expected to be least at the mean of these guidances."""
    lam = torch.linspace(start + SHALLOW * (high - start), high, TRIED).double()
    told = torch.tensor(guidances, dtype=torch.float64).clamp(min=0.1).log().mean().exp()
    return float(lam[error_of(torch.from_numpy(end), max(n, 2), start, lam, told).argmin()])
