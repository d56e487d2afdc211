"""The panel of our samplers' options, among the WebUI's scripts."""
from __future__ import annotations

from typing import Any

import gradio as gr
from modules import scripts

from . import options, training
from .options import PANEL, Setting


class Panel(scripts.Script):
    """Always there, closed, and without effect on other samplers."""

    def title(self) -> str:
        return "Lambda Solvers"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion(self.title(), open=False, elem_id=self.elem_id("panel")):
            widgets = {name: self._widget(name, setting) for name, setting in PANEL.items()}
        self.infotext_fields = [(widget, options.restored(name)) for name, widget in widgets.items()]
        self.paste_field_names = [setting.label for setting in PANEL.values()]
        return [*widgets.values()]

    def process(self, p: Any, *values: Any) -> None:
        options.choose(p, dict(zip(PANEL, values)))

    def process_batch(self, p: Any, *values: Any, **told: Any) -> None:
        training.read(p)

    def _widget(self, name: str, setting: Setting) -> Any:
        option = setting.option
        said = {"label": setting.label, "value": option.default, "info": option.help,
                "elem_id": self.elem_id(name)}
        if option.choices:
            return gr.Radio(choices=list(option.choices), **said)
        return gr.Slider(minimum=option.low, maximum=option.high, step=option.step, **said)
