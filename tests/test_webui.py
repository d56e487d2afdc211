"""Stable Diffusion WebUI as a host: our names in its lists, its seeds, interruption, panel and infotext."""
from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import comfy_models
from problems import Gaussian
from samplers import k_diffusion_sampler
from samplers.learning.train_hypersolver import USUAL
from test_nodes import NAMES
from webui_host import (PACK, Composable, Entry, Host, Multicond, SamplerData,
                        prompt)

PLAIN = {"Lambda 2M": "dpmpp_2m", "Lambda 3M": "dpmpp_3m", "Lambda 2M SDE": "dpmpp_2m_sde",
         "Lambda 3M SDE": "dpmpp_3m_sde"}
EVERY_PLAIN = pytest.mark.parametrize("name", PLAIN)
SIGMAS = {"ve": torch.tensor([14.0, 6.0, 2.0, 0.7, 0.2, 0.0]),
          "flow": torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])}


@pytest.fixture
def host(monkeypatch) -> Host:
    found = Host(monkeypatch)
    found.load()
    return found


def noise(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


# --- the lists ----------------------------------------------------------------------------------------------

def test_our_names_are_appended_once_and_those_of_an_earlier_load_are_replaced(monkeypatch) -> None:
    host = Host(monkeypatch)
    listed = host.samplers.all_samplers
    host.samplers.get_sampler_and_scheduler("Lambda 2M", "Karras")  # is remembered as unknown
    host.load()
    first = list(listed)
    assert host.samplers.all_samplers is listed and first[0] is host.theirs
    host.load()
    assert [data.name for data in listed] == [data.name for data in first]
    assert all(new is not old for new, old in zip(listed[1:], first[1:]))
    assert host.samplers.all_samplers_map == {data.name: data for data in listed} and host.set == 2
    assert host.samplers.get_sampler_and_scheduler("Lambda 2M", "Karras") == ("Lambda 2M", "Karras")
    assert {alias for data in listed[1:] for alias in data.aliases} <= set(NAMES)


def test_no_name_ends_in_a_schedule_type(host) -> None:
    endings = [f" {word}" for kind in host.schedulers for word in (kind.name, kind.label)]
    assert not [data.name for data in host.samplers.all_samplers if data.name.endswith(tuple(endings))]


def test_another_s_sampler_of_our_name_is_left_alone(monkeypatch) -> None:
    host = Host(monkeypatch)
    another = SamplerData("Lambda 2M", lambda model: None, [], {})
    host.samplers.all_samplers.append(another)
    host.samplers.all_samplers_map[another.name] = another
    host.load()
    assert host.samplers.all_samplers_map["Lambda 2M"] is another
    assert [data.name for data in host.samplers.all_samplers].count("Lambda 2M") == 1


def test_a_webui_without_schedule_types_is_told_so_and_keeps_its_lists(monkeypatch, capsys) -> None:
    host = Host(monkeypatch, schedule_types=False)
    script = host.load()
    assert not hasattr(script, "Panel") and host.samplers.all_samplers == [host.theirs]
    assert "1.9 and newer" in capsys.readouterr().out


def test_the_pack_takes_no_module_of_another_s_on_the_path(monkeypatch, tmp_path) -> None:
    """Forge puts every extension's folder on sys.path."""
    for name in ("samplers", "webui", "hosting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of another extension')")
    monkeypatch.syspath_prepend(str(tmp_path))
    host = Host(monkeypatch)
    host.load()
    assert host.part("samplers").__name__ == f"{PACK}.samplers"


# --- runs ---------------------------------------------------------------------------------------------------

@EVERY_PLAIN
@pytest.mark.parametrize("path", SIGMAS)
def test_a_job_makes_what_a_direct_call_makes(monkeypatch, name: str, path: str) -> None:
    host = Host(monkeypatch, path)
    host.load()
    p, x, sigmas = host.job(batch=2), noise(2), SIGMAS[path]
    found = host.run(name, p, x, sigmas)
    expected = k_diffusion_sampler(PLAIN[name], path)(Gaussian(path, mean=2.0 * 0.5 - 1.0 * -0.1),
                                                      x * sigmas[0], sigmas, {"seed": 11}, disable=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert p.extra_generation_params == {} and host.state.sampling_step == len(sigmas) - 2


def test_the_noise_of_an_image_is_that_of_its_seed_in_any_batch(host) -> None:
    x = noise(2)
    batch = host.run("Lambda 2M SDE", host.job(batch=2, iteration=1), x, SIGMAS["ve"])
    alone = host.run("Lambda 2M SDE", host.job(seed=14), x[1:], SIGMAS["ve"])
    torch.testing.assert_close(batch[1:], alone, rtol=0, atol=1e-5)
    other = host.run("Lambda 2M SDE", host.job(seed=15), x[1:], SIGMAS["ve"])
    assert (alone - other).abs().max() > 0.01


def test_the_webui_counts_the_evaluations_of_every_sampler(host) -> None:
    for data in host.samplers.all_samplers[1:]:
        solver = data.constructor.lambda_solvers
        assert data.total_steps(7) == 7 * solver.evaluations_per_step, data.name
        assert solver is host.part("samplers").SAMPLERS[NAMES_OF[data.aliases[0]]]


NAMES_OF = {"lambda_2m": "dpmpp_2m", "lambda_3m": "dpmpp_3m", "lambda_2m_sde": "dpmpp_2m_sde",
            "lambda_3m_sde": "dpmpp_3m_sde", "lambda_v3": "dpm_solver_v3", "lambda_amed": "amed",
            "lambda_amed_2m": "amed_dpmpp_2m", "lambda_fitted": "fitted_chosen"}


def test_an_interruption_leaves_the_last_image(host) -> None:
    host.interrupt_at = 2
    found = host.run("Lambda 2M", host.job(), noise(), SIGMAS["ve"])
    assert host.sampler.model_wrap_cfg.asked == 2 and torch.equal(found, host.state.current_latent)


def test_a_flow_schedule_that_ends_in_two_zeros_ends_in_one(monkeypatch) -> None:
    host = Host(monkeypatch, "flow")
    host.load()
    x, once = noise(), SIGMAS["flow"]
    twice = torch.cat([once, torch.zeros(1)])
    found, expected = (host.run("Lambda 2M", host.job(), x, sigmas) for sigmas in (twice, once))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="starts at sigma = 9999.*Simple"):
        host.run("Lambda 2M", host.job(), x, torch.tensor([9999.0, 1.0, 0.0]))


# --- measuring ----------------------------------------------------------------------------------------------

MEASURED = {"Lambda v3": "statistics", "Lambda Fitted": "statistics", "Lambda AMED": "trained",
            "Lambda AMED 2M": "trained"}
RULE, USED = "Lambda calibration", "Lambda calibration file"


@pytest.fixture
def bent(monkeypatch, tmp_path) -> Host:
    """A WebUI whose model is worth measuring, with an empty folder of calibrations."""
    found = Host(monkeypatch, models=tmp_path)
    found.nonlinear = True
    found.load()
    return found


def files(host: Host) -> list[Path]:
    return sorted((host.models / "solver_calibrations").glob("*.safetensors"))


def large(count: int = 1) -> torch.Tensor:
    """So large that one or two trajectories are enough."""
    return torch.randn(count, 4, 40, 40, generator=torch.Generator().manual_seed(1))


def full(host: Host, steps: int = 3) -> torch.Tensor:
    """A schedule from full noise."""
    return torch.cat([torch.logspace(float(host.sigmas[-1].log10()), -1.4, steps), torch.zeros(1)])


@pytest.mark.parametrize("name", MEASURED)
def test_a_model_is_measured_once_and_the_picture_is_the_same_before_and_after(bent, name: str) -> None:
    sigmas, drawn, pictures, asked = full(bent), [], [], []
    for _ in range(2):
        torch.manual_seed(0)
        p = bent.job(batch=2, cond=Multicond((2,), [[Composable(prompt(0.5, 0.9, until=1))]] * 2))
        pictures.append(bent.run(name, p, large(2), sigmas))
        drawn.append(torch.rand(1))
        asked.append(bent.sampler.model_wrap_cfg.asked)
    assert torch.equal(*pictures) and torch.equal(*drawn)
    assert asked[0] > 50 > asked[1]
    [file] = files(bent)
    assert p.extra_generation_params[RULE] == "auto"
    assert p.extra_generation_params[USED].startswith(file.stem + " ")


def test_a_measurement_is_made_at_nobody_s_prompt_and_leaves_the_job_as_it_was(bent) -> None:
    p = bent.job(cfg_scale=2.1, is_hr_pass=False, hr_cfg=7.0)
    bent.run("Lambda v3", p, large(), full(bent))
    told = bent.sampler.model_wrap_cfg.told
    measuring, sampling = told[:-3], told[-3:]
    assert {scale for _, scale, _ in measuring} == {2.0} and 0.5 not in {mean for mean, _, _ in measuring}
    assert [(round(mean, 6), scale) for mean, scale, _ in sampling] == [(0.5, 2.1)] * 3
    assert [step for _, _, step in sampling] == [0, 1, 2] and p.hr_cfg == 7.0
    assert bent.state.sampling_step == 2 and bent.state.textinfo == "statistics saved: Host-0123456789-cfg2"
    assert p.comments[-1] == bent.state.textinfo and not any(": evaluation" in line for line in p.comments)
    p.is_hr_pass = True
    bent.run("Lambda v3", p, large(), full(bent))
    [first, second] = p.extra_generation_params[USED].split("; ")
    assert (first.split()[0][-5:], second.split()[0][-5:]) == ("-cfg2", "-cfg7")
    assert [path.stem.rpartition("-")[2] for path in files(bent)] == ["cfg2", "cfg7"]


def test_the_loras_of_a_prompt_are_named_with_what_extensions_read_from_it(bent) -> None:
    def network(*items: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(items=list(items))

    def said(**more) -> tuple[list[str], list[float]]:
        p = bent.job(extra_network_data={"lora": [network("a", "0.5", "unet=1", "lbw=MIDD", "stop=10")],
                                         "lyco": [network("b", "1")]}, **more)
        told = bent.part("webui.checkpoint").description(
            p, {"cond": p.cond, "uncond": p.uncond, "cond_scale": 2.0})
        return told["patches"], told["strengths"]

    assert said() == said(is_hr_pass=True) == (["LoRA a lbw=MIDD stop=10", "LoRA b"], [0.5, 1.0, 1.0])
    second = {"is_hr_pass": True, "hr_extra_network_data": {"lora": [network("c", "0.8")]}}
    assert said(**second) == (["LoRA c"], [0.8])
    assert said(is_hr_pass=True, hr_extra_network_data={}) == ([], [])


def test_what_is_measured_is_told_at_the_progress_bar(bent) -> None:
    told = []
    bent.called = lambda: told.append(bent.state.textinfo)
    bent.run("Lambda v3", bent.job(), large(), full(bent))
    assert "measuring once, as long as" in told[0]
    assert any("measuring the model's statistics: evaluation 20 of " in text for text in told)


def test_interrupted_while_it_measures_the_next_job_goes_on_from_there(bent) -> None:
    bent.interrupt_at = 40
    x = large()
    assert torch.equal(bent.run("Lambda v3", p := bent.job(), x, full(bent)), x)  # the image as it was
    assert files(bent) == [] and "the next run goes on from there" in bent.state.textinfo
    assert "the next run goes on from there" in p.comments[-1]
    bent.interrupt_at, bent.state.interrupted = None, False
    bent.run("Lambda v3", bent.job(), x, full(bent))
    resumed = bent.sampler.model_wrap_cfg.asked
    files(bent)[0].unlink()
    bent.run("Lambda v3", bent.job(), x, full(bent))
    assert resumed < bent.sampler.model_wrap_cfg.asked - 20


@pytest.mark.parametrize("fault, told", [("mask", "a mask"), ("refiner", "a refiner"), ("ngms", "Negative"),
                                         ("prompt", "changes from step to step")])
def test_a_job_in_which_the_model_does_not_answer_for_itself_is_refused_by_name(bent, fault, told) -> None:
    more = {"refiner": {"refiner_checkpoint_info": "x"}, "ngms": {"s_min_uncond": 0.5},
            "prompt": {"cond": Multicond((1,), [[Composable(prompt(0.5, 0.9))]])}}.get(fault, {})
    p = processed(bent, bent.job(**more), calibration="every prompt" if fault == "prompt" else "auto")
    bent.mask = large() if fault == "mask" else None
    with pytest.raises(ValueError, match=told):
        bent.run("Lambda v3", p, large(), full(bent))
    assert files(bent) == []


def test_a_file_with_a_hypersolver_is_taken_and_used_at_its_guidances(bent) -> None:
    plain = bent.run("Lambda Fitted", bent.job(), large(), full(bent, 5))
    found = bent.part("samplers").load_calibration(files(bent)[0])
    made = bent.part("samplers.learning.hypersolver")
    network = made.Network(4).begun()
    network.leave.bias.data += 3.0
    weights = network.state_dict()
    weights["sizes"][1, 0] = -1.0
    bounds = np.array([[-9.0] * 7 + [0.0], [9.0] * 7 + [np.log(3.0)]])  # guidance 1 to 3
    taught = replace(found, hypersolver=made.Hypersolver(weights, bounds, np.array(USUAL), (5,)))
    taught.save(bent.models / "solver_calibrations" / "taught.safetensors")
    told: list[str] = []
    bent.called = lambda: told.append(bent.state.textinfo)
    used = bent.run("Lambda Fitted", p := bent.job(), large(), full(bent, 5))
    assert "with their hypersolver" in told[-1] and not torch.allclose(used, plain)
    assert p.extra_generation_params[USED].startswith("taught ")
    assert torch.isfinite(used).all() and bent.sampler.model_wrap_cfg.asked == 5


def test_the_panel_s_rule_is_kept_and_says_what_to_do(bent) -> None:
    with pytest.raises(ValueError, match="Lambda calibration to auto"):
        bent.run("Lambda Fitted", processed(bent, bent.job(), calibration="saved only"), large(), full(bent))
    assert bent.sampler.model_wrap_cfg.asked == 0


def test_a_rule_that_there_is_no_more_is_refused_by_its_name(bent) -> None:
    """In the settings, and in the panel by an earlier infotext."""
    with pytest.raises(ValueError, match="Lambda calibration = 'never' is out of range: choose one of"):
        bent.run("Lambda v3", processed(bent, bent.job(), calibration="never"), large(), full(bent))
    setattr(bent.opts, bent.part("webui.settings_page").RULE, "never")
    with pytest.raises(ValueError, match="is 'never': choose one of auto, every prompt, saved only"):
        bent.run("Lambda v3", bent.job(), large(), full(bent))
    assert files(bent) == [] and bent.sampler.model_wrap_cfg.asked == 0


def test_a_checkpoint_and_nobody_s_prompt_have_the_names_that_comfyui_gives_them(bent) -> None:
    """So one file serves both."""
    patcher = comfy_models.model(comfy_models.Network())
    text = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    guider = comfy_models.guider(patcher, [[text, {"pooled_output": text[:, -1]}]],
                                 comfy_models.prompt(0.0), 2.0)
    told = comfy_models.part("nodes.nobody").description(guider)
    patcher.lora_loader = types.SimpleNamespace(backup={})
    bent.forge_objects = types.SimpleNamespace(unet=patcher)
    bent.model_config = patcher.model.model_config
    cond = Multicond((1,), [[Composable([Entry(100, text[0])])]])
    p = bent.job(cond=cond)
    own = bent.part("webui.checkpoint").description(p, {"cond": cond, "uncond": p.uncond, "cond_scale": 2.0})
    for key in ("model", "fingerprint", "patches", "strengths", "guidance", "distilled", "any"):
        assert own[key] == told[key], key
    network = patcher.model.diffusion_model
    patcher.lora_loader.backup["diffusion_model.weight"] = network.weight.clone()
    network.weight.neg_()  # as a LoRA may
    assert bent.part("webui.checkpoint").checkpoint()[1] == told["fingerprint"]


def test_a_file_that_was_not_hashed_is_named_by_its_short_hash(bent) -> None:
    """With --no-hashing."""
    bent.sd_model_hash, bent.sd_checkpoint_info = None, types.SimpleNamespace(hash="89abcdef")
    assert bent.part("webui.checkpoint").checkpoint() == ("Host", "89abcdef")


@pytest.mark.parametrize("sdxl, length, words", [(True, 2816, 1280), (False, 2048, 2048)])
def test_of_an_sdxl_condition_s_vector_the_sizes_are_kept_and_of_others_all_is_text(
        bent, sdxl: bool, length: int, words: int) -> None:
    checkpoint, bent.is_sdxl = bent.part("webui.checkpoint"), sdxl
    cond = {"crossattn": torch.randn(4, 8), "vector": torch.full((length,), 7.0)}
    assert checkpoint.texts(cond, False)["pooled_output"].shape == (1, words)
    told = {"cond": Multicond((1,), [[Composable([Entry(100, cond)])]]), "uncond": None}
    made = checkpoint.positive(checkpoint.nobody(told))
    assert (made["vector"][:words] != 7.0).all() and (made["vector"][words:] == 7.0).all()
    assert (cond["vector"] == 7.0).all() and "guidance" not in made


def test_nobody_s_prompt_is_told_the_rounded_guidance_of_a_model_that_is_told_one(bent) -> None:
    checkpoint = bent.part("webui.checkpoint")
    cond = {"crossattn": torch.randn(4, 8), "vector": torch.randn(16), "guidance": torch.tensor([3.6])}
    told = {"cond": Multicond((1,), [[Composable([Entry(100, cond)])]]), "uncond": None}
    rounded = bent.part("hosting.canonical").guidance(3.6)
    assert checkpoint.distilled(told) == [pytest.approx(3.6)] and rounded == 3.5
    assert checkpoint.distilled(checkpoint.nobody(told)) == [rounded] and float(cond["guidance"]) != rounded


def test_controlnets_are_left_out_while_a_model_is_measured(bent) -> None:
    """Of Forge, also where the measurement is interrupted."""
    patcher, controls, seen = comfy_models.model(comfy_models.Network()), object(), []
    patcher.lora_loader, patcher.controlnet_linked_list = types.SimpleNamespace(backup={}), controls
    bent.forge_objects = types.SimpleNamespace(unet=patcher)
    bent.called = lambda: seen.append(patcher.controlnet_linked_list)
    bent.interrupt_at = 20
    bent.run("Lambda v3", bent.job(), large(), full(bent))
    assert seen == [None] * 20 and patcher.controlnet_linked_list is controls
    bent.interrupt_at, bent.state.interrupted = None, False
    bent.run("Lambda v3", bent.job(), large(), full(bent))
    assert set(seen[:-3]) == {None} and seen[-3:] == [controls] * 3


@pytest.mark.parametrize("sampler, second, strength, refused", [
    ("Lambda AMED", None, 0.6, True), ("Lambda 2M", "Lambda AMED 2M", 0.6, True),
    ("Lambda AMED", None, 1.0, False), ("Lambda AMED", "Lambda Fitted", 0.6, False),
    ("Lambda 2M", None, 0.6, False)])
def test_a_second_pass_that_amed_is_not_trained_for_is_refused_in_the_first(
        bent, sampler: str, second: str | None, strength: float, refused: bool) -> None:
    p = bent.job(enable_hr=True, is_hr_pass=False, denoising_strength=strength, sampler_name=sampler,
                 hr_sampler_name=second)
    if refused:
        with pytest.raises(ValueError, match="second pass of Hires. fix begins lower: choose another Hires"):
            bent.run(sampler, p, large(), full(bent))
        assert bent.sampler.model_wrap_cfg.asked == 0
    else:
        bent.part("webui.sampler").check_second_pass(p)
    p.is_hr_pass = True  # as of image to image, where training itself says what it needs
    bent.part("webui.sampler").check_second_pass(p)


# --- options ------------------------------------------------------------------------------------------------

def panel(host: Host):
    """The panel and its widgets, by the labels that they have."""
    script = host.load().Panel()
    return script, {widget.label: widget for widget in script.ui(False)}


def processed(host: Host, p, **values):
    """A job on which the panel has these values, and else its defaults."""
    script, widgets = panel(host)
    labels = {name: setting.label for name, setting in host.part("webui.options").PANEL.items()}
    said = {labels[name]: value for name, value in values.items()}
    script.process(p, *(said.get(label, widget.value) for label, widget in widgets.items()))
    return p


def test_what_the_panel_says_is_sampled_and_noted_where_it_is_not_the_default(host) -> None:
    x, sigmas = noise(), SIGMAS["ve"]
    p = processed(host, host.job(), eta=0.25)
    found = host.run("Lambda 2M SDE", p, x, sigmas)
    expected = k_diffusion_sampler("dpmpp_2m_sde", eta=0.25)(Gaussian(mean=1.1), x * sigmas[0], sigmas,
                                                             {"seed": 11}, disable=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert p.extra_generation_params == {"Lambda eta": 0.25}
    host.run("Lambda 2M", p := processed(host, host.job(), eta=0.25), x, sigmas)
    assert p.extra_generation_params == {}  # it has no such option


def test_a_pasted_infotext_sets_the_panel_to_what_it_was(host) -> None:
    p = processed(host, host.job(), eta=0.25, first_step="afs")
    start = torch.cat([host.sigmas[-1:], SIGMAS["ve"]])
    first = host.run("Lambda 2M SDE", p, noise(), start)
    pasted = {key: str(value) for key, value in p.extra_generation_params.items()}
    script, widgets = panel(host)
    shown = {widget.label: key(pasted) for widget, key in script.infotext_fields}
    assert shown["Lambda eta"] == 0.25 and shown["Lambda first step"] == "afs"
    again = host.job()
    script.process(again, *(shown[label] for label in widgets))
    assert torch.equal(host.run("Lambda 2M SDE", again, noise(), start), first)
    assert {widget.label: key({}) for widget, key in script.infotext_fields} == {
        label: widget.value for label, widget in widgets.items()}
    assert set(script.paste_field_names) == set(widgets)


def test_a_skipped_first_step_is_of_runs_at_full_noise_alone(host) -> None:
    start = torch.cat([host.sigmas[-1:], SIGMAS["ve"]])
    host.run("Lambda 2M", p := processed(host, host.job(), first_step="afs"), noise(), start)
    assert host.sampler.model_wrap_cfg.asked == 5 and p.extra_generation_params == {
        "Lambda first step": "afs"}
    host.run("Lambda 2M", p := processed(host, host.job(), first_step="afs"), noise(), SIGMAS["ve"][1:])
    assert host.sampler.model_wrap_cfg.asked == 4 and p.extra_generation_params == {}


def test_an_option_out_of_range_is_named(host) -> None:
    with pytest.raises(ValueError, match="Lambda eta = 99.0 is out of range: choose a number from 0 to 10"):
        host.run("Lambda 2M SDE", processed(host, host.job(), eta=99.0), noise(), SIGMAS["ve"])


def test_every_option_is_an_axis_once_and_goes_before_the_panel(host) -> None:
    for _ in range(2):
        host.callbacks[-1]()
    labels = [axis.label for axis in host.plot.axis_options]
    _, widgets = panel(host)
    assert labels[0] == "Seed" and sorted(labels[1:]) == sorted(widgets)
    p = host.job(extra_generation_params={"Lambda first step": "afs"})  # of the cell before
    eta = next(axis for axis in host.plot.axis_options if axis.label == "Lambda eta")
    eta.apply(p, 0.5, [0.5])
    host.run("Lambda 2M SDE", processed(host, p, eta=0.25), noise(), SIGMAS["ve"])
    assert p.extra_generation_params == {"Lambda eta": 0.5}
