"""The script of Stable Diffusion WebUI that trains a hypersolver, on doubles of its modules."""
from __future__ import annotations

import pytest
import torch

from samplers import load_calibration
from test_webui import bent, files, full  # noqa: F401
from webui_host import Composable, Multicond, prompt

STEPS = 2  # at which the network gains on the double's model
LINES = "0.5\n\n -0.4 \n0.2\n0.9\n-0.7\n0.1"


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))


def asked(host, **changes):
    """A job in which the script was chosen, as the WebUI makes it until it samples."""
    p = host.job(**{"cfg_scale": 2.0, **changes.pop("job", {})})
    p.prompts, p.negative_prompts, p.sampler_name, p.enable_hr = ["0.5"], ["-0.1"], "Euler", True
    p.read = []

    def setup_conds() -> None:
        p.read.append((list(p.prompts), list(p.negative_prompts), p.cfg_scale))
        p.c = Multicond((len(p.prompts),), [[Composable(prompt(float(text)))] for text in p.prompts])
        p.uc = None if p.cfg_scale == 1.0 else [prompt(float(text)) for text in p.negative_prompts]

    p.setup_conds, p.get_conds = setup_conds, lambda: (p.c, p.uc)
    told = dict(prompts=LINES, images=2, cfg_low=1.5, cfg_high=3.0, fewest=STEPS, most=STEPS, training=150)
    script = host.part("webui.training").Training()
    assert script.run(p, *{**told, **changes}.values()) is p
    host.part("webui.panel").Panel().process_batch(p, batch_number=0)
    return p


def test_it_is_trained_saved_and_used_for_the_picture(bent) -> None:  # noqa: F811
    p = asked(bent)
    assert p.read == [(LINES.split(), ["-0.1"] * 6, 3.0)] and (p.sampler_name, p.enable_hr) == (
        "Lambda Fitted", False)
    assert (p.prompts, p.negative_prompts, p.cfg_scale) == (["0.5"], ["-0.1"], 2.0)
    bent.run("Lambda Fitted", p, noise(), full(bent, STEPS))
    told = bent.sampler.model_wrap_cfg.told
    lessons = {round(mean, 4): scale for mean, scale, _ in told if scale not in (2.0, p.cfg_scale)}
    assert {0.5, -0.4, 0.2, 0.9, -0.7, 0.1} <= {round(mean, 4) for mean, *_ in told}
    assert min(lessons.values()) == pytest.approx(1.5) and max(lessons.values()) == pytest.approx(3.0)
    [taught] = [path for path in files(bent) if "hypersolver" in path.name]
    about = load_calibration(taught).about
    assert about["hypersolver"]["guidance"] == pytest.approx([1.5, 3.0])
    assert (about["hypersolver"]["images"], about["hypersolver"]["prompts"]) == (12, 6)
    assert p.extra_generation_params["Lambda calibration file"].startswith(taught.stem)
    assert any(line.startswith("hypersolver trained in ") for line in p.comments)
    assert "saved as " + taught.stem in " ".join(p.comments)
    before = bent.sampler.model_wrap_cfg.asked
    bent.run("Lambda Fitted", p, noise(), full(bent, STEPS))  # of a second batch
    assert before > 100 and bent.sampler.model_wrap_cfg.asked == STEPS
    assert not hasattr(p, "lambda_solvers_told")  # of many prompts: it is no longer kept


def test_whoever_trains_may_measure_whatever_the_settings_say(bent) -> None:  # noqa: F811
    setattr(bent.opts, bent.part("webui.settings_page").RULE, "saved only")
    assert bent.part("webui.settings_page").rule() == "saved only"
    p = asked(bent, training=2, cfg_low=3.0)  # not the page's guidance, of which nothing is saved
    found = bent.run("Lambda Fitted", p, noise(), full(bent, STEPS))
    assert found.isfinite().all() and p.extra_generation_params["Lambda calibration"] == "auto"
    with pytest.raises(ValueError, match="set Lambda calibration to auto once"):
        bent.run("Lambda Fitted", bent.job(cfg_scale=7.0), noise(), full(bent, STEPS))


def test_a_page_without_guidance_may_train_for_some(bent) -> None:  # noqa: F811
    """The WebUI reads no negative prompt for it."""
    p = asked(bent, training=2, job={"cfg_scale": 1.0, "uncond": None})
    found = bent.run("Lambda Fitted", p, noise(), full(bent, STEPS))
    scales = [scale for _, scale, _ in bent.sampler.model_wrap_cfg.told]
    assert found.isfinite().all() and scales[-STEPS:] == [1.0] * STEPS
    assert scales[0] == bent.part("hosting.canonical").guidance((1.5 * 3.0) ** 0.5) == 2.0


def test_interrupted_it_goes_on_with_what_was_done_whatever_the_picture_s_prompt(bent) -> None:  # noqa: F811
    def spent(**job) -> int:
        bent.run("Lambda Fitted", p := asked(bent, training=10, job=job), noise(), full(bent, STEPS))
        said.extend(p.comments)
        for path in files(bent):
            if "hypersolver" in path.name:
                path.unlink()
        return bent.sampler.model_wrap_cfg.asked

    said: list[str] = []
    spent()  # the statistics too, which stay
    whole = spent()
    bent.interrupt_at = whole // 2
    assert spent() == whole // 2 and "training was cancelled; the next run goes on from there" in said[-1]
    bent.interrupt_at, bent.state.interrupted = None, False
    assert spent(cond=Multicond((1,), [[Composable(prompt(-0.3))]])) < 0.75 * whole


def test_without_guidance_no_negative_prompt_is_read(bent) -> None:  # noqa: F811
    p = asked(bent, cfg_low=1.0, cfg_high=1.0, training=1)
    assert {told.uncond for told in p.lambda_solvers_told} == {None}
    assert bent.part("webui.training")._under(p.lambda_solvers_told, 1.0)["uncond"] is None


@pytest.mark.parametrize("changes, told", [
    (dict(prompts="0.3"), "prompts has 1 lines: write two at least"),
    (dict(cfg_low=4.0), "must not be above the second"), (dict(fewest=6, most=5), "fewest = 6 and most = 5")])
def test_what_cannot_be_taught_is_refused_before_the_job(bent, changes: dict, told: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=told):
        asked(bent, **changes)


def test_it_is_a_script_of_txt2img_with_the_built_in_prompts(bent) -> None:  # noqa: F811
    script = bent.load().Training()
    assert script.title() == "Lambda Solvers: train hypersolver"
    assert script.show(False) is True and script.show(True) is False
    prompts, images, *numbers = script.ui(False)
    assert prompts.label == "Prompts" and images.value == 2
    assert [widget.value for widget in numbers] == [5, 9, 4, 10, 6000]
    assert all(widget.minimum <= widget.value <= widget.maximum for widget in (images, *numbers))
