"""Dynamic thresholding and the static clamp, and the node that wraps any sampler in them."""
from __future__ import annotations

import asyncio

import pytest
import torch

from comfy_host import Model, comfy_sampling, pack, sampling_of
from problems import reference_mixture
from samplers.denoisers import threshold

WIDE = torch.randn(3, 4, 10, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [0.2, 1.0, 5.0]).view(3, 1, 1, 1)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_it_is_imagen_s_equation(quantile: float) -> None:
    """With the quantile of that rank; numpy's is on either side of it."""
    result = threshold(WIDE, quantile, 1.0)
    for image, found in zip(WIDE, result):
        bound = max(1.0, float(image.abs().flatten().quantile(quantile, interpolation="lower")))
        above = max(1.0, float(image.abs().flatten().quantile(quantile, interpolation="higher")))
        closest = min((image.clamp(-s, s) / s - found).abs().max() for s in (bound, above))
        assert closest < 1e-6 and found.abs().max() <= 1.0


def test_an_image_within_the_bounds_is_left_as_it_is_and_each_is_judged_by_itself() -> None:
    result = threshold(WIDE, 0.995, 1.0)
    assert torch.equal(result[:1], WIDE[:1]) and not torch.equal(result[2:], WIDE[2:])
    for k in range(3):
        assert torch.equal(threshold(WIDE[k:k + 1], 0.995, 1.0), result[k:k + 1])


@pytest.mark.parametrize("floor", [0.01, 0.7, 3.0])
def test_with_quantile_0_it_is_the_clamp_even_where_all_is_beyond(floor: float) -> None:
    for image in (WIDE, WIDE.sign() * (1.0 + WIDE.abs())):
        expected = image.clamp(-floor, floor)
        torch.testing.assert_close(threshold(image, 0.0, floor), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (1, 4, 2, 8, 8)])
def test_shapes_and_precisions_are_kept_and_no_number_is_asked_of_the_device(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = torch.full(shape, 2.0, dtype=dtype)
        assert threshold(given, 0.995, 1.0).dtype == dtype and given.eq(2.0).all()
        assert threshold(given, 0.995, 1.0).eq(1.0).all()
    assert threshold(torch.empty(shape, device="meta"), 0.995, 1.0).shape == shape


def nodes() -> dict:
    found = asyncio.run(pack().comfy_entrypoint().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in found}


def run(sampler, denoiser) -> torch.Tensor:
    x, sigmas = reference_mixture("ve")[1].float() * 14.6, torch.tensor([14.6, 2.0, 0.4, 0.0])
    return sampler.sampler_function(Model(denoiser, sampling_of("EPS")), x, sigmas, extra_args={"seed": 3},
                                    callback=None, disable=True, **sampler.extra_options)


@pytest.mark.parametrize("name", ["euler", "dpm_fast", "uni_pc", "dpmpp_2m_sde", "lambda_2m",
                                  "lambda_2m_sde"])
def test_any_sampler_takes_the_bounded_answer_for_the_model_s(name: str) -> None:
    comfy_sampling(), pack()
    import comfy.samplers
    mixture = reference_mixture("ve")[0]

    def denoiser(x, sigma, **extra):
        return mixture(x, sigma).float()

    plain = comfy.samplers.sampler_object(name)
    [wrapped] = nodes()["LambdaThreshold"].execute(plain, 0.9, 0.3).result
    expected = run(plain, lambda x, sigma, **extra: threshold(denoiser(x, sigma), 0.9, 0.3))
    assert torch.equal(run(wrapped, denoiser), expected)
    assert not torch.equal(run(plain, denoiser), expected)


def test_it_and_first_step_wrap_each_other_in_either_order() -> None:
    pack()
    import comfy.samplers
    found, plain = nodes(), comfy.samplers.sampler_object("lambda_2m")

    def bounded(sampler):
        return found["LambdaThreshold"].execute(sampler, 0.9, 0.3).result[0]

    def skipped(sampler):
        return found["LambdaFirstStep"].execute(sampler, "afs").result[0]

    mixture, calls = reference_mixture("ve")[0], []

    def denoiser(x, sigma, **extra):
        calls.append(sigma)
        return mixture(x, sigma).float()

    results = [run(sampler, denoiser) for sampler in (bounded(skipped(plain)), skipped(bounded(plain)))]
    assert torch.equal(*results) and len(calls) == 4


def test_what_is_no_ksampler_is_refused() -> None:
    with pytest.raises(ValueError, match="Threshold wraps ComfyUI's KSAMPLER, and this is a object: connect"):
        nodes()["LambdaThreshold"].execute(object(), 0.9, 1.0)
