"""What a model is given and what it may answer, for everything that asks it: runs, and the three ways of
measuring."""
from __future__ import annotations

import math

import pytest
import torch

from problems import FIXED, Gaussian, needed
from samplers import SAMPLERS, estimate_statistics, fit_amed, k_diffusion_sampler, nfe, refit_multistep
from samplers.schedule import VarianceExploding
from samplers.learning.storage import Partial
from test_calibrate import mixture, noise
from test_fitted import calibration

SIGMAS = [14.6, 5.0, 1.5, 0.5, 0.1, 0.0]


@pytest.fixture(scope="module")
def measured():
    return calibration()


def sampled(model, x):
    return k_diffusion_sampler("dpmpp_2m")(model, x, torch.tensor(SIGMAS), disable=True)


MEASURING = {
    "estimate_statistics": lambda model, x, measured, **how: estimate_statistics(
        model, x, [14.6, 0.03], fitted=True, **how),
    "fit_amed": lambda model, x, measured, **how: fit_amed(model, x, SIGMAS, **how),
    "refit_multistep": lambda model, x, measured, **how: refit_multistep(model, x, measured, 5, **how),
}


def spoiled(model, call: int, value: float):
    """The model, one element of whose call-th answer is another."""
    calls = []

    def answer(x, sigma, **extra):
        calls.append(None)
        denoised = model(x, sigma).clone()
        if len(calls) == call:
            denoised.view(-1)[7] = value
        return denoised

    return answer


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 2, 15])
@pytest.mark.parametrize("name", MEASURING)
def test_an_answer_that_is_not_finite_ends_the_measuring_where_it_came_and_is_not_kept(
        name, call, bad, measured, tmp_path) -> None:
    measure, x = MEASURING[name], noise(4, seed=3)
    with pytest.raises(FloatingPointError,
                       match=r"NaN or infinite values at sigma = [\d.]+: run it in a higher precision"):
        measure(spoiled(mixture(), call, bad), x, measured, partial=tmp_path / "x.part")
    kept = measure(mixture(), x, measured, partial=tmp_path / "x.part")
    plain = measure(mixture(), x, measured)
    for what in ("table", "l", "s", "damping", "root"):
        if hasattr(plain, what):
            torch.testing.assert_close(torch.tensor(getattr(kept, what)), torch.tensor(getattr(plain, what)),
                                       rtol=1e-9, atol=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fit_amed", "refit_multistep"])
def test_where_new_numbers_are_tried_such_an_answer_says_that_they_are_bad(name: str, measured) -> None:
    """Wherever it comes, it ends the measuring or leaves a result that is better than nothing learned."""
    ended = []
    for call in range(46, 120, 3):
        try:
            found = MEASURING[name](spoiled(mixture(), call, math.nan), noise(6, seed=3), measured)
        except FloatingPointError:
            ended.append(call)
            continue
        if name == "fit_amed":
            before, after = (found.about["losses"][what]["training"][-1] for what in ("untrained", "trained"))
        else:
            before, after = found.about["refits"]["5"]["training"]
        assert after < before
    assert 0 < len(ended) < 24


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (3, 4, 4), (1, 3, 4, 4)])
@pytest.mark.parametrize("name", MEASURING)
def test_an_answer_of_another_shape_is_refused_though_it_would_broadcast(name: str, shape: tuple,
                                                                         measured) -> None:
    with pytest.raises(ValueError, match=r"the model returned shape .* for x of shape \[4, 3, 4, 4\]"):
        MEASURING[name](lambda x, sigma: torch.zeros(shape, dtype=x.dtype),
                        noise(4)[:, :, :4, :4].expand(4, 3, 4, 4), measured)


@pytest.mark.parametrize("x", [
    torch.zeros(2, 3, 4, 4, dtype=torch.int64),
    torch.ones(2, 3, 4, 4, dtype=torch.bool),
    torch.zeros(0, 3, 4, 4),
    torch.tensor(1.0)
], ids=["int", "bool", "no image", "a number"])
@pytest.mark.parametrize("name", ["estimate_statistics", "fit_amed", "refit_multistep", "sampled"])
def test_what_are_no_latents_is_refused(name: str, x: torch.Tensor, measured) -> None:
    run = {**MEASURING, "sampled": lambda model, x, measured: sampled(model, x)}[name]
    with pytest.raises(
            ValueError, match=
            r"x has (dtype torch.(int64|bool): give latents in a floating dtype|shape .*: give at least one)"
    ):
        run(Gaussian(), x, measured)


@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_numbers_are_sigmas_too(name: str) -> None:
    x = noise(2).float()
    results = [
        k_diffusion_sampler(name, **needed(name))(Gaussian(), x, torch.tensor([14, 6, 2, 0], dtype=dtype),
                                                  {"seed": 1}, disable=True)
        for dtype in (torch.int64, torch.float32)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_of_one_level_has_no_step(name: str, path: str) -> None:
    x = noise(2)
    for sigma in (1.0, 0.5):
        assert torch.equal(
            k_diffusion_sampler(name, path, **needed(name))(None, x, torch.tensor([sigma]), disable=True), x)


def test_a_number_in_quotes_is_no_number_of_steps() -> None:
    with pytest.raises(ValueError, match="steps = '5': give a whole number of intervals, or the sigmas"):
        nfe("dpmpp_2m", "5")


@pytest.mark.parametrize("name", [name for name in FIXED if SAMPLERS[name].family == SAMPLERS["amed"].family])
def test_planning_takes_four_times_as_long_for_four_times_the_steps(name: str, monkeypatch) -> None:
    """KSampler's steps end at 10000. What is counted is the levels that are made, not seconds."""
    made, plain = [], VarianceExploding.at
    monkeypatch.setattr(VarianceExploding, "at", lambda self, lam: made.append(lam) or plain(self, lam))
    counts = []
    for steps in (50, 200):
        made.clear()
        nfe(name, steps)
        counts.append(len(made))
    assert counts[1] <= 4.1 * counts[0]


@pytest.mark.parametrize("name", MEASURING)
def test_a_partial_file_that_cannot_be_written_is_one_warning(name: str, measured, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    seconds = {"partial_seconds": 0.0} if name == "estimate_statistics" else {}
    caplog.clear()
    MEASURING[name](mixture(), noise(4), measured, partial=tmp_path / "file" / "x.part", **seconds)
    assert ["cannot be written" in record.message for record in caplog.records] == [True]


def test_nor_does_it_hide_why_the_measuring_was_cut_short(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FloatingPointError):
        estimate_statistics(spoiled(mixture(), 9, math.nan), noise(2), [14.6, 0.03],
                            partial=tmp_path / "file" / "x.part")
    assert len(caplog.records) == 1


def test_a_partial_file_that_cannot_be_removed_is_left(tmp_path) -> None:
    (tmp_path / "x.part").mkdir()
    (tmp_path / "x.part" / "y").write_text("")
    Partial(tmp_path / "x.part", "k 1", torch.zeros(1), {}, 0.0).remove()
