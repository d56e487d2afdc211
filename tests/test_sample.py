"""How a run behaves: counts, callbacks, devices, precisions, memory, and what it says when something is
wrong."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from measure import Trace
from problems import (ADAPTIVE, FIXED, ODE, Gaussian, Mixture, needed, ode, reference_mixture,
                      starting_noise)
from samplers import (
    FAMILIES, PATHS, SAMPLERS, Amed, Statistics, estimate_statistics, fit_amed, k_diffusion_sampler, nfe,
    refit_multistep)
from samplers.integrand import DataPrediction
from samplers.sample import sample
from samplers.schedule import levels
from samplers.solver import DPM_2S_TAYLOR, Multistep, Singlestep
from samplers.learning.statistics import EmpiricalPrediction

EVERY = list(SAMPLERS)
SCHEDULES = {
    "to zero": ("ve", [14.6, 6.0, 2.0, 0.8, 0.3, 0.03, 0.0]),
    "one step": ("ve", [14.6, 0.0]),
    "img2img": ("ve", [2.0, 0.9, 0.4, 0.1, 0.0]),
    "leftover noise": ("ve", [14.6, 6.0, 2.0, 0.8]),
    "flow": ("flow", [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]),
    "flow in one step": ("flow", [1.0, 0.0]),
    "flow img2img": ("flow", [0.6, 0.5, 0.3, 0.1, 0.0]),
    "flow, first part": ("flow", [1.0, 0.9, 0.7, 0.5]),
    "no step": ("ve", [5.0]),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class Counting:
    def __init__(self, path: str) -> None:
        self.problem, self.sigmas = Gaussian(path), []

    def __call__(self, x, sigma, **extra):
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype and sigma.device == x.device
        self.sigmas.append(float(sigma[0]))
        return self.problem(x, sigma)


def run(name: str, schedule, x=None, model=None, **how):
    path, sigmas = schedule
    x = starting_noise((2, 3, 4, 4), sigmas[0], path, dtype=torch.float32) if x is None else x
    how = {"extra_args": {"seed": 1}, "disable": True, **how}
    return k_diffusion_sampler(name, path, **needed(name))(model or Gaussian(path), x, torch.tensor(sigmas),
                                                           **how)


@EVERY_SCHEDULE
@pytest.mark.parametrize("name", EVERY)
def test_every_solver_lands_on_the_data_and_the_callback_sees_every_interval_once(name: str,
                                                                                  schedule) -> None:
    """In k-diffusion's form."""
    path, sigmas = schedule
    model, seen = Counting(path), []
    result = run(name, schedule, model=model, callback=seen.append)
    assert result.isfinite().all()
    if sigmas[-1] == 0.0 and len(sigmas) > 2:
        assert abs(float(result.mean()) - 0.7) < 0.3 and result.std() < 1.0
    planned = nfe(name, sigmas, path)
    assert planned is None or planned == len(model.sigmas)
    assert all(max(sigmas[-1] - 1e-6, 1e-3) < sigma <= sigmas[0] + 1e-6 for sigma in model.sigmas)

    assert all(set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"} for info in seen)
    indexes = [info["i"] for info in seen]
    if name in FIXED:
        assert indexes == list(range(len(sigmas) - 1))
        if not SAMPLERS[name].fixed.get("choose_levels"):  # of a schedule it keeps the range only
            torch.testing.assert_close(torch.tensor([float(info["sigma"]) for info in seen]),
                                       torch.tensor(sigmas[:-1]))
    else:
        assert indexes == sorted(indexes) and set(indexes) <= set(range(len(sigmas) - 1))
    for info in seen:
        assert info["x"].shape == info["denoised"].shape == (2, 3, 4, 4)
        assert info["sigma"].shape == () and float(info["sigma"]) == float(info["sigma_hat"])


@pytest.mark.parametrize("name", EVERY)
def test_nfe_of_a_step_count_is_that_of_a_schedule_to_zero(name: str) -> None:
    assert nfe(name, 6) == nfe(name, SCHEDULES["to zero"][1])
    assert nfe(name, 0) in (0, None)
    if SAMPLERS[name].evaluations_per_step is not None:
        assert nfe(name, 6) == SAMPLERS[name].evaluations_per_step * 5 + 1


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("name", FIXED)
def test_nfe_is_what_a_run_costs_by_a_step_count_and_by_sigmas(name: str, path: str) -> None:
    """A flow begins at sigma = 1, and its first interval costs one evaluation whatever the solver."""
    for n in (1, 2, 3, 5, 8):
        sigmas = [(1.0 if path == "flow" else 14.6) * (1 - k / n) for k in range(n + 1)]
        model = Counting(path)
        run(name, (path, sigmas), model=model)
        for steps in (n, sigmas, torch.tensor(sigmas)):
            assert nfe(name, steps, path) == len(model.sigmas), steps


def test_nfe_of_a_step_count_needs_no_statistics_that_cover_it() -> None:
    few = Statistics.constant(lam=(-1.0, 1.0))
    assert nfe("dpm_solver_v3", 40, "flow", statistics=few) == 40
    assert nfe("dpm_solver_v3", np.int64(40), statistics=few) == 40
    with pytest.raises(ValueError, match="statistics cover lambda"):
        nfe("dpm_solver_v3", [14.6, 1.0, 0.0], statistics=few)
    with pytest.raises(ValueError, match="statistics = 3: give the model's statistics"):
        nfe("dpm_solver_v3", 5, statistics=3)


@pytest.mark.parametrize("name", EVERY)
def test_the_bar_counts_intervals_and_is_silent_when_disabled(name: str, capsys) -> None:
    run(name, SCHEDULES["to zero"], disable=False)
    assert "6/6" in capsys.readouterr().err
    run(name, SCHEDULES["to zero"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("name", FIXED)
def test_a_run_needs_no_number_from_the_device(name: str, path: str) -> None:
    """On the meta device there are no numbers: any wait for one would raise."""
    schedule = SCHEDULES["to zero" if path == "ve" else "flow"]
    x = torch.empty(2, 4, 8, 8, device="meta")
    result = run(name, schedule, x, model=lambda x, sigma, **extra: x * 0.5, callback=lambda info: None)
    assert result.is_meta and result.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_the_result_has_the_input_s_precision_and_the_input_is_left_alone(name: str, dtype) -> None:
    path, sigmas = SCHEDULES["to zero"]
    x = starting_noise((2, 3, 4, 4), sigmas[0], path, dtype=dtype)
    before, given = x.clone(), torch.tensor(sigmas)
    problem, seen = Gaussian(path), set()

    def model(x, sigma, **extra):
        seen.add((x.dtype, sigma.dtype))
        x.requires_grad  # noqa: B018
        return problem(x, sigma)

    result = k_diffusion_sampler(name, **needed(name))(model, x, given, extra_args={"seed": 1}, disable=True)
    assert result.dtype == dtype and seen == {(dtype, dtype)}
    assert torch.equal(x, before) and torch.equal(given, torch.tensor(sigmas))
    exact = k_diffusion_sampler(name, **needed(name))(problem, before.double(), given.double(),
                                                      extra_args={"seed": 1}, disable=True)
    if name in FIXED:
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float32: 1e-4,
                     torch.float64: 1e-12}[dtype]
        assert (result.double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(2, 7), (1, 1, 300), (2, 3, 8, 8), (1, 4, 3, 6, 6)],
                         ids=["vector", "packed", "image", "video"])
@pytest.mark.parametrize("name", EVERY)
def test_latents_of_any_shape_are_sampled_alike(name: str, shape: tuple[int, ...]) -> None:
    flow = starting_noise(shape, 1.0, "flow", dtype=torch.float32)
    assert run(name, SCHEDULES["flow"], flow).shape == shape
    assert run(name, SCHEDULES["to zero"], flow * 14.6).isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_what_the_model_returned_is_not_written_to(name: str) -> None:
    kept = []

    def model(x, sigma, **extra):
        denoised = Gaussian("ve")(x, sigma)
        kept.append((x, x.clone(), denoised, denoised.clone()))
        return denoised

    run(name, SCHEDULES["to zero"], model=model)
    assert all(torch.equal(x, x_then) and torch.equal(d, d_then) for x, x_then, d, d_then in kept)


class Learned(torch.nn.Module):
    """A denoiser with a parameter, as every trained one has."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, **extra) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return self.gain * Gaussian()(x, sigma)


@pytest.mark.parametrize("name", EVERY)
def test_no_graph_is_kept_of_a_model_with_parameters(name: str) -> None:
    assert not run(name, SCHEDULES["to zero"], model=Learned()).requires_grad


def test_a_model_with_parameters_is_measured_and_learned_from() -> None:
    x, sigmas = starting_noise((4, 3, 4, 4), 14.6, "ve"), torch.tensor([14.6, 3.0, 0.5, 0.05],
                                                                       dtype=torch.float64)
    measured = estimate_statistics(Learned(), x, sigmas, fitted=True)
    refit_multistep(Learned(), x, measured, 4)
    fit_amed(Learned(), x, sigmas)


@pytest.mark.parametrize("name", EVERY)
def test_one_sampler_object_serves_many_runs(name: str) -> None:
    fn = k_diffusion_sampler(name, **needed(name))
    sigmas = torch.tensor(SCHEDULES["to zero"][1])
    x = starting_noise((1, 3, 4, 4), 14.6, "ve", dtype=torch.float32)
    first = fn(Gaussian(), x, sigmas, extra_args={"seed": 3}, disable=True)
    with pytest.raises(RuntimeError, match="cancelled"):
        def cancelled(x, sigma, **extra):
            if sigma[0] < 1:
                raise RuntimeError("cancelled")
            return Gaussian()(x, sigma)
        fn(cancelled, x, sigmas, extra_args={"seed": 3}, disable=True)
    assert torch.equal(fn(Gaussian(), x, sigmas, extra_args={"seed": 3}, disable=True), first)


def values(name: str) -> int:
    """How many evaluations an update combines at most."""
    settings = SAMPLERS[name].settings(needed(name))
    if name.startswith("fitted"):
        return 3  # one more than v3 of order 2
    bases = {"amed": 2, "euler": 1, "dpm_2": 2, "ipndm": 4, "dpmpp_2m": 2, "dpmpp_3m": 3}
    return settings.get("order") or bases.get(settings.get("base"), 2)


@pytest.mark.parametrize("name", FIXED)
def test_the_peak_is_order_plus_two_latents(name: str) -> None:
    x = torch.empty(1, 4, 8, 8, device="meta")

    def model(x, sigma, **extra):
        return torch.empty_like(x)

    with Trace(x.numel(), "meta") as memory:
        run(name, ("ve", [float(s) for s in range(20, -1, -1)]), x, model=model, callback=lambda info: None)
    settings = SAMPLERS[name].settings(needed(name))
    latents = values(name) + 2 + ("fast" in settings and bool(settings.get("eta")))
    if {"trained", "s_churn", "snr"} & {*settings}:
        latents += 1  # where the step began, and all its evaluations
    if settings.get("corrector", "off") != "off":
        latents += 2  # where the step began, and one node more
    assert memory.peak <= latents * x.numel() * x.element_size()


@pytest.mark.parametrize("solver", [
    Multistep(DataPrediction(), 2, corrector="full"), Multistep(DataPrediction(1.0), 2, corrector="full"),
    Multistep(EmpiricalPrediction(Statistics.constant()), 3, corrector="full"),
    Singlestep(DataPrediction(1.0), DPM_2S_TAYLOR)],
    ids=["ODE corrected", "SDE corrected", "v3 corrected", "SDE singlestep"])
def test_a_corrector_and_a_noisy_inner_stage_take_one_latent_more(solver) -> None:
    """The corrector one node, but neither where the step began nor its noise; the stage its noise."""
    x, path = torch.empty(1, 4, 8, 8, device="meta"), PATHS["ve"]
    steps = solver.steps([path.level(float(sigma)) for sigma in range(20, -1, -1)], path)
    with Trace(x.numel(), "meta") as memory:
        sample(lambda x, sigma: torch.empty_like(x), x, steps, noise=lambda s, t: torch.empty_like(x))
    assert memory.peak <= (getattr(solver, "order", 2) + 3) * x.numel() * x.element_size()


@pytest.mark.parametrize("name", FIXED)
def test_an_update_passes_over_the_latents_once_for_each_tensor_that_enters_it(name: str) -> None:
    """One more for the sum that shows NaN after the run, two for the noise prediction, one for fresh
    noise."""
    x = torch.empty(1, 4, 8, 8, device="meta")
    token = torch.empty(1, 4, 8, 8, device="meta")
    order, steps = values(name), 20
    with Trace(x.numel(), "meta") as seen:
        run(name, ("ve", [float(s) for s in range(steps, -1, -1)]), x, model=lambda x, sigma, **extra: token)
    stochastic = bool(SAMPLERS[name].settings(needed(name)).get("eta"))
    noise_prediction = SAMPLERS[name].settings(needed(name)).get("prediction", "noise") == "noise"
    corrected = (order + 3) * ("corrector" in SAMPLERS[name].options) + ("statistics"
                                                                         in SAMPLERS[name].options)
    langevin = 4 * ("snr" in SAMPLERS[name].options)  # two norms, and what enters by a tensor of sizes
    passes = (order + 1) + 1 + 2 * noise_prediction + stochastic + corrected + langevin
    # + 1: sigma's new_full is made from x, without reading it
    assert seen.operations <= (passes + 1) * nfe(name, steps) + 2


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_from_the_model_is_reported_with_step_and_sigma(name: str, bad: float) -> None:
    def model(x, sigma, **extra):
        return Gaussian()(x, sigma) + (bad if sigma[0] < 1 else 0)

    with pytest.raises(FloatingPointError,
                       match=r"NaN or infinite values|error estimate.*(nan|inf)") as caught:
        run(name, SCHEDULES["to zero"], model=model)
    assert "sigma = 0." in str(caught.value)
    if name in ("dpmpp_2m", "dpmpp_2m_sde"):
        assert "step 4 of 6, at sigma = 0.8" in str(caught.value)


def test_a_fault_at_the_end_of_a_run_is_one_of_its_last_step() -> None:
    """Heun's second evaluation of a step is where the step arrives."""
    def model(x, sigma, **extra):
        return Gaussian()(x, sigma) + (math.nan if sigma[0] < 0.6 else 0)

    with pytest.raises(FloatingPointError, match="in step 4 of 4, at sigma = 0.5"):
        run("heun", ("ve", torch.tensor([14.0, 7.0, 3.0, 1.0, 0.5])), model=model)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: k_diffusion_sampler("dpmpp_4m"), "unknown sampler 'dpmpp_4m': choose one of dpmpp_1m, dpmpp_2m"),
    (lambda: nfe("euler", 5), "unknown sampler 'euler': choose one of"),
    (lambda: k_diffusion_sampler("dpmpp_2m", "edm"), "unknown path 'edm': choose one of ve, flow"),
    (lambda: k_diffusion_sampler("dpmpp_2m", order=3),
     "order is not an option of dpmpp_2m, which stands for order = 2"),
    (lambda: k_diffusion_sampler("dpmpp_2m", eta=1.0),
     "dpmpp_2m has no option 'eta': choose from rule, corrector, lower_order_final"),
    (lambda: k_diffusion_sampler("dpmpp_2m", rule="heun"),
     "rule = 'heun' is out of range: choose one of midpoint, taylor"),
    (lambda: k_diffusion_sampler("dpmpp_2m_sde", eta=-0.1),
     "eta = -0.1 is out of range: choose a number from 0 to 10"),
    (lambda: k_diffusion_sampler("dpmpp_2m_sde", eta=math.nan), "eta = nan is out of range"),
    (lambda: k_diffusion_sampler("dpmpp_2m_sde", s_noise="1"), "s_noise = '1' is out of range"),
    (lambda: k_diffusion_sampler("dpm_adaptive_23", rtol=0.0),
     "rtol = 0.0 is out of range: choose a number from 1e-05"),
    (lambda: nfe("dpmpp_2m", -1), "steps = -1 is out of range"),
    (lambda: nfe("dpmpp_2m", 5.0), "steps = 5.0: give a whole number of intervals, or the sigmas"),
    (lambda: nfe("dpmpp_2m", torch.tensor(5.0)), "sigmas has shape []: give one list of noise levels"),
    (lambda: nfe("dpm_adaptive_23", 5, "edm"), "unknown path 'edm': choose one of ve, flow"),
    (lambda: k_diffusion_sampler("dpmpp_2m_sde", eta=np.float32(10.5)),
     "eta = 10.5 is out of range: choose a number"),
    (lambda: k_diffusion_sampler("dpmpp_2m_sde", eta=np.float64("nan")), "eta = nan is out of range"),
    (lambda: FAMILIES["multistep"].solver(order=np.int64(7)),
     "order = 7 is out of range: choose a whole number"),
    (lambda: FAMILIES["multistep"].solver(order=np.float32(2.0)),
     "order = 2.0 is out of range: choose a whole"),
    (lambda: FAMILIES["multistep"].solver(order=np.bool_(True)),
     "order = True is out of range: choose a whole"),
    (lambda: FAMILIES["v3"].settings({"statistics": Statistics.constant(), "pseudo_corrector": np.int64(1)}),
     "pseudo_corrector = 1 is out of range: choose true or false"),
])
def test_a_bad_call_is_refused_with_value_range_and_remedy(call, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


def test_numpy_s_numbers_are_the_numbers_they_are() -> None:
    for family, given, plain in (
            ("sde", {"order": np.int64(3), "eta": np.float32(0.5), "s_noise": np.int32(1)},
             {"order": 3, "eta": 0.5, "s_noise": 1}),
            ("adaptive", {"order": np.uint8(2), "rtol": np.float64(0.01)}, {"order": 2, "rtol": 0.01}),
            ("amed", {"trained": Amed.untrained(), "interpolate": np.bool_(True)}, {"interpolate": True})):
        settings = FAMILIES[family].settings(given)
        assert {name: settings[name] for name in plain} == plain
        assert all(type(settings[name]) is type(plain[name]) for name in plain)
    x = starting_noise((1, 3, 4, 4), 14.6, "ve", dtype=torch.float32)
    results = [
        k_diffusion_sampler("dpmpp_2m_sde", eta=eta)(Gaussian(), x, [14.6, 2.0, 0.0], {"seed": 1},
                                                     disable=True)
        for eta in (0.5, np.float32(0.5), np.float16(0.5))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("order", [0, 4, 2.5, True, "2"])
def test_an_order_out_of_range_is_refused(order) -> None:
    with pytest.raises(ValueError, match=r"order = .* is out of range: choose a whole number from 1 to 3"):
        FAMILIES["multistep"].solver(order=order)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("sigmas", "message"), [([], "empty"), ([3.0, math.nan], "nan"),
                                                 ([3.0, -1.0], "negative"), ([1.0, 2.0], "sort"),
                                                 ([2.0, 2.0, 0.0], "repeat")])
def test_bad_sigmas_are_refused_before_the_model_is_called(name: str, sigmas, message: str) -> None:
    def never(x, sigma, **extra):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=message):
        run(name, ("ve", sigmas), torch.zeros(1, 1), model=never)


@pytest.mark.parametrize("sigmas", [
    torch.tensor(14.6), torch.tensor([[14.6, 1.0, 0.0], [14.6, 1.0, 0.0]]), np.float64(14.6), 14.6,
    [[14.6, 1.0, 0.0]]], ids=["0-d", "2-d", "numpy", "a number", "a list of lists"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_adaptive_23", "fitted_chosen", "amed"])
def test_sigmas_that_are_no_list_are_refused_before_the_model_is_called(name: str, sigmas) -> None:
    with pytest.raises(ValueError,
                       match=r"sigmas has shape \[.*\]: give one list .* shape \[n \+ 1\] for n steps"):
        k_diffusion_sampler(name, **needed(name))(None, torch.zeros(1, 1), sigmas, disable=True)


def test_sigmas_may_be_a_list_or_an_array_and_are_taken_as_they_are() -> None:
    x = starting_noise((1, 3, 4, 4), 14.6, "ve")
    seen = []
    plain = [14.6, 1.1, 0.0]
    for sigmas in (plain, tuple(plain), np.array(plain), torch.tensor(plain, dtype=torch.float64)):
        model = Counting("ve")
        seen.append((k_diffusion_sampler("dpmpp_2m")(model, x, sigmas, disable=True), model.sigmas))
    assert all(torch.equal(result, seen[0][0]) and calls == [14.6, 1.1] for result, calls in seen)


def test_an_answer_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"returned shape \[2, 3\].*x of shape \[2, 3, 4, 4\]"):
        run("dpmpp_2m", SCHEDULES["to zero"], model=lambda x, sigma, **extra: x.mean((2, 3)))


def test_the_final_steps_fall_in_order_only_when_asked_or_few() -> None:
    def orders(n: int, end: float, **options) -> list[int]:
        sigmas = [20.0 * (1 - i / n) + end * i / n for i in range(n + 1)]
        return [
            len(step.updates[-1].terms)
            for step in SAMPLERS["dpmpp_3m"].solver(**options).steps(levels(sigmas, PATHS["ve"]), PATHS["ve"])
        ]

    assert orders(6, 0.0) == [1, 2, 3, 3, 2, 1]
    assert orders(6, 0.5) == [1, 2, 3, 3, 3, 3]            # goes on elsewhere: nothing ends here
    assert orders(6, 0.03) == [1, 2, 3, 3, 2, 1]           # the lowest sigma of a model is an end
    assert orders(6, 0.5, lower_order_final="on") == [1, 2, 3, 3, 2, 1]
    assert orders(6, 0.0, lower_order_final="on") == [1, 2, 3, 2, 1, 1]  # of the steps of finite length
    assert orders(15, 0.0)[-3:] == [3, 3, 1]
    assert orders(6, 0.0, lower_order_final="off") == [1, 2, 3, 3, 3, 1]


def test_the_last_step_above_zero_is_of_first_order_where_it_is_long() -> None:
    def orders(*sigmas: float) -> list[int]:
        return [len(step.updates[-1].terms)
                for step in SAMPLERS["dpmpp_3m"].solver().steps(levels(sigmas, PATHS["ve"]), PATHS["ve"])]

    assert orders(14.6, 7.0, 3.0, 1.2, 0.3, 0.0) == [1, 2, 3, 2, 1]        # log(1.2 / 0.3) = 1.4
    assert orders(14.6, 7.0, 3.0, 1.2, 0.2, 0.0) == [1, 2, 2, 1, 1]        # log(1.2 / 0.2) = 1.8
    assert orders(14.6, 7.0, 3.0, 1.2, 0.1) == [1, 2, 2, 1]                # without a step to 0 too
    assert orders(14.6, 0.1, 0.0) == [1, 1] and orders(14.6, 0.0) == [1]
    # not in a run of 15 steps or more
    assert orders(*(14.6 * 0.9**k for k in range(15)), 0.03, 0.0)[-2:] == [3, 1]


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "dpm_2m", "dpm_3m", "ipndm"])
def test_lowering_the_order_on_a_long_last_step_pays_in_few_steps(name: str) -> None:
    """On a mixture, with levels even in time as ComfyUI's scheduler `normal` makes them: 0.35 -> 0.03, and
    then to 0."""
    sigmas = [14.615, 3.686, 1.162, 0.348, 0.0292, 0.0]
    generator = torch.Generator().manual_seed(3)
    model = Mixture(torch.randn((40, 12), generator=generator, dtype=torch.float64),
                    torch.full((40, ), 0.05, dtype=torch.float64),
                    torch.full((40, ), 1 / 40, dtype=torch.float64))
    x = sigmas[0] * torch.randn((256, 3, 2, 2), generator=generator, dtype=torch.float64)

    def run_of(name: str, sigmas: list[float], how: str) -> torch.Tensor:
        return k_diffusion_sampler(name, lower_order_final=how)(model, x,
                                                                torch.tensor(sigmas, dtype=torch.float64),
                                                                disable=True)

    fine = [sigmas[0] * (sigmas[-2] / sigmas[0]) ** (k / 200) for k in range(201)]
    end = run_of("dpmpp_2m", [*fine, 0.0], "off")
    error = {how: float((run_of(name, sigmas, how) - end).square().mean().sqrt()) for how in ("auto", "off")}
    assert error["auto"] < 0.8 * error["off"]


@pytest.mark.parametrize(("n", "end", "groups"), [(9, 0.0, [3, 3, 2, 1]), (10, 0.0, [3, 3, 3, 1]),
                                                  (8, 0.0, [3, 3, 1, 1]), (9, 0.5, [3, 3, 2, 1]),
                                                  (8, 0.5, [3, 3, 2]), (3, 0.0, [2, 1]), (2, 0.0, [1, 1]),
                                                  (1, 0.0, [1])])
def test_fast_spends_exactly_one_evaluation_an_interval(n: int, end: float, groups: list[int]) -> None:
    sigmas = [20.0 * (1 - i / n) + end * i / n for i in range(n + 1)]
    steps = SAMPLERS["dpm_fast"].solver().steps(levels(sigmas, PATHS["ve"]), PATHS["ve"])
    assert [step.intervals for step in steps] == groups and sum(len(step.evaluations) for step in steps) == n


def test_the_mixture_of_the_reference_is_solved_by_every_solver() -> None:
    denoiser, x = reference_mixture("ve")
    sigmas = torch.tensor([80.0 * (0.01 / 80.0) ** (i / 60) for i in range(61)], dtype=torch.float64)
    exact = k_diffusion_sampler("dpmpp_3s")(denoiser, x * 80,
                                            torch.cat([
                                                torch.tensor([80.0 * (0.01 / 80.0)**(i / 2000)],
                                                             dtype=torch.float64) for i in range(2001)
                                            ]), disable=True)
    for name in (*ODE, *ADAPTIVE):
        result = k_diffusion_sampler(name, **ode(name))(denoiser, x * 80, sigmas, disable=True)
        assert (result - exact).square().mean().sqrt() < 0.1, name
