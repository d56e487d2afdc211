"""Workflows at random, over all that this pack has, and the files that they need."""
from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any, Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import demo
import environment
from samplers import FAMILIES
from samplers.catalogue import Option
from samplers.denoisers import THRESHOLDS
from test_server import LISTED, SHOWN, Graph

EMOJI_S = ("guider", "hypersolver", "controlnet")
"""What is tried on the tiny emoji. All others are on the nano emoji."""
KINDS = [*LISTED, *SHOWN, "options", *EMOJI_S]
"""What a workflow is about: a name in KSampler, a sampler's node, or one of the others around one."""
EMOJI = environment.ROOT / "dev" / "tiny_emoji"
CLASSIFIER, HYPERSOLVER = "emoji_colours.safetensors", "hypersolver.safetensors"
SIZES, SEEN = (64, 96, 128, 192), (256,)
"""Pixels of a side, and what the classifier sees."""
RANDOM, LAYER = "random.safetensors", "time_embed.0"
HINT = (3, 16, 16, 32, 32, 96, 96, 256)
"""Channels of a ControlNet's way from its picture to the latent, but for the last; every second one is
halved."""


def workflow(kind: str, chance: random.Random) -> Graph:
    """One of endless: size, batch, steps, image to image, mask, LoRA, flow by chance. What is trained for a
    number of steps has that one alone."""
    made, trained = Graph.emoji if kind in EMOJI_S else Graph, "amed" in kind
    graph = made(chance.choice(["panda", "red heart", "sun"]))
    batch = 3 if re.search("v3|fitted|amed", kind) else chance.choice([1, 1, 2])  # or it measures for long
    flow = _model(graph, chance, plain=trained or kind in EMOJI_S)
    denoise = _latent(graph, chance, SEEN if kind == "guider" else SIZES, batch,
                      again=not trained and chance.random() < 0.4)
    steps = 3 if trained else 4 if kind == "hypersolver" else chance.randrange(2, 9)
    seed, scheduler = chance.randrange(2**40), chance.choice(["simple", "normal"] if flow else ["karras"])
    if kind == "hypersolver":
        graph.through("LambdaLoadCalibration", 2, name=HYPERSOLVER)
    if kind == "controlnet":
        _controlled(graph, chance)
    name = {"hypersolver": "lambda_fitted", "controlnet": chance.choice(LISTED[:4])}.get(kind, kind)
    if name in LISTED:
        return graph.ksampler(name, steps, seed=seed, denoise=denoise, scheduler=scheduler)
    family = kind if kind in SHOWN else chance.choice(SHOWN[:4])
    sampler = [graph.add("LambdaSampler" + family.capitalize(), **_options(family, chance, denoise)), 0]
    if kind == "options":
        sampler = [graph.add("LambdaOptions", sampler=sampler, quantile=0.9, bound=0.8,
                             threshold=chance.choice([*THRESHOLDS]), cfg_pp=chance.random() < 0.5), 0]
    sigmas = _sigmas(graph, chance, steps, denoise, None if trained else scheduler)
    if kind == "guider":
        return _guided(graph, sampler, sigmas, seed, chance.choice(["red", "blue"]))
    return graph.custom(sampler, sigmas, seed)


def _model(graph: Graph, chance: random.Random, plain: bool) -> bool:
    """What is done to the model, unless it is to be plain; whether it is a flow."""
    if not plain and chance.random() < 0.2:
        graph.through("LoraLoaderModelOnly", lora_name=RANDOM, strength_model=0.5)
    flow = not plain and chance.random() < 0.15
    if flow:
        graph.through("TinyEmojiAsFlow")
    return flow


def _controlled(graph: Graph, chance: random.Random) -> None:
    picture = graph.add("EmptyImage", width=256, height=256, batch_size=1, color=chance.randrange(2**24))
    control = graph.add("ControlNetLoader", control_net_name=RANDOM)
    both = graph.add("ControlNetApplyAdvanced", positive=graph.positive, negative=graph.negative,
                     control_net=[control, 0], image=[picture, 0], strength=0.5, start_percent=0.0,
                     end_percent=chance.choice([0.5, 1.0]))
    graph.positive, graph.negative = [both, 0], [both, 1]


def _latent(graph: Graph, chance: random.Random, sizes: Sequence[int], batch: int,
            again: bool) -> float:
    """An empty latent, or an image to go on from, half of them masked; the denoise that goes with it."""
    size = {side: chance.choice(sizes) for side in ("width", "height")}
    graph.latent = [graph.add("EmptyLatentImage", **size, batch_size=batch), 0]
    if not again:
        return 1.0
    graph.ksampler("euler", 2, seed=chance.randrange(99))
    if chance.random() < 0.5:
        mask = graph.add("SolidMask", value=chance.choice([0.5, 1.0]), **size)
        graph.latent = [graph.add("SetLatentNoiseMask", samples=graph.latent, mask=[mask, 0]), 0]
    return 0.6


def _options(family: str, chance: random.Random, denoise: float) -> dict[str, Any]:
    """Half of a family's options at random: choices, whole numbers and switches; but AMED on its own base, or
    it trains for long."""
    own = {name: option for name, option in FAMILIES[family].options.items() if option.stand_in is None}
    drawn = {name: _value(option, chance) if chance.random() < 0.5 else option.default
             for name, option in own.items()}
    if "first_step" in drawn and denoise < 1.0:
        drawn["first_step"] = "evaluate"
    return drawn | ({"base": "amed"} if family == "amed" else {})


def _value(option: Option, chance: random.Random) -> Any:
    if option.kind is bool:
        return chance.random() < 0.5
    if option.kind is int:
        return chance.randint(int(option.low), min(int(option.high), 3))
    return chance.choice(option.choices) if option.choices else option.default


def _sigmas(graph: Graph, chance: random.Random, steps: int, denoise: float, scheduler: str | None) -> list:
    """ComfyUI's schedule, or half of the time one of ours; without a name always the same."""
    if scheduler and chance.random() < 0.5:
        return [graph.add("LambdaScheduler", model=graph.model, steps=steps, denoise=denoise,
                          clock=chance.choice(["lambda", "t", "cosine"]), rho=1.0, sigma_max=0.0,
                          sigma_min=0.0, to_zero=True, values=""), 0]
    return [graph.add("BasicScheduler", model=graph.model, scheduler=scheduler or "karras", steps=steps,
                      denoise=denoise), 0]


def _guided(graph: Graph, sampler: list, sigmas: list, seed: int, label: str) -> Graph:
    guider = graph.add("LambdaClassifierGuider", model=graph.model, positive=graph.positive,
                       negative=graph.negative, classifier=CLASSIFIER, label=label, scale=4.0, cfg=1.0)
    noise = graph.add("RandomNoise", noise_seed=seed)
    graph.latent = [graph.add("SamplerCustomAdvanced", noise=[noise, 0], guider=[guider, 0], sampler=sampler,
                              sigmas=sigmas, latent_image=graph.latent), 0]
    return graph


def files(base: Path) -> None:
    """A LoRA of random weights for the nano emoji, a ControlNet of such and a hypersolver for the tiny
    one."""
    models, generator = base / "models", torch.Generator().manual_seed(0)
    for folder in ("loras", "controlnet", "solver_calibrations"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    rows, columns = _shapes(demo.NANO)[f"{LAYER}.weight"]
    name = f"diffusion_model.{LAYER}"
    save_file({f"{name}.lora_up.weight": torch.randn(rows, 1, generator=generator),
               f"{name}.lora_down.weight": 0.1 * torch.randn(1, columns, generator=generator)},
              models / "loras" / RANDOM)
    save_file(_control_lora(_shapes(demo.CHECKPOINT), generator), models / "controlnet" / RANDOM)
    shutil.copy(EMOJI / HYPERSOLVER, models / "solver_calibrations" / HYPERSOLVER)


def _shapes(checkpoint: str) -> dict[str, list[int]]:
    """Of the network's weights, by name."""
    with safe_open(EMOJI / "checkpoints" / checkpoint, framework="pt") as file:
        return {name.removeprefix("model.diffusion_model."): file.get_slice(name).get_shape()
                for name in file.keys()}


def _control_lora(shapes: dict[str, list[int]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What a ControlNet has beside its copy of the model, which ComfyUI takes from the model itself."""
    def convolution(name: str, inputs: int, outputs: int, size: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(outputs, inputs, size, size, generator=generator)
        return {f"{name}.weight": weight / (size * inputs**0.5), f"{name}.bias": torch.zeros(outputs)}

    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")}
    channels = [next(shape[0] for name, shape in shapes.items() if name.startswith(f"input_blocks.{k}.0.")
                     and len(shape) == 4) for k in sorted(blocks)]
    hint = [*HINT, channels[0]]
    parts = [convolution(f"input_hint_block.{2 * k}", *hint[k:k + 2], 3) for k in range(len(HINT))]
    parts += [convolution(f"zero_convs.{k}.0", c, c, 1) for k, c in enumerate(channels)]
    parts += [convolution("middle_block_out.0", channels[-1], channels[-1], 1)]
    return {"lora_controlnet": torch.zeros(0)} | {key: v for part in parts for key, v in part.items()}
