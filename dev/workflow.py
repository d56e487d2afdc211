"""Workflows as the user interface saves them, turned into what the server runs."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

CONTROL = {"fixed", "increment", "decrement", "randomize"}  # the user interface's own widget behind a seed


def load(path: Path, object_info: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """The API form of a saved workflow: links become [node id, output], widget values get their names.

    object_info is the server's /object_info, which knows the widgets of each class and their order.
    """
    workflow = json.loads(path.read_text())
    source = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        inputs = dict(zip(_widgets(object_info[node["type"]]), _values(node.get("widgets_values", []))))
        inputs |= {
            slot["name"]: source[slot["link"]] for slot in node.get("inputs", [])
            if slot.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def nodes_of(prompt: dict[str, dict], class_type: str) -> Iterator[dict[str, Any]]:
    """The inputs of every node of one class, to be changed in place."""
    return (node["inputs"] for node in prompt.values() if node["class_type"] == class_type)


def _widgets(info: dict) -> list[str]:
    named = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return [name for name, (kind, *_) in named.items()
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")]


def _values(values: list) -> list:
    return [value for i, value in enumerate(values)
            if not (value in CONTROL and i and isinstance(values[i - 1], int))]
