"""Error to the converged solution at equal model evaluations: all deterministic samplers, side by side.

    python dev/benchmark.py quick       three schedulers, two prompts, 5, 8, 10 evaluations: about 3 minutes
    python dev/benchmark.py steps       how many steps replace 20 of dpmpp_2m karras
    python dev/benchmark.py ours        those that changed most beside three of ComfyUI's: about 25 minutes
    python dev/benchmark.py few         two schedulers, every budget from 3 to 10, and AMED: about 70 minutes
    python dev/benchmark.py accuracy    every sampler of the catalogue on every scheduler: more than an hour
    python dev/benchmark.py hyper       the hypersolver on unseen prompts, and 35 choices of ComfyUI's: hours
    python dev/benchmark.py best        many images: ComfyUI's and ours that calibrate, about five hours

A cell is problem, prompt, guidance, scheduler, budget and sampler. Its error is taken to the converged
solution from the same starting noise: the rms, and the median of |error|, over all pixels of its images. All
cells are run with the core schedulers' sigmas as KSampler makes them (dpm_2 and uni_pc without the last but
one), and every run is counted: a sampler of ours spends the budget exactly or the cell is left out; ComfyUI's
heun, heunpp2 and dpm_2 take as many steps as fit. The main schedulers (karras, sgm_uniform, exponential,
which is uniform in lambda) get all budgets and all variants of options; the others get fewer budgets and
defaults only. ddim_uniform starts below sigma_max, at a sigma that depends on its steps: its converged
picture is another one, so it is left out of the list of best cells.

Read in this order: problems (what is solved), solvers (what is measured), cells (how), steps and report (what
is told).
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import torch

from .cells import Bench, Cell, Kept, clock, read, write
from .hypersolver import UNSEEN
from .problems import SCHEDULERS, Emoji, digits, gaussians
from .report import MAIN, MOVING_START, difference, plot, report
from .solvers import Entry, entries
from .steps import steps

PROMPTS = ("red heart", "panda", "strawberry", "doughnut")
CATALOGUE = ("core", "plain", "plain variant", "calibrated", "calibrated variant", "own prompt")
BEYOND = ("core", "calibrated", "own prompt", "refitted")


@dataclass(frozen=True)
class Size:
    """How much one run measures."""

    schedulers: tuple[str, ...] = MAIN
    prompts: tuple[str, ...] = PROMPTS
    budgets: tuple[int, ...] = (4, 5, 6, 8, 10)        # on the main schedulers
    other_budgets: tuple[int, ...] = ()                # on the others
    guidances: tuple[float, ...] = (3.0, 7.0, 1.0)     # of the emoji
    noises: int = 1                                    # images a prompt
    exact_noises: int = 32                             # 0: without the exact problems
    kinds: tuple[str, ...] = CATALOGUE
    names: tuple[str, ...] = ()                        # of samplers; all if empty
    stride: int = 2                                    # timesteps of the emoji's converged solution
    second: bool = True                                # is it held against another


SIZES = {
    "quick": Size(prompts=PROMPTS[:2], budgets=(5, 8, 10), guidances=(3.0,), exact_noises=16),
    "steps": Size(("karras", "beta"), budgets=tuple(range(3, 21)), other_budgets=tuple(range(3, 21)),
                  guidances=(3.0, 7.0), noises=2, exact_noises=0, stride=5,
                  kinds=("core", "plain", "calibrated", "trained"),
                  names=("comfy/dpmpp_2m", "comfy/lms", "comfy/uni_pc_bh2", "comfy/ipndm_v", "comfy/deis",
                         "lambda/dpmpp_2m", "lambda/dpmpp_3m", "lambda/dpm_solver_v3", "lambda/fitted_chosen",
                         "lambda/amed", "lambda/amed_dpmpp_2m")),
    "ours": Size(noises=3, exact_noises=128, stride=5,
                 names=("comfy/dpmpp_2m", "comfy/lms", "comfy/ipndm_v", "lambda/dpmpp_2m", "lambda/dpmpp_3m",
                        "lambda/ipndm", "lambda/dpm_solver_v3", "lambda/fitted", "lambda/fitted_chosen"),
                 kinds=tuple(kind for kind in CATALOGUE if kind != "plain variant")),
    "few": Size(("karras", "sgm_uniform"), PROMPTS[:2], tuple(range(3, 11)), noises=2, exact_noises=16,
                kinds=(*CATALOGUE, "trained", "trained variant")),
    "accuracy": Size(SCHEDULERS, budgets=(4, 5, 6, 8, 10, 15, 20), other_budgets=(4, 5, 6, 8, 10)),
    "hyper": Size(("karras", "sgm_uniform", "exponential", "beta", "normal"), UNSEEN, (5, 6, 8, 10),
                  (5, 6, 8, 10), (7.0, 3.0, 1.0), noises=8, exact_noises=0, stride=5, second=False,
                  kinds=("core", "calibrated", "hypersolver"),
                  names=("comfy/euler", "comfy/dpmpp_2m", "comfy/lms", "comfy/ipndm", "comfy/ipndm_v",
                         "comfy/deis", "comfy/uni_pc_bh2", "lambda/fitted_chosen")),
    "best": Size(tuple(name for name in SCHEDULERS if name != MOVING_START), other_budgets=(4, 5, 6, 8, 10),
                 noises=8, exact_noises=512, kinds=BEYOND),
}


def grid(size: Size, solvers: Sequence[Entry]) -> Iterator[Cell]:
    """Every cell of a size at one guidance."""
    for scheduler in size.schedulers:
        main = scheduler in MAIN
        for budget in size.budgets if main else size.other_budgets:
            for entry in solvers:
                n = entry.steps(budget)
                if n is None or ((entry.variant or entry.train) and not main):
                    continue
                if scheduler == MOVING_START and (entry.discards or n != budget):
                    continue  # starts elsewhere than the baseline does
                yield Cell(entry, scheduler, budget)


def benches(size: Size, folder: Path) -> Iterator[Bench]:
    say = clock()
    exact = (gaussians, digits) if size.exact_noises else ()
    for make in (*exact, lambda noises: Emoji(size.prompts, size.guidances, size.noises, size.stride,
                                                size.second)):
        problem = make(size.exact_noises)
        kept = Kept(folder / "kept", problem)
        yield from (Bench(problem, guidance, kept, say) for guidance in problem.guidances)


def accuracy(name: str, out: Path, against: Path | None) -> None:
    """The whole measurement of a size, written to out; if asked, how far it is from another run's table."""
    torch.set_num_threads(1)
    size, started = SIZES[name], time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    solvers = entries(size.kinds, size.names)
    budgets = ", ".join(map(str, size.budgets))
    print(f"{len(solvers)} samplers, {len(size.schedulers)} schedulers, evaluations {budgets}")
    with torch.inference_mode():
        if name == "steps":
            (out / "steps.md").write_text(text := steps(benches(size, out), list(grid(size, solvers))))
            print(f"\n{text}\nwritten: {out / 'steps.md'}")
            return
        rows, agreements = [], []
        for bench in benches(size, out):
            rows += bench.measure(list(grid(size, solvers)))
            agreements.append((bench.problem.name, bench.guidance, bench.agreement()))
    write(out / "accuracy.csv", rows)
    (out / "accuracy.md").write_text(report(rows, size, name, agreements, time.perf_counter() - started))
    plot(rows, out / "accuracy.png")
    print(f"written: {out / 'accuracy.csv'}, accuracy.md, accuracy.png")
    if against:
        print(difference(rows, read(against / "accuracy.csv")))
