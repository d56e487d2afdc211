"""Schedules at even distances on a clock: what each clock is, on every path, and the node that makes them."""
from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
import torch

from comfy_host import comfy_sampling, pack, sampling_of
from problems import fitted_statistics
from samplers import PATHS, fitted_sigmas
from samplers.clocks import CLOCKS, evenly
from samplers.schedule import levels

TABLE = {"ve": np.exp(np.linspace(np.log(0.02), np.log(80.0), 300)), "flow": np.linspace(0.002, 0.998, 300),
         "vp": np.linspace(0.02, 0.999, 300)}
EVERY_CLOCK = pytest.mark.parametrize("name", CLOCKS)
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
MODELS = {"discrete": ("ModelSamplingDiscrete", "EPS"), "v": ("ModelSamplingDiscrete", "V_PREDICTION"),
          "EDM": ("ModelSamplingContinuousEDM", "EDM"), "continuous v": ("ModelSamplingContinuousV", "EDM"),
          "flow": ("ModelSamplingDiscreteFlow", "CONST"), "Flux": ("ModelSamplingFlux", "CONST")}
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)


def clock_of(name: str, path: str):
    return CLOCKS[name](PATHS[path], TABLE[path])


@EVERY_PATH
@EVERY_CLOCK
def test_there_and_back_is_the_same(name: str, path: str) -> None:
    clock = clock_of(name, path)
    for sigma in np.exp(np.linspace(*np.log(TABLE[path][[0, -1]]), 37)):
        level = PATHS[path].level(float(sigma))
        shown = clock.of(level)
        assert clock.level(shown).lam == pytest.approx(level.lam, rel=1e-9, abs=1e-9)
        assert clock.of(clock.level(shown)) == pytest.approx(shown, rel=1e-9)


@pytest.mark.parametrize("rho", [1.0, 2.0, 7.0])
@EVERY_PATH
@EVERY_CLOCK
def test_the_distances_are_even_and_the_ends_are_exact(name: str, path: str, rho: float) -> None:
    clock, (low, high) = clock_of(name, path), TABLE[path][[0, -1]]
    start, end = PATHS[path].level(float(high)), PATHS[path].level(float(low))
    if name == "lambda" and rho != 1.0:
        with pytest.raises(ValueError, match="rho = .* is out of range.*that shows -.*set rho to 1"):
            evenly(start, end, 9, clock, rho)
        return
    found = evenly(start, end, 9, clock, rho)
    assert found[0] is start and found[-1] is end
    assert len(levels([level.sigma for level in found], PATHS[path])) == 9
    apart = np.diff([clock.of(level)**(1 / rho) if rho != 1.0 else clock.of(level) for level in found])
    np.testing.assert_allclose(apart, apart.mean(), rtol=1e-7)
    assert evenly(start, end, 1, clock, rho) == [start] and evenly(start, end, 2, clock, rho) == [start, end]


def test_the_linear_and_the_cosine_clock_are_their_schedules() -> None:
    """log alpha of the VP state, against the integral of beta and the ratio of cosines."""
    for t in (0.05, 0.3, 0.9):
        integral = 0.1 * t + 0.5 * (20.0 - 0.1) * t**2
        at = CLOCKS["linear"](PATHS["vp"], []).level(t)
        assert math.log(at.alpha) == pytest.approx(-0.5 * integral, rel=1e-12)
        at = CLOCKS["cosine"](PATHS["vp"], []).level(t)
        ratio = math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        assert at.alpha == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_the_clock_sigma_with_rho_7_is_karras(steps: int) -> None:
    theirs = comfy_sampling().get_sigmas_karras(steps, 0.03, 14.6, rho=7.0)
    ours = evenly(PATHS["ve"].level(14.6), PATHS["ve"].level(0.03), steps, clock_of("sigma", "ve"), 7.0)
    np.testing.assert_allclose([level.sigma for level in ours], theirs[:-1].numpy(), rtol=2e-6)


def test_a_clock_that_shows_nothing_at_an_end_and_levels_beyond_a_table_are_refused() -> None:
    flow = PATHS["flow"]
    with pytest.raises(ValueError, match="the clock goes from -inf to .*between pure noise and 0"):
        evenly(flow.level(1.0), flow.level(0.1), 5, clock_of("lambda", "flow"))
    with pytest.raises(ValueError, match="sigma = 90 is beyond the model's levels.*from 0.02 to 80"):
        clock_of("t", "ve").of(PATHS["ve"].level(90.0))


class Patcher:
    def __init__(self, kind: str) -> None:
        self.sampling = sampling_of(*MODELS[kind])

    def get_model_object(self, name: str):
        return self.sampling


def node():
    nodes = asyncio.run(pack().comfy_entrypoint().get_node_list())
    return next(node for node in nodes if node.GET_SCHEMA().node_id == "LambdaScheduler")


def made(model: str, clock: str, **changes) -> torch.Tensor:
    inputs = {"steps": 8, "rho": 1.0, "denoise": 1.0, "sigma_max": 0.0, "sigma_min": 0.0,
              "to_zero": True, "values": "", **changes}
    return node().execute(Patcher(model), clock, **inputs).result[0]


@pytest.fixture(autouse=True)
def no_preview(monkeypatch) -> None:
    """Which would be written to ComfyUI's folder."""
    import sys
    pack()
    module = sys.modules["custom_nodes_x_lambda-solvers.nodes.scheduling"]
    monkeypatch.setattr(module.ui, "PreviewImage", lambda *image, **how: None)


@EVERY_MODEL
@EVERY_CLOCK
def test_the_node_goes_over_the_model_s_range_to_zero(name: str, model: str) -> None:
    sampling, sigmas = Patcher(model).sampling, made(model, name)
    assert len(sigmas) == 9 and sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()
    torch.testing.assert_close(sigmas[[0, -2]], torch.stack([sampling.sigma_max, sampling.sigma_min]))
    assert len(made(model, name, to_zero=False)) == 9 and made(model, name, to_zero=False)[-1] > 0
    for steps in (1, 2, 3):
        assert len(made(model, name, steps=steps)) == steps + 1


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_the_clock_t_is_the_model_s_own_time(rho: float) -> None:
    """Of Stable Diffusion the 1000 timesteps: 999 to 0, evenly or evenly in the root of t + 1."""
    sampling = Patcher("discrete").sampling
    t = torch.linspace(1000.0 ** (1 / rho), 1.0, 8, dtype=torch.float64) ** rho - 1
    torch.testing.assert_close(made("discrete", "t", rho=rho)[:-1], sampling.sigma(t), rtol=1e-4, atol=0)


@EVERY_MODEL
def test_a_list_is_taken_as_it_is_in_sigmas_or_in_lambdas(model: str) -> None:
    path = PATHS["flow" if "CONST" in MODELS[model] else "ve"]
    given = [0.9, 0.5, 0.1]
    torch.testing.assert_close(made(model, "list of sigmas", values="0.9, 0.5 0.1"),
                               torch.tensor([*given, 0.0]), rtol=0, atol=0)
    lams = ";".join(repr(path.level(sigma).lam) for sigma in given)
    torch.testing.assert_close(made(model, "list of lambdas", values=lams), torch.tensor([*given, 0.0]))
    assert made(model, "list of sigmas", values="0.9 0", to_zero=False).tolist() == [
        pytest.approx(0.9), 0.0]


def test_the_range_may_be_given() -> None:
    sigmas = made("flow", "lambda", sigma_max=0.9, sigma_min=0.1, steps=3)
    np.testing.assert_allclose(sigmas, [0.9, 0.5, 0.1, 0.0], atol=1e-6)


@EVERY_MODEL
@EVERY_CLOCK
def test_with_denoise_it_begins_where_that_share_of_the_timesteps_is_left(name: str, model: str) -> None:
    sampling = Patcher(model).sampling
    start = float(sampling.percent_to_sigma(0.5))
    assert start < 0.8 * float(sampling.sigma_max)
    torch.testing.assert_close(made(model, name, denoise=0.5)[0], torch.tensor(start))
    torch.testing.assert_close(made(model, name, denoise=0.5, sigma_max=0.9)[0], torch.tensor(0.9))


@pytest.mark.parametrize("model", ["discrete", "flow"])
def test_the_fitted_clock_shows_the_levels_of_the_fitted_solver(model: str) -> None:
    found = own_statistics()
    for changes, start in (({}, 14.6146 if model == "discrete" else 1.0), ({"sigma_max": 0.8}, 0.8)):
        expected = fitted_sigmas(fitted_statistics(), 6, start, "flow" if model == "flow" else "ve")
        sigmas = made(model, "fitted", steps=6, calibration=found, **changes)
        torch.testing.assert_close(sigmas, torch.tensor(expected), rtol=1e-4, atol=1e-6)
        stopped = made(model, "fitted", steps=5, calibration=found, to_zero=False, **changes)
        assert torch.equal(stopped, sigmas[:-1])


def own_statistics():
    """fitted_statistics(), in the class of the pack as ComfyUI loads it."""
    import sys
    found = fitted_statistics()
    own = sys.modules["custom_nodes_x_lambda-solvers.samplers"].Statistics
    return own(**{field: getattr(found, field)
                  for field in ("lam", "l", "s", "b", "s_alone", "damping", "root", "about")})


@pytest.mark.parametrize(("changes", "message"), [
    ({"clock": "fitted"}, "clock is fitted, and no calibration is connected: connect what Measure Model"),
    ({"clock": "list of sigmas"}, "clock is list of sigmas, and values is empty: give the levels"),
    ({"clock": "list of sigmas", "values": "1, x"}, "values = '1, x': could not.*Give numbers between"),
    ({"clock": "list of sigmas", "values": "1, 2"}, "sigmas must strictly decrease"),
    ({"clock": "list of lambdas", "values": "1, 0"}, "sigmas must strictly decrease"),
    ({"clock": "sigma", "sigma_max": 0.01}, "sigma_max = 0.01 must be above sigma_min = 0.029"),
    ({"clock": "t", "sigma_max": 99.0}, "sigma = 99 is beyond the model's levels"),
    ({"clock": "lambda", "rho": 7.0}, "rho = 7 is out of range for a clock that shows -2.68: set rho to 1")])
def test_what_makes_no_schedule_is_refused_with_a_remedy(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("discrete", **changes)


def test_the_picture_has_a_row_for_every_level_and_leaves_out_the_middle_of_many() -> None:
    heights = [node().execute(Patcher("flow"), "t", steps, 1.0, 1.0, 0.0, 0.0, True, "").result[1].shape[1]
               for steps in (4, 5, 40, 400)]
    assert heights[1] - heights[0] == 20 and heights[2] == heights[3] > heights[1]
