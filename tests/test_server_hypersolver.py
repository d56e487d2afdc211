"""A hypersolver in a real ComfyUI server: trained, cancelled and gone on with, found, used and told."""
from __future__ import annotations

import re
import shutil

import environment
import torch
from PIL import Image

from samplers import Statistics
from test_server import Graph, looks_like_an_image
from test_server_compare import comparison, run as compare
from test_server_v3 import files

FILE = environment.ROOT / "dev" / "tiny_emoji" / "hypersolver.safetensors"  # of this checkpoint
USED = "with their hypersolver, trained for 4 steps at guidance {:.3g} to {:.3g}".format(
    *Statistics.load(FILE).hypersolver.guidances)


def train(graph: Graph, **changes) -> str:
    inputs = dict(model=graph.model, clip=[graph.checkpoint, 1], negative=graph.negative,
                  latent_image=graph.latent, cfg_low=3.0, cfg_high=6.0, prompts="panda\npizza\nred heart",
                  images=2, fewest=4, most=4, training=100, save=True, seed=0)
    return graph.add("LambdaTrainHypersolver", **{**inputs, **changes})


def test_it_is_trained_and_says_before_what_it_costs_and_after_what_it_gained(server, folder) -> None:
    """So short a training may gain nothing, and then nothing is kept."""
    graph = Graph().counted()
    node = train(graph)
    run = server.run(graph.nodes)
    assert run.status == "success", run.error
    plain, *taught = sorted(files(folder))
    assert plain.endswith("-fitted-cfg4.safetensors")
    begins = next(k for k, text in enumerate(run.texts) if text.startswith("training the hypersolver"))
    # 39 evaluations of six images
    assert run.texts[begins] == "training the hypersolver: as long as 12 images of 20 steps"
    assert re.fullmatch(r".* 12 images of 20 steps, about \d+ (seconds|minutes)", run.texts[begins + 1])
    assert any(re.search(r"evaluation 3\d of 39, .*, error \d\.\d+, \d+ s left", text) for text in run.texts)
    [told] = [text for text in run.texts if text.startswith("hypersolver trained in ")]
    without, having, after = re.search(r": 4 steps ([0-9.]+) and ([0-9.]+)\. (.*)", told).groups()
    assert ("It is used for 4 steps" in after) == bool(taught) and float(without) > 0 < float(having)
    for name in taught:
        assert name.endswith("-hypersolver3-6-cfg4.safetensors")
        found = Statistics.load(folder / name)
        assert found.hypersolver.counts == (4,) and found.hypersolver.channels == 3
        [shown] = run.outputs[node]["images"]
        with Image.open(server.file(shown)) as image:
            assert image.size == (480, 520)
    assert 154 + 6 * 36 < len(graph.evaluations(server)) <= 154 + 6 * 39


def test_it_is_used_for_its_guidances_and_numbers_of_steps(server, folder) -> None:
    def made(steps: int, cfg: float, calibration: str | None = None) -> tuple[torch.Tensor, list[str]]:
        other = Graph.emoji("tulip").counted()
        if calibration:
            other.through("LambdaLoadCalibration", 2, name=calibration)
        samples, run = other.ksampler("lambda_fitted", steps=steps, cfg=cfg).run(server)
        assert run.status == "success" and looks_like_an_image(samples), run.error
        return samples, run.texts

    made(4, 5.5)  # measures
    [plain] = files(folder)
    shutil.copy(FILE, folder / FILE.name)
    samples, said = made(4, 5.5)
    assert said == [f"statistics: {FILE.name}", USED]
    without, said = made(4, 5.5, plain)
    assert USED not in said and 1e-3 < (samples - without).abs().mean() < 0.3
    again, said = made(4, 5.5, FILE.name)
    assert said == [USED] and torch.equal(again, samples)
    samples, said = made(12, 5.5)  # a number of steps it was not trained for
    assert said == [f"statistics: {plain}"]
    torch.testing.assert_close(samples, made(12, 5.5, plain)[0], rtol=0, atol=1e-5)
    compared = comparison(Graph.emoji("tulip").counted(), samplers="lambda_fitted", evaluations="4", cfg=5.0)
    ran, [row], *_ = compare(compared, server)
    assert ran.status == "success" and USED in ran.texts and row[:4] == ["lambda_fitted", "karras", "4", "4"]
    _, run = Graph.emoji("tulip").ksampler("lambda_fitted", steps=4, cfg=5.0, denoise=0.6).run(server)
    assert run.status == "success" and run.texts[-1] == USED


def test_a_cancelled_training_goes_on_from_what_was_done(server, folder) -> None:
    """Of a flow model from pure noise, and without guidance."""
    def graph() -> Graph:
        made = Graph().through("TinyEmojiAsFlow").counted()
        train(made, images=1, cfg_low=1.0, cfg_high=1.0, fewest=5, most=5, training=40)
        return made

    async def watch(server, run):
        if sum(", error 0." in text for text in run.texts) == 1:  # the first round is done
            await server.interrupt()

    cut = graph()
    run = server.run(cut.nodes, watch)
    assert run.status == "interrupted" and any(name.endswith(".part") for name in files(folder))
    said = "the training was cancelled; the next run goes on from there"
    [told] = [text for text in run.texts if said in text]
    [kept] = [name for name in files(folder) if name.endswith(".part")]
    assert re.search(rf"partial/{re.escape(kept)} takes \d MB", told)
    again = graph()
    run = server.run(again.nodes)
    assert run.status == "success", run.error
    assert any(text.startswith("statistics: ") for text in run.texts)  # measured in the run before
    assert len(again.evaluations(server)) < 2 * (4 + 3 * 4 + 2 * 4 + 2) < len(cut.evaluations(server))
    assert not any(name.endswith(".part") for name in files(folder))
    assert any(re.search("without and with it: 5 steps", text) for text in run.texts)
