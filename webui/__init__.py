"""Everything that knows Stable Diffusion WebUI (Forge, reForge, A1111): our names in its list of samplers,
their options in a panel, in the infotext and as axes of the X/Y/Z plot."""
from __future__ import annotations

from modules import script_callbacks

from . import axes, registration
from .panel import Panel

__all__ = ["Panel", "register"]


def register() -> None:
    """Tell the WebUI of everything that is here; again after every reload of its interface."""
    registration.samplers()
    script_callbacks.on_before_ui(axes.append)
