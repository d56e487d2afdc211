"""The noise of stochastic solvers: the same image alone, in any batch, on any schedule; and the right distribution."""
from __future__ import annotations

import pytest
import torch

from problems import Gaussian, sigmas_between
from samplers import PATHS, SAMPLERS, k_diffusion_sampler
from samplers.noise import BrownianNoise

STOCHASTIC = [name for name in SAMPLERS if "eta" in SAMPLERS[name].options]
EVERY_STOCHASTIC = pytest.mark.parametrize("name", STOCHASTIC)


def run(name: str, x, sigmas, seed: int | None, path: str = "ve", **options):
    return k_diffusion_sampler(name, path, **options)(Gaussian(path), x, sigmas, disable=True,
                                                      extra_args={} if seed is None else {"seed": seed})


@EVERY_STOCHASTIC
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_image_k_is_the_same_alone_and_in_any_batch(name: str, path: str) -> None:
    sigmas = torch.tensor([14.6, 5.0, 1.0, 0.3, 0.0] if path == "ve" else [1.0, 0.9, 0.6, 0.2, 0.0])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * float(sigmas[0])
    batch = run(name, x, sigmas, seed=11, path=path)
    for k in range(4):
        torch.testing.assert_close(run(name, x[k:k + 1], sigmas, seed=11 + k, path=path), batch[k:k + 1], rtol=0, atol=1e-6)


@EVERY_STOCHASTIC
def test_the_seed_decides(name: str) -> None:
    x, sigmas = torch.ones(1, 3, 8, 8) * 5, torch.tensor([5.0, 1.0, 0.3, 0.0])
    assert torch.equal(run(name, x, sigmas, 1), run(name, x, sigmas, 1))
    assert not torch.equal(run(name, x, sigmas, 1), run(name, x, sigmas, 2))
    assert run(name, x, sigmas, 2**64 - 1).isfinite().all()
    torch.manual_seed(4)
    first = run(name, x, sigmas, None)
    assert not torch.equal(first, run(name, x, sigmas, None))
    torch.manual_seed(4)
    assert torch.equal(first, run(name, x, sigmas, None))


def test_increments_have_unit_variance_and_those_of_disjoint_intervals_are_independent() -> None:
    noise = BrownianNoise(torch.zeros(1, 200_000), seed=0)
    level = PATHS["ve"].level
    parts = [noise(level(a), level(b)) for a, b in ((80.0, 10.0), (10.0, 9.5), (9.5, 0.4), (0.4, 0.002))]
    for i, a in enumerate(parts):
        assert abs(float(a.std()) - 1) < 0.01 and abs(float(a.mean())) < 0.01
        assert all(abs(float((a * b).mean())) < 0.01 for b in parts[:i])


def test_a_finer_schedule_adds_up_to_the_coarser_one() -> None:
    noise, at = BrownianNoise(torch.zeros(1, 1000), seed=3), PATHS["flow"].at
    whole = noise(at(-2.0), at(1.0)) * 3**0.5
    parts = noise(at(-2.0), at(-1.25)) * 0.75**0.5 + noise(at(-1.25), at(1.0)) * 2.25**0.5
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    fresh = BrownianNoise(torch.zeros(1, 1000), seed=3)  # the order of questions does not matter
    torch.testing.assert_close(fresh(at(-1.25), at(1.0)), noise(at(-1.25), at(1.0)), rtol=0, atol=1e-6)


def test_a_step_too_short_for_the_noise_is_refused() -> None:
    noise, at = BrownianNoise(torch.zeros(1, 10), seed=3), PATHS["ve"].at
    with pytest.raises(ValueError, match="too short for its noise.*fewer steps"):
        noise(at(0.0), at(0.0001))


@EVERY_STOCHASTIC
def test_a_finer_schedule_refines_the_same_image(name: str) -> None:
    """Strong convergence: the distance to a far finer run of the same seed falls with the step."""
    x = torch.randn(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9
    runs = {n: run(name, x, sigmas_between(-2.2, 3.0, n, "ve"), seed=5) for n in (20, 40, 80, 640)}
    errors = [float((runs[n] - runs[640]).square().mean().sqrt()) for n in (20, 40, 80)]
    assert errors[1] < 0.75 * errors[0] and errors[2] < 0.75 * errors[1]
    assert errors[2] < 0.2 * float(runs[640].std())


@EVERY_STOCHASTIC
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_the_result_is_distributed_as_the_data(name: str, eta: float, path: str) -> None:
    """Weak convergence on N(0.7, 0.4^2), many elements of one item standing for many samples."""
    start = PATHS[path].at(-2.2)
    x = start.alpha * 0.7 + (start.alpha**2 * 0.16 + start.sigma**2) ** 0.5 * torch.randn(
        1, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = run(name, x, sigmas_between(-2.2, 4.0, 120, path), seed=9, path=path, eta=eta) / PATHS[path].at(4.0).alpha
    assert abs(float(result.mean()) - 0.7) < 0.02
    assert abs(float(result.std()) - 0.4) < (0.03 if name == "dpmpp_sde" else 0.015)


def test_ve_and_flow_share_the_noise_of_a_seed() -> None:
    ve, flow = (BrownianNoise(torch.zeros(1, 50), seed=3) for _ in range(2))
    a = ve(PATHS["ve"].at(-1.0), PATHS["ve"].at(0.5))
    torch.testing.assert_close(a, flow(PATHS["flow"].at(-1.0), PATHS["flow"].at(0.5)), rtol=0, atol=1e-5)


def test_a_negative_or_missing_item_never_shares_noise() -> None:
    noise = BrownianNoise(torch.zeros(3, 1000), seed=7)
    xi = noise(PATHS["ve"].at(-1.0), PATHS["ve"].at(0.5))
    assert max(abs(float((xi[0] * xi[k]).mean())) for k in (1, 2)) < 0.15
