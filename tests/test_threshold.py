"""Dynamic thresholding and the static clamp, and the node that wraps any sampler in them."""
from __future__ import annotations

import asyncio

import pytest
import torch

from comfy_host import Model, comfy_sampling, pack, sampling_of
from problems import reference_mixture
from samplers.denoisers import dynamic, static

WIDE = torch.randn(3, 4, 10, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [0.2, 1.0, 5.0]).view(3, 1, 1, 1)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_it_is_imagen_s_equation(quantile: float) -> None:
    """With the quantile of that rank; numpy's is on either side of it."""
    result = dynamic(WIDE, quantile, 1.0)
    for image, found in zip(WIDE, result):
        bound = max(1.0, float(image.abs().flatten().quantile(quantile, interpolation="lower")))
        above = max(1.0, float(image.abs().flatten().quantile(quantile, interpolation="higher")))
        closest = min((image.clamp(-s, s) / s - found).abs().max() for s in (bound, above))
        assert closest < 1e-6 and found.abs().max() <= 1.0


def test_an_image_within_the_bounds_is_left_as_it_is_and_each_is_judged_by_itself() -> None:
    result = dynamic(WIDE, 0.995, 1.0)
    assert torch.equal(result[:1], WIDE[:1]) and not torch.equal(result[2:], WIDE[2:])
    for k in range(3):
        assert torch.equal(dynamic(WIDE[k:k + 1], 0.995, 1.0), result[k:k + 1])


@pytest.mark.parametrize("bound", [0.01, 0.7, 3.0])
def test_the_static_one_is_a_clamp_to_which_a_quantile_of_nothing_comes_down(bound: float) -> None:
    for image in (WIDE, WIDE.sign() * (1.0 + WIDE.abs())):
        assert static(image, 0.9, bound).abs().max() <= bound
        torch.testing.assert_close(dynamic(image, 0.0, bound), static(image, 0.9, bound), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (1, 4, 2, 8, 8)])
def test_shapes_and_precisions_are_kept_and_no_number_is_asked_of_the_device(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = torch.full(shape, 2.0, dtype=dtype)
        assert dynamic(given, 0.995, 1.0).dtype == dtype and given.eq(2.0).all()
        assert dynamic(given, 0.995, 1.0).eq(1.0).all()
    assert dynamic(torch.empty(shape, device="meta"), 0.995, 1.0).shape == shape


def nodes() -> dict:
    found = asyncio.run(pack().comfy_entrypoint().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in found}


def run(sampler, denoiser) -> torch.Tensor:
    x, sigmas = reference_mixture("ve")[1].float() * 14.6, torch.tensor([14.6, 2.0, 0.4, 0.0])
    return sampler.sampler_function(Model(denoiser, sampling_of("EPS")), x, sigmas, extra_args={"seed": 3},
                                    callback=None, disable=True, **sampler.extra_options)


def wrapped(sampler, threshold: str = "off", cfg_pp: bool = False):
    return nodes()["LambdaOptions"].execute(sampler, threshold, 0.9, 0.3, cfg_pp).result[0]


@pytest.mark.parametrize(("threshold", "bounded"), [("dynamic", dynamic), ("static", static)])
@pytest.mark.parametrize("name", ["euler", "dpm_fast", "uni_pc", "dpmpp_2m_sde", "lambda_2m",
                                  "lambda_2m_sde"])
def test_any_sampler_takes_the_bounded_answer_for_the_model_s(name: str, threshold: str, bounded) -> None:
    comfy_sampling(), pack()
    import comfy.samplers
    mixture = reference_mixture("ve")[0]

    def denoiser(x, sigma, **extra):
        return mixture(x, sigma).float()

    plain = comfy.samplers.sampler_object(name)
    expected = run(plain, lambda x, sigma, **extra: bounded(denoiser(x, sigma), 0.9, 0.3))
    assert torch.equal(run(wrapped(plain, threshold=threshold), denoiser), expected)
    assert not torch.equal(run(plain, denoiser), expected)
    assert torch.equal(run(wrapped(plain), denoiser), run(plain, denoiser))


def test_it_goes_with_a_first_step_that_is_left_out() -> None:
    pack()
    plain = nodes()["LambdaSamplerMultistep"].execute(order=2, first_step="afs").result[0]
    mixture, calls = reference_mixture("ve")[0], []

    def denoiser(x, sigma, **extra):
        calls.append(sigma)
        return mixture(x, sigma).float()

    expected = run(plain, lambda x, sigma, **extra: dynamic(denoiser(x, sigma), 0.9, 0.3))
    assert torch.equal(run(wrapped(plain, "dynamic"), denoiser), expected) and len(calls) == 4
    assert not torch.equal(run(plain, denoiser), expected)


def test_what_cannot_be_wrapped_is_refused() -> None:
    pack()
    with pytest.raises(ValueError, match="wraps ComfyUI's KSAMPLER, and this is a object: connect"):
        wrapped(object())


class Guided(Model):
    """Two answers and a guidance, put together by ComfyUI."""

    def __init__(self, path: str, cfg: float = 0.6, negative: object = ()) -> None:
        mixture = reference_mixture(path)[0]
        super().__init__(mixture, sampling_of({"ve": "EPS", "flow": "CONST"}[path]))
        self.cfg, self.negative = cfg, negative

    def __call__(self, x, sigma, model_options={}, seed=None):
        import comfy.samplers
        answer = self.denoiser(x, sigma)
        return comfy.samplers.cfg_function(None, answer, 0.7 * answer + 0.1, self.cfg, x, sigma,
                                           model_options, (), self.negative)


def guided(sampler, path: str, **how) -> torch.Tensor:
    sigmas = torch.tensor({"ve": [14.6, 5.0, 2.0, 0.4, 0.0], "flow": [0.98, 0.9, 0.6, 0.2, 0.0]}[path])
    x = reference_mixture(path)[1].double() * sigmas[0]
    return sampler.sampler_function(Guided(path, **how), x, sigmas, {"seed": 3, "model_options": {}},
                                    callback=None, disable=True, **sampler.extra_options)


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("name", ["ours", "euler"])
def test_the_first_order_step_with_cfg_pp_is_comfyui_s_euler_cfg_pp(name: str, path: str) -> None:
    comfy_sampling(), pack()
    import comfy.samplers
    plain = (nodes()["LambdaSamplerMultistep"].execute(order=1).result[0] if name == "ours"
             else comfy.samplers.sampler_object(name))
    theirs = guided(comfy.samplers.sampler_object("euler_cfg_pp"), path)
    torch.testing.assert_close(guided(wrapped(plain, cfg_pp=True), path), theirs, rtol=0, atol=2e-5)
    assert (guided(plain, path) - theirs).abs().max() > 0.01


def test_inner_evaluations_with_cfg_pp_are_guided_as_their_step_is() -> None:
    pack()
    strengths = []

    class Told(Guided):
        def __call__(self, x, sigma, model_options={}, seed=None):
            for fn in model_options["sampler_post_cfg_function"]:
                strengths.append(float(fn({"denoised": torch.ones(1, 1), "uncond_denoised": torch.zeros(1, 1),
                                           "uncond": (), "sigma": sigma[:1]})))
            return super().__call__(x, sigma, model_options, seed)

    sampler = wrapped(nodes()["LambdaSamplerSinglestep"].execute(order=2).result[0], cfg_pp=True)
    x, sigmas = reference_mixture("ve")[1].double() * 8.0, torch.tensor([8.0, 2.0, 1.0, 0.0])
    sampler.sampler_function(Told("ve"), x, sigmas, {"model_options": {}}, callback=None, disable=True,
                             **sampler.extra_options)
    assert strengths == pytest.approx([4 / 3, 4 / 3, 2.0, 2.0, 1.0])


def test_cfg_pp_is_refused_where_it_cannot_be() -> None:
    pack()
    import comfy.samplers
    plain = comfy.samplers.sampler_object("lambda_2m")
    with pytest.raises(ValueError, match="cfg_pp needs the model's answer to the negative prompt"):
        guided(wrapped(plain, cfg_pp=True), "ve", negative=None)
    for name in ("lambda_v3", "lambda_fitted", "lambda_amed"):
        sampler = wrapped(comfy.samplers.sampler_object(name), cfg_pp=True)
        with pytest.raises(ValueError, match="cfg_pp is another guidance in every step, .* connect a sam"):
            guided(sampler, "ve")
