"""The estimation of statistics, against exact ones; cancelled, killed, resumed; in half precision."""
from __future__ import annotations

import math
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from problems import Gaussian, Mixture, gaussian_statistics, starting_noise
from processes import EVERY_PLACE, IN_PLACE, KILLED, NEEDS_FORK, copy, ended, kill_within_write, slow
from samplers import PATHS, Statistics, estimate_statistics, fit_amed, k_diffusion_sampler, refit_multistep
from samplers.learning import measure
from samplers.learning.measure import nodes
from samplers.model import PROBE, UnsteadyModel

ENDS = {"ve": [14.6, 0.03], "flow": [1.0, 0.97, 0.03], "vp": [0.998, 0.03]}


def mixture(seed: int = 0, path: str = "ve") -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(12, 48, generator=generator, dtype=torch.float64) * 0.7
    return Mixture(means, torch.full((12, ), 0.15, dtype=torch.float64),
                   torch.ones(12, dtype=torch.float64) / 12, path)


def noise(k: int, sigma: float = 14.6, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(k, 3, 4, 4, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).to(dtype) * sigma


@pytest.mark.parametrize("path", PATHS)
def test_the_statistics_of_a_gaussian_are_the_exact_ones_on_every_path(path: str) -> None:
    x = starting_noise((8, 3, 8, 8), ENDS[path][0], path)
    found = estimate_statistics(Gaussian(path), x, ENDS[path], intervals=80, path=path)
    exact = gaussian_statistics()
    for name, tolerance in (("l", 1e-4), ("s", 1e-9), ("b", 1e-3)):
        inner = slice(1, -1)  # one-sided differences at the ends are of lower order
        assert np.abs(found.at(name, found.lam) - exact.at(name, found.lam))[inner].max() < tolerance, name


@pytest.mark.parametrize("pool", ["all", "channel"])
def test_s_and_b_are_the_least_squares_of_f_s_slope_and_s_alone_those_without_b(pool: str) -> None:
    grid = [PATHS["ve"].at(lam) for lam in (0.0, 0.1, 0.2)]
    f = [2.0 + noise(5, 1.0, seed) for seed in range(3)]
    kept = {f"f.{k}": value for k, value in enumerate(f)}
    measure._regress(kept, grid, 2, measure.POOLS[pool])
    slope = (f[2] - f[0]) / 0.2
    for channels in ([0, 1, 2],) if pool == "all" else ([0], [1], [2]):
        x, y = (v[:, channels].reshape(-1, 1) for v in (f[1], slope))
        s, b = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), y).solution.flatten()
        for name, value in (("s", s), ("b", b), ("s_alone", torch.linalg.lstsq(x, y).solution[0, 0])):
            found = kept[f"{name}.1"].expand(1, 3, 1, 1)[0, channels, 0, 0]
            torch.testing.assert_close(found, value.expand_as(found))


def test_statistics_belong_to_the_model_not_to_the_path() -> None:
    ratios = [10.0, 0.05]
    x = noise(16, 10.0)
    ve = estimate_statistics(mixture(), x, ratios, intervals=20)
    flow = estimate_statistics(mixture(path="flow"), x / 11.0, [r / (1 + r) for r in ratios], intervals=20,
                               path="flow")
    for name in ("l", "s", "b", "s_alone"):
        assert np.allclose(getattr(ve, name), getattr(flow, name), atol=1e-6)


def test_the_definitions_hold_for_a_mixture_by_automatic_differentiation() -> None:
    """l from the exact Jacobian's diagonal on the same trajectory, at one node."""
    model, sigma = mixture(), 2.0
    y = noise(64, sigma, seed=3) + model.means[torch.arange(64) % 12].reshape(-1, 3, 4, 4)

    def denoise(flat):
        return model(flat.reshape(1, 3, 4, 4), torch.full((1,), sigma, dtype=torch.float64)).reshape(-1)

    exact = 1 - float(
        torch.stack([torch.autograd.functional.jacobian(denoise, v.reshape(-1)).diagonal().mean()
                     for v in y]).mean())
    found = estimate_statistics(model, y.repeat(16, 1, 1, 1), [sigma, 0.5], intervals=4)
    assert found.l[0] == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("pool", ["all", "channel", "none"])
def test_pooling_keeps_the_axes_it_says(pool: str) -> None:
    found = estimate_statistics(mixture(), noise(8), [14.6, 0.03], intervals=8, pool=pool)
    assert found.l.shape == {"all": (9,), "channel": (9, 3, 1, 1), "none": (9, 3, 4, 4)}[pool]
    result = k_diffusion_sampler("dpm_solver_v3", statistics=found)(mixture(), noise(2),
                                                                    torch.tensor([14.6, 2.0, 0.3, 0.0]),
                                                                    disable=True)
    assert result.isfinite().all()


def test_the_grid_takes_the_model_s_own_levels_where_it_has_enough() -> None:
    table = torch.exp(torch.linspace(np.log(14.6), np.log(0.03), 1000)).tolist()
    seen = []

    def model(x, sigma):
        seen.append(float(sigma[0]))
        return Gaussian()(x, sigma)

    found = estimate_statistics(model, noise(2), table, intervals=40)
    assert len(found.lam) == 41 and all(min(abs(s - t) for t in table) < 1e-9 for s in seen[PROBE:])
    assert found.about["evaluations"] == len(seen) == 82 + PROBE
    assert np.diff(found.lam).std() < 0.02
    assert [len(nodes(ENDS["flow"], 10, PATHS["flow"])),
            nodes(ENDS["flow"], 10, PATHS["flow"])[0].sigma] == [12, 1.0]


def test_progress_counts_every_evaluation_and_more_samples_are_drawn_like_the_first() -> None:
    seen, batches = [], set()

    def model(x, sigma):
        batches.add(len(x))
        return Gaussian("flow")(x, sigma)

    found = estimate_statistics(model, noise(2, 1.0), ENDS["flow"], intervals=6, path="flow", samples=5,
                                progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 19) for k in range(1, 20)] and batches == {5} and found.about["samples"] == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_pooled_statistics_agree_to_two_percent(dtype) -> None:
    """A denoiser that rounds its input and its output as a network in half precision does."""
    model = mixture()

    def rounding(x, sigma):
        scale = (1 + sigma.double() ** 2).sqrt().reshape(-1, 1, 1, 1)
        seen = (x.double() / scale).to(dtype).double() * scale                   # the network's input
        eps = ((seen - model(seen, sigma.double())) / sigma.double().reshape(-1, 1, 1, 1)).to(dtype).double()
        return x.double() - sigma.double().reshape(-1, 1, 1, 1) * eps            # its output

    x = noise(512)
    exact = estimate_statistics(model, x, [14.6, 0.1], intervals=24)
    half = estimate_statistics(rounding, x.float(), [14.6, 0.1], intervals=24, precision=dtype)
    assert np.abs(half.l - exact.l).max() < 0.02
    assert np.sqrt(np.mean((half.l - exact.l) ** 2)) < 0.01


def test_default_effort_is_within_a_tenth_of_sixteen_times_as_much() -> None:
    """The solver's error with default statistics, and with those of 16 times as many trajectories."""
    model = mixture()
    x = noise(256, seed=9)
    sigmas = torch.tensor([14.6 * (0.03 / 14.6) ** (i / 8) for i in range(9)], dtype=torch.float64)
    exact = k_diffusion_sampler("dpmpp_3s")(model, x, torch.tensor(
        [14.6 * (0.03 / 14.6) ** (i / 800) for i in range(801)], dtype=torch.float64), disable=True)
    errors = []
    for samples in (128, 16 * 128):  # 48 elements each: as many as the nodes' default
        statistics = estimate_statistics(model, noise(samples, seed=1), [14.6, 0.03])
        assert statistics.about["evaluations"] <= 100
        result = k_diffusion_sampler("dpm_solver_v3", statistics=statistics)(model, x, sigmas, disable=True)
        errors.append(float((result - exact).square().mean().sqrt()))
    assert errors[0] < 1.1 * errors[1]


def test_a_cancelled_estimation_goes_on_where_it_was(tmp_path) -> None:
    partial = tmp_path / "x.part"
    expected = estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=12)

    class Cancelled(Exception):
        pass

    def cancel_at(k: int):
        def progress(done: int, total: int) -> None:
            if done == k:
                raise Cancelled
        return progress

    counts = []
    for stop in (7, 12, 19):
        with pytest.raises(Cancelled):
            estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=12, partial=partial,
                                progress=cancel_at(stop))
        assert [p.name for p in tmp_path.iterdir()] == ["x.part"]
    found = estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=12, partial=partial,
                                progress=lambda done, total: counts.append(done))
    assert counts[:PROBE] == [1, 2, 3, 4] and counts[PROBE] > 16 and counts[-1] == 30 and list(
        tmp_path.iterdir()) == []
    for name in ("l", "s", "b", "s_alone"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


OTHER = {
    "noise": {"x": noise(4, seed=7)}, "model": {"model": mixture(1)}, "seed": {"seed": 1},
    "range": {"sigmas": [14.6, 0.1]}, "precision": {"precision": torch.float32},
    "description": {"about": {"model": "other"}}, "nothing": {}
}


@pytest.mark.parametrize("other", [*OTHER, "damaged"])
def test_what_was_kept_of_another_estimation_is_not_taken_up(tmp_path, other: str) -> None:
    """Of other noise, another model, other settings; and of the same it is."""
    def run(stop: int = 0, **changes) -> tuple[Statistics | None, list[int]]:
        counts: list[int] = []

        def progress(done: int, total: int) -> None:
            counts.append(done)
            if done == stop:
                raise KeyboardInterrupt

        how = {
            "model": mixture(), "x": noise(4), "sigmas": [14.6, 0.03], "intervals": 6, "progress": progress,
            **changes
        }
        try:
            return estimate_statistics(**how), counts
        except KeyboardInterrupt:
            return None, counts

    partial = tmp_path / "x.part"
    run(12, partial=partial)
    if other == "damaged":
        partial.write_bytes(partial.read_bytes()[:100])
    found, counts = run(partial=partial, **OTHER.get(other, {}))
    taken_up = counts != list(range(1, 19))
    assert taken_up == (other == "nothing")
    expected, _ = run(**OTHER.get(other, {}))
    for name in ("l", "s", "b", "s_alone"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


@NEEDS_FORK
@EVERY_PLACE
def test_an_estimation_killed_within_a_write_goes_on_from_what_was_kept(tmp_path, place: str) -> None:
    partial, counts = tmp_path / "x.part", []
    expected = estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=12)

    def until_killed(write: int) -> None:
        kill_within_write(write, place)
        estimate_statistics(slow(mixture()), noise(4), [14.6, 0.03], intervals=12, partial=partial)

    for write in (3, 2, 4):
        assert ended(copy(lambda: until_killed(write))) == KILLED
        left = [path for path in tmp_path.iterdir() if path != partial]
        assert len(left) == (place != IN_PLACE)  # the kill came within a write
        for path in left:
            path.unlink()
    found = estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=12, partial=partial,
                                progress=lambda done, total: counts.append(done))
    assert counts[PROBE] > 8 and counts[-1] == 30 and list(tmp_path.iterdir()) == []
    for name in ("l", "s", "b", "s_alone"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


@NEEDS_FORK
def test_an_estimation_killed_at_any_moment_leaves_nothing_that_loads_wrongly_and_goes_on(tmp_path) -> None:
    path, partial, chance = tmp_path / "x.safetensors", tmp_path / "x.part", random.Random(0)
    expected = estimate_statistics(mixture(), noise(8), [14.6, 0.03], intervals=60)

    def work() -> None:
        estimate_statistics(mixture(), noise(8), [14.6, 0.03], intervals=60, partial=partial,
                            partial_seconds=0.0).save(path, overwrite=True)

    def of_the_exact(found: Statistics) -> None:
        for name in ("l", "s", "b"):
            assert np.allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)

    ends = []
    while len(ends) < 10 or ends.count(KILLED) < 3:
        process = copy(work)
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(process, signal.SIGKILL)
        ends.append(ended(process))
        if path.exists():
            of_the_exact(Statistics.load(path))
            path.unlink()
    assert ended(copy(work)) == 0
    of_the_exact(Statistics.load(path))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["x.safetensors"]


# --- caches -------------------------------------------------------------------------------------------------

class Cache:
    """A wrapper that answers in a model's place where sigma is nearly what it was: from x and what the model
    added to it, or what it said, or (as block caches do) from an inner part of the model kept while the rest
    is computed."""

    def __init__(self, model, keeps: str, window: tuple[float, float] = (0.0, math.inf),
                 every: int = 0) -> None:
        self.model, self.keeps, self.window, self.every = model, keeps, window, every
        self.sigma, self.calls, self.served = math.nan, 0, 0

    def __call__(self, x, sigma):
        now, self.calls = float(sigma[0]), self.calls + 1
        near = self.calls % self.every if self.every else abs(now / self.sigma - 1) < 0.1
        inside = self.window[0] <= now <= self.window[1]
        self.sigma = now
        if not (near and inside and hasattr(self, "x")):
            self.x, self.answer = x, self.model(x, sigma)
            return self.answer
        self.served += 1
        return {
            "answer": self.answer, "residual": x + (self.answer - self.x),
            "noise": x - now * (self.x - self.answer) / now,
            "velocity": x / (1 + now**2) + self.answer - self.x / (1 + now**2),
            "inner": self.answer + 0.3 * (self.model(x, sigma) - self.answer)
        }[self.keeps]


@pytest.mark.parametrize("what", ["statistics", "amed", "refit"])
@pytest.mark.parametrize(
    "cache", [{"keeps": "residual"}, {"keeps": "answer"}, {"keeps": "noise"}, {"keeps": "velocity"},
              {"keeps": "inner"}, {"keeps": "residual", "window": (0.1, 5.0)},
              {"keeps": "answer", "window": (0.1, 5.0)}, {"keeps": "residual", "every": 2}])
def test_a_cache_is_refused_before_anything_is_measured_through_it(cache: dict, what: str) -> None:
    cached = Cache(mixture(), **cache)
    found = estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=8, fitted=True)
    measure = {"statistics": lambda: estimate_statistics(cached, noise(4), [14.6, 0.03], intervals=8),
               "amed": lambda: fit_amed(cached, noise(4), [14.6, 2.0, 0.4, 0.03]),
               "refit": lambda: refit_multistep(cached, noise(4), found, 4)}[what]
    with pytest.raises(UnsteadyModel,
                       match="the model does not answer for itself: .* switch it off while measuring"):
        measure()
    assert cached.served and cached.calls == PROBE


def test_a_cache_that_only_begins_to_answer_later_is_refused_on_the_way() -> None:
    """One that needs some calls to know the model by."""
    late = Cache(mixture(), "residual")

    def model(x, sigma):
        late.sigma = late.sigma if late.calls > 6 else math.nan
        return late(x, sigma)

    with pytest.raises(UnsteadyModel, match="moves exactly as x does"):
        estimate_statistics(model, noise(4), [14.6, 0.03], intervals=24)
    assert late.calls < 12


def test_a_model_that_answers_at_random_is_refused() -> None:
    with pytest.raises(UnsteadyModel, match="two answers to the same x"):
        estimate_statistics(lambda x, sigma: mixture()(x, sigma) + 1e-5 * torch.randn_like(x), noise(4),
                            [14.6, 0.03])
    with pytest.raises(UnsteadyModel, match="jumps when x hardly moves"):
        estimate_statistics(lambda x, sigma: mixture()(x, sigma) + 0.1 * torch.randn_like(x), noise(4),
                            [14.6, 0.03])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.4, 2.0])
@pytest.mark.parametrize("ends", [[14.6, 0.03], [80.0, 0.002], [700.0, 0.03]])
def test_true_denoisers_are_not_taken_for_caches(dtype, spread: float, ends: list) -> None:
    """Constant ones, linear ones; near sigma = 0, where D is nearly x, and at high sigma, where it hardly
    moves."""
    if spread == 0.05 and ends[0] > 99 and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("less than its rounding")
    model = Gaussian(mean=0.5, spread=spread)
    x = noise(2, ends[0], dtype=dtype)
    assert np.isfinite(estimate_statistics(model, x, ends, intervals=24).l).all()


# --- half precision -----------------------------------------------------------------------------------------

def only(dtype, model):
    """A model that works in one dtype, and takes no other, as networks do."""
    def asked(x, sigma):
        assert x.dtype == sigma.dtype == dtype
        return model(x.double(), sigma.double()).to(dtype)
    return asked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_measured_refitted_and_trained(dtype) -> None:
    exact = estimate_statistics(mixture(), noise(64), [14.6, 0.1], fitted=True)
    half = estimate_statistics(only(dtype, mixture()), noise(64, dtype=dtype), [14.6, 0.1], fitted=True)
    assert half.about["precision"] == str(dtype)
    assert np.sqrt(np.mean((half.l - exact.l) ** 2)) < 0.05
    refitted = refit_multistep(only(dtype, mixture()), noise(6, dtype=dtype), half, 4)
    assert np.isfinite(refitted.about["refits"]["4"]["training"]).all()
    trained = fit_amed(only(dtype, mixture()), noise(6, dtype=dtype), [14.6, 2.0, 0.4, 0.1])
    losses = trained.about["losses"]
    assert losses["trained"]["training"][-1] < losses["untrained"]["training"][-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pool": "space"}, "pool = 'space' is out of range"),
     ({"intervals": 3}, "intervals = 3 is out of range"), ({"samples": 0}, "samples = 0 is out of range"),
     ({"path": "edm"}, "unknown path"),
     ({"precision": torch.float8_e4m3fn
       }, "precision = torch.float8_e4m3fn is out of range: .* one of float64, float32, float16, bfloat16"),
     ({"sigmas": [1.0]}, "has 1 levels inside the path"), ({"sigmas": [1.0, -1.0]}, "negative")])
def test_bad_arguments_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_statistics(Gaussian(), noise(2), **{"sigmas": [14.6, 0.03], **changes})
