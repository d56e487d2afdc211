"""Workflows queued at random in one real ComfyUI: cancelled, their clients gone, several at a time.

Every image that was finished is that of the same workflow alone, bit by bit.
"""
from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import environment
from comfyui_server import Run, Server
from test_server import Graph

from .found import Found

NAMES = ["lambda_2m", "lambda_3m", "lambda_2m_sde", "lambda_3m_sde", "lambda_v3", "lambda_fitted"]
OPTIONS = {
    "multistep": [{}, {"prediction": "noise", "order": 3}, {"rule": "bh2", "corrector": "full"}],
    "singlestep": [{}, {"order": 3}, {"fast": True}], "adaptive": [{"rtol": 0.3}, {"order": 2}],
    "sde": [{}, {"order": 3, "eta": 0.5}, {"law": "ddim", "corrector": "half"}],
}
DISTINCT, CLIENTS = 60, 3
LORA, LAYER = "random.safetensors", "diffusion_model.time_embed.0"
CHECKPOINT = environment.ROOT / "dev" / "tiny_emoji" / "checkpoints" / "tiny_emoji.safetensors"
LEAK = 30.0  # MiB for a hundred workflows


class Gone(Exception):
    """The client closed its page."""


def prompts(folder: Path, chance: random.Random, seconds: float) -> Found:
    found = Found()
    base = environment.base_directory(folder)
    environment.link_to(base / "custom_nodes" / "doubles", environment.ROOT / "tests" / "doubles")
    _lora(base / "models" / "loras" / LORA)
    with Server(environment.ensure(), base) as server:
        alone: dict[int, Tensor] = {}
        start = time.monotonic()
        while len(alone) < DISTINCT and (time.monotonic() - start < 0.3 * seconds or len(alone) < 4):
            alone[len(alone)] = _graph(random.Random(len(alone))).samples(server)
        found.figures["distinct workflows"] = len(alone)
        asyncio.run(_storm(server, found, alone, chance, time.monotonic() + 0.7 * seconds))
        if server.process.poll() is not None:
            found.fault(f"the server ended with {server.process.poll()}")
    return found


def _graph(chance: random.Random) -> Graph:
    """One of endless workflows: sampler, size, batch, steps, image to image, mask, LoRA."""
    graph = Graph(chance.choice(["panda", "red heart", "sun"]))
    if chance.random() < 0.2:
        graph.through("LoraLoaderModelOnly", lora_name=LORA, strength_model=0.5)
    size = {side: chance.choice([128, 192, 256, 320]) for side in ("width", "height")}
    graph.latent = [graph.add("EmptyLatentImage", **size, batch_size=chance.choice([1, 1, 2, 3])), 0]
    again, denoise = chance.random() < 0.4, 1.0
    if again:
        graph.ksampler("euler", 2, seed=chance.randrange(99))
        denoise = 0.6
    if again and chance.random() < 0.5:
        mask = graph.add("SolidMask", value=chance.choice([0.5, 1.0]), **size)
        graph.latent = [graph.add("SetLatentNoiseMask", samples=graph.latent, mask=[mask, 0]), 0]
    steps, seed = chance.randrange(2, 9), chance.randrange(2**40)
    if chance.random() < 0.6:
        return graph.ksampler(chance.choice(NAMES), steps, seed=seed, denoise=denoise,
                              scheduler=chance.choice(["karras", "normal", "simple"]))
    family = chance.choice([*OPTIONS])
    sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=steps, denoise=denoise)
    return graph.family(family, [sigmas, 0], seed, **chance.choice(OPTIONS[family]))


async def _storm(server: Server, found: Found, alone: dict[int, Tensor], chance: random.Random,
                 end: float) -> None:
    """Clients queue, wait, cancel and leave until the time is over; then what they left behind is seen."""
    queued: dict[str, int] = {}
    memory: list[float] = []

    async def client() -> None:
        while (time.monotonic() < end or found.figures["workflows"] < 6) and server.process.poll() is None:
            which = chance.randrange(len(alone))
            graph, name = _graph(random.Random(which)), f"storm{len(queued)}"
            graph.add("TestSaveLatent", latent=graph.latent, name=name)
            queued[name] = which
            found.figures["workflows"] += 1
            kind = chance.choices(["waits", "cancels", "leaves"], [0.6, 0.25, 0.15])[0]
            try:
                run = await server._run(graph.nodes, _watcher(kind, chance.randrange(1, 5)), None)
            except Gone:
                found.figures["clients gone"] += 1
                continue
            found.figures[{"success": "finished", "interrupted": "cancelled"}.get(run.status, "errors")] += 1
            if run.status == "error":
                found.fault(f"workflow {which}: {run.error.get('exception_message')}")
            memory.append(_resident(server.process.pid))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    await _quiet(server)
    for name, which in queued.items():
        path = server.base / "output" / f"{name}.safetensors"
        if path.exists():
            found.figures["images compared"] += 1
            if not torch.equal(load_file(path)["samples"], alone[which]):
                found.fault(f"workflow {which} made another image than alone")
    _leak(found, memory)


def _watcher(kind: str, after: int):
    """What a client does when it sees so many steps."""
    async def watch(server: Server, run: Run) -> None:
        if len(run.progress) == after and kind == "cancels":
            await server.interrupt()
        if len(run.progress) == after and kind == "leaves":
            raise Gone

    return None if kind == "waits" else watch


async def _quiet(server: Server, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        queue = await asyncio.to_thread(server.get, "/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            return
        await asyncio.sleep(0.5)


def _leak(found: Found, memory: list[float]) -> None:
    """How memory grows, once all has been loaded: told always, a fault where there is enough to tell by."""
    later = memory[len(memory) // 3:]
    if len(later) < 3:
        return
    slope = 100.0 * float(np.polyfit(range(len(later)), later, 1)[0])
    found.figures["MiB more for a hundred workflows"] = round(slope)
    if len(later) >= 100 and slope > LEAK:
        found.fault(f"memory grows by {slope:.0f} MiB for a hundred workflows")


def _resident(process: int) -> float:
    """MiB that a process holds."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def _lora(path: Path) -> None:
    """A LoRA of one layer of the emoji model's network."""
    with safe_open(CHECKPOINT, framework="pt") as file:
        rows, columns = file.get_slice(f"model.{LAYER}.weight").get_shape()
    generator = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{LAYER}.lora_up.weight": torch.randn(rows, 1, generator=generator),
               f"{LAYER}.lora_down.weight": 0.1 * torch.randn(1, columns, generator=generator)}, path)
