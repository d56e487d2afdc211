"""A real ComfyUI server on a free loopback port, and a client that queues workflows and watches them run."""
from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Awaitable, Callable

import aiohttp

from environment import Environment

Prompt = dict[str, dict[str, Any]]
"""A workflow in ComfyUI's API form: node id -> class_type and inputs."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class PromptRefused(RuntimeError):
    """The server did not accept a workflow; the message holds its reasons."""


@dataclass
class Run:
    """What happened to one queued workflow."""

    status: str = "running"                                 # success, error or interrupted
    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> its ui output
    error: dict = field(default_factory=dict)               # exception_message, node_id, ... of a failed run
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)     # encoded images
    texts: list[str] = field(default_factory=list)          # lines shown on the running node
    seconds: float = 0.0


TEXT = 3  # the binary event that carries a line of text; the others carry pictures

Watcher = Callable[["Server", Run], Awaitable[None]]
"""Called on every progress event of a run."""


class Server:
    """`with Server(environment, base) as server:` starts ComfyUI and stops it."""

    def __init__(self, environment: Environment, base: Path, *arguments: str,
                 log: Path | None = None) -> None:
        self.environment, self.base = environment, base
        self.arguments = arguments
        self.log = log or base / "server.log"

    def __enter__(self) -> "Server":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            str(self.environment.python),
            str(self.environment.comfyui / "main.py"), "--port",
            str(port), "--base-directory",
            str(self.base), "--disable-auto-launch", "--preview-method", "latent2rgb", "--database-url",
            "sqlite:///:memory:", "--disable-api-nodes", *([] if _accelerator() else ["--cpu"]),
            *self.arguments
        ]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.environment.comfyui,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *reason: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def run(self, prompt: Prompt, watch: Watcher | None = None, saved: dict | None = None) -> Run:
        """Queue a workflow and wait until it has ended, whatever its end. `saved` is its form for the user
        interface."""
        return asyncio.run(self._run(prompt, watch, saved))

    def get(self, path: str) -> Any:
        """The JSON answer to GET path."""
        async def ask() -> Any:
            async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
                answer.raise_for_status()
                return await answer.json()
        return asyncio.run(ask())

    def file(self, shown: dict) -> Path:
        """The file of one entry of a node's ui output."""
        return self.base / shown["type"] / shown["subfolder"] / shown["filename"]

    async def interrupt(self) -> None:
        async with aiohttp.ClientSession() as session, session.post(self.url + "/interrupt") as answer:
            answer.raise_for_status()

    async def _run(self, prompt: Prompt, watch: Watcher | None, saved: dict | None) -> Run:
        client, run, start = uuid.uuid4().hex, Run(), time.perf_counter()
        async with aiohttp.ClientSession() as session, \
                session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_:
            asked = {
                "prompt": prompt, "client_id": client,
                "extra_data": {"extra_pnginfo": {"workflow": saved}} if saved else {}
            }
            async with session.post(self.url + "/prompt", json=asked) as answer:
                said = await answer.json()
                if answer.status != 200:
                    raise PromptRefused(json.dumps(said, indent=1))
            mine = said["prompt_id"]
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind, content = struct.unpack(">I", message.data[:4])[0], message.data[4:]
                    if kind == TEXT:
                        length = struct.unpack(">I", content[:4])[0]
                        run.texts.append(content[4 + length:].decode())
                    else:
                        run.previews.append(content[4:])
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id", mine) != mine:
                    continue
                if kind == "progress":
                    run.progress.append((data["value"], data["max"]))
                    if watch:
                        await watch(self, run)
                elif kind == "executed":
                    run.outputs[data["node"]] = data["output"]
                elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                    run.status = kind.removeprefix("execution_")
                    run.error = data if kind == "execution_error" else {}
                    break
        run.seconds = time.perf_counter() - start
        return run

    def _wait_until_it_answers(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped while starting; the end of {self.log}:\n{self._tail()}")
            try:
                self.get("/system_stats")
                return
            except aiohttp.ClientError:
                time.sleep(0.25)
        raise TimeoutError(
            f"ComfyUI did not answer within {seconds:g} s; the end of {self.log}:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def _accelerator() -> bool:
    import torch
    return torch.cuda.is_available() or torch.backends.mps.is_available()
