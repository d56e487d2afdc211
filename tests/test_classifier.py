"""Classifier guidance: exact where the classifier is, files in guided-diffusion's layout, and the GUIDER."""
from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from comfy_host import ROOT, comfy_sampling, pack
from comfy_models import IMAGE, Network, guider, in_a_run, listed, model, part, prompt, sampled
from problems import Mixture, alpha_of, column
from samplers.classifier import (Attention, AttentionPool, Classifier, ClassifierError, Residual, count,
                                 gradient, halvings, load_classifier, shift, sinusoids)

sys.path.append(str(ROOT / "dev" / "tiny_emoji" / "training"))
from layout import layout  # noqa: E402

SMALL = dict(size=16, classes=5, width=16, mults=(1, 2), blocks=1, attention=(8,), channels=4)
PUBLISHED = {64: dict(mults=(1, 2, 3, 4), blocks=4), 128: {}, 256: dict(mults=(1, 1, 2, 2, 4, 4)),
             512: dict(mults=(0.5, 1, 1, 2, 2, 4, 4))}
"""guided-diffusion's classifiers, by their sizes."""


def mixture(path: str = "ve") -> Mixture:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    return Mixture(means, torch.linspace(0.2, 0.7, 6, dtype=torch.float64),
                   torch.linspace(1.0, 2.0, 6, dtype=torch.float64) / 9, path)


def log_p(of: Mixture, chosen: list[int], x: Tensor, sigma: Tensor) -> Tensor:
    """log p(one of the chosen components | x, sigma), exactly."""
    y, sigma = x.flatten(1), sigma[:, None]
    alpha = alpha_of(sigma, of.path)
    variance = (alpha * of.stds)**2 + sigma**2
    offset = y[:, None] - alpha[..., None] * of.means
    log = of.weights.log() - 0.5 * offset.square().sum(-1) / variance - 0.5 * y.shape[1] * variance.log()
    return log[:, chosen].logsumexp(1) - log.logsumexp(1)


def chosen_of(of: Mixture, chosen: list[int]) -> Mixture:
    weights = of.weights[chosen]
    return Mixture(of.means[chosen], of.stds[chosen], weights / weights.sum(), of.path)


@pytest.mark.parametrize("path, sigmas", [("ve", [0.03, 0.7, 14.6]), ("flow", [0.02, 0.5, 0.99]),
                                          ("vp", [0.05, 0.6, 0.998])])
def test_with_the_exact_classifier_the_guided_answer_is_the_conditional_one(path: str,
                                                                            sigmas: list[float]) -> None:
    of, chosen = mixture(path), [1, 4]
    for value in sigmas:
        sigma = torch.full((16,), value, dtype=torch.float64)
        alpha = alpha_of(sigma, path)
        noise = torch.randn(16, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        x = column(alpha, noise) * of.means[torch.arange(16) % 6] + column(sigma, noise) * noise
        with torch.inference_mode():
            grad = gradient(lambda x: log_p(of, chosen, x, sigma.clone()), x)
            guided = of(x, sigma) + shift(grad, column(sigma, x), column(alpha, x))
        expected = chosen_of(of, chosen)(x, sigma)
        scores = [(column(alpha, x) * d - x) / column(sigma, x)**2 for d in (guided, expected)]
        torch.testing.assert_close(guided, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)


def test_where_x_is_only_noise_nothing_is_added() -> None:
    sigma = torch.tensor([1.0, 0.5]).view(2, 1)
    added = shift(torch.ones(2, 3), sigma, 1.0 - sigma)
    assert torch.equal(added, torch.tensor([[0.0] * 3, [0.5] * 3]))


# --- files ------------------------------------------------------------------------------------------------


def written(path: Path, metadata: dict[str, str] | None = None, seed: int = 0, **how) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shapes = layout(**{**SMALL, **how})
    tensors = {name: torch.randn(shape, generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))
               for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"groups": "4", "head_channels": "8"} if metadata is None else metadata)
    return path


@pytest.mark.parametrize("size", PUBLISHED)
def test_guided_diffusion_s_classifiers_are_read_from_their_shapes(size: int) -> None:
    shapes = layout(size=size, classes=1000, **PUBLISHED[size])
    with torch.device("meta"):
        made = Classifier(shapes)
    assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == shapes
    assert (made.size, made.channels, made.classes, made.width) == (size, 3, 1000, 128)
    assert made.middle_block[1].heads == made.middle_block[1].qkv.in_channels // 64
    level = PUBLISHED[size].get("blocks", 2) + 1
    assert halvings(shapes, count(shapes)) == set(range(level, count(shapes), level))


def test_of_all_ways_to_halve_the_one_that_the_blocks_tell_is_taken_and_none_is_guessed() -> None:
    by_convolution = layout(**{**SMALL, "halving": "convolution", "mults": (1, 1, 1), "attention": ()})
    assert halvings(by_convolution, count(by_convolution)) == {2, 4}
    alike = layout(**{**SMALL, "mults": (1, 1), "attention": ()})
    with pytest.raises(ClassifierError, match="it cannot be told which of them halve the image"):
        halvings(alike, count(alike))


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("out", [64, 96])
def test_a_residual_block_is_that_of_comfyui_s_u_net(scales: bool, halves: bool, out: int) -> None:
    comfy_sampling()
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
    from comfy.ops import disable_weight_init
    theirs = ResBlock(64, 32, 0.0, out_channels=out, use_scale_shift_norm=scales, down=halves,
                      dtype=torch.float32, operations=disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) / 20 for name, value in
             theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = Residual({name: tuple(value.shape) for name, value in state.items()}, 32, halves)
    ours.load_state_dict(state)
    x, emb = torch.randn(2, 64, 8, 8, generator=generator), torch.randn(2, 32, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, emb), theirs(x, emb))


def test_timesteps_are_told_as_comfyui_s_u_net_is_told() -> None:
    comfy_sampling()
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
    t = torch.tensor([0.0, 17.0, 999.0])
    torch.testing.assert_close(sinusoids(t, 32), timestep_embedding(t, 32))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, [channels, places]."""
    return v @ (q.T @ k / math.sqrt(len(q))).softmax(1).T


def test_attention_has_the_published_order_of_heads() -> None:
    """Blocks: a head's q, k, v one behind the other (QKVAttentionLegacy). The pool: all q, all k, all v."""
    generator, places = torch.Generator().manual_seed(0), 9
    block, pool = Attention(16, 4, 8), AttentionPool(places + 1, 16, 5, 8)
    for parameter in (*block.parameters(), *pool.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    x = torch.randn(1, 16, 3, 3, generator=generator)
    with torch.no_grad():
        heads = block.qkv(block.norm(x.flatten(2)))[0].split(24)
        flat = torch.cat([attended(*head.split(8)) for head in heads])[None]
        torch.testing.assert_close(block(x, x), x + block.proj_out(flat).view_as(x))
        tokens = torch.cat([x.flatten(2).mean(2, keepdim=True), x.flatten(2)], 2) + pool.positional_embedding
        q, k, v = pool.qkv_proj(tokens)[0].split(16)
        flat = torch.cat([attended(*(of[h:h + 8] for of in (q, k, v))) for h in (0, 8)])[None]
        torch.testing.assert_close(pool(x), pool.c_proj(flat)[:, :, 0])


def test_a_file_is_read_and_its_classes_have_numbers_and_names(tmp_path: Path) -> None:
    names = ["cat", "dog", "owl", "fox", "bee"]
    told = {"groups": "4", "head_channels": "8", "classes": json.dumps(names)}
    found = load_classifier(written(tmp_path / "small.safetensors", told))
    logs = found(torch.randn(3, 4, 16, 16), torch.tensor([0.0, 500.0, 999.0]))
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(3))
    assert found.label("owl") == found.label(" 2 ") == 2
    for wrong in ("5", "-1", "Owl", ""):
        with pytest.raises(ValueError, match=f"label = '{wrong}': .* 0 to 4, or one of cat, dog, owl, fox"):
            found.label(wrong)
    with pytest.raises(ValueError, match="for images of 4 x 16 x 16 .* and these are 4 x 8 x 8"):
        found(torch.zeros(1, 4, 8, 8), torch.zeros(1))


FAULTS = {
    "a tensor is missing": (lambda t: t.pop("out.2.qkv_proj.bias"),
                            r"out.2.qkv_proj.bias is none and should be \[96\]"),
    "another pool": (lambda t: t.pop("out.2.positional_embedding"),
                     "out.2.positional_embedding of 2 dimensions is missing"),
    "one too many": (lambda t: t.update(head=torch.zeros(3)), r"head is \[3\] and should be none"),
    "another shape": (lambda t: t.update({"out.0.weight": torch.zeros(7)}),
                      r"out.0.weight is \[7\] and should be \[32\]"),
    "not finite": (lambda t: t["out.0.bias"].fill_(math.nan), "out.0.bias is not finite"),
    "no block": (lambda t: t.pop("input_blocks.1.0.in_layers.2.weight"), "its tensors make no network"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file
    change, message = FAULTS[name]
    path = written(tmp_path / "bad.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"groups": "4", "head_channels": "8"})
    with pytest.raises(ClassifierError, match="bad.safetensors is no classifier of guided-diffusion's layout"
                       f".*{message}"):
        load_classifier(path)


@pytest.mark.parametrize("metadata, message", [({"groups": "four"}, "cannot be read"),
                                               ({"groups": "0"}, "groups = 0"),
                                               ({"classes": "[1]"}, "a list of names"),
                                               ({"groups": "4", "classes": '["cat"]'}, "name 1 classes"),
                                               ({}, "make no network")])
def test_metadata_that_do_not_fit_are_named(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        load_classifier(written(tmp_path / "bad.safetensors", metadata))


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ClassifierError, match="weights.safetensors is no safetensors file, or was cut short"):
        load_classifier(path)
    with pytest.raises(ClassifierError, match="none.safetensors does not exist"):
        load_classifier(tmp_path / "none.safetensors")


# --- the guider -------------------------------------------------------------------------------------------


class Exact(torch.nn.Module):
    """The exact classifier of a mixture, as the guider asks it: x / sqrt(1 + sigma^2), at the model's
    timesteps."""

    def __init__(self, of: Mixture, chosen: list[int], sampling) -> None:
        super().__init__()
        self.of, self.chosen, self.sampling = of, chosen, sampling

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.sampling.sigma(t)
        full = x * column((1.0 + sigma**2).sqrt(), x)
        return log_p(self.of, self.chosen, full, sigma)[:, None]


class Epsilon(torch.nn.Module):
    """What a network would say that knows a mixture."""

    dtype = torch.float32

    def __init__(self, of: Mixture) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, timesteps: Tensor, transformer_options: dict, **more) -> Tensor:
        sigma = transformer_options["sigmas"]
        full = x * column((1.0 + sigma**2).sqrt(), x)
        return (full - self.of(full, sigma)) / column(sigma, x)


def guiding() -> types.ModuleType:
    return part("nodes.guiding")


def led(patcher, classifier, label: int = 0, scale: float = 1.0, cfg: float = 1.0, positive=None):
    made = guiding().ClassifierGuider(patcher, classifier, label, scale)
    made.set_conds(positive or [[None, {}]], [[None, {}]])
    made.set_cfg(cfg)
    return made


def test_a_run_with_the_exact_classifier_is_the_conditional_model_s() -> None:
    """Over levels of the model's own table, which the classifier's timesteps name exactly."""
    of, chosen = mixture(), [0, 3]
    whole, conditional = (model(Epsilon(m)) for m in (of, chosen_of(of, chosen)))
    sampling = whole.get_model_object("model_sampling")
    levels = torch.cat([sampling.sigmas[[999, 700, 400, 200, 50]], torch.zeros(1)])
    noise = torch.randn(3, 4, 2, 1, generator=torch.Generator().manual_seed(0))

    def run(made) -> Tensor:
        import comfy.samplers
        with torch.inference_mode():
            return made.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), levels,
                               disable_pbar=True, seed=1)

    plain = run(guider(conditional, [[None, {}]], [[None, {}]], 1.0))
    torch.testing.assert_close(run(led(whole, Exact(of, chosen, sampling))), plain, rtol=0, atol=1e-4)
    assert not torch.allclose(run(guider(whole, [[None, {}]], [[None, {}]], 1.0)), plain, atol=0.1)


@pytest.fixture()
def small(tmp_path: Path) -> Classifier:
    return load_classifier(written(tmp_path / "small.safetensors", size=40))


def test_an_image_of_a_batch_is_that_of_its_own_run_and_led_towards_its_class(small: Classifier) -> None:
    patcher, x = model(Network()), torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(0))
    sampling = patcher.get_model_object("model_sampling")

    def log(x: Tensor) -> Tensor:
        sigma = torch.full((len(x),), 2.0)
        return small(sampling.calculate_input(sigma, x), sampling.timestep(sigma).float())[:, 3]

    def use(run):
        sigma = torch.full((3,), 2.0)
        batch = run.guider.added(x, sigma)
        for k in range(3):
            torch.testing.assert_close(run.guider.added(x[k:k + 1], sigma[:1]), batch[k:k + 1])
        return batch

    added = in_a_run(led(patcher, small, 3, positive=prompt(0.0)), use).clone()
    assert (log(x + 100.0 * added) > log(x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_any_precision_the_gradient_is_that_of_float32(small: Classifier, dtype: torch.dtype) -> None:
    """(In float16 ComfyUI's own rule divides 0 by 0, so it asks for none.)"""
    x = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0)).to(dtype)
    sigma = torch.full((2,), 2.0)

    def use(run):
        added = run.guider.added(x, sigma.to(dtype))
        assert torch.equal(added, run.guider.added(x.float(), sigma)) and added.any()
        assert dtype == torch.float16 or run.guider(x, sigma.to(dtype)).dtype == dtype

    in_a_run(led(model(Network()), small, 3, 5.0, positive=prompt(0.0)), use)


SAMPLERS = ["euler", "heun", "dpm_adaptive", "uni_pc", "dpmpp_2m_sde", "lcm", "lambda_2m", "lambda_3m_sde",
            "lambda_v3", "lambda_fitted"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_is_led(small: Classifier, name: str, tmp_path: Path, monkeypatch) -> None:
    pack()
    import comfy.samplers
    import folder_paths
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "solver_calibrations",
                        ([str(tmp_path)], {".safetensors"}))
    noise = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(0))

    def run(scale: float) -> Tensor:
        made = led(model(Network()), small, 2, scale, positive=prompt(0.0))
        sampling = made.model_patcher.get_model_object("model_sampling")
        levels = comfy.samplers.calculate_sigmas(sampling, "karras", 4)
        with torch.inference_mode():
            return made.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object(name), levels,
                               disable_pbar=True, seed=3)

    images = [run(scale) for scale in (1.0, 30.0)]
    assert all(image.isfinite().all() for image in images) and not torch.equal(*images)


def test_its_calibrations_are_its_own(small: Classifier, tmp_path: Path) -> None:
    other = load_classifier(written(tmp_path / "other.safetensors", size=40, seed=1))
    patcher = model(Network())
    plain = part("nodes.identity").description(guider(patcher, prompt(0.0), prompt(0.0), 1.0))
    about = [part("nodes.identity").description(led(patcher, *how, positive=prompt(0.0)))
             for how in ((small, 1, 2.0), (small, 2, 2.0), (small, 1, 3.0), (other, 1, 2.0))]
    lines = [told["patches"] for told in about]
    assert plain["patches"] == [] and len({*map(tuple, lines)}) == 4
    assert lines[0] == [f"guided by {led(patcher, small, 1, 2.0).rule}"]
    assert lines[0][0].endswith(", class 1, scale 2")
    assert all(told["guidance"] == 1.0 and told["fingerprint"] == plain["fingerprint"] for told in about)
    inside = in_a_run(led(patcher, small, 1, 2.0, positive=prompt(0.0)), lambda run: run.description())
    assert inside["patches"] == lines[0]


# --- the node ---------------------------------------------------------------------------------------------


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch) -> Path:
    pack()
    import folder_paths
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "classifiers",
                        ([str(tmp_path)], {"", ".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def made(patcher, name: str = "small.safetensors", label: str = "1", scale: float = 1.0, cfg: float = 1.0,
         **conds):
    return guiding().ClassifierGuiderNode.execute(patcher, name, label, scale, cfg, **conds).args[0]


def test_at_scale_0_it_is_the_unguided_run_bit_for_bit(folder: Path) -> None:
    written(folder / "small.safetensors", size=40)
    patcher = model(Network())

    def run(of) -> Tensor:
        return sampled(of, listed("dpmpp_2m"), 2)

    for cfg in (1.0, 3.0):
        conds = {"positive": prompt(0.5), "negative": prompt(-0.5)}
        plain = run(guider(patcher, *conds.values(), cfg))
        assert torch.equal(run(made(patcher, scale=0.0, cfg=cfg, **conds)), plain)
        assert not torch.equal(run(made(patcher, scale=50.0, cfg=cfg, **conds)), plain)


def test_the_node_lists_safetensors_files_alone_and_names_what_does_not_fit(folder: Path) -> None:
    written(folder / "small.safetensors", size=40)
    written(folder / "pixels.safetensors", channels=3)
    (folder / "weights.pt").write_bytes(b"")
    (folder / "weights").write_bytes(b"")
    patcher, node = model(Network()), guiding().ClassifierGuiderNode
    [combo] = [entry for entry in node.define_schema().inputs if entry.id == "classifier"]
    assert combo.options == ["pixels.safetensors", "small.safetensors"]
    for name in ("weights", "weights.pt", "gone.safetensors", guiding().NONE):
        with pytest.raises(ValueError, match="there is no classifier .*: put a safetensors file into"):
            made(patcher, name)
    with pytest.raises(ValueError, match="is for 3 channels, and this model's latents have 4"):
        made(patcher, "pixels.safetensors")
    with pytest.raises(ValueError, match="label = '9': this classifier knows the numbers 0 to 4"):
        made(patcher, label="9")
    patcher.model.model_config.unet_config["context_dim"] = 768
    with pytest.raises(ValueError, match="positive is not connected, and this model reads prompts"):
        made(patcher)


# --- really trained ---------------------------------------------------------------------------------------


def measuring() -> types.ModuleType:
    comfy_sampling()
    from accuracy import classifier
    return classifier


def test_the_emoji_classifier_is_read_and_small() -> None:
    measured = measuring()
    found = load_classifier(measured.FILE)
    assert (found.names, found.size, found.channels) == (measured.COLOURS, 32, 3)
    assert measured.FILE.stat().st_size < 155_000


def test_the_share_of_the_colour_that_is_led_to_rises_with_the_scale() -> None:
    """The colour is told by arithmetic, not by the classifier. 64 images at each scale."""
    measured = measuring()
    problem = measured.Emoji(("",), (1.0,), 1)
    plain, led, strong = (measured.share(measured.images(problem, "blue", scale, 64, steps=6), "blue")
                          for scale in (0.0, 2.0, 8.0))
    assert plain < 0.3 and led > plain + 0.2 and strong > max(led, 0.8)


SEVEN = [(1, 0.1, 0.1), (1, 0.5, 0.1), (1, 0.9, 0.1), (0.1, 0.8, 0.2), (0.1, 0.3, 1), (0.6, 0.1, 0.9),
         (0.5, 0.5, 0.5)]


@pytest.mark.parametrize("number, rgb", enumerate(SEVEN))
def test_a_colour_is_that_of_most_of_the_picture(number: int, rgb: tuple[float, float, float]) -> None:
    measured = measuring()
    picture = torch.ones(1, 3, 32, 32)
    picture[:, :, 8:24, 8:24] = torch.tensor(rgb).view(1, 3, 1, 1) * 2 - 1
    assert measured.colours(picture).tolist() == [number]
