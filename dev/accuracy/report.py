"""The report of a run: tables of ratios to dpmpp_2m, a plot, and how far two runs are apart."""
from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Sequence

from .cells import Row
from .solvers import BASELINE

if TYPE_CHECKING:
    from . import Size

MAIN = ("karras", "sgm_uniform", "exponential")
MOVING_START = "ddim_uniform"
RATIO_HELP = (
    "Error as a ratio to `comfy/dpmpp_2m` in the same cell (below 1 is better), geometric "
    f"mean over prompts, guidances and the schedulers {', '.join(MAIN)}. Better: in how many "
    "of those cells by more than 0.5 %. A sampler without cells at some budgets has a mean "
    "over the others only. Where the rms of a few images that ended up elsewhere hides the "
    "rest (digits), the median shows it.")
SUMMARY_HELP = (
    f"Every sampler with its defaults: rms as a ratio to `{BASELINE}` in the same cell (below "
    f"1 is better), geometric mean over prompts, guidances and the schedulers {', '.join(MAIN)}; "
    "the column \"all\" weighs the problems alike. Last come those that do not "
    "have all cells (budgets they cannot spend, failures): their means are over other cells. "
    "`comfy/euler`, `lambda/dpmpp_1m` and `lambda/dpm_1m` are one method, so are the two "
    "`dpmpp_2m`; heun, dpm_2 and heunpp2 spend less than the budget where it does not fit. "
    "The evaluations of a calibration are not counted:")


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def shown(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def good(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["rms"] > 0]  # leaves out nan


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def cell(row: Row) -> tuple:
    """Where samplers meet."""
    return tuple(row[key] for key in ("problem", "prompt", "guidance", "scheduler", "budget"))


def ratios(rows: Sequence[Row], what: str = "rms") -> dict[str, list[tuple[Row, float]]]:
    """For each sampler its cells with the ratio of its error to dpmpp_2m's in the same cell."""
    base = {cell(row): row[what] for row in good(rows) if row["sampler"] == BASELINE}
    result = defaultdict(list)
    for row in good(rows):
        if cell(row) in base and row[what] > 0:
            result[row["sampler"]].append((row, row[what] / base[cell(row)]))
    return result


def difference(rows: Sequence[Row], before: Sequence[Row]) -> str:
    """How far the errors of two runs are apart, cell by cell, in every digit."""
    key = lambda row: (*cell(row), row["sampler"])
    ours, theirs = ({key(row): row for row in part} for part in (rows, before))
    common = ours.keys() & theirs.keys()
    apart = {}
    for place in common:
        pairs = [(float(ours[place][what]), float(theirs[place][what])) for what in ("rms", "median")]
        apart[place] = max(0.0 if a == b or a != a and b != b else abs(a - b) / max(abs(a), abs(b))
                           for a, b in pairs)
    alone = [len(part) - len(common) for part in (ours, theirs)]
    lines = [f"{len(common)} cells in both, {alone[0]} only now, {alone[1]} only before: "
             f"{sum(not value for value in apart.values())} are equal in every digit"]
    worst = sorted((place for place in common if apart[place]), key=apart.get, reverse=True)
    for place in worst[:10]:
        now, then = ours[place]["rms"], theirs[place]["rms"]
        lines.append(f"  {apart[place]:.1e}  {place}: rms {now} now, {then} before")
    return "\n".join(lines)


def report(rows: Sequence[Row], size: Size, name: str, agreements: Sequence[tuple], seconds: float) -> str:
    problems = unique(row["problem"] for row in rows)
    parts = [f"# Error at equal evaluations\n\nWritten by `python dev/benchmark.py {name}` in "
             f"{seconds / 60:.0f} minutes; {len(rows)} cells in accuracy.csv. What is measured and how: "
             "`dev/accuracy`. `comfy/` is ComfyUI's sampler, `lambda/` ours. Errors are rms over pixels; "
             "values are in -1 to 1.",
             "## Summary", summary_table(rows, problems), agreement_table(rows, agreements)]
    for problem in problems:
        mine = [row for row in rows if row["problem"] == problem]
        parts += [f"## {problem}", best_table(mine), oracle_table(mine, size), RATIO_HELP,
                  "By rms:", ratio_table(mine, size, "rms"), "By median:", ratio_table(mine, size, "median")]
    return "\n\n".join([*parts, failure_table(rows)]) + "\n"


def agreement_table(rows: Sequence[Row], agreements: Sequence[tuple]) -> str:
    lines = []
    for problem, guidance, apart in agreements:
        mine = [row for row in good(rows) if (row["problem"], row["guidance"]) == (problem, guidance)]
        errors = [row["rms"] for row in mine]
        if apart is not None:
            told = (apart, min(errors), statistics.median(errors))
            lines.append([problem, f"{guidance:g}", *(f"{value:.1e}" for value in told)])
    head = ["problem", "guidance", "difference of the references", "smallest error", "median error"]
    return ("How far two references that were made differently are apart. Errors that are not far above this "
            f"cannot be told apart:\n\n{markdown(head, lines)}")


def best_table(rows: Sequence[Row]) -> str:
    """The best sampler x scheduler of every guidance and budget, chosen after the fact."""
    found = defaultdict(list)
    whole = len({row["prompt"] for row in rows})
    for row in good(rows):
        if row["scheduler"] != MOVING_START:
            found[row["guidance"], row["budget"], row["sampler"], row["scheduler"]].append(row["rms"])
    lines = []
    for guidance in sorted({row["guidance"] for row in rows}):
        for budget in sorted({row["budget"] for row in rows}):
            means = {key[2:]: mean(values) for key, values in found.items()
                     if key[:2] == (guidance, budget) and len(values) == whole}
            cells = [f"{guidance:g}", f"{budget}"]
            for prefix in ("comfy/", "lambda/"):
                part = {key: value for key, value in means.items() if key[0].startswith(prefix)}
                best = min(part, key=part.get)
                cells.append(f"{best[0].removeprefix(prefix)}, {best[1]}: {part[best]:.3g}")
            usual = min((value, key[1]) for key, value in means.items() if key[0] == BASELINE)
            lines.append([*cells, f"{usual[1]}: {usual[0]:.3g}"])
    return ("The best cell of each budget (geometric mean over prompts), chosen with the result known, so "
            "nobody's choice beforehand is as good; beside it `dpmpp_2m` with its best scheduler:\n\n"
            + markdown(["guidance", "evaluations", "best of ComfyUI's", "best of ours", BASELINE], lines))


def oracle_table(rows: Sequence[Row], size: Size) -> str:
    """Every sampler on one scheduler, the one with the lowest mean, against ComfyUI's best of each cell."""
    budgets = size.other_budgets or size.budgets  # those of every scheduler
    rows = [row for row in good(rows) if row["scheduler"] != MOVING_START and row["budget"] in budgets]
    parts = []
    for what in ("rms", "median"):
        best: dict[tuple, float] = defaultdict(lambda: math.inf)
        for row in rows:
            if row["sampler"].startswith("comfy/"):
                best[_free(row)] = min(best[_free(row)], row[what])
        for guidance in sorted({row["guidance"] for row in rows}):
            mine = [row for row in rows if row["guidance"] == guidance and row[what] > 0]
            parts.append(f"By {what}, guidance {guidance:g}:\n\n" + _oracle(mine, best, what, budgets))
    return ("Every sampler on the one scheduler that suited it best over all these budgets, as a ratio to "
            "the best sampler x scheduler of ComfyUI's in each cell, which nobody knows beforehand; "
            "geometric mean over prompts:\n\n"
            + "\n\n".join(parts))


def _free(row: Row) -> tuple:
    """A cell of which the scheduler may be chosen."""
    return row["prompt"], row["guidance"], row["budget"]


def _oracle(rows: Sequence[Row], best: dict[tuple, float], what: str, budgets: Sequence[int]) -> str:
    found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if not row["variant"] or "own prompt" in row["sampler"] or "refitted" in row["sampler"]:
            found[row["sampler"], row["scheduler"]].append((row["budget"], row[what] / best[_free(row)]))
    full = max(map(len, found.values()))
    means = {key: mean(ratio for _, ratio in pairs) for key, pairs in found.items() if len(pairs) == full}
    chosen = {name: min((key for key in means if key[0] == name), key=means.get) for name, _ in means}
    lines = [[name, key[1], *(shown([r for n, r in found[key] if n == budget]) for budget in budgets),
              f"{means[key]:.2f}"] for name, key in sorted(chosen.items(), key=lambda item: means[item[1]])]
    return markdown(["sampler", "scheduler", *map(str, budgets), "mean"], lines)


def ratio_table(rows: Sequence[Row], size: Size, what: str) -> str:
    lines = []
    found = ratios(rows, what)
    main = {name: [(row, ratio) for row, ratio in pairs if row["scheduler"] in MAIN]
            for name, pairs in found.items()}
    for sampler in sorted(main, key=lambda name: mean(ratio for _, ratio in main[name])):
        part = main[sampler]
        other = [ratio for row, ratio in found[sampler] if row["scheduler"] not in MAIN]
        lines.append([sampler,
                      *(shown([r for row, r in part if row["budget"] == budget]) for budget in size.budgets),
                      shown([r for _, r in part]), f"{sum(r < 0.995 for _, r in part)} of {len(part)}",
                      shown(other)])
    return markdown(["sampler", *map(str, size.budgets), "mean", "better", "other schedulers"], lines)


def summary_table(rows: Sequence[Row], problems: Sequence[str]) -> str:
    """All samplers with their defaults, sorted by their mean over the problems at up to 10 evaluations."""
    found = {name: kept for name, pairs in ratios(rows).items()
             if (kept := [(row, r) for row, r in pairs if row["scheduler"] in MAIN and not row["variant"]])}
    full = max(len(pairs) for pairs in found.values())
    ranges = [("10 and fewer", 0, 10), ("more", 11, 999)]
    ranges = [part for part in ranges if any(part[1] <= row["budget"] <= part[2] for row in rows)]

    def over(name: str, problem: str, low: int, high: int) -> list[float]:
        return [r for row, r in found[name] if row["problem"] == problem and low <= row["budget"] <= high]

    def overall(name: str) -> float:
        return mean(mean(values) for problem in problems if (values := over(name, problem, 0, 10)))

    order = sorted(found, key=lambda name: (len(found[name]) < full, overall(name)))
    lines = [[name, f"{overall(name):.2f}", *(shown(over(name, problem, low, high)) for _, low, high in ranges
                                              for problem in problems), f"{len(found[name])} of {full}"]
             for name in order]
    columns = [f"{problem}, {name}" for name, *_ in ranges for problem in problems]
    head = ["sampler", "all, 10 and fewer", *columns, "cells"]
    return f"{SUMMARY_HELP}\n\n{markdown(head, lines)}"


def failure_table(rows: Sequence[Row]) -> str:
    failed = Counter((row["problem"], row["sampler"], row["scheduler"], row["reason"])
                     for row in rows if row["reason"])
    lines = [[*key, str(count)] for key, count in failed.items()]
    head = ["problem", "sampler", "scheduler", "reason", "rows"]
    return "## Failures\n\n" + (markdown(head, lines) if lines else "None.")


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel a problem: geometric mean of the rms over prompts, guidances and the main schedulers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [row for row in good(rows) if row["scheduler"] in MAIN and not row["variant"]]
    problems = unique(row["problem"] for row in rows)
    names = unique(row["sampler"] for row in rows)
    figure, axes = pyplot.subplots(1, len(problems), figsize=(5 * len(problems) + 2.5, 6), squeeze=False)
    for axis, problem in zip(axes[0], problems):
        _panel(axis, problem, rows, names, pyplot.get_cmap("tab20"))
    axes[0][0].set_ylabel("rms error to the converged solution\n"
                          f"(geometric mean over prompts, guidances and {', '.join(MAIN)})")
    axes[0][-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _panel(axis: Any, problem: str, rows: Sequence[Row], names: Sequence[str], colours: Any) -> None:
    for name in names:
        ours = name.startswith("lambda/")
        place = [n for n in names if n.startswith("lambda/") == ours].index(name)
        points = defaultdict(list)
        for row in rows:
            if (row["problem"], row["sampler"]) == (problem, name):
                points[row["evaluations"]].append(row["rms"])
        at = sorted(points)
        bold = name in ("lambda/dpmpp_2m", "lambda/dpm_solver_v3", "lambda/fitted", "lambda/fitted_chosen")
        axis.plot(at, [mean(points[n]) for n in at], "-o" if ours else "--x", label=name, markersize=4,
                  color="black" if name == BASELINE else colours(place % colours.N),
                  zorder=3 if name == BASELINE else 2, linewidth=2.5 if bold else 1.1)
    axis.set(xscale="log", yscale="log", title=problem, xlabel="model evaluations")
    ticks = sorted({row["evaluations"] for row in rows})
    named = [str(tick) if tick in (3, 5, 8, 10, 15, 20) else "" for tick in ticks]
    axis.set_xticks(ticks, named, minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3, which="both")
