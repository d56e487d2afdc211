"""The hypersolver: what its network adds to a step, what training makes of it, and what a file holds."""
from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from problems import Gaussian
from samplers import (CalibrationError, Statistics, estimate_statistics, fit_multistep, k_diffusion_sampler,
                      load_calibration)
from samplers.learning import train_hypersolver
from samplers.learning.hypersolver import Conditions, Hypersolver, Network, flat, unflat
from samplers.learning.train_hypersolver import Lesson, School, fit_hypersolver, hypersolver_cost, lessons
from samplers.learning.storage import write_checked
from samplers.schedule import PATHS
from test_calibrate import mixture, noise
from test_fitted import calibration

SIGMAS = torch.tensor([14.6, 5.0, 1.5, 0.4, 0.0], dtype=torch.float64)
BOUNDS = np.array([[-3.0] * 8, [3.0] * 8])


def hypersolver(seed: int | None = 0, channels: int = 3, counts: tuple[int, ...] = (2, 3, 4)) -> Hypersolver:
    """With weights at random, or with seed None one that learned nothing."""
    network = Network(channels)
    weights = {name: value.detach().half() if name != "sizes" else value
               for name, value in network.state_dict().items()}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weights = {name: (0.1 * torch.randn(value.shape, generator=generator)).to(value.dtype)
                   for name, value in weights.items()}
    return Hypersolver(weights, BOUNDS, counts)


@functools.cache
def statistics() -> Statistics:
    return calibration(x=noise(4))


def having(found: Hypersolver) -> Statistics:
    return replace(statistics(), hypersolver=found)


def run(found: Statistics, x: torch.Tensor, sigmas: torch.Tensor = SIGMAS, model=None,
        path: str = "ve") -> torch.Tensor:
    sampler = k_diffusion_sampler("fitted_chosen", path, statistics=found)
    return sampler(model or mixture(path=path), x, sigmas, disable=True)


def lesson_model(model=None):
    """A model that is told of which images it is asked."""
    own = model or mixture()

    def denoise(x, sigma, images, **extra):
        assert len(images) == len(x)
        return own(x, sigma)

    return denoise


def fitted(found: Statistics | None = None, count: int = 24, **how) -> Statistics:
    settings = {"prompts": [k // 4 for k in range(count)], "steps": (3, 4), "iterations": 400, **how}
    model = settings.pop("model", lesson_model())
    return fit_hypersolver(model, noise(count, seed=21), found or statistics(), **settings)


@functools.cache
def trained() -> Statistics:
    return fitted()


def converged(x: torch.Tensor) -> torch.Tensor:
    fine = torch.tensor([14.6 * (0.03 / 14.6) ** (i / 600) for i in range(601)] + [0.0], dtype=torch.float64)
    return k_diffusion_sampler("dpmpp_2m")(mixture(), x, fine, disable=True)


def test_what_has_learned_nothing_is_2m_on_the_chosen_levels() -> None:
    x = noise(2, seed=5)
    levels = fit_multistep(statistics().for_another_prompt(), 4, start=-math.log(14.6))
    sigmas = torch.tensor([*np.exp(-np.array(levels.lam)), 0.0], dtype=torch.float64)
    plain = k_diffusion_sampler("dpmpp_2m")(mixture(), x, sigmas, disable=True)
    torch.testing.assert_close(run(having(hypersolver(None)), x), plain, rtol=0, atol=1e-12)
    assert not torch.equal(run(having(hypersolver()), x), plain)


def test_it_is_the_same_on_every_path() -> None:
    """In y = x / alpha, from the same levels."""
    found, x = having(hypersolver()), noise(2, seed=5)
    ve = run(found, x)
    lam = -np.log(14.6)
    start = PATHS["flow"].at(float(lam))
    sigmas = torch.tensor([start.sigma, 0.8, 0.6, 0.3, 0.0], dtype=torch.float64)
    flow = run(found, start.alpha * x, sigmas, path="flow")
    torch.testing.assert_close(flow, ve, rtol=1e-5, atol=1e-5)


def test_an_image_is_the_same_in_every_batch_and_its_places_see_11_by_11() -> None:
    found, x = having(hypersolver()), noise(3, seed=5)
    torch.testing.assert_close(run(found, x)[1:2], run(found, x[1:2]), rtol=1e-5, atol=1e-6)
    network, v = hypersolver().network(), torch.zeros(1, 4, 3, 24, 24)
    by = network.modulation(torch.zeros(1, 8))
    moved = v.clone()
    moved[..., 12, 12] = 1.0
    seen = (network(moved, by) - network(v, by)).abs().amax((0, 1)) > 0
    assert seen[7:18, 7:18].any(0).all() and not seen[:, :7].any() and not seen[18:].any()


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 6), (2, 3, 7), (2, 3, 4, 6)])
def test_frames_are_images(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert flat(x).shape[1] == 3 and torch.equal(unflat(flat(x), x), x.float().double())
    if x.ndim == 5:
        torch.testing.assert_close(flat(x)[:5], x[0].movedim(1, 0).float())
        found, gaussian = having(hypersolver()), Gaussian()
        whole, frames = run(found, x, model=gaussian), run(found, x[:, :, 2], model=gaussian)
        torch.testing.assert_close(whole[:, :, 2], frames, rtol=1e-5, atol=1e-6)


def test_each_image_may_have_a_guidance_of_its_own() -> None:
    x = noise(3, seed=5)
    each = run(having(replace(hypersolver(), guidance=(2.0, 5.0, 7.0))), x)
    alone = run(having(replace(hypersolver(), guidance=5.0)), x[1:2])
    torch.testing.assert_close(each[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(each[0:1], run(having(replace(hypersolver(), guidance=5.0)), x[0:1]), atol=1e-4)


def test_what_inpainting_keeps_is_kept_exactly() -> None:
    kept = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    kept[..., :2] = True
    latent, model = noise(2, sigma=1.0, seed=9), mixture()
    result = run(having(hypersolver()), noise(2, seed=5),
                 model=lambda x, sigma, **extra: torch.where(kept, latent, model(x, sigma)))
    assert torch.equal(torch.where(kept, result, latent), latent)


def test_other_steps_and_given_levels_are_as_without() -> None:
    x, found = noise(2, seed=5), having(hypersolver(counts=(3,)))
    assert torch.equal(run(found, x), run(statistics(), x))
    given = [k_diffusion_sampler("fitted", statistics=which)(mixture(), x, SIGMAS[[0, 1, 2, 4]], disable=True)
             for which in (found, statistics())]
    assert torch.equal(*given)


def test_a_run_that_leaves_noise_is_as_without() -> None:
    x = noise(2, seed=5)
    assert torch.equal(run(having(hypersolver()), x, SIGMAS[:4]), run(statistics(), x, SIGMAS[:4]))


def test_it_is_left_out_where_the_model_does_not_answer_first() -> None:
    x = noise(2, seed=5)
    samplers = [k_diffusion_sampler("fitted_chosen", statistics=found, first_step="afs")
                for found in (having(hypersolver()), statistics())]
    assert torch.equal(*(sampler(mixture(), x, SIGMAS, disable=True) for sampler in samplers))


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="latents of 3 channels, and x has shape .2, 4, 4, 4.: train one"):
        run(having(hypersolver()), torch.randn(2, 4, 4, 4), model=Gaussian())


def test_training_lowers_the_error_of_images_it_has_not_seen() -> None:
    x = noise(32, seed=11)
    goal = converged(x)
    before, after = (float((run(found, x) - goal).square().mean(dim=(1, 2, 3)).sqrt().mean())
                     for found in (statistics(), trained()))
    assert trained().hypersolver.counts == (3, 4)
    assert after < 0.85 * before
    told = trained().about["hypersolver"]
    assert all(with_it < without for without, with_it in told["selection"].values())
    assert (told["images"], told["prompts"], told["guidance"]) == (24, 6, [1.0, 1.0])


def test_it_costs_what_was_said_beforehand() -> None:
    seen: list[tuple[int, int]] = []
    found = fitted(iterations=2, progress=lambda done, total, loss: seen.append((done, total)))
    told = found.about["hypersolver"]
    assert told["evaluations"] == max(done for done, _ in seen) <= seen[0][1]
    assert seen[0][1] == hypersolver_cost([k // 4 for k in range(24)], (3, 4)) <= told["evaluations"] + 1


def test_a_file_makes_the_same_images(tmp_path) -> None:
    trained().save(tmp_path / "it.safetensors")
    loaded, x = load_calibration(tmp_path / "it.safetensors"), noise(2, seed=5)
    assert torch.equal(run(loaded, x), run(trained(), x))
    assert loaded.about["hypersolver"] == trained().about["hypersolver"]
    assert (tmp_path / "it.safetensors").stat().st_size < 250_000


def test_what_gains_nothing_is_not_kept() -> None:
    found = fitted(iterations=0)
    assert found.hypersolver is None and found.about["hypersolver"]["selection"]["3"]


class Stop(Exception):
    pass


def test_it_goes_on_from_wherever_it_was_cut_short_and_ends_alike(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_hypersolver, "TEACHER", 12)
    whole, calls = fitted(iterations=21), 0
    partial = tmp_path / "partial"
    stops = [3, 9, 17, 22, 30, 41, 52]

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal calls
        calls += 1
        if stops and calls >= stops[0]:
            stops.pop(0)
            raise Stop

    while stops:
        with pytest.raises(Stop):
            fitted(iterations=21, partial=partial, progress=progress)
        assert partial.exists() or calls < 6
    found = fitted(iterations=21, partial=partial, progress=progress)
    assert not partial.exists()
    for name, value in whole.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], value, err_msg=name)


def test_the_teacher_is_exact_between_its_levels() -> None:
    """On normal data, whose solution is known."""
    seen = {}
    x, model = noise(12, seed=21), Gaussian()

    class Watched(School):
        def attend(self, k, j, found):
            levels, images = self.rounds[k][j]
            for i, level in enumerate(levels):
                exact = model.exact(x[images], 14.6, level.sigma)
                seen[k, j, i] = [float((found[f"x.{k}.{j}.{i}"] - exact).abs().max())]
                if (answer := found.get(f"d.{k}.{j}.{i}")) is not None:
                    d = model(exact, torch.full((len(images),), level.sigma, dtype=torch.float64))
                    seen[k, j, i].append(float((answer - d).abs().max()))
            super().attend(k, j, found)

    original, train_hypersolver.School = train_hypersolver.School, Watched
    try:
        fitted(count=12, prompts=[k // 2 for k in range(12)], model=lesson_model(model), iterations=1)
    finally:
        train_hypersolver.School = original
    assert len(seen) >= 4 * (4 + 5) and max(map(max, seen.values())) < 5e-3
    assert sum(len(errors) == 2 for errors in seen.values()) >= 3 * (3 + 4)  # those that are shown


def test_a_flow_is_trained_from_pure_noise() -> None:
    model, x = mixture(path="flow"), torch.randn(16, 3, 4, 4, dtype=torch.float64,
                                                 generator=torch.Generator().manual_seed(3))
    found = estimate_statistics(model, x[:4], [1.0, 0.97, 0.03], path="flow", fitted=True)
    result = fit_hypersolver(lesson_model(model), x, found, prompts=[k // 2 for k in range(16)], steps=(3,),
                             iterations=40, path="flow", start=1.0)
    out = run(result, x[:2], torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0], dtype=torch.float64), path="flow")
    assert out.isfinite().all() and "3" in result.about["hypersolver"]["selection"]


def test_every_image_is_in_one_lesson_of_a_round_and_some_begin_inside() -> None:
    taught = list(lessons(statistics(), PATHS["ve"], [[k] for k in range(40)], (4, 5, 6), seed=2))
    assert sorted(image for lesson in taught for image in lesson.images) == list(range(40))
    first = statistics().lam[0]
    inside = [lesson for lesson in taught if lesson.levels[0].lam > first + 1e-6]
    assert {len(lesson.levels) - 1 for lesson in taught} == {4, 5, 6}
    assert 4 <= sum(len(lesson.images) for lesson in inside) <= 6
    assert all(isinstance(lesson, Lesson) and lesson.levels[-1].sigma == 0.0 for lesson in taught)
    pairs = lessons(statistics(), PATHS["ve"], [[k, k + 20] for k in range(20)], (4, 5), seed=2)
    assert all({(image + 20) % 40 for image in lesson.images} == {*lesson.images} for lesson in pairs)


def test_it_trains_inside_inference_mode() -> None:
    with torch.inference_mode():
        found = fitted(iterations=21, steps=(3,))
    np.testing.assert_array_equal(found.about["hypersolver"]["selection"]["3"],
                                  fitted(iterations=21, steps=(3,)).about["hypersolver"]["selection"]["3"])


@pytest.mark.parametrize("how, message", [
    ({"prompts": [0] * 24}, "all images have one prompt: give at least two"),
    ({"prompts": [0, 1]}, "prompts names 2, and x has 24 images"),
    ({"steps": (1, 4)}, "steps = .1, 4. is out of range: choose different whole numbers from 2 to 50"),
    ({"steps": ()}, "steps = .. is out of range"),
    ({"rounds": -1}, "rounds = -1 is out of range: choose a whole number from 0"),
    ({"found": Statistics.constant()}, "lack the inner products"),
])
def test_what_cannot_be_trained_is_refused_by_name(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(**how)


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("hypersolver.leave.weight"), "leave.weight has shape .0.: it must be .3, 32, 3, 3."),
    (lambda a: a.pop("hypersolver.bounds"), "the hypersolver is not whole: 'bounds'"),
    (lambda a: a.update({"hypersolver.enter.weight": np.zeros((32, 12), np.float16)}), "must have shape"),
    (lambda a: a.update({"hypersolver.other": np.zeros(3)}), "other has shape .3.: it must be"),
    (lambda a: a.update({"hypersolver.counts": np.array([0])}), "must be from 1 to 1000"),
    (lambda a: a["hypersolver.enter.bias"].__setitem__(0, np.nan), "1 values that are not finite"),
    (lambda a: a.update({"hypersolver.bounds": -BOUNDS}), "the lowest and the highest"),
])
def test_a_file_that_is_no_hypersolver_is_refused(tmp_path, change, message: str) -> None:
    arrays = {name: np.array(value) for name, value in having(hypersolver()).arrays().items()}
    change(arrays)
    write_checked(tmp_path / "bad.safetensors", Statistics.format, arrays, {}, False)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tmp_path / "bad.safetensors")


def test_conditions_are_those_of_the_run_from_where_it_begins() -> None:
    levels = [PATHS["ve"].level(sigma) for sigma in (8.0, 4.0, 1.0, 0.0)]
    first, second, last = (Conditions.of(levels, i, 7.0) for i in range(3))
    assert (first.first, first.second, first.last) == (1.0, 0.0, 0.0) and second.second == last.last == 1.0
    assert first.before == first.earlier == second.earlier == 1.5  # a ratio of 1: there is no step
    assert first.ratio == pytest.approx(0.0) and last.ratio == -1.5 and last.before == pytest.approx(-0.75)
    assert np.isfinite(Conditions.of(levels, 0, 0.0)).all()
