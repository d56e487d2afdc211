"""The pack's page of ComfyUI's settings, as Python reads it."""
from __future__ import annotations

from typing import Any

from server import PromptServer

CALIBRATION = "LambdaSolvers.Calibration"
PLOT = "LambdaSolvers.Plot"


class _DefaultUser:
    """As much of a request as ComfyUI's settings need: during a run nobody knows who queued it."""

    headers: dict[str, str] = {}


def read(name: str) -> Any:
    """A setting of the default user, None if it was never set. With --multi-user there is no default user: always None."""
    if not hasattr(PromptServer, "instance"):
        return None  # the pack is used without a server
    users = PromptServer.instance.user_manager
    if "default" not in users.users:
        return None
    return users.settings.get_settings(_DefaultUser()).get(name)
