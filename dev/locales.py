"""Write locales/ from the nodes' own definitions: `python dev/locales.py`, after any change of a node, a
setting or a panel's text.

    locales/en    what the definitions say
    locales/zh    the same through dev/zh.json: `texts` maps each English text to a Chinese one, and
                  `endings` how a node ends an option's tooltip (its range and default), so that only
                  what comes before it must be in `texts`

A text without a translation is named, and nothing is written for it; tests/test_locales.py fails then, and
where locales/ is not what this script writes.
"""
from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "tests")]
LOCALES = ROOT / "locales"
TABLE = ROOT / "dev" / "zh.json"
FULL_STOP = "\u3002"
Table = dict[str, dict[str, str]]

def english() -> dict[str, dict]:
    """File -> content, from the pack as ComfyUI loads it."""
    from comfy_host import pack
    pack()
    panel, settings = (sys.modules[f"custom_nodes_x_lambda-solvers.nodes.{name}"]
                       for name in ("status.panel", "settings"))
    schemas = [node.GET_SCHEMA() for node in asyncio.run(pack().comfy_entrypoint().get_node_list())]
    categories = sorted({part for schema in schemas for part in schema.category.split("/")})
    return {
        "main.json": {
            "lambdaSolvers": {"panel": dict(panel.WORDS)},
            "nodeCategories": {name: name for name in categories},
            "settingsCategories": {name: name for entry in settings.PAGE for name in entry["category"][:2]},
        }, "nodeDefs.json": {
            schema.node_id: _node(schema) for schema in sorted(schemas, key=lambda schema: schema.node_id)
        }, "settings.json": {entry["id"].replace(".", "_"): _setting(entry) for entry in settings.PAGE},
    }


def translated(files: dict[str, dict], table: Table) -> tuple[dict[str, dict], list[str]]:
    """The files with every text replaced, and one line for every text that the table lacks."""
    missing = []

    def text(where: str, words: str) -> str:
        found = translate(words, table)
        if found is None:
            missing.append(f"{where}: {words!r}")
        return found or ""

    return {name: _mapped(content, text, name) for name, content in files.items()}, missing


def translate(words: str, table: Table) -> str | None:
    texts = table["texts"]
    if words in texts:
        return texts[words]
    for ending, translation in table["endings"].items():
        match = re.fullmatch(rf"(.*)\. ({ending})", words, re.S)
        if match and match[1] in texts:
            return texts[match[1]] + FULL_STOP + re.sub(ending, translation, match[2])
    return None


def unused(files: dict[str, dict], table: Table) -> set[str]:
    """Entries of the table that no text asks for any more."""
    asked = set()
    for name, content in files.items():
        _mapped(content, lambda where, words: asked.add(words) or "", name)
    return {
        entry for entry in table["texts"]
        if entry not in asked and not any(words.startswith(entry + ". ") for words in asked)
    }


def table() -> Table:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def written(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _node(schema: Any) -> dict[str, Any]:
    def texts(entry: Any, name: str) -> dict[str, str]:
        return {"name": name} | ({"tooltip": entry.tooltip} if entry.tooltip else {})

    node: dict[str, Any] = {
        "display_name": schema.display_name, "description": schema.description,
        "inputs": {entry.id: texts(entry, entry.display_name or entry.id) for entry in schema.inputs}
    }
    if schema.outputs:
        node["outputs"] = {str(i): texts(entry, entry.display_name) for i, entry in enumerate(schema.outputs)}
    return node


def _setting(entry: dict[str, Any]) -> dict[str, Any]:
    return {"name": entry["name"], "tooltip": entry["tooltip"]} | (
        {"options": {option: option for option in entry["options"]}} if "options" in entry else {})


def _mapped(content: Any, text: Callable[[str, str], str], where: str) -> Any:
    if isinstance(content, str):
        return text(where, content)
    return {key: _mapped(value, text, f"{where} {key}") for key, value in content.items()}


def main() -> None:
    files = english()
    chinese, missing = translated(files, table())
    for language, contents in (("en", files), ("zh", chinese)):
        for name, content in contents.items():
            path = LOCALES / language / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(written(content), encoding="utf-8")
    for line in missing:
        print("no translation in dev/zh.json for", line)
    for entry in sorted(unused(files, table())):
        print("not used any more in dev/zh.json:", repr(entry))
    if missing:
        raise SystemExit(1)


if __name__ == "__main__":
    import environment
    environment.enter("test")
    main()
