"""How often the images of the emoji model have the colour that its classifier leads them to.

    python dev/benchmark.py classifier --images 64

The colour of an image is told by arithmetic (dev/tiny_emoji/colours.py), not by the classifier. Each scale
has the same noises. Without a prompt, STEPS steps of lambda_2m on karras.
"""
from __future__ import annotations

import importlib
import sys
from typing import Sequence

import comfy_host
import torch
from torch import Tensor

from .problems import TINY_EMOJI, Emoji, starting_noise

sys.path.append(str(TINY_EMOJI))
from colours import COLOURS, colours  # noqa: E402

FILE = TINY_EMOJI / "classifiers" / "emoji_colours.safetensors"
STEPS, BATCH = 8, 16
LED = ("blue", "green", "purple")
SCALES = (0.0, 1.0, 2.0, 8.0)


def images(problem: Emoji, colour: str, scale: float, count: int, steps: int = STEPS) -> Tensor:
    """So many images, led to a colour."""
    import comfy.samplers
    guiding = importlib.import_module(f"{comfy_host.pack().__name__}.nodes.guiding")
    classifier = guiding.load_classifier(FILE)
    guider = guiding.ClassifierGuider(problem.model, classifier, classifier.label(colour), scale)
    guider.set_conds(problem.cond([""]), problem.cond([""], negative=True))
    guider.set_cfg(1.0)
    levels = comfy.samplers.calculate_sigmas(problem.model.get_model_object("model_sampling"), "karras",
                                             steps)
    sampler, noise = comfy.samplers.sampler_object("lambda_2m"), starting_noise(problem, count, seed=3)
    with torch.inference_mode():
        return torch.cat([guider.sample(part, torch.zeros_like(part), sampler, levels, disable_pbar=True,
                                        seed=1) for part in noise.split(BATCH)])


def share(found: Tensor, colour: str) -> float:
    return float((colours(found) == COLOURS.index(colour)).float().mean())


def classifier(count: int, scales: Sequence[float] = SCALES) -> None:
    torch.set_num_threads(1)
    problem = Emoji(("",), (1.0,), 1)
    print(f"share of {count} images that have the colour they are led to, in %\n\n| colour | "
          f"{' | '.join(f'scale {scale:g}' for scale in scales)} |\n|{'---|' * (1 + len(scales))}")
    plain = images(problem, LED[0], 0.0, count)
    for colour in LED:
        shares = [share(images(problem, colour, scale, count) if scale else plain, colour)
                  for scale in scales]
        print(f"| {colour} | {' | '.join(f'{100 * value:.0f}' for value in shares)} |", flush=True)
