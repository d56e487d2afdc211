"""What the samplers of ours did since the server started, for the interface: a few runs, in memory."""
from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Mapping

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...hosting import events
from .plan import UNTOLD, Graph, model_chain

EVENT = "lambda_solvers.run"
KEPT = 64
UNKNOWN = "null"  # the key of a chain that is not known to its end
UNNOTED = ("seed", "noise_seed")  # the interface draws a new one as soon as a run is queued
HARMLESS = str.maketrans("<>", "\u2039\u203a")
"""The interface puts a progress text into innerHTML, and names of models and patches are of others' files."""


@dataclass(frozen=True)
class Run:
    """One run of a sampling node."""

    graph: Graph
    sampling: object
    sigmas: list[float]
    options: dict[str, Any]        # as written, and the calibration as the solver was given it
    used: list[dict[str, str]]     # name and digest of that calibration
    evaluations: int
    said: tuple[tuple[str, bool], ...]  # lines said while it ran, and whether they are warnings


@dataclass(frozen=True)
class Model:
    """A model as some chain of nodes makes it. `about` is None until a sampler needed to know which it is."""

    sampling: object
    about: Mapping[str, Any] | None
    shape: tuple[int, ...] = (1, 4, 64, 64)  # of the latents that it sampled last
    seconds: float | None = None  # that an evaluation of these took


_runs: OrderedDict[str, Run] = OrderedDict()
_models: OrderedDict[str, Model] = OrderedDict()


def running() -> tuple[Graph, str, str] | None:
    """The running prompt, as ComfyUI's own nodes are given it; the running node; the prompt's node that it
    is, or that made it. None where none runs: ComfyUI is a library, or another's thread runs the sampler."""
    context, progress = get_executing_context(), get_progress_state()
    if context is None or context.prompt_id != progress.prompt_id:
        return None
    prompt = progress.dynprompt
    return prompt.get_original_prompt(), context.node_id, prompt.get_real_node_id(context.node_id)


def said(text: str) -> None:
    """Show a line on the running node, to the one who queued it."""
    context = get_executing_context()
    if context is not None and (client := PromptServer.instance.client_id) is not None:
        PromptServer.instance.send_progress_text(text.translate(HARMLESS), context.node_id, client)


def ran(run: events.Ran) -> None:
    """Keep a run, and what model it sampled, and say so to the one who queued it."""
    place = running()
    if place is None or place[1] not in place[0]:
        return  # not a node of the prompt, but one that another node has made while running
    graph, node, _ = place
    sampling = run.guider.model_patcher.get_model_object("model_sampling")
    chain = _key(graph, node)
    known = _models.get(chain)
    about = run.describe(run.guider) if run.describe else known.about if known else None
    given = {option: used.suited for option, used in run.used.items()}
    used = [used.told() for used in run.used.values()]
    sigmas, options = run.sigmas.tolist(), run.options | given
    _keep(_runs, node, Run(graph, sampling, sigmas, options, used, run.evaluations, run.said))
    if chain != UNKNOWN:
        seconds = run.seconds / run.evaluations if run.evaluations else known.seconds if known else None
        _keep(_models, chain, Model(sampling, about, run.shape, seconds))
    if PromptServer.instance.client_id is not None:
        PromptServer.instance.send_sync(EVENT, {"node": node}, PromptServer.instance.client_id)


def last(graph: Graph, runs: str) -> Run | None:
    """The last run of a sampling node, if the workflow around it is still the one that ran."""
    run = _runs.get(runs)
    return run if run and all(_same(node, run.graph.get(name)) for name, node in graph.items()) else None


def model(graph: Graph, runs: str) -> Model | None:
    """The model that a sampling node will get, if one has come through the same nodes before."""
    return _models.get(_key(graph, runs))


def _key(graph: Graph, runs: str) -> str:
    return json.dumps(model_chain(graph, runs), sort_keys=True)


def _keep(store: OrderedDict, key: str, content: Any) -> None:
    store[key] = content
    store.move_to_end(key)
    while len(store) > KEPT:
        store.popitem(last=False)


def _same(shown: Mapping[str, Any], ran: Mapping[str, Any] | None) -> bool:
    """Whether a node as the interface shows it is the one that ran, but for its seed."""
    return ran is not None and shown["class_type"] == ran["class_type"] and all(
        ran["inputs"].get(name, content) == content for name, content in shown["inputs"].items()
        if name not in UNNOTED and content != UNTOLD)
