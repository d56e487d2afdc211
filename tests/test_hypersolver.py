"""The hypersolver: what its network adds to a step, what training makes of it, and what a file holds."""
from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from problems import Gaussian
from samplers import (CalibrationError, Statistics, estimate_statistics, k_diffusion_sampler,
                      load_calibration)
from samplers.learning import hypersolver as hypersolver_module, train_hypersolver
from samplers.learning.hypersolver import (BOUND, VIEWS, Conditions, Hypersolver, Network, flat, last_of,
                                           unflat, views)
from samplers.learning.train_hypersolver import (School, ending, fit_hypersolver, hypersolver_bytes,
                                                 hypersolver_cost, lessons, teachers)
from samplers.learning.storage import write_checked
from samplers.schedule import PATHS
from test_calibrate import mixture, noise
from test_fitted import calibration

SIGMAS = torch.tensor([14.6, 5.0, 1.5, 0.4, 0.0], dtype=torch.float64)
BOUNDS, END = np.array([[-3.0] * 8, [3.0] * 8]), np.array([-3.0, 0.0, 9.0, 0.0])


def hypersolver(seed: int | None = 0, channels: int = 3, counts: tuple[int, ...] = (2, 3, 4)) -> Hypersolver:
    """With weights at random, or with seed None one that learned nothing."""
    network = Network(channels).begun()
    weights = {name: value.detach().half() if name != "sizes" else value
               for name, value in network.state_dict().items()}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weights = {name: (0.1 * torch.randn(value.shape, generator=generator)).to(value.dtype)
                   for name, value in weights.items()}
    return Hypersolver(weights, BOUNDS, END, counts)


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


def test_what_has_learned_nothing_is_2m_on_karras_levels_to_the_last_one_it_learned() -> None:
    x = noise(2, seed=5)
    last = math.exp(-last_of(END, 4, -math.log(14.6), float(statistics().lam[-1]), [1.0]))
    ramp = np.linspace(14.6 ** (1 / 7), last ** (1 / 7), 4) ** 7
    sigmas = torch.tensor([*ramp, 0.0], dtype=torch.float64)
    plain = k_diffusion_sampler("dpmpp_2m")(mixture(), x, sigmas, disable=True)
    torch.testing.assert_close(run(having(hypersolver(None)), x), plain, rtol=0, atol=1e-12)
    assert not torch.equal(run(having(hypersolver()), x), plain)


def test_it_moves_nobody_s_random_numbers() -> None:
    before = torch.random.get_rng_state()
    run(having(hypersolver()), noise(1))
    Network(3).begun(7)
    assert torch.equal(torch.random.get_rng_state(), before)


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
    torch.testing.assert_close(run(found, x)[1:2], run(found, x[1:2]), rtol=1e-4, atol=1e-5)
    network, v = hypersolver().network(), torch.zeros(1, 4, 3, 24, 24)
    by = network.modulation(torch.zeros(1, 8))
    moved = v.clone()
    moved[..., 12, 12] = 1.0
    seen = (network(moved, by) - network(v, by)).abs().amax((0, 1)) > 0
    assert seen[7:18, 7:18].any(0).all() and not seen[:, :7].any() and not seen[18:].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (9, 17)])
def test_images_of_every_size(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) * SIGMAS[0]
    out = run(having(hypersolver()), x, model=Gaussian())
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 6), (2, 3, 7), (2, 3, 4, 6)])
def test_frames_are_images(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert flat(x).shape[1] == 3 and torch.equal(unflat(flat(x), x), x.float().double())
    if x.ndim == 5:
        torch.testing.assert_close(flat(x)[:5], x[0].movedim(1, 0).float())
        found, gaussian = having(hypersolver()), Gaussian()
        whole, frames = run(found, x, model=gaussian), run(found, x[:, :, 2], model=gaussian)
        torch.testing.assert_close(whole[:, :, 2], frames, rtol=1e-5, atol=1e-6)


def test_frames_are_looked_at_a_few_at_once(monkeypatch) -> None:
    x, found = 14.6 * torch.randn(3, 3, 5, 4, 6), having(replace(hypersolver(), guidance=(2.0, 5.0, 7.0)))
    whole = run(found, x, model=Gaussian())
    monkeypatch.setattr(hypersolver_module, "AT_ONCE", 2 * 24)
    torch.testing.assert_close(run(found, x, model=Gaussian()), whole, rtol=1e-4, atol=1e-5)


def test_of_a_video_one_frame_is_kept_of_each_of_its_runs_always_the_same() -> None:
    x = torch.arange(2.0 * 3 * 7 * 60 * 40).reshape(2, 3, 7, 60, 40)
    school = School(*[None] * (len(School.__dataclass_fields__) - 1), seed=3)
    first, again = school.crop(x, [0, 5]), school.crop(x[1:], [5])
    assert first.shape == (2, 3, 1, 48, 40) and torch.equal(first[1:], again)
    assert school.crop(x[:, :, 0], [0, 5]).shape == (2, 3, 48, 40)
    assert school.crop(x[..., 0], [0, 5]).shape == (2, 3, 7, 48)


def test_each_image_may_have_a_guidance_of_its_own() -> None:
    x = noise(3, seed=5)
    each = run(having(replace(hypersolver(), guidance=(2.0, 5.0, 7.0))), x)
    alone = run(having(replace(hypersolver(), guidance=5.0)), x[1:2])
    torch.testing.assert_close(each[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(each[0:1], run(having(replace(hypersolver(), guidance=5.0)), x[0:1]), atol=1e-4)


def test_what_a_step_sees_is_where_it_is_and_how_its_answers_moved() -> None:
    x, a, b, c = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    at = PATHS["flow"].level(0.8)
    torch.testing.assert_close(views(x, at, [a, b, c]),
                               torch.stack([x / math.hypot(0.2, 0.8), a, a - b, b - c], 1))
    assert not views(x, at, [a])[:, 2:].any()
    levels = PATHS["ve"].level(9.0), PATHS["ve"].level(3.0), PATHS["ve"].level(1.0), PATHS["ve"].level(0.0)
    assert [step.missed.uses for step in hypersolver().steps(levels, PATHS["ve"])] == [
        (0,), (0, -1), (0, -1, -2)]


def test_both_answers_stay_within_their_bounds_whatever_is_seen() -> None:
    network = hypersolver().network()
    by = network.modulation(torch.zeros(1, len(Conditions._fields)))
    v = 1e6 * torch.randn(1, VIEWS, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    most = BOUND * float(by.whole + by.rho)
    assert 0.5 * most < float(network(v, by).abs().max()) <= most * (1.0 + 1e-5)


def test_beyond_what_taught_it_counts_as_the_nearest_of_it() -> None:
    found = replace(hypersolver(), end=np.array([-3.0, 0.5, -3.0, 0.8]))
    x, highest = noise(2, seed=5), math.exp(BOUNDS[1, -1])
    far, near = (run(having(replace(found, guidance=guidance)), x) for guidance in (100.0, highest))
    assert torch.equal(far, near)
    assert not torch.allclose(far, run(having(replace(found, guidance=0.5 * highest)), x), atol=1e-4)


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


def test_what_is_held_out_teaches_nothing(monkeypatch) -> None:
    """Every eighth prompt, or the last of fewer: here the images of the sixth of six."""
    seen, original, train = [], train_hypersolver.trained, School.train

    def watched(network, data, taught, held, *more):
        seen.append((len(data[2]), taught.tolist(), held.tolist()))
        return original(network, data, taught, held, *more)

    def training(school, k, found):
        names = [f"{i}.{j}" for i in range(k + 1) for j in range(len(school.rounds[i]))]
        lessons_ = [lesson for taught in school.rounds[:k + 1] for lesson in taught]
        away = [image in {20, 21, 22, 23} for lesson in lessons_ for _ in range(lesson.n)
                for image in lesson.images]
        assert len(names) == len(lessons_)
        train(school, k, found)
        rows, taught, held = seen[-1]
        assert held == [row for row in range(rows) if away[row]]
        assert taught == [row for row in range(rows) if not away[row]]

    monkeypatch.setattr(train_hypersolver, "trained", watched)
    monkeypatch.setattr(School, "train", training)
    fitted(iterations=1)
    assert len(seen) == 3 and all(held for _, _, held in seen)


def test_the_best_network_on_what_was_held_out_is_kept_and_images_are_mirrored_with_what_they_miss(
        monkeypatch) -> None:
    v = torch.randn(16, VIEWS, 3, 5, 5, generator=torch.Generator().manual_seed(6))
    r, c = v[:, 1].clone(), torch.zeros(16, len(Conditions._fields))
    r[8:] *= -1.0  # the better it learns, the worse it is here
    own = train_hypersolver.loss

    def paired(network, v, r, c):
        assert torch.equal(r, v[:, 1]) or torch.equal(r, -v[:, 1])
        return own(network, v, r, c)

    monkeypatch.setattr(train_hypersolver, "loss", paired)
    begun = Network(3).begun()
    before = {name: value.clone() for name, value in begun.state_dict().items()}
    best, error = train_hypersolver.trained(begun, (v, r, c), torch.arange(8), torch.arange(8, 16), 60, 0,
                                            lambda loss: None)
    assert error == pytest.approx(1.0) and all(
        torch.equal(value, before[name]) for name, value in best.state_dict().items())


def test_it_keeps_as_much_as_was_said_beforehand(monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(train_hypersolver.Course, "keep", lambda self, done, found: kept.append(
        sum(v.numel() * v.element_size() for name, v in found.items() if not name.startswith("net."))))
    fitted(iterations=1)
    said = hypersolver_bytes((1, 3, 4, 4), [k // 4 for k in range(24)], (3, 4))
    assert said < max(kept) < 1.2 * said  # conditions, and this test's float64


def test_a_file_makes_the_same_images(tmp_path) -> None:
    trained().save(tmp_path / "it.safetensors")
    loaded, x = load_calibration(tmp_path / "it.safetensors"), noise(2, seed=5)
    assert torch.equal(run(loaded, x), run(trained(), x))
    assert loaded.about["hypersolver"] == trained().about["hypersolver"]
    assert (tmp_path / "it.safetensors").stat().st_size < 250_000


def test_what_gains_nothing_is_not_kept(monkeypatch) -> None:
    def ruined(network, *taught) -> tuple[Network, float]:
        with torch.no_grad():
            network.leave.bias.fill_(3.0)
            network.sizes[1, 0] += 5.0  # rho
        return network, 1.0

    monkeypatch.setattr(train_hypersolver, "trained", ruined)
    found = fitted()
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


@pytest.mark.parametrize("other", [
    {}, {"guidance": 2.0}, {"steps": (3, 5)}, {"rounds": 1}, {"seed": 1}, {"iterations": 3},
    {"about": {"model": "another"}}, {"prompts": [k // 3 for k in range(24)]}],
    ids=lambda other: next(iter(other), "nothing else"))
def test_a_training_that_is_asked_otherwise_starts_anew(tmp_path, monkeypatch, other: dict) -> None:
    monkeypatch.setattr(train_hypersolver, "TEACHER", 6)
    told = []

    def progress(done: int, total: int, loss: float) -> None:
        told.append(done)
        if len(told) == stop:
            raise Stop

    def asked(**how) -> int:
        told.clear()
        fitted(**{"iterations": 2, **how}, progress=progress)
        return len(told)

    stop = 30
    with pytest.raises(Stop):
        asked(partial=tmp_path / "partial")
    stop = 0
    assert (asked(**other, partial=tmp_path / "partial") == asked(**other)) == bool(other)


def test_the_ends_of_runs_are_in_one_order_whatever_was_kept(tmp_path, monkeypatch) -> None:
    """Of more lessons than ten, whose names a file sorts in another order."""
    seen, original = [], train_hypersolver.ending
    monkeypatch.setattr(train_hypersolver, "TEACHER", 8)
    monkeypatch.setattr(train_hypersolver, "LESSON", 2)
    monkeypatch.setattr(train_hypersolver, "ending",
                        lambda runs, start: seen.append(runs) or original(runs, start))
    how, calls = {"prompts": [k // 2 for k in range(24)], "iterations": 2}, 0

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Stop

    last = -1
    fitted(progress=progress, **how)
    whole, last, calls = seen[-1], calls - 30, 0  # the comparison of 4 images is behind
    with pytest.raises(Stop):
        fitted(partial=tmp_path / "partial", progress=progress, **how)
    seen.clear()
    fitted(partial=tmp_path / "partial", **how)
    assert len(seen) == 1 and torch.equal(seen[0], whole)


def test_the_teacher_is_exact_between_its_levels_to_second_order(monkeypatch) -> None:
    """On normal data, whose solution is known."""
    seen, model, x = [], Gaussian(), noise(24, seed=21)

    class Watched(School):
        def attend(self, k, j, found):
            images = self.rounds[k][j].images
            levels, truth = self.levels(k, self.rounds[k][j], found), self.truth(images, found)
            for level in (*levels[:-1], self.grid[-2]):
                exact = model.exact(x[images], 14.6, level.sigma)
                answer = model(exact, torch.full((len(images),), level.sigma, dtype=torch.float64))
                seen.extend(float((a - b).abs().max()) for a, b in zip(truth(level), (exact, answer)))
            assert torch.equal(truth(levels[-1])[0], truth(self.grid[-2])[1])
            super().attend(k, j, found)

    def worst(evaluations: int) -> float:
        seen.clear()
        monkeypatch.setattr(train_hypersolver, "TEACHER", evaluations)
        fitted(model=lesson_model(model), iterations=1)
        assert len(seen) > 60
        return max(seen)

    monkeypatch.setattr(train_hypersolver, "School", Watched)
    assert worst(48) < 4e-3 and worst(24) < 4.5 * worst(48)


def test_the_more_steps_are_learned_the_finer_is_the_teacher() -> None:
    assert [teachers(steps) for steps in ((4,), (4, 10), (5, 20))] == [24, 24, 48]


def test_a_flow_is_trained_from_pure_noise() -> None:
    model, x = mixture(path="flow"), torch.randn(16, 3, 4, 4, dtype=torch.float64,
                                                 generator=torch.Generator().manual_seed(3))
    found = estimate_statistics(model, x[:4], [1.0, 0.97, 0.03], path="flow", fitted=True)
    result = fit_hypersolver(lesson_model(model), x, found, prompts=[k // 2 for k in range(16)], steps=(3,),
                             iterations=40, path="flow", start=1.0)
    out = run(result, x[:2], torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0], dtype=torch.float64), path="flow")
    assert out.isfinite().all() and "3" in result.about["hypersolver"]["selection"]


def test_every_image_is_in_one_lesson_of_a_round_and_some_begin_inside() -> None:
    taught = lessons([[k] for k in range(400)], (4, 5, 6), seed=2, inside=7)
    assert sorted(image for lesson in taught for image in lesson.images) == list(range(400))
    assert len(taught) == 25 and max(len(lesson.images) for lesson in taught) == 16
    assert [sum(lesson.n == n for lesson in taught) for n in (4, 5, 6)] == [9, 8, 8]
    assert sum(lesson.start > 0.0 for lesson in taught) == 3 and max(lesson.start for lesson in taught) < 0.7
    for n in (4, 5, 6):  # the last level is anywhere
        places = sorted(lesson.place for lesson in taught if lesson.n == n)
        assert places[0] < 0.2 and places[-1] > 0.8 and np.diff(places).max() < 0.3
    pairs = lessons([[k, k + 20] for k in range(20)], (4, 5), seed=2)
    assert all({(image + 20) % 40 for image in lesson.images} == {*lesson.images} for lesson in pairs)
    assert not any(lesson.start for lesson in pairs)
    assert all(max(lesson.images) % 20 - min(lesson.images) % 20 == len(lesson.images) // 2 - 1
               for lesson in pairs)  # neighbours


@pytest.mark.parametrize("orders", [(1.0, 2.0), (0.9, 1.6), (1.1, 2.2)])
def test_where_the_last_level_is_best_is_found_from_the_ends_of_runs(orders) -> None:
    """Of errors of the orders that are taken for them, and of others."""
    chance, low, high = np.random.default_rng(0), -2.7, 3.5

    def true(n, lam, guidance):
        last, before = orders
        g, h = np.log(guidance), (lam - low) / (n - 1)
        return np.exp(-3.2 + 0.7 * g - last * lam) + np.exp(-3.8 + 0.9 * g) * h**before

    n, guidance, lam = chance.integers(4, 11, 400), chance.uniform(1, 9, 400), chance.uniform(0.4, high, 400)
    error = true(n, lam, guidance) * np.exp(0.8 * chance.standard_normal(400) - 0.32)
    found = ending(torch.from_numpy(np.stack([n, lam, guidance, error], 1)), low).numpy()
    places = np.linspace(0.5 * (low + high), high, 1000)
    for count, scale in ((4, 7.0), (10, 1.0), (6, 3.0)):
        best, near = (true(count, lam, scale) for lam in (places, last_of(found, count, low, high, [scale])))
        assert 0.999 * best.min() <= near < 1.1 * best.min()
    few = ending(torch.tensor([[4.0, 1.0, 1.0, 0.1]], dtype=torch.float64), low)
    assert float((few - torch.tensor(train_hypersolver.USUAL)).abs().max()) < 1.0


def test_the_last_level_is_lower_for_more_steps_and_less_guidance_and_within_the_model_s_range() -> None:
    end, low, high = np.array(train_hypersolver.USUAL), -2.68, 3.5
    more = [last_of(end, n, low, high, [7.0]) for n in (3, 4, 6, 9)]
    assert more == sorted(more) and 0.49 * (low + high) <= more[0] < more[-1] <= high
    assert last_of(end, 6, low, high, [1.0]) > last_of(end, 6, low, high, [9.0])
    assert last_of(end, 6, low, high, [2.0, 24.5]) == last_of(end, 6, low, high, [7.0])  # of several the mean
    assert last_of(end, 50, low, high, [1.0]) <= high and last_of(end, 5, high, high, [7.0]) == high
    inside = last_of(end, 3, 1.0, high, [7.0])
    assert 0.5 * (1.0 + high) <= inside <= high and inside > last_of(end, 3, low, high, [7.0])


def test_it_trains_inside_inference_mode() -> None:
    with torch.inference_mode():
        found = fitted(iterations=21, steps=(3,))
    np.testing.assert_array_equal(found.about["hypersolver"]["selection"]["3"],
                                  fitted(iterations=21, steps=(3,)).about["hypersolver"]["selection"]["3"])


def halved() -> torch.autocast:
    """As A1111 has around a whole job."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_a_network_learns_the_same_inside_a_host_s_autocast(monkeypatch) -> None:
    alone, train = fitted(iterations=2, steps=(3,)), School.train

    def inside(school, k, found) -> None:
        with halved():
            train(school, k, found)

    monkeypatch.setattr(School, "train", inside)
    again = fitted(iterations=2, steps=(3,))
    assert alone.hypersolver and again.about["hypersolver"] == alone.about["hypersolver"]
    for name, value in alone.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], value, err_msg=name)


def test_a_network_adds_the_same_inside_a_host_s_autocast() -> None:
    levels, x = [PATHS["ve"].level(sigma) for sigma in (9.0, 3.0, 1.0, 0.0)], noise(2, seed=5).float()
    missed, answers = hypersolver().steps(levels, PATHS["ve"])[1].missed.placed(x), [0.2 * x, 0.1 * x.sin()]
    expected = missed(x, answers)
    with halved():
        assert torch.equal(missed(x, answers), expected) and expected.any()
        assert (x[0, 0] @ x[0, 0]).dtype == torch.bfloat16  # what it does to others


@pytest.mark.parametrize("how, message", [
    ({"prompts": [0] * 24}, "all images have one prompt: give at least two"),
    ({"prompts": [0, 1]}, "prompts names 2, and x has 24 images"),
    ({"steps": (1, 4)}, "steps = .1, 4. is out of range: choose different whole numbers from 2 to 50"),
    ({"steps": ()}, "steps = .. is out of range"),
    ({"rounds": 0}, "rounds = 0 is out of range: choose a whole number from 1"),
    ({"found": Statistics.constant()}, "lack the inner products"),
])
def test_what_cannot_be_trained_is_refused_by_name(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(**how)


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("hypersolver.leave.weight"), "leave.weight has shape .0.: it must be .3, 48, 3, 3."),
    (lambda a: a.pop("hypersolver.bounds"), "the hypersolver is not whole: 'bounds'"),
    (lambda a: a.update({"hypersolver.enter.weight": np.zeros((48, 12), np.float16)}), "must have shape"),
    (lambda a: a.update({"hypersolver.other": np.zeros(3)}), "other has shape .3.: it must be"),
    (lambda a: a.update({"hypersolver.counts": np.array([0])}), "must be from 1 to 1000"),
    (lambda a: a["hypersolver.enter.bias"].__setitem__(0, np.nan), "1 values that are not finite"),
    (lambda a: a["hypersolver.enter.bias"].__setitem__(0, np.inf), "1 values that are not finite"),
    (lambda a: a.update({"hypersolver.bounds": -BOUNDS}), "the lowest and the highest"),
    (lambda a: a.update({"hypersolver.end": np.zeros(6)}), "end has shape .6.: it must be .4."),
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
