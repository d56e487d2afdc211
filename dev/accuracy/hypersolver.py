"""The hypersolver that is measured: trained once on the emoji, over a range of guidances, on prompts that
are not evaluated, and kept in a file."""
from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Sequence

import environment
import torch
from torch import Tensor

import samplers
from samplers.learning.train_hypersolver import fit_hypersolver

from .problems import CHECKPOINT, Emoji, model_sampling, starting_noise

UNSEEN = ("red heart", "panda", "strawberry", "doughnut", "alien", "yellow star", "blue square", "fox",
          "smiling face with sunglasses", "birthday cake", "crescent moon", "sunflower")
"""The prompts it is measured on; none of them teaches."""
COLOURED = [f"{colour} {shape}" for shape in ("heart", "circle", "square")
            for colour in ("red", "orange", "yellow", "green", "blue", "brown", "black", "white", "purple")]
NAMED = """broken heart, sparkling heart, red apple, green apple, ghost, skull, robot, clown face, pile of
poo, pig face, frog, bear, penguin, grinning face, smiling face with heart eyes, face with tears of joy,
face with open mouth, crying face, loudly crying face, angry face, enraged face, sleeping face, neutral
face, thinking face, winking face, avocado, banana, bread, carrot, cheese wedge, cherries, cookie, egg,
grapes, hamburger, ice cream, lemon, lollipop, peach, pineapple, pizza, shortcake, tangerine, tomato,
watermelon, sun, star, fire, droplet, evergreen tree, cactus, tulip"""
STYLES = ("noto", "fluent", "flat", "blob")
SIZE = {"prompts": 96, "images": 4, "guidances": (1.0, 9.0), "seed": 0}


def teaching(count: int) -> list[str]:
    """So many prompts, none of them evaluated: what the checkpoint learned, and then some with a style."""
    known = [" ".join(name.split()) for name in (*COLOURED, *NAMED.split(","))]
    known = [name for name in known if name not in UNSEEN]
    chance = random.Random(0)
    chance.shuffle(known)
    styled = [f"{name} {style}" for style in STYLES for name in known]
    chance.shuffle(styled)
    return [*known, *styled][:count]


class Guided:
    """The checkpoint as fit_hypersolver asks for it: every image with a prompt and a guidance of its own."""

    def __init__(self, problem: Emoji, prompts: Sequence[str], guidances: Tensor) -> None:
        from comfy.model_management import load_models_gpu
        load_models_gpu([problem.model])
        self.network, self.guidances = problem.model.model, guidances
        self.texts = torch.cat([problem.cond([prompt])[0][0] for prompt in prompts])
        self.nothing = problem.cond([""], negative=True)[0][0]
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, images: Sequence[int]) -> Tensor:
        self.calls += len(x)
        return torch.cat([self._some(*part) for part in zip(
            x.split(16), sigma.split(16), torch.tensor(images).split(16))])

    def _some(self, x: Tensor, sigma: Tensor, images: Tensor) -> Tensor:
        texts = torch.cat([self.texts[images], self.nothing.expand(len(x), -1, -1)])
        both = self.network.apply_model(x.repeat(2, 1, 1, 1), sigma.repeat(2), c_crossattn=texts)
        told, free = both.chunk(2)
        return free + self.guidances[images, None, None, None] * (told - free)


class Told:
    """Progress, a line for each evaluation."""

    last = 0

    def __call__(self, done: int, total: int, loss: float) -> None:
        if done > self.last:
            print(f"hypersolver: evaluation {done} of {total}, loss {loss:.3f}", flush=True)
        self.last = done


def spread(count: int, low: float, high: float) -> list[float]:
    """Guidances evenly in log, in an order that is not that of the prompts (golden ratio)."""
    return [low * (high / low) ** (k * 0.6180339887 % 1.0) for k in range(count)]


@functools.cache
def trained() -> samplers.Statistics:
    """The training, or its file."""
    sources = [Path(__file__), *sorted((environment.ROOT / "samplers").rglob("*.py"))]
    key = hashlib.sha256(json.dumps([*map(Path.read_text, sources), SIZE], default=str).encode()
                         + CHECKPOINT.read_bytes()).hexdigest()[:12]
    path = environment.HOME / "accuracy" / f"hypersolver-{key}.safetensors"
    if path.exists():
        return samplers.load_calibration(path)
    found = train(path.with_suffix(".partial"))
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return found


def train(partial: Path | None = None, size: dict = SIZE) -> samplers.Statistics:
    low, high = size["guidances"]
    prompts = [prompt for prompt in teaching(size["prompts"]) for _ in range(size["images"])]
    each = [guidance for guidance in spread(size["prompts"], low, high) for _ in range(size["images"])]
    problem = Emoji(UNSEEN, (3.0,), 1)
    sigmas = model_sampling().sigmas.flip(0)
    middle = Guided(problem, prompts[:2], torch.full((2,), (low * high) ** 0.5))
    statistics = samplers.estimate_statistics(
        lambda x, sigma: middle(x, sigma, range(len(x))), sigmas[0] * starting_noise(problem, 2, seed=7),
        sigmas, fitted=True)
    model = Guided(problem, prompts, torch.tensor(each))
    return fit_hypersolver(
        model, sigmas[0] * starting_noise(problem, len(prompts), seed=8), statistics, guidance=each,
        prompts=[k // size["images"] for k in range(len(prompts))], seed=size["seed"], partial=partial,
        progress=Told())
