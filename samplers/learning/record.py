"""What was learned of a model, of whatever kind, from its file."""
from __future__ import annotations

import os

from .amed import Amed
from .statistics import Statistics
from .storage import OtherKind


def load_calibration(path: str | os.PathLike) -> Statistics | Amed:
    """Read and check a file; CalibrationError says what is wrong with it."""
    try:
        return Statistics.load(path)
    except OtherKind:
        return Amed.load(path)
