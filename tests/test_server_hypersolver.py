"""A hypersolver in a real ComfyUI server: trained, cancelled and gone on with, found, used and told."""
from __future__ import annotations

import re

import torch
from PIL import Image

from samplers import Statistics
from test_server import Graph, looks_like_an_image
from test_server_compare import comparison, run as compare
from test_server_v3 import files

USED = "with their hypersolver, trained for 4 steps at guidance 3 to 6"


def train(graph: Graph, **changes) -> str:
    inputs = dict(model=graph.model, clip=[graph.checkpoint, 1], negative=graph.negative,
                  latent_image=graph.latent, cfg_low=3.0, cfg_high=6.0, images=2, fewest=4, most=4,
                  prompts="panda\npizza\nred heart\nghost\nsun\nlemon", training=800, save=True, seed=0)
    return graph.add("LambdaTrainHypersolver", **{**inputs, **changes})


def test_it_is_trained_saved_and_used_for_its_guidances_and_numbers_of_steps(server, folder) -> None:
    graph = Graph().counted()
    node = train(graph)
    run = server.run(graph.nodes)
    assert run.status == "success", run.error
    plain, taught = sorted(files(folder))
    assert plain.endswith("-fitted-cfg4.safetensors") and taught.endswith("-hypersolver3-6-cfg4.safetensors")
    begins = next(k for k, text in enumerate(run.texts) if text.startswith("training the hypersolver"))
    # 62 evaluations of twelve images
    assert run.texts[begins] == "training the hypersolver: as long as 37 images of 20 steps"
    assert re.fullmatch(r".* 37 images of 20 steps, about \d+ (seconds|minutes)", run.texts[begins + 1])
    assert any(re.search(r"evaluation 6\d of 62, .*, error 0\.\d+, \d+ s left", text) for text in run.texts)
    told = r"hypersolver trained in .*: 4 steps [0-9.]+ and [0-9.]+\. It is used for 4 steps"
    assert any(re.search(told, text) for text in run.texts)
    assert f"saved as {taught}; samplers find it by themselves" in run.texts
    [shown] = run.outputs[node]["images"]
    with Image.open(server.file(shown)) as image:
        assert image.size == (480, 520)
    found = Statistics.load(folder / taught)
    assert found.hypersolver.counts == (4,) and found.hypersolver.channels == 3
    assert 154 + 12 * 59 < len(graph.evaluations(server)) <= 154 + 12 * 62

    def made(steps: int, cfg: float, calibration: str | None = None, **how) -> tuple[torch.Tensor, list[str]]:
        other = Graph("tulip").counted()
        model = [other.add("LambdaApplyCalibration", model=other.model, calibration=[
            other.add("LambdaLoadCalibration", name=calibration), 0]), 0] if calibration else other.model
        samples, run = other.ksampler("lambda_fitted", steps=steps, cfg=cfg, model=model, **how).run(server)
        assert run.status == "success" and looks_like_an_image(samples), run.error
        assert len(other.evaluations(server)) == steps
        return samples, run.texts

    samples, said = made(4, 5.5)
    assert said == [f"statistics: {taught}", USED]
    without, said = made(4, 5.5, plain)
    assert USED not in said and 1e-3 < (samples - without).abs().mean() < 0.2
    again, said = made(4, 5.5, taught)
    assert said == [USED] and torch.equal(again, samples)
    samples, said = made(5, 4.2)  # a number of steps it was not trained for
    assert said[0].startswith("statistics: ") and USED not in said
    torch.testing.assert_close(samples, made(5, 4.2, plain)[0], rtol=0, atol=1e-5)
    compared = comparison(Graph("tulip").counted(), samplers="lambda_fitted", evaluations="4", cfg=5.0)
    ran, [row], *_ = compare(compared, server)
    assert ran.status == "success" and USED in ran.texts and row[:4] == ["lambda_fitted", "karras", "4", "4"]
    graph = Graph("tulip").ksampler("dpmpp_2m", steps=8)
    _, run = graph.ksampler("lambda_fitted", steps=4, cfg=5.0, denoise=0.6).run(server)
    assert run.status == "success" and run.texts[-1] == USED


def test_a_cancelled_training_goes_on_from_what_was_done(server, folder) -> None:
    """Of a flow model from pure noise, and without guidance."""
    def graph() -> Graph:
        made = Graph().through("TinyEmojiAsFlow").counted()
        train(made, prompts="panda\npizza\nred heart", images=1, cfg_low=1.0, cfg_high=1.0, fewest=5, most=5,
              training=40)
        return made

    async def watch(server, run):
        if sum(", error 0." in text for text in run.texts) == 1:  # the first round is done
            await server.interrupt()

    cut = graph()
    run = server.run(cut.nodes, watch)
    assert run.status == "interrupted" and any(name.endswith(".part") for name in files(folder))
    assert any("the training was cancelled; the next run goes on from there" in text for text in run.texts)
    again = graph()
    run = server.run(again.nodes)
    assert run.status == "success", run.error
    assert any(text.startswith("statistics: ") for text in run.texts)  # measured in the run before
    assert len(again.evaluations(server)) < 2 * (4 + 3 * 4 + 2 * 4 + 2) < len(cut.evaluations(server))
    assert not any(name.endswith(".part") for name in files(folder))
    assert any(re.search("without and with it: 5 steps", text) for text in run.texts)
