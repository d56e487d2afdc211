"""The hypersolver that is measured: trained once on the emoji, over a range of guidances, on prompts that
are not evaluated, and committed."""
from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any, Sequence

import comfy_host
import torch
from torch import Tensor

import samplers
from samplers.learning.train_hypersolver import HELD_OUT, fit_hypersolver, spread

from .problems import TINY_EMOJI, Emoji, model_sampling, starting_noise

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
PROMPTS, IMAGES, ROUNDS = 360, 6, 3
RANGES = (1.0, 9.0), (4.0, 9.0)  # of guidance, each for as many of the prompts
FILE = TINY_EMOJI / "hypersolver.safetensors"


def teaching(count: int) -> list[str]:
    """So many prompts, none of them evaluated: what the checkpoint learned, as it is and in every style.

    Those that fit_hypersolver holds out are of names of their own: another style of a name that teaches
    would flatter what learns pictures by heart.
    """
    known = [" ".join(name.split()) for name in (*COLOURED, *NAMED.split(","))]
    known = [name for name in known if name not in UNSEEN]
    chance = random.Random(0)
    chance.shuffle(known)
    away = known[HELD_OUT - 1::HELD_OUT]

    def styled(names: Sequence[str]) -> list[str]:
        each = [f"{name} {style}".strip() for style in ("", *STYLES) for name in names]
        chance.shuffle(each)
        return each

    taught, held = styled([name for name in known if name not in away]), styled(away)
    return [(taught, held)[k % HELD_OUT == HELD_OUT - 1].pop() for k in range(count)]


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


def trained() -> samplers.Statistics:
    """The committed file, which the demo uses too."""
    return samplers.load_calibration(FILE)


def train(out: Path) -> None:
    """Make that file anew: `python dev/benchmark.py hypersolver`. A run that was cut short goes on."""
    prompts = [prompt for prompt in teaching(PROMPTS) for _ in range(IMAGES)]
    each = [guidance for low, high in RANGES for guidance in spread(low, high, PROMPTS // len(RANGES))
            for _ in range(IMAGES)]
    problem, sigmas = Emoji(UNSEEN, (3.0,), 1), model_sampling().sigmas.flip(0)
    middle = (min(each) * max(each)) ** 0.5
    model = Guided(problem, prompts[:2], torch.full((2,), middle))
    measuring, learning = (sigmas[0] * starting_noise(problem, *how) for how in ((2, 7), (len(prompts), 8)))
    statistics = samplers.estimate_statistics(lambda x, sigma: model(x, sigma, range(len(x))), measuring,
                                              sigmas, fitted=True, about=about(problem, middle))
    found = fit_hypersolver(
        Guided(problem, prompts, torch.tensor(each)), learning, statistics, guidance=each, progress=Told(),
        prompts=[k // IMAGES for k in range(len(prompts))], rounds=ROUNDS, partial=out / "hypersolver.part")
    found.save(FILE, overwrite=True)
    print(f"written: {FILE}\n{found.about['hypersolver']}")


def about(problem: Emoji, guidance: float) -> dict[str, Any]:
    """What the pack knows this model by."""
    import comfy.samplers
    identity = sys.modules[f"{comfy_host.pack().__name__}.nodes.identity"]
    guider = comfy.samplers.CFGGuider(problem.model)
    guider.set_conds(problem.cond(["ghost"]), problem.cond([""], negative=True))
    guider.set_cfg(guidance)
    return identity.description(guider)
