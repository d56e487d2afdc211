"""The routes behind web/js/lambda_solvers.js.

    GET  /lambda_solvers/pack     what the interface must know of the pack: its nodes, names and version
    POST /lambda_solvers/panel    {"node", "graph", "locale"} -> panel.answer; 400 with {"error"} if malformed
"""
from __future__ import annotations

import asyncio
import functools
import json
import reprlib
from typing import Any

from aiohttp import web
from server import PromptServer

from ...hosting.names import NAMES
from .. import settings
from ..sampling import listed
from . import panel, plan
from .metadata import ROOT, version

LARGEST = 2_000  # nodes around one sampler
FARTHEST = 2.0**64  # from zero: seeds are the largest numbers of a workflow


def register() -> None:
    if not hasattr(PromptServer, "instance"):
        return  # the pack is imported without a server, for its definitions only
    routes = PromptServer.instance.routes
    routes.get("/lambda_solvers/pack")(pack)
    routes.post("/lambda_solvers/panel")(show)


async def pack(request: web.Request) -> web.Response:
    return web.json_response(about())


async def show(request: web.Request) -> web.Response:
    try:
        node, graph, locale = checked(await request.json())
    except (ValueError, RecursionError) as fault:  # a JSONDecodeError is a ValueError
        return web.json_response({"error": str(fault)}, status=400)
    say = functools.partial(text, locale)
    return web.json_response(await asyncio.to_thread(panel.answer, graph, node, settings.rule, say))


def about() -> dict[str, Any]:
    return {"cnr_id": "lambda-solvers", "ver": version(), "module": f"custom_nodes.{ROOT.name}",
            "nodes": list(plan.NODE_IDS), "hosts": plan.HOSTS, "names": list(filter(listed, NAMES)),
            "settings": settings.PAGE, "plot": settings.PLOT}


def checked(body: Any) -> tuple[str, plan.Graph, str]:
    """Node, graph and locale of a request. ValueError saying what of it is not as it must be."""
    if not isinstance(body, dict):
        raise ValueError("the request must be a JSON object with node and graph")
    node, graph, locale = body.get("node"), body.get("graph"), body.get("locale", "en")
    if not isinstance(graph, dict) or not 0 < len(graph) <= LARGEST:
        raise ValueError(f"graph must be a JSON object of 1 to {LARGEST} nodes")
    for name, content in graph.items():
        if not (isinstance(content, dict) and isinstance(content.get("class_type"), str)
                and isinstance(content.get("inputs"), dict)):
            raise ValueError(f"graph[{name!r}] must have a class_type (text) and inputs (an object)")
        for key, value in content["inputs"].items():
            pair = isinstance(value, list) and len(value) == 2
            link = pair and isinstance(value[0], str) and type(value[1]) is int
            if not link and not isinstance(value, (str, int, float, bool)):
                raise ValueError(f"input {key!r} of graph[{name!r}] must be a value or [node id, slot], not "
                                 f"{reprlib.repr(value)}")
            if isinstance(value, (int, float)) and not abs(value) <= FARTHEST:  # nor NaN, which JSON has here
                raise ValueError(f"input {key!r} of graph[{name!r}] must be from -{FARTHEST:g} to "
                                 f"{FARTHEST:g}")
    if not isinstance(node, str) or node not in graph:
        raise ValueError(f"node = {node!r} must be one of the graph's ids")
    if graph[node]["class_type"] not in (*plan.NODE_IDS, *plan.HOSTS):
        raise ValueError(f"node {node!r} is a {graph[node]['class_type']}, which has no sampler of Lambda "
                         f"Solvers")
    if not isinstance(locale, str):
        raise ValueError(f"locale = {locale!r} must be text such as en or zh")
    return node, graph, locale


def text(locale: str, key: str, **values: Any) -> str:
    """A text of the panel, in English where there is no translation."""
    return translations().get(locale, panel.WORDS).get(key, panel.WORDS[key]).format(**values)


@functools.cache
def translations() -> dict[str, dict[str, str]]:
    """By locale; few, whatever is asked for."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["lambdaSolvers"]["panel"]
            for path in (ROOT / "locales").glob("*/main.json")}
