"""`python dev/benchmark.py gpu`, as far as a CPU can tell: what a step asks of a device."""
from __future__ import annotations

import functools
import re

import pytest
import torch

import card
from problems import ADAPTIVE
from samplers import SAMPLERS

NOISY = [name for name, sampler in SAMPLERS.items() if sampler.draws]
SHORT = (4, 8, 8)


@functools.cache
def both(name: str) -> tuple[card.Cost, card.Cost]:
    x = card.noise(SHORT, "cpu", torch.float32)
    return card.cost(card.ours(name, "cpu"), x), card.cost(card.theirs(name, "cpu"), x)


def test_every_sampler_has_an_equal_of_comfyui_s() -> None:
    assert card.EQUALS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_device_and_a_run_does_so_twice(name: str) -> None:
    """For its schedule, and to see whether all was finite. An adaptive step needs its error estimate."""
    own, core = both(name)
    assert own.waits <= core.waits
    if name not in ADAPTIVE:
        assert own.waits == 0 and own.run == 2


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in NOISY])
def test_a_step_launches_no_more_than_comfyui_s(name: str) -> None:
    own, core = both(name)
    assert 3 <= own.launches <= core.launches


def test_noise_that_is_a_function_of_time_takes_less_than_comfyui_s_own() -> None:
    """SDEs of ComfyUI's that draw from a Brownian path, as all of ours do."""
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        own, core = both(name)
        assert own.launches < core.launches / 2


def test_reads_of_numbers_are_seen() -> None:
    x = torch.ones(3)
    for read in (lambda: x.tolist(), lambda: float(x[0]), lambda: bool(x[0] > 0), lambda: x.cpu(),
                 lambda: x.numpy(), lambda: x.max().item()):
        assert card.work(read, "cpu").waits == 1
    assert card.work(lambda: (x * 2).add_(x).view(3, 1), "cpu") == (2, 0)


def test_without_a_card_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here.*--device cpu"):
        card.report("cuda")


def test_the_dry_run_makes_the_table(monkeypatch, capsys) -> None:
    monkeypatch.setattr(card, "SAMPLERS", {"dpmpp_2m": SAMPLERS["dpmpp_2m"]})
    monkeypatch.setattr(card, "hosted", lambda device: "")  # two servers
    card.report("cpu")
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.startswith("| dpmpp_2m ")]
    assert row.count("|") == out.splitlines()[4].count("|") == 11
    assert "no card was used" in out and "noise on the CPU and on the card: needs a card. Open" in out


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_solver_is_timed_in_bfloat16_too(name: str) -> None:
    """Its tolerance must not be finer than what the model's answers are exact to."""
    x = card.noise(SHORT, "cpu", torch.bfloat16)
    assert min(card.milliseconds([card.ours(name, "cpu"), card.theirs(name, "cpu")], x, 1)) > 0.0


def test_the_emoji_model_is_measured_in_bfloat16_as_in_float32() -> None:
    """In two servers, as the command does it in the end."""
    told = card.hosted("cpu")
    apart = [float(number) for number in re.findall(r"(?:[lsb] |8 steps, )([\d.e-]+)", told)]
    assert len(apart) == 4 and 0.0 < max(apart) < 0.05 and told.endswith("needs a card. Open"), told
