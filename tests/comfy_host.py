"""ComfyUI's own modules in this process, on the CPU, and the pack loaded the way ComfyUI loads it."""
from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
import types
from typing import Any

import environment

ROOT = environment.ROOT


@functools.cache
def comfy_sampling() -> types.ModuleType:
    """comfy.k_diffusion.sampling."""
    sys.path.insert(0, str(environment.ensure().comfyui))
    import utils.install_util  # noqa: F401  (before ComfyUI's nodes.py puts another `utils` in front of it)
    import comfy.cli_args
    comfy.cli_args.args.cpu = True
    from comfy.k_diffusion import sampling
    return sampling


@functools.cache
def pack() -> types.ModuleType:
    """The pack as ComfyUI's load_custom_node imports it: by path, under a name of its own."""
    comfy_sampling()
    import nodes
    for name in ("nodes_custom_sampler", "nodes_align_your_steps"):
        asyncio.run(
            nodes.load_custom_node(str(environment.ensure().comfyui / "comfy_extras" / f"{name}.py"),
                                   module_parent="comfy_extras"))
    spec = importlib.util.spec_from_file_location("custom_nodes_x_lambda-solvers", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def k_diffusion_sampling() -> types.ModuleType:
    """k_diffusion.sampling, without the rest of that package: its __init__ needs a setuptools that torch
    refuses."""
    spec = importlib.util.find_spec("k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def sampling_of(*classes: str, **attributes: Any) -> Any:
    """A model_sampling object of ComfyUI's classes of these names, or of new classes where it has none."""
    comfy_sampling()
    import comfy.model_sampling
    bases = [getattr(comfy.model_sampling, name, None) or type(name, (), {}) for name in classes]
    if not any(hasattr(base, "sigma_max") for base in bases):
        ends = (1.0, 0.003) if "CONST" in classes else (14.6, 0.03)
        attributes = {**dict(zip(("sigma_max", "sigma_min"), ends)), **attributes}
    return type("ModelSampling", tuple(bases), {"sigma_data": 1.0, **attributes})()


class Model:
    """What ComfyUI hands to a sampler function, around any denoiser."""

    def __init__(self, denoiser, model_sampling) -> None:
        self.denoiser = denoiser
        self.inner_model = types.SimpleNamespace(
            inner_model=types.SimpleNamespace(model_sampling=model_sampling),
            model_patcher=types.SimpleNamespace(
                get_model_object={"model_sampling": model_sampling}.__getitem__))

    def __call__(self, x, sigma, **extra):
        return self.denoiser(x, sigma)
