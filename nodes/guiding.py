"""Classifier guidance: a GUIDER for any sampler."""
from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..hosting import fingerprint
from ..samplers.classifier import Classifier, gradient, load_classifier, shift
from . import folder
from .host import SPECIAL, advanced, noise_scale, path_of
from .identity import Ruled

NONE = "[none there yet]"


class ClassifierGuider(Ruled):
    """ComfyUI's rule, and on top of it scale sigma^2 / alpha grad log p(label | x, sigma).

    The classifier sees what the network sees: calculate_input(sigma, x) and timestep(sigma) of the model's
    sampling. It stays on the CPU; a run has a copy of it on its device, whatever ComfyUI offloads.
    """

    def __init__(self, model: Any, classifier: Classifier, label: int, scale: float) -> None:
        super().__init__(model)
        self.classifier, self.label, self.scale, self.running = classifier, label, scale, None

    @property
    def rule(self) -> str:
        digest = hashlib.sha256()
        for part in fingerprint.network(self.classifier.state_dict(), {}):
            digest.update(part)
        return f"classifier {digest.hexdigest()[:8]}, class {self.label}, scale {self.scale:g}"

    def inner_sample(self, noise: Tensor, latent_image: Tensor, device: torch.device, *arguments: Any,
                     **named: Any) -> Tensor:
        with torch.inference_mode(False):  # tensors that are made in it have no gradients
            self.running = copy.deepcopy(self.classifier).to(device)
        try:
            return super().inner_sample(noise, latent_image, device, *arguments, **named)
        finally:
            self.running = None

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {},
                      seed: int | None = None) -> Tensor:
        denoised = super().predict_noise(x, timestep, model_options=model_options, seed=seed)
        return denoised + self.added(x, timestep).to(denoised.dtype)

    def added(self, x: Tensor, sigma: Tensor) -> Tensor:
        """In float32, whatever x is."""
        sampling, level = self.inner_model.model_sampling, sigma.float()
        with torch.inference_mode(False):
            t, own = sampling.timestep(sigma).float().clone(), level.clone()
            grad = gradient(lambda x: self.running(sampling.calculate_input(own, x), t)[:, self.label],
                            x.float())
        level = level.view(-1, *[1] * (x.ndim - 1))
        alpha = 1.0 - level if path_of(sampling) == "flow" else torch.ones_like(level)
        return self.scale * shift(grad, noise_scale(sampling) * level, alpha)


class ClassifierGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaClassifierGuider",
            display_name="Classifier Guider",
            category=SPECIAL,
            description="Leads any sampler towards a class, by the gradient of a classifier of noisy images: "
                        "classifier guidance. The classifier must have been trained on this model's own "
                        "noisy images or latents. Dhariwal & Nichol 2021 (arXiv:2105.05233).",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled"),
                io.Conditioning.Input("positive", optional=True, tooltip=(
                    "The prompt, for a model that reads one: an empty text leaves all to the classifier")),
                io.Conditioning.Input("negative", optional=True, tooltip=(
                    "The negative prompt; used where cfg is not 1")),
                io.Combo.Input("classifier", options=folder.classifiers() or [NONE], tooltip=(
                    "A safetensors file of models/classifiers, in guided-diffusion's layout "
                    "(EncoderUNetModel with attention pooling)")),
                io.String.Input("label", default="0", tooltip=(
                    "The class: its number, or its name if the file has names")),
                io.Float.Input("scale", default=1.0, min=0.0, max=1000.0, step=0.1, round=False, tooltip=(
                    "How much of the classifier's gradient is added. 1 is Bayes' rule, more is surer of the "
                    "class and less varied; 0 leaves the classifier out")),
                advanced(io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=False,
                                        tooltip="Classifier-free guidance beside it, as in KSampler; 1 is "
                                                "none")),
            ],
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="For SamplerCustomAdvanced")])

    @classmethod
    def execute(cls, model: Any, classifier: str, label: str, scale: float, cfg: float, positive: Any = None,
                negative: Any = None) -> io.NodeOutput:
        config = model.model.model_config.unet_config
        if positive is None and config.get("context_dim"):
            raise ValueError("positive is not connected, and this model reads prompts: connect a prompt, "
                             "such as an empty text")
        found = load_classifier(existing(classifier))
        channels, wanted = found.channels, model.model.latent_format.latent_channels
        if channels != wanted:
            raise ValueError(f"{classifier} is for {channels} channels, and this model's latents have "
                             f"{wanted}: choose a classifier that was trained on this model's latents")
        number = found.label(label)
        guider = ClassifierGuider(model, found, number, scale) if scale else comfy.samplers.CFGGuider(model)
        guider.set_conds(*([[None, {}]] if cond is None else cond for cond in (positive, negative)))
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)

    @classmethod
    def validate_inputs(cls, classifier: str) -> bool:
        return True  # a file that is gone is named when the node runs, with the remedy; ComfyUI names none

    @classmethod
    def fingerprint_inputs(cls, classifier: str, **others: Any) -> float:
        return existing(classifier).stat().st_mtime


def existing(name: str) -> Path:
    """The file of a listed name; ValueError if there is none."""
    path = folder.classifier(name)
    if path is None:
        raise ValueError(f"there is no classifier {name!r}: put a safetensors file into "
                         f"{folder.classifiers_directory()}, refresh the node definitions (key R) and choose "
                         "it")
    return path
