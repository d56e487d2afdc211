"""Workflows queued at random in one real ComfyUI: cancelled, their clients gone, several at a time.

Every image that was finished is that of the same workflow alone in another server, bit by bit.
"""
from __future__ import annotations

import asyncio
import itertools
import random
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors.torch import load_file

import environment
from comfyui_server import Run, Server
from test_server import Graph

from . import workflows
from .found import Found
from .workflows import KINDS

DISTINCT = 3 * len(KINDS)
CLIENTS = 3
LEAK = 30.0  # MiB for a hundred workflows


class Gone(Exception):
    """The client closed its page."""


def prompts(folder: Path, chance: random.Random, seconds: float) -> Found:
    """Three workflows of every kind, all of them in another order again and again while the storm lasts.
    Then those that made an image, alone: seven tenths of the time are the storm's."""
    found, first = Found(), chance.randrange(2**32)
    base = environment.base_directory(folder)
    environment.link_to(base / "custom_nodes" / "doubles", environment.ROOT / "tests" / "doubles")
    workflows.files(base)

    def graph(which: int) -> Graph:
        return workflows.workflow(KINDS[which % len(KINDS)], random.Random(first + which))

    with Server(environment.ensure(), base) as server:
        queued = asyncio.run(_storm(server, found, graph, chance, time.monotonic() + 0.7 * seconds))
        if server.process.poll() is not None:
            found.fault(f"the server ended with {server.process.poll()}")
    with Server(environment.ensure(), base) as server:
        _compare(server, found, graph, queued)
    return found


async def _storm(server: Server, found: Found, graph: Callable[[int], Graph], chance: random.Random,
                 end: float) -> dict[str, int]:
    """Clients queue, wait, cancel and leave until the time is over. The workflow of every image's name."""
    queued: dict[str, int] = {}
    memory: list[float] = []
    order = itertools.chain.from_iterable(chance.sample(range(DISTINCT), DISTINCT) for _ in itertools.count())

    async def client() -> None:
        while (time.monotonic() < end or found.figures["workflows"] < 6) and server.process.poll() is None:
            which, name = next(order), f"storm{len(queued)}"
            made = graph(which)
            made.add("TestSaveLatent", latent=made.latent, name=name)
            queued[name] = which
            found.figures["workflows"] += 1
            kind = chance.choices(["waits", "cancels", "leaves"], [0.6, 0.25, 0.15])[0]
            try:
                run = await server._run(made.nodes, _watcher(kind, chance.randrange(1, 5)), None)
            except Gone:
                found.figures["clients gone"] += 1
                continue
            found.figures[{"success": "finished", "interrupted": "cancelled"}.get(run.status, "errors")] += 1
            if run.status == "error":
                found.fault(f"{_named(which)}: {run.error.get('exception_message')}")
            memory.append(_resident(server.process.pid))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    await _quiet(server)
    found.figures["kinds"] = len({which % len(KINDS) for which in queued.values()})
    _leak(found, memory)
    return queued


def _compare(server: Server, found: Found, graph: Callable[[int], Graph], queued: dict[str, int]) -> None:
    """Every image beside that of its workflow alone."""
    made: dict[int, list[Path]] = {}
    for name, which in queued.items():
        path = server.base / "output" / f"{name}.safetensors"
        if path.exists():
            made.setdefault(which, []).append(path)
    for which, paths in made.items():
        alone, run = graph(which).run(server)
        found.figures["workflows run alone"] += 1
        for path in paths:
            found.figures["images compared"] += 1
            if alone is None:
                found.fault(f"{_named(which)}, alone: {run.error.get('exception_message')}")
            elif not torch.equal(load_file(path)["samples"], alone):
                found.fault(f"{_named(which)} made another image than alone")


def _named(which: int) -> str:
    return f"workflow {which} ({KINDS[which % len(KINDS)]})"


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

