"""Which calibration a run takes: given, attached, saved before, or measured now; and when one belongs to a
model."""
from __future__ import annotations

import hashlib
import logging
import math
import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Protocol, Sequence

from ..samplers.denoisers import check_full_noise
from ..samplers.schedule import Level
from . import canonical, events, store
from .events import Used, say
from .measuring import Run, as_long_as

RULES = ("auto", "every prompt", "saved only")
"""What a sampler may do that needs a calibration and was given none."""
VARIABLE = "LAMBDA_SOLVERS_CALIBRATION"
TAUGHT = 3  # how well something serves that was taught for a range of guidances


class Kind(Protocol):
    """Something a solver needs to know of a model."""

    option: str         # the solver's option that takes it
    type: type          # what it is: it has `about`, arrays(), save(path, overwrite) and load(path)
    attachment: str     # its name on a model
    noun: str           # in sentences
    makes: str          # the node that measures it

    def name(self, about: Mapping[str, Any]) -> str:
        """What a file's name says of it, beside model and guidance."""
    def about(self, run: Run) -> dict[str, Any]:
        """What its description says of a run, beside model, guidance and prompt."""
    def serves(self, found: Any, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        """How well one of the right model, as `suited`, serves a run with these options of the solver: 0 not
        at all, 1 as any other, 2 it was learned for just such a run, TAUGHT at the run's guidance too,
        wherever it was measured."""
    def cost(self, options: Mapping[str, Any], path: str, schedule: list[Level]) -> int:
        """Evaluations to measure one, each of `images`; ValueError where it would be refused."""
    def images(self, options: Mapping[str, Any], shape: Sequence[int]) -> int:
        """How many it looks at for latents of this shape, [B, ...]."""
    def sampled(self, options: Mapping[str, Any], schedule: list[Level]) -> int:
        """Evaluations of one image that is sampled with it."""
    def measure(self, run: Run, about: dict[str, Any], partial: Any) -> Any: """A new one."""
    def suited(self, found: Any, about: Mapping[str, Any]) -> Any:
        """As much of one as holds for a run of this description, and for its guidance where that is told."""
    def ready(self, found: Any, run: Run) -> AbstractContextManager[Any]:
        """It, as the solver needs it while it runs."""


def rule(setting: str | None, name: str) -> str:
    """What a sampler in a list does without a calibration: the environment variable, else the host's setting
    of this name, else auto."""
    value, where = os.environ.get(VARIABLE), f"the environment variable {VARIABLE}"
    if not value:
        value, where = setting or RULES[0], f"the setting {name}"
    if value not in RULES:
        raise ValueError(f"{where} is {value!r}: choose one of {', '.join(RULES)}")
    return value


@contextmanager
def provided(kind: Kind, run: Run, given: Any, how: str) -> Iterator[Any]:
    """What the solver of a run needs to know of the model, ready for it; the run's notes are told. What the
    run would be refused for is refused before anything is measured."""
    if run.options["first_step"] != "evaluate":
        check_full_noise(run.levels[0], run.ends[0])
    run = replace(run, image=kind.sampled(run.options, run.levels))
    used = calibration_for(kind, run, given, how)
    events.use(kind.option, used)
    with kind.ready(used.suited, run) as ready:
        yield ready


def calibration_for(kind: Kind, run: Run, given: Any, how: str) -> Used:
    """What to sample `run` with, and where it came from.

    In this order: what was given to the node; what is attached to the model; a saved file that `choice`
    takes; and, if `how` is auto or every prompt, a new one, measured on this very model function and saved:
    for auto at nobody's prompt (canonical.py).
    """
    own = described(kind, run)

    def used(name: str, found: Any) -> Used:
        return Used(name, found, kind.suited(found, own))

    for where, found in (("given", given), ("attached", run.attached(kind))):
        if found is not None:
            warn(kind, found, run, own)
            return used(where, found)
    if math.isnan(own["guidance"]):
        raise ValueError(f"the guidance of this {run.guided}, and "
                         f"{kind.noun} hold for one number: set one, give the sampler what {kind.makes} made "
                         "at a number, or choose a sampler that needs none, such as lambda_2m")
    saved = choice(kind, own, how, run.options, run.path, run.levels)
    if saved:
        name, found = saved
        say(f"{kind.noun}: {name}")
        return used(name.removesuffix(store.ENDING), found)
    sought = wanted(own, how)
    of = f"{sought['model']} at guidance {sought['guidance']:g}"
    if how == "saved only":
        raise ValueError(f"no saved {kind.noun} for {of} in {store.directory()} serves this run: "
                         + run.remedies[how].format(makes=kind.makes))
    calls = kind.cost(run.options, run.path, run.levels) * run.calls(kind.images(run.options, run.x.shape))
    say(f"no saved {kind.noun} for {of} serves this run: measuring once, {as_long_as(calls, run.image)}")
    with run.apart(), measuring_at(kind, run, how) as about:
        result = kind.measure(run, about, unfinished(kind, about))
    path = kept(kind, result)
    if path is None:
        return used("measured", result)
    say(f"{kind.noun} saved: {path.stem}")
    return used(path.stem, result)


@contextmanager
def measuring_at(kind: Kind, run: Run, how: str) -> Iterator[dict[str, Any]]:
    """The model of a run under the conditions that `how` measures at; what its description says then."""
    about = dict(wanted(described(kind, run), how))
    with run.at_no_prompt() if how == "auto" else run.at_its_prompt():
        yield about


def kept(kind: Kind, result: Any, name: str = "") -> Path | None:
    """The file of this or its usual name in which a calibration is saved; None, with a warning, where nothing
    can be written, or not under that name: what took hours is not lost to it."""
    try:
        path = store.spare(name or file_name(kind, result.about), result)
        result.save(path, overwrite=True)
    except (OSError, ValueError) as fault:
        say(f"warning: {kind.noun} measured, but not saved ({fault}): the next run measures "
            "again", logging.WARNING)
        return None
    return path


def choice(kind: Kind, about: Mapping[str, Any], how: str, options: Mapping[str, Any], path: str,
           schedule: list[Level]) -> tuple[str, Any] | None:
    """The saved file that a run of this description takes, and what is in it; None if it takes none.

    It is of the same checkpoint and patches, at near strengths and guidance; for auto measured at nobody's
    prompt, for "every prompt" at the run's own; or, whatever the rule, learned for all prompts and just such
    a run, or taught for it at its guidance. Of several those that serve best, then those that more images
    taught, then those of the same prompt, then of the nearest guidance, then those that were measured for no
    more than is needed, then the newest.
    """
    sought, found = wanted(about, how), []
    run = {**sought, "guidance": about["guidance"]}
    rules = {"auto": lambda told: canonical.same(told, sought),
             "every prompt": lambda told: told.get("conditions") == sought["conditions"]}
    measured_for = rules.get(how, lambda told: True)
    for name in store.listed():
        content = store.read(kind.type, name)
        if content is None or not of_one_model(content.about, {**sought, **at(content)}):
            continue
        well = kind.serves(kind.suited(content, run), options, path, schedule)
        here = alike("guidance", content.about, sought)
        if well == TAUGHT or here and (well == 2 or well and measured_for(content.about)):
            taught = content.about.get("hypersolver", {}).get("images", 0.0) if well == TAUGHT else 0.0
            rank = (-well, -taught, content.about.get("conditions") != sought["conditions"],
                    abs(content.about["guidance"] - sought["guidance"]), bool(content.about.get("fitted")))
            found.append((rank, content.about.get("created", ""), name, content))
    found.sort(key=lambda entry: entry[1:3], reverse=True)
    return min(found, key=lambda entry: entry[0])[2:] if found else None


def wanted(about: Mapping[str, Any], how: str) -> Mapping[str, Any]:
    """What a file should say of itself to serve a run of this description."""
    return canonical.instead(about) if how == "auto" else about


def described(kind: Kind, run: Run) -> dict[str, Any]:
    """The description of a run, with the channels of its latents and what the kind adds."""
    return {**run.description(), "channels": run.x.shape[1], **kind.about(run)}


def at(found: Any) -> dict[str, Any]:
    """The guidance that something was measured at, as a description has it."""
    return {"guidance": found.about.get("guidance")}


def file_name(kind: Kind, about: Mapping[str, Any]) -> str:
    """The name of a file unless another is given: one for each model, patches, guidance, prompt, and what the
    kind adds."""
    strengths = [f" {strength:.3g}" for strength in _numbers(about, "strengths")]
    patches = "".join([*about.get("patches", []), *strengths])
    patched = hashlib.sha256(patches.encode()).hexdigest()[:6] if patches else ""
    distilled = "".join(f"-guidance{scale:g}" for scale in _numbers(about, "distilled"))
    prompt = "" if canonical.named(about) else about.get("conditions", "")
    return "-".join(filter(None, [about.get("model", "model"), patched, kind.name(about),
                                  f"cfg{about.get('guidance', 1.0):g}{distilled}", prompt]))


def unfinished(kind: Kind, about: Mapping[str, Any], *settings: object) -> Path:
    """Where a measurement of these settings is kept until it is whole."""
    return store.partial("-".join([file_name(kind, about), *map(str, settings)]))


NUMBERS = {"guidance": 0.1, "distilled": 0.1, "strengths": 0.0}
"""What of a description need only be near, and how far apart beyond a tenth: 0.8 and 0.88 of a LoRA are near,
0.1 and 0.2 are not."""


def near(a: float, b: float, apart: float = 0.1) -> bool:
    """Numbers close enough to share statistics: within a tenth, and `apart` more, for small ones."""
    return abs(a - b) <= apart + 0.1 * max(abs(a), abs(b))


def alike(key: str, about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two descriptions agree in one of NUMBERS: one number, or as many; None stands for none."""
    def close(x: Any, y: Any) -> bool:
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            return near(x, y, NUMBERS[key])
        return x is None and y is None

    a, b = (told.get(key, []) for told in (about, wanted))
    a, b = (value if isinstance(value, list) else [value] for value in (a, b))
    return len(a) == len(b) and all(map(close, a, b))


def of_one_model(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a calibration of one description holds for the other, but for the prompt."""
    return all(about.get(key) == wanted[key] for key in ("fingerprint", "patches")) and all(
        alike(key, about, wanted) for key in NUMBERS)


def faults(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Why a calibration made for `about` may not serve `wanted`, both as `Run.description` has them; the
    prompt apart."""
    found = []
    if about.get("fingerprint", "") != wanted["fingerprint"]:
        found.append(f"measured on {about.get('model', 'an unnamed model')}, and this is {wanted['model']}")
    elif about.get("patches", []) != wanted["patches"]:
        found.append(f"measured with the patches {about.get('patches') or 'none'}, and this model has "
                     f"{wanted['patches'] or 'none'}")
    elif not alike("strengths", about, wanted):
        found.append(f"measured with patches at strength {_listed(about, 'strengths')}, and here it is "
                     f"{_listed(wanted, 'strengths')}")
    if not alike("guidance", about, wanted):
        here = "changes from step to step" if math.isnan(wanted["guidance"]) else f"is {wanted['guidance']:g}"
        found.append(f"measured for guidance {about.get('guidance', 'unknown')}, and this {here}")
    if not alike("distilled", about, wanted):
        found.append(f"measured for distilled guidance {_listed(about, 'distilled')}, and this is "
                     f"{_listed(wanted, 'distilled')}")
    return found


def _listed(about: Mapping[str, Any], key: str) -> str:
    return ", ".join(dict.fromkeys(f"{value:g}" for value in _numbers(about, key))) or "none"


def _numbers(about: Mapping[str, Any], key: str) -> list[float]:
    """Those in a list of a description, which may come from anyone's file."""
    found = about.get(key)
    return [value for value in found if isinstance(value, (int, float))] if isinstance(found, list) else []


def misfits(kind: Kind, found: Any, about: Mapping[str, Any], options: Mapping[str, Any], path: str,
            schedule: list[Level]) -> list[str]:
    """Why a calibration may not serve a run of this description: `faults`, but for a guidance that it was
    taught for."""
    well = kind.serves(kind.suited(found, about), options, path, schedule)
    return faults(found.about, {**about, **at(found)} if well == TAUGHT else about)


def warn(kind: Kind, found: Any, run: Run, about: Mapping[str, Any]) -> None:
    """Say why a calibration that was given may not fit the run of this description, if it may not."""
    for fault in misfits(kind, found, about, run.options, run.path, run.levels):
        say(f"warning: the {kind.noun} may not fit: {fault}. Measure anew with {kind.makes}", logging.WARNING)
