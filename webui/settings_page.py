"""The pack's page of the WebUI's settings."""
from __future__ import annotations

import gradio as gr
from modules import shared

from ..hosting import library
from ..hosting.library import RULES

RULE, FOLDER = "lambda_solvers_calibration", "lambda_solvers_folder"
SECTION = ("lambda_solvers", "Lambda Solvers")


def add() -> None:
    options = {
        RULE: shared.OptionInfo(RULES[0], "When a sampler must know the model", gr.Radio,
                                {"choices": list(RULES)}, section=SECTION).info(
            "auto: use what was saved for this model and guidance, or measure once, at no prompt in "
            "particular, and save it; every prompt: measure each new prompt, which is more exact; saved "
            "only: never measure"),
        FOLDER: shared.OptionInfo("", "Folder of calibrations", section=SECTION).info(
            "empty: models/solver_calibrations here. ComfyUI's folder of that name does too: the files are "
            "the same"),
    }
    for name, option in options.items():
        shared.opts.add_option(name, option)


def rule() -> str:
    """What a sampler does that needs a calibration, where the panel does not say it."""
    return library.rule(getattr(shared.opts, RULE, None), SECTION[1])
