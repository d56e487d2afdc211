"""The pack in a real ComfyUI server, over HTTP and websocket, with a trained checkpoint."""
from __future__ import annotations

import io
import json
import re
import secrets

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import demo
from samplers import FAMILIES, SAMPLERS, nfe
from comfyui_server import PromptRefused, Server
from workflow import nodes_of

NAMES = {
    "lambda_2m": "dpmpp_2m", "lambda_3m": "dpmpp_3m", "lambda_2m_sde": "dpmpp_2m_sde",
    "lambda_3m_sde": "dpmpp_3m_sde"
}
LISTED = [*NAMES, "lambda_v3", "lambda_amed", "lambda_amed_2m", "lambda_fitted"]
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
SHOWN = ["multistep", "singlestep", "adaptive", "sde", "pc", "v3", "fitted", "amed"]
def steps_for(family: str, usual: int) -> int:
    """More for predictor-corrector, whose predictor is of first order in distribution."""
    return 60 if family == "pc" else usual


EVERY_FAMILY = pytest.mark.parametrize("family", SHOWN[:5])  # the others: test_server_v3, _amed
STEPS = 8


class Graph:
    """A workflow in the making: add(class, inputs) returns the node's id, and outputs are named (id,
    slot)."""

    def __init__(self, words: str = "panda", checkpoint: str = demo.NANO) -> None:
        self.nodes: dict[str, dict] = {}
        self.checkpoint = self.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
        self.model = [self.checkpoint, 0]
        self.positive = [self.add("CLIPTextEncode", text=words, clip=[self.checkpoint, 1]), 0]
        self.negative = [self.add("CLIPTextEncode", text="", clip=[self.checkpoint, 1]), 0]
        self.latent = [self.add("EmptyLatentImage", width=256, height=256, batch_size=1), 0]

    @classmethod
    def emoji(cls, words: str = "panda") -> "Graph":
        """With the checkpoint whose pictures are some: where it is they that are looked at."""
        return cls(words, demo.CHECKPOINT)

    def add(self, class_type: str, **inputs) -> str:
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": class_type, "inputs": inputs}
        return name

    def through(self, class_type: str, slot: int = 0, **inputs) -> "Graph":
        """Put a node behind the model that hands out a MODEL."""
        self.model = [self.add(class_type, model=self.model, **inputs), slot]
        return self

    def counted(self) -> "Graph":
        self.counter = f"count{secrets.token_hex(6)}"
        return self.through("TestCounter", name=self.counter)

    def ksampler(self, name: str, steps: int = STEPS, **other) -> "Graph":
        inputs = dict(model=self.model, positive=self.positive, negative=self.negative,
                      latent_image=self.latent, seed=7, steps=steps, cfg=3.0, sampler_name=name,
                      scheduler="karras", denoise=1.0)
        self.latent = [self.add("KSampler", **{**inputs, **other}), 0]
        return self

    def family(self, name: str, sigmas: list | None = None, seed: int = 7, add_noise: bool = True,
               steps: int = STEPS, **options) -> "Graph":
        settings = {
            key: option.default for key, option in FAMILIES[name].options.items() if option.stand_in is None
        } | options
        sampler = [self.add("LambdaSampler" + name.capitalize(), **settings), 0]
        sigmas = sigmas or [
            self.add("BasicScheduler", model=self.model, scheduler="karras", steps=steps, denoise=1.0), 0
        ]
        return self.custom(sampler, sigmas, seed, add_noise)

    def custom(self, sampler: list, sigmas: list, seed: int = 7, add_noise: bool = True) -> "Graph":
        self.latent = [
            self.add("SamplerCustom", model=self.model, positive=self.positive, negative=self.negative,
                     latent_image=self.latent, sampler=sampler, sigmas=sigmas, cfg=3.0, noise_seed=seed,
                     add_noise=add_noise), 0
        ]
        return self

    def image(self) -> list:
        return [self.add("VAEDecode", samples=self.latent, vae=[self.checkpoint, 2]), 0]

    def run(self, server: Server, watch=None):
        """The result as a tensor, and what happened."""
        name = f"latent{secrets.token_hex(6)}"
        self.add("TestSaveLatent", latent=self.latent, name=name)
        run = server.run(self.nodes, watch)
        path = server.base / "output" / f"{name}.safetensors"
        return (load_file(path)["samples"] if run.status == "success" else None), run

    def samples(self, server: Server) -> torch.Tensor:
        result, run = self.run(server)
        assert run.status == "success", run.error.get("exception_message")
        return result

    def evaluations(self, server: Server) -> list[float]:
        return [
            float(line) for line in (server.base / "output" / f"{self.counter}.count").read_text().split()
        ]


def looks_like_an_image(samples: torch.Tensor) -> bool:
    """In -1 .. 1 with little outside, neither flat nor noise (the emoji have large even areas)."""
    rough = (samples[..., 1:] - samples[..., :-1]).abs().mean()
    return bool(samples.isfinite().all() and samples.abs().mean() < 1.2 and samples.std() > 0.2
                and rough < 0.3)


def test_the_server_lists_our_names_and_nodes_and_none_of_its_own_is_missing(server) -> None:
    info = server.get("/object_info")
    listed = info["KSampler"]["input"]["required"]["sampler_name"][0]
    assert listed[-len(LISTED):] == LISTED and {"euler", "dpmpp_2m", "uni_pc"} <= set(listed)
    assert LISTED == info["KSamplerSelect"]["input"]["required"]["sampler_name"][1]["options"][-len(LISTED):]
    for name in SHOWN:
        node, family = info["LambdaSampler" + name.capitalize()], FAMILIES[name]
        inputs = {name: spec for kind in node["input"].values() for name, spec in kind.items() if kind}
        assert node["category"].startswith("Lambda Solvers") and set(family.options) - set(
            family.stand_ins) <= set(inputs)
        assert all(spec[1]["tooltip"] for spec in inputs.values())
    # core's audio nodes want torchaudio
    assert not re.search(r"IMPORT FAILED.*custom_nodes", server.log.read_text())


@EVERY_NAME
def test_ksampler_makes_an_image_with_previews_and_progress(server, name: str) -> None:
    graph = Graph.emoji("red heart").counted().ksampler(name)
    samples, run = graph.run(server)
    assert run.status == "success" and looks_like_an_image(samples)
    assert run.progress[-1] == (STEPS, STEPS) and [v for v, _ in run.progress] == sorted(
        v for v, _ in run.progress)
    assert len(run.previews) >= STEPS - 1
    preview = Image.open(io.BytesIO(run.previews[-1]))
    assert preview.size[0] >= 32
    assert len(graph.evaluations(server)) == nfe(NAMES[name], STEPS)
    redness = samples.mean((0, 2, 3))
    assert redness[0] > redness[1] + 0.2  # a red heart on white


@EVERY_FAMILY
def test_every_sampler_node_makes_an_image_with_the_promised_evaluations(server, family: str) -> None:
    steps = steps_for(family, STEPS)
    graph = Graph.emoji("doughnut").counted().family(family, steps=steps)
    samples, run = graph.run(server)
    assert run.status == "success", run.error
    assert looks_like_an_image(samples) and run.progress[-1] == (steps, steps)
    settings = FAMILIES[family].settings({})
    name = next(name for name, s in SAMPLERS.items()
                if s.family == FAMILIES[family].title and s.fixed.items() <= settings.items())
    planned = nfe(name, steps)
    if planned:
        assert len(graph.evaluations(server)) == planned


@pytest.mark.parametrize(("clock", "rho"), [("lambda", 1.0), ("sigma", 7.0), ("t", 2.0), ("linear", 1.0),
                                            ("cosine", 1.0), ("list of sigmas", 1.0)])
def test_the_lambda_scheduler_serves_any_sampler(server, clock: str, rho: float) -> None:
    graph = Graph("doughnut").counted()
    sigmas = [graph.add("LambdaScheduler", model=graph.model, clock=clock, steps=12, rho=rho, denoise=1.0,
                        sigma_max=0.0, sigma_min=0.0, to_zero=True,
                        values="14.6 9 5 3 2 1.3 .9 .6 .4 .2 .1 .03"), 0]
    sampler = [graph.add("KSamplerSelect", sampler_name="euler"), 0]
    samples, run = graph.custom(sampler, sigmas).run(server)
    assert run.status == "success", run.error
    assert looks_like_an_image(samples) and len(graph.evaluations(server)) == 12


@pytest.mark.parametrize("how", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "lambda_2m"])
def test_a_threshold_bounds_the_images_of_any_sampler(server, name: str, how: str) -> None:
    def made(threshold: bool) -> torch.Tensor:
        graph = Graph("doughnut").counted()
        sampler = [graph.add("KSamplerSelect", sampler_name=name), 0]
        if threshold:
            sampler = [graph.add("LambdaOptions", sampler=sampler, threshold=how, quantile=0.9,
                                 bound=0.8), 0]
        sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=8, denoise=1.0), 0]
        samples, run = graph.custom(sampler, sigmas).run(server)
        assert run.status == "success", run.error
        assert len(graph.evaluations(server)) == 8
        return samples

    assert made(False).abs().max() > 0.9 and made(True).abs().max() <= 0.8 + 1e-5


def test_cfg_pp_makes_euler_euler_cfg_pp(server) -> None:
    def made(name: str, cfg_pp: bool) -> torch.Tensor:
        graph = Graph("doughnut").counted()
        sampler = [graph.add("KSamplerSelect", sampler_name=name), 0]
        if cfg_pp:
            sampler = [graph.add("LambdaOptions", sampler=sampler, threshold="off", quantile=0.995,
                                 bound=1.0, cfg_pp=True), 0]
        sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=8, denoise=1.0), 0]
        samples, run = graph.custom(sampler, sigmas).run(server)
        assert run.status == "success", run.error
        return samples

    theirs = made("euler_cfg_pp", False)
    torch.testing.assert_close(made("euler", True), theirs, rtol=0, atol=1e-3)
    assert (made("euler", False) - theirs).abs().max() > 0.1


@pytest.mark.parametrize("family", ["multistep", "sde"])
def test_a_corrector_costs_no_evaluation(server, family: str) -> None:
    graph = Graph("doughnut").counted().family(family, order=3, rule="bh2", corrector="full", steps=12)
    samples, run = graph.run(server)
    assert run.status == "success", run.error
    assert looks_like_an_image(samples) and len(graph.evaluations(server)) == 12


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_and_ddpm_are_the_sde_node_s(server, eta: float) -> None:
    graph = Graph("doughnut").counted().family("sde", order=1, law="ddim", eta=eta, steps=20)
    samples, run = graph.run(server)
    assert run.status == "success", run.error
    assert looks_like_an_image(samples) and len(graph.evaluations(server)) == 20


def test_the_example_workflows_run_with_every_sampler(server) -> None:
    for label, name, prompt in demo.jobs(server):
        demo.fill_in(prompt, "panda", 4)
        for node in nodes_of(prompt, "CheckpointLoaderSimple"):
            node["ckpt_name"] = demo.NANO
        run = server.run(prompt)
        assert run.status == "success", (label, run.error)
        [shown] = next(output["images"] for output in run.outputs.values() if output.get("images"))
        with Image.open(server.file(shown)) as image:
            assert image.size == (32, 32) and "prompt" in image.info


def test_2m_is_comfyui_s_dpmpp_2m_in_the_graph_too(server) -> None:
    ours, theirs = (Graph().ksampler(name).samples(server) for name in ("lambda_2m", "dpmpp_2m"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_the_same_seed_gives_the_same_image_and_another_seed_another(server) -> None:
    """Bit for bit: a model that sleeps for no time makes the server run it again instead of showing the
    last result."""
    for name in NAMES:
        first, again, other = (Graph().through("TestSlowModel",
                                               seconds=0.001 * k).ksampler(name, seed=seed).samples(server)
                               for k, seed in ((0, 7), (1, 7), (0, 8)))
        assert torch.equal(first, again) and not torch.equal(first, other)


@EVERY_NAME
def test_cancel_in_the_middle_leaves_nothing_broken(server, name: str) -> None:
    expected = Graph().ksampler(name).samples(server)
    cancelled = []

    async def watch(server, run):
        if len(run.progress) == 3 and not cancelled:
            cancelled.append(True)
            await server.interrupt()

    graph = Graph().through("TestSlowModel", seconds=0.2).counted().ksampler(name, steps=20)
    _, run = graph.run(server, watch)
    assert run.status == "interrupted" and len(graph.evaluations(server)) < 10
    again = Graph().through("TestSlowModel", seconds=0.0).ksampler(name).samples(server)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", ["lambda_2m", "lambda_3m"])
def test_image_k_of_a_batch_is_that_image_alone(server, name: str) -> None:
    graph = Graph()
    graph.latent = [graph.add("EmptyLatentImage", width=256, height=256, batch_size=4), 0]
    batch = graph.ksampler(name).samples(server)
    assert batch.shape[0] == 4
    for k in range(4):
        graph = Graph()
        four = [graph.add("EmptyLatentImage", width=256, height=256, batch_size=4), 0]
        graph.latent = [graph.add("LatentFromBatch", samples=four, batch_index=k, length=1), 0]
        torch.testing.assert_close(graph.ksampler(name).samples(server), batch[k:k + 1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_image_k_of_a_stochastic_batch_is_that_image_alone_with_seed_plus_k(server, order: int) -> None:
    """The same starting noise for all: a batch of noisy latents made beforehand, then add_noise off."""
    def noisy(graph: Graph) -> list:
        grey = [graph.add("EmptyImage", width=32, height=32, batch_size=4, color=0x808080), 0]
        four = [graph.add("VAEEncode", pixels=grey, vae=[graph.checkpoint, 2]), 0]
        noise = [graph.add("RandomNoise", noise_seed=3), 0]
        sigmas = [
            graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=STEPS, denoise=1.0), 0
        ]
        return [graph.add("AddNoise", model=graph.model, noise=noise, sigmas=sigmas, latent_image=four), 0]

    graph = Graph()
    graph.latent = noisy(graph)
    batch = graph.family("sde", seed=100, add_noise=False, order=order).samples(server)
    for k in range(4):
        graph = Graph()
        graph.latent = [graph.add("LatentFromBatch", samples=noisy(graph), batch_index=k, length=1), 0]
        alone = graph.family("sde", seed=100 + k, add_noise=False, order=order).samples(server)
        torch.testing.assert_close(alone, batch[k:k + 1], rtol=0, atol=5e-3)


@EVERY_NAME
def test_img2img_stays_near_its_image_as_core_s_samplers_do(server, name: str) -> None:
    def second(name: str, denoise: float) -> tuple[torch.Tensor, int]:
        graph = Graph("panda").ksampler("dpmpp_2m",
                                        steps=12).counted().ksampler(name, seed=9, denoise=denoise)
        return graph.samples(server), len(graph.evaluations(server))

    first = Graph("panda").ksampler("dpmpp_2m", steps=12).samples(server)
    distance = {}
    for denoise in (0.2, 0.6):
        samples, evaluations = second(name, denoise)
        assert evaluations == STEPS and looks_like_an_image(samples)
        distance[denoise] = float((samples - first).square().mean().sqrt())
    assert distance[0.2] < distance[0.6]
    core = float((second("dpmpp_2m", 0.2)[0] - first).square().mean().sqrt())
    assert distance[0.2] < 3 * core + 0.02


@EVERY_NAME
def test_an_inpainting_mask_is_kept(server, name: str) -> None:
    graph = Graph("panda").ksampler("dpmpp_2m", steps=12)
    original = graph.latent
    mask = graph.add("SolidMask", value=1.0, width=256, height=256)
    hole = graph.add("SolidMask", value=0.0, width=256, height=128)
    mask = graph.add("MaskComposite", destination=[mask, 0], source=[hole, 0], x=0, y=0, operation="multiply")
    graph.latent = [graph.add("SetLatentNoiseMask", samples=original, mask=[mask, 0]), 0]
    graph.positive = [graph.add("CLIPTextEncode", text="red heart", clip=[graph.checkpoint, 1]), 0]
    samples = graph.ksampler(name, seed=11).samples(server)
    before = Graph("panda").ksampler("dpmpp_2m", steps=12).samples(server)
    assert (samples - before)[:, :, :15].abs().max() < 1e-3   # kept
    assert (samples - before)[:, :, 17:].abs().mean() > 0.05  # painted


@pytest.mark.parametrize("family", ["singlestep", "multistep"])
def test_leftover_noise_is_taken_up_where_it_was_left(server, family: str) -> None:
    """SplitSigmas and add_noise off: two nodes in a row are one run, exactly so for a solver without
    memory."""
    whole = Graph().family(family, steps=9).samples(server)
    graph = Graph()
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=9, denoise=1.0), 0]
    cut = graph.add("SplitSigmas", sigmas=sigmas, step=6)
    graph.family(family, sigmas=[cut, 0]).family(family, sigmas=[cut, 1], add_noise=False)
    difference = (graph.samples(server) - whole).abs()
    assert difference.max() < 1e-3 if family == "singlestep" else difference.mean() < 0.05


@EVERY_NAME
def test_ksampler_advanced_in_two_parts_is_as_near_to_one_run_as_core_s(server, name: str) -> None:
    def advanced(graph: Graph, name: str, start: int, end: int, first: bool) -> Graph:
        graph.latent = [
            graph.add("KSamplerAdvanced", model=graph.model, positive=graph.positive, negative=graph.negative,
                      latent_image=graph.latent, add_noise="enable" if first else "disable", noise_seed=7,
                      steps=12, cfg=3.0, sampler_name=name, scheduler="karras", start_at_step=start,
                      end_at_step=end,
                      return_with_leftover_noise="enable" if first and end < 12 else "disable"), 0
        ]
        return graph

    def difference(name: str) -> float:
        whole = advanced(Graph(), name, 0, 12, True).samples(server)
        parts = advanced(advanced(Graph(), name, 0, 7, True), name, 7, 12, False).samples(server)
        assert looks_like_an_image(parts)
        return float((parts - whole).abs().mean())

    assert difference(name) < 1.2 * difference("dpmpp_2m_sde" if "sde" in name else "dpmpp_2m") + 0.01


@EVERY_FAMILY
def test_a_flow_model_with_trained_weights_makes_an_image(server, family: str) -> None:
    graph = Graph.emoji("red heart").through("TinyEmojiAsFlow")
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="simple", denoise=1.0,
                        steps=steps_for(family, 16)), 0]
    samples = graph.family(family, sigmas=sigmas).samples(server)
    assert looks_like_an_image(samples)
    redness = samples.mean((0, 2, 3))
    assert redness[0] > redness[1] + 0.2


def test_a_flow_run_is_the_ve_run_of_the_same_noise(server) -> None:
    """x / alpha, through ComfyUI's own sampling classes: the same levels of lambda give the same image."""
    flow = [0.93, 0.85, 0.7, 0.5, 0.3, 0.15, 0.05]
    results = []
    for kind in ("flow", "ve"):
        graph = Graph("panda")
        if kind == "flow":
            graph.through("TinyEmojiAsFlow")
        there = [*(s if kind == "flow" else s / (1 - s) for s in flow), 0.0]
        sigmas = [graph.add("TestSigmas", sigmas=", ".join(f"{s:.9f}" for s in there)), 0]
        results.append(graph.family("multistep", sigmas=sigmas).samples(server))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=5e-3)


@EVERY_FAMILY
def test_a_transformer_flow_model_runs(server, family: str) -> None:
    graph = Graph()
    flow = graph.add("TestFlowModel")
    graph.model, graph.positive, graph.negative = [flow, 0], [flow, 1], [flow, 2]
    graph.latent = [graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=2), 0]
    samples = graph.family(family).samples(server)
    assert samples.shape == (2, 16, 8, 8) and samples.isfinite().all()


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "EDM", "X0"])
def test_every_prediction_type_gives_the_same_image(server, kind: str) -> None:
    plain = Graph().ksampler("lambda_3m").samples(server)
    wrapped = Graph().through("TestModelSampling", kind=kind).ksampler("lambda_3m").samples(server)
    torch.testing.assert_close(wrapped, plain, rtol=0, atol=5e-3)


def test_a_model_that_does_not_denoise_is_refused_by_the_name_of_its_class(server) -> None:
    _, run = Graph().through("TestModelSampling", kind="IMG_TO_IMG").ksampler("lambda_2m").run(server)
    assert run.status == "error" and "IMG_TO_IMG" in run.error["exception_message"]
    assert "Choose one of ComfyUI's own samplers" in run.error["exception_message"]


def test_nan_from_the_model_stops_the_run_with_step_and_sigma(server) -> None:
    _, run = Graph().through("TestNaNModel", at_call=3).ksampler("lambda_2m").run(server)
    assert run.status == "error" and f"NaN or infinite values in step 3 of {STEPS}, at sigma = " in run.error[
        "exception_message"]
    assert looks_like_an_image(Graph().ksampler("lambda_2m").samples(server))


def test_an_increasing_schedule_is_refused_with_its_value(server) -> None:
    graph = Graph()
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=4, denoise=1.0), 0]
    _, run = graph.family("multistep", sigmas=[graph.add("FlipSigmas", sigmas=sigmas), 0]).run(server)
    assert run.status == "error" and "sort the sigmas from high to low" in run.error["exception_message"]


def test_an_option_out_of_range_is_refused_before_anything_runs(server) -> None:
    with pytest.raises(PromptRefused, match="bigger than max"):
        Graph().family("multistep", order=4).run(server)
    # 0.3.75 does not look at choices, so the node does; 0.27 does
    try:
        _, run = Graph().family("multistep", rule="heun").run(server)
        told = run.error["exception_message"]
    except PromptRefused as refused:
        told = str(refused)
    assert re.search(r"choose one of midpoint, taylor|'heun' not in \['midpoint', 'taylor'", told)


@pytest.mark.parametrize("flag", ["--fp16-unet", "--bf16-unet", "--fp8_e4m3fn-unet"])
def test_checkpoints_in_low_precision_sample_as_in_float32(servers, server, flag: str) -> None:
    expected = {name: Graph.emoji("red heart").ksampler(name).samples(server) for name in NAMES}
    low = servers(flag)
    core = Graph.emoji("red heart").ksampler("dpmpp_2m").samples(low)
    for name in NAMES:
        samples = Graph.emoji("red heart").ksampler(name).samples(low)
        assert looks_like_an_image(samples)
        limit = 2 * (core - expected["lambda_2m"]).abs().mean() + 0.02
        assert (samples - expected[name]).abs().mean() < 3 * limit, json.dumps(flag)
