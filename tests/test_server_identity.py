"""Which calibration a run takes, in a real ComfyUI server: that of its model as it is patched and guided,
and none of another."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samplers import FAMILIES, Statistics
from test_server import Graph
from test_server_v3 import NAME, files, measure, tune

FEW = 4


def spent(graph: Graph, server) -> int:
    """Evaluations of a run, which must succeed."""
    samples, run = graph.run(server)
    assert run.status == "success", run.error
    assert samples.isfinite().all()
    return len(graph.evaluations(server))


def patched(*nodes: tuple[str, dict], name: str = NAME, words: str = "panda", **how) -> Graph:
    graph = Graph(words)
    for class_type, inputs in nodes:
        graph.through(class_type, **inputs)
    return graph.counted().ksampler(name, steps=FEW, **how)


FREEU = ("FreeU_V2", dict(b1=1.3, b2=1.4, s1=0.9, s2=0.2))
RESCALED = ("RescaleCFG", dict(multiplier=0.7))
VELOCITY = ("ModelSamplingDiscrete", dict(sampling="v_prediction", zsnr=False))
ZERO_SNR = ("ModelSamplingDiscrete", dict(sampling="eps", zsnr=True))
SAME = ("ModelSamplingDiscrete", dict(sampling="eps", zsnr=False))


@pytest.mark.parametrize("patch", [FREEU, RESCALED, VELOCITY, ZERO_SNR],
                         ids=lambda patch: patch[0] + str(patch[1].get("zsnr", "")))
def test_a_model_that_a_node_has_changed_is_measured_by_itself(server, folder, patch) -> None:
    assert spent(patched(), server) > FEW
    assert spent(patched(patch, seed=1), server) > FEW and spent(patched(patch, seed=2), server) == FEW
    assert spent(patched(seed=3), server) == FEW and len(files(folder)) == 2
    about = [Statistics.load(folder / name).about for name in files(folder)]
    assert sorted(len(entry["patches"])
                  for entry in about) == [0, 1] and len({entry["fingerprint"] for entry in about}) == 1


def test_a_node_that_changes_nothing_makes_no_other_model(server, folder) -> None:
    assert spent(patched(), server) > FEW
    assert spent(patched(SAME, seed=1), server) == FEW


def test_levels_beyond_those_that_were_measured_are_measured_too(server, folder) -> None:
    """A flow's shift changes how far down its levels go, and a schedule may go beyond the model's own."""
    def flow(shift: float, seed: int) -> Graph:
        graph = Graph()
        made = graph.add("TestFlowModel")
        graph.model, graph.positive, graph.negative = [made, 0], [made, 1], [made, 2]
        graph.latent = [graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1), 0]
        return graph.through("ModelSamplingSD3",
                             shift=shift).counted().ksampler(NAME, steps=FEW, seed=seed, scheduler="normal")

    for shift, seed, few in ((3.0, 1, False), (1.0, 2, False), (3.0, 3, True), (1.0, 4, True)):
        assert (spent(flow(shift, seed), server) == FEW) is few, shift
    assert len(files(folder)) == 2

    def high(seed: int) -> Graph:
        graph = Graph("panda").counted()
        sigmas = [graph.add("TestSigmas", sigmas="20, 5, 1, 0.3, 0"), 0]
        return graph.custom([graph.add("KSamplerSelect", sampler_name=NAME), 0], sigmas, seed)

    assert spent(high(1), server) > FEW and spent(high(2), server) == FEW


def guided(node: str, seed: int, name: str = NAME, measure: str | None = None, **inputs) -> Graph:
    """Through a guider, with the sampler of a name, or with the node that takes a rule."""
    graph = Graph("panda").counted()
    settings = {
        key: option.default for key, option in FAMILIES["v3"].options.items() if option.stand_in is None
    }
    sampler = measure and [graph.add("LambdaSamplerV3", measure=measure, **settings), 0]
    conds = {
        "BasicGuider": dict(conditioning=graph.positive),
        "DualCFGGuider": dict(cond1=graph.positive, cond2=graph.positive, negative=graph.negative,
                              style="regular"), "PerpNegGuider": dict(positive=graph.positive,
                                                                      negative=graph.negative,
                                                                      empty_conditioning=graph.negative)
    }[node]
    guider = [graph.add(node, model=graph.model, **conds, **inputs), 0]
    sigmas = [graph.add("BasicScheduler", model=graph.model, scheduler="karras", steps=FEW, denoise=1.0), 0]
    made = graph.add("SamplerCustomAdvanced", noise=[graph.add("RandomNoise", noise_seed=seed),
                                                     0], guider=guider, sigmas=sigmas, sampler=sampler
                     or [graph.add("KSamplerSelect", sampler_name=name), 0], latent_image=graph.latent)
    graph.latent = [made, 0]
    return graph


def test_a_guider_with_a_rule_of_its_own_is_measured_by_itself(server, folder) -> None:
    assert spent(guided("BasicGuider", 1), server) > FEW
    for node, settings in (("DualCFGGuider", dict(cfg_conds=1.0, cfg_cond2_negative=1.0)),
                           ("DualCFGGuider", dict(cfg_conds=3.0, cfg_cond2_negative=8.0)),
                           ("PerpNegGuider", dict(cfg=3.0, neg_scale=1.0)), ("PerpNegGuider",
                                                                             dict(cfg=3.0, neg_scale=5.0))):
        assert spent(guided(node, 2, **settings), server) > FEW, settings
        assert spent(guided(node, 3, **settings), server) == FEW, settings
    assert len(files(folder)) == 5


def test_without_guidance_every_guider_takes_what_another_or_the_nodes_have_measured(
        server, folder) -> None:
    """KSampler at cfg 1, BasicGuider, and Measure Model at a prompt."""
    graph = Graph("panda")
    measure(graph, cfg=1.0, save=True, name="ours")
    assert server.run(graph.nodes).status == "success"
    for rule in ("every prompt", "saved only"):
        graph = guided("BasicGuider", 4, measure=rule)
        _, run = graph.run(server)
        assert run.status == "success" and run.texts == ["statistics: ours.safetensors"]
        assert len(graph.evaluations(server)) == FEW
    assert spent(guided("BasicGuider", 4), server) > FEW  # auto takes none of a prompt
    assert spent(patched(cfg=1.0, seed=4), server) == FEW


CACHED = {"EasyCache": dict(reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False),
          "LazyCache": dict(reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)}


@pytest.mark.parametrize("name", [NAME, "lambda_fitted", "lambda_amed_2m"])
@pytest.mark.parametrize("node", CACHED)
def test_a_cache_does_not_answer_for_the_model_while_it_is_measured(server, folder, node: str,
                                                                    name: str) -> None:
    first = patched((node, CACHED[node]), name=name).samples(server)
    [cached] = files(folder)
    content = (folder / cached).read_bytes()
    assert torch.equal(
        patched((node, CACHED[node]), ("TestSlowModel", {"seconds": 0.0}), name=name).samples(server), first)
    if name == NAME:  # and what was measured is the plain model's
        (folder / cached).unlink()
        patched().samples(server)
        assert files(folder) == [cached]
        plain = Statistics.load(folder / cached)
        (folder / cached).write_bytes(content)
        for curve in ("l", "s", "b"):
            np.testing.assert_allclose(getattr(Statistics.load(folder / cached), curve),
                                       getattr(plain, curve), atol=1e-6)


@pytest.fixture
def lora(base):
    generator = torch.Generator().manual_seed(0)
    place = base / "models" / "loras" / "small.safetensors"
    place.parent.mkdir(exist_ok=True)
    save_file(
        {
            "diffusion_model.out.2.lora_up.weight": 0.1 * torch.randn(3, 2, 1, 1, generator=generator),
            "diffusion_model.out.2.lora_down.weight": 0.1 * torch.randn(2, 32, 3, 3, generator=generator)
        }, place)
    return place.name


@pytest.mark.parametrize("name", [NAME, "lambda_fitted", "lambda_amed_2m"])
def test_the_run_that_measures_makes_the_image_of_all_later_ones_under_hook_keyframes_too(
        server, folder, lora, name: str) -> None:
    def graph(again: int) -> Graph:
        made = Graph("panda")
        hooks = [made.add("CreateHookLoraModelOnly", lora_name=lora, strength_model=0.8), 0]
        frames = [
            made.add("CreateHookKeyframesInterpolated", strength_start=0.0, strength_end=1.0,
                     interpolation="linear", start_percent=0.0, end_percent=1.0, keyframes_count=5,
                     print_keyframes=False), 0
        ]
        hooks = [made.add("SetHookKeyframes", hooks=hooks, hook_kf=frames), 0]
        made.positive = [
            made.add("ConditioningSetProperties", cond_NEW=made.positive, strength=1.0,
                     set_cond_area="default", hooks=hooks), 0
        ]
        return made.through("TestSlowModel", seconds=1e-4 * again).ksampler(name, steps=FEW)

    first, second = (graph(again).samples(server) for again in (0, 1))
    assert torch.equal(first, second)


def test_a_damaged_file_is_measured_again_once_and_replaced(server, folder) -> None:
    patched().samples(server)
    [name] = files(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:len(whole) // 2])
    assert spent(patched(seed=1), server) > FEW
    assert files(folder) == [name] and Statistics.load(folder / name).about["guidance"] == 3.0
    assert spent(patched(seed=2), server) == FEW


def test_a_file_of_a_newer_version_is_left_as_it_is(server, folder) -> None:
    patched().samples(server)
    [name] = files(folder)
    newer = (folder / name).read_bytes().replace(b"lambda-solvers statistics 1",
                                                 b"lambda-solvers statistics 9")
    (folder / name).write_bytes(newer)
    assert spent(patched(seed=1), server) > FEW
    assert len(files(folder)) == 2 and (folder / name).read_bytes() == newer
    assert spent(patched(seed=2), server) == FEW


def test_one_unusable_file_does_not_keep_a_sampler_from_the_others(server, folder) -> None:
    patched().samples(server)
    [name] = files(folder)
    (folder / "a.safetensors").symlink_to(folder / "nowhere.safetensors")
    (folder / "b.safetensors").mkdir()
    (folder / "c.safetensors").write_bytes(b"<html>")
    assert spent(patched(seed=1), server) == FEW


def test_a_folder_that_was_removed_is_made_again(server, folder) -> None:
    shutil.rmtree(folder)
    assert "LambdaLoadCalibration" in server.get("/object_info")
    assert spent(patched(), server) > FEW and len(files(folder)) == 1


def test_where_nothing_can_be_written_a_run_measures_and_says_that_it_will_again(
        server, folder) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file in the folder's place")
    try:
        for seed in (1, 2):
            graph = patched(seed=seed)
            samples, run = graph.run(server)
            assert run.status == "success" and samples.isfinite().all(), run.error
            assert len(graph.evaluations(server)) > FEW
            assert any("statistics measured, but not saved" in text and "the next run measures again" in text
                       for text in run.texts)
    finally:
        folder.unlink()
        folder.mkdir()


def test_a_schedule_without_steps_measures_nothing(server, folder) -> None:
    graph = Graph("panda").counted()
    sigmas = [graph.add("TestSigmas", sigmas="14.6"), 0]
    _, run = graph.custom([graph.add("KSamplerSelect", sampler_name=NAME), 0], sigmas).run(server)
    assert run.status == "success" and not files(folder)


def test_a_refit_wants_statistics_of_its_own_model_and_an_image_for_every_prompt(
        server, folder) -> None:
    graph = Graph("panda")
    measure(graph, fitted=True, save=True, name="plain")
    assert server.run(graph.nodes).status == "success"

    def refused(**changes) -> str:
        other = Graph("panda")
        loaded = [other.add("LambdaLoadCalibration", name="plain.safetensors"), 0]
        prompts = {
            name: content if name != "clip" else [other.checkpoint, 1] for name, content in changes.items()
        }
        tune(other, loaded, **prompts)
        run = server.run(other.nodes)
        assert run.status == "error" and files(folder) == ["plain.safetensors"]
        return run.error["exception_message"]

    assert "measured for guidance 3.0, and this is 8" in refused(cfg=8.0)
    assert "steps = 16 is out of range: on this model choose from 3 to 15" in refused(steps=16)
    assert "samples = 2 is too few: choose at least 3" in refused(samples=2)
    assert "samples = 4 is too few: choose at least 13" in refused(
        samples=4, clip=None, prompts="\n".join(f"pizza {k}" for k in range(12)))
