"""What the interface is told of a sampler: from a workflow alone, after a run, and what the route refuses."""
from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import types

import numpy as np
import pytest
import torch

from comfy_host import Model, pack, sampling_of
from problems import smooth_statistics
from samplers import FAMILIES, SAMPLERS, Statistics, fitted_sigmas, nfe
from samplers.schedule import find_path, levels
from samplers.learning.train_amed import training_cost

NAMES = {
    "lambda_2m": "dpmpp_2m", "lambda_3m": "dpmpp_3m", "lambda_2m_sde": "dpmpp_2m_sde",
    "lambda_3m_sde": "dpmpp_3m_sde", "lambda_v3": "dpm_solver_v3", "lambda_amed": "amed",
    "lambda_amed_2m": "amed_dpmpp_2m", "lambda_fitted": "fitted_chosen"
}
NODES = ("multistep", "singlestep", "adaptive", "sde", "pc", "v3", "fitted", "amed")
PROMPT = "prompt"


def module(name: str, folder: str = "nodes") -> types.ModuleType:
    return importlib.import_module(f"{pack().__name__}.{folder}.{name}")


@pytest.fixture(autouse=True)
def nothing_run():
    runs = module("status.runs")
    runs._runs.clear()
    runs._models.clear()
    yield
    runs._runs.clear()
    runs._models.clear()


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def ksampler(**changes) -> dict:
    inputs = dict(model=["1", 0], seed=3, steps=12, cfg=5.0, sampler_name="lambda_2m", scheduler="karras",
                  denoise=1.0)
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
        "5": node("KSampler", **{**inputs, **changes})
    }


def custom(family: str = "multistep", scheduler: dict | None = None, **options) -> dict:
    settings = {
        name: option.default for name, option in FAMILIES[family].options.items() if option.stand_in is None
    }
    return {
        "1": node("CheckpointLoaderSimple",
                  ckpt_name="a.safetensors"), "5": node("LambdaSampler" + family.capitalize(),
                                                        **{**settings, **options}), "6": scheduler
        or node("BasicScheduler", model=["1", 0], scheduler="karras", steps=10, denoise=1.0),
        "7": node("CFGGuider", model=["1", 0], cfg=3.0), "9": node("SamplerCustomAdvanced", guider=["7", 0],
                                                                   sampler=["5", 0], sigmas=["6", 0])
    }


def ask(graph: dict, name: str = "5", rule: str = "auto", locale: str = "en") -> dict:
    say = lambda key, **values: module("status.web").text(locale, key, **values)  # noqa: E731
    answer = module("status.panel").answer(graph, name, lambda: rule, say)
    json.dumps(answer)
    return answer


def lines(graph: dict, **options) -> list[str]:
    return [f"{line['kind']}: {line['text']}" for line in ask(graph, **options)["lines"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_name_costs_what_the_catalogue_says(name: str) -> None:
    # its first interval, from sigma = 1, is of infinite length
    flow = ", 22 on a flow model" if "amed" in name else ""
    assert lines(ksampler(sampler_name=name))[0] == f"count: model evaluations: {nfe(NAMES[name], 12)}{flow}"


@pytest.mark.parametrize("family", NODES)
def test_a_node_costs_what_the_catalogue_says(family: str) -> None:
    said = lines(custom(family))[0]
    settings = FAMILIES[family].settings({**FAMILIES[family].stand_ins})
    name = next(name for name, s in SAMPLERS.items()
                if s.family == FAMILIES[family].title and s.fixed.items() <= settings.items())
    planned = nfe(name, 10)
    assert said.startswith(
        f"count: model evaluations: {planned}" if planned else "count: model evaluations: as many as")


def test_singlestep_says_what_is_different_on_a_flow_model() -> None:
    """The first interval of a flow, from sigma = 1, is of infinite length and takes one evaluation."""
    assert lines(custom("singlestep", order=3))[0] == "count: model evaluations: 28, 26 on a flow model"


def test_the_curve_rises_and_every_evaluation_is_on_it() -> None:
    curve = ask(custom("singlestep", order=2))["curve"]
    x, y = zip(*curve["line"])
    assert x[0] == 0.0 and y[0] == 1.0 and y[-1] == 0.0 and list(x) == sorted(x) and list(y) == sorted(
        y, reverse=True)
    assert len(curve["points"]) == nfe("dpmpp_2s", 10)
    for px, py in curve["points"]:
        i = max(k for k in range(len(x) - 1) if x[k] <= px)
        assert py == pytest.approx(y[i] + (px - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]), abs=1e-3)


@pytest.mark.parametrize("name, scheduler",
                         [("KarrasScheduler", dict(steps=7, sigma_max=14.6, sigma_min=0.03, rho=7.0)),
                          ("ExponentialScheduler", dict(steps=7, sigma_max=14.6, sigma_min=0.03)),
                          ("AlignYourStepsScheduler", dict(model_type="SD1", steps=7, denoise=1.0)),
                          ("BetaSamplingScheduler", dict(model=["1", 0], steps=7, alpha=0.6, beta=0.6))])
def test_schedulers_of_comfyui_are_asked_themselves(name: str, scheduler: dict) -> None:
    assert lines(custom(scheduler=node(name, **scheduler)))[0] == "count: model evaluations: 7"


def test_nonsense_is_told_on_the_nodes_that_it_concerns() -> None:
    """A rule that is none, an end before the start, and a graph that goes round."""
    def nonsense() -> str:
        raise ValueError("the environment variable is 'sometimes'")

    say = lambda key, **values: module("status.web").text("en", key, **values)  # noqa: E731
    told = {
        name: module("status.panel").answer(ksampler(sampler_name=name), "5", nonsense, say)["lines"]
        for name in ("lambda_2m", "lambda_v3")
    }
    assert told["lambda_2m"][0]["text"] == "model evaluations: 12"
    assert [line["text"]
            for line in told["lambda_v3"]] == ["warning: the environment variable is 'sometimes'"]
    advanced = ksampler(start_at_step=2, end_at_step=-1, return_with_leftover_noise="disable")
    advanced["5"]["class_type"] = "KSamplerAdvanced"
    assert lines(advanced)[0].startswith("count: model evaluations: 0")
    round_ = {
        "1": node("KSamplerSelect", sampler_name="lambda_v3"), "3": node("SplitSigmas", sigmas=["3", 0]),
        "2": node("SamplerCustomAdvanced", guider=["2", 0], sampler=["1", 0], sigmas=["3", 0])
    }
    assert lines(round_, name="1")
    assert module("status.plan").model_chain(round_, "2") is None


def test_a_split_schedule_counts_its_part_only() -> None:
    graph = custom()
    graph["8"] = node("SplitSigmas", sigmas=["6", 0], step=4)
    for slot, steps in ((0, 4), (1, 6)):
        graph["9"]["inputs"]["sigmas"] = ["8", slot]
        assert lines(graph)[0] == f"count: model evaluations: {steps}"


def test_ksampler_advanced_counts_its_part_only() -> None:
    graph = ksampler(start_at_step=3, end_at_step=9, return_with_leftover_noise="enable")
    del graph["5"]["inputs"]["denoise"]
    assert lines(graph)[0] == "count: model evaluations: 6"
    graph["5"]["inputs"].update(start_at_step=12, end_at_step=10000)
    assert lines(graph)[0] == "count: model evaluations: 0, the schedule is empty"


def test_what_a_link_sets_is_known_after_a_run() -> None:
    assert lines(
        ksampler(steps=["2", 0])) == ["count: set by a link: steps (model evaluations known after a run)"]
    assert lines(
        custom(order=["2", 0])) == ["count: set by a link: order (model evaluations known after a run)"]
    assert lines(custom("v3", measure=["2", 0])) == [
        "count: set by a link: measure (model evaluations known after a run)"]
    assert "set by a link: sigmas" in lines(custom(scheduler=node("AnothersScheduler", steps=5)))[0]


def test_a_sampler_by_itself_says_what_a_step_costs() -> None:
    graph = {"5": custom("singlestep", order=3)["5"]}
    assert lines(graph) == [
        "count: model evaluations a step: 3. Connect it to SamplerCustom to see its schedule"
    ]


def test_another_s_sampler_has_nothing_to_say() -> None:
    assert ask(ksampler(sampler_name="euler")) == {"lines": [], "curve": None, "runs": "5"}


def test_too_few_steps_for_the_order_are_named() -> None:
    def warned(steps: int) -> list[str]:
        graph = custom(order=3)
        graph["6"]["inputs"]["steps"] = steps
        return [line for line in lines(graph) if line.startswith("warn")]

    assert warned(2) == ["warn: warning: order 3 is never reached in 2 steps: choose more"]
    # of karras, whose last step above 0 is then long: orders 1, 2, 2, 1, 1
    assert warned(5) and not warned(6)


def test_a_skipped_first_step_is_not_counted_nor_drawn_and_warned_of_where_the_run_is_refused() -> None:
    """Set on the node, alone and with one that wraps its sampler."""
    wrapped = custom(first_step="afs") | {"8": options_node("5")}
    wrapped["9"]["inputs"]["sampler"] = ["8", 0]
    warning = "the first step can be skipped at full noise only, and this run starts at sigma"
    for graph in (custom(first_step="afs"), wrapped):
        whole, shown = ask(custom())["curve"], ask(graph)["curve"]
        assert lines(graph)[0] == "count: model evaluations: 9" and ask(graph)["runs"] == "9"
        assert shown == {**whole, "points": whole["points"][1:]}
        assert not any(warning in line for line in lines(graph))
        graph["6"]["inputs"]["denoise"] = 0.5
        assert any(line.startswith("warn") and warning in line for line in lines(graph))


def options_node(of: str, threshold: str = "off") -> dict:
    return node("LambdaOptions", sampler=[of, 0], threshold=threshold, quantile=0.995, bound=1.0)


def test_what_wraps_a_sampler_is_looked_through() -> None:
    """One node, and one around the other."""
    graph = custom() | {"8": options_node("5", threshold="dynamic")}
    graph["9"]["inputs"]["sampler"] = ["8", 0]
    assert ask(graph) == ask(custom()) and ask(graph)["runs"] == "9"
    graph["10"] = options_node("8")
    graph["9"]["inputs"]["sampler"] = ["10", 0]
    assert ask(graph) == ask(custom()) and ask(graph)["runs"] == "9"


def test_wrappers_that_wrap_each_other_run_nothing() -> None:
    graph = {"5": custom()["5"], "8": options_node("8")}
    assert "Connect it to SamplerCustom" in lines(graph)[0]
    graph["8"]["inputs"]["sampler"] = ["10", 0]
    graph["10"] = options_node("5")
    assert "Connect it to SamplerCustom" in lines(graph)[0]


@pytest.mark.parametrize("denoise", [1.0, 0.7, 0.3])
def test_a_plan_knows_whether_it_starts_from_noise(denoise: float) -> None:
    plan, graph = module("status.plan"), ksampler(denoise=denoise)
    sampling = plan.usual("ve")
    planned = plan.plan(plan.job(graph, "5"), plan.schedule(graph, "5", sampling), sampling)
    assert planned.starts_from_noise == (denoise == 1.0) and planned.evaluations == 12


@pytest.mark.parametrize(
    "graph, part",
    [(custom(scheduler=node("KarrasScheduler", steps=7, sigma_max=0.03, sigma_min=14.6, rho=7.0)),
      "sigma_min = 14.6 must be below"),
     (custom(scheduler=node("KarrasScheduler", steps=7, sigma_max=14.6, sigma_min=0.03, rho=0.0)),
      "KarrasScheduler makes no schedule"),
     (custom(scheduler=node("FlipSigmas", sigmas=["10", 0])) | {"10": custom()["6"]},
      "sigmas must strictly decrease"), (ksampler(steps=9999), "9999 steps are too many to draw"),
     (ksampler(steps=900, denoise=0.001), "too many to draw"),
     (ksampler(scheduler="nothing"), "'nothing' is not in ComfyUI's list"),
     (ksampler(denoise="much"), "denoise = 'much' on KSampler cannot be used"),
     (custom(order=9), "order = 9 is out of range"), ])
def test_what_cannot_run_is_warned_of_before(graph: dict, part: str) -> None:
    assert any(line.startswith("warn") and part in line for line in lines(graph)), lines(graph)


def test_it_speaks_chinese_and_english_for_everybody_else() -> None:
    assert "12" in lines(ksampler(), locale="zh")[0] and not lines(ksampler(), locale="zh")[0].isascii()
    assert lines(ksampler(), locale="fr") == lines(ksampler())


class Patcher:
    model = types.SimpleNamespace()

    def __init__(self, sampling) -> None:
        self.get_model_object = {"model_sampling": sampling}.__getitem__


def run(graph: dict, name: str, steps: int, monkeypatch, describe=None, said: str = "",
        family: str = "multistep", sigma_max: float | None = None, use: dict | None = None,
        client: str | None = "me", made_by: str = "", send: Exception | None = None, **options) -> list:
    """One run of a sampler of ours as the server does it; what was sent to the interface, unless that
    cannot be."""
    events, catalogue, sent = module("events", "hosting"), module("sampling"), []
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    def send_sync(*event) -> None:
        if send:
            raise send
        sent.append(event)

    def send_progress_text(text: str, name: str, sid: str | None = None) -> None:
        text.encode("utf-8")
        sent.append((text, name, sid))

    server = types.SimpleNamespace(client_id=client, send_sync=send_sync,
                                   send_progress_text=send_progress_text)
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    prompt = DynamicPrompt(graph)
    if made_by:
        prompt.add_ephemeral_node(name, {}, made_by, made_by)
    reset_progress_state(PROMPT, prompt)
    sampling = sampling_of("ModelSamplingDiscrete", "EPS")
    type(sampling).__mro__[1].__init__(sampling)
    if sigma_max:
        sampling.set_sigmas(sampling.sigmas * (sigma_max / sampling.sigma_max))
    model = Model(lambda x, sigma: x / 2, sampling)
    # the pack's own copies
    function = module("host").sampler_function({**catalogue.SAMPLERS, **catalogue.FAMILIES}[family])

    def sample(*args, **kwargs):
        if said:
            events.say(said)
        for option, calibration in (use or {}).items():
            events.use(option, events.Used("file", calibration, calibration))
        return function(*args, **kwargs)

    with CurrentNodeContext(PROMPT, name):
        sigmas = torch.cat([torch.linspace(10, 1, steps), torch.zeros(1)])
        result = events.observed(sample, describe)(model, torch.randn(1, 4, 8, 8), sigmas, **options)
    assert result.isfinite().all()
    return sent


def test_after_a_run_its_own_numbers_are_shown_as_long_as_the_workflow_is_the_same(monkeypatch) -> None:
    graph = ksampler(steps=["2", 0])
    assert run(graph, "5", 9, monkeypatch) == [("lambda_solvers.run", {"node": "5"}, "me")]
    shown = ksampler(steps=["2", 0], seed=99)
    assert lines(shown)[0] == "count: model evaluations: 9 (last run)" and len(
        ask(shown)["curve"]["points"]) == 9
    assert "sigma 10 to 0" in lines(shown)[-1]
    assert "known after a run" in lines(ksampler(steps=["2", 0], scheduler="simple"))[0]


def test_a_linked_option_is_shown_as_it_was_in_the_last_run(monkeypatch) -> None:
    graph = custom("singlestep", order=["2", 0])
    assert lines(graph)[0] == "count: set by a link: order (model evaluations known after a run)"
    run(graph, "9", 5, monkeypatch, family="singlestep", order=3, prediction="data", rule="midpoint")
    assert lines(graph)[0] == "count: model evaluations: 13 (last run)" and len(
        ask(graph)["curve"]["points"]) == 13


def test_an_adaptive_run_is_counted(monkeypatch) -> None:
    graph = custom("adaptive")
    assert lines(graph)[0] == "count: model evaluations: as many as the tolerance asks (known after a run)"
    run(graph, "9", 5, monkeypatch, family="adaptive")
    assert int(lines(graph)[0].split(": ")[2].split()[0]) > 5


def test_a_model_that_has_run_is_known_for_other_schedules(monkeypatch) -> None:
    run(ksampler(), "5", 12, monkeypatch)
    assert "the model's own after a run" not in lines(ksampler(steps=8))[-1]
    other = ksampler(steps=8)
    other["1"]["inputs"]["ckpt_name"] = "b.safetensors"
    assert "the model's own after a run" in lines(other)[-1]


ABOUT = {"model": "M-1", "fingerprint": "1", "patches": [], "strengths": [], "guidance": 3.0, "distilled": [],
         "conditions": "c", "any": "c"}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder of calibrations, and statistics of model 1 at guidance 3 in it."""
    import folder_paths
    store = module("store", "hosting")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, store.FOLDER, ([str(tmp_path)], {store.ENDING}))
    folder_paths.filename_list_cache.pop(store.FOLDER, None)
    statistics = module("kinds", "hosting").Statistics
    made = smooth_statistics()
    statistics(made.lam, **made.curves(), about=ABOUT).save(tmp_path / "one.safetensors")
    yield
    folder_paths.filename_list_cache.pop(store.FOLDER, None)


UNSURE = ("note: not run on this model yet: a saved calibration that fits is used, else one is measured "
          "first, ")
MEASURED = "note: no saved calibration serves this run: one is measured first, "
SMALL = "about 1 s"  # all that the tests' model takes


def images(evaluations: int, many: int, image: int) -> str:
    """So many evaluations, each of so many images, in images of so many."""
    return f"as long as {round(evaluations * many / image)} images like this"


def test_before_a_run_the_status_says_what_is_known_and_what_not(monkeypatch, saved) -> None:
    saves = "note: only a saved calibration that serves this run is used; without one it stops"
    listed = ksampler(sampler_name="lambda_v3")
    assert UNSURE + images(54, 1, 10) in lines(custom("v3", measure="auto"))
    assert UNSURE + images(54, 1, 12) in lines(listed)
    assert saves in lines(custom("v3", measure="saved only")) and saves in lines(listed, rule="saved only")
    assert f"note: each new prompt is measured once, {images(54, 1, 12)}" in lines(
        listed, rule="every prompt")

    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: ABOUT)
    assert "good: a saved calibration serves this run: one.safetensors" in lines(custom("v3", measure="auto"))
    far = custom("v3", measure="auto")
    far["7"]["inputs"]["cfg"] = 8.0
    assert f"{MEASURED}{images(54, 16, 10)}, {SMALL}" in lines(far)  # 16 of latents as small as the tests'
    far["5"]["inputs"]["measure"] = "saved only"
    assert any(
        line.startswith("warn") and "no saved calibration serves this run, so it will stop" in line
        for line in lines(far))


def test_a_solver_that_chooses_its_levels_shows_them_once_the_model_is_measured(monkeypatch, saved,
                                                                                tmp_path) -> None:
    graph = ksampler(sampler_name="lambda_fitted", steps=5)
    unknown = "note: of the scheduler only the range counts; the levels are chosen once the model is measured"
    assert lines(graph)[0] == "count: model evaluations: 5" and unknown in lines(
        graph) and not ask(graph)["curve"]["points"]
    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: {**ABOUT, "guidance": 5.0})
    assert unknown in lines(graph) and f"{MEASURED}{images(77, 16, 5)}, {SMALL}" in lines(graph)

    drawn = two_trajectories()
    found = module("kinds", "hosting").Statistics(drawn.lam, **drawn.curves(), root=drawn.root,
                                                  about={**ABOUT, "guidance": 5.0})
    found.save(tmp_path / "fitted.safetensors")
    module("folder").folder_paths.filename_list_cache.pop(module("folder").FOLDER, None)
    nodes = [
        f"{s:.3g}" for s in fitted_sigmas(drawn, 5, float(module("status.plan").usual("ve").sigma_max))[:-1]
    ]
    assert f"note: of the scheduler only the range counts; evaluated at sigma {', '.join(nodes)}" in lines(
        graph)
    assert "good: a saved calibration serves this run: fitted.safetensors" in lines(graph)
    answer = ask(graph)
    assert len(answer["curve"]["points"]) == 5 and answer["curve"]["points"] == answer["curve"]["line"]
    sent = run(graph, "5", 4, monkeypatch, describe=lambda guider: {**ABOUT, "guidance": 5.0},
               family="fitted_chosen", statistics=found, use={"statistics": found})
    assert sent and any("evaluated at sigma 10, " in line for line in lines(graph))  # the run began at 10


def two_trajectories():
    """Statistics on the levels of Stable Diffusion with two trajectories, drawn."""
    lam = np.linspace(-2.7, 3.6, 13)
    curve = np.ones_like(lam)
    root = np.random.default_rng(1).standard_normal((2, 27, 27))
    return Statistics(lam, curve, 0 * curve, 0 * curve, damping=curve, root=root)


def test_a_connected_file_is_compared_with_the_model(monkeypatch, saved) -> None:
    graph = custom("v3", measure="auto",
                   calibration=["12", 0]) | {"12": node("LambdaLoadCalibration", name="one.safetensors")}
    assert "note: calibration one.safetensors; whether it fits is known after a run" in lines(graph)
    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: ABOUT)
    assert "good: the calibration fits this model and guidance" in lines(graph)
    graph["7"]["inputs"]["cfg"] = 8.0
    assert any("made for something else: measured for guidance 3.0, and this is 8" in line
               for line in lines(graph))
    graph["12"]["inputs"]["name"] = "none.safetensors"
    assert any(
        line.startswith("warn") and "there is no calibration 'none.safetensors'" in line
        for line in lines(graph))


@pytest.fixture
def trained(saved, tmp_path):
    """AMED of model 1 at guidance 3 on karras, 3 steps, in the folder; how to make others there."""
    plan, kinds = module("status.plan"), module("kinds", "hosting")

    def make(name: str, first_step: str = "evaluate", **about) -> None:
        sampling = plan.usual("ve")
        schedule = plan.plan(plan.job(amed(), "5"), plan.schedule(amed(), "9", sampling), sampling).levels
        untrained = kinds.Amed.untrained(schedule, "amed", first_step)
        dataclasses.replace(untrained, about={**ABOUT, "path": "ve", **about}).save(tmp_path / name)

    make("amed.safetensors")
    return make


def amed(steps: int = 3, **inputs) -> dict:
    graph = custom("amed", **{"measure": "auto", "base": "amed", **inputs})
    graph["6"]["inputs"]["steps"] = steps
    return graph


def cost(steps: int) -> int:
    plan, sampling = module("status.plan"), module("status.plan").usual("ve")
    schedule = plan.plan(plan.job(amed(), "5"), plan.schedule(amed(steps), "9", sampling), sampling).levels
    return training_cost(levels([level.sigma for level in schedule], find_path("ve")))


@pytest.mark.parametrize("name, base", [("lambda_amed", "amed"), ("lambda_amed_2m", "dpmpp_2m")])
def test_amed_says_what_its_training_costs_and_whether_one_is_saved(monkeypatch, trained, name: str,
                                                                    base: str) -> None:
    def graphs(steps: int) -> tuple[dict, dict]:
        return ksampler(sampler_name=name, steps=steps, cfg=3.0), amed(steps, base=base)

    for graph in graphs(3):
        assert lines(graph)[0] == "count: model evaluations: 5, 4 on a flow model"
        assert UNSURE + images(cost(3), 3, 5) in lines(graph)
    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: ABOUT)
    for steps in (3, 4):
        saved = steps == 3 and base == "amed"
        for graph in graphs(steps):
            assert lines(graph)[0] == f"count: model evaluations: {2 * steps - 1}" and len(
                ask(graph)["curve"]["points"]) == 2 * steps - 1
            assert ("good: a saved calibration serves this run: amed.safetensors" if saved
                    else f"{MEASURED}{images(cost(steps), 10, 2 * steps - 1)}, {SMALL}") in lines(graph)


def test_amed_of_a_schedule_with_nothing_to_learn_is_said_to_be_refused() -> None:
    found = lines(amed(1))
    assert any(
        text.startswith("warn: warning: sigmas = [14.6") and text.endswith("use more steps")
        for text in found), found
    assert not any("measured first" in text for text in found)


@pytest.mark.parametrize("steps, refused", [(10, False), (11, True), (20, True)])
def test_amed_of_too_many_steps_is_said_to_be_refused_with_what_to_choose(steps: int, refused: bool) -> None:
    found = lines(ksampler(sampler_name="lambda_amed", steps=steps))
    said = [
        text for text in found if text.startswith(f"warn: warning: AMED is not trained for {steps} steps")
    ]
    remedy = "choose at most 10 steps, or the fitted sampler"
    assert bool(said) == refused and all(remedy in text for text in said)
    assert any("measured first" in text for text in found) != refused


def test_a_cost_is_in_time_too_once_an_evaluation_was_timed(monkeypatch, saved) -> None:
    runs, graph = module("status.runs"), ksampler(sampler_name="lambda_v3")
    monkeypatch.setattr(
        runs, "model",
        lambda *asked: runs.Model(module("status.plan").usual("ve"), ABOUT, (2, 4, 8, 8), pace))
    for pace, said in ((0.01, "about 4 s"), (2.0, "about 14 min")):
        assert f"{MEASURED}{images(54, 8, 12)}, {said}" in lines(graph)  # 8 calls for 16 images


def test_a_calibration_of_another_kind_is_told_on_the_node_and_passed_over_behind_the_model(saved,
                                                                                            trained) -> None:
    load = {"12": node("LambdaLoadCalibration", name="amed.safetensors", model=["1", 0])}
    linked = custom("v3", measure="auto", calibration=["12", 0]) | load
    assert [
        line for line in lines(linked) if line.startswith("warn: warning: ") and "amed.safetensors" in line
    ]
    made = custom("v3", measure="auto", calibration=["12", 0]) | {"12": node("LambdaTrainAmed")}
    assert ("warn: warning: LambdaTrainAmed was made for something else: Measure Model makes what this "
            "sampler needs") in lines(made)
    attached = ksampler(sampler_name="lambda_v3", model=["12", 2]) | load
    assert UNSURE + images(54, 1, 12) in lines(attached)
    attached["12"] = node("LambdaMeasureModel", model=["1", 0])
    assert "note: calibration by a link; whether it fits is known after a run" in lines(attached)

def test_amed_in_a_file_is_compared_with_the_schedule_and_the_base(monkeypatch, trained) -> None:
    """On its node, and attached to KSampler's model."""
    loaded = {"12": node("LambdaLoadCalibration", name="amed.safetensors", model=["1", 0])}

    def attached(steps: int) -> dict:
        return ksampler(sampler_name="lambda_amed", steps=steps, cfg=3.0, model=["12", 2]) | loaded

    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: ABOUT)
    run(attached(3), "5", 5, monkeypatch, describe=lambda guider: ABOUT)
    for graph, other in ((amed(calibration=["12", 0]) | loaded, amed(4, calibration=["12", 0]) | loaded),
                         (attached(3), attached(4))):
        assert "good: the calibration fits this model and guidance" in lines(graph)
        assert [
            line for line in lines(other)
            if line.startswith("warn: warning: this AMED was trained for 3 steps over")
        ]
    assert "good: the calibration fits this model and guidance" in lines(
        amed(4, calibration=["12", 0], interpolate=True) | loaded)
    [line] = lines(amed(calibration=["12", 0], base="euler") | loaded)
    assert line.startswith("warn: warning: this AMED was trained on base amed, and euler is chosen")
    trained("afs.safetensors", "afs")
    loaded["12"]["inputs"]["name"] = "afs.safetensors"
    assert lines(amed(calibration=["12", 0]) | loaded)[0] == "count: model evaluations: 4"


def test_before_the_model_is_known_a_file_of_amed_is_not_judged(trained) -> None:
    graph = amed(4, calibration=["12", 0]) | {"12": node("LambdaLoadCalibration", name="amed.safetensors")}
    assert "note: calibration amed.safetensors; whether it fits is known after a run" in lines(graph)


def test_too_few_steps_for_amed_to_learn_are_named() -> None:
    assert "warn: warning: 1 steps leave AMED nothing to learn, choose more" in lines(amed(1))
    assert not any("nothing to learn" in line for line in lines(amed(2)))


def test_what_was_said_in_a_run_is_the_status_after_it(monkeypatch, saved) -> None:
    graph = ksampler(sampler_name="lambda_v3")
    run(graph, "5", 12, monkeypatch, describe=lambda guider: ABOUT, said="statistics: one.safetensors")
    assert "good: statistics: one.safetensors" in lines(graph)


def test_the_variable_goes_before_the_setting_and_the_setting_before_auto(monkeypatch, tmp_path) -> None:
    """Through ComfyUI's own settings, of its default user."""
    import folder_paths
    from app.user_manager import UserManager
    from server import PromptServer
    calibration, variable = module("settings"), module("library", "hosting").VARIABLE
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    users = UserManager()
    monkeypatch.setattr(PromptServer, "instance", types.SimpleNamespace(user_manager=users), raising=False)
    assert calibration.rule() == "auto"
    request = types.SimpleNamespace(headers={})
    users.settings.save_settings(request, {"LambdaSolvers.Calibration": "saved only"})
    assert calibration.rule() == "saved only"
    monkeypatch.setenv(variable, "every prompt")
    assert calibration.rule() == "every prompt"
    monkeypatch.delenv(variable)
    for other in ("often", "never"):  # which was one
        users.settings.save_settings(request, {"LambdaSolvers.Calibration": other})
        with pytest.raises(ValueError, match=f"LambdaSolvers.Calibration is '{other}': choose one of auto"):
            calibration.rule()
    users.users = {"somebody": "somebody"}  # --multi-user
    assert calibration.rule() == "auto"


@pytest.mark.parametrize("body, part",
                         [([], "must be a JSON object"), ({"node": "5"}, "graph must be"),
                          ({"node": "5", "graph": {}}, "graph must be"),
                          ({"node": "5", "graph": {"5": {"inputs": {}}}}, "must have a class_type"),
                          ({"node": "5", "graph": {"5": node("KSampler", sampler_name=None)}
                            }, "must be a value or [node id, slot]"),
                          ({"node": "5", "graph": {"5": node("KSampler", sampler_name=["1"])}
                            }, "must be a value or [node id, slot]"),
                          ({"node": "6", "graph": ksampler()}, "must be one of the graph's ids"),
                          ({"node": "1", "graph": ksampler()}, "which has no sampler of Lambda Solvers"),
                          ({"node": "5", "graph": ksampler(), "locale": 3}, "locale = 3"), ])
def test_a_malformed_request_is_refused_with_the_reason(body, part: str) -> None:
    class Request:
        async def json(self):
            return body

    answer = asyncio.run(module("status.web").show(Request()))
    assert answer.status == 400 and part in json.loads(answer.body)["error"]


def test_the_version_is_the_packages(monkeypatch) -> None:
    about = module("status.web").about()
    assert about["ver"].count(".") == 2 and about["names"] == list(NAMES) and len(
        about["nodes"]) == len(NODES)
