"""Calibrations of every kind in one socket."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hosting.kinds import kind_of
from ..hosting.library import Kind

SOCKET = io.Custom("LAMBDA_CALIBRATION")


def needed(kind: Kind, found: Any, node: str) -> Any:
    """What came through the socket, if it is of this kind; ValueError naming both kinds and the remedy if it
    is not."""
    if not isinstance(found, kind.type):
        raise ValueError(f"calibration is {kind_of(found).noun} of {found.about.get('model', 'a model')}, "
                         f"and {node} needs {kind.noun}: connect what {kind.makes} makes, or a file of it by "
                         "Load Calibration")
    return found
