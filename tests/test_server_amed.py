"""AMED in a real ComfyUI server: trained, saved, found again, given, refused, cancelled; and the first
step that is skipped."""
from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from samplers import FAMILIES, Amed
from test_server import Graph, looks_like_an_image
from test_server_v3 import files


IMAGES = 10  # that the emoji model is trained and tested on, each of which takes a call in a run of one image


def batched(graph: Graph) -> Graph:
    """As many images at once as the training looks at: its evaluations take one call each."""
    graph.latent = [graph.add("EmptyLatentImage", width=256, height=256, batch_size=IMAGES), 0]
    return graph


def flow(graph: Graph) -> Graph:
    """A tiny SD3-like transformer in place of the emoji."""
    node = graph.add("TestFlowModel")
    graph.model, graph.positive, graph.negative = [node, 0], [node, 1], [node, 2]
    graph.latent = [graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1), 0]
    return graph


def schedule(graph: Graph, steps: int = 3, scheduler: str = "karras") -> list:
    return [graph.add("BasicScheduler", model=graph.model, scheduler=scheduler, steps=steps, denoise=1.0), 0]


def train(graph: Graph, **changes) -> list:
    inputs = dict(model=graph.model, positive=graph.positive, negative=graph.negative, cfg=3.0,
                  latent_image=graph.latent, base="amed", form="table", afs=False, seed=0, samples=2,
                  teacher=3, prompt="this", save=False)
    inputs |= {"sigmas": changes.pop("sigmas", None) or schedule(graph), **changes}
    return [graph.add("LambdaTrainAmed", **inputs), 0]


def sampler_node(graph: Graph, **options) -> Graph:
    options.setdefault("sigmas", schedule(graph))
    return graph.family("amed", **{"base": "amed", "measure": "saved only", **options})


@pytest.mark.parametrize("name, kind", [("lambda_amed", "amed"), ("lambda_amed_2m", "amed_dpmpp_2m")])
def test_from_nothing_it_is_trained_once_saved_and_found_again(server, folder, name: str,
                                                               kind: str) -> None:
    graph = Graph("panda").counted().ksampler(name, steps=3, scheduler="karras")
    samples, run = graph.run(server)
    assert run.status == "success", run.error
    assert looks_like_an_image(samples)
    calls = len(graph.evaluations(server)) - 5
    assert any(
        re.search(r"training AMED: evaluation \d+ of \d+, as long as \d+ images, error [0-9.]+, \d+ s left",
                  text) for text in run.texts)
    [file] = files(folder)
    assert re.fullmatch(rf"NanoEmoji-[0-9a-f]{{12}}-{kind}-3steps-[0-9a-f]{{6}}-cfg3\.safetensors", file)
    trained = Amed.load(folder / file)
    spent = trained.about["evaluations"]
    assert 20 < spent <= 15 * 5 and trained.about["guidance"] == 3.0
    assert trained.about["samples"] + trained.about["held_out"] == IMAGES
    assert calls == IMAGES * spent  # one image at once, as in the run
    for words in ("panda", "strawberry"):
        graph = Graph(words).counted().ksampler(name, steps=3, scheduler="karras", seed=8)
        samples, run = graph.run(server)
        assert run.status == "success" and len(graph.evaluations(server)) == 5
        assert run.texts == [f"AMED: {file}"] and files(folder) == [file]


def test_another_schedule_guidance_or_base_is_trained_anew(server, folder) -> None:
    for count, how in enumerate(({}, {"scheduler": "simple"}, {"steps": 4}, {"cfg": 6.0}, {"cfg": 3.1}), 1):
        _, run = batched(Graph()).ksampler("lambda_amed",
                                           **{"steps": 3, "scheduler": "karras", "cfg": 3.0,
                                              **how}).run(server)
        assert run.status == "success" and len(files(folder)) == min(count, 4)
    batched(Graph()).ksampler("lambda_amed_2m", steps=3, scheduler="karras").samples(server)
    assert len(files(folder)) == 5


def test_trained_or_loaded_by_a_link_or_on_the_model_it_gives_the_same_image(server, folder) -> None:
    graph = Graph("panda")
    trained = train(graph, save=True, name="shared/mine")
    first = sampler_node(graph, calibration=trained).samples(server)
    assert (folder / "shared" / "mine.safetensors").exists() and looks_like_an_image(first)
    graph = Graph("panda")
    loaded = graph.add("LambdaLoadCalibration", name="shared/mine.safetensors")
    assert torch.equal(sampler_node(graph, calibration=[loaded, 0]).samples(server), first)
    graph = Graph("panda").through("LambdaLoadCalibration", 2, name="shared/mine.safetensors")
    graph.counted().ksampler("lambda_amed", steps=3, scheduler="karras")
    assert torch.equal(graph.samples(server), first) and len(graph.evaluations(server)) == 5


def test_the_picture_of_the_training_is_drawn(server, folder) -> None:
    graph = Graph("panda")
    node = train(graph)[0]
    graph.add("PreviewImage", images=[node, 1])
    run = server.run(graph.nodes)
    assert run.status == "success", run.error
    [shown] = run.outputs[node]["images"]
    with Image.open(server.file(shown)) as image:
        assert image.size == (480, 320) and len(image.convert("RGB").getcolors(100_000)) > 50
    assert re.fullmatch(
        r"AMED trained in \d+ s, as long as \d+ images: error at the last step [0-9.]+ untrained, [0-9.]+ "
        r"trained, on images held out.*", run.texts[-1])


def test_the_wrong_schedule_base_or_file_is_refused_with_both_named(server, folder) -> None:
    graph = Graph()
    trained = train(graph)
    _, run = sampler_node(graph, calibration=trained, sigmas=schedule(graph, 4)).run(server)
    assert run.status == "error" and re.search(r"trained for 3 steps over .* the schedule is 4 steps over",
                                               run.error["exception_message"])
    graph = Graph()
    samples, run = sampler_node(graph, calibration=train(graph), sigmas=schedule(graph, 4),
                                interpolate=True).run(server)
    assert run.status == "success" and samples.isfinite().all()
    graph = Graph()
    _, run = sampler_node(graph, calibration=train(graph), base="dpmpp_2m").run(server)
    assert run.status == "error" and "trained on base amed, and dpmpp_2m is chosen" in run.error[
        "exception_message"]
    (folder / "broken.safetensors").write_bytes(b"not a file")
    graph = Graph()
    _, run = sampler_node(graph,
                          calibration=[graph.add("LambdaLoadCalibration", name="broken.safetensors"),
                                       0]).run(server)
    assert run.status == "error" and "is damaged or was cut short" in run.error["exception_message"]
    _, run = sampler_node(Graph()).run(server)
    assert run.status == "error" and re.search("no saved AMED .* run Train AMED once, connect what Load "
                                               "Calibration", run.error["exception_message"])


def test_amed_of_another_checkpoint_brings_a_warning_that_names_both(server, folder) -> None:
    graph = Graph("panda")
    sigmas = schedule(graph)
    node = graph.add("TestFlowModel")
    latent = [graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1), 0]
    flow_sigmas = [graph.add("BasicScheduler", model=[node, 0], scheduler="simple", steps=3, denoise=1.0), 0]
    trained = train(graph, model=[node, 0], positive=[node, 1], negative=[node, 2], latent_image=latent,
                    sigmas=flow_sigmas)
    samples, run = sampler_node(graph, calibration=trained, sigmas=sigmas, interpolate=True).run(server)
    assert run.status == "success", run.error
    [warning] = [text for text in run.texts if text.startswith("warning")]
    assert re.search(r"the AMED may not fit: measured on SD3-[0-9a-f]{12}, and this is NanoEmoji-", warning)


def test_cancel_while_training_leaves_a_partial_file_from_which_the_next_run_goes_on(
        server, folder) -> None:
    cancelled = []

    async def watch(server, run):
        if len(run.progress) == 45 * IMAGES and not cancelled:
            cancelled.append(True)
            await server.interrupt()

    how = dict(steps=4, scheduler="karras")
    graph = Graph().through("TestSlowModel", seconds=0.02).counted().ksampler("lambda_amed", **how)
    _, run = graph.run(server, watch)
    assert run.status == "interrupted"
    [partial] = files(folder)
    assert partial.endswith(".part")
    first = len(graph.evaluations(server)) / IMAGES
    graph = Graph().counted().ksampler("lambda_amed", seed=8, **how)
    samples, run = graph.run(server)
    assert run.status == "success" and samples.isfinite().all()
    again = (len(graph.evaluations(server)) - 7) / IMAGES
    [name] = files(folder)
    whole = Amed.load(folder / name).about["evaluations"]
    assert first >= 45 and again <= 91 - 20  # the teacher is kept, and every whole step
    assert whole <= first + again


@pytest.mark.parametrize("words, calls", [("panda", 1), ("panda " * 41, 2)],
                         ids=["together", "one after the other"])
def test_a_predictor_reads_conds_that_are_evaluated_together_or_not(server, folder, words: str,
                                                                    calls: int) -> None:
    """Six sections of a prompt do not go into one batch with the one of an empty prompt."""
    graph = Graph(words).counted()
    graph.through("TestCounter", name=f"{graph.counter}calls", calls=True)
    trained = train(graph, form="predictor", samples=3, save=True, name="predictor")
    samples, run = sampler_node(graph, calibration=trained).run(server)
    assert run.status == "success" and samples.isfinite().all(), run.error
    spent = len(graph.evaluations(server))
    graph.counter += "calls"
    assert len(graph.evaluations(server)) == calls * spent
    losses = Amed.load(folder / "predictor.safetensors").about["losses"]
    assert losses["trained"]["training"][-1] < losses["untrained"]["training"][-1]


def test_a_predictor_sees_the_conditional_half_of_a_batch(server, folder) -> None:
    """A batch of one and of three."""
    graph = Graph("panda")
    trained = train(graph, form="predictor", samples=4)
    first = sampler_node(graph, calibration=trained).samples(server)
    assert looks_like_an_image(first)
    graph = Graph("panda")
    graph.latent = [graph.add("EmptyLatentImage", width=256, height=256, batch_size=3), 0]
    assert sampler_node(graph, calibration=train(graph, form="predictor",
                                                 samples=4)).samples(server).shape[0] == 3


def test_a_transformer_has_a_table_and_is_refused_a_predictor(server, folder) -> None:
    samples, run = flow(Graph()).ksampler("lambda_amed", steps=3, scheduler="simple").run(server)
    assert run.status == "success", run.error
    assert samples.isfinite().all() and files(folder)[0].startswith("SD3-")
    graph = flow(Graph())
    _, run = sampler_node(
        graph, calibration=train(graph, form="predictor", sigmas=schedule(graph, scheduler="simple")),
        sigmas=schedule(graph, scheduler="simple")).run(server)
    assert run.status == "error" and "SD3-" in run.error["exception_message"] and "has none" in run.error[
        "exception_message"]


def test_other_sizes_single_conds_and_batches_work_with_one_training(server, folder) -> None:
    Graph("panda").ksampler("lambda_amed", steps=3, scheduler="karras", cfg=1.0).samples(server)
    graph = Graph("panda")
    graph.latent = [graph.add("EmptyLatentImage", width=384, height=256, batch_size=2), 0]
    samples, run = graph.ksampler("lambda_amed", steps=3, scheduler="karras", cfg=1.0, seed=5).run(server)
    assert run.status == "success" and samples.shape[0] == 2 and len(files(folder)) == 1
    assert run.texts[0].startswith("AMED: ")


@pytest.mark.parametrize("flag", ["--fp16-unet", "--bf16-unet"])
def test_half_precision_is_trained_and_sampled(servers, folder, flag: str) -> None:
    samples, run = batched(Graph.emoji("panda")).ksampler("lambda_amed", steps=3,
                                                    scheduler="karras").run(servers(flag))
    assert run.status == "success", run.error
    assert looks_like_an_image(samples)
    losses = Amed.load(folder / files(folder)[0]).about["losses"]
    assert losses["trained"]["training"][-1] < 0.8 * losses["untrained"]["training"][0]


def test_the_first_step_is_skipped_and_refused_for_img2img(server) -> None:
    """Alone, and inside a node that wraps the sampler."""
    def made(wrapped: bool = False, denoise: float = 1.0):
        graph = Graph("panda").counted()
        options = {name: option.default for name, option in FAMILIES["multistep"].options.items()}
        sampler = [graph.add("LambdaSamplerMultistep", **{**options, "first_step": "afs"}), 0]
        if wrapped:
            sampler = [graph.add("LambdaOptions", sampler=sampler, threshold="off", quantile=0.995,
                                 bound=1.0), 0]
        sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=6,
                            denoise=denoise), 0]
        samples, run = graph.custom(sampler, sigmas).run(server)
        return samples, run, len(graph.evaluations(server)) if run.status == "success" else None

    results = [made(), made(wrapped=True)]
    for samples, run, count in results:
        assert run.status == "success" and count == 5 and samples.isfinite().all()
    assert torch.equal(results[0][0], results[1][0])
    _, run, _ = made(denoise=0.5)
    assert run.status == "error" and re.search(
        r"starts at sigma = .* holds an image, and not at the model's highest, 14\.6",
        run.error["exception_message"])


def test_more_than_10_steps_are_refused_before_the_model_is_asked_and_a_training_for_them_is_used(
        server, folder) -> None:
    told = "AMED is not trained for 11 steps.*choose at most 10 steps, or the fitted sampler"
    graph = Graph("panda").counted().ksampler("lambda_amed", steps=11)
    _, run = graph.run(server)
    assert run.status == "error" and re.search(told, run.error["exception_message"])
    assert not (server.base / "output" / f"{graph.counter}.count").exists()
    graph = Graph("panda")
    _, run = sampler_node(graph, calibration=train(graph, sigmas=schedule(graph, 11)),
                          sigmas=schedule(graph, 11)).run(server)
    assert run.status == "error" and re.search(told, run.error["exception_message"])
    lam = np.log(1 / np.geomspace(14.6146, 0.03, 11))
    Amed(np.append(lam, np.inf), np.tile([0.4, 1.0, 1.0], (11, 1)), "amed", "evaluate",
         about={}).save(folder / "eleven.safetensors")
    graph = Graph("panda").counted()
    sigmas = [
        graph.add("TestSigmas", sigmas=", ".join(f"{math.exp(-value):.7f}" for value in [*lam, math.inf])), 0
    ]
    samples, run = sampler_node(
        graph, sigmas=sigmas, calibration=[graph.add("LambdaLoadCalibration", name="eleven.safetensors"),
                                           0]).run(server)
    assert run.status == "success" and len(graph.evaluations(server)) == 21, run.error


@pytest.mark.parametrize("family", ["fitted", "v3"])
def test_a_first_step_that_cannot_be_left_out_is_refused_before_anything_is_measured(server, folder,
                                                                                     family: str) -> None:
    graph = Graph("panda").ksampler("euler", 2).counted()
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=4, denoise=0.6), 0]
    _, run = graph.family(family, sigmas=sigmas, first_step="afs").run(server)
    assert run.status == "error" and "the first step cannot be skipped" in run.error["exception_message"]
    assert not (server.base / "output" / f"{graph.counter}.count").exists() and files(folder) == []


def test_train_amed_saves_what_the_sampler_then_finds(server, folder) -> None:
    graph = Graph("panda")
    [node, _] = train(graph, prompt="any", save=True)
    run = server.run({key: value for key, value in graph.nodes.items()})
    assert run.status == "success", run.error
    [name] = files(folder)
    assert any(text.startswith(f"saved as {name}; samplers find it by themselves") for text in run.texts)
    graph = Graph("strawberry").counted().ksampler("lambda_amed", steps=3, scheduler="karras")
    _, run = graph.run(server)
    assert run.texts == [f"AMED: {name}"] and len(graph.evaluations(server)) == 5 and files(folder) == [name]
    graph = Graph("panda")
    train(graph, prompt="any", form="predictor")
    run = server.run(graph.nodes)
    assert run.status == "error" and "set prompt to this, or form to table" in run.error["exception_message"]
