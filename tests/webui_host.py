"""As much of Stable Diffusion WebUI as the pack knows, doubled, and the pack loaded as the WebUI loads it.

What a double does not have the pack does not use. Where the doubles and the WebUI differ, the end-to-end test
of tests/test_webui.py finds it, which runs a real one.
"""
from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from collections import namedtuple
from contextlib import nullcontext
from typing import Any

import torch

import environment
from problems import Gaussian

PACK = "lambda_solvers_pack"
SCRIPT = environment.ROOT / "scripts" / "lambda_solvers.py"
PLOT = "xyz_grid.py"


class InterruptedException(BaseException):
    pass


class SamplerData(namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])):
    def total_steps(self, steps: int) -> int:
        return 2 * steps if self.options.get("second_order") else steps


class Denoiser:
    """CFGDenoiser: it takes no argument that it does not know, counts, and is where an interruption shows."""

    def __init__(self, host: Host, sampler: Any) -> None:
        self.host, self.sampler, self.step, self.asked = host, sampler, 0, 0
        self.mask, self.told = host.mask, []

    def __call__(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if self.host.state.interrupted or self.asked == self.host.interrupt_at:
            self.host.state.interrupted = True
            raise InterruptedException
        assert len(x) == len(cond.batch) == len(cond.batch if uncond is None else uncond)
        self.told.append((value(cond.batch[0][0].schedules, self.step), cond_scale, self.step))
        self.step, self.asked = self.step + 1, self.asked + 1
        torch.rand(1)  # as a mask does
        self.host.called()
        other = 0.0 if cond_scale == 1.0 else value(uncond[0], self.step)
        denoised = self.host.denoised(x, sigma, cond_scale * self.told[-1][0] + (1 - cond_scale) * other)
        self.sampler.last_latent = self.host.state.current_latent = denoised
        return denoised


def value(schedule: list, step: int) -> float:
    """What a prompt says at a step: the mean of its condition."""
    return float(next((entry for entry in schedule if step <= entry.end_at_step), schedule[0]).cond.mean())


class KDiffusionSampler:
    """Calls a function with what it knows under the names of its arguments."""

    def __init__(self, funcname: Any, sd_model: Any, options: Any = None) -> None:
        self.func, self.config, self.p, self.last_latent = funcname, None, None, None
        self.host = sd_model
        self.model_wrap_cfg = Denoiser(sd_model, self)
        self.model_wrap = types.SimpleNamespace(
            sigmas=sd_model.sigmas, inner_model=sd_model,
            predictor=types.SimpleNamespace(
                prediction_type="const" if sd_model.path == "flow" else "epsilon"))

    def callback_state(self, told: dict) -> None:
        self.host.state.sampling_step = told["i"]

    def sample(self, p: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        self.p, self.last_latent = p, x
        known = {"sigmas": sigmas, "eta": 0.123, "n": len(sigmas) - 1, "sigma_min": 0.03}
        asked = {name: known[name] for name in inspect.signature(self.func).parameters if name in known}
        extra = {"cond": p.cond, "image_cond": None, "uncond": p.uncond, "cond_scale": p.cfg_scale,
                 "s_min_uncond": 0.0}
        try:
            return self.func(self.model_wrap_cfg, x * sigmas[0], extra_args=extra, disable=True,
                             callback=self.callback_state, **asked)
        except InterruptedException:
            return self.last_latent


Scheduler = namedtuple("Scheduler", ["name", "label", "function", "default_rho", "need_inner_model",
                                     "aliases"], defaults=[-1, False, None])


class Multicond:
    def __init__(self, shape: tuple, batch: list) -> None:
        self.shape, self.batch = shape, batch


class Composable:
    def __init__(self, schedules: list, weight: float = 1.0) -> None:
        self.schedules, self.weight = schedules, weight


Entry = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])


def prompt(*values: float, until: int = 2) -> list[Entry]:
    """A condition with this mean; several: one up to a step, and the next from there."""
    spread = torch.linspace(-1, 1, 32).view(4, 8)
    return [Entry(until if k + 1 < len(values) else 100, spread + mean) for k, mean in enumerate(values)]


class OptionInfo:
    def __init__(self, default: Any = None, label: str = "", component: Any = None,
                 component_args: Any = None, section: Any = None) -> None:
        self.default = default

    def info(self, text: str) -> OptionInfo:
        return self


class Widget(nullcontext):
    def __init__(self, *args: Any, **said: Any) -> None:
        super().__init__()
        self.__dict__.update(said)


class Script:
    def elem_id(self, name: str) -> str:
        return f"script_{name}"


class Host:
    """A WebUI: its modules, and a job in it."""

    def __init__(self, monkeypatch: Any, path: str = "ve", schedule_types: bool = True,
                 models: Any = "models") -> None:
        self.path = path
        self.sigmas = torch.linspace(0.001, 1.0, 1000) if path == "flow" else torch.logspace(-1.5, 1.16, 1000)
        self.state = types.SimpleNamespace(interrupted=False, skipped=False, sampling_step=0,
                                           current_latent=None, textinfo=None)
        self.opts = types.SimpleNamespace(add_option=lambda name, option: setattr(
            self.opts, name, option.default))
        self.models = models
        self.nonlinear, self.mask = False, None
        self.called: Any = lambda: None
        self.interrupt_at: int | None = None
        self.callbacks: list[Any] = []
        self.theirs = SamplerData("Euler", lambda model: KDiffusionSampler(None, model), ["k_euler"], {})
        self.set = 0
        for name in [name for name in sys.modules if name.split(".")[0] in ("modules", PACK, "gradio")]:
            monkeypatch.delitem(sys.modules, name)
        self._install(monkeypatch, schedule_types)
        self.monkeypatch = monkeypatch

    def _install(self, monkeypatch: Any, schedule_types: bool) -> None:
        schedulers = [Scheduler("automatic", "Automatic", None), Scheduler("karras", "Karras", None),
                      Scheduler("ddim", "DDIM", None)]
        axis = namedtuple("AxisOption", ["label", "type", "apply", "choices"])
        self.plot = types.SimpleNamespace(axis_options=[axis("Seed", int, None, None)], AxisOption=axis)
        found = types.SimpleNamespace(script_class=type("Script", (), {"__module__": PLOT}), module=self.plot)

        @functools.cache
        def get_sampler_and_scheduler(sampler: str, scheduler: str) -> tuple[str, str]:
            return (sampler if sampler in self.samplers.all_samplers_map else "Euler"), scheduler

        def set_samplers() -> None:
            self.set += 1

        content = {
            "sd_samplers": {"all_samplers": [self.theirs], "all_samplers_map": {"Euler": self.theirs},
                            "set_samplers": set_samplers,
                            "get_sampler_and_scheduler": get_sampler_and_scheduler},
            "sd_samplers_common": {"SamplerData": SamplerData, "InterruptedException": InterruptedException},
            "sd_samplers_kdiffusion": {"KDiffusionSampler": KDiffusionSampler},
            "script_callbacks": {"on_before_ui": self.callbacks.append,
                                 "on_ui_settings": lambda add: add()},
            "prompt_parser": {"MulticondLearnedConditioning": Multicond,
                              "ComposableScheduledPromptConditioning": Composable},
            "shared": {"opts": self.opts, "state": self.state, "OptionInfo": OptionInfo, "sd_model": self},
            "extra_networks": {"parse_prompts": lambda prompts: (prompts, {})},
            "processing": {"process_images": lambda p: p},
            "paths": {"models_path": self.models}, "devices": {"dtype_unet": torch.float32},
            "scripts": {"Script": Script, "AlwaysVisible": object(), "scripts_data": [found]},
            **({"sd_schedulers": {"schedulers": schedulers, "Scheduler": Scheduler, "schedulers_map": {
                kind.label: kind for kind in schedulers}}} if schedule_types else {}),
        }
        modules = types.ModuleType("modules")
        modules.__path__ = []
        monkeypatch.setitem(sys.modules, "modules", modules)
        for name, entries in content.items():
            module = types.ModuleType(f"modules.{name}")
            vars(module).update(entries)
            setattr(modules, name, module)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        gradio = types.ModuleType("gradio")
        gradio.Accordion = gradio.Radio = gradio.Slider = gradio.Textbox = gradio.Markdown = Widget
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        self.samplers, self.schedulers = modules.sd_samplers, schedulers

    def load(self) -> types.ModuleType:
        """The pack's script, as the WebUI imports it: by path, each time anew."""
        spec = importlib.util.spec_from_file_location(SCRIPT.name, SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    sd_model_hash, is_sdxl = "0123456789", False

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, mean: float) -> torch.Tensor:
        """Data in closed form, or near two values, whose trajectories bend."""
        if not self.nonlinear:
            return Gaussian(self.path, mean=mean)(x, sigma)
        s = sigma.view(-1, 1, 1, 1)
        return mean + torch.tanh((x - mean) / (s.square() + 0.3))

    def part(self, name: str) -> types.ModuleType:
        return sys.modules[f"{PACK}.{name}"]

    def job(self, batch: int = 1, seed: int = 11, iteration: int = 0, **more: Any) -> Any:
        """A job, StableDiffusionProcessing."""
        said = {"all_seeds": [seed + k for k in range(batch * (iteration + 1))], "batch_size": batch,
                "iteration": iteration, "cfg_scale": 2.0, "extra_generation_params": {},
                "extra_network_data": {},
                "cond": Multicond((batch,), [[Composable(prompt(0.5))] for _ in range(batch)]),
                "uncond": [prompt(-0.1) for _ in range(batch)]}
        comments: list[str] = []
        return types.SimpleNamespace(**{**said, **more}, comments=comments, comment=comments.append)

    def run(self, name: str, p: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """A job with a sampler of the list."""
        self.config = self.samplers.all_samplers_map[name]
        self.sampler = self.config.constructor(self)
        self.sampler.config = self.config
        return self.sampler.sample(p, x, sigmas)
