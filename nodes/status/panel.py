"""What the interface shows on a sampler: evaluations, schedule, warnings, and how its calibration stands."""
from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Callable, Mapping

from ...samplers import load_calibration
from ...hosting import library, store
from ...hosting.kinds import kind_for
from ...hosting.library import Kind
from . import plan, runs
from .plan import Graph, Job, Linked, Plan

WORDS = {
    "evaluations": "model evaluations: {count}",
    "evaluations_by_path": "model evaluations: {count}, {flow} on a flow model",
    "evaluations_run": "model evaluations: {count} (last run)",
    "evaluations_free": "model evaluations: as many as the tolerance asks (known after a run)",
    "evaluations_per_step": "model evaluations a step: {count}. Connect it to SamplerCustom to see its "
                            "schedule",
    "evaluations_per_step_free":
        "as many model evaluations as the tolerance asks. Connect it to SamplerCustom to see its schedule",
    "linked": "set by a link: {name} (model evaluations known after a run)",
    "nothing_to_do": "model evaluations: 0, the schedule is empty",
    "scale": "lambda {low} to {high}, sigma {first} to {last}",
    "scale_guessed": "lambda {low} to {high} on Stable Diffusion's noise levels (the model's own after a "
                     "run)",
    "levels_chosen": "of the scheduler only the range counts; evaluated at sigma {sigmas}",
    "levels_unknown": "of the scheduler only the range counts; the levels are chosen once the model is "
                      "measured",
    "order_not_reached": "warning: order {order} is never reached in {steps} steps: choose more",
    "first_step_not_skipped":
        "warning: the first step can be skipped at full noise only, and this run starts at sigma {sigma}",
    "nothing_to_learn": "warning: {steps} steps leave AMED nothing to learn, choose more",
    "not_taught": "warning: the hypersolver is left out: it needs choose_levels on and first_step evaluate",
    "unusable": "warning: {fault}",
    "hypersolver": "a hypersolver adds what every step misses",
    "used": "the last run used {name}, digest {digest}",
    "fits": "the calibration fits this model and guidance",
    "saved": "a saved calibration serves this run: {name}",
    "unsure": "not run on this model yet: a saved calibration that fits is used, else one is measured first, "
              "{cost}",
    "to_be_measured": "no saved calibration serves this run: one is measured first, {cost}",
    "every_prompt": "each new prompt is measured once, {cost}",
    "cost_one": "as long as 1 image like this",
    "cost": "as long as {count} images like this",
    "cost_seconds": "{cost}, about {count} s",
    "cost_minutes": "{cost}, about {count} min",
    "only_saved": "only a saved calibration that serves this run is used; without one it stops",
    "none_saved": "warning: no saved calibration serves this run, so it will stop",
    "given": "calibration by a link; whether it fits is known after a run",
    "given_file": "calibration {name}; whether it fits is known after a run",
    "misfit": "warning: {name} was made for something else: {fault}",
}
"""The texts, in English; other languages are in locales/*/main.json."""

MOST_LEVELS = 12  # that are listed
ORDER = ("count", "warn", "good", "note")

Put = Callable[..., None]
"""put(kind of a line, key of WORDS, **values) shows a line."""
Say = Callable[..., str]
"""say(key of WORDS, **values) -> the text in the reader's language."""


def answer(graph: Graph, node_id: str, rule: Callable[[], str], say: Say) -> dict[str, Any]:
    """The lines for one node (kind: count, note, good or warn; text), and the curve if there is one.

    `runs` is the node that samples, on which a failing run reports its error. No lines for another's sampler.
    """
    result: dict[str, Any] = {"lines": [], "curve": None, "runs": node_id}

    def line(kind: str, key: str, **values: Any) -> None:
        result["lines"].append({"kind": kind, "text": say(key, **values)})

    try:
        job = plan.job(graph, node_id)
        if job is None:
            return result
        result["runs"] = job.runs or node_id
        kind = kind_for(job.sampler)
        if run := runs.last(graph, job.runs):
            if kind:
                result["lines"] += _said(line, run)
            made = plan.plan(job._replace(options=run.options), run.sigmas, run.sampling)
            result["curve"] = _drawn(line, made, run)
        elif job.linked:
            raise Linked(", ".join(job.linked))
        elif job.runs:
            own = kind and "measure" in graph[job.node]["inputs"]
            how = plan.value(graph[job.node], "measure", str) if own else rule() if kind else ""
            result["curve"] = _before(line, say, graph, job, kind, how)
        else:
            each = _each(job)
            line("count", "evaluations_per_step" if each else "evaluations_per_step_free", count=each)
    except Linked as fault:
        line("count", "linked", name=fault)
    except ValueError as fault:
        line("warn", "unusable", fault=fault)
    result["lines"].sort(key=lambda entry: ORDER.index(entry["kind"]))
    return result


def _drawn(line: Put, shown: Plan, run: runs.Run | None, guessed: bool = False) -> dict[str, Any]:
    """The curve of a plan, or of a run that was made so; its schedule and warnings as lines."""
    if run:
        line("count", "evaluations_run", count=run.evaluations)
    _schedule(line, shown, guessed)
    if shown.taught:
        line("good", "hypersolver")
    for key, warning in plan.WARNINGS.items():
        if (values := warning(shown)) is not None:
            line("warn", key, **values)
    return plan.curve(shown, 0 if shown.levels_chosen is None else (run or shown).evaluations)


def _said(line: Put, run: runs.Run) -> list[dict[str, str]]:
    """How the calibration stood in a run: its warnings, and the last of the other lines it said."""
    for used in run.used:
        line("note", "used", **used)
    if not run.said:
        line("good", "fits")
    warnings = [{"kind": "warn", "text": text} for text, warns in run.said if warns]
    return warnings + [{"kind": "good", "text": text} for text, warns in run.said if not warns][-1:]


def _before(line: Put, say: Say, graph: Graph, job: Job, kind: Kind | None, how: str) -> dict[str, Any]:
    """The curve of a run that was not made yet, and what is known of it."""
    model = runs.model(graph, job.runs)
    giver, saved, about = _giver(graph, job, kind), None, None
    if model is None:
        shown = _guessed(graph, job, line)
    else:
        about = _about(graph, job, model)
        loaded = _loaded(kind, giver)
        given = {name: kind.suited(found, about) for name, found in loaded.items()} if about else loaded
        job = job._replace(options={**job.options, **given})
        shown = _planned(graph, job, model.sampling)
        if kind and about and giver is None:
            prompt = {"conditions": ""} if how == "every prompt" else {}  # a new one
            saved = library.choice(kind, {**about, **prompt}, how, shown.settings, shown.path, shown.levels)
        if saved:
            found = {kind.option: kind.suited(saved[1], about)}
            shown = _planned(graph, job._replace(options={**job.options, **found}), model.sampling)
        _count(line, shown)
    if giver is not None:
        _given(line, kind, giver, about, shown)
    elif saved:
        line("good", "saved", name=saved[0])
    elif kind and shown.levels:
        _unmeasured(line, how, about, lambda: _cost(say, kind, shown, model or runs.Model(None, None)))
    return _drawn(line, shown, None, guessed=model is None)


def _unmeasured(line: Put, how: str, about: Mapping[str, Any] | None, cost: Callable[[], str]) -> None:
    """What a run does for which nothing is given, nor found where the model is known."""
    if how == "saved only":
        return line(*(("note", "only_saved") if about is None else ("warn", "none_saved")))
    key = "every_prompt" if how == "every prompt" else "unsure" if about is None else "to_be_measured"
    try:
        line("note", key, cost=cost())
    except ValueError as fault:  # the run would be refused
        line("warn", "unusable", fault=fault)


def _cost(say: Say, kind: Kind, shown: Plan, model: runs.Model) -> str:
    """What measuring takes: in images like the one to be made, and in time where an evaluation was timed.

    ValueError where measuring is refused.
    """
    images = math.ceil(kind.images(shown.settings, model.shape) / model.shape[0])
    calls = images * kind.cost(shown.settings, shown.path, shown.levels)
    count = max(1, round(calls / max(1, kind.sampled(shown.settings, shown.levels))))
    cost = say("cost", count=count) if count > 1 else say("cost_one")
    if model.seconds is None:
        return cost
    seconds = calls * model.seconds
    if seconds < 90:
        return say("cost_seconds", cost=cost, count=max(1, round(seconds)))
    return say("cost_minutes", cost=cost, count=round(seconds / 60))


def _giver(graph: Graph, job: Job, kind: Kind | None) -> Mapping[str, Any] | None:
    """The node that hands the sampler its calibration, by a link or attached to its model; else None."""
    linked = bool(plan.source(graph[job.node], "calibration"))
    for k, giver in enumerate(plan.givers(graph, job) if kind else ()):
        option = plan.GIVERS.get(giver["class_type"])
        with suppress(ValueError):  # what is wrong with a file is said by _given
            if file := _file(giver):
                found = load_calibration(store.existing(file))
                option = kind.option if isinstance(found, kind.type) else ""
        if option in (None, kind.option) or linked and k == 0:
            return giver
    return None


def _loaded(kind: Kind | None, giver: Mapping[str, Any] | None) -> dict[str, Any]:
    """The calibration that a file named in the workflow holds, for the plan to be checked with."""
    with suppress(ValueError):
        if file := _file(giver):
            return {kind.option: kind.type.load(store.existing(file))}
    return {}


def _file(giver: Mapping[str, Any] | None) -> str | None:
    """The file that a node loads a calibration from, if it is written there."""
    file = giver["inputs"].get("name") if giver and giver["class_type"] == "LambdaLoadCalibration" else None
    return file if isinstance(file, str) else None


def _each(job: Job) -> int | None:
    """Evaluations on an interval of finite length."""
    sigmas = [float(sigma) for sigma in range(13, 0, -1)]
    steps = plan.plan(job, sigmas, plan.usual("ve")).steps
    return None if steps is None else sum(len(step.evaluations) for step in steps) // 12


def _planned(graph: Graph, job: Job, sampling: object) -> Plan:
    return plan.plan(job, plan.schedule(graph, job.runs, sampling), sampling)


def _guessed(graph: Graph, job: Job, line: Put) -> Plan:
    """The plan for Stable Diffusion's levels, and a line that says what is different on a flow model."""
    first = _planned(graph, job, plan.usual("ve"))
    try:
        flow = _planned(graph, job, plan.usual("flow")).evaluations
    except ValueError:  # sigmas written for the other path
        flow = first.evaluations
    if flow == first.evaluations:
        _count(line, first)
    else:
        line("count", "evaluations_by_path", count=first.evaluations, flow=flow)
    return first


def _count(line: Put, shown: Plan) -> None:
    if not shown.levels:
        line("count", "nothing_to_do")
    elif shown.evaluations is None:
        line("count", "evaluations_free")
    else:
        line("count", "evaluations", count=shown.evaluations)


def _schedule(line: Put, shown: Plan, guessed: bool) -> None:
    if shown.levels_chosen is None:
        line("note", "levels_unknown")
    elif shown.levels_chosen:
        sigmas = [f"{level.sigma:.3g}" for level in shown.levels[:-1]]
        more = ", ..." if len(sigmas) > MOST_LEVELS else ""
        line("note", "levels_chosen", sigmas=", ".join(sigmas[:MOST_LEVELS]) + more)
    lams = [level.lam for level in shown.levels if abs(level.lam) != float("inf")]
    if lams:
        line("note", "scale_guessed" if guessed else "scale", low=f"{lams[0]:.2f}", high=f"{lams[-1]:.2f}",
             first=f"{shown.levels[0].sigma:.4g}", last=f"{shown.levels[-1].sigma:.4g}")


def _about(graph: Graph, job: Job, model: runs.Model) -> Mapping[str, Any] | None:
    """The description of a known model at the guidance that is set."""
    scale = plan.guidance(graph, job.runs)
    if not model.about or scale is None:
        return None
    return {**model.about, "guidance": scale, "channels": model.shape[1]}


def _given(line: Put, kind: Kind, giver: Mapping[str, Any], about: Mapping[str, Any] | None,
           shown: Plan) -> None:
    """How a calibration stands that comes over a link."""
    made = plan.GIVERS.get(giver["class_type"])
    if made and made != kind.option:
        return line("warn", "misfit", name=giver["class_type"], fault=f"{kind.makes} makes what this sampler "
                                                                      f"needs")
    file = _file(giver)
    if file is None:
        return line("note", "given")
    try:
        found = kind.type.load(store.existing(file))
    except ValueError as fault:
        return line("warn", "unusable", fault=fault)
    if about is None:
        return line("note", "given_file", name=file)
    faults = library.misfits(kind, found, about, shown.settings, shown.path, shown.levels)
    if faults:
        return line("warn", "misfit", name=file, fault="; ".join(faults))
    line("good", "fits")
