"""Hypersolvers in ComfyUI: prompts at guidances of their own, which file serves which run, and how it is
taught."""
from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from comfy_models import IMAGE, Network, guider, in_a_run, listed, model, part, prompt, sampled
from test_measuring import folder  # noqa: F401  (the fixture)
from test_panel import (  # noqa: F401
    ABOUT, ask, custom, ksampler, lines, node, nothing_run, run, two_trajectories)

OPTIONS = {"choose_levels": True}
LOW, HIGH, COUNTS = 5.0, 9.0, (4, 5)


def kind():
    return part("hosting.kinds").STATISTICS_KIND


def hypersolver(channels: int = 4, size: float = 0.0):
    """One that was taught for LOW to HIGH and COUNTS, and adds something of this size."""
    made = part("samplers.learning.hypersolver")
    network = made.Network(channels).begun()
    network.leave.bias.data += size
    bounds = np.array([[-9.0] * 7 + [math.log(LOW)], [9.0] * 7 + [math.log(HIGH)]])
    end = np.array([-3.0, 0.5, -3.0, 0.8])
    return part("samplers").Hypersolver(network.state_dict(), bounds, end, COUNTS)


def statistics(taught=None, **about):
    """Of the panel's model 1, at guidance 6.7 and nobody's prompt."""
    drawn = two_trajectories()
    return part("samplers").Statistics(drawn.lam, **drawn.curves(), root=drawn.root, hypersolver=taught,
                                       about={**ABOUT, "guidance": 6.7, "conditions": "any", **about})


def chosen(guidance: float = 7.0, steps: int = 5, channels: int = 4, how: str = "auto",
           **about) -> str | None:
    """Which of the saved files a run takes."""
    library, schedule = part("hosting.library"), part("samplers.schedule")
    levels = schedule.levels([*np.geomspace(14.0, 0.1, steps).tolist(), 0.0], schedule.find_path("ve"))
    told = {**ABOUT, "guidance": guidance, "channels": channels, "any": "any", **about}
    found = library.choice(kind(), told, how, OPTIONS, "ve", levels)
    return found[0].removesuffix(".safetensors") if found else None


# --- prompts at guidances of their own ----------------------------------------------------------------------

def test_guidances_are_spread_evenly_over_the_prompts_and_over_those_held_out() -> None:
    spread = part("samplers.learning.train_hypersolver").spread
    found = spread(5.0, 9.0, 100)
    assert sorted(found) == pytest.approx(np.geomspace(5.0, 9.0, 100)) and found == spread(5.0, 9.0, 100)
    assert abs(np.corrcoef(found, np.arange(100))[0, 1]) < 0.1
    held = np.log(sorted(found[7::8]))
    assert held[0] < math.log(5.4) and held[-1] > math.log(8.4) and np.diff(held).max() < 0.12
    assert spread(7.0, 7.0, 3) == [7.0] * 3 and spread(1.0, 1.0, 2) == [1.0] * 2


def test_the_built_in_prompts_are_a_hundred_different_ones() -> None:
    prompts = part("hosting.prompts").PROMPTS
    assert len(set(prompts)) == len(prompts) == 100 and all(10 < len(line) < 90 for line in prompts)
    node = part("nodes.knowledge").TrainHypersolver
    assert node.INPUT_TYPES()["required"]["prompts"][1]["default"].splitlines() == list(prompts)


def test_a_dozen_of_them_is_what_tune_fitted_learns_from_unless_told() -> None:
    made, nodes = part("hosting.prompts"), part("nodes.knowledge")
    assert len(made.DOZEN) == 12 and {*made.DOZEN} < {*made.PROMPTS}
    told = nodes.TuneFitted.INPUT_TYPES()["optional"]["prompts"][1]["default"]
    assert nodes.lines(told) == [*made.DOZEN]


@pytest.mark.parametrize("batch, calls", [(1, [0, 0, 10, 20, 20]), (2, [0, 10, 20]), (3, [0, 10, 20])])
def test_some_of_the_images_are_asked_under_their_own_prompts_and_guidances(batch: int,
                                                                            calls: list[int]) -> None:
    network, scales = Network(most=batch), [1.0, 2.0, 5.0]
    positives, numbers = [prompt(value) for value in (0.0, 10.0, 20.0)], [5, 3, 0, 4, 8]
    x = torch.randn(5, *IMAGE)

    def asked(run):
        assert run.guider.guidances == scales
        return run.denoise(x, torch.full((5,), 0.5), images=numbers)

    answers = part("nodes.guided_run").measured(
        model(network), positives, prompt(-3.0), 2.0, {"samples": torch.zeros(batch, *IMAGE)}, 0, None, asked,
        [scale / 2.0 for scale in scales])
    size = min(batch, 2)
    assert [call.context[0 if len(call.context) == size else -1] for call in network.calls] == calls
    conds = [len(call.context) // size for call in network.calls]
    assert conds == [1 if value == 0 else 2 for value in calls]  # at guidance 1 no unconditional answer
    for row, number in enumerate(numbers):
        k = number % 3
        alone = in_a_run(guider(model(Network()), positives[k], prompt(-3.0), scales[k]),
                         lambda run: run.denoise(x[row:row + 1], torch.full((1,), 0.5)))
        torch.testing.assert_close(answers[row:row + 1], alone, rtol=0, atol=1e-4)


# --- which file serves --------------------------------------------------------------------------------------

def test_a_file_serves_the_guidances_and_numbers_of_steps_it_was_taught_for_and_every_prompt(
        folder) -> None:  # noqa: F811
    statistics(hypersolver()).save(folder / "taught.safetensors")
    for guidance, name in ((5.0, "taught"), (9.0, "taught"), (9.5, "taught"), (4.7, "taught"),
                           (7.0, "taught"), (3.0, None), (12.0, None)):
        for how in ("auto", "every prompt", "saved only"):
            assert chosen(guidance, how=how, conditions="another") == name, (guidance, how)
    assert chosen(fingerprint="2") is None and chosen(patches=["a LoRA"]) is None
    assert chosen(7.0, steps=6) is None  # as any other: of the very guidance, for auto
    assert chosen(6.7, steps=6, how="saved only") == chosen(6.7, 4, channels=16, how="saved only") == "taught"
    assert chosen(9.0, channels=16) is None


def test_what_was_taught_goes_before_what_was_measured_or_refitted(folder) -> None:  # noqa: F811
    plan = part("samplers").fit_multistep(two_trajectories(), 5).rows()
    plan[0, 0] = -math.log(14.0)
    at = {"guidance": 7.0, "created": "9"}
    statistics(**at).save(folder / "plain.safetensors")
    refitted = statistics(refits={"5": {"training": [2.0, 1.0], "selection": [2.0, 1.0], "kept": True,
                                        "prompts": 12}}, **at)
    assert chosen() == "plain"
    replace(refitted, plans={5: plan}).save(folder / "refitted.safetensors")
    assert chosen() == "refitted"
    statistics(hypersolver()).save(folder / "taught.safetensors")
    assert chosen() == chosen(9.0) == "taught"
    assert chosen(steps=6) == "refitted" and chosen(3.0) is None  # the newest of two that serve as any other
    for name, images, guidance in (("well", 384.0, 5.5), ("hastily", 4.0, 7.0)):
        statistics(hypersolver(), hypersolver={"images": images}, guidance=guidance, created="9").save(
            folder / f"{name}.safetensors")
    assert chosen() == chosen(9.0) == "well"  # what more images taught, not the newest or nearest


def test_a_run_is_given_the_hypersolver_at_its_own_guidance_or_none() -> None:
    found, about = statistics(hypersolver()), {"conditions": "another", "channels": 4}
    assert kind().suited(found, {**about, "guidance": 8.0}).hypersolver.guidance == 8.0
    for other in ({"guidance": 3.0}, {"guidance": math.nan}, {"guidance": 8.0, "channels": 16}):
        assert kind().suited(found, {**about, **other}).hypersolver is None
    assert kind().suited(statistics(), {**about, "guidance": 8.0}).hypersolver is None


@pytest.mark.parametrize("cfg, used", [(8.0, True), (3.0, False)])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_a_run_uses_it_says_so_and_warns_only_where_it_does_not_fit(
        folder, monkeypatch, cfg: float, used: bool, denoise: float) -> None:  # noqa: F811
    said = []
    for name in ("hosting.library", "hosting.kinds"):
        monkeypatch.setattr(part(name), "say", lambda text, level=0: said.append(text))
    made = guider(model(Network()), prompt(0.3), prompt(0.0), cfg)
    identity = part("nodes.identity").description(made)
    own = {key: identity[key] for key in ("model", "fingerprint", "patches", "strengths", "distilled")}
    drawn = two_trajectories()
    wide = replace(statistics(hypersolver(size=3.0), **own), lam=np.linspace(-2.7, 3.6, len(drawn.lam)))
    plain, sizes = replace(wide, hypersolver=None), wide.hypersolver.weights["sizes"]
    sizes[0, 0], sizes[1:, 0] = -1.0, 0.0

    def function(run_model, x, sigmas, extra_args, callback, disable, **options):
        begins = sigmas[int((1.0 - denoise) * 10):]
        return listed("lambda_fitted")(run_model, x, begins, extra_args, callback, disable, **options)

    results = [sampled(made, function, steps=5 if denoise == 1.0 else 10, statistics=given)
               for given in (wide, plain)]
    assert ("with their hypersolver, trained for 5 steps at guidance 5 to 9" in said) == used
    assert torch.equal(*results) != used and all(result.isfinite().all() for result in results)
    warned = [text for text in said if "measured for guidance 6.7" in text]
    assert len(warned) == (1 if used else 2)  # of `plain` always


def test_the_panel_names_it_and_shows_the_levels_it_goes_with(monkeypatch, folder) -> None:  # noqa: F811
    statistics(hypersolver()).save(folder / "taught.safetensors")
    part("nodes.folder").folder_paths.filename_list_cache.pop("solver_calibrations", None)
    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: {**ABOUT, "any": "any"})
    told = "good: a hypersolver adds what every step misses"
    for cfg, steps, taught in ((8.0, 5, True), (3.0, 5, False), (8.0, 7, False)):
        graph = ksampler(sampler_name="lambda_fitted", cfg=cfg, steps=steps)
        found = lines(graph)
        assert (told in found) == taught
        assert ("good: a saved calibration serves this run: taught.safetensors" in found) == taught
        assert (told in lines(graph, rule="every prompt")) == taught
    taught = ask(ksampler(sampler_name="lambda_fitted", cfg=8.0, steps=5))["curve"]
    plain = part("samplers").fitted_sigmas(two_trajectories(), 5,
                                           float(part("nodes.status.plan").usual("ve").sigma_max))
    assert len(taught["points"]) == 5 and len(plain) == 6

    def given(cfg: float, **more) -> dict:
        return ksampler(sampler_name="lambda_fitted", cfg=cfg, steps=5, model=["12", 2], **more) | {
            "12": node("LambdaLoadCalibration", name="taught.safetensors", model=["1", 0])}

    run(given(3.0, scheduler="simple"), "5", 12, monkeypatch, describe=lambda guider: ABOUT)
    assert told not in lines(given(3.0)) and any("this is 3" in line for line in lines(given(3.0)))
    assert {told, "good: the calibration fits this model and guidance"} <= {*lines(given(9.0))}


@pytest.mark.parametrize("options", [{"choose_levels": False}, {"first_step": "afs"}])
def test_the_panel_says_where_it_is_left_out(monkeypatch, folder, options: dict) -> None:  # noqa: F811
    """By an option of the node: where guidance or steps do not fit, it is no option that leaves it out."""
    statistics(hypersolver()).save(folder / "taught.safetensors")
    part("nodes.folder").folder_paths.filename_list_cache.pop("solver_calibrations", None)
    run(ksampler(), "5", 12, monkeypatch, describe=lambda guider: {**ABOUT, "any": "any"})

    def said(cfg: float = 8.0, steps: int = 5, **options) -> list[str]:
        graph = custom("fitted", calibration=["12", 0], **options) | {
            "12": node("LambdaLoadCalibration", name="taught.safetensors")}
        graph["6"]["inputs"]["steps"], graph["7"]["inputs"]["cfg"] = steps, cfg
        return [line for line in lines(graph) if "hypersolver" in line]

    assert said() == ["good: a hypersolver adds what every step misses"]
    assert said(**options) == [
        "warn: warning: the hypersolver is left out: it needs choose_levels on and first_step evaluate"]
    assert said(3.0, **options) == said(3.0) == said(steps=20, **options) == []


def test_a_file_keeps_what_it_says_of_its_training_and_is_named_after_it(folder) -> None:  # noqa: F811
    told = {"images": 400, "prompts": 100, "guidance": [5.0, 9.0], "evaluations": 77,
            "selection": {"4": [0.3, 0.2], "5": [0.2, 0.1]}}
    found = replace(statistics(hypersolver()), about={**statistics().about, "hypersolver": told})
    found.save(folder / "taught.safetensors")
    loaded = part("samplers").load_calibration(folder / "taught.safetensors")
    assert loaded.about["hypersolver"] == told and loaded.hypersolver.counts == COUNTS
    assert part("hosting.library").file_name(kind(), loaded.about).startswith("M-1-hypersolver5-9-cfg6.7")
    plain, drawn = (part("nodes.picture").curves(one) for one in (replace(loaded, about=ABOUT), loaded))
    assert plain.shape == drawn.shape and not torch.equal(plain, drawn)


def test_a_name_that_came_by_a_link_and_cannot_be_loses_nothing(folder, monkeypatch) -> None:  # noqa: F811
    """Where it was not seen before the run."""
    library, said = part("hosting.library"), []
    monkeypatch.setattr(library, "say", lambda text, level=0: said.append(text))
    found = statistics(hypersolver())
    for name in ("../evil", "x" * 201):
        assert library.kept(kind(), found, name) is None
    assert len(said) == 2 and all("not saved (name = " in text for text in said)
    assert library.kept(kind(), found, "mine") == folder / "mine.safetensors"
    checked = part("nodes.knowledge").MeasureModel.validate_inputs
    assert "cannot be a file" in checked(name="../evil") and checked(name=None) is True


# --- teaching -----------------------------------------------------------------------------------------------

def taught(network: Network, monkeypatch, cancel_after: int = 10**9, **changes):
    """Train Hypersolver on two prompts of the double, and what was said."""
    said = []
    for name in ("hosting.library", "hosting.kinds", "hosting.measuring", "hosting.teaching",
                 "nodes.knowledge"):
        monkeypatch.setattr(part(name), "say", lambda text, level=0: said.append(text))
    node, seen = part("nodes.knowledge").TrainHypersolver, len(network.calls)
    import comfy.model_management

    def cancelled() -> None:
        if len(network.calls) - seen >= cancel_after:
            raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancelled)
    clip = type("Clip", (), {"tokenize": lambda self, line: float(line),
                             "encode_from_tokens_scheduled": lambda self, value: prompt(value)})()
    how = dict(cfg_low=1.0, cfg_high=3.0, prompts="0.3\n\n -0.4", images=1, fewest=4, most=4, training=2,
               save=False)
    with torch.inference_mode():
        found = node.execute(model(network), clip, prompt(0.0), {"samples": torch.zeros(1, 4, 8, 8)},
                             **{**how, **changes})
    return found.result[0], said


def test_it_is_taught_from_nothing_in_calls_of_the_run_s_batch_and_says_before_what_it_costs(
        folder, monkeypatch) -> None:  # noqa: F811
    network = Network(most=1)
    found, said = taught(network, monkeypatch)
    told = found.about.get("hypersolver")
    measured = [text for text in said if text.startswith("no saved statistics")]
    assert len(measured) == 1 and [path.name for path in folder.glob("*.safetensors")]
    begins = said.index("training the hypersolver: as long as 4 images of 20 steps")  # 40 of 2 images
    assert re.fullmatch(r"training the hypersolver: as long as 4 images of 20 steps, about \d+ seconds",
                        next(text for text in said[begins + 1:] if "about" in text))
    [summary] = [text for text in said if text.startswith("hypersolver trained in ")]
    assert "error on prompts held out, without and with it: 4 steps " in summary
    assert (told is None) == summary.endswith("nothing is kept")
    if told:
        assert told["guidance"] == pytest.approx([1.0, 3.0]) and (told["images"], told["prompts"]) == (2, 2)


def test_cancelled_it_goes_on_with_what_was_done(folder, monkeypatch) -> None:  # noqa: F811
    import comfy.model_management
    whole, cut = Network(), Network()
    result, _ = taught(whole, monkeypatch)
    spent = len(whole.calls)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        taught(cut, monkeypatch, cancel_after=spent - 20)
    assert len(cut.calls) == spent - 20 and len(list(folder.rglob("*.part"))) == 1
    again, said = taught(cut, monkeypatch)
    assert len(cut.calls) - (spent - 20) < 50 and not list(folder.rglob("*.part"))
    assert again.about.get("hypersolver", {}).get("selection") == result.about.get("hypersolver", {}).get(
        "selection")


@pytest.mark.parametrize("changes, told", [
    (dict(prompts="0.3"), "prompts has 1 lines: write two at least"),
    (dict(cfg_low=4.0), "cfg_low = 4 and cfg_high = 3.*must not be above the second"),
    (dict(fewest=6, most=5), "fewest = 6 and most = 5"),
    (dict(calibration="other"), "these statistics were measured on M-1, and this is .*Leave calibration "
                                "unconnected, or run Measure Model on this model at a guidance from 1 to 3")])
def test_what_it_cannot_be_taught_is_refused_with_the_remedy(folder, monkeypatch, changes: dict,  # noqa: F811
                                                             told: str) -> None:
    network = Network()
    if "calibration" in changes:
        changes = {"calibration": statistics()}
    with pytest.raises(ValueError, match=told):
        taught(network, monkeypatch, **changes)
    assert not network.calls
