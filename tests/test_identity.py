"""Which model a calibration belongs to: what makes it another one, and what does not."""
from __future__ import annotations

import functools
import importlib
import types

import pytest
import torch

from comfy_host import comfy_sampling, pack
from comfy_models import IMAGE, Network, guider, model, prompt, sampled


def identity() -> types.ModuleType:
    return importlib.import_module(f"{pack().__name__}.nodes.identity")


def weights(seed: int = 0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"diffusion_model.{k}.weight": torch.randn(24, 16, generator=generator) for k in range(4)}
    return {
        **made, "diffusion_model.norm.query_norm.scale": torch.ones(16),
        "diffusion_model.0.bias": torch.ones(24), **more
    }


class Held(torch.nn.Module):
    """A model that holds these tensors, and whose state_dict may be another."""

    model_config = object()

    def __init__(self, state: dict[str, torch.Tensor], buffers: bool = False) -> None:
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            place = self
            for word in path:
                if word not in place._modules:
                    place.add_module(word, torch.nn.Module())
                place = place._modules[word]
            if buffers:
                place.register_buffer(last, value)
            else:
                place.register_parameter(last, parameter(value))


def parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)


def fingerprint(state: dict[str, torch.Tensor], backup: dict | None = None, buffers: bool = False) -> str:
    made = types.SimpleNamespace(model=Held(state, buffers), backup=backup or {}, hook_backup={})
    return identity().fingerprint(made)


def test_a_checkpoint_keeps_its_fingerprint_in_other_formats_and_in_other_versions_of_comfyui() -> None:
    known = fingerprint(weights())
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert fingerprint({name: value.to(dtype) for name, value in weights().items()}) == known
    newer = {
        name.replace("query_norm.scale", "query_norm.weight"): value for name, value in weights().items()
    }
    newer |= {
        "diffusion_model.0.weight_scale": torch.ones(24, 1),
        "diffusion_model.0.comfy_quant": torch.zeros(3, 3, dtype=torch.uint8)
    }
    assert fingerprint(newer) == fingerprint(weights(), buffers=True) == known
    backup = {"diffusion_model.0.weight": types.SimpleNamespace(weight=weights()["diffusion_model.0.weight"])}
    patched = {**weights(), "diffusion_model.0.weight": torch.zeros(24, 16)}
    assert fingerprint(patched, backup=backup) == known != fingerprint(patched)


def quantised(value: torch.Tensor) -> torch.Tensor:
    """A weight as ComfyUI's own float8 checkpoints hold it: scaled, in its QuantizedTensor."""
    comfy_sampling()
    from comfy.quant_ops import QuantizedTensor
    scale = value.abs().max() / 448
    return QuantizedTensor((value / scale).to(torch.float8_e4m3fn), "TensorCoreFP8Layout",
                           {"scale": scale, "orig_dtype": torch.float32})


def test_a_checkpoint_in_comfyui_s_quantised_tensors_keeps_its_fingerprint() -> None:
    packed, other = ({
        name: quantised(value) if value.ndim > 1 else value for name, value in weights(seed).items()
    } for seed in (0, 1))
    assert fingerprint(packed) == fingerprint(weights()) != fingerprint(other)


class GGMLTensor(torch.Tensor):
    """As ComfyUI-GGUF has it: packed bytes, under the shape of what they stand for, that cannot be
    detached."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor, tensor_shape: torch.Size):
        return packed.as_subclass(cls)

    def __init__(self, packed: torch.Tensor, tensor_shape: torch.Size) -> None:
        self.tensor_shape = tensor_shape

    def detach(self):
        return self

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())


class OfGGUF(Held):
    """A model of ComfyUI-GGUF: its state_dict is made up, for what it will take in memory."""

    def state_dict(self, *args, **kwargs):
        made = {name: torch.zeros_like(torch.Tensor(value), device="meta")
                for name, value in super().state_dict(*args, **kwargs).items()}
        return {**made, "diffusion_model.0.temp.weight": torch.empty(24, 16, device="meta")}


def gguf(seed: int, small: float = 0.0) -> str:
    """Q8_0: for every 32 weights a float16 scale and 32 bytes."""
    def packed(value: torch.Tensor) -> torch.Tensor:
        rows = value.reshape(-1, 32)
        scale = rows.abs().amax(1, keepdim=True) / 127
        quants = (rows / scale).round().to(torch.int8)
        scales = scale.half().view(torch.uint8).view(-1, 2)
        return GGMLTensor(torch.cat([scales, quants.view(torch.uint8)], 1), value.shape)

    state = {name: packed(value + small * value.roll(1, 0)) if value.ndim > 1 else value
             for name, value in weights(seed).items()}
    return identity().fingerprint(types.SimpleNamespace(model=OfGGUF(state), backup={}, hook_backup={}))


def test_two_checkpoints_of_gguf_have_fingerprints_of_their_own() -> None:
    assert gguf(0) == gguf(0) != gguf(1)
    assert gguf(0) != gguf(0, small=0.05)  # a fine-tune


def test_other_weights_have_another_fingerprint_packed_ones_too() -> None:
    assert fingerprint(weights(1)) != fingerprint(weights())
    for dtype in (torch.uint8, torch.int8):
        packed = [
            fingerprint({
                "diffusion_model.0.weight": torch.randint(
                    0, 256, (24, 16), generator=torch.Generator().manual_seed(seed)).to(dtype)
            }) for seed in (0, 0, 1)
        ]
        assert packed[0] == packed[1] != packed[2]


def test_weights_that_cannot_be_read_are_left_out() -> None:
    state = {**weights(), "diffusion_model.0.weight": torch.empty(24, 16, device="meta")}
    assert len(fingerprint(state)) == 12 and fingerprint(state) != fingerprint(weights())


def conditions(**cond) -> str:
    told = [[torch.linspace(-1, 1, 64).view(1, 8, 8), cond]]
    return identity().conditions(guider(model(Network()), told, []))


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


@pytest.mark.parametrize(
    "one, other",
    [(dict(area=(16, 32, 0, 0)), dict(area=(16, 32, 0, 8))), (dict(strength=1.0), dict(strength=0.5)),
     (dict(mask=torch.zeros(1, 8, 8)), dict(mask=torch.ones(1, 8, 8))),
     (dict(hooks=lambda: hooks(0.2)), dict(hooks=lambda: hooks(1.0))),
     (dict(hooks=lambda: hooks(1.0)), dict(hooks=lambda: hooks(1.0, (0.5, 0.3)))),
     (dict(control=lambda: control(1.0)), dict(control=lambda: control(0.1))),
     (dict(control=lambda: control(1.0)), dict(control=lambda: control(1.0, 0.5))),
     (dict(control=lambda: control(1.0)), dict(control=lambda: control(1.0, previous=control(1.0)))),
     (dict(control=lambda: net(0)), dict(control=lambda: net(1))),
     (dict(clip_vision_output=lambda: seen(1.0)), dict(clip_vision_output=lambda: seen(-2.0))),
     (dict(region=torch.tensor([True, False])), dict(region=torch.tensor([False, True]))),
     (dict(small=torch.tensor([1.0, -1.0]).to(torch.float8_e4m3fn)),
      dict(small=torch.tensor([-1.0, 1.0]).to(torch.float8_e4m3fn)))], ids=[
          "area", "strength", "mask", "hook", "keyframe", "control", "hint", "second control", "network",
          "clip vision", "bool", "float8"
      ])
def test_two_prompts_are_told_apart_by_everything_that_conditions_them(one: dict, other: dict) -> None:
    a, b = ({name: make() if callable(make) else make for name, make in cond.items()}
            for cond in (one, other))
    assert conditions(**a) != conditions(**b) and conditions(**a) != conditions()
    again = {
        name: make() if callable(make) else make.clone() if isinstance(make, torch.Tensor) else make
        for name, make in one.items()
    }
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
        return identity().changed(
            types.SimpleNamespace(
                object_patches={}, model_options={}, wrappers={
                    "apply_model": {
                        key.replace("_", ".") or None: [function] for key, function in wrappers.items()
                    }
                }))

    assert lines() == lines(easycache=painted) == lines(torch_compile=painted) == []
    name = "test_what_wraps_the_model_is_named_unless_it_leaves_the_model_what_it_is."
    assert lines(other=painted) == lines(
        other=functools.partial(painted, 1)) == [f"{name}painted of test_identity"]
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


def described(positive: list, negative: list | None, cfg: float, kind: str = "CFGGuider") -> dict:
    """What a guider of ComfyUI's samples, or the manual nodes' own."""
    patcher = model(Network())
    if kind == "measured":
        measuring = importlib.import_module(f"{pack().__name__}.nodes.guided_run")
        latent = {"samples": torch.zeros(1, *IMAGE)}
        return measuring.measured(patcher, [positive], negative, cfg, latent, 0, None,
                                    lambda run: identity().description(run.guider))
    if kind == "BasicGuider":
        from comfy_extras.nodes_custom_sampler import BasicGuider
        return identity().description(BasicGuider.execute(patcher, positive).args[0])
    return identity().description(guider(patcher, positive, negative, cfg))


def test_at_guidance_1_the_negative_prompt_does_not_matter_and_every_guider_agrees() -> None:
    known = described(prompt(0.3), prompt(0.0), 1.0)
    assert known == described(prompt(0.3), prompt(9.0), 1.0)
    assert known == described(prompt(0.3), None, 1.0, "BasicGuider")
    assert known == described(prompt(0.3), prompt(0.0), 1.0, "measured")
    assert known["conditions"] != described(prompt(9.0), prompt(0.0), 1.0)["conditions"]
    three = described(prompt(0.3), prompt(0.0), 3.0)
    assert three == described(prompt(0.3), prompt(0.0), 3.0, "measured")
    assert three["conditions"] != known["conditions"]
    assert three["conditions"] != described(prompt(0.3), prompt(9.0), 3.0)["conditions"]
    whole = guider(model(Network()), prompt(0.3), prompt(0.0), 1.0)
    whole.model_options["disable_cfg1_optimization"] = True  # ComfyUI evaluates it all the same
    assert identity().description(whole)["conditions"] == three["conditions"]


def library() -> types.ModuleType:
    return importlib.import_module(f"{pack().__name__}.hosting.library")


def faults(made: dict, wanted: dict) -> list[str]:
    return library().faults(made, wanted)


def found(made: dict, wanted: dict, folder) -> bool:
    """Whether a calibration of one description is taken for the other."""
    import json
    import folder_paths
    import numpy as np
    samplers = importlib.import_module(f"{pack().__name__}.samplers")
    kept = folder_paths.folder_names_and_paths["solver_calibrations"]
    folder_paths.folder_names_and_paths["solver_calibrations"] = ([str(folder)], {".safetensors"})
    try:
        flat = np.zeros(5)
        statistics = samplers.Statistics(np.arange(5.0), flat + 1, flat, flat,
                                         about=json.loads(json.dumps(made)))
        statistics.save(folder / "a.safetensors", overwrite=True)
        folder_paths.filename_list_cache.pop("solver_calibrations", None)
        kind = types.SimpleNamespace(type=samplers.Statistics, serves=lambda *run: 1,
                                     suited=lambda found, conditions: found)
        return library().choice(kind, wanted, "saved only", {}, "ve", []) is not None
    finally:
        folder_paths.folder_names_and_paths["solver_calibrations"] = kept


def flux(scale: float | None = 3.5, **more) -> dict:
    return described(prompt(0.3, guidance=scale, **more), prompt(0.0), 1.0)


@pytest.mark.parametrize("one, other, same", [
    (flux, flux, True), (flux, lambda: flux(3.6), True), (flux, lambda: flux(10.0), False),
    (flux, lambda: flux(None), False), (lambda: flux(None), lambda: flux(None), True),
    (flux, lambda: described(prompt(0.3), prompt(0.0), 1.0), False)],
    ids=["same", "near", "far", "disabled", "both disabled", "none told"])
def test_the_scale_that_a_distilled_model_is_told_goes_with_the_guidance(tmp_path, one, other, same) -> None:
    one, other = one(), other()
    assert found(one, other, tmp_path) is same and (not faults(one, other)) is same
    assert one["conditions"] == other["conditions"]  # the prompt is the same
    if not same:
        [fault] = faults(one, other)
        assert "measured for distilled guidance" in fault


def test_two_files_of_two_distilled_scales_have_names_that_say_them() -> None:
    kind = importlib.import_module(f"{pack().__name__}.hosting.kinds").STATISTICS_KIND
    assert "-cfg1-guidance3.5-" in library().file_name(kind, flux())
    assert "guidance" not in library().file_name(kind, flux(None))


def patched(*loras: tuple[int, float, range]) -> dict:
    """A model with LoRAs: (which, strength, the weights it changes)."""
    comfy_sampling()
    import comfy.weight_adapter
    network = Network()
    for k in range(24):
        weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(k))
        network.register_parameter(f"more{k}", parameter(weight))
    patcher = model(network)
    for which, strength, places in loras:
        generator = torch.Generator().manual_seed(which)
        content = {}
        for k in places:
            up, down = torch.randn(24, 2, generator=generator), torch.randn(2, 16, generator=generator)
            adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 1.0, None, None, None))
            content[f"diffusion_model.more{k}"] = adapter
        assert len(patcher.add_patches(content, strength)) == len(content)
    return identity().description(guider(patcher, prompt(0.3), prompt(0.0)))


def test_a_lora_that_bypasses_the_weights_makes_it_another_model() -> None:
    """As ComfyUI's does, by an injection that holds its tensors and its strength."""
    def lines(seed: int, strength: float) -> list[str]:
        patcher, generator = model(Network()), torch.Generator().manual_seed(seed)
        from comfy.model_patcher import PatcherInjection

        class Manager:
            def __init__(self) -> None:
                adapter = types.SimpleNamespace(weights=(torch.randn(8, 2, generator=generator), None))
                self.adapters, self.hooks = {"diffusion_model.0.weight": (adapter, strength)}, []

            def injection(self) -> PatcherInjection:
                return PatcherInjection(inject=lambda patcher: self.hooks.append(1), eject=lambda patcher: 0)

        patcher.set_injections("bypass_lora", [Manager().injection()])
        return identity().patches(patcher)

    assert identity().patches(model(Network())) == []
    assert lines(0, 1.0) == lines(0, 1.0) and lines(0, 1.0)[0].startswith("injected bypass_lora (")
    assert len({*map(tuple, (lines(0, 1.0), lines(1, 1.0), lines(0, 0.5)))}) == 3


@pytest.mark.parametrize("lora, left", [(0.0, -1.0), (0.4, -1.8)])
def test_the_fingerprint_is_the_checkpoint_s_while_loras_and_hooks_have_patched_its_weights(lora,
                                                                                            left) -> None:
    network, seen = Network(), []
    patcher = model(network)
    group = hooks(1.0)
    group.hooks[0].weights = {"diffusion_model.weight": ("diff", (-2 * network.weight.clone(),))}
    group.hooks[0].need_weight_init = False
    if lora:
        patcher.add_patches({"diffusion_model.weight": ("diff", (-2 * network.weight.clone(),))}, lora)
    plain = identity().fingerprint(patcher)

    def function(run_model, x, *args, **more):
        run_model(x, x.new_ones(len(x)), **more["extra_args"])
        seen.append((identity().fingerprint(patcher), float(network.weight[0, 0])))
        return x

    weight = float(network.weight[0, 0])
    sampled(guider(patcher, prompt(0.3, hooks=group), prompt(0.0), 1.0), function)
    assert seen[0][0] == plain and seen[0][1] == pytest.approx(left * weight, rel=1e-4)


ALL, FEW, MORE = range(24), range(6), range(6, 24)


@pytest.mark.parametrize(
    "one, other, same", [([(1, 0.8, ALL)], [(1, 0.8, ALL)], True), ([(1, 0.8, ALL)], [(1, 0.81, ALL)], True),
                         ([(1, 0.8, ALL)], [(1, 0.5, ALL)], False), ([(1, 0.8, ALL)], [(2, 0.8, ALL)], False),
                         ([(1, 0.8, ALL)], [], False), ([(1, 0.8, ALL)], [(1, -0.8, ALL)], False),
                         ([(1, 0.8, ALL), (2, 0.8, ALL)], [(1, 0.8, ALL), (2, 0.82, ALL)], True),
                         ([(1, 0.8, FEW), (2, 0.8, MORE)], [(1, 0.8, FEW), (2, 0.82, MORE)], True),
                         ([(1, 0.8, FEW), (2, 0.8, MORE)], [(1, 0.8, FEW), (2, 0.3, MORE)], False),
                         ([(1, 1.0, ALL), (2, 0.2, ALL)], [(1, 0.2, ALL), (2, 1.0, ALL)], False)], ids=[
                             "same", "near", "far", "another", "none", "against", "one of two",
                             "on other weights", "one of two far", "exchanged"
                         ])
def test_loras_of_near_strengths_share_a_calibration(tmp_path, one: list, other: list, same: bool) -> None:
    one, other = patched(*one), patched(*other)
    assert found(one, other, tmp_path) is same and (not faults(one, other)) is same
    assert one["fingerprint"] == other["fingerprint"]


def test_a_strength_that_does_not_fit_is_told_with_both() -> None:
    [fault] = faults(patched((1, 0.8, ALL)), patched((1, 0.5, ALL)))
    assert fault == "measured with patches at strength 0.8, and here it is 0.5"


@pytest.mark.parametrize("odd", ["3", None, [3.0, "x"], {"a": 1}])
def test_a_file_whose_numbers_are_none_is_not_taken(odd) -> None:
    wanted = {"strengths": [0.8, 0.8], "guidance": 3.0, "distilled": [3.5]}
    assert all(library().alike(key, wanted, wanted) for key in wanted)
    assert not any(library().alike(key, {key: odd}, wanted) for key in wanted)


def test_a_run_from_a_higher_level_begins_with_the_hooks_at_their_first_keyframes() -> None:
    measuring = importlib.import_module(f"{pack().__name__}.nodes.guided_run")
    group, told = hooks(1.0, (0.0, 0.0), (0.5, 0.5), (1.0, 1.0)), []
    group.hooks[0].initialize_timesteps = lambda model: told.append("first")

    class Guider:
        conds = {"positive": [{"hooks": group}], "negative": [{}]}
        inner_model = None
        model_patcher = types.SimpleNamespace(clean_hooks=lambda: told.append("clean"))

        def __call__(self, x, sigma, model_options, seed):
            told.append(float(sigma[0]))
            return x

    wrapped, schedule = types.SimpleNamespace(inner_model=Guider()), torch.tensor([14.0, 0.0])
    run = measuring.Run(wrapped, torch.zeros(2, 3), schedule, {}, {})
    for sigma in (14.0, 14.0, 5.0, 1.0, 14.0, 5.0, 7.0):
        run.denoise(torch.zeros(2, 3), torch.full((2,), sigma))
    assert told == [14.0, 14.0, 5.0, 1.0, "clean", "first", 14.0, 5.0, "clean", "first", 7.0]
    Guider.conds = {"positive": [{}]}
    told.clear()
    run.denoise(torch.zeros(2, 3), torch.full((2,), 20.0))
    assert told == [20.0]
