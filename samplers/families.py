"""The solvers: every family is one function, every name a preset of one.

Its signature gives the options with their defaults and ranges, its docstring what it is, its presets the
names. A new solver is one function here, or a preset of one that exists.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from .catalogue import FAMILIES, SAMPLERS, Option, Preset, Solver, family  # noqa: F401  (filled here)
from .integrand import PREDICTIONS, AncestralPrediction, DataPrediction, NoisePrediction
from .learning.amed import BASES, Amed, Insertion
from .learning.fitted import Fitted, Unmeasured
from .learning.statistics import AnalyticPrediction, EmpiricalPrediction, Statistics
from .phi import RULES, adams, bh2, pseudo_weights, taylor, weights
from .score_sde import PREDICTORS, SDES, PredictorCorrector
from .solver import (
    DORMAND_PRINCE, HEUN, TABLEAUX, Adaptive, Churned, Grouped, Multistep, RungeKutta, Singlestep)

PREDICTION = Option(
    "What is interpolated: data = the denoised image (DPM-Solver++), noise = the predicted noise "
    "(DPM-Solver). Which is better depends on the model for multistep; for singlestep in few steps data "
    "is", choices=tuple(PREDICTIONS), advanced=True)
Prediction = Annotated[str, PREDICTION]
LowerOrderFinal = Annotated[str, Option(
    "Lower the order towards the end, where a long step by what the model said earlier goes astray. auto: in "
    "runs of fewer than 15 steps that end clean, to 1 in the last step above 0 if it is long, else to 2; on: "
    "always to 1; off: never, as in ComfyUI",
    advanced=True, choices=("auto", "on", "off"))]
SINGLESTEP_RULE = Option(
    "How the inner evaluations are combined. midpoint: as published; taylor: the polynomial through all of "
    "them", choices=("midpoint", "taylor"), advanced=True)
SinglestepRule = Annotated[str, SINGLESTEP_RULE]
MultistepRule = Annotated[str, Option(
    "How earlier evaluations are combined. midpoint: as published by Lu et al., for order 2 the usual DPM++ "
    "2M, the best in few steps; taylor: exact for polynomials, of full order; published: order 3 as "
    "published, order 2 as taylor (k-diffusion's 3M SDE); bh1, bh2: taylor with UniPC's simpler weights for "
    "two", choices=tuple(RULES), advanced=True)]
Corrector = Annotated[str, Option(
    "Repeat each step with the evaluation at its end, at no further cost (UniC). half: only in the cleaner "
    "half of the way", choices=("off", "full", "half"), advanced=True)]
CORRECTING = {**RULES, "midpoint": bh2, "published": taylor}
"""The rule of a corrector beside that of its predictor: of the order that one more node gives."""
NOISE_DEVICE = Option(
    "Where the noise is drawn. cpu: the same image on every device; gpu: quicker for large latents, tied to "
    "the device",
    choices=("cpu", "gpu"), advanced=True)
NoiseDevice = Annotated[str, NOISE_DEVICE]
S_NOISE = Option("Factor on the added noise; 1 is exact, a little more adds texture", 0.0, 10.0, 0.01)
SNoise = Annotated[float, S_NOISE]
StatisticsOption = Annotated[Statistics, Option(
    "the model's statistics: samplers.estimate_statistics(...), or Statistics.load(path)",
    stand_in=Statistics.constant())]
ORDER_HELP = "Order of accuracy. 2 was the best choice up to 20 steps in our measurements; 3 needs more"

DPM_SOLVER = "Lu et al. 2022, DPM-Solver (arXiv:2206.00927)"
DPM_SOLVER_PP = "Lu et al. 2022, DPM-Solver++ (arXiv:2211.01095)"
UNIPC = "Zhao et al. 2023, UniPC (arXiv:2302.04867)"


UNI_PC = {"order": 3, "corrector": "full"}


@family("DPM-Solver Multistep", f"{DPM_SOLVER_PP}; {DPM_SOLVER}; {UNIPC}", {
    "dpmpp_1m": Preset("DPM-Solver++(1M), DDIM", "a first-order reference: DDIM, Euler in sigma",
                       {"order": 1, "prediction": "data"}, citation=DPM_SOLVER_PP),
    "dpmpp_2m": Preset("DPM-Solver++(2M)",
                       "of those that measure nothing the best on average up to 10 evaluations",
                       {"order": 2, "prediction": "data"}, citation=DPM_SOLVER_PP),
    "dpmpp_3m": Preset("DPM-Solver++(3M)",
                       "many steps: up to 20 evaluations dpmpp_2m was better on average in our measurements",
                       {"order": 3, "prediction": "data"}, citation=DPM_SOLVER_PP),
    "dpm_1m": Preset("DPM-Solver-1, DDIM", "a first-order reference: the same as dpmpp_1m",
                     {"order": 1, "prediction": "noise"}, citation=DPM_SOLVER),
    "dpm_2m": Preset("DPM-Solver(2M)",
                     "level with dpmpp_2m: better at guidance 3 on the emoji model, worse on a mixture",
                     {"order": 2, "prediction": "noise"}, citation=DPM_SOLVER),
    "dpm_3m": Preset("DPM-Solver(3M)", "as dpm_2m, a little less steady", {"order": 3, "prediction": "noise"},
                     {"rule": "taylor"}, citation=DPM_SOLVER),
    "uni_pc_bh1": Preset("UniPC-3, B1(h)",
                         "ComfyUI's uni_pc: on a mixture ahead of dpmpp_2m from 15 steps on, behind it below",
                         {"prediction": "data", "rule": "bh1"}, UNI_PC, citation=UNIPC),
    "uni_pc_bh2": Preset("UniPC-3, B2(h)", "ComfyUI's uni_pc_bh2: as uni_pc_bh1, better up to 10 steps",
                         {"prediction": "data", "rule": "bh2"}, UNI_PC, citation=UNIPC),
})
def multistep(
    order: Annotated[int, Option(ORDER_HELP, 1, 3)] = 2,
    prediction: Prediction = "data",
    rule: MultistepRule = "midpoint",
    corrector: Corrector = "off",
    lower_order_final: LowerOrderFinal = "auto",
) -> Solver:
    """DPM-Solver and DPM-Solver++, multistep: the last evaluations are reused, each step costs one new one.

    The defaults were the best on average at 5 to 20 evaluations in our measurements.
    """
    return Multistep(PREDICTIONS[prediction], order, RULES[rule], lower_order_final, corrector=corrector,
                     corrector_rule=CORRECTING[rule])


SINGLESTEP = f"{DPM_SOLVER}, Algorithms 1-2 and section 3.4; {DPM_SOLVER_PP}, Algorithm 1"
SEEDS = "Gonzalez et al. 2023, SEEDS (arXiv:2305.14267)"
OF_DATA = (("prediction", "data"),)


@family("DPM-Solver Singlestep", f"{SINGLESTEP}; {SEEDS}", {
    "dpmpp_2s": Preset("DPM-Solver++(2S)",
                       "two evaluations a step and no history, so a run can be cut anywhere",
                       {"order": 2, "prediction": "data", "fast": False},
                       citation=f"{DPM_SOLVER_PP}, Algorithm 1"),
    "dpmpp_3s": Preset("DPM-Solver++(3S)", "three evaluations a step and no history, for reference images",
                       {"order": 3, "prediction": "data", "fast": False},
                       citation=f"{DPM_SOLVER}, Algorithm 2, in data prediction"),
    "dpm_2s": Preset("DPM-Solver-2", "many steps only: far behind dpmpp_2s in few",
                     {"order": 2, "prediction": "noise", "fast": False},
                     citation=f"{DPM_SOLVER}, Algorithm 1"),
    "dpm_3s": Preset("DPM-Solver-3", "many steps only: far behind dpmpp_3s in few",
                     {"order": 3, "prediction": "noise", "fast": False},
                     citation=f"{DPM_SOLVER}, Algorithm 2"),
    "dpmpp_2s_sde": Preset("SDE-DPM-Solver++(2S)",
                           "stochastic without a history; ComfyUI's seeds_2 with rule midpoint",
                           {"order": 2, "prediction": "data", "fast": False}, {"eta": 1.0, "rule": "taylor"},
                           SEEDS),
    "dpmpp_fast": Preset("DPM-Solver++ fast",
                         "singlestep methods that cost exactly one evaluation an interval",
                         {"prediction": "data", "fast": True}, {"order": 3},
                         citation=f"{DPM_SOLVER}, section 3.4, in data prediction"),
    "dpm_fast": Preset("DPM-Solver-fast", "as published, for many steps: in few it is far behind dpmpp_fast",
                       {"fast": True}, {"order": 3, "prediction": "noise"},
                       citation=f"{DPM_SOLVER}, section 3.4"),
})
def singlestep(
    order: Annotated[int, Option(
        "Order of accuracy, and evaluations in each step; if fast, in the longest", 1, 3)] = 2,
    prediction: Prediction = "data",
    rule: SinglestepRule = "midpoint",
    fast: Annotated[bool, Option(
        "Let a step take as many intervals of the schedule as it makes evaluations, so that steps = "
        "evaluations, exactly: of order 3, 3, ... and the rest")] = False,
    c2: Annotated[float, Option(
        "Where in the step the second evaluation is made: 0.5 is the middle in lambda, 1 the end, as Heun "
        "does", 0.05, 1.0, 0.05, advanced=True, where=(("order", 2), ("fast", False)))] = 0.5,
    eta: Annotated[float, Option(
        "Share of noise: 1 is the diffusion SDE, 0 the ODE (no noise)", 0.0, 10.0, 0.01,
        where=OF_DATA)] = 0.0,
    s_noise: Annotated[float, replace(S_NOISE, where=OF_DATA, advanced=True)] = 1.0,
    noise_device: Annotated[str, replace(NOISE_DEVICE, where=OF_DATA)] = "cpu",
) -> Solver:
    """DPM-Solver and DPM-Solver++, singlestep: every step makes all its evaluations itself, 1, 2 or 3 of
    them. With data prediction also of the diffusion SDE: all stages of a step see one path of its noise."""
    if eta and prediction != "data":
        raise ValueError(f"eta = {eta:g} adds noise, and prediction = {prediction!r} has none: set "
                         "prediction to data, or eta to 0")
    integrand = DataPrediction(eta, s_noise) if eta else PREDICTIONS[prediction]
    if fast:
        return Grouped(integrand, order, rule)
    tableau = TABLEAUX[order, rule]
    return Singlestep(integrand, tableau._replace(c=(c2,)) if order == 2 else tableau)


SCORE_SDE = "Song et al. 2021, Score SDE (arXiv:2011.13456)"
OF_DPM = (("method", "dpm-solver"),)


@family("DPM-Solver Adaptive", f"{DPM_SOLVER}, appendix C; {SCORE_SDE}, section 4.3", {
    "dpm_adaptive_12": Preset("DPM-Solver-12 (adaptive)",
                              "the number of evaluations follows from a tolerance",
                              {"order": 2, "method": "dpm-solver"}, citation=f"{DPM_SOLVER}, appendix C"),
    "dpm_adaptive_23": Preset("DPM-Solver-23 (adaptive)",
                              "as dpm_adaptive_12, for tighter tolerances",
                              {"order": 3, "method": "dpm-solver"}, citation=f"{DPM_SOLVER}, appendix C"),
    "rk45": Preset("RK45 (adaptive)",
                   "reference images as in Score SDE: of order 5, for tolerances near 1e-5",
                   {"method": "rk45"}, {"rtol": 1e-3, "atol": 1e-3},
                   f"{SCORE_SDE}, section 4.3; Dormand & Prince 1980"),
})
def adaptive(
    order: Annotated[int, Option(
        "Order of the higher of the two methods, and evaluations in each trial step", 2, 3,
        where=OF_DPM)] = 3,
    prediction: Annotated[str, replace(PREDICTION, where=OF_DPM)] = "noise",
    rtol: Annotated[float, Option(
        "Relative tolerance of a step: smaller is more exact and slower", 1e-5, 1.0, 1e-3)] = 0.05,
    atol: Annotated[float, Option(
        "Absolute tolerance of a step, in units of a state of unit variance", 1e-6, 1.0, 1e-4)] = 0.0078,
    h_init: Annotated[float, Option("First step length in lambda", 1e-3, 2.0, 1e-2, advanced=True)] = 0.05,
    theta: Annotated[float, Option(
        "Safety factor on the next step's length", 0.1, 0.99, 0.01, advanced=True)] = 0.9,
    rule: Annotated[str, replace(SINGLESTEP_RULE, where=OF_DPM)] = "midpoint",
    method: Annotated[str, Option(
        "dpm-solver: DPM-Solver-12 or -23, of the order and rule above; rk45: Dormand and Prince's pair of "
        "orders 5 and 4, six evaluations a step, for tolerances near 1e-5",
        choices=("dpm-solver", "rk45"))] = "dpm-solver",
) -> Solver:
    """Steps of free length from the schedule's first to its last sigma, by an error tolerance instead of a
    step count.

    The sigmas in between only place the progress bar. A run to 0 is under control down to the model's lowest
    sigma, and goes on from there in one step. The worst image of a batch sets the step for all.
    """
    if method == "rk45":
        return RungeKutta(NoisePrediction(), DORMAND_PRINCE, rtol, atol, h_init, theta)
    return Adaptive(PREDICTIONS[prediction], TABLEAUX[order, rule], rtol, atol, h_init, theta)


SDE = f"{DPM_SOLVER_PP}, SDE-DPM-Solver++"
DDIM = "Song et al. 2021, DDIM (arXiv:2010.02502)"
DDPM = "Ho et al. 2020, DDPM (arXiv:2006.11239)"
ANALYTIC_DPM = "Bao et al. 2022, Analytic-DPM (arXiv:2201.06503)"
LAWS = {"sde": DataPrediction, "ddim": AncestralPrediction}
PUBLISHED = {"eta": 1.0, "corrector": "off"}
"""Of what is of first order, where the family's defaults have less noise and a corrector."""


@family("DPM-Solver++ SDE", f"{SDE}; {DDIM}", {
    "dpmpp_sde": Preset("SDE-DPM-Solver++(1)",
                        "stochastic, of first order: needs the most steps", {"order": 1, "law": "sde"},
                        PUBLISHED, SDE),
    "dpmpp_2m_sde": Preset("SDE-DPM-Solver++(2M)",
                           "stochastic: an image of its own for every seed and eta",
                           {"order": 2, "law": "sde"}, citation=SDE),
    "dpmpp_3m_sde": Preset("SDE-DPM-Solver++(3M)", "as dpmpp_2m_sde, of higher order",
                           {"order": 3, "law": "sde"}, {"rule": "published", "corrector": "off"}, SDE),
    "ddim": Preset("DDIM(eta)", "dpmpp_1m with a share of noise, as ComfyUI's euler_ancestral",
                   {"order": 1, "law": "ddim"}, {**PUBLISHED, "eta": 0.0}, DDIM),
    "ddpm": Preset("DDPM, ancestral",
                   "the first diffusion sampler, for hundreds of steps: dpmpp_sde at eta 1",
                   {"order": 1, "law": "ddim"}, PUBLISHED, DDPM),
})
def sde(
    order: Annotated[int, Option(ORDER_HELP, 1, 3)] = 2,
    eta: Annotated[float, Option(
        "Share of noise: 1 is the diffusion SDE, 0 the ODE (no noise). Around 0.4 was the best at 10 "
        "evaluations, and from 20 on all were level", 0.0, 10.0, 0.01)] = 0.4,
    s_noise: SNoise = 1.0,
    rule: MultistepRule = "midpoint",
    corrector: Corrector = "half",
    lower_order_final: LowerOrderFinal = "auto",
    law: Annotated[str, Option(
        "What eta is a share of. sde: of the SDE's noise in every stretch of lambda; ddim: of the ancestral "
        "noise of a step, at most 1, as in DDIM and ComfyUI's euler_ancestral, and at 0 and 1 as "
        "sde", choices=tuple(LAWS), advanced=True)] = "sde",
    noise_device: NoiseDevice = "cpu",
) -> Solver:
    """DPM-Solver++ multistep on the diffusion SDE: fresh noise in every step forgets earlier errors, given
    enough steps. DDIM and DDPM are of another law of its noise.

    The steps' noise of image k of a batch is that of seed + k, as in the WebUI: from the same start the image
    comes out alone as in the batch. ComfyUI's own samplers draw one noise for the whole batch.
    """
    return Multistep(LAWS[law](eta, s_noise), order, RULES[rule], lower_order_final, corrector=corrector,
                     corrector_rule=CORRECTING[rule])


@family("Analytic-DPM", ANALYTIC_DPM, {
    "analytic_dpm": Preset("Analytic-DPM",
                           "noise of the right size in long steps, once the model was measured", {}),
})
def analytic(
    statistics: StatisticsOption = None,
    eta: Annotated[float, Option("Share of the ancestral noise of a step: 1 is DDPM's, 0 none", 0.0, 10.0,
                                 0.01)] = 1.0,
    s_noise: SNoise = 1.0,
    half_range: Annotated[float, Option(
        "Half the range of the data, which bounds how far the denoised image may be off. 1 for pixels from "
        "-1 to 1, large for latents, whose range is not known", 0.0, 1000.0, 0.1,
        advanced=True)] = 1000.0,
    noise_device: NoiseDevice = "cpu",
) -> Solver:
    """DDIM of order 1, and noise for what the denoised image is off on average, which was measured once."""
    return Multistep(AnalyticPrediction(eta, s_noise, statistics, half_range), 1)


@family("Predictor-Corrector", f"{SCORE_SDE}, Algorithms 1-5", {
    "pc": Preset("Predictor-corrector",
                 "hundreds of evaluations, as its authors do: for fewer dpmpp_2m_sde", {}),
})
def pc(
    predictor: Annotated[str, Option(
        "The step of the reverse SDE to the next level. reverse diffusion: the forward step reversed; "
        "ancestral: as in DDPM; euler-maruyama: the plainest, which needs short steps",
        choices=tuple(PREDICTORS))] = "reverse diffusion",
    sde: Annotated[str, Option(
        "The SDE that is discretised, whatever the model was trained with: variance exploding, variance "
        "preserving or sub-VP. In short steps they are the same", choices=tuple(SDES))] = "ve",
    corrector_steps: Annotated[int, Option(
        "Langevin steps at every level, each of one more evaluation. 0: the predictor alone", 0, 10)] = 1,
    snr: Annotated[float, Option(
        "Signal-to-noise ratio of a Langevin step. Larger steps correct more, and leave a share snr^2 of "
        "the variance too much. As published about 0.16 for ve, 0.01 for vp", 0.0, 1.0, 0.01)] = 0.16,
    norms: Annotated[str, Option(
        "What a Langevin step's length is measured by. image: each image by itself, the same in any batch; "
        "batch: the means over the batch, as in the authors' code", choices=("image", "batch"),
        advanced=True)] = "image",
    noise_device: NoiseDevice = "cpu",
) -> Solver:
    """Score SDE: a predictor takes each step of the reverse SDE, and a Langevin corrector brings what it
    made nearer to the distribution at that level.

    Of first order in distribution, so for many steps.
    """
    return PredictorCorrector(predictor, sde, corrector_steps, snr, norms == "batch")


@family("DPM-Solver-v3", "Zheng et al. 2023, DPM-Solver-v3 (arXiv:2310.13268)", {
    "dpm_solver_v3": Preset("DPM-Solver-v3",
                            "guided sampling in few steps, once the model was measured; without guidance "
                            "dpm_2m", {}),
})
def v3(
    statistics: StatisticsOption = None,
    order: Annotated[int, Option(ORDER_HELP, 1, 3)] = 2,
    corrector: Annotated[str, Option(
        "Repeat each step with the evaluation at its end, at no further cost. half: only in the cleaner half "
        "of the way. full was better at low guidance (3), off at high "
        "(7)", choices=("off", "full", "half"))] = "off",
    pseudo_corrector: Annotated[bool, Option(
        "Use leading divided differences in the corrector, with one node more (pseudo order)",
        advanced=True)] = True,
    pseudo_predictor: Annotated[bool, Option(
        "Use leading divided differences in the predictor (pseudo order)", advanced=True)] = False,
    lower_order_final: LowerOrderFinal = "auto",
    quadrature: Annotated[str, Option(
        "fine: the coefficients as exact as the statistics; grid: trapezoidal on their grid, as the authors' "
        "code",
        choices=("fine", "grid"), advanced=True)] = "fine",
) -> Solver:
    """DPM-Solver-v3: what the model does on average is measured once and integrated exactly, so less is left
    to interpolate.

    The defaults, order 2 without corrector, were the best over guidance 3 and 7 in our measurements.
    """
    return Multistep(EmpiricalPrediction(statistics, fine=quadrature == "fine"), order,
                     lower_order_final=lower_order_final,
                     basis=pseudo_weights if pseudo_predictor else weights,
                     corrector=corrector, corrector_basis=pseudo_weights if pseudo_corrector else weights,
                     corrector_extra=int(pseudo_corrector))


@family("Fitted Multistep", "Lambda Solvers, on the integrand of Zheng et al. 2023 (arXiv:2310.13268)", {
    "fitted": Preset("Fitted multistep",
                     "few evaluations on a schedule you choose, once the model was measured",
                     {"choose_levels": False}),
    "fitted_chosen": Preset("Fitted multistep, levels chosen",
                            "few evaluations, once the model was measured, on levels chosen "
                            "for it: of a schedule only the range counts", {"choose_levels": True}),
})
def fitted(
    statistics: Annotated[Statistics, Option(
        "the model's statistics, measured for fitting: samplers.estimate_statistics(..., fitted=True)",
        stand_in=Unmeasured())] = None,
    choose_levels: Annotated[bool, Option(
        "Choose the noise levels for the measured model: of a schedule only the first and last level and the "
        "number of steps count. Off: the schedule as it is, and what was trained or tuned is not "
        "used")] = True,
) -> Solver:
    """DPM-Solver-v3 of order 2 with noise levels and weights that are fitted to trajectories of the model,
    measured once; or with what was trained or tuned for it."""
    return Fitted(statistics, choose_levels)


@family("iPNDM", "Zhang & Chen 2022, DEIS (arXiv:2204.13902), section 3.3; Liu et al. 2022, PNDM "
                 "(arXiv:2202.09778)", {
    "ipndm": Preset("iPNDM",
                    "few steps without any calibration: level with DPM-Solver-v3 in published tables", {}),
})
def ipndm(
    order: Annotated[int, Option(
        "Order of accuracy where steps are equal, and how many evaluations are combined", 1, 4)] = 4,
    corrector: Corrector = "off",
    lower_order_final: LowerOrderFinal = "auto",
) -> Solver:
    """Adams-Bashforth on the predicted noise with the coefficients of equal steps, whatever the steps.

    With lower_order_final off it is ComfyUI's ipndm.
    """
    return Multistep(NoisePrediction(), order, lower_order_final=lower_order_final, basis=adams,
                     corrector=corrector)


@family("Heun (EDM)", "Karras et al. 2022, EDM (arXiv:2206.00364), Algorithms 1-2", {
    "heun": Preset("Heun", "two evaluations a step: reference images, and many steps with churn", {}),
})
def heun(
    s_churn: Annotated[float, Option(
        "How much noise is added and removed again over the run; 0 is the ODE", 0.0, 100.0, 0.1)] = 0.0,
    s_tmin: Annotated[float, Option(
        "Lowest sigma / alpha at which noise is added", 0.0, 1000.0, 0.01, advanced=True)] = 0.0,
    s_tmax: Annotated[float, Option(
        "Highest sigma / alpha at which noise is added", 0.0, 1e6, 0.01, advanced=True)] = 1e6,
    s_noise: Annotated[float, Option(
        "Factor on the added noise; 1 is exact", 0.0, 10.0, 0.001, advanced=True)] = 1.0,
    noise_device: NoiseDevice = "cpu",
) -> Solver:
    """Heun's method in sigma, with churn if asked for: the EDM sampler."""
    return Churned(Singlestep(NoisePrediction(), HEUN), s_churn, s_tmin, s_tmax, s_noise)


AMED = "Zhou et al. 2024, AMED-Solver (arXiv:2312.00094)"


@family("AMED", AMED, {
    "amed": Preset("AMED-Solver",
                   "very few evaluations, once it was trained for the schedule", {"base": "amed"}),
    "amed_euler": Preset("AMED-Plugin on Euler", "as amed, on the simplest solver", {"base": "euler"}),
    "amed_dpm_2": Preset("AMED-Plugin on DPM-Solver-2",
                         "as amed, with both evaluations of a step combined", {"base": "dpm_2"}),
    "amed_ipndm": Preset("AMED-Plugin on iPNDM",
                         "as amed, with earlier evaluations reused", {"base": "ipndm"}),
    "amed_dpmpp_2m": Preset("AMED-Plugin on DPM-Solver++(2M)",
                            "as amed, on the steadiest solver", {"base": "dpmpp_2m"}),
    "amed_dpmpp_3m": Preset("AMED-Plugin on DPM-Solver++(3M)",
                            "as amed_dpmpp_2m, of higher order", {"base": "dpmpp_3m"}),
})
def amed(
    trained: Annotated[Amed, Option(
        "what was learned for the schedule: samplers.fit_amed(...), or Amed.load(path)",
        stand_in=Amed.untrained())] = None,
    base: Annotated[str, Option(
        "The rule that steps to the learned node and on: AMED's own, or another solver's. dpmpp_2m was the "
        "best in our measurements",
                                choices=tuple(BASES))] = "dpmpp_2m",
    interpolate: Annotated[bool, Option(
        "Allow another schedule than the trained one: r, c and a are then taken as functions of lambda",
        advanced=True)] = False,
    lower_order_final: LowerOrderFinal = "auto",
) -> Solver:
    """AMED: two evaluations a step, the second at a place that was learned for your model, guidance and
    schedule."""
    if trained.base not in (None, base):
        raise ValueError(f"this AMED was trained on base {trained.base}, and {base} is chosen: choose "
                         f"{trained.base}, or train one on {base}")
    method = BASES[base]
    if isinstance(method, Multistep) and method.basis is weights:
        method = replace(method, lower_order_final=lower_order_final)
    return Insertion(replace(trained, interpolate=interpolate or trained.interpolate), method)
