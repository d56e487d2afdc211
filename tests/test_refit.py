"""The fitted solver refitted on the model itself: what it learns, what it costs, and where it is used."""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from problems import Gaussian
from samplers import CalibrationError, Statistics, fit_multistep, k_diffusion_sampler, refit_multistep
from samplers.learning.gauss_newton import Quadratic, damped_step
from samplers.learning.refit import DIFFERENCES, Shape, _Runs, refit_cost
from samplers.schedule import PATHS
from test_fitted import calibration, mixture, noise

SIGMAS = torch.tensor([14.6, 5.0, 1.5, 0.4, 0.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def found() -> Statistics:
    return calibration(x=noise(8))


@pytest.fixture(scope="module")
def refitted(found) -> Statistics:
    return refit_multistep(mixture(), noise(9, seed=3), found, 4)


def converged(x: torch.Tensor) -> torch.Tensor:
    fine = torch.tensor([14.6 * (0.03 / 14.6) ** (i / 600) for i in range(601)] + [0.0], dtype=torch.float64)
    return k_diffusion_sampler("dpmpp_2m")(mixture(), x, fine, disable=True)


def result(statistics: Statistics, x: torch.Tensor, sigmas: torch.Tensor = SIGMAS,
           name: str = "fitted_chosen") -> torch.Tensor:
    return k_diffusion_sampler(name, statistics=statistics)(mixture(), x, sigmas, disable=True)


def test_it_errs_less_on_noises_it_has_not_seen(found, refitted) -> None:
    x = noise(32, seed=11)
    goal = converged(x)
    before, after = (float((result(s, x) - goal).square().mean(dim=(1, 2, 3)).log().mean().exp())**0.5
                     for s in (found, refitted))
    assert after < 0.95 * before
    told = refitted.about["refits"]["4"]
    assert told["kept"] and told["selection"][1] < told["selection"][0] and told["training"][1] < told[
        "training"][0]


def test_it_costs_what_was_said_beforehand(refitted) -> None:
    for n, rounds in ((3, 2), (5, 1), (5, 2)):
        seen: list[tuple[int, int]] = []
        told = refit_multistep(mixture(), noise(3, seed=3), calibration(), n, rounds=rounds,
                               progress=lambda done, total, error: seen.append(
                                   (done, total))).about["refits"][str(n)]
        assert told["evaluations"] == len(seen) <= refit_cost(n, rounds) == seen[0][1]
    assert refit_cost(5) == 167 and refit_cost(8) == 332


def test_a_restarted_run_is_the_whole_run(found) -> None:
    """Slopes start where a number first matters; from the very start they are the same."""
    plain, x = found.for_another_prompt(), noise(3, seed=3)
    shape = Shape.of(fit_multistep(plain, 5).lam, float(plain.lam[-1]))
    model = mixture()
    run = _Runs(lambda x, sigma: model(x, x.new_full((len(x),), sigma)), plain, PATHS["ve"], x, converged(x),
                training=2)
    state = run.of(shape)
    slopes = run.slopes(state)
    # levels, scales, weights of one and of two evaluations before
    assert len(slopes.of) == len(slopes.values) == 4 + 4 + 4 + 2
    for (row, k), slope in zip(*slopes):
        by = DIFFERENCES[row] * (-1 if (row, k) == (0, 4) else 1)
        whole = run.of(shape.moved([(row, k)], [by]))
        np.testing.assert_allclose((whole.residual - state.residual) / by, slope, atol=1e-9)


def test_only_whole_runs_of_that_many_steps_use_it(found, refitted) -> None:
    x = noise(2, seed=5)
    assert not torch.equal(result(refitted, x), result(found, x))
    # image to image, fewer steps, leftover noise
    others = [SIGMAS[1:], torch.cat([SIGMAS[:1], SIGMAS[2:]]), SIGMAS[:-1]]
    for sigmas in others:
        torch.testing.assert_close(result(refitted, x, sigmas), result(found, x, sigmas), rtol=0, atol=1e-12)
    given = [result(which, x, name="fitted") for which in (refitted, found)]
    torch.testing.assert_close(*given, rtol=0, atol=1e-12)


def test_another_prompt_does_without_it(refitted) -> None:
    other = refitted.for_another_prompt()
    assert not other.plans and not other.b.any()
    x = noise(2, seed=5)
    assert not torch.equal(result(other, x), result(refitted, x))


def test_but_not_without_what_several_prompts_taught(found) -> None:
    several = refit_multistep(mixture(), noise(9, seed=3), found, 4, about={"prompts": 3})
    other = several.for_another_prompt()
    assert list(other.plans) == [4] and not other.b.any()
    x = noise(2, seed=5)
    assert torch.equal(result(other, x), result(several, x))


def test_flow_learns_what_ve_does() -> None:
    """The same denoiser after x / alpha; and from pure noise, where the first evaluation leads to the
    grid."""
    found = calibration(intervals=8)
    first = PATHS["flow"].at(float(found.lam[0]))
    x = noise(4, seed=3)
    ve = refit_multistep(mixture(), x, found, 4)
    flow = refit_multistep(mixture(path="flow"), x * first.alpha, found, 4, path="flow")
    np.testing.assert_allclose(flow.plans[4], ve.plans[4], atol=1e-6)
    pure = refit_multistep(mixture(path="flow"), x / x.std(), found, 4, path="flow", start=1.0)
    assert list(pure.about["refits"]) == ["3"] and pure.about["refits"]["3"]["evaluations"] <= refit_cost(
        4, opening=True)


def test_what_does_not_hold_on_the_image_that_selects_is_not_kept() -> None:
    """The last image is of a single point, which every plan solves exactly; the others, of a mixture, pull
    elsewhere."""
    def model(x, sigma):
        return torch.cat([mixture()(x[:-1], sigma[:-1]), Gaussian(mean=0.0, spread=0.0)(x[-1:], sigma[-1:])])

    found = calibration(model=Gaussian(mean=0.0, spread=0.0), x=noise(4))
    same = refit_multistep(model, noise(5, seed=3), found, 6)
    told = same.about["refits"]["6"]
    assert told["training"][1] == told["training"][0] and told["selection"][1] == told["selection"][0]
    assert told["evaluations"] > refit_cost(6, rounds=1) - 4 * 6  # it was tried
    assert not told["kept"] and not same.plans


def test_a_file_keeps_the_plan_and_a_damaged_one_is_refused(tmp_path, refitted) -> None:
    refitted.save(tmp_path / "a.safetensors")
    loaded = Statistics.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded.plans[4], refitted.plans[4])
    x = noise(2, seed=5)
    assert torch.equal(result(loaded, x), result(refitted, x))
    rows = refitted.plans[4]
    def ending(*last: float):
        return np.vstack([rows[:-1], [rows[-1, 0], *last]])

    for bad, words in ((ending(0.1, 1.0, 0.0, 0.0, 0.0), "own images"), (ending(0.0, 1.0, 0.1, 0.0,
                                                                                0.0), "own images"),
                       (ending(0.0, 1.0, 0.0, 0.0, 0.1), "own images"), (ending(0.0, 0.9, 0.0, 0.1,
                                                                                0.0), "own images"),
                       (rows[:3], "must be .4, 4 to 7."), (rows[:, :3], "must be .4, 4 to 7."),
                       (rows[::-1], "do not rise within lam"), (rows * [1, math.nan, 1, 1, 1, 1],
                                                                "not finite")):
        with pytest.raises(CalibrationError, match=words):
            replace(refitted, plans={4: bad})


def test_a_model_that_leaves_nothing_to_learn_is_refitted_to_nothing(found) -> None:
    result_ = refit_multistep(lambda x, sigma: torch.full_like(x, 0.25), noise(4), found, 4)
    assert all(np.isfinite(rows).all() for rows in result_.plans.values())


def test_cancelled_it_leaves_nothing_and_what_cannot_be_fitted_is_refused(found) -> None:
    def stop(done: int, total: int, error: float) -> None:
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit_multistep(mixture(), noise(4, seed=3), found, 5, progress=stop)
    assert not found.plans and "refits" not in found.about
    with pytest.raises(ValueError, match="evaluations = 2 is out of range: choose from 3 to 15"):
        refit_multistep(mixture(), noise(4), found, 2)
    with pytest.raises(ValueError, match="at least two to learn from and one to select by"):
        refit_multistep(mixture(), noise(2), found, 4)
    with pytest.raises(ValueError, match="measure again with fitted on"):
        refit_multistep(mixture(), noise(4), replace(found, root=None), 4)


@pytest.mark.parametrize("cut", [24, 64, 89],
                         ids=["in the teacher", "in the first round", "in the second round"])
def test_cut_short_it_goes_on_from_the_last_part_that_was_done(tmp_path, found, cut: int) -> None:
    seen: list[int] = []

    def stop(done: int, total: int, error: float) -> None:
        seen.append(done)
        if len(seen) == cut:
            raise KeyboardInterrupt

    x, file = noise(6, seed=3), tmp_path / "refit.part"
    whole = refit_multistep(mixture(), x, found, 4)
    with pytest.raises(KeyboardInterrupt):
        refit_multistep(mixture(), x, found, 4, progress=stop, partial=file)
    assert file.exists() == (cut > 24)  # nothing is done before the teacher is
    seen.clear()
    again = refit_multistep(mixture(), x, found, 4, progress=lambda done, *_: seen.append(done), partial=file)
    np.testing.assert_array_equal(again.plans[4], whole.plans[4])
    spent = whole.about["refits"]["4"]["evaluations"]
    # 12: three runs over what was kept
    assert len(seen) <= spent - {24: 0, 64: 40, 89: 55}[cut] + 12 and not file.exists()


OTHER = {
    "noise": lambda found: {"x": noise(6, seed=4)}, "model": lambda found: {"model": mixture(1)},
    "statistics": lambda found: {"calibration": replace(found, l=found.l * 0.9)},
    "description": lambda found: {"about": {"prompts": 2}}, "nothing": lambda found: {}
}


@pytest.mark.parametrize("other", OTHER)
def test_what_was_kept_of_another_refit_is_not_used(tmp_path, found, other: str) -> None:
    seen: list[int] = []

    def stop(done: int, total: int, error: float) -> None:
        if done == 64:
            raise KeyboardInterrupt

    how = {"model": mixture(), "x": noise(6, seed=3), "calibration": found, "evaluations": 4}
    with pytest.raises(KeyboardInterrupt):
        refit_multistep(**how, progress=stop, partial=tmp_path / "a.part")
    how |= OTHER[other](found)
    result = refit_multistep(**how, partial=tmp_path / "a.part", progress=lambda done, *_: seen.append(done))
    assert (seen[4] > 40) == (other == "nothing")
    assert {n: rows.tolist() for n, rows in result.plans.items()
            } == {n: rows.tolist() for n, rows in refit_multistep(**how).plans.items()}


@pytest.mark.parametrize("size", [0.0, 1e-15, 1.0, 1e15])
def test_a_step_is_found_where_two_numbers_do_the_same_whatever_the_errors_size(size: float) -> None:
    residual = size * torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    slopes = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]], dtype=torch.float64)
    u = damped_step(Quadratic.of(residual, slopes), slice(None), 0.3 * size**2 + 1e-30,
                    lambda G, e: np.zeros(2), most=1e20)
    assert u == pytest.approx(np.full(2, -0.5 * size), rel=1e-3)
