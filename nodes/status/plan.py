"""What a sampler of ours will do, told from the workflow alone: nothing is loaded and nothing is run.

A workflow is in ComfyUI's API form, node id -> {"class_type", "inputs"}, where an input is a value, or
[node id, slot] for a link. The interface sends the nodes around one of ours; the prompt that is running is a
workflow of the same form.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import comfy.model_sampling
import comfy.samplers
import numpy as np
from comfy_api.latest import io
from nodes import NODE_CLASS_MAPPINGS
from torch import Tensor

from ...hosting.names import NODES, node_id
from ...samplers import FAMILIES
from ...samplers.catalogue import Sampler
from ...samplers.denoisers import FULL
from ...samplers.learning.fitted import Fitted, Unmeasured
from ...samplers.schedule import Level, find_path, levels
from ...samplers.solver import Adaptive, Step
from ..host import path_of
from ..sampling import listed

Graph = Mapping[str, Mapping[str, Any]]
NODE_IDS = {node_id(name): name for name in NODES}
WRAPPERS = ("LambdaOptions",)
"""Nodes from a sampler to one that still is that sampler."""
GIVERS = {
    **dict.fromkeys(("LambdaMeasureModel", "LambdaTuneFitted", "LambdaTrainHypersolver"), "statistics"),
    "LambdaTrainAmed": "trained", "LambdaLoadCalibration": None}
"""Nodes that hand out a calibration, and a model with it -> the solver's option that it is for; None where
that depends on the file."""
SCHEDULERS = [f"comfy_extras.nodes_{name}" for name in (  # in ComfyUI
    "custom_sampler", "align_your_steps", "gits", "optimalsteps")]
HOSTS = ("KSampler", "KSamplerAdvanced", "KSamplerSelect")  # ComfyUI's nodes that may name a sampler of ours
MOST = 1000  # intervals of a schedule that is still planned: the answer comes while somebody is typing
UNTOLD = ["?", 0]  # the link of an input whose other end the interface cannot tell


class Linked(Exception):
    """An input whose value comes over a link, so that it is known in a run only; its name."""


class Job(NamedTuple):
    """A sampler as a workflow sets it, the options that a link sets, and the node that runs it or ""."""

    sampler: Sampler
    options: dict[str, Any]
    linked: list[str]
    node: str
    runs: str


@dataclass(frozen=True)
class Plan:
    """A run before it is made. `steps` is None for adaptive solvers."""

    sampler: Sampler
    settings: dict[str, Any]
    path: str
    levels: list[Level]
    steps: list[Step] | None
    sigma_max: float  # where the model's noise begins

    @property
    def evaluations(self) -> int | None:
        if self.steps is None:
            return None
        return sum(len(step.evaluations) for step in self.steps) - (bool(self.steps) and self.skips_first)

    @property
    def taught(self) -> bool:
        """Whether a hypersolver goes with the steps."""
        return any(step.missed for step in self.steps or ())

    @property
    def skips_first(self) -> bool:
        """Whether the first evaluation is not the model's."""
        return self.sampler.first_step(self.settings) != "evaluate"

    @property
    def levels_chosen(self) -> bool | None:
        """Whether the solver has chosen the levels itself; None if it will, once the model is measured."""
        if not self.settings.get("choose_levels"):
            return False
        return None if isinstance(self.settings["statistics"], Unmeasured) else True

    @property
    def starts_from_noise(self) -> bool:
        """False for img2img (denoise < 1) and for the second part of a run."""
        return bool(self.levels) and self.levels[0].sigma >= FULL * self.sigma_max


def job(graph: Graph, node_id: str) -> Job | None:
    """The sampler of ours that a node is or names; None if it names another's.

    Linked if the name comes over a link.
    """
    node, options, linked = graph[node_id], {}, []
    if node["class_type"] in NODE_IDS:
        sampler = FAMILIES[NODE_IDS[node["class_type"]]]
        written = {name: node["inputs"][name] for name, option in sampler.options.items()
                   if option.stand_in is None and name in node["inputs"]}
        linked = [name for name, content in written.items() if isinstance(content, list)]
        options = {name: content for name, content in written.items() if name not in linked}
    else:
        sampler = listed(value(node, "sampler_name", str))
        if sampler is None:
            return None
    runs = node_id if "model" in node["inputs"] else consumer(graph, node_id)
    sampler.settings({**sampler.stand_ins, **options})
    return Job(sampler, options, linked, node_id, runs)


def consumer(graph: Graph, node_id: str) -> str:
    """The first node that takes this one's SAMPLER and is no wrapper, or ""."""
    for _ in graph:  # as many wrappers as that, unless they wrap each other
        users = [other for other, node in graph.items() if source(node, "sampler")[:1] == [node_id]]
        node_id = min(users, key=lambda name: (len(name), name), default="")
        node = graph.get(node_id)
        if not node or node["class_type"] not in WRAPPERS:
            return node_id
    return ""


def plan(job: Job, sigmas: Sequence[float], sampling: object) -> Plan:
    """The run of a job over these sigmas. ValueError if the model's path or the sigmas are unusable."""
    path = path_of(sampling)
    options = {**job.sampler.stand_ins, **job.options}
    settings = job.sampler.settings(options)
    solver = job.sampler.solver_of(settings)
    run = levels(sigmas, find_path(path)) if len(sigmas) else []
    steps = None if isinstance(solver, Adaptive) else solver.steps(run, find_path(path)) if run else []
    if settings.get("choose_levels") and steps:
        run = [*(step.evaluations[0].at for step in steps), run[-1]]
    return Plan(job.sampler, settings, path, run, steps, float(sampling.sigma_max))


@functools.cache
def usual(path: str) -> object:
    """The noise levels of Stable Diffusion, or of a flow without a shift: drawn until the model is known."""
    host = comfy.model_sampling
    bases = {"ve": (host.ModelSamplingDiscrete, host.EPS),
             "flow": (host.ModelSamplingDiscreteFlow, host.CONST)}[path]
    return type("ModelSampling", bases, {})()


def schedule(graph: Graph, runs: str, sampling: object) -> list[float]:
    """The sigmas that a sampling node will hand to its sampler, if the model has this sampling class."""
    node = graph[runs]
    if "sigmas" in node["inputs"]:
        return _sigmas(graph, *_link(graph, node, "sigmas"), sampling).tolist()
    steps, scheduler = _steps(node), value(node, "scheduler", str)
    _check_scheduler(scheduler)
    denoise = value(node, "denoise", float) if "denoise" in node["inputs"] else 1.0
    if denoise * MOST < steps and denoise > 0:
        raise ValueError(f"{steps} steps at denoise {denoise:g} are too many to draw")
    name = value(node, "sampler_name", str)
    sigmas = comfy.samplers.KSampler(_Model(sampling), steps, "cpu", name, scheduler, denoise).sigmas
    if "end_at_step" in node["inputs"]:  # as in comfy.samplers.KSampler.sample
        start, last = (max(0, value(node, name, int)) for name in ("start_at_step", "end_at_step"))
        if last < len(sigmas) - 1:
            sigmas = sigmas[:last + 1]
            if value(node, "return_with_leftover_noise", str) == "disable":
                sigmas[-1] = 0
        sigmas = sigmas[start:] if start < len(sigmas) - 1 else sigmas[:0]
    return sigmas.tolist()


def guidance(graph: Graph, runs: str) -> float | None:
    """The guidance scale of a sampling node, if it is written there or on its guider."""
    node = graph[runs]
    if "guider" in node["inputs"]:
        guider = source(node, "guider")
        if not guider or guider[0] not in graph:
            return None
        node = graph[guider[0]]
    scale = node["inputs"].get("cfg", 1.0)  # BasicGuider has none
    return float(scale) if isinstance(scale, (int, float)) else None


def model_chain(graph: Graph, runs: str) -> list[tuple[str, dict[str, Any]]] | None:
    """The nodes a model comes through, from its loader, and what is written on them; else None."""
    chain, node = [], graph[runs]
    for _ in range(len(graph) + 1):  # more steps would go round
        step = "model" if "model" in node["inputs"] else "guider" if "guider" in node["inputs"] else None
        if step is None:
            return chain or None
        link = source(node, step)
        if not link or link[0] not in graph:
            return None
        node = graph[link[0]]
        if step == "model" and node["class_type"] not in GIVERS:  # they leave it as it was
            chain.append((node["class_type"], {name: content for name, content in node["inputs"].items()
                                               if not isinstance(content, list)}))
    return None


def givers(graph: Graph, job: Job) -> list[Mapping[str, Any]]:
    """The nodes that hand calibrations to a sampler: the one linked to it, then those its model comes
    through."""
    link = source(graph[job.node], "calibration")
    linked = [graph.get(link[0], {"class_type": "", "inputs": {}})] if link else []
    return [*linked, *(node for node in _models(graph, job.runs) if node["class_type"] in GIVERS)]


def value(node: Mapping[str, Any], name: str, kind: type | None = None) -> Any:
    """What is written on a node.

    Linked if the input is linked, ValueError if it is missing or of another kind.
    """
    content = node["inputs"].get(name)
    if isinstance(content, list):
        raise Linked(name)
    wanted = (int, float) if kind is float else kind
    fits = not wanted or isinstance(content, wanted) and isinstance(content, bool) is (kind is bool)
    if content is None or not fits:
        raise ValueError(f"{name} = {content!r} on {node['class_type']} cannot be used")
    return content


def source(node: Mapping[str, Any], name: str) -> list:
    """[node id, slot] of a linked input, else []."""
    content = node["inputs"].get(name)
    return content if isinstance(content, list) else []


class _Model:
    """As much of a MODEL as a schedule needs."""

    def __init__(self, sampling: object) -> None:
        self.get_model_object = {"model_sampling": sampling}.__getitem__


def _models(graph: Graph, runs: str) -> list[Mapping[str, Any]]:
    """The nodes that a sampling node's model comes through."""
    found, node = [], graph.get(runs)
    while node and len(found) <= len(graph):
        link = source(node, "model") or source(node, "guider")
        node = graph.get(link[0]) if link else None
        found += [node] if node else []
    return found


def _link(graph: Graph, node: Mapping[str, Any], name: str) -> tuple[str, int]:
    link = source(node, name)
    if not link:
        raise ValueError(f"{name} of {node['class_type']} is not connected")
    return link[0], link[1]


def _steps(node: Mapping[str, Any]) -> int:
    steps = value(node, "steps", int)
    if not 1 <= steps <= MOST:
        raise ValueError(f"{steps} steps are too many to draw" if steps > 0 else f"steps = {steps}: choose "
                                                                                 f"at least 1")
    return steps


def _check_scheduler(name: str) -> None:
    if name not in comfy.samplers.KSampler.SCHEDULERS:
        raise ValueError(f"scheduler = {name!r} is not in ComfyUI's list")


def _sigmas(graph: Graph, node_id: str, slot: int, sampling: object, depth: int = 0) -> Tensor:
    """The sigmas of one of ComfyUI's own scheduler nodes: they are functions of what is written on them."""
    node = graph.get(node_id, {"class_type": ""})
    name = node["class_type"]
    found = NODE_CLASS_MAPPINGS.get(name)
    comfyui_s = getattr(found, "RELATIVE_PYTHON_MODULE", "") in SCHEDULERS and issubclass(found, io.ComfyNode)
    if not comfyui_s or depth > 20:
        raise Linked("sigmas")
    schema = found.GET_SCHEMA()
    if slot >= len(schema.outputs) or any(output.get_io_type() != "SIGMAS" for output in schema.outputs):
        raise Linked("sigmas")
    inputs: dict[str, Any] = {}
    for entry in schema.inputs:
        kind = entry.get_io_type()
        if kind == "MODEL":
            inputs[entry.id] = _Model(sampling)
        elif kind == "SIGMAS":
            inputs[entry.id] = _sigmas(graph, *_link(graph, node, entry.id), sampling, depth + 1).clone()
        elif entry.id == "steps":
            inputs[entry.id] = _steps(node)
        else:
            plain = {"INT": int, "FLOAT": float, "BOOLEAN": bool}.get(kind, str)
            inputs[entry.id] = value(node, entry.id, plain)
    low, high = inputs.get("sigma_min"), inputs.get("sigma_max")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"sigma_min = {low:g} must be below sigma_max = {high:g}")
    if "scheduler" in inputs:
        _check_scheduler(inputs["scheduler"])
    if 0.0 < inputs.get("denoise", 1.0) * MOST < inputs.get("steps", 0):
        raise ValueError(f"{inputs['steps']} steps at denoise {inputs['denoise']:g} are too many to draw")
    try:
        sigmas = found.execute(**inputs).result[slot]
    # another's code, at any value
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as fault:
        raise ValueError(f"{name} makes no schedule of these values: {fault}") from fault
    if len(sigmas) > MOST + 1:
        raise ValueError(f"{len(sigmas) - 1} steps are too many to draw")
    return sigmas


def curve(plan: Plan, evaluations: int | None) -> dict[str, Any]:
    """lam over the schedule, and so many evaluations on it, in a unit square whose y points down.

    Where there are fewer than planned, the first was not the model's.
    """
    finite = [(i, level.lam) for i, level in enumerate(plan.levels) if math.isfinite(level.lam)]
    if not finite:
        return {"line": [], "points": []}
    places, lams = np.array(finite).T
    low, high, width = lams[0], max(lams[-1], lams[0] + 1e-9), max(len(plan.levels) - 1, 1)

    def at(lam: float) -> list[float]:
        if not math.isfinite(lam):
            return [0.0, 1.0]  # sigma = 1 of a flow
        x, y = np.interp(lam, lams, places) / width, 1 - (lam - low) / (high - low)
        return [round(float(x), 4), round(float(y), 4)]

    points = [at(evaluation.at.lam) for step in plan.steps or [] for evaluation in step.evaluations]
    return {"line": [at(lam) for lam in lams], "points": points[-evaluations:] if evaluations else []}


def highest_order(steps: Sequence[Step]) -> int:
    """The most evaluations that one update of a run combines."""
    def reach(step: Step) -> int:
        return 1 - min((k for update in step.updates for k, _ in update.terms), default=0)

    return max((max(len(step.evaluations), reach(step)) for step in steps), default=0)


def _order_not_reached(plan: Plan) -> dict[str, Any] | None:
    order = plan.settings.get("order")
    if order is None or not plan.steps or highest_order(plan.steps) >= order:
        return None
    return {"order": order, "steps": len(plan.levels) - 1}


def _first_step_not_skipped(plan: Plan) -> dict[str, Any] | None:
    refused = plan.skips_first and plan.levels and not plan.starts_from_noise
    return {"sigma": f"{plan.levels[0].sigma:.4g}"} if refused else None


def _nothing_to_learn(plan: Plan) -> dict[str, Any] | None:
    trains = "trained" in plan.settings and plan.steps
    nothing = trains and max(len(step.evaluations) for step in plan.steps) == 1
    return {"steps": len(plan.steps)} if nothing else None


def _not_taught(plan: Plan) -> dict[str, Any] | None:
    """By an option, where it would serve the run."""
    if "choose_levels" not in plan.settings or plan.taught or len(plan.levels) < 2:
        return None
    return {} if Fitted(plan.settings["statistics"]).learned(plan.levels) else None


WARNINGS: Mapping[str, Callable[[Plan], dict[str, Any] | None]] = {
    "order_not_reached": _order_not_reached,
    "first_step_not_skipped": _first_step_not_skipped,
    "nothing_to_learn": _nothing_to_learn,
    "not_taught": _not_taught,
}
"""What to say before a run: the key of its text (panel.WORDS) -> the values in it, or None to say nothing."""
