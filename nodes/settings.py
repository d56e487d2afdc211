"""The pack's page of ComfyUI's settings, as Python reads it."""
from __future__ import annotations

import sys
from typing import Any

from ..hosting import library
from ..hosting.library import RULES

CALIBRATION = "LambdaSolvers.Calibration"
PLOT = "LambdaSolvers.Plot"
PAGE: list[dict[str, Any]] = [
    {"id": CALIBRATION, "category": ["Lambda Solvers", "Sampling", "Calibration"], "type": "combo",
     "options": list(RULES),
     "defaultValue": RULES[0], "name": "When a sampler must know the model",
     "tooltip": "Of KSampler's list: lambda_v3, lambda_fitted and AMED's. auto: use what was saved for this "
                "model and guidance, or measure once, at no prompt in particular, and save it; every prompt: "
                "measure each new prompt, which is more exact; saved only: never measure. The environment "
                "variable LAMBDA_SOLVERS_CALIBRATION overrides this"},
    {"id": PLOT, "category": ["Lambda Solvers", "Display", "Plot"], "type": "boolean", "defaultValue": True,
     "name": "Draw the schedule on sampler nodes",
     "tooltip": "The line is lambda, half the log of the signal-to-noise ratio, over the steps; the dots are "
                "model evaluations"},
]
"""As the interface's registerExtension takes them."""


class _DefaultUser:
    """As much of a request as ComfyUI's settings need: during a run nobody knows who queued it."""

    headers: dict[str, str] = {}


def read(name: str) -> Any:
    """A setting of the default user, None if it was never set. With --multi-user there is no default user:
    always None."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    if not hasattr(server, "instance"):
        return None  # the pack is used without a server
    users = server.instance.user_manager
    if "default" not in users.users:
        return None
    return users.settings.get_settings(_DefaultUser()).get(name)


def rule() -> str:
    """What a sampler in a list does without a calibration."""
    return library.rule(read(CALIBRATION), CALIBRATION)
