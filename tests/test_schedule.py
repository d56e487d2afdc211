"""The lambda adapter."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from samplers.schedule import PATHS, levels

EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@EVERY_PATH
@given(lam=st.floats(-12, 12))
def test_lam_to_sigma_and_back_is_the_identity(path, lam: float) -> None:
    there = path.at(lam)
    back = path.level(there.sigma)
    # 1 - sigma near sigma = 1 is what limits the way back: half an ulp of 1 against alpha (or alpha^2)
    assert back.lam == pytest.approx(lam, rel=1e-12, abs=1e-15 * math.exp(max(0.0, -2 * lam)) + 1e-12)
    assert there.alpha / there.sigma == pytest.approx(math.exp(lam), rel=1e-12)


def test_each_path_has_its_own_alpha() -> None:
    assert PATHS["ve"].level(14.6).alpha == 1.0
    assert PATHS["flow"].level(0.3).alpha == 0.7
    level = PATHS["vp"].level(0.6)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, abs=1e-15)


@EVERY_PATH
def test_the_clean_end_is_a_level_with_lam_plus_infinity(path) -> None:
    assert path.level(0.0) == (math.inf, 1.0, 0.0)


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_pure_noise_is_a_level_with_lam_minus_infinity(name: str) -> None:
    assert PATHS[name].level(1.0) == (-math.inf, 0.0, 1.0)


def test_flow_and_ve_have_the_same_lam_at_the_same_ratio() -> None:
    for sigma in (0.02, 0.5, 0.93, 0.999):
        assert PATHS["ve"].level(sigma / (1 - sigma)).lam == pytest.approx(PATHS["flow"].level(sigma).lam,
                                                                           abs=1e-12)


@pytest.mark.parametrize(("sigmas", "path", "message"), [
    ([], "ve", "sigmas is empty"),
    ([3.0, math.nan, 0.0], "ve", r"sigmas\[1\] = nan"),
    ([math.inf, 1.0], "ve", r"sigmas\[0\] = inf"),
    ([3.0, -0.5], "ve", r"sigmas\[1\] = -0.5 is negative"),
    ([3.0, 1.0, 2.0], "ve", r"sigmas\[2\] = 2 is above sigmas\[1\] = 1.*sort"),
    ([3.0, 1.0, 1.0, 0.0], "ve", r"sigmas\[2\] = 1 repeats sigmas\[1\] = 1.*remove"),
    ([14.6, 1.0], "flow", r"sigmas\[0\] = 14.6 is above 1.*path='ve'"),
])
def test_an_unusable_schedule_is_refused_by_value_and_remedy(sigmas, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        levels(sigmas, PATHS[path])


@pytest.mark.parametrize("shift", [1.32, 1.66, 1.83, 2.86, 2.89, 3.0, 4.03])
def test_a_shifted_flow_begins_at_one_however_its_float32_is_rounded(shift: float) -> None:
    """As ComfyUI computes shift t / (1 + (shift - 1) t): at t = 1 it is beside 1 for one shift in
    fourteen."""
    t = torch.tensor([1.0, 0.7, 0.3])
    sigmas = shift * t / (1.0 + (shift - 1.0) * t)
    first, second, _ = levels(sigmas, PATHS["flow"])
    assert (first.lam, first.alpha, first.sigma) == (-math.inf, 0.0, 1.0) and math.isfinite(second.lam)
    with pytest.raises(ValueError, match="is above 1"):
        levels([1.000001, 0.5], PATHS["flow"])
    with pytest.raises(ValueError, match="repeats"):
        levels([1.0000001, 0.9999999, 0.5], PATHS["flow"])
