"""Agreement with k-diffusion's and ComfyUI's own functions where the definitions agree, and where they do
not."""
from __future__ import annotations

import pytest
import torch

from comfy_host import Model, comfy_sampling, k_diffusion_sampling, sampling_of
from problems import reference_mixture
from samplers import PATHS, k_diffusion_sampler
from samplers.integrand import DataPrediction
from samplers.noise import BrownianNoise
from samplers.sample import sample
from samplers.schedule import levels
from samplers.solver import DPM_2S, DPM_3S, Multistep, Singlestep

KARRAS = [14.6146, 9.0, 5.1, 2.7, 1.4, 0.65, 0.28, 0.1, 0.0292, 0.0]
FLOW = [0.97, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05, 0.0]
BOTH = pytest.mark.parametrize("functions", [comfy_sampling, k_diffusion_sampling],
                               ids=["ComfyUI", "k-diffusion"])


def problem(path: str, sigmas: list[float], dtype=torch.float64):
    denoiser, x = reference_mixture(path)
    model = Model(denoiser, sampling_of("EPS" if path == "ve" else "CONST"))
    sigmas = torch.tensor(sigmas, dtype=dtype)
    return model, (x * sigmas[0] if path == "ve" else x).to(dtype), sigmas


def noise_of(x, path: str, seed: int):
    noise = BrownianNoise(x, seed)
    return lambda s, t: noise(PATHS[path].level(float(s)), PATHS[path].level(float(t)))


@BOTH
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_2m_is_theirs(functions, steps: int) -> None:
    model, x, sigmas = problem("ve", KARRAS[-steps - 1:])
    torch.testing.assert_close(
        k_diffusion_sampler("dpmpp_2m", lower_order_final="off")(model, x, sigmas, disable=True),
        functions().sample_dpmpp_2m(model, x, sigmas, disable=True), rtol=0, atol=1e-12)


@BOTH
def test_2m_in_float32_is_theirs_to_float_precision(functions) -> None:
    model, x, sigmas = problem("ve", KARRAS)
    exact = functions().sample_dpmpp_2m(model, x, sigmas, disable=True)
    x, sigmas = x.float(), sigmas.float()
    model.denoiser.means, model.denoiser.stds, model.denoiser.weights = (
        v.float() for v in (model.denoiser.means, model.denoiser.stds, model.denoiser.weights))
    theirs = functions().sample_dpmpp_2m(model, x, sigmas, disable=True)
    ours = k_diffusion_sampler("dpmpp_2m", lower_order_final="off")(model, x, sigmas, disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@BOTH
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rule", "solver_type"), [("midpoint", "midpoint"), ("taylor", "heun")])
def test_2m_sde_is_theirs(functions, eta: float, rule: str, solver_type: str) -> None:
    model, x, sigmas = problem("ve", KARRAS)
    theirs = functions().sample_dpmpp_2m_sde(model, x, sigmas, disable=True, eta=eta, s_noise=0.9,
                                             solver_type=solver_type, noise_sampler=noise_of(x, "ve", 5))
    options = {"eta": eta, "s_noise": 0.9, "rule": rule, "corrector": "off", "lower_order_final": "off"}
    ours = k_diffusion_sampler("dpmpp_2m_sde", **options)(model, x, sigmas, extra_args={"seed": 5},
                                                          disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_3m_sde_is_theirs(functions, eta: float) -> None:
    model, x, sigmas = problem("ve", KARRAS)
    theirs = functions().sample_dpmpp_3m_sde(model, x, sigmas, disable=True, eta=eta,
                                             noise_sampler=noise_of(x, "ve", 5))
    ours = k_diffusion_sampler("dpmpp_3m_sde", eta=eta, lower_order_final="off")(
        model, x, sigmas, extra_args={"seed": 5}, disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_their_euler_ancestral(functions, eta: float) -> None:
    model, x, sigmas = problem("ve", KARRAS)
    theirs = functions().sample_euler_ancestral(model, x, sigmas, disable=True, eta=eta, s_noise=0.9,
                                                noise_sampler=noise_of(x, "ve", 5))
    ours = k_diffusion_sampler("ddim", eta=eta, s_noise=0.9)(model, x, sigmas, extra_args={"seed": 5},
                                                             disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_sde_with_a_corrector_is_sa_solver(order: int, tau: float, path: str) -> None:
    """At every level, before its correction; theirs returns the last but one if the last is not 0."""
    model, x, sigmas = problem(path, (KARRAS if path == "ve" else FLOW)[:-1])
    theirs, ours = [], []
    comfy_sampling().sample_sa_solver(
        model, x, sigmas, disable=True, tau_func=lambda sigma: tau, s_noise=0.9, predictor_order=order,
        corrector_order=order + 1, noise_sampler=noise_of(x, path, 5),
        callback=lambda info: theirs.append(info["x"]))
    solver = Multistep(DataPrediction(tau**2, 0.9), order, lower_order_final="off", corrector="full")
    sampled(solver, path, model, x, sigmas, observe=lambda i, sigma, x, denoised: ours.append(x))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("stages", "tableau"), [(2, DPM_2S), (3, DPM_3S)])
def test_a_singlestep_method_of_the_sde_is_seeds(stages: int, tableau, eta: float, path: str) -> None:
    model, x, sigmas = problem(path, KARRAS if path == "ve" else FLOW)
    seeds = getattr(comfy_sampling(), f"sample_seeds_{stages}")
    theirs = seeds(model, x, sigmas, disable=True, eta=eta, s_noise=0.9, noise_sampler=noise_of(x, path, 5))
    ours = Singlestep(DataPrediction(eta, 0.9), tableau)
    torch.testing.assert_close(sampled(ours, path, model, x, sigmas), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("c2", [0.3, 0.9])
def test_the_singlestep_family_is_seeds_2_with_any_c2(c2: float, path: str) -> None:
    model, x, sigmas = problem(path, KARRAS if path == "ve" else FLOW)
    for eta in (0.0, 1.0):
        theirs = comfy_sampling().sample_seeds_2(model, x, sigmas, disable=True, eta=eta, s_noise=0.9, r=c2,
                                                 noise_sampler=noise_of(x, path, 5))
        ours = k_diffusion_sampler("dpmpp_2s_sde", path, rule="midpoint", c2=c2, eta=eta, s_noise=0.9)(
            model, x, sigmas, extra_args={"seed": 5}, disable=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def sampled(solver, path: str, model, x, sigmas, **how):
    """A solver that is not in the catalogue, with the noise of seed 5."""
    steps = solver.steps(levels(sigmas.tolist(), PATHS[path]), PATHS[path])
    noise = BrownianNoise(x, 5)
    return sample(lambda x, sigma: model(x, x.new_full((len(x),), sigma)), x, steps, noise=noise, **how)


@BOTH
def test_2s_is_theirs_without_ancestral_noise(functions) -> None:
    model, x, sigmas = problem("ve", KARRAS)
    theirs = functions().sample_dpmpp_2s_ancestral(model, x, sigmas, disable=True, eta=0.0)
    torch.testing.assert_close(
        k_diffusion_sampler("dpmpp_2s")(model, x, sigmas, disable=True), theirs, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("n", [7, 8, 9, 10])
def test_fast_is_theirs_on_the_levels_they_use(functions, n: int) -> None:
    """Their groups are of equal length in lambda, their inner levels at thirds and halves, their times in
    float32."""
    model, x, _ = problem("ve", KARRAS)
    whole, rest = divmod(n, 3)
    orders = [3] * (whole - 1) + [2, 1] if rest == 0 else [3] * whole + [rest]
    outer = [-2.5 + 6.0 * i / len(orders) for i in range(len(orders) + 1)]
    fine = [a + (b - a) * j / order for a, b, order in zip(outer, outer[1:], orders)
            for j in range(order)] + outer[-1:]
    sigmas = torch.tensor([PATHS["ve"].at(lam).sigma for lam in fine], dtype=torch.float64)
    x = x / KARRAS[0] * sigmas[0]
    theirs = functions().sample_dpm_fast(model, x, sigmas[-1], sigmas[0], n, disable=True)
    torch.testing.assert_close(
        k_diffusion_sampler("dpm_fast")(model, x, sigmas, disable=True), theirs, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("ours", "theirs"), [
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde"), ("dpmpp_3m_sde", "sample_dpmpp_3m_sde")])
def test_on_flow_models_the_sde_solvers_are_comfyui_s(ours: str, theirs: str) -> None:
    model, x, sigmas = problem("flow", FLOW)
    expected = getattr(comfy_sampling(), theirs)(model, x, sigmas, disable=True,
                                                 noise_sampler=noise_of(x, "flow", 5))
    result = k_diffusion_sampler(ours, "flow", eta=1.0, corrector="off", lower_order_final="off")(
        model, x, sigmas, extra_args={"seed": 5}, disable=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


def test_on_flow_models_comfyui_s_2m_takes_another_lambda() -> None:
    """It uses -log(sigma) where lambda is log((1 - sigma) / sigma): still consistent, but not 2M in lambda.

    What README says: the two differ, and ours is the one that equals a VE run of the same model.
    """
    model, x, sigmas = problem("flow", FLOW[:-1])
    theirs = comfy_sampling().sample_dpmpp_2m(model, x, sigmas, disable=True)
    ours = k_diffusion_sampler("dpmpp_2m", "flow", lower_order_final="off")(model, x, sigmas, disable=True)
    ve = k_diffusion_sampler(
        "dpmpp_2m", "ve", lower_order_final="off")(reference_mixture("ve")[0], x / (1 - sigmas[0]), sigmas /
                                                   (1 - sigmas), disable=True) * (1 - sigmas[-1])
    assert (ours - theirs).abs().max() > 1e-3
    torch.testing.assert_close(ours, ve, rtol=0, atol=1e-11)


def test_their_noise_depends_on_the_range_of_the_schedule_and_ours_does_not() -> None:
    x = torch.zeros(1, 100)
    s, t = torch.tensor(5.0), torch.tensor(2.0)
    theirs = [
        k_diffusion_sampling().BrownianTreeNoiseSampler(x, torch.tensor(low), torch.tensor(14.6),
                                                        seed=1)(s, t) for low in (0.03, 0.05)
    ]
    assert (theirs[0] - theirs[1]).abs().max() > 0.1
    states = []
    for sigmas in ([5.0, 2.0, 0.03, 0.0], [5.0, 2.0, 0.05, 0.0]):
        k_diffusion_sampler("dpmpp_sde")(lambda x, sigma, **extra: x * 0, x, torch.tensor(sigmas),
                                         disable=True, extra_args={"seed": 1},
                                         callback=lambda info: states.append(info["x"]))
    assert torch.equal(states[1], states[4]) and not torch.equal(states[1], x)


@pytest.mark.parametrize("order", [2, 3, 4])  # ComfyUI's fails at 1, which is euler
@pytest.mark.parametrize("steps", [1, 3, 9])
def test_ipndm_is_comfyui_s(steps: int, order: int) -> None:
    model, x, sigmas = problem("ve", KARRAS[-steps - 1:])
    theirs = comfy_sampling().sample_ipndm(model, x, sigmas, disable=True, max_order=order)
    ours = k_diffusion_sampler("ipndm", order=order, lower_order_final="off")(model, x, sigmas, disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@BOTH
def test_heun_is_theirs(functions) -> None:
    model, x, sigmas = problem("ve", KARRAS)
    theirs = functions().sample_heun(model, x, sigmas, disable=True)
    torch.testing.assert_close(
        k_diffusion_sampler("heun")(model, x, sigmas, disable=True), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_churn_keeps_the_distribution_of_normal_data(path: str) -> None:
    """Of N(0.7, 0.4^2), over many draws; without churn the same run is the ODE's."""
    from problems import Gaussian, sigmas_between, starting_noise
    sigmas = sigmas_between(-3.0, 4.0, 40, path)
    # elements stand for draws: every image has its own noise to make
    x = starting_noise((4, 40, 40), float(sigmas[0]), path)
    runs = [
        k_diffusion_sampler("heun", path, s_churn=churn)(Gaussian(path), x, sigmas, extra_args={"seed": 1},
                                                         disable=True) for churn in (0.0, 40.0)
    ]
    assert (runs[0] - runs[1]).std() > 0.2  # other images
    for result in runs:
        assert float(result.mean()) == pytest.approx(0.7, abs=0.03) and float(result.std()) == pytest.approx(
            0.4, abs=0.03)
