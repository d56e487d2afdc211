"""Calibrations of every kind in one socket, and on a model."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hosting.kinds import kind_of
from ..hosting.library import Kind

SOCKET = io.Custom("LAMBDA_CALIBRATION")


def outputs() -> list[io.Output]:
    """Of a node that makes a calibration, or loads one."""
    return [SOCKET.Output(display_name="CALIBRATION", tooltip="For the nodes of solvers, and for tuning"),
            io.Image.Output(display_name="picture", tooltip=(
                "Of a measurement the curves l, s and b over lambda and, for Fitted, the error to "
                "expect, without and with a hypersolver too; of AMED r, c and a of every step, and the error "
                "after it")),
            io.Model.Output(display_name="MODEL", tooltip=(
                "The model with the calibration attached, for our samplers in the plain KSampler"))]


def attached(model: Any, calibration: Any) -> Any:
    """The model with a calibration attached: it carries one of each kind, the last."""
    patched = model.clone()
    patched.set_attachments(kind_of(calibration).attachment, calibration)
    return patched


def needed(kind: Kind, found: Any, node: str) -> Any:
    """What came through the socket, if it is of this kind; ValueError naming both kinds and the remedy if it
    is not."""
    if not isinstance(found, kind.type):
        raise ValueError(f"calibration is {kind_of(found).noun} of {found.about.get('model', 'a model')}, "
                         f"and {node} needs {kind.noun}: connect what {kind.makes} makes, or a file of it by "
                         "Load Calibration")
    return found
