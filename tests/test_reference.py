"""The authors' own implementations, case by case (tests/reference/README.md says where the numbers come
from)."""
from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from problems import REFERENCE, reference_mixture
from samplers import Amed, Statistics, k_diffusion_sampler
from samplers import FAMILIES
from samplers.k_diffusion import k_diffusion_function
from samplers.sample import sample, sample_adaptive
from samplers.schedule import PATHS, levels

VP = PATHS["vp"]
FAMILY = {
    "multistep": "multistep", "singlestep_fixed": "singlestep", "singlestep": "singlestep",
    "adaptive": "adaptive"
}
V3_CASES = [case for case in REFERENCE["cases"] if "DPM-Solver-v3" in case["source"]]
CASES = [case for case in REFERENCE["cases"] if case["source"] == "LuChengTHU/dpm-solver"]
AMED_CASES = [case for case in REFERENCE["cases"] if "amed-solver" in case["source"]]


def lam_of(t: float) -> float:
    """VP with linear beta from 0.1 to 20, the schedule of these cases."""
    log_alpha = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
    return log_alpha - 0.5 * np.log(-np.expm1(2.0 * log_alpha))


def t_of(lam: float) -> float:
    return brentq(lambda t: lam_of(t) - lam, 1e-6, 1.5, xtol=1e-15)


def grid(case: dict) -> list[float]:
    """The lam of every level: for grouped singlestep also those inside the groups, which the cases leave
    to skip_type."""
    if case["method"] == "adaptive":
        return [lam_of(1.0), lam_of(1e-3)]
    if case["method"] != "singlestep":
        return case["lambdas"]
    fine = []
    for (a, b), order in zip(pairwise(case["lambdas"]), case["orders"]):
        if case["skip_type"] == "time_uniform":
            fine += [lam_of(t) for t in np.linspace(t_of(a), t_of(b), order + 1)[:-1]]
        else:
            fine += list(np.linspace(a, b, order + 1)[:-1])
    return [*fine, case["lambdas"][-1]]


def v3_statistics() -> Statistics:
    """Per channel, on a uniform grid in lam."""
    table = REFERENCE["v3_statistics"]
    lam = np.linspace(table["lambda_start"], table["lambda_end"], table["intervals"] + 1)
    return Statistics(lam, *(np.array(table[key]).reshape(len(lam), -1, 1, 1) for key in ("l", "s", "b")))


def name(case: dict) -> str:
    return " ".join(
        str(case.get(k, "")) for k in ("algorithm", "method", "order", "solver_type", "skip_type", "nfe"))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_case_of_dpm_solver_is_reproduced(case: dict) -> None:
    options = {
        "order": case["order"], "prediction": "data" if case["algorithm"] == "dpmsolver++" else "noise",
        "rule": {"dpmsolver": "midpoint", "taylor": "taylor"}[case["solver_type"]]
    }
    if case["method"] == "multistep":
        options["lower_order_final"] = "on" if case["lower_order_final"] else "off"
    if case["method"] == "adaptive":
        options |= {key: case[key] for key in ("rtol", "atol", "h_init", "theta")}
    if case["method"] == "singlestep":
        options["fast"] = True
    solver = FAMILIES[FAMILY[case["method"]]].solver(**options)
    schedule = levels([VP.at(lam).sigma for lam in grid(case)], VP)
    denoiser, x = reference_mixture("vp")
    evaluations = []

    def denoise(x, sigma):
        evaluations.append(sigma)
        return denoiser(x, x.new_full((len(x),), sigma))

    if case["method"] == "adaptive":
        result = sample_adaptive(denoise, x, schedule, replace(solver, longest=math.inf), VP)  # as published
        assert len(evaluations) <= case["nfe"]  # theirs evaluates again at s when a step is refused
    else:
        result = sample(denoise, x, solver.steps(schedule, VP))
        assert len(evaluations) == case["nfe"]
    expected = torch.tensor(case["x"], dtype=torch.float64).reshape(x.shape)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_every_case_of_this_package_s_solvers_is_here() -> None:
    assert len(V3_CASES) == 8 and len(CASES) == 24 and len(AMED_CASES) == 32
    assert len(REFERENCE["cases"]) == 64 and {case["method"] for case in CASES} == set(FAMILY)


@pytest.mark.parametrize("case", V3_CASES, ids=lambda case: " ".join(str(case[key]) for key in (
    "steps", "order", "p_pseudo", "use_corrector", "c_pseudo", "lower_order_final", "degenerated")))
def test_a_case_of_dpm_solver_v3_is_reproduced(case: dict) -> None:
    statistics = v3_statistics()
    lam = statistics.lam
    if case["degenerated"]:
        statistics = Statistics.constant(1.0, 0.0, 0.0, (lam[0], lam[-1])).on(lam)
    sampler = k_diffusion_sampler(
        "dpm_solver_v3", statistics=statistics, order=case["order"], pseudo_predictor=case["p_pseudo"],
        pseudo_corrector=case["c_pseudo"], corrector="full" if case["use_corrector"] else "off",
        lower_order_final="on" if case["lower_order_final"] else "off", quadrature="grid")
    denoiser, x = reference_mixture("ve")
    evaluations = []

    def model(x, sigma):
        evaluations.append(sigma)
        return denoiser(x, sigma)

    sigmas = torch.from_numpy(np.exp(-lam[case["statistics_indexes"]]))
    result = sampler(model, x * 80.0, sigmas, disable=True)
    assert len(evaluations) == case["nfe"]
    torch.testing.assert_close(result,
                               torch.tensor(case["x"], dtype=torch.float64).reshape(x.shape), rtol=0,
                               atol=1e-9)


def amed_base(case: dict) -> str:
    order = case["options"].get("max_order")
    if case["solver"] == "dpmpp":
        return f"dpm{'pp' if case['options']['predict_x0'] else ''}_{order}m"
    return f"ipndm_{order}" if order == 2 else case["solver"]


@pytest.mark.parametrize("case", AMED_CASES,
                         ids=lambda case: f"{amed_base(case)} {case['nfe']} {case['afs']}")
def test_a_case_of_amed_is_reproduced(case: dict) -> None:
    schedule = levels(case["sigmas"], PATHS["ve"])
    inner = np.tile([case["r"], case["scale_dir"], case["scale_time"]], (len(schedule) - 1, 1))
    base, first_step = amed_base(case), "afs" if case["afs"] else "evaluate"
    trained = Amed(np.array([level.lam for level in schedule]), inner, base, first_step)
    lower = "on" if case["options"].get("lower_order_final") else "off"
    sampler = FAMILIES["amed"]
    denoiser, x = reference_mixture("ve")
    evaluations = []

    def model(x, sigma):
        evaluations.append(sigma)
        return denoiser(x, sigma)

    fn = k_diffusion_function(sampler, "ve", {"trained": trained, "base": base, "lower_order_final": lower})
    result = fn(model, x * case["sigmas"][0], torch.tensor(case["sigmas"], dtype=torch.float64), disable=True)
    assert len(evaluations) == case["nfe"]
    torch.testing.assert_close(result,
                               torch.tensor(case["x"], dtype=torch.float64).reshape(x.shape), rtol=0,
                               atol=1e-9)
