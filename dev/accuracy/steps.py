"""How many steps replace 20, and 10, of dpmpp_2m karras: the number a user thinks in.

For each sampler, scheduler and guidance the fewest steps whose error is no larger, in the geometric mean over
prompts; found by halving the range, so it supposes that more steps err less. All on the emoji model through
ComfyUI. What ours learn of the model they learn at nobody's prompt, as the rule `auto` of the nodes does it,
and those evaluations are not counted.
"""
from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Iterable, Sequence

from .cells import Bench, Cell, Row
from .report import markdown, mean
from .solvers import BASELINE

USUAL, COUNTS = "karras", (20, 10)
KINDS = "rms", "median"
ENOUGH = 1.005  # of the error: no larger, but for rounding
NAMES = {"lambda/dpmpp_2m": "lambda_2m", "lambda/dpmpp_3m": "lambda_3m", "lambda/dpm_solver_v3": "lambda_v3",
         "lambda/fitted_chosen": "lambda_fitted", "lambda/amed": "lambda_amed",
         "lambda/amed_dpmpp_2m": "lambda_amed_2m"}
Key = tuple[str, str, str]  # sampler, scheduler and kind of error


def steps(benches: Iterable[Bench], cells: Sequence[Cell]) -> str:
    """The tables, measured."""
    benches = list(benches)
    fewer = {count: [cell for cell in cells if cell.budget <= count] for count in COUNTS}
    return "\n".join(replacing(count, benches, fewer[count]) for count in COUNTS)


def replacing(count: int, benches: Sequence[Bench], cells: Sequence[Cell]) -> str:
    """What replaces so many steps, among cells of no more evaluations."""
    [usual] = [cell for cell in cells if (cell.entry.label, *cell[1:]) == (BASELINE, USUAL, count)]
    columns, answers, errors = [], defaultdict(dict), []
    for bench in benches:
        base = bench.measure([usual])
        both = ", ".join(f"{mean(row[kind] for row in base):.4f} ({kind})" for kind in KINDS)
        errors.append(f"guidance {bench.guidance:g}: {both}")
        columns += [(bench.guidance, kind) for kind in KINDS]
        for trained in (False, True):  # training takes longest
            part = [cell for cell in cells if bool(cell.entry.train) == trained]
            for (sampler, scheduler, kind), answer in search(bench, part, base).items():
                answers[sampler, scheduler][bench.guidance, kind] = answer
    ranked = sorted(answers.items(), key=lambda item: statistics.fmean(n for n, _ in item[1].values()))
    lines = [[f"`{NAMES.get(sampler, sampler.removeprefix('comfy/'))}`", scheduler,
              *(found[column][1] for column in columns)] for (sampler, scheduler), found in ranked]
    head = ["sampler", "scheduler", *(f"guidance {guidance:g}, {kind}" for guidance, kind in columns)]
    return (f"{count} steps of dpmpp_2m on {USUAL}, with an error of {'; '.join(errors)}:\n\n"
            f"{markdown(head, lines)}\n")


def search(bench: Bench, cells: Sequence[Cell], base: Sequence[Row]) -> dict[Key, tuple[int, str]]:
    """For each sampler, scheduler and kind of error: the evaluations, and what to say."""
    searches: dict[Key, list[Cell]] = defaultdict(list)  # the cells that may be the answer
    for cell in cells:
        scheduler = "any" if cell.entry.chooses else cell.scheduler
        if scheduler == cell.scheduler or cell.scheduler == USUAL:
            for kind in KINDS:
                searches[cell.entry.label, scheduler, kind].append(cell)
    ratios: dict[Cell, dict[str, float]] = {}

    def measure(wanted: Iterable[Cell]) -> None:
        fresh = [cell for cell in dict.fromkeys(wanted) if cell not in ratios]
        rows = bench.measure(sorted(fresh, key=lambda cell: (cell.scheduler, cell.budget)))
        for cell in fresh:
            mine = [row for row in rows if (row["sampler"], row["scheduler"], row["budget"]) ==
                    (cell.entry.label, cell.scheduler, cell.budget)]
            ratios[cell] = {kind: mean(row[kind] / usual[kind] for row, usual in zip(mine, base))
                            for kind in KINDS}

    ranges = {key: (0, len(options)) for key, options in searches.items()}  # both ends included
    while middles := {key: sum(ends) // 2 for key, ends in ranges.items() if ends[0] < ends[1]}:
        measure(searches[key][middle] for key, middle in middles.items())
        for key, middle in middles.items():
            low, high = ranges[key]
            enough = ratios[searches[key][middle]][key[2]] <= ENOUGH
            ranges[key] = (low, middle) if enough else (middle + 1, high)
    found = {key: searches[key][min(low, len(searches[key]) - 1)] for key, (low, _) in ranges.items()}
    return {key: told(cell, ratios[cell][key[2]]) for key, cell in found.items()}


def told(cell: Cell, ratio: float) -> tuple[int, str]:
    """Steps, and evaluations where they are not the same; or how far the most that were tried are off."""
    evaluations = f" ({cell.budget} evaluations)" if cell.entry.train else ""
    if ratio <= ENOUGH:
        return cell.budget, f"{cell.steps}{evaluations}"
    return 100, f"more than {cell.steps}{evaluations}: {ratio:.2f} of the error"
