"""Which model a calibration belongs to: what makes it another one, and what does not."""
from __future__ import annotations

import functools
import importlib
import types

import pytest
import torch

from comfy_host import comfy_sampling, pack


def identity() -> types.ModuleType:
    return importlib.import_module(f"{pack().__name__}.nodes.identity")


def weights(seed: int = 0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"diffusion_model.{k}.weight": torch.randn(24, 16, generator=generator) for k in range(4)}
    return {**made, "diffusion_model.norm.query_norm.scale": torch.ones(16), "diffusion_model.0.bias": torch.ones(24), **more}


def patcher(state: dict[str, torch.Tensor], backup: dict | None = None) -> types.SimpleNamespace:
    model = types.SimpleNamespace(model_config=object(), state_dict=lambda: state)
    return types.SimpleNamespace(model=model, backup=backup or {})


def fingerprint(state: dict[str, torch.Tensor], **how) -> str:
    return identity().fingerprint(patcher(state, **how))


def test_a_checkpoint_keeps_its_fingerprint_in_other_formats_and_in_other_versions_of_comfyui() -> None:
    known = fingerprint(weights())
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert fingerprint({name: value.to(dtype) for name, value in weights().items()}) == known
    newer = {name.replace("query_norm.scale", "query_norm.weight"): value for name, value in weights().items()}
    newer |= {"diffusion_model.0.weight_scale": torch.ones(24, 1), "diffusion_model.0.comfy_quant": torch.zeros(3, 3, dtype=torch.uint8)}
    assert fingerprint(newer) == known
    backup = {"diffusion_model.0.weight": types.SimpleNamespace(weight=weights()["diffusion_model.0.weight"])}
    patched = {**weights(), "diffusion_model.0.weight": torch.zeros(24, 16)}
    assert fingerprint(patched, backup=backup) == known != fingerprint(patched)


def test_other_weights_have_another_fingerprint_packed_ones_too() -> None:
    assert fingerprint(weights(1)) != fingerprint(weights())
    for dtype in (torch.uint8, torch.int8):
        packed = [fingerprint({"diffusion_model.0.weight": torch.randint(0, 256, (24, 16), generator=torch.Generator().manual_seed(seed))
                               .to(dtype)}) for seed in (0, 0, 1)]
        assert packed[0] == packed[1] != packed[2]


def test_weights_that_cannot_be_read_are_left_out() -> None:
    state = {**weights(), "diffusion_model.0.weight": torch.empty(24, 16, device="meta")}
    assert len(fingerprint(state)) == 12 and fingerprint(state) != fingerprint(weights())


def conditions(**cond) -> str:
    guider = types.SimpleNamespace(original_conds={"positive": [{"cross_attn": torch.linspace(-1, 1, 64).view(1, 8, 8), **cond}]})
    return identity().conditions(guider)


def hooks(strength: float, *frames: tuple[float, float]):
    comfy_sampling()
    import comfy.hooks
    hook, group = comfy.hooks.WeightHook(strength_model=strength), comfy.hooks.HookGroup()
    hook.weights = {"a": torch.ones(2, 2)}
    for frame in frames:
        hook.hook_keyframe.add(comfy.hooks.HookKeyframe(*frame))
    group.add(hook)
    return group


def control(strength: float, hint: float = 1.0, previous=None):
    comfy_sampling()
    import comfy.controlnet
    made = comfy.controlnet.ControlBase()
    made.set_cond_hint(torch.full((1, 3, 8, 8), hint), strength)
    made.previous_controlnet = previous
    return made


def net(seed: int):
    made = control(1.0)
    torch.manual_seed(seed)
    made.control_model = torch.nn.Linear(8, 8)
    return made


def seen(value: float):
    comfy_sampling()
    import comfy.clip_vision
    made = comfy.clip_vision.Output()
    made["last_hidden_state"], made["mm_projected"] = torch.tensor([[value, 1.0, -value]]), None
    return made


@pytest.mark.parametrize("one, other", [
    (dict(area=(16, 32, 0, 0)), dict(area=(16, 32, 0, 8))), (dict(strength=1.0), dict(strength=0.5)),
    (dict(mask=torch.zeros(1, 8, 8)), dict(mask=torch.ones(1, 8, 8))),
    (dict(hooks=lambda: hooks(0.2)), dict(hooks=lambda: hooks(1.0))),
    (dict(hooks=lambda: hooks(1.0)), dict(hooks=lambda: hooks(1.0, (0.5, 0.3)))),
    (dict(control=lambda: control(1.0)), dict(control=lambda: control(0.1))),
    (dict(control=lambda: control(1.0)), dict(control=lambda: control(1.0, 0.5))),
    (dict(control=lambda: control(1.0)), dict(control=lambda: control(1.0, previous=control(1.0)))),
    (dict(control=lambda: net(0)), dict(control=lambda: net(1))),
    (dict(clip_vision_output=lambda: seen(1.0)), dict(clip_vision_output=lambda: seen(-2.0))),
    (dict(region=torch.tensor([True, False])), dict(region=torch.tensor([False, True]))),
    (dict(small=torch.tensor([1.0, -1.0]).to(torch.float8_e4m3fn)), dict(small=torch.tensor([-1.0, 1.0]).to(torch.float8_e4m3fn)))],
    ids=["area", "strength", "mask", "hook", "keyframe", "control", "hint", "second control", "network", "clip vision", "bool", "float8"])
def test_two_prompts_are_told_apart_by_everything_that_conditions_them(one: dict, other: dict) -> None:
    a, b = ({name: make() if callable(make) else make for name, make in cond.items()} for cond in (one, other))
    assert conditions(**a) != conditions(**b) and conditions(**a) != conditions()
    again = {name: make() if callable(make) else make.clone() if isinstance(make, torch.Tensor) else make for name, make in one.items()}
    assert conditions(**a) == conditions(**again)


def test_a_prompt_is_the_same_in_half_precision_and_after_its_hooks_were_used() -> None:
    generator = torch.Generator().manual_seed(0)
    encoded = torch.randn(1, 8, 8, generator=generator)
    assert conditions(other=encoded) == conditions(other=encoded.half())
    used = hooks(1.0)
    before = conditions(hooks=used)
    used.hooks[0].need_weight_init = False
    assert conditions(hooks=used) == before


def test_what_wraps_the_model_is_named_unless_it_leaves_the_model_what_it_is() -> None:
    def painted(executor, *args):
        return 2 * executor(*args)

    def other(executor, *args):
        return executor(*args)

    def lines(**wrappers) -> list[str]:
        return identity()._functions(types.SimpleNamespace(object_patches={}, model_options={}, wrappers={
            "apply_model": {key.replace("_", ".") or None: [function] for key, function in wrappers.items()}}))

    assert lines() == lines(easycache=painted) == lines(torch_compile=painted) == []
    name = "test_what_wraps_the_model_is_named_unless_it_leaves_the_model_what_it_is."
    assert lines(other=painted) == lines(other=functools.partial(painted, 1)) == [f"{name}painted of test_identity"]
    assert lines(other=functools.partial(other)) == [f"{name}other of test_identity"]
    assert lines(other=[].append) == ["list.append of None"]  # of no module
    painted.__module__ = f"{pack().__name__}-extras.nodes"  # a sibling's
    assert lines(other=painted) == [f"{name}painted of nodes"]
    painted.__module__ = f"{pack().__name__}.nodes.x"
    assert lines(other=painted) == []


def test_a_guider_s_switches_make_it_another() -> None:
    class Dual:
        def __init__(self, nested: bool) -> None:
            self.cfg, self.nested = 3.0, nested

        def predict_noise(self) -> None:
            pass

    assert identity().guiding(Dual(True)) != identity().guiding(Dual(False))


def test_a_run_from_a_higher_level_begins_with_the_hooks_at_their_first_keyframes() -> None:
    calibration = importlib.import_module(f"{pack().__name__}.nodes.calibration")
    group, told = hooks(1.0, (0.0, 0.0), (0.5, 0.5), (1.0, 1.0)), []
    group.hooks[0].initialize_timesteps = lambda model: told.append("first")

    class Guider:
        conds = {"positive": [{"hooks": group}], "negative": [{}]}
        inner_model = None
        model_patcher = types.SimpleNamespace(clean_hooks=lambda: told.append("clean"))

        def __call__(self, x, sigma, model_options, seed):
            told.append(float(sigma[0]))
            return x

    run = calibration.Run(types.SimpleNamespace(inner_model=Guider()), None, None, {}, {})
    for sigma in (14.0, 14.0, 5.0, 1.0, 14.0, 5.0, 7.0):
        run.denoise(torch.zeros(2, 3), torch.full((2,), sigma))
    assert told == [14.0, 14.0, 5.0, 1.0, "clean", "first", 14.0, 5.0, "clean", "first", 7.0]
    Guider.conds = {"positive": [{}]}
    told.clear()
    run.denoise(torch.zeros(2, 3), torch.full((2,), 20.0))
    assert told == [20.0]
