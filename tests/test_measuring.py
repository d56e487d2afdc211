"""How a model is measured inside ComfyUI: as many images at once as the run has, told the levels of its
calls."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from comfy_models import IMAGE, VIDEO, Network, guider, in_a_run, listed, model, part, prompt, sampled

MEASURED = ["lambda_v3", "lambda_fitted", "lambda_amed", "lambda_amed_2m"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of calibrations."""
    part("nodes")
    import folder_paths
    place = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "solver_calibrations", place)
    folder_paths.filename_list_cache.pop("solver_calibrations", None)
    return tmp_path


def made(network: Network, video: bool = False, cfg: float = 3.0):
    return guider(model(network, video), prompt(0.3), prompt(0.0), cfg)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ["lambda_2m", *MEASURED])
def test_a_model_that_takes_the_run_s_batch_and_no_more_is_measured_in_calls_of_one_shape(name,
                                                                                          batch) -> None:
    network = Network(most=batch)
    result = sampled(made(network), listed(name), batch)
    shapes = {call.images for call in network.calls}  # of the run, and of what is measured before
    assert result.isfinite().all() and max(shapes) == batch and len(shapes) <= 2
    assert len(network.calls) > 5 or name == "lambda_2m"


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_an_evaluation_is_the_same_in_however_many_calls_it_is_made(batch: int) -> None:
    x, sigma = torch.randn(5, *IMAGE), torch.tensor([9.0, 1.0, 4.0, 0.3, 2.0])

    def both(run) -> tuple[Tensor, Tensor]:
        return run.denoise(x, sigma), torch.cat([run.guider(x[k:k + 1], sigma[k:k + 1]) for k in range(5)])

    together, alone = in_a_run(made(Network()), both, batch)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_images_that_have_conditions_of_their_own_keep_them(batch: int) -> None:
    """Two prompts in one cond, one for each image of a batch of two."""
    network = Network(most=batch)
    own = guider(model(network), prompt(0.0, images=2), prompt(0.0), 1.0)
    in_a_run(own, lambda run: run.denoise(torch.zeros(3, *IMAGE), torch.ones(3)), batch)
    assert [call.context for call in network.calls] == {1: [[0.0]] * 3, 2: [[0.0, 1.0], [0.0, 1.0]]}[batch]


@pytest.mark.parametrize("batch, asked", [(1, [[0], [0], [10], [10], [20]]), *(
    (batch, [[0, 0], [10, 10], [20, 20]]) for batch in (2, 3))])
def test_every_image_is_evaluated_under_its_own_prompt(batch: int, asked: list[list[int]]) -> None:
    network = Network(most=batch)
    x = torch.randn(5, *IMAGE)
    answers = part("nodes.guided_run").measured(
        model(network), [prompt(0.0), prompt(10.0), prompt(20.0)], prompt(0.0), 1.0,
        {"samples": torch.zeros(batch, *IMAGE)}, 0, None, lambda run: run.denoise(x, torch.full((5,), 0.5)))
    assert [call.context for call in network.calls] == asked
    assert answers.mean((1, 2, 3)).sub(torch.tensor([0.0, 10.0, 20.0, 0.0, 10.0])).abs().max() < 1.5


def windows(patcher, length: int = 4):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode
    how = (length, 1, "standard_uniform", 1, False, "pyramid", 2)
    return ContextWindowsManualNode.execute(patcher, *how).args[0]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # ComfyUI's own
@pytest.mark.parametrize("name", ["lambda_2m", *MEASURED])
def test_context_windows_work_while_a_video_model_is_measured_and_sampled(name: str) -> None:
    network = Network()
    windowed = guider(windows(model(network, video=True)), prompt(0.3), prompt(0.0))
    result = sampled(windowed, listed(name), 1, VIDEO)
    assert result.isfinite().all() and {call.shape[2] for call in network.calls} == {4}


def test_what_does_not_fit_into_memory_is_halved_once_and_then_told_with_the_remedy(monkeypatch) -> None:
    network, said = Network(most=2), []
    monkeypatch.setattr(part("hosting.measuring"), "say", lambda text, level: said.append(text))

    def twice(run) -> list[Tensor]:
        first = run.denoise(torch.ones(5, *IMAGE), torch.ones(5))
        assert [call.images for call in network.calls] == [4, 2, 2, 2]
        run.denoise(torch.ones(2, *IMAGE), torch.ones(2))  # at once in halves
        assert [call.images for call in network.calls[4:]] == [2]
        network.most = 1
        import comfy.model_management
        told = "measuring the model, 2 images at once: measure at a smaller size.*2 images are too many"
        with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=told):
            run.denoise(torch.ones(5, *IMAGE), torch.ones(5))
        return first

    first = in_a_run(made(network), twice, batch=4)
    assert len(first) == 5 and len(said) == 1 and "4 images at once: going on with 2" in said[0]


def test_a_fault_of_the_model_that_is_none_of_memory_is_passed_on() -> None:
    network = Network()
    network.middle_block.append(torch.nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        in_a_run(made(network), lambda run: run.denoise(torch.ones(5, *IMAGE), torch.ones(5)), batch=4)
    assert len(network.calls) == 1


def test_answers_of_another_shape_are_told_and_not_waited_for() -> None:
    network = Network()
    patcher = model(network)
    patcher.set_model_sampler_post_cfg_function(lambda args: args["denoised"][:0])
    said = part("samplers.model").answer

    def asked(run) -> None:
        with pytest.raises(
                ValueError,
                match="the model returned shape .0, 4, 40, 40. at sigma = 1 for x of shape .5, 4, 40, 40."):
            said(run.denoise, torch.ones(5, *IMAGE), 1.0, {})

    in_a_run(guider(patcher, prompt(0.3), prompt(0.0)), asked, batch=2)
    assert len(network.calls) == 3


def levels_of(calls: list) -> list[float]:
    """The levels evaluated, in order."""
    return list(dict.fromkeys(call.sigma[0] for call in calls))


@pytest.mark.parametrize("name", ["lambda_2m", "lambda_3m_sde", *MEASURED])
def test_every_call_finds_its_level_among_the_levels_it_is_told(name: str) -> None:
    network = Network()
    sampled(made(network), listed(name), batch=2, steps=6)
    for call in network.calls:
        assert set(call.sigma) <= set(call.told) and call.told[-1] == 0.0
        assert call.told == sorted(call.told, reverse=True)


def test_the_fitted_solver_tells_the_levels_it_has_chosen_and_a_measurement_its_grid() -> None:
    network = Network()
    sampled(made(network), listed("lambda_fitted"), steps=5)
    probe = 2 * part("samplers.model").PROBE  # calls, of one image each
    run, before = network.calls[-5:], network.calls[probe:-5]
    chosen = levels_of(run)
    assert len(chosen) == 5 and all(call.told == [*chosen, 0.0] for call in run)
    assert run[0].told != before[-1].told
    grid = levels_of(before)
    assert sorted(grid, reverse=True) == before[0].told[:-1] and len(grid) == 25
    assert len({tuple(call.told) for call in before}) == 1


def test_a_step_of_two_evaluations_tells_the_schedule_and_at_its_inner_level_that_one_too() -> None:
    network, other = Network(), Network()
    sampled(made(other), listed("lambda_2m"), steps=4)
    schedule = other.calls[0].told
    singlestep = part("nodes.sampling").calibrated(part("samplers").FAMILIES["singlestep"])
    sampled(made(network), singlestep, steps=4, order=2)
    inner = [call for call in network.calls if call.sigma[0] not in schedule]
    assert len(inner) == 3
    assert all(call.told == schedule for call in network.calls if call.sigma[0] in schedule)
    assert all(call.told == sorted([*schedule, call.sigma[0]], reverse=True) for call in inner)


@pytest.mark.parametrize("name", MEASURED)
def test_telling_levels_leaves_the_caller_s_options_as_they_were(name: str) -> None:
    seen = []

    def function(run_model, x, sigmas, extra_args, callback, disable, **options):
        told = extra_args["model_options"]["transformer_options"]["sample_sigmas"]
        result = listed(name)(run_model, x, sigmas, extra_args, callback, disable, **options)
        assert extra_args["model_options"]["transformer_options"]["sample_sigmas"] is told
        assert torch.equal(told, sigmas)
        seen.append(set(extra_args["model_options"]))
        return result

    sampled(made(Network()), function)
    assert seen and not any("lambda" in key for key in seen[0])


def test_the_middle_block_of_an_evaluation_in_several_calls_is_that_of_all_its_images() -> None:
    x = torch.randn(5, *IMAGE)

    def watched(run) -> Tensor:
        with part("nodes.middle_block").MiddleBlock(run.patcher) as block:
            run = replace(run, block=block)
            for size in (3, 5):
                run.denoise(x[:size], torch.ones(size))
                assert len(block.features()) == size
            return block.features()

    features = in_a_run(made(Network()), watched, batch=2)
    torch.testing.assert_close(features, x / 2 ** 0.5)


def test_a_predictor_is_trained_on_a_model_that_takes_the_run_s_batch_and_no_more() -> None:
    network, kind = Network(most=1), part("hosting.kinds").AMED_KIND

    def measure(run):
        run = replace(run, options={"base": "amed", "first_step": "evaluate"})
        about = part("hosting.library").described(kind, run)
        return kind.measure(run, about, None, samples=3, form="predictor", teacher=2)

    trained = in_a_run(made(network), measure, steps=3)
    assert trained.predictor is not None and {call.images for call in network.calls} == {1}


def test_the_middle_block_is_watched_on_every_copy_that_computes() -> None:
    """Newer ComfyUI sends one cond to each device's copy of the model."""
    base, copy = Network(), Network()
    patcher, other = model(base), model(copy)
    patcher.set_additional_models("multigpu", [other])
    x = torch.randn(2, *IMAGE)

    def call(network: Network, order: list[int], value: float) -> None:
        options = {"cond_or_uncond": order, "sigmas": torch.ones(2)}
        network(x + value, torch.ones(2), torch.zeros(2, 4, 8), options)

    with part("nodes.middle_block").MiddleBlock(patcher) as block:
        call(base, [1], 5.0)
        call(copy, [0], 0.0)
        torch.testing.assert_close(block.features(), x)
        call(copy, [1], 5.0)
        call(base, [0], 1.0)
        torch.testing.assert_close(block.features(), x + 1.0)
    assert not base._forward_pre_hooks and not base.middle_block[0]._forward_hooks
    assert not copy._forward_pre_hooks and not copy.middle_block[0]._forward_hooks


class TeaCache:
    """A cache as some packs put it before a model: soon after an answer it is given again, moved as x has."""

    def __init__(self) -> None:
        self.last = None

    def __call__(self, apply, args):
        x, sigma = args["input"], float(args["timestep"][0])
        if self.last and self.last[0].shape == x.shape and abs(self.last[2] - sigma) < 0.05 * sigma:
            return self.last[1] + x - self.last[0]
        answer = apply(x, args["timestep"], **args["c"])
        self.last = x, answer, sigma
        return answer


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MEASURED)
def test_a_model_that_does_not_answer_for_itself_is_refused_and_what_wraps_it_named(folder, name,
                                                                                    batch) -> None:
    patcher = model(Network())
    patcher.set_model_unet_function_wrapper(TeaCache())
    cached = guider(patcher, prompt(0.3), prompt(0.0))
    told = "does not answer for itself.*around this model: TeaCache of test_measuring. Bypass the node"
    with pytest.raises(ValueError, match=told):
        sampled(cached, listed(name), batch)
    assert not list(folder.glob("*.safetensors"))
    assert sampled(cached, listed("lambda_2m"), batch).isfinite().all()
    sampled(made(Network()), listed(name), batch)  # measured without, and given
    [file] = folder.glob("*.safetensors")
    kind = next(kind for kind in part("hosting.kinds").KINDS
                if kind.option == ("trained" if "amed" in name else "statistics"))
    patcher.set_attachments(kind.attachment, kind.type.load(file))
    assert sampled(guider(patcher, prompt(0.3), prompt(0.0)), listed(name), batch).isfinite().all()


def test_a_refit_refuses_it_too() -> None:
    kind, identity = part("hosting.kinds").STATISTICS_KIND, part("nodes.identity")

    def about(run) -> dict:
        return {**identity.description(run.guider), "fitted": True, "prompts": 1}

    found = in_a_run(made(Network()), lambda run: kind.measure(run, about(run), None))
    patcher = model(Network())
    patcher.set_model_unet_function_wrapper(TeaCache())
    wanted = found.about  # measured before the cache was put there

    def refit(run) -> None:
        with pytest.raises(ValueError,
                           match="Other nodes have put around this model: TeaCache of test_measuring"):
            kind.refit(run, found, 4, {**about(run), "patches": wanted["patches"]}, None)

    in_a_run(guider(patcher, prompt(0.3), prompt(0.0)), refit)


def test_latents_of_several_kinds_are_refused_by_name_where_a_model_is_measured() -> None:
    part("nodes")
    import comfy.conds
    import comfy.nested_tensor
    latents = comfy.nested_tensor.NestedTensor([torch.zeros(1, *VIDEO), torch.zeros(1, 4, 8)])
    with pytest.raises(ValueError, match="latents are nested"):
        part("nodes.guided_run").measured(model(Network()), [prompt(0.0)], prompt(0.0), 1.0,
                                         {"samples": latents}, 0, None, lambda run: None)
    network = Network()
    patcher = model(network)
    told, shapes = patcher.model.extra_conds, comfy.conds.CONDConstant([[1, 4, 8, 8], [1, 4, 8]])
    patcher.model.extra_conds = lambda **more: {**told(**more), "latent_shapes": shapes}
    with pytest.raises(ValueError,
                       match="nested .several in one, such as video.*Choose a sampler that needs none"):
        sampled(guider(patcher, prompt(0.3), prompt(0.0)), listed("lambda_v3"))
    assert not network.calls


def scheduled(cfg) -> object:
    """A guider whose scale depends on the step, as some packs make it."""
    part("nodes")
    import comfy.samplers

    class ScheduledCFG(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):
            told = model_options["transformer_options"]["sample_sigmas"]
            step = int((told == timestep[0]).nonzero())
            scale = self.cfg(step) if callable(self.cfg) else float(self.cfg[step])
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, self.conds["negative"], self.conds["positive"], scale,
                model_options=model_options, seed=seed)

    changing = ScheduledCFG(model(Network()))
    changing.set_conds(prompt(0.3), prompt(0.0))
    changing.set_cfg(cfg)
    return changing


FALLING = [5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("cfg", [FALLING, torch.tensor(FALLING), lambda step: FALLING[step]],
                         ids=["list", "tensor", "function"])
def test_a_guidance_that_changes_from_step_to_step_is_sampled_and_refused_a_calibration(cfg) -> None:
    results = [sampled(scheduled(scales), listed("lambda_2m")) for scales in (cfg, FALLING)]
    assert torch.equal(*results)
    with pytest.raises(ValueError,
                       match="guidance of this ScheduledCFG is .*, and statistics hold for one number"):
        sampled(scheduled(cfg), listed("lambda_v3"))
    kind = part("hosting.kinds").STATISTICS_KIND
    described = part("hosting.library").described
    found = in_a_run(made(Network()), lambda run: kind.measure(run, described(kind, run), None))
    given = sampled(scheduled(cfg), listed("lambda_v3"), statistics=found)
    assert given.isfinite().all()
    description = part("nodes.identity").description
    assert description(scheduled(cfg))["patches"] != description(scheduled([1.0] * 5))["patches"]
