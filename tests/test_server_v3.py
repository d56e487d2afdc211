"""DPM-Solver-v3 in a real ComfyUI server: measured, saved, found again, given, refused, cancelled."""
from __future__ import annotations

import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_server import PromptRefused
from samplers import Statistics, fitted_sigmas
from test_server import STEPS, Graph, looks_like_an_image

NAME = "lambda_v3"
MOST = 100  # evaluations that a default estimation may cost
IMAGES = 2  # trajectories of the emoji model, each of which takes a call in a run of one image


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def measure(graph: Graph, **changes) -> list:
    inputs = dict(model=graph.model, positive=graph.positive, negative=graph.negative, cfg=3.0,
                  latent_image=graph.latent, seed=0, intervals=12, samples=2, pool="all", fitted=False,
                  prompt="this", save=False)
    return [graph.add("LambdaMeasureModel", **{**inputs, **changes}), 0]


def tune(graph: Graph, statistics: list, **changes) -> list:
    inputs = dict(model=graph.model, positive=graph.positive, negative=graph.negative, cfg=3.0,
                  latent_image=graph.latent, calibration=statistics, steps=4, seed=0, samples=4, save=False)
    return [graph.add("LambdaTuneFitted", **{**inputs, **changes}), 0]


def sampler_node(graph: Graph, **options) -> Graph:
    return graph.family("v3", **{"measure": "saved only", **options})


def test_from_nothing_it_is_measured_once_saved_and_found_again(server, folder) -> None:
    graph = Graph("panda").counted().ksampler(NAME)
    samples, run = graph.run(server)
    assert run.status == "success", run.error
    assert looks_like_an_image(samples)
    calls = len(graph.evaluations(server)) - STEPS
    assert any("measuring the model's statistics: evaluation" in text and "s left" in text
               for text in run.texts)
    told = f"serves this run: measuring once, as long as {round(IMAGES * 54 / STEPS)} images"
    assert any("no saved statistics for NanoEmoji-" in text and text.endswith(told) for text in run.texts)
    [name] = files(folder)
    statistics = Statistics.load(folder / name)
    assert re.fullmatch(r"NanoEmoji-[0-9a-f]{12}-cfg3\.safetensors", name)
    spent = statistics.about["evaluations"]
    assert statistics.about["guidance"] == 3.0 and 30 < spent <= MOST and not statistics.about["patches"]
    assert calls == IMAGES * spent  # one image at once, as in the run
    assert max(value for value, _ in run.progress) == calls and run.progress[-1] == (STEPS, STEPS)

    for words in ("panda", "strawberry"):
        graph = Graph(words).counted().ksampler(NAME, seed=8)
        samples, run = graph.run(server)
        assert run.status == "success" and len(graph.evaluations(server)) == STEPS
        assert run.texts == [f"statistics: {name}"] and files(folder) == [name]


def test_the_fitted_solver_measures_a_file_of_its_own_beside_v3_s_once(server, folder) -> None:
    Graph("panda").ksampler(NAME).samples(server)
    [name] = files(folder)
    assert Statistics.load(folder / name).root is None
    for seed, spent in ((1, IMAGES * 77), (2, 0)):
        graph = Graph("panda").counted().family("fitted", measure="auto", seed=seed)
        samples, run = graph.run(server)
        assert run.status == "success" and looks_like_an_image(samples), run.error
        assert len(graph.evaluations(server)) == spent + STEPS and len(files(folder)) == 2
    graph = Graph("panda").counted().ksampler("lambda_fitted", seed=2)  # the same by its name in KSampler
    assert torch.equal(graph.samples(server), samples) and len(graph.evaluations(server)) == STEPS
    # of which only the range counts
    other = Graph("panda").counted().ksampler("lambda_fitted", seed=2, scheduler="exponential")
    torch.testing.assert_close(other.samples(server), samples, rtol=0, atol=1e-3)
    [fitted] = [other for other in files(folder) if other != name]
    assert "-fitted-cfg3." in fitted and Statistics.load(folder / fitted).about["evaluations"] == 77
    graph = Graph("panda").counted().ksampler(NAME, seed=3)
    assert looks_like_an_image(graph.samples(server)) and len(graph.evaluations(server)) == STEPS


FITTED_CLOCK = dict(clock="fitted", rho=1.0, denoise=1.0, sigma_max=0.0, sigma_min=0.0, to_zero=True,
                    values="")


def test_fitted_sigmas_are_a_schedule_for_any_sampler(server, folder) -> None:
    graph = Graph("panda").counted()
    statistics = measure(graph, fitted=True, save=True, name="fit")
    sigmas = [
        graph.add("LambdaScheduler", model=graph.model, calibration=statistics, steps=5, **FITTED_CLOCK), 0
    ]
    samples, run = graph.custom([graph.add("KSamplerSelect", sampler_name="dpmpp_2m"), 0], sigmas).run(server)
    assert run.status == "success" and looks_like_an_image(samples), run.error
    expected = fitted_sigmas(Statistics.load(folder / "fit.safetensors"), 5, 14.6146)
    assert graph.evaluations(server)[-5:] == pytest.approx(expected[:-1], rel=1e-3)
    part = Graph("panda").counted()
    loaded = [part.add("LambdaLoadCalibration", name="fit.safetensors"), 0]
    sigmas = [
        part.add("LambdaScheduler", model=part.model, calibration=loaded, steps=3,
                 **{**FITTED_CLOCK, "denoise": 0.5}), 0
    ]
    part.custom([part.add("KSamplerSelect", sampler_name="euler"), 0], sigmas).samples(server)
    seen = part.evaluations(server)
    assert len(seen) == 3 and 1.0 < seen[0] < 3.0  # half of the timesteps: sigma 1.6


def test_a_refit_is_used_for_its_number_of_steps_alone(server, folder) -> None:
    graph = Graph("panda")
    plain = measure(graph, fitted=True, save=True, name="plain")
    refitted = tune(graph, plain, samples=3, save=True, name="refitted")
    samples, run = graph.family("fitted", measure="saved only", calibration=refitted,
                                steps=4).run(server)
    assert run.status == "success" and looks_like_an_image(samples), run.error
    told = ("tuned for 4 steps in [0-9]+ s, as long as [0-9]+ images: error|"
            "tuning for 4 steps found nothing better")
    assert any(re.search(told, text) for text in run.texts)
    assert not any("may not fit" in text for text in run.texts)
    loaded = Statistics.load(folder / "refitted.safetensors")
    assert loaded.about["refits"]["4"]["kept"] == bool(loaded.plans)
    for steps in (4, 5):
        found = {}
        for name in ("plain", "refitted"):
            graph = Graph("panda").counted().through("LambdaLoadCalibration", 2, name=f"{name}.safetensors")
            graph.ksampler("lambda_fitted", steps=steps).samples(server)
            found[name] = graph.evaluations(server)
        assert (found["plain"] != found["refitted"]) == (steps == 4 and bool(loaded.plans))


def test_what_several_prompts_taught_is_used_for_every_prompt(server, folder) -> None:
    graph = Graph("panda")
    statistics = measure(graph, fitted=True)
    clip = [graph.checkpoint, 1]
    lines = {"alone": "", "same": "panda\n\n  panda ", "several": "pizza\nred heart\nghost"}
    for name, prompts in lines.items():
        tune(graph, statistics, save=True, name=name,
             **({"clip": clip, "prompts": prompts} if prompts else {}))
    run = server.run(graph.nodes)
    assert run.status == "success", run.error
    found = {name: Statistics.load(folder / f"{name}.safetensors") for name in lines}
    told = {name: statistics.about["refits"]["4"] for name, statistics in found.items()}
    assert [told[name]["prompts"] for name in lines] == [1, 3, 4] and all(entry["kept"]
                                                                          for entry in told.values())
    # each image gets its own prompt
    assert found["same"].plans[4] == pytest.approx(found["alone"].plans[4], abs=1e-3)
    assert told["several"]["training"][0] != pytest.approx(told["alone"]["training"][0], rel=0.005)
    for name, statistics in found.items():
        assert statistics.about["conditions"] == found["alone"].about["conditions"]  # b is still panda's
        assert bool(statistics.for_another_prompt().plans) == (name != "alone")
    seen = {}
    for name in lines:
        other = Graph("tulip").counted().through("LambdaLoadCalibration", 2, name=f"{name}.safetensors")
        assert looks_like_an_image(other.ksampler("lambda_fitted", steps=4).samples(server))
        seen[name] = other.evaluations(server)
    assert seen["several"] == pytest.approx([math.exp(-lam) for lam in found["several"].plans[4][:, 0]],
                                            rel=1e-2)
    assert seen["several"] != seen["alone"]
    # only what was learned for the run, and the newest of it
    for steps, said in ((4, "statistics: several.safetensors"), (5, "no saved statistics for")):
        _, run = Graph("tulip").ksampler("lambda_fitted", steps=steps).run(server)
        assert run.status == "success" and run.texts[0].startswith(said)

    graph = Graph("panda")
    tune(graph, measure(graph, fitted=True), prompts="pizza")
    run = server.run(graph.nodes)
    assert run.status == "error" and "connect the checkpoint's CLIP to clip" in run.error["exception_message"]


def test_a_cancelled_refit_goes_on_from_what_was_done(server, folder) -> None:
    def graph(name: str) -> Graph:
        made = Graph("panda")
        loaded = [made.add("LambdaLoadCalibration", name="plain.safetensors"), 0]
        made.through("TestSlowModel", seconds=0.01).counted()
        tune(made, loaded, steps=5, save=True, name=name)
        return made

    async def watch(server, run):
        if sum("tuning" in text for text in run.texts) == 100:
            await server.interrupt()

    first = Graph("panda")
    measure(first, fitted=True, save=True, name="plain")
    assert server.run(first.nodes).status == "success"
    cut = graph("cut")
    run = server.run(cut.nodes, watch)
    assert run.status == "interrupted" and any(name.endswith(".part") for name in files(folder))
    assert any("was cancelled; the next run goes on from there" in text for text in run.texts)
    again = graph("again")
    run = server.run(again.nodes)
    assert run.status == "success", run.error
    assert len(again.evaluations(server)) < 4 * 90  # of four images
    assert not any(name.endswith(".part") for name in files(folder))
    # those of both
    assert Statistics.load(folder / "again.safetensors").about["refits"]["5"]["evaluations"] > 100


def test_a_flow_model_is_fitted_and_refitted_from_pure_noise(server, folder) -> None:
    """The first evaluation, at sigma = 1, leads to the grid; the others are chosen."""
    graph = Graph("red heart").through("TinyEmojiAsFlow").counted()
    refitted = tune(graph, measure(graph, fitted=True), steps=6, samples=3, save=True, name="flow")
    samples, run = graph.family("fitted", measure="saved only", calibration=refitted,
                                steps=6).run(server)
    assert run.status == "success" and looks_like_an_image(samples), run.error
    redness = samples.mean((0, 2, 3))
    assert redness[0] > redness[1] + 0.2
    used = graph.evaluations(server)[-6:]
    assert used[0] == pytest.approx(1.0) and all(b < a for a, b in zip(used, used[1:]))
    loaded = Statistics.load(folder / "flow.safetensors")
    assert list(loaded.about["refits"]) == ["5"]  # of 6 evaluations 5 are on the grid
    listed = Graph("red heart").through("TinyEmojiAsFlow").counted().ksampler(
        "lambda_fitted", steps=6, scheduler="simple")
    assert looks_like_an_image(listed.samples(server))


def test_the_fitted_solver_refuses_statistics_that_were_measured_for_v3(server, folder) -> None:
    graph = Graph("panda")
    samples, run = graph.family("fitted", measure="saved only", calibration=measure(graph)).run(server)
    assert run.status == "error"
    assert "measure again with fitted on" in run.error["exception_message"]


def test_every_prompt_is_measured_when_asked_for(server, folder) -> None:
    for words, count in (("panda", 1), ("strawberry", 2), ("panda", 2)):
        samples, run = sampler_node(
            Graph(words).through("TestSlowModel", seconds=0.0), measure="every prompt",
            seed=21 + count).run(server)
        assert run.status == "success" and looks_like_an_image(samples) and len(files(folder)) == count
        assert not any("another prompt" in text for text in run.texts)


def test_another_guidance_is_measured_anew_and_a_near_one_is_not(server, folder) -> None:
    Graph().ksampler(NAME, steps=4, cfg=3.0).samples(server)
    Graph().ksampler(NAME, steps=4, cfg=3.2).samples(server)
    assert len(files(folder)) == 1
    Graph().ksampler(NAME, steps=4, cfg=6.0).samples(server)
    assert [re.search("-cfg[0-9]", name)[0] for name in files(folder)] == ["-cfg3", "-cfg6"]


def test_measured_or_loaded_by_a_link_or_on_the_model_it_gives_the_same_image(server, folder) -> None:
    graph = Graph("panda")
    statistics = measure(graph, save=True, name="shared/mine")
    first = sampler_node(graph, calibration=statistics).samples(server)
    assert files(folder) == ["mine.safetensors"] and (folder / "shared" / "mine.safetensors").exists()

    info = server.get(
        "/object_info/LambdaLoadCalibration")["LambdaLoadCalibration"]["input"]["required"]["name"]
    assert "shared/mine.safetensors" in (info[0] if isinstance(info[0], list) else info[1]["options"])
    graph = Graph("panda")
    loaded = graph.add("LambdaLoadCalibration", name="shared/mine.safetensors")
    assert torch.equal(sampler_node(graph, calibration=[loaded, 0]).samples(server), first)

    for measured in (False, True):
        graph = Graph("panda")
        if measured:
            graph.model = [measure(graph)[0], 2]
        else:
            graph.through("LambdaLoadCalibration", 2, name="shared/mine.safetensors")
        graph.counted().ksampler(NAME)
        assert torch.equal(graph.samples(server), first) and len(graph.evaluations(server)) == STEPS

    graph = Graph("panda")
    graph.model = [graph.add("LambdaLoadCalibration", name="shared/mine.safetensors"), 2]
    _, run = graph.ksampler(NAME).run(server)
    assert run.status == "error" and "has no model to attach the file to" in run.error["exception_message"]


def test_measure_model_saves_what_lambda_v3_and_lambda_fitted_then_find(server, folder) -> None:
    """With nothing behind it, and a second time under the same name."""
    for seed, count in ((0, 1), (0, 1), (1, 2)):
        graph = Graph("panda").through("TestSlowModel", seconds=0.0001 * count)
        node, _ = measure(graph, prompt="any", fitted=True, save=True, seed=seed, intervals=24)
        run = server.run(graph.nodes)
        assert run.status == "success" and run.outputs[node]["images"], run.error
        assert len(files(folder)) == count
    saved = [re.match("saved as (.+); samplers find it by themselves. Change the seed to see it", text)
             for text in run.texts]
    [newest] = [found[1] for found in saved if found]
    assert newest.endswith("-fitted-cfg3-2.safetensors")
    for name in (NAME, "lambda_fitted"):
        graph = Graph("strawberry").counted().ksampler(name, steps=5)
        _, run = graph.run(server)
        assert run.texts == [f"statistics: {newest}"] and len(graph.evaluations(server)) == 5
    graph = Graph("panda")
    measure(graph, save=True)
    assert any("where `measure` is every prompt" in text for text in server.run(graph.nodes).texts)


def test_the_picture_of_the_curves_is_drawn(server, folder) -> None:
    graph = Graph("panda")
    node = measure(graph, seed=7)[0]  # one's own: nothing comes from ComfyUI's cache
    graph.add("PreviewImage", images=[node, 1])
    run = server.run(graph.nodes)
    [shown] = run.outputs[node]["images"]
    with Image.open(server.file(shown)) as image:
        assert image.size == (480, 300) and len(image.convert("RGB").getcolors(100_000)) > 50
    assert ("measuring the model's statistics: evaluation 30 of 30, as long as 3 images of 20 steps, 0 s left"
            in run.texts)
    assert re.fullmatch("statistics measured in [0-9]+ s, as long as 3 images of 20 steps", run.texts[-1])


def test_statistics_of_another_checkpoint_or_guidance_bring_a_warning_that_names_both(
        server, folder) -> None:
    graph = Graph("panda")
    flow = graph.add("TestFlowModel")
    latent = [graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1), 0]
    statistics = measure(graph, model=[flow, 0], positive=[flow, 1], negative=[flow, 2], latent_image=latent)
    samples, run = sampler_node(graph, calibration=statistics).run(server)
    assert run.status == "success"
    [warning] = [text for text in run.texts if text.startswith("warning")]
    assert re.search(r"measured on SD3-[0-9a-f]{12}, and this is NanoEmoji-[0-9a-f]{12}", warning)
    assert warning.removeprefix("warning: ") in server.log.read_text()

    graph = Graph("panda")
    _, run = sampler_node(graph, calibration=measure(graph, cfg=8.0)).run(server)
    [warning] = [text for text in run.texts if text.startswith("warning")]
    assert "measured for guidance 8.0, and this is 3" in warning


def test_without_leave_to_measure_the_error_names_the_nodes_to_add(server, folder) -> None:
    _, run = sampler_node(Graph(), measure="saved only").run(server)
    assert run.status == "error" and re.search(
        "no saved statistics for NanoEmoji-.* run Measure Model once, connect what Load Calibration",
        run.error["exception_message"])
    assert files(folder) == []


def test_cancel_while_measuring_leaves_a_partial_file_from_which_the_next_run_goes_on(
        server, folder) -> None:
    cancelled = []

    async def watch(server, run):
        if len(run.progress) == 15 * IMAGES and not cancelled:
            cancelled.append(True)
            await server.interrupt()

    graph = Graph().through("TestSlowModel", seconds=0.02).counted().ksampler(NAME, steps=4)
    _, run = graph.run(server, watch)
    assert run.status == "interrupted"
    [partial] = files(folder)
    assert partial.endswith(".part")
    first = len(graph.evaluations(server))
    graph = Graph().counted().ksampler(NAME, steps=4, seed=8)
    samples, run = graph.run(server)
    assert run.status == "success" and samples.isfinite().all()
    again = len(graph.evaluations(server)) - 4
    first, again = first / IMAGES, again / IMAGES
    # the model is probed again
    assert 13 <= first < 30 and again <= 54 - 10 + 4 and first + again <= 54 + 4 + 4
    [name] = files(folder)
    assert "-cfg3." in name and name.endswith(".safetensors")


@pytest.mark.parametrize("name",
                         ["../evil", "/tmp/evil", "a/../../evil", "..", "a\\..\\..\\evil", ".hidden", "a:b"])
def test_a_name_that_would_leave_the_folder_is_refused(server, folder, name: str) -> None:
    graph = Graph().counted()
    measure(graph, intervals=4, samples=1, save=True, name=name)
    with pytest.raises(PromptRefused, match="cannot be a file in"):  # before anything is measured
        server.run(graph.nodes)
    assert files(folder) == []


@pytest.mark.parametrize("name", ["x", ""])
def test_a_file_of_the_same_name_is_left_alone(server, folder, name: str) -> None:
    for seed in (40, 41, 42):
        graph = Graph()
        measure(graph, intervals=4, samples=1, seed=seed, save=True, name=name)
        run = server.run(graph.nodes)
        assert run.status == "success" and run.texts[-1].startswith("saved as ")
    assert len(files(folder)) == 3 and all(file.startswith(name) for file in files(folder))
    assert sum(file.endswith(("-2.safetensors", "-3.safetensors")) for file in files(folder)) == 2


def test_a_broken_or_missing_file_says_so_on_the_node(server, folder) -> None:
    (folder / "broken.safetensors").write_bytes(b"not a file")
    graph = Graph()
    loaded = graph.add("LambdaLoadCalibration", name="broken.safetensors")
    _, run = sampler_node(graph, calibration=[loaded, 0]).run(server)
    assert run.status == "error" and "is damaged or was cut short" in run.error["exception_message"]
    graph = Graph()
    loaded = graph.add("LambdaLoadCalibration", name="gone.safetensors")
    try:
        _, run = sampler_node(graph, calibration=[loaded, 0]).run(server)
        assert run.status == "error" and "there is no calibration 'gone.safetensors'" in run.error[
            "exception_message"]
    except PromptRefused:
        pass  # newer ComfyUI refuses the choice itself
    samples, run = Graph().ksampler(NAME, steps=4).run(server)  # and the search for a match steps over it
    assert run.status == "success" and "is damaged or was cut short" in server.log.read_text()


def test_img2img_flow_inpainting_and_batches_work(server, folder) -> None:
    first = Graph("panda").ksampler("dpmpp_2m", steps=12).ksampler(NAME, seed=9, denoise=0.4).samples(server)
    assert looks_like_an_image(first)
    graph = Graph("red heart").through("TinyEmojiAsFlow")
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="simple", steps=12, denoise=1.0), 0]
    flow = sampler_node(graph, sigmas=sigmas, measure="auto").samples(server)
    assert looks_like_an_image(flow) and flow.mean((0, 2, 3))[0] > flow.mean((0, 2, 3))[1] + 0.2
    graph = Graph("panda")
    graph.latent = [graph.add("EmptyLatentImage", width=256, height=256, batch_size=3), 0]
    batch = graph.ksampler(NAME).samples(server)
    assert batch.shape[0] == 3 and looks_like_an_image(batch)
    graph = Graph("panda").ksampler("dpmpp_2m", steps=12)
    mask = graph.add("SolidMask", value=0.0, width=256, height=256)
    graph.latent = [graph.add("SetLatentNoiseMask", samples=graph.latent, mask=[mask, 0]), 0]
    kept = Graph("panda").ksampler("dpmpp_2m", steps=12).samples(server)
    assert (graph.ksampler(NAME).samples(server) - kept).abs().max() < 1e-3


def test_a_transformer_flow_model_is_measured_and_sampled(server, folder) -> None:
    graph = Graph()
    flow = graph.add("TestFlowModel")
    graph.model, graph.positive, graph.negative = [flow, 0], [flow, 1], [flow, 2]
    graph.latent = [graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1), 0]
    samples, run = graph.ksampler(NAME, scheduler="simple").run(server)
    assert run.status == "success", run.error
    assert samples.isfinite().all() and files(folder)[0].startswith("SD3-")


def test_a_lora_is_another_model_of_the_same_checkpoint(base, server, folder) -> None:
    """Its statistics are measured apart, list it, and carry the fingerprint of the unpatched weights."""
    generator = torch.Generator().manual_seed(0)
    (base / "models" / "loras").mkdir(exist_ok=True)
    save_file({"diffusion_model.out.2.lora_up.weight": torch.randn(3, 2, 1, 1, generator=generator) * 0.1,
               "diffusion_model.out.2.lora_down.weight": torch.randn(2, 32, 3, 3, generator=generator) * 0.1},
              base / "models" / "loras" / "small.safetensors")
    Graph().ksampler(NAME, steps=4, seed=31).samples(server)
    for seed in (32, 33):
        graph = Graph().through("LoraLoaderModelOnly", lora_name="small.safetensors", strength_model=0.8)
        _, run = graph.ksampler(NAME, steps=4, seed=seed).run(server)
        assert run.status == "success", run.error
        assert any("measuring" in text for text in run.texts) == (seed == 32)
    plain, patched = sorted((Statistics.load(path).about for path in folder.glob("*.safetensors")),
                            key=lambda about: len(about["patches"]))
    assert plain["fingerprint"] == patched["fingerprint"] and plain["patches"] == []
    assert re.fullmatch(r"1 weights \([0-9a-f]{8}\)", patched["patches"][0]) and patched["strengths"] == [0.8]

    graph = Graph().through("LoraLoaderModelOnly", lora_name="small.safetensors", strength_model=0.8)
    name = next(path.name for path in folder.glob("*.safetensors")
                if not Statistics.load(path).about["patches"])
    graph.through("LambdaLoadCalibration", 2, name=name)
    _, run = graph.ksampler(NAME, steps=4, seed=34).run(server)
    assert any("measured with the patches none, and this model has" in text for text in run.texts)


@pytest.mark.parametrize("flag", ["--fp16-unet", "--fp8_e4m3fn-unet"])
def test_the_fingerprint_is_the_same_in_every_precision(servers, server, folder, flag: str) -> None:
    # a seed of its own: not what the server remembers
    Graph.emoji().ksampler(NAME, steps=4, seed=len(flag)).samples(server)
    [name] = files(folder)
    samples, run = Graph.emoji().ksampler(NAME, steps=4).run(servers(flag))
    assert run.status == "success" and run.texts == [f"statistics: {name}"] and samples.isfinite().all()
