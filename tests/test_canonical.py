"""What `auto` measures at: nobody's prompt, so that a run does not depend on which one came first."""
from __future__ import annotations

import pytest
import torch

from comfy_models import Network, guider, in_a_run, listed, model, part, prompt, sampled
from test_measuring import folder  # noqa: F401  (the fixture)

MEASURED = ["lambda_v3", "lambda_fitted", "lambda_amed", "lambda_amed_2m"]
GHOST, PANDA = 0.3, -0.4


def run_of(name: str, words: float, network: Network | None = None, cfg: float = 7.0, **more) -> torch.Tensor:
    made = guider(model(network or Network()), prompt(words, **more), prompt(0.0), cfg)
    return sampled(made, listed(name), steps=4)


@pytest.mark.parametrize("name", MEASURED)
def test_a_run_is_the_same_whatever_was_measured_before(folder, name: str) -> None:  # noqa: F811
    alone = run_of(name, PANDA)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    ghost = run_of(name, GHOST)
    again = run_of(name, PANDA, network := Network())
    assert torch.equal(again, alone) and not torch.equal(again, ghost)
    # what "ghost" measured serves
    assert len(network.calls) <= 7 and len(list(folder.glob("*.safetensors"))) == 1


def test_near_guidances_are_measured_at_one_that_does_not_depend_on_the_first(folder) -> None:  # noqa: F811
    guidance = part("hosting.canonical").guidance
    assert [guidance(scale)
            for scale in (1.0, 1.1, 1.3, 3.2, 7.0, 7.4, 7.6, 11.1)] == [1, 1, 1.25, 3, 7, 7, 8, 12]
    assert all(guidance(guidance(scale / 7)) == guidance(scale / 7) for scale in range(300))
    alone = run_of("lambda_v3", PANDA, cfg=7.6)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    run_of("lambda_v3", PANDA, cfg=7.4)
    assert torch.equal(run_of("lambda_v3", PANDA, cfg=7.6), alone)
    assert {path.stem.rpartition("-")[2] for path in folder.glob("*.safetensors")} == {"cfg7", "cfg8"}


def test_the_model_is_asked_at_nobody_s_prompt_and_the_guider_is_as_it_was() -> None:
    network = Network()
    made = guider(model(network), prompt(PANDA, pooled_output=torch.full((1, 8), PANDA)), prompt(0.1), 7.4)
    canonical = part("nodes.nobody")

    def use(run) -> tuple:
        before = run.guider.conds, run.guider.cfg
        with canonical.conditions(run):
            run.denoise(torch.zeros(1, *run.x.shape[1:]), torch.ones(1))
            assert run.guider.cfg == 7.0
            asked = run.guider.conds
        assert (run.guider.conds, run.guider.cfg) == before
        with pytest.raises(KeyboardInterrupt), canonical.conditions(run):
            raise KeyboardInterrupt
        assert (run.guider.conds, run.guider.cfg) == before
        return asked

    asked = in_a_run(made, use)
    [positive], [negative] = asked["positive"], asked["negative"]
    assert negative["cross_attn"].abs().max() == 0.0 and positive["cross_attn"].std() > 0.1
    assert positive["pooled_output"].shape == (1, 8) and positive["pooled_output"].std() > 0.1
    values = [value for call in network.calls for value in call.context]
    assert PANDA not in [round(value, 3) for value in values] and 0.0 in values


def test_a_model_that_asks_for_more_than_a_text_is_refused_with_the_remedy(monkeypatch) -> None:
    made = guider(model(Network()), prompt(PANDA), prompt(0.0), 7.0)

    def use(run) -> None:
        def lacking(**told):
            raise KeyError("lyrics")

        monkeypatch.setattr(run.guider.inner_model, "extra_conds", lacking)
        before = run.guider.conds, run.guider.cfg
        with pytest.raises(ValueError,
                           match="KeyError: 'lyrics'.*every prompt"), part("nodes.nobody").conditions(run):
            pass
        assert (run.guider.conds, run.guider.cfg) == before

    in_a_run(made, use)


def test_what_every_prompt_measures_is_that_prompt_s_own(folder) -> None:  # noqa: F811
    library, kinds = part("hosting.library"), part("hosting.kinds")
    found = {}
    for words in (GHOST, PANDA):
        for how in ("auto", "every prompt"):
            network = Network()
            made = guider(model(network), prompt(words), prompt(0.0), 7.0)
            options = {"order": 2}
            found[words, how] = in_a_run(
                made, lambda run: library.calibration_for(
                    kinds.STATISTICS_KIND,
                    part("nodes.guided_run").Run(run.model, run.x, run.sigmas, run.extra_args, options), None,
                    how))[1]
    assert (found[GHOST, "auto"].l == found[PANDA, "auto"].l).all()
    assert (found[GHOST, "every prompt"].l != found[PANDA, "every prompt"].l).any()
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_a_text_of_nearly_the_same_size_is_taken_for_the_same() -> None:
    text = part("hosting.canonical").Text
    spoken = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([spoken, torch.zeros(1, 179, 16)], 1)
    assert text.like(spoken, False) == text((1, 77, 16), 1.0) == text.like(1.2 * spoken, False)
    # tokens of zeros say nothing of the size
    assert text.like(padded, False) == text((1, 256, 16), 1.0)
    for several in (2, 3):  # as many times 77 tokens
        assert text.like(spoken.repeat(1, several, 1), False).shape == (1, 77, 16)
    assert text.like(9.0 * spoken, False).scale == 8.0 and text.like(spoken[:, 0], False).shape == (1, 16)
    assert text.like(spoken, True).scale == 0.0 and text.like(0.0 * spoken, False).made(0).abs().max() == 0.0
    assert text.like(spoken, False).made(1).std() == pytest.approx(1.0, abs=0.1)


def test_no_prompt_makes_the_model_be_measured_again_for_what_was_measured(folder) -> None:  # noqa: F811
    def calls(*pooled: torch.Tensor) -> list[int]:
        networks = [Network() for _ in pooled]
        for network, of in zip(networks, pooled):
            run_of("lambda_v3", PANDA, network, pooled_output=of)
        return [len(network.calls) for network in networks]

    quiet, loud, wide = torch.full((1, 8), 0.3), torch.full((1, 8), 9.0), torch.full((1, 16), 0.3)
    first, *others = calls(quiet, loud, quiet)
    assert first > 10 and set(others) == {4}
    # a text of another shape is measured by itself; that this model does not see it takes no file away
    first, *others = calls(wide, quiet, wide)
    assert first > 10 and set(others) == {4}
