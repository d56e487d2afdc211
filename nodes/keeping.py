"""Nodes that load, save and attach what was learned of a model."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hosting import store
from ..hosting.events import say
from ..hosting.kinds import kind_of
from ..hosting.library import file_name
from ..samplers import load_calibration
from . import picture
from .calibration_socket import SOCKET
from .host import CATEGORY
from .knowledge import outputs

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


NODES: list[type[io.ComfyNode]] = [LoadCalibration, SaveCalibration, ApplyCalibration]
