"""The node that loads what was learned of a model."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..hosting import store
from ..samplers import load_calibration
from . import picture
from .calibration_socket import outputs, attached
from .host import CATEGORY


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaLoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            description="Reads a file of models/solver_calibrations: what Measure Model, Tune Fitted, Train "
                        "Hypersolver or Train AMED made. With a model connected, attaches it, for our "
                        "samplers in the plain KSampler.",
            inputs=[io.Combo.Input("name", options=store.names(),
                                   tooltip="A file of models/solver_calibrations"),
                    io.Model.Input("model", optional=True, tooltip=(
                        "The model that was measured, or one like it. It can carry one of a measurement and "
                        "one of AMED: put two of these nodes in a row"))],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, name: str, model: Any = None) -> io.NodeOutput:
        loaded = load_calibration(store.existing(name))
        if model is None:  # only what uses it is stopped
            return io.NodeOutput(loaded, picture.of(loaded), ExecutionBlocker(
                "Load Calibration has no model to attach the file to: connect one to its input model"))
        return io.NodeOutput(loaded, picture.of(loaded), attached(model, loaded))

    @classmethod
    def validate_inputs(cls, name: str) -> bool:
        return True  # a file that is gone is named when the node runs, with the remedy; ComfyUI names none

    @classmethod
    def fingerprint_inputs(cls, name: str, model: Any = None) -> float:
        return store.existing(name).stat().st_mtime
