"""What a sampler tells while it runs, to whoever listens.

Here solving meets what only shows, predicts or records: samplers and nodes tell, and know nothing of the
server or the interface. Those who do (status/) listen, if they could be imported. Whatever fails in a
listener is a warning in the log: no image is lost for it.
"""
from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Protocol

from torch import Tensor

from ..samplers.learning.storage import digest


class Used(NamedTuple):
    """A calibration that a run used: where it came from, the whole of it, and what the solver was given."""

    name: str  # a file's, or "given" (to the node), "attached" (to the model), "measured" (and not saved)
    found: Any
    suited: Any

    def told(self) -> dict[str, str]:
        return {"name": self.name, "digest": digest(self.found.arrays())}


Describe = Callable[[Any], Mapping[str, Any]]
"""Which model a guider samples."""


@dataclass(frozen=True)
class Ran:
    """A run that came to its end."""

    guider: Any
    sigmas: Tensor
    options: dict[str, Any]  # as written
    used: dict[str, Used]  # for these options of the solver
    evaluations: int
    seconds: float  # that these took
    shape: tuple[int, ...]  # of the latents, with their number first
    said: tuple[tuple[str, bool], ...]  # lines said while it ran, and whether they are warnings
    describe: Describe | None  # where it matters which model it is


class Listener(Protocol):
    def said(self, text: str) -> None: """A line for the node that is running."""
    def ran(self, run: Ran) -> None: """A run that is over; `said` and this one may raise what they like."""


listeners: list[Listener] = []
_running: ContextVar[Notes | None] = ContextVar("running", default=None)


class Notes:
    """What the run going on has said and used."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bool]] = []  # lines, and whether they are warnings
        self.used: dict[str, Used] = {}  # calibrations by the solver's option


def say(text: str, level: int = logging.INFO) -> None:
    """Show a line on the running node, and write it to the log (but for the count while measuring)."""
    _tell("said", text)
    if ": evaluation " not in text:
        notes = _running.get()
        if notes is not None:
            notes.said.append((text, level >= logging.WARNING))
        logging.log(level, "Lambda Solvers: %s", text)


def use(option: str, calibration: Used) -> None:
    """Keep the calibration that the running solver was given for this option."""
    notes = _running.get()
    if notes is not None:
        notes.used[option] = calibration


@contextmanager
def noting() -> Iterator[Notes]:
    """What runs in this context say and use."""
    notes = Notes()
    token = _running.set(notes)
    try:
        yield notes
    finally:
        _running.reset(token)


def observed(function: Callable[..., Tensor], describe: Describe | None) -> Callable[..., Tensor]:
    """A sampler function that tells of its runs."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        counted, notes = _Counted(model), Notes()
        token = _running.set(notes)
        try:
            result = function(counted, x, sigmas, extra_args, callback, disable, **options)
        finally:
            _running.reset(token)
        if (outer := _running.get()) is not None:
            outer.used |= notes.used
        written = {name: value for name, value in options.items() if isinstance(value, (int, float, str))}
        _tell("ran", Ran(model.inner_model, sigmas, written, notes.used, counted.evaluations,
                         counted.seconds(result), tuple(x.shape), tuple(notes.said), describe))
        return result

    return sample


class _Counted:
    """A model that counts and times its evaluations."""

    def __init__(self, model: Any) -> None:
        self.model, self.inner_model, self.evaluations, self.spent = model, model.inner_model, 0, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.evaluations += 1
        start = time.perf_counter()
        try:
            return self.model(*args, **kwargs)
        finally:
            self.spent += time.perf_counter() - start

    def seconds(self, result: Tensor) -> float:
        """What the evaluations took, once the device has computed their result: it answers before it has."""
        start = time.perf_counter()
        if result.numel():
            result.flatten()[0].item()
        return self.spent + time.perf_counter() - start


def _tell(what: str, content: str | Ran) -> None:
    for listener in listeners:
        try:
            getattr(listener, what)(content)
        except Exception:  # another's interface, which may change; Cancel is none of it: none asks the model
            logging.warning("Lambda Solvers: the interface could not be told what a sampler did; its images "
                            "are "
                            "not concerned", exc_info=True)
