"""What Stable Diffusion WebUI (Forge, reForge, A1111) imports of this repository when it lies in its folder
extensions/. ComfyUI does not look here."""
from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

PACK = "lambda_solvers_pack"
"""Forge puts every extension's folder on sys.path, where `samplers` may be anyone's. So this repository is a
package under a name of its own here, and everything in it imports relatively."""
OLD = ("Lambda Solvers needs a Stable Diffusion WebUI with schedule types (Forge, reForge, or A1111 1.9 and "
       "newer), and this one has no {}. SD.Next is not supported: its samplers are of another kind.")


def load() -> types.ModuleType:
    """The pack's folder webui/, read anew: after an update `Reload UI` is enough."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACK]:
        del sys.modules[name]
    package = sys.modules[PACK] = types.ModuleType(PACK)
    package.__path__ = [str(Path(__file__).absolute().parent.parent)]
    return importlib.import_module(f"{PACK}.webui")


try:
    from modules import scripts, sd_samplers_kdiffusion, sd_schedulers  # noqa: F401
except ImportError as missing:
    print(OLD.format(missing.name or missing))
else:
    webui = load()
    webui.register()
    Panel, Training = webui.Panel, webui.Training  # the WebUI looks for them here
