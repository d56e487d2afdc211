"""Our samplers' options as axes of the WebUI's X/Y/Z plot."""
from __future__ import annotations

from typing import Any

from modules import scripts

from . import options

SCRIPT = "xyz_grid.py"


def append() -> None:
    """Append the axes to the plot's own, once. It is a script too, and may be missing."""
    for plot in [data.module for data in scripts.scripts_data if data.script_class.__module__ == SCRIPT]:
        there = {axis.label for axis in plot.axis_options}
        plot.axis_options += [_axis(plot, name, setting) for name, setting in options.PANEL.items()
                              if setting.label not in there]


def _axis(plot: Any, name: str, setting: options.Setting) -> Any:
    option = setting.option
    choices = (lambda: list(option.choices)) if option.choices else None
    return plot.AxisOption(setting.label, option.kind, options.vary(name), choices=choices)
