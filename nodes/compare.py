"""The node Compare Samplers: an error plot, a table, the images, and the cheapest choice that is good."""
from __future__ import annotations

import logging
import time
from typing import Iterable

import comfy.utils
from comfy.samplers import KSAMPLER
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..hosting.events import say
from ..hosting.measuring import as_long_as, duration
from . import picture
from .bench import (MOST_EVALUATIONS, Bench, Cell, Reference, References, grids, measured, parse,
                    parse_budgets, parse_schedulers, plan, solve, start_of)
from .host import CATEGORY, advanced

SAMPLERS = "euler\ndpmpp_2m\nuni_pc_bh2\nlambda_2m\nlambda_fitted"
references = References()


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model with its LoRAs, as it will be sampled"),
        io.Conditioning.Input("positive", tooltip="The prompt to compare on"),
        io.Conditioning.Input("negative", tooltip="The negative prompt that will be used"),
        io.Latent.Input("latent_image", tooltip=(
            "An empty latent of the size you use, or an image with denoise below 1. Of a batch, the error is "
            "over all "
            "images and the first is shown")),
        io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=False, tooltip=(
            "Guidance, as in KSampler")),
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=False, tooltip=(
            "Of the noise that every sampler starts from. Another seed needs another reference")),
        io.String.Input("samplers", multiline=True, default=SAMPLERS, tooltip=(
            "One on each line: a name of KSampler's list, or lambda/ and a name of ours (lambda/dpm_2m), and "
            "options "
            "behind commas (lambda/dpmpp_2m, rule=taylor). Samplers with two evaluations a step get half the "
            "steps")),
        io.String.Input("schedulers", default="karras, sgm_uniform", tooltip=(
            "Between commas: KSampler's schedulers, and tables of ComfyUI's nodes with their setting: "
            "align_your_steps:SDXL, gits:1.20, optimal_steps:FLUX")),
        io.String.Input("evaluations", default="5, 8, 12", tooltip=(
            f"Budgets of model evaluations an image, between commas, from 1 to {MOST_EVALUATIONS}: every "
            f"sampler gets "
            "as many steps as fit")),
        io.Float.Input("error", default=0.1, min=0.001, max=10.0, step=0.01, round=False, tooltip=(
            "What is good enough: the rms distance to the converged image, as a share of that image's "
            "standard "
            "deviation. `cheapest` is chosen by it; look at `sheet` to find what suits you")),
        io.Vae.Input("vae", optional=True, tooltip="Connect it to see the images side by side in `sheet`"),
        advanced(io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, round=False, tooltip=(
            "As in KSampler. Below 1, schedules start at sigmas of their own, and each start needs a "
            "reference"))),
        advanced(io.Int.Input("reference_evaluations", default=100, min=40, max=MOST_EVALUATIONS, tooltip=(
            "Evaluations of the converged image; a second one with half as many says how far it can be "
            "trusted. "
            "Kept until the model, prompt, latent, guidance or seed changes"))),
    ]


class CompareSamplers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaCompareSamplers",
            display_name="Compare Samplers",
            category=CATEGORY,
            description="Which sampler and scheduler need the fewest model evaluations on your model, prompt "
                        "and "
                        "guidance? Everything is run from the same noise at equal evaluations and held "
                        "against the "
                        "converged image.",
            inputs=_inputs(),
            outputs=[
                io.Image.Output("plot", display_name="plot",
                                tooltip="Error against model evaluations, both axes logarithmic"),
                io.Image.Output("sheet", display_name="sheet",
                                tooltip="The images, with evaluations and error; needs a VAE"),
                io.String.Output("table", display_name="table", tooltip="All figures, as markdown"),
                io.String.Output("cheapest", display_name="cheapest", tooltip="The fewest evaluations within "
                                                                              "the error"),
                io.Sampler.Output("sampler", display_name="SAMPLER", tooltip=(
                    "The cheapest sampler within the error, or the nearest where none is, for SamplerCustom: "
                    "with its "
                    "options and its calibration, as it was compared")),
                io.Sigmas.Output("sigmas", display_name="SIGMAS", tooltip="The schedule of that choice"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, cfg, seed, samplers, schedulers, evaluations,
                error, denoise, reference_evaluations, vae=None) -> io.NodeOutput:
        entries, budgets = parse(samplers), parse_budgets(evaluations)
        schedulers = parse_schedulers(schedulers)
        bench = Bench(model, positive, negative, cfg, latent_image, seed, denoise)
        inputs = (positive, negative, latent_image["samples"], latent_image.get("noise_mask"))
        say("planning: how many steps fit the budgets")
        cells = [cell for entry in entries for cell in plan(bench, entry, schedulers, budgets)]
        starts = {start_of(cell.sigmas): float(cell.sigmas[0]) for cell in reversed(cells) if not cell.fault}
        numbers = {start: (cfg, seed, start, reference_evaluations) for start in starts}
        known = {start: references.find(model, inputs, numbers[start]) for start in starts}
        missing = {start: grids(bench, starts[start], reference_evaluations)
                   for start in starts if not known[start]}
        clock = Clock(sum(cell.planned for cell in cells)
                      + sum(len(sigmas) - 1 for runs in missing.values() for _, sigmas in runs))
        for k, (start, runs) in enumerate(missing.items(), 1):
            clock.what = f"reference {k} of {len(missing)}"
            known[start] = solve(bench, runs, clock.tick)
            references.keep(model, inputs, numbers[start], known[start])
        for k, cell in enumerate(cells):
            if not cell.fault:
                clock.what = f"{k + 1} of {len(cells)}: {name_of(cell)}"
                cells[k] = measured(bench, cell, known[start_of(cell.sigmas)].samples, clock.tick)
        chosen, nearest = cheapest(cells, error), min(ran(cells), key=lambda cell: cell.error, default=None)
        plot = picture.tensor(plotted(cells, error, known.values()))
        sheet = picture.tensor(shown(cells, error, chosen, known, vae))
        verdict = words_for(chosen, nearest, error)
        say(verdict)
        return io.NodeOutput(plot, sheet, table(cells, known, verdict), verdict,
                             *driving(chosen or nearest, verdict), ui=ui.PreviewImage(plot, cls=cls))


class Clock:
    """The progress bar in model evaluations, and lines: what all costs, what runs, how much is left."""

    TIMED = 3  # evaluations, the first of which may be slow

    def __init__(self, total: int) -> None:
        self.total, self.done, self.what, self.start = total, 0, "", time.monotonic()
        self.bar = comfy.utils.ProgressBar(total)
        self.cost = cost_of(total)
        say(self.cost)

    def tick(self) -> None:
        self.done = min(self.done + 1, self.total)
        self.bar.update_absolute(self.done, self.total)
        each = (time.monotonic() - self.start) / self.done
        if self.done == self.TIMED:
            self.cost = cost_of(self.total, each * self.total)
            say(self.cost)
        else:
            say(f"{self.what}; {each * (self.total - self.done):.0f} s left", logging.DEBUG)


def cost_of(evaluations: int, seconds: float | None = None) -> str:
    """What so many evaluations are to a user, before they are made; seconds once some were timed."""
    said = as_long_as(evaluations, None)
    if seconds is None:
        return f"{said}, and more where a sampler measures or trains first"
    return f"{said}, about {duration(seconds)}"


def driving(cell: Cell | None, verdict: str) -> tuple:
    """SAMPLER and SIGMAS of a cell, with the calibration it had; without a cell, nodes behind stop."""
    if cell is None:
        return ExecutionBlocker(verdict), ExecutionBlocker(verdict)
    sampler = cell.entry.sampler
    return KSAMPLER(sampler.sampler_function, {**sampler.extra_options, **cell.outcome.used},
                    sampler.inpaint_options), cell.sigmas


def name_of(cell: Cell) -> str:
    budget = "adaptive" if cell.budget is None else f"{cell.budget} evaluations"
    return f"{cell.entry.label}, {cell.scheduler}, {budget}"


def ran(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.outcome]


def cheapest(cells: list[Cell], error: float) -> Cell | None:
    good = [cell for cell in ran(cells) if cell.error <= error]
    return min(good, key=lambda cell: (cell.outcome.evaluations, cell.error), default=None)


def words_for(chosen: Cell | None, nearest: Cell | None, error: float) -> str:
    def words(cell: Cell) -> str:
        return (f"{cell.entry.label} with {cell.scheduler}, {cell.steps} steps: {cell.outcome.evaluations} "
                f"evaluations, error {cell.error:.3f}")

    if chosen:
        return f"{words(chosen)} (within {error:g})"
    if not nearest:
        return "nothing ran: the table says why"
    return (f"nothing is within {error:g}; the nearest, which SAMPLER and SIGMAS are, is {words(nearest)}. "
            f"Allow more "
            "evaluations or a larger error, or try other samplers and schedulers")


def table(cells: list[Cell], known: dict[float, Reference], verdict: str) -> str:
    """All cells in markdown: by budget, the best first; then what the errors mean."""
    lines = ["| sampler | scheduler | evaluations | steps | error | |", "|---|---|---|---|---|---|"]
    def rank(cell: Cell) -> tuple:
        return cell.budget or MOST_EVALUATIONS + 1, not cell.outcome, cell.error

    for cell in sorted(cells, key=rank):
        counted = [f"{cell.outcome.evaluations}", f"{cell.steps}", f"{cell.error:.4f}"] if cell.outcome else [
            f"of {cell.budget}" if cell.budget else "", "", ""]
        row = [cell.entry.label, cell.scheduler, *counted, remark(cell, known)]
        lines.append("| " + " | ".join(row) + " |")
    made = [f"Reference: {reference.evaluations} evaluations of DPM-Solver++(3M); one of DPM-Solver++(2M) "
            f"with half as "
            f"many is {reference.doubt:.4f} away, and differences below that mean nothing."
            for reference in known.values()]
    return "\n".join([verdict, "", *lines, "", "Error: rms distance to the converged image of the same noise "
                                               "(the "
                      "reference), as a share of that image's standard deviation.", *made])


def remark(cell: Cell, known: dict[float, Reference]) -> str:
    said = []
    if cell.fault:
        said.append("failed: " + cell.fault.replace("|", "/"))
    if cell.stochastic:
        said.append("stochastic: goes to another image")
    if cell.budget is None and cell.outcome:
        said.append("adaptive: chooses its own steps")
    if cell.outcome and cell.outcome.calibration:
        said.append(f"calibrated first with {cell.outcome.calibration} evaluations, not counted")
    if len(known) > 1 and cell.outcome:
        said.append(f"starts at sigma {float(cell.sigmas[0]):.4g}, towards a reference of its own")
    return "; ".join(said)


def plotted(cells: list[Cell], error: float, known: Iterable[Reference]):
    lines = {}
    for cell in ran(cells):
        key = (cell.entry.label, cell.scheduler, cell.stochastic)
        lines.setdefault(key, []).append((cell.outcome.evaluations, cell.error))
    doubt = max((reference.doubt for reference in known), default=0.0)
    return picture.errors([picture.Line(*key, sorted(points)) for key, points in lines.items()], error, doubt)


def shown(cells: list[Cell], error: float, chosen: Cell | None, known: dict[float, Reference], vae):
    if vae is None:
        return picture.notice("Connect a VAE to Compare Samplers to see the images")

    def tile(samples, *captions: str, frame: str | None = None) -> picture.Tile:
        return picture.Tile(picture.first(vae.decode(samples[:1])), captions, frame)

    def tile_of(cell: Cell) -> picture.Tile:
        if not cell.outcome:
            return picture.Tile(None, ["failed"])
        frame = "best" if cell is chosen else "good" if cell.error <= error else None
        captions = f"error {cell.error:.3f}", f"{cell.outcome.evaluations} evaluations"
        return tile(cell.outcome.samples, *captions, frame=frame)

    rows, columns = {}, {(cell.scheduler, cell.budget): None for cell in cells}
    for cell in cells:
        rows.setdefault(cell.entry.label, {})[cell.scheduler, cell.budget] = tile_of(cell)
    heads = [(scheduler, f"{budget} evaluations" if budget else "adaptive") for scheduler, budget in columns]
    first = [tile(reference.samples, "converged", f"within {reference.doubt:.3f}")
             for reference in known.values()]
    words = (f"green: within {error:g} of the converged image\ngreen and thick: the cheapest of them\n"
             "error: rms distance as a share of its standard deviation")
    tiles = [(label, [row.get(key) for key in columns]) for label, row in rows.items()]
    return picture.sheet(first, words, heads, tiles)
