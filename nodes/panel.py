"""What the interface shows on a sampler: evaluations, the schedule in lambda, warnings, and how its calibration stands."""
from __future__ import annotations

from contextlib import suppress
from typing import Any, Callable, Mapping, NamedTuple

from . import library, plan, runs, store
from .kinds import KINDS
from .library import Kind
from .plan import Graph, Job, Linked, Plan

WORDS = {
    "evaluations": "model evaluations: {count}",
    "evaluations_by_path": "model evaluations: {count}, {flow} on a flow model",
    "evaluations_run": "model evaluations: {count} (last run)",
    "evaluations_free": "model evaluations: as many as the tolerance asks (known after a run)",
    "evaluations_per_step": "model evaluations a step: {count}. Connect it to SamplerCustom to see its schedule",
    "evaluations_per_step_free": "as many model evaluations as the tolerance asks. Connect it to SamplerCustom to see its schedule",
    "linked": "set by a link: {name} (model evaluations known after a run)",
    "nothing_to_do": "model evaluations: 0, the schedule is empty",
    "scale": "lambda {low} to {high}, sigma {first} to {last}",
    "scale_guessed": "lambda {low} to {high} on Stable Diffusion's noise levels (the model's own after a run)",
    "levels_chosen": "of the scheduler only the range counts; evaluated at sigma {sigmas}",
    "levels_unknown": "of the scheduler only the range counts; the levels are chosen once the model is measured",
    "order_not_reached": "warning: order {order} is never reached in {steps} steps: choose more",
    "first_step_not_skipped": "warning: the first step can be skipped at full noise only, and this run starts at sigma {sigma}",
    "nothing_to_learn": "warning: {steps} steps leave AMED nothing to learn, choose more",
    "mean_first_step": "in the first run of a prompt the model answers the first step too",
    "unusable": "warning: {fault}",
    "used": "the last run used {name}, digest {digest}",
    "fits": "the calibration fits this model and guidance",
    "saved": "a saved calibration serves this run: {name}",
    "unsure": "not run on this model yet: a saved calibration that fits is used, else about {count} evaluations measure one",
    "to_be_measured": "no saved calibration serves this run: about {count} evaluations measure one first",
    "every_prompt": "each new prompt is measured once, in about {count} evaluations",
    "only_saved": "only a saved calibration that serves this run is used; without one it stops",
    "none_saved": "warning: no saved calibration serves this run, so it will stop",
    "none_given": "warning: no calibration is connected and measuring is switched off, so the run will stop",
    "given": "calibration by a link; whether it fits is known after a run",
    "given_file": "calibration {name}; whether it fits is known after a run",
    "misfit": "warning: {name} was made for something else: {fault}",
}
"""The texts, in English; other languages are in locales/*/main.json."""


KIND_OF: Mapping[type, Kind] = {kind.type: kind for kind in KINDS}

MOST_LEVELS = 12  # that are listed
ORDER = ("count", "warn", "good", "note")
Line = dict[str, str]
Say = Callable[..., str]
"""say(key of WORDS, **values) -> the text in the reader's language."""


def answer(graph: Graph, node_id: str, rule: Callable[[], str], say: Say) -> dict[str, Any]:
    """The lines for one node (kind: count, note, good or warn; text), and the curve if there is one.

    `runs` is the node that samples, on which a failing run reports its error. No lines for a sampler that is not ours.
    """
    result: dict[str, Any] = {"lines": [], "curve": None, "runs": node_id}

    def line(kind: str, key: str, **values: Any) -> None:
        result["lines"].append({"kind": kind, "text": say(key, **values)})

    try:
        job = plan.job(graph, node_id)
        if job is None:
            return result
        result["runs"] = job.runs or node_id
        learns = any(option.kind in KIND_OF for option in job.sampler.options.values())
        how = graph[job.node]["inputs"].get("calibration") or rule() if learns else ""
        if not job.runs:
            if job.linked:
                raise Linked(job.linked[0])
            each = _each(job)
            line("count", "evaluations_per_step" if each else "evaluations_per_step_free", count=each)
            return result
    except Linked as fault:
        line("count", "linked", name=fault)
        return result
    except ValueError as fault:
        line("warn", "unusable", fault=fault)
        return result
    run, model = runs.last(graph, job.runs), runs.model(graph, job.runs)
    shown: Plan | None = None
    if run:
        job = job._replace(options=run.options)
    elif model:
        job = job._replace(options={**job.options, **_loaded(graph, job)})
    saved = None
    try:
        if run:
            shown = plan.plan(job, run.sigmas, run.sampling)
            line("count", "evaluations_run", count=run.evaluations)
        elif job.linked:
            raise Linked(", ".join(job.linked))
        elif model:
            shown = _planned(graph, job, model.sampling)
            saved = _saved(graph, job, model, how, shown)
            if saved:
                shown = _planned(graph, job._replace(options={**job.options, **saved.option}), model.sampling)
            _count(line, shown)
        else:
            shown = _guessed(graph, job, line)
        _schedule(line, shown, guessed=not run and not model)
        if shown.settings["first_step"] == "mean" and not run:
            line("note", "mean_first_step")
        count = run.evaluations if run else shown.evaluations
        result["curve"] = plan.curve(shown, 0 if shown.levels_chosen is None else count)
        for key, warning in plan.WARNINGS.items():
            values = warning(shown)
            if values is not None:
                line("warn", key, **values)
    except Linked as fault:
        line("count", "linked", name=fault)
    except ValueError as fault:
        line("warn", "unusable", fault=fault)
    for name, option in job.sampler.options.items():
        if option.kind in KIND_OF:
            if run:
                _said(result["lines"].append, line, run)
            elif shown:
                _status(line, graph, job, name, model, how, shown, saved)
    result["lines"].sort(key=lambda entry: ORDER.index(entry["kind"]))
    return result


def _said(add: Callable[[Line], None], line: Callable[..., None], run: runs.Run) -> None:
    """How the calibration stood in a run: its warnings, and the last of the other lines it said."""
    for text, warns in run.said:
        if warns:
            add({"kind": "warn", "text": text})
    told = [text for text, warns in run.said if not warns]
    if told:
        add({"kind": "good", "text": told[-1]})
    elif not run.said:
        line("good", "fits")
    for used in run.used:
        line("note", "used", **used)


def _loaded(graph: Graph, job: Job) -> dict[str, Any]:
    """The calibration that a file named in the workflow holds, for the plan to be checked with; what is wrong with the file is
    said by `_given`."""
    found = {}
    for name, option in job.sampler.options.items():
        file = _file(plan.given(graph, job, name)) if option.kind in KIND_OF else None
        with suppress(ValueError):
            found |= {name: option.kind.load(store.existing(file))} if file else {}
    return found


def _file(giver: Mapping[str, Any] | None) -> str | None:
    """The file that a node loads a calibration from, if it is written there."""
    file = giver["inputs"].get("name") if giver and giver["class_type"].startswith("LambdaLoad") else None
    return file if isinstance(file, str) else None


def _each(job: Job) -> int | None:
    """Evaluations on an interval of finite length."""
    sigmas = [float(sigma) for sigma in range(13, 0, -1)]
    steps = plan.plan(job, sigmas, plan.usual("ve")).steps
    return None if steps is None else sum(len(step.evaluations) for step in steps) // 12


def _planned(graph: Graph, job: Job, sampling: object) -> Plan:
    return plan.plan(job, plan.schedule(graph, job.runs, sampling), sampling)


def _guessed(graph: Graph, job: Job, line: Callable[..., None]) -> Plan:
    """The plan for Stable Diffusion's levels, and a line that says what would be different on a flow model."""
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


def _count(line: Callable[..., None], shown: Plan) -> None:
    if not shown.levels:
        line("count", "nothing_to_do")
    elif shown.evaluations is None:
        line("count", "evaluations_free")
    else:
        line("count", "evaluations", count=shown.evaluations)


def _schedule(line: Callable[..., None], shown: Plan, guessed: bool) -> None:
    if shown.levels_chosen is None:
        line("note", "levels_unknown")
    elif shown.levels_chosen:
        sigmas = [f"{level.sigma:.3g}" for level in shown.levels[:-1]]
        line("note", "levels_chosen", sigmas=", ".join(sigmas[:MOST_LEVELS]) + (", ..." if len(sigmas) > MOST_LEVELS else ""))
    lams = [level.lam for level in shown.levels if abs(level.lam) != float("inf")]
    if lams:
        line("note", "scale_guessed" if guessed else "scale", low=f"{lams[0]:.2f}", high=f"{lams[-1]:.2f}",
             first=f"{shown.levels[0].sigma:.4g}", last=f"{shown.levels[-1].sigma:.4g}")


class Saved(NamedTuple):
    """A calibration that a run will find, and as the solver's option."""

    file: str
    option: dict[str, Any]


def _saved(graph: Graph, job: Job, model: runs.Model, how: str, shown: Plan) -> Saved | None:
    """What a run of a known model will find among the saved calibrations, as library.calibration_for does."""
    about, finds = _about(graph, job, model), how in ("auto", "saved only")
    for name, option in job.sampler.options.items():
        if option.kind in KIND_OF and about and finds and plan.given(graph, job, name) is None:
            kind = KIND_OF[option.kind]
            found = library.choice(kind, about, how, shown.settings, shown.path, shown.levels)
            return Saved(found[0], {name: kind.suited(found[1], about["conditions"])}) if found else None
    return None


def _about(graph: Graph, job: Job, model: runs.Model | None) -> Mapping[str, Any] | None:
    """The description of a known model at the guidance that is set."""
    scale = plan.guidance(graph, job.runs)
    return {**model.about, "guidance": scale} if model and model.about and scale is not None else None


def _status(line: Callable[..., None], graph: Graph, job: Job, name: str, model: runs.Model | None, how: str, shown: Plan,
            saved: Saved | None) -> None:
    """How the calibration stands before a run."""
    kind = KIND_OF[job.sampler.options[name].kind]
    about = _about(graph, job, model)
    giver = plan.given(graph, job, name)
    if giver is not None:
        return _given(line, kind.type, giver, about)
    if how == "never":
        return line("warn", "none_given")
    try:
        cost = kind.cost(shown.settings, shown.path, shown.levels) if shown.levels else 0
    except ValueError as fault:  # nothing to learn, so the run would be refused
        return line("warn", "unusable", fault=fault)
    if how == "every prompt":
        return line("note", "every_prompt", count=cost)
    if about is None:
        return line("note", "only_saved" if how == "saved only" else "unsure", count=cost)
    if saved:
        return line("good", "saved", name=saved.file)
    line("warn" if how == "saved only" else "note", "none_saved" if how == "saved only" else "to_be_measured", count=cost)


def _given(line: Callable[..., None], kind: type, giver: Mapping[str, Any], about: Mapping[str, Any] | None) -> None:
    """The same for a calibration that comes over a link."""
    file = _file(giver)
    if file is None:
        return line("note", "given")
    try:
        made_for = kind.load(store.existing(file)).about
    except ValueError as fault:
        return line("warn", "unusable", fault=fault)
    if about is None:
        return line("note", "given_file", name=file)
    faults = library.faults(made_for, about)
    if faults:
        return line("warn", "misfit", name=file, fault="; ".join(faults))
    line("good", "fits")
