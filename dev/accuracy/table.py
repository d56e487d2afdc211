"""The table of all samplers in docs/solvers.md, written anew, with a measured figure of each.

    python dev/benchmark.py table

A figure is an error by an error of ComfyUI's at equal evaluations, so below 1 is better; EVALUATIONS of them,
or as many below that as the sampler can spend, in brackets where they are others:

    without noise   rms to the converged images, emoji model, guidance 3, karras, geometric mean over prompts,
                    by that of ComfyUI's dpmpp_2m; what a sampler learns it learns as the nodes do it. An
                    adaptive one spends what its default tolerances ask for
    with noise      the sliced Wasserstein distance to the data of stochastic.py, karras, by that of ComfyUI's
                    dpmpp_2m_sde

All but the figure comes from the catalogue, and the places of the evaluations of a step from its plan.
"""
from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Iterator

import environment
import torch
from samplers import PATHS, SAMPLERS, k_diffusion_sampler, nfe
from samplers.catalogue import Sampler
from samplers.solver import Adaptive, Step

from . import stochastic
from .cells import Bench, Cell, Counted, Kept, clock
from .problems import Emoji, model_sampling, rms, schedule, starting_x
from .report import markdown, mean
from .solvers import BASELINE, CORE, Entry, amed, everything, ours

DOCUMENT = environment.ROOT / "docs" / "solvers.md"
PROMPTS = "red heart", "panda", "strawberry", "doughnut"
NOISES, GUIDANCE, SCHEDULER, STRIDE = 2, 3.0, "karras", 5
EVALUATIONS, NOISY_EVALUATIONS, NOISY_BASELINE = 10, 20, "dpmpp_2m_sde"
HEAD = ("name", "title", "evaluations per step", "equation", "source", "figure", "when to use")
FIGURE = HEAD.index("figure")

EQUATIONS = {  # of the list above the table
    1: ("dpmpp_1m", "dpmpp_2m", "dpmpp_3m", "uni_pc_bh1", "uni_pc_bh2", "dpmpp_2s", "dpmpp_3s", "dpmpp_fast"),
    2: ("dpm_1m", "dpm_2m", "dpm_3m", "dpm_2s", "dpm_3s", "dpm_fast", "dpm_adaptive_12", "dpm_adaptive_23"),
    3: ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s_sde"),
    4: ("ddim", "ddpm", "analytic_dpm"),
    5: ("dpm_solver_v3", "fitted", "fitted_chosen"),
    6: ("ipndm", "heun", "rk45"),
    7: ("amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m"),
    8: ("pc",),
}
NUMBERS = {name: number for number, names in EQUATIONS.items() for name in names}


def row(sampler: Sampler, figure: str) -> list[str]:
    evaluations = sampler.evaluations_per_step
    source = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", sampler.citation)
    return [f"`{sampler.name}`", sampler.title, "adaptive" if evaluations is None else str(evaluations),
            f"({NUMBERS[sampler.name]}), r = {', '.join(map(str, sorted(nodes(sampler))))}", source, figure,
            sampler.help]


def nodes(sampler: Sampler) -> set[Fraction]:
    """Where a step s -> t has its evaluations, its own and earlier ones, as (lam - lam_s) / h; on equal
    steps."""
    solver, path = sampler.solver(**sampler.stand_ins), PATHS["ve"]
    if isinstance(solver, Adaptive):
        return {Fraction(c).limit_denominator(10) for c in (0.0, *solver.tableau.c)}
    steps = solver.steps([path.at(k / 4.0) for k in range(25)], path)
    past = [evaluation.at for step in reversed(steps[:3]) for evaluation in reversed(step.evaluations)]
    step: Step = steps[3]
    s, h = step.s.lam, step.t.lam - step.s.lam
    levels = [evaluation.at for evaluation in step.evaluations]
    used = {k for update in (*step.updates, step.correction) if update for k, _ in update.terms}
    levels += [past[-k - 1] for k in used if k < 0] + [step.t] * (len(levels) in used)
    return {Fraction(float((level.lam - s) / h)).limit_denominator(10) for level in levels}


def rows(document: str) -> list[list[str]]:
    """Those of the table as it stands."""
    return [line.strip("| ").split(" | ") for line in block(document).splitlines()[2:]]


def block(document: str) -> str:
    """The table's lines."""
    return re.search(rf"^\| {' | '.join(HEAD)} \|\n(\|.*\n)+".replace(" | ", r" \| "), document, re.M)[0]


def table(out: Path) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = dict([*without_noise(out), *noisy()])
    document = DOCUMENT.read_text(encoding="utf-8")
    written = markdown(HEAD, (row(sampler, found[name]) for name, sampler in SAMPLERS.items())) + "\n"
    DOCUMENT.write_text(document.replace(block(document), written), encoding="utf-8")
    print(f"{written}\nwritten: {DOCUMENT}")


def told(ratio: float, evaluations: int, usual: int) -> str:
    return f"{ratio:.2f}" + (f" ({evaluations})" if evaluations != usual else "")


def noisy() -> Iterator[tuple[str, str]]:
    """Names and figures of those that draw noise."""
    problem = stochastic.Problem()
    usual = problem.distance(stochastic.theirs(NOISY_BASELINE), SCHEDULER, NOISY_EVALUATIONS)
    for name, sampler in SAMPLERS.items():
        if sampler.draws:
            steps = max(n for n in range(1, NOISY_EVALUATIONS + 1) if nfe(name, n) <= NOISY_EVALUATIONS)
            ratio = problem.distance(problem.ours(name), SCHEDULER, steps) / usual
            yield name, told(ratio, nfe(name, steps), NOISY_EVALUATIONS)


def entry(name: str) -> Entry:
    """How a sampler is measured, with its defaults."""
    if "trained" in SAMPLERS[name].options:
        return ours(name, "trained", train=amed())
    return next(entry for entry in everything() if entry.label == f"lambda/{name}")


def without_noise(out: Path) -> Iterator[tuple[str, str]]:
    """Names and figures of the others."""
    problem = Emoji(PROMPTS, (GUIDANCE,), NOISES, STRIDE, second=False)
    bench = Bench(problem, GUIDANCE, Kept(out / "kept", problem), clock())
    baseline = next(entry for entry in CORE if entry.label == BASELINE)

    def errors(entry: Entry, budget: int) -> list[float]:
        return [row["rms"] for row in bench.measure([Cell(entry, SCHEDULER, budget)])]

    for name, sampler in SAMPLERS.items():
        if sampler.draws:
            continue
        if sampler.evaluations_per_step is None:
            own, budget = free(bench, name)
        else:
            one = entry(name)
            budget = max(n for n in range(2, EVALUATIONS + 1) if one.steps(n))
            own = errors(one, budget)
        ratio = mean(a / b for a, b in zip(own, errors(baseline, budget)))
        yield name, told(ratio, budget, EVALUATIONS)


def free(bench: Bench, name: str) -> tuple[list[float], int]:
    """The errors of an adaptive sampler, one a prompt, and its evaluations."""
    sigmas = schedule(SCHEDULER, EVALUATIONS, False, bench.problem.dtype)

    def body(model) -> tuple[torch.Tensor, int]:
        counted = Counted(model, remembers=False)
        return k_diffusion_sampler(name, sigma_min=float(model_sampling().sigma_min))(
            counted, starting_x(model, bench.noise, sigmas[0]), sigmas, disable=True), counted.calls

    x, calls = bench.problem.session(bench.prompts, bench.guidance, body)
    solution = torch.load(bench.kept.solution(bench.guidance, round(float(sigmas[0]), 4)))[0]
    return [rms(part) for part in (x - solution).split(NOISES)], calls
