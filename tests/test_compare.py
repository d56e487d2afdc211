"""Compare Samplers in this process: what it parses, the steps a budget buys, counted calls, and the
pictures."""
from __future__ import annotations

import importlib
import math
import sys
import types

import numpy as np
import pytest
import torch

from comfy_host import comfy_sampling, pack
from samplers import SAMPLERS, nfe


def module(name: str) -> types.ModuleType:
    pack()
    return sys.modules[f"custom_nodes_x_lambda-solvers.nodes.{name}"]


def bench_of(denoiser=lambda x, sigma: x / 2):
    """A Bench without a network: KSampler's schedules, and runs on a denoiser of our choice."""
    comparison = module("bench")
    import comfy.model_sampling
    import comfy.samplers

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    sampling = Sampling()
    model = types.SimpleNamespace(get_model_object={"model_sampling": sampling}.__getitem__, model_options={},
                                  load_device="cpu")

    class Guider:
        """CFGGuider around a function."""

        inner_model = types.SimpleNamespace(model_sampling=sampling)
        model_patcher, model_options, cfg, predictions = model, {}, 1.0, 0

        def __init__(self, denoise):
            self.denoise = denoise

        def __call__(self, x, sigma, model_options={}, seed=None):
            type(self).predictions += 1
            denoised = self.denoise(x, sigma)
            for fn in model_options.get("sampler_post_cfg_function", []):
                denoised = fn({"denoised": denoised, "uncond_denoised": denoised})
            return denoised

        def sample(self, noise, latent, sampler, sigmas, denoise_mask=None, disable_pbar=True, seed=None):
            extra = {"model_options": {}, "seed": seed}
            return sampler.sample(self, sigmas, extra, None, noise, latent, denoise_mask, True)

    bench = object.__new__(comparison.Bench)
    bench.model, bench.seed, bench.denoise, bench.mask, bench.predictions = model, 7, 1.0, None, 0
    bench.noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    bench.latent = torch.zeros_like(bench.noise)
    bench.real, bench.stage = Guider(denoiser), Guider(lambda x, sigma: x / 2)  # the latter as Rehearsal
    return bench


def gaussian(x, sigma):
    """The exact denoiser of data N(0.5, 0.2^2)."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (0.04 * x + variance * 0.5) / (0.04 + variance)


def entry(line: str):
    [found] = module("bench").parse(line)
    return found


def test_a_line_is_a_name_with_options_of_comfyui_or_of_ours() -> None:
    comparison = module("bench")
    entries = comparison.parse("dpmpp_2m\n\n lambda/dpmpp_2m,  rule = taylor\nlambda_3m\ndpm_2s\n"
                               "dpmpp_2m_sde, eta=0.5\ndpmpp_2m")
    assert [e.label for e in entries] == ["dpmpp_2m", "lambda/dpmpp_2m, rule = taylor", "lambda_3m", "dpm_2s",
                                          "dpmpp_2m_sde, eta=0.5"]
    assert entries[0].sampler.sampler_function is comfy_sampling().sample_dpmpp_2m
    assert entries[1].sampler.extra_options == {"rule": "taylor"
                                                } and entries[4].sampler.extra_options == {"eta": 0.5}
    assert [e.listed for e in entries] == ["dpmpp_2m", "euler", "lambda_3m", "euler", "dpmpp_2m_sde"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "samplers is empty: write one sampler on each line"),
     ("eular", "unknown sampler 'eular': write a name of KSampler's list"),
     ("lambda/euler", "unknown sampler 'lambda/euler'"),
     ("dpmpp_2m, rule=taylor",
      "ComfyUI's dpmpp_2m has no option 'rule': choose from none, or write lambda/dpmpp_2m"),
     ("euler, s_noize=1", "has no option 's_noize': choose from s_churn, s_tmin, s_tmax, s_noise"),
     ("lambda/dpmpp_2m, rule=heun", "rule = 'heun' is out of range: choose one of midpoint, taylor"),
     ("lambda/dpmpp_2m, taylor", "'taylor' in the line .* is no option: write name, option=value"), ])
def test_a_line_that_is_none_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module("bench").parse(text)


def test_schedulers_and_budgets_are_checked() -> None:
    comparison = module("bench")
    assert comparison.parse_schedulers(" karras ,sgm_uniform, karras") == ["karras", "sgm_uniform"]
    assert comparison.parse_budgets("10, 5,8, 5") == [5, 8, 10]
    assert comparison.parse_schedulers("gits:1.2, align_your_steps: SDXL, optimal_steps:FLUX,gits:1.20") == [
        "gits:1.20", "align_your_steps:SDXL", "optimal_steps:FLUX"]
    for text, message in (("karas", "unknown 'karas': write names"), (" , ", "empty: write names"),
                          ("align_your_steps:SD3", "write align_your_steps: and one of SD1, SDXL, SVD"),
                          ("gits", "'gits': write gits: and one of 0.80, 0.85, .*, 1.50"),
                          ("gits:1.23", "write gits: and"),
                          ("optimal_steps:", "write optimal_steps: and one of FLUX, Wan, Chroma, such as")):
        with pytest.raises(ValueError, match=message):
            comparison.parse_schedulers(text)
    for text, message in (("0", "'0' is out of range: write whole numbers from 1 to 1000"),
                          ("5, x", "'x' is out"), ("", "empty"), ("-3", "'-3' is out"),
                          ("2.5", "'2.5' is out"), ("1001", "'1001' is out")):
        with pytest.raises(ValueError, match=message):
            comparison.parse_budgets(text)


@pytest.mark.parametrize("name",
                         [name for name in SAMPLERS if SAMPLERS[name].evaluations_per_step is not None])
def test_a_rehearsal_of_ours_makes_as_many_calls_as_the_catalogue_says(name: str) -> None:
    bench, one = bench_of(), entry("lambda/" + name)
    for steps in (1, 4, 7):
        assert bench.rehearse(one.rehearsal, bench.sigmas(one, "karras",
                                                          steps)).evaluations == nfe(name, steps)
    assert bench.predictions == 0


@pytest.mark.parametrize(("name", "steps"), [("euler", {5: 5, 8: 8}), ("heun", {5: 3, 8: 4}),
                                             ("dpm_2", {5: 3, 8: 4}), ("heunpp2", {5: 2, 8: 3}),
                                             ("uni_pc", {5: 5, 8: 8}), ("lambda/dpmpp_3s", {5: 2, 8: 3}),
                                             ("dpmpp_2m_cfg_pp", {5: 5}), ("ddim", {5: 5})])
def test_a_budget_buys_the_most_steps_that_fit(name: str, steps: dict[int, int]) -> None:
    cells = module("bench").plan(bench_of(), entry(name), ["karras"], list(steps))
    assert {cell.budget: cell.steps for cell in cells} == steps
    assert all(cell.planned <= cell.budget and not cell.fault for cell in cells)
    longer = module("bench").plan(bench_of(), entry(name), ["karras"], [cells[0].planned + 1])[0]
    assert longer.steps >= cells[0].steps


TABLES = {
    "align_your_steps:SDXL": ("nodes_align_your_steps", "AlignYourStepsScheduler", "SDXL"),
    "align_your_steps:SD1": ("nodes_align_your_steps", "AlignYourStepsScheduler", "SD1"),
    "gits:1.20": ("nodes_gits", "GITSScheduler", 1.2), "gits:0.80": ("nodes_gits", "GITSScheduler", 0.8)
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [3, 10, 25])
def test_a_table_is_the_schedule_of_comfyui_s_node_and_below_denoise_1_its_end(name: str, steps: int) -> None:
    file, node, setting = TABLES[name]
    node, bench = getattr(importlib.import_module(f"comfy_extras.{file}"), node), bench_of()
    assert torch.equal(bench.sigmas(entry("euler"), name, steps), node.execute(setting, steps, 1.0).result[0])
    bench.denoise = 0.5
    assert torch.equal(bench.sigmas(entry("euler"), name, steps),
                       node.execute(setting, 2 * steps, 0.5).result[0])


def test_a_table_for_other_models_or_of_too_many_steps_is_a_result_that_says_so() -> None:
    plan, bench = module("bench").plan, bench_of()
    said = {
        name: plan(bench, entry("euler"), [name], [budget])[0].fault
        for name, budget in (("gits:1.20", 1), ("optimal_steps:FLUX", 5), ("align_your_steps:SVD", 5),
                             ("align_your_steps:SD1", 5))
    }
    assert "gits:1.20 begins at 2 steps" in said["gits:1.20"] and said["align_your_steps:SD1"] == ""
    assert "optimal_steps:FLUX is not for this model: it starts at sigma 0.9968 on path flow" in said[
        "optimal_steps:FLUX"]
    assert "starts at sigma 700 on path ve, the model at 14.61" in said["align_your_steps:SVD"]


def test_a_comfyui_without_a_table_s_node_refuses_that_table_only(monkeypatch) -> None:
    parse = module("bench").parse_schedulers
    monkeypatch.setitem(sys.modules, "comfy_extras.nodes_gits", None)
    assert parse("karras, align_your_steps:SD1") == ["karras", "align_your_steps:SD1"]
    with pytest.raises(ValueError, match="this ComfyUI has no GITSScheduler .*: leave gits:1.20 out"):
        parse("karras, gits:1.20")


def test_the_cost_is_said_in_images_before_and_in_time_once_evaluations_were_timed() -> None:
    cost = module("compare").cost_of
    assert cost(620).startswith("as long as 31 images of 20 steps, and more where") and "1 image of" in cost(
        5)
    assert cost(620, 240.0) == "as long as 31 images of 20 steps, about 4 minutes" and cost(
        20, 7.4).endswith("about 7 seconds")


def test_a_step_that_is_not_evaluated_is_not_paid_for() -> None:
    cells = module("bench").plan(bench_of(), entry("lambda/dpmpp_2m, first_step=afs"), ["karras"], [4, 6])
    assert [(cell.steps, cell.planned) for cell in cells] == [(5, 4), (7, 6)]


def test_what_a_budget_cannot_buy_and_what_fails_is_said() -> None:
    comparison = module("bench")
    [cell] = comparison.plan(bench_of(), entry("seeds_3"), ["karras"], [1])
    assert cell.fault == "" and cell.steps == 1  # its last step makes one evaluation
    broken = entry("lambda/dpmpp_2m")._replace(rehearsal=comparison.KSAMPLER(lambda *a, **k: 1 / 0))
    cells = comparison.plan(bench_of(), broken, ["karras", "simple"], [5, 8])
    assert [cell.fault for cell in cells] == ["ZeroDivisionError: division by zero"] * 4


@pytest.mark.parametrize(("name", "stochastic", "adaptive"), [
    ("euler", False, False), ("euler_ancestral", True, False), ("euler_ancestral, eta=0.0", False, False),
    ("dpmpp_sde", True, False), ("lambda_2m_sde", True, False), ("lambda/dpmpp_2m_sde, eta=0", False, False),
    ("lcm", True, False), ("dpm_adaptive", False, True),
    ("dpm_adaptive_23", False, True), ("lambda_v3", False, False), ("uni_pc_bh2", False, False)])
def test_stochastic_and_adaptive_samplers_are_found_out(name: str, stochastic: bool, adaptive: bool) -> None:
    cells = module("bench").plan(bench_of(), entry(name), ["karras", "normal"], [4, 6])
    assert {cell.stochastic for cell in cells} == {stochastic} and not any(cell.fault for cell in cells)
    assert [cell.budget for cell in cells] == ([None, None] if adaptive else [4, 6, 4, 6])


def test_errors_fall_with_evaluations_and_the_reference_is_the_exact_solution() -> None:
    comparison = module("bench")
    bench = bench_of(gaussian)
    cells = [
        cell for name in ("euler", "lambda_2m")
        for cell in comparison.plan(bench, entry(name), ["karras"], [5, 10, 20])
    ]
    start = float(cells[0].sigmas[0])
    reference = comparison.solve(bench, comparison.grids(bench, start, 200), lambda: None)
    low = float(bench.model.get_model_object("model_sampling").sigma_min)  # the last step is D at sigma_min
    x = bench.noise * math.sqrt(1 + start**2)
    at_low = 0.5 + (x - 0.5) * math.sqrt((0.04 + low**2) / (0.04 + start**2))
    exact = 0.5 + (at_low - 0.5) * 0.04 / (0.04 + low**2)
    assert comparison.distance(reference.samples, exact) < 1e-3 and reference.doubt < 5e-3
    calls = []
    done = [comparison.measured(bench, cell, exact, lambda: calls.append(1)) for cell in cells]
    assert [cell.outcome.evaluations for cell in done] == [5, 10, 20] * 2 and len(calls) == 70
    errors = [cell.error for cell in done]
    assert errors[:3] == sorted(errors[:3], reverse=True) and errors[5] < errors[3] and errors[5] < errors[2]


def test_a_failing_run_is_a_result_and_cancel_goes_through() -> None:
    comparison = module("bench")
    import comfy.model_management
    [cell] = comparison.plan(bench_of(), entry("euler"), ["karras"], [5])

    def raises(error):
        def denoiser(x, sigma):
            raise error
        return denoiser

    reference = torch.randn(2, 3, 8, 8)
    failed = comparison.measured(bench_of(raises(RuntimeError("out of | luck"))), cell, reference,
                                 lambda: None)
    assert failed.fault == "RuntimeError: out of | luck"
    broken = comparison.measured(bench_of(lambda x, sigma: x * math.nan), cell, reference, lambda: None)
    assert broken.fault == "NaN or infinite values after 5 evaluations" and math.isnan(broken.error)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        cancelled = raises(comfy.model_management.InterruptProcessingException())
        comparison.measured(bench_of(cancelled), cell, reference, lambda: None)


@pytest.mark.parametrize(("path", "start"), [("ve", 14.6), ("ve", 2.0), ("flow", 1.0), ("flow", 0.5)])
def test_the_reference_s_schedule_falls_over_the_model_s_own_levels(path: str, start: float) -> None:
    comparison = module("bench")
    levels = [(1000 - i) / 1000 if path == "flow" else math.exp(2.68 - 6.2 * i / 999) for i in range(1000)]
    sigmas = comparison.reference_sigmas(levels, comparison.PATHS[path], start, 100)
    assert sigmas[0] == start and sigmas[-1] == 0.0 and sigmas[-2] == levels[-1]
    assert all(a > b for a, b in zip(sigmas, sigmas[1:])) and 60 <= len(sigmas) - 1 <= 100
    assert set(sigmas[1:-1]) <= set(levels)


def test_references_are_kept_for_the_same_objects_and_die_with_their_model() -> None:
    comparison = module("bench")
    references = comparison.References()

    class Patcher:
        pass

    model, cond, latent = Patcher(), [[torch.ones(2), {}]], torch.zeros(2)
    reference = comparison.Reference(latent, 100, 0.0)
    references.keep(model, (cond, latent, None), (3.0, 7), reference)
    assert references.find(model, (cond, latent, None), (3.0, 7)) is reference
    assert references.find(model, ([[torch.ones(2), {}]], latent, None), (3.0, 7)) is None
    assert references.find(model, (cond, latent, None), (3.0, 8)) is None
    assert references.find(Patcher(), (cond, latent, None), (3.0, 7)) is None
    for seed in range(references.MOST + 5):
        references.keep(model, (cond, latent, None), (3.0, seed), reference)
    assert len(references.kept) == references.MOST
    del model
    assert references.find(Patcher(), (cond, latent, None), (3.0, 7)) is None
    references.keep(other := Patcher(), (cond, latent, None), (1.0, 1), reference)
    assert len(references.kept) == 1 and references.find(other, (cond, latent, None), (1.0, 1)) is reference


def test_the_cheapest_has_the_fewest_evaluations_within_the_error_and_else_the_nearest_is_named() -> None:
    compare, comparison = module("compare"), module("bench")

    def cell(label: str, evaluations: int, error: float):
        return comparison.Cell(entry(label), "karras", evaluations, sigmas=torch.zeros(evaluations + 1),
                               error=error, outcome=comparison.Outcome(torch.zeros(1), evaluations, 0))

    cells = [
        cell("euler", 8, 0.2),
        cell("dpmpp_2m", 8, 0.09),
        cell("lambda_2m", 8, 0.08),
        cell("deis", 10, 0.01),
        comparison.Cell(entry("heun"), "karras", 5, fault="no")
    ]
    assert compare.cheapest(cells, 0.1) is cells[2]
    assert compare.words_for(cells[2], cells[3],
                             0.1) == "lambda_2m with karras, 8 steps: 8 evaluations, error 0.080 (within 0.1)"
    assert compare.cheapest(cells, 0.001) is None
    assert compare.words_for(None, cells[3], 0.001).startswith(
        "nothing is within 0.001; the nearest, which SAMPLER and SIGMAS are, is deis with karras")
    assert compare.words_for(None, None, 0.1) == "nothing ran: the table says why"
    sampler, sigmas = compare.driving(cells[3], "")
    assert sampler.sampler_function is cells[3].entry.sampler.sampler_function and sigmas is cells[3].sigmas
    assert [blocked.message for blocked in compare.driving(None, "nothing ran")] == ["nothing ran"] * 2
    rows = compare.table(cells, {}, "x").splitlines()
    assert rows[4] == "| heun | karras | of 5 |  |  | failed: no |" and rows[5].startswith(
        "| lambda_2m | karras | 8 | 8 | 0.0800 |")


def test_axes_are_marked_at_a_few_round_numbers() -> None:
    picture = module("picture")
    assert picture.ticks(-0.65, 1.04) == [-0.5, 0.0, 0.5, 1.0] and picture.ticks(-2.7, 3.5,
                                                                                 8) == [-2, -1, 0, 1, 2, 3]
    assert picture.log_ticks(0.07, 1.1, 5) == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert picture.log_ticks(3e-4, 0.2, 5) == pytest.approx([1e-3, 1e-2, 1e-1])
    # no two of 1, 2, 5 are in it
    assert picture.log_ticks(0.41, 0.49, 5) == pytest.approx([0.42, 0.44, 0.46, 0.48])
    random = np.random.default_rng(0)
    for low, high in np.sort(random.normal(size=(200, 2)) * 10.0 ** random.integers(-6, 6, (200, 1)), axis=1):
        marks = picture.ticks(low, high)
        assert 2 <= len(marks) <= 5 and all(
            low <= mark <= high or math.isclose(mark, low) or math.isclose(mark, high) for mark in marks)


def test_the_plot_puts_every_mark_in_its_colour_and_the_sheet_frames_the_good() -> None:
    picture = module("picture")
    lines = [
        picture.Line("euler", "karras", False, [(5, 0.5), (10, 0.2)]),
        picture.Line("deis", "karras", True, [(5, 0.3)]),
        picture.Line("a sampler with a long line of options, order=2, rule=taylor", "sgm_uniform", False,
                     [(40, 1e-3)])
    ]
    pixels = np.asarray(picture.errors(lines, 0.1, 0.01))
    assert pixels.shape == (600, 1000, 3)
    for colour in (*picture.HUES[:3], picture.GOOD, picture.DOUBT):
        assert (pixels == colour).all(-1).sum() > 20, colour
    assert picture.errors([], 0.1, 0.0).size == (1000, 600)
    from PIL import Image
    tile = picture.Tile(Image.new("RGB", (64, 32), "red"), ("error 0.1",), "best")
    bare = tile._replace(frame=None)
    plain, framed = (picture.sheet([bare], "words\nbeside", [("karras", "5 evaluations")], [("euler", [one])])
                     for one in (bare, tile))
    assert plain.size == framed.size and (np.asarray(framed) == picture.GOOD).all(-1).sum() > 168 * 4 * 4
    assert picture.first(torch.rand(2, 5, 16, 24, 3)).size == (24, 16)
