"""Nodes that load, save, attach and use what was learned of a model."""
from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..hosting import store
from ..hosting.events import say
from ..hosting.kinds import STATISTICS_KIND, kind_of
from ..hosting.library import file_name
from ..samplers import fitted_sigmas, load_calibration
from . import picture
from .host import CATEGORY, path_of
from .kinds import SOCKET, needed
from .knowledge import FITTED, outputs

MADE = "Measure Model, Tune Fitted, Train Hypersolver or Train AMED"


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaLoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            description=f"Reads a file of models/solver_calibrations: what {MADE} made.",
            inputs=[io.Combo.Input("name", options=store.names(),
                                   tooltip="A file of models/solver_calibrations")],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        loaded = load_calibration(store.existing(name))
        return io.NodeOutput(loaded, picture.of(loaded))

    @classmethod
    def validate_inputs(cls, name: str) -> bool:
        return True  # a file that is gone is named when the node runs, with the remedy; ComfyUI names none

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        return store.existing(name).stat().st_mtime


class SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaSaveCalibration",
            display_name="Save Calibration",
            category=CATEGORY,
            description="Writes a calibration to models/solver_calibrations under a name of yours, a small "
                        "file to share.",
            inputs=[
                SOCKET.Input("calibration", tooltip=f"From {MADE}"),
                io.String.Input("name", default="", tooltip=(
                    "File name; empty: the model's name and guidance, and a number if there is one")),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, calibration: Any, name: str, overwrite: bool) -> io.NodeOutput:
        own = file_name(kind_of(calibration), calibration.about)
        path = store.place(name) if name.strip() else store.free(own)
        try:
            calibration.save(path, overwrite=overwrite)
        except FileExistsError:
            raise FileExistsError(f"{path.name} exists in {store.FOLDER}: choose another name, or overwrite "
                                  "it") from None
        said = f"saved as {store.shown(path)}"
        say(said)
        return io.NodeOutput(ui={"text": [said]})


class ApplyCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaApplyCalibration",
            display_name="Apply Calibration",
            category=CATEGORY,
            description="Attaches a calibration to a model, for our samplers in the plain KSampler. A model "
                        "can carry one of a measurement and one of a training: apply one behind the other.",
            inputs=[io.Model.Input("model", tooltip="The model that was measured, or one like it"),
                    SOCKET.Input("calibration", tooltip=f"From {MADE}, or Load Calibration")],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The same model, with the calibration "
                                                                   "attached")],
        )

    @classmethod
    def execute(cls, model: Any, calibration: Any) -> io.NodeOutput:
        patched = model.clone()
        patched.set_attachments(kind_of(calibration).attachment, calibration)
        return io.NodeOutput(patched)


class FittedScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaFittedScheduler",
            display_name="Fitted Scheduler",
            category=CATEGORY,
            description="The noise levels where so few steps leave the least error on your model, as SIGMAS "
                        "for any sampler. It does for any checkpoint that was measured what the tables of "
                        "Align Your Steps, GITS and OptimalSteps do for a few. Chosen for DPM-Solver-v3's "
                        "own steps.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: its noise levels are used"),
                SOCKET.Input("calibration", tooltip=FITTED),
                io.Int.Input("steps", default=6, min=1, max=1000, tooltip="Intervals of the schedule, the "
                                                                          "last one to 0"),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
                    "Below 1 the schedule begins where this share of the model's timesteps is left, for "
                    "image to image")),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS",
                                      tooltip="For SamplerCustom, SamplerCustomAdvanced or Train AMED")],
        )

    @classmethod
    def execute(cls, model, calibration, steps, denoise) -> io.NodeOutput:
        found = needed(STATISTICS_KIND, calibration, "Fitted Scheduler")
        sampling = model.get_model_object("model_sampling")
        start = float(sampling.percent_to_sigma(1.0 - denoise) if denoise < 1.0 else sampling.sigma_max)
        return io.NodeOutput(torch.tensor(fitted_sigmas(found, steps, start, path_of(sampling))))


NODES: list[type[io.ComfyNode]] = [LoadCalibration, SaveCalibration, ApplyCalibration, FittedScheduler]
