"""What the samplers of ours did since the server started, for the interface to show: kept in memory, a few runs."""
from __future__ import annotations

import json
import logging
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable, Mapping

from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from .plan import UNTOLD, Graph, model_chain

EVENT = "lambda_solvers.run"
KEPT = 64
UNKNOWN = "null"  # the key of a chain that is not known to its end
UNNOTED = ("seed", "noise_seed")  # the interface draws a new one as soon as a run is queued


@dataclass(frozen=True)
class Run:
    """One run of a sampling node."""

    graph: Graph
    sampling: object
    sigmas: list[float]
    options: dict[str, Any]  # as written, and the calibration that was used
    evaluations: int
    said: tuple[tuple[str, bool], ...]  # lines said while it ran, and whether they are warnings


@dataclass(frozen=True)
class Model:
    """A model as some chain of nodes makes it. `about` is None until a sampler needed to know which it is."""

    sampling: object
    about: Mapping[str, Any] | None


_runs: OrderedDict[str, Run] = OrderedDict()
_models: OrderedDict[str, Model] = OrderedDict()
_running: ContextVar[_Notes | None] = ContextVar("running", default=None)


class _Notes:
    """What the run going on has said and used."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bool]] = []
        self.used: dict[str, Any] = {}


def note(text: str, level: int) -> None:
    """Keep a line that was said on the running node."""
    notes = _running.get()
    if notes is not None:
        notes.said.append((text, level >= logging.WARNING))


def use(option: str, calibration: Any) -> None:
    """Keep the calibration that the running solver was given for this option."""
    notes = _running.get()
    if notes is not None:
        notes.used[option] = calibration


def observed(function: Callable[..., Tensor], describe: Callable[[Any], Mapping[str, Any]] | None) -> Callable[..., Tensor]:
    """A sampler function that remembers its runs; `describe` says which model a guider samples, where that matters."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        counted, notes = _Counted(model), _Notes()
        token = _running.set(notes)
        try:
            result = function(counted, x, sigmas, extra_args, callback, disable, **options)
        finally:
            _running.reset(token)
        written = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str))}
        _remember(model.inner_model, sigmas, written | notes.used, counted.evaluations, tuple(notes.said), describe)
        return result

    return sample


def last(graph: Graph, runs: str) -> Run | None:
    """The last run of a sampling node, if the workflow around it is still the one that ran."""
    run = _runs.get(runs)
    return run if run and all(_same(node, run.graph.get(name)) for name, node in graph.items()) else None


def model(graph: Graph, runs: str) -> Model | None:
    """The model that a sampling node will get, if one has come through the same nodes before."""
    return _models.get(_key(graph, runs))


class _Counted:
    """A model that counts its evaluations."""

    def __init__(self, model: Any) -> None:
        self.model, self.inner_model, self.evaluations = model, model.inner_model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.evaluations += 1
        return self.model(*args, **kwargs)


def _remember(guider: Any, sigmas: Tensor, options: dict, evaluations: int, said: tuple, describe: Callable | None) -> None:
    context = get_executing_context()
    if context is None:
        return
    server = PromptServer.instance
    running = [item[2] for item in server.prompt_queue.currently_running.values() if item[1] == context.prompt_id]
    if not running or context.node_id not in running[0]:
        return  # a node that another node has made while running
    [graph] = running
    sampling = guider.model_patcher.get_model_object("model_sampling")
    chain = _key(graph, context.node_id)
    known = _models.get(chain)
    about = describe(guider) if describe else known.about if known else None
    _keep(_runs, context.node_id, Run(graph, sampling, sigmas.tolist(), options, evaluations, said))
    if chain != UNKNOWN:
        _keep(_models, chain, Model(sampling, about))
    server.send_sync(EVENT, {"node": context.node_id}, server.client_id)


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
