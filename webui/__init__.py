"""Everything that knows Stable Diffusion WebUI (Forge, reForge, A1111): our names in its lists, their options
in a panel, in the infotext and as axes of the X/Y/Z plot, how a model is measured there, and a script that
trains a hypersolver."""
from __future__ import annotations

from modules import script_callbacks

from ..hosting import events, store
from . import axes, folder, job, registration, settings_page
from .panel import Panel
from .training import Training

__all__ = ["Panel", "Training", "register"]


def register() -> None:
    """Tell the WebUI of everything that is here; again after every reload of its interface."""
    registration.samplers()
    script_callbacks.on_ui_settings(settings_page.add)
    script_callbacks.on_before_ui(axes.append)
    store.use(folder.Folder())
    events.listeners[:] = [job.Listener()]
