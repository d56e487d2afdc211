"""A script of the WebUI's that trains a hypersolver for the model, and then makes a picture with it."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator, NamedTuple, Sequence

import gradio as gr
from modules import extra_networks, processing, prompt_parser, scripts

from ..hosting import library, store, teaching
from ..hosting.events import say
from ..hosting.kinds import STATISTICS_KIND
from ..hosting.prompts import PROMPTS
from ..samplers.learning.refit import FEWEST
from ..samplers.learning.train_hypersolver import ITERATIONS
from . import checkpoint
from .job import Run

SAMPLER = "Lambda Fitted"
READ = 8  # prompts at once, by the text encoder
COST = ("Trains a small network that adds what every step of *Lambda Fitted* misses, for all prompts, a "
        "range of guidances and of numbers of steps; then makes a picture with it. It takes as long as "
        "**about 2 images of 20 steps for each image it learns from: 460** with these prompts. *Interrupt* "
        "keeps what was done. LoRAs, negative prompt, size and batch are those of the page: a batch of 1 "
        "takes the least memory, and no longer.")


class Told(NamedTuple):
    """What the WebUI makes of a prompt and of the negative one; None at a guidance of 1."""

    cond: Sequence[Any]
    uncond: Sequence[Any] | None


class Training(scripts.Script):
    """In the WebUI's list of scripts, of txt2img."""

    def title(self) -> str:
        return "Lambda Solvers: train hypersolver"

    def show(self, is_img2img: bool) -> bool:
        return not is_img2img

    def ui(self, is_img2img: bool) -> list[Any]:
        def number(name: str, label: str, low: float, high: float, value: float, info: str,
                   step: float = 1) -> Any:
            return gr.Slider(minimum=low, maximum=high, step=step, value=value, label=label, info=info,
                             elem_id=self.elem_id(name))

        gr.Markdown(COST)
        prompts = gr.Textbox("\n".join(PROMPTS), lines=8, max_lines=20, label="Prompts",
                             elem_id=self.elem_id("prompts"), info=(
                                 "One a line, of all that the model will be used for: the more and the more "
                                 "varied, the better it serves others"))
        images = number("images", "Images of every prompt", 1, 64, 2, "Twice as many take twice as long")
        low = number("cfg_low", "Lowest CFG scale", 1, 30, 5, "That it will be used at", 0.5)
        high = number("cfg_high", "Highest CFG scale", 1, 30, 9, "That it will be used at", 0.5)
        with gr.Accordion("More", open=False):
            fewest = number("fewest", "Fewest steps", FEWEST, 20, 4, "That it will be used for")
            most = number("most", "Most steps", FEWEST, 20, 10, "That it will be used for")
            training = number("training", "Training", 1, 100_000, ITERATIONS, (
                "Steps of the network's training, twice so many in all: they take time on the device, but no "
                "evaluations of the model"))
        return [prompts, images, low, high, fewest, most, training]

    def run(self, p: Any, prompts: str, images: float, cfg_low: float, cfg_high: float, fewest: float,
            most: float, training: float) -> Any:
        p.lambda_solvers_lessons = teaching.Lessons(
            teaching.lines(prompts), int(images), float(cfg_low), float(cfg_high), int(fewest), int(most),
            int(training))
        p.sampler_name, p.enable_hr = SAMPLER, False
        return processing.process_images(p)


def read(p: Any) -> None:
    """Read the prompts of a job that trains, while the WebUI is about to read its own: then its text encoder
    is at hand, and the LoRAs are in place."""
    if lessons := getattr(p, "lambda_solvers_lessons", None):
        p.lambda_solvers_told = [*_told(p, lessons)]


def _told(p: Any, lessons: teaching.Lessons) -> Iterator[Told]:
    """By the job's own function, which knows what the model wants beside texts. LoRAs are the job's alone."""
    texts, _ = extra_networks.parse_prompts([*lessons.prompts])
    before = {name: getattr(p, name) for name in ("prompts", "negative_prompts", "cfg_scale")}
    p.cfg_scale = max(lessons.guidances)  # Forge reads no negative prompt at 1
    try:
        for k in range(0, len(texts), READ):
            p.prompts = texts[k:k + READ]
            p.negative_prompts = before["negative_prompts"][:1] * len(p.prompts)
            p.setup_conds()
            cond, uncond = p.get_conds()
            yield from map(Told, cond.batch, uncond or [None] * len(cond.batch))
    finally:
        for name, value in before.items():
            setattr(p, name, value)


def teach(run: Run) -> bool:
    """Train a hypersolver in a job that asks for it, and save it: the job's own run finds it then. Whether it
    asked."""
    p, lessons = run.sampler.p, getattr(run.sampler.p, "lambda_solvers_lessons", None)
    if not lessons:
        return False
    p.lambda_solvers_lessons = None  # once, however many pictures are made
    told = vars(p).pop("lambda_solvers_told")
    middle = _under(told[:1] * len(run.x), lessons.middle)  # the page may have no negative prompt, at 1
    found = teaching.beneath(replace(run, extra_args={**run.extra_args, **middle}))
    run = replace(run, prompts=len(told), each=[
        _under([one] * len(run.x), guidance) for one, guidance in zip(told, lessons.guidances)])
    with run.apart():
        about = checkpoint.description(p, {**run.extra_args, **_under(told, lessons.middle)})
        result = teaching.teach(run, found, lessons, about)
    if result is not found and (path := library.kept(STATISTICS_KIND, result)):
        say(f"saved as {store.shown(path)}; {SAMPLER} finds it by itself")
    return True


def _under(each: Sequence[Told], guidance: float) -> dict[str, Any]:
    """The model's arguments for an image of each of these prompts."""
    conds, unconds = zip(*each)
    return {"cond": prompt_parser.MulticondLearnedConditioning((len(conds),), [*conds]),
            "uncond": None if None in unconds else [*unconds], "cond_scale": guidance}
