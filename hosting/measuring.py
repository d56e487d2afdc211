"""A run in which a model is measured, whatever the host: asked in parts, counted, told of, cancellable."""
from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..samplers.model import UnsteadyModel
from ..samplers.schedule import Level, find_path, levels
from .events import say


@dataclass
class Pace:
    """What a run comes to while it measures."""

    sigma: float = math.inf  # asked last
    batch: int = 0           # images at once, after memory did not suffice for the run's own
    calls: int = 0           # of the model
    called: Callable[[], None] = lambda: None  # after each of them
    bar: Any = None          # the host's


@dataclass(frozen=True)
class Run:
    """What a sampler function was called with; `model` is what the host hands to it.

    A host's own says besides:

        path, ends, known   the model's path; its highest and lowest level; those that it rounds others to
        precision           what it computes in
        guided              who guides, and at which scale, in words
        description()       which model is sampled, at what, and what `auto` measures at (any)
        changed()           what others have put around the model, by name
        noised(noise, sigma)        the state of a run from pure noise
        ask(x, sigma, prompt)       the model's answer to as many images as the run has; may raise `cancelled`
        apart()             a context: the host as at the start of a run, and again as it was; ValueError for
                            what cannot be measured
        at_no_prompt()      a context: the model under the conditions of canonical.py
        check()             raises `cancelled` if the user has cancelled
        show(done, total)   how far a measurement is
        cancelled           an exception's type
        remedies            what to do: "saved only": where the rule does not allow that {makes} is done;
                            "unsteady": where {changed} keep the model from answering for itself; "full
                            noise": where a run that would train AMED begins lower
    """

    model: Any
    x: Tensor
    sigmas: Tensor
    extra_args: dict
    options: Mapping[str, Any]
    grid: Sequence[float] = ()         # the levels that a measurement goes over, if they are not the run's
    prompts: int = 1                   # image k of a measurement has prompt k modulo so many
    block: Any = None                  # what is watched meanwhile
    image: int | None = None           # evaluations of one image, where one will be sampled
    pace: Pace = field(default_factory=Pace)

    def at_its_prompt(self) -> AbstractContextManager[None]:
        """The model under its own conditions; ValueError where they are not those of one prompt."""
        return nullcontext()

    def attached(self, kind: Any) -> Any:
        """A calibration that goes with the model."""
        return None

    def middle_block(self) -> AbstractContextManager[Any]:
        """What watches the middle block of a U-Net, while it is entered; None if nothing can."""
        return nullcontext()

    def out_of_memory(self, fault: Exception) -> bool:
        return isinstance(fault, torch.cuda.OutOfMemoryError)  # of every PyTorch

    def free_memory(self) -> None:
        """Give back what the device has in reserve."""

    def rewind(self) -> None:
        """A measurement goes back to a higher level: begin anew what follows the levels."""

    @property
    def levels(self) -> list[Level]:
        return levels(self.sigmas.tolist(), find_path(self.path))

    @property
    def batch(self) -> int:
        """How many images the model is asked for at once."""
        return self.pace.batch or len(self.x)

    def calls(self, images: int) -> int:
        """How often the model is called for one evaluation of so many images."""
        return sum(math.ceil(len(range(prompt, images, self.prompts)) / self.batch)
                   for prompt in range(self.prompts))

    def denoise(self, x: Tensor, sigma: Tensor, images: Sequence[int] | None = None) -> Tensor:
        """The model function that is being sampled, for any number of images; sigma [B]. images [B]: their
        numbers, if they are not all from the first on, in order.

        The host has reserved memory for the run's own batch, so the model is asked for just so many images
        at once, those of one prompt, or as many as the most of one; fewer are repeated, so that a compiled
        model sees one shape.
        """
        if (now := float(sigma.max())) > self.pace.sigma:
            self.rewind()
        self.pace.sigma = now
        if self.block:
            self.block.begin()
        of = [k % self.prompts for k in (range(len(x)) if images is None else images)]
        rows, answers = [], []
        most = max(map(of.count, {*of}))
        for prompt in sorted({*of}):
            left = [row for row, own in enumerate(of) if own == prompt]
            while left:
                few, answer = self._answer(x, sigma, left, prompt, most)
                rows += few
                answers.append(answer)
                left = left[len(few):]
                if self.block:
                    self.block.keep(len(few))
        found = torch.cat(answers)
        return found if self.prompts == 1 else found[torch.tensor(rows).argsort()]

    def _answer(self, x: Tensor, sigma: Tensor, rows: list[int], prompt: int,
                most: int) -> tuple[list[int], Tensor]:
        """The first of these rows, as many as one call takes, `most` at most, and what the model says to
        them."""
        batch = min(self.batch, most)
        few = rows[:batch]
        asked = (few * batch)[:batch]
        try:
            answer = self.ask(x[asked], sigma[asked], prompt)[:len(few)]
            self.pace.calls += 1
            self.pace.called()
            return few, answer
        except Exception as fault:
            if not self.out_of_memory(fault):
                raise
            if self.pace.batch or batch == 1:
                raise type(fault)(
                    f"out of memory while measuring the model, {batch} image{'s' * (batch > 1)} at once: "
                    "measure at a smaller size, which serves larger ones too, with a batch of 1, or make "
                    f"room on the device. The fault was: {fault}") from fault
        self.pace.batch = batch // 2  # not above, where the fault still holds what did not fit
        say(f"warning: out of memory while measuring {batch} images at once: going on with {batch // 2}. "
            "Measure with a smaller batch to avoid this", logging.WARNING)
        self.free_memory()
        return self._answer(x, sigma, rows, prompt, most)


USUAL = 20  # steps of an image, where none is sampled


def as_long_as(calls: float, image: int | None) -> str:
    """So many calls of the model, in images of `image` evaluations."""
    count = max(1, round(calls / (image or USUAL)))
    return f"as long as {count} image{'s' * (count > 1)}" + ("" if image else f" of {USUAL} steps")


TIMED = 3  # calls of the model, the first of which may be slow: then its pace is known


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


class Progress:
    """The host's progress bar and a line, for `progress(done, total, ...)`; a place where Cancel takes hold,
    as every call of the model is.

    calls: of the model, the most there can be, where all evaluations are not of all images. What they cost is
    said before the first, and in time as soon as the pace is known. As text: what it took, after the last.
    """

    def __init__(self, what: str, run: Run, images: int, calls: int = 0) -> None:
        self.what, self.run, self.images, self.calls = what, run, images, calls
        self.start, self.done, self.total = time.monotonic(), 0, 1
        self.before = self.at = run.pace.calls
        run.pace.called = self._called
        if calls:
            say(f"{what}: {as_long_as(calls, run.image)}")

    def __call__(self, done: int, total: int, loss: float = math.nan) -> None:
        self.run.check()
        self.done, self.total, self.at = done, total, self.run.pace.calls
        left = self._seconds(total - done)
        error = "" if math.isnan(loss) else f", error {loss:.3g}"
        say(f"{self.what}: evaluation {done} of {total}, {self._cost(total)}{error}, "
            + (f"{left:.0f} s left" if left < 600 else f"{left / 60:.0f} min left"))

    def _called(self) -> None:
        """The bar is moved by calls of the model: an evaluation of hundreds of images takes minutes."""
        since = min(self.run.pace.calls - self.at, self._of(1))
        if self.calls or self.done:  # the total is known
            self.run.show(round(self._of(self.done) + since), round(self._of(self.total)))
        if self.calls and self.run.pace.calls - self.before == TIMED:
            say(f"{self.what}: {self._cost(self.total)}, about {duration(self._seconds(self.total))}")

    def _of(self, evaluations: int) -> float:
        """In calls of the model."""
        each = self.calls / self.total if self.calls else self.run.calls(self.images)
        return evaluations * each

    def _cost(self, evaluations: int) -> str:
        return as_long_as(self._of(evaluations), self.run.image)

    def _seconds(self, evaluations: int) -> float:
        """What these take at the pace so far."""
        made = self.run.pace.calls - self.before
        return (time.monotonic() - self.start) / max(made, 1) * self._of(evaluations)

    def __str__(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s, {self._cost(self.done)}"


@contextmanager
def resumable(what: str, partial: Path | None, run: Run) -> Iterator[None]:
    """Says after Cancel whether the next run goes on from there, and what file is left for it.

    ValueError for a model that does not answer for itself, naming what has been put around it.
    """
    try:
        yield
    except UnsteadyModel as fault:
        named = ", ".join(run.changed()) or "nothing that the host knows of"
        raise ValueError(f"{fault}. {run.remedies['unsteady'].format(changed=named)}") from fault
    except run.cancelled:
        if partial is not None and partial.exists():
            size = max(1, round(partial.stat().st_size / 1e6))
            say(f"{what} was cancelled; the next run goes on from there, with the same settings. Until then "
                f"{partial.parent.name}/{partial.name} takes {size} MB beside the calibrations: delete it if "
                "none will")
        else:
            say(f"{what} was cancelled; the next run begins anew")
        raise
