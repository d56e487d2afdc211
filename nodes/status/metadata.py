"""Which calibration made an image, in the image's metadata.

ComfyUI's SaveImage writes the prompt that is running, as JSON, and what a node of it has under `_meta` is
read by no validation and no cache. There goes, on the node that sampled:

    "lambda_solvers": {"version": of the pack, "calibrations": [{"name": ..., "digest": ...}], "cached": true}

`cached` where ComfyUI had kept that node's result of an earlier prompt, and ran only what is behind it.
"""
from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

from server import PromptServer

from ...hosting import events
from .plan import Graph
from .runs import running

ROOT = Path(__file__).parent.parent.parent  # not resolved: its name is the folder in custom_nodes
KEY = "lambda_solvers"
KEPT = 256
_noted: OrderedDict[tuple[str, str], list[dict[str, str]]] = OrderedDict()  # node, branch -> calibrations


def register() -> None:
    if hasattr(PromptServer, "instance"):
        PromptServer.instance.add_on_prompt_handler(queued)


@functools.cache
def version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


def said(text: str) -> None:
    """Nothing of it is kept."""


def ran(run: events.Ran) -> None:
    """Note what the running node has used: each once, if it samples several times as Compare Samplers."""
    place = running()
    if place is None or not run.used:
        return
    prompt, _, node = place
    meta = prompt[node].setdefault("_meta", {})
    if meta.get(KEY, {"cached": True}).get("cached"):
        meta[KEY] = {"version": version(), "calibrations": []}
    noted = meta[KEY]["calibrations"]
    noted += [told for used in run.used.values() if (told := used.told()) not in noted]
    _noted[node, branch(prompt, node)] = list(noted)
    while len(_noted) > KEPT:
        _noted.popitem(last=False)


def queued(request: Any) -> Any:
    """A prompt before it runs: notes in it are another run's; a node that ran just so may not run again."""
    prompt = request.get("prompt", {})
    for node in prompt.values():
        node.get("_meta", {}).pop(KEY, None)
    for node in {node for node, _ in _noted if node in prompt}:
        if noted := _noted.get((node, branch(prompt, node))):
            meta = prompt[node].setdefault("_meta", {})
            meta[KEY] = {"version": version(), "calibrations": noted, "cached": True}
    return request


def branch(prompt: Graph, node: str) -> str:
    """A digest of a node, and of all nodes before it, as they are set."""
    found, todo = {}, [node]
    while todo:
        name = todo.pop()
        if name in prompt and name not in found:
            found[name] = [prompt[name].get("class_type"), prompt[name].get("inputs", {})]
            todo += [content[0] for content in found[name][1].values()
                     if isinstance(content, list) and content and isinstance(content[0], str)]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
