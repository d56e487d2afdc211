"""Nodes that measure, save, load and attach statistics."""
from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..samplers import Statistics
from ..samplers.calibrate import INTERVALS
from . import calibration, picture, store

CATEGORY = "Lambda Solvers/calibration"
STATISTICS = io.Custom("LAMBDA_STATISTICS")
PICTURE = "The curves l, s, b and gamma over lambda"


def advanced(widget: io.Input) -> io.Input:
    widget.extra_dict = {"advanced": True}  # not an argument yet in ComfyUI 0.3.75
    return widget


class EstimateStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaEstimateStatistics",
            display_name="Estimate Solver Statistics",
            category=CATEGORY,
            description="Measures what DPM-Solver-v3 needs to know of a model, at one prompt and guidance: about 50 "
                        "evaluations of a small batch, no training, no data. Best for that prompt; good for any size.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs, as it will be sampled"),
                io.Conditioning.Input("positive", tooltip="The prompt that will be sampled; for other prompts the part of the statistics that "
                                                           "belongs to the prompt is left out"),
                io.Conditioning.Input("negative", tooltip="The negative prompt that will be used"),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=False,
                               tooltip="Guidance: statistics serve guidance within about 10 % of it"),
                io.Latent.Input("latent_image", tooltip="Only its shape is used"),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Of the noise of the measuring trajectories"),
                advanced(io.Int.Input("intervals", default=INTERVALS, min=4, max=500, tooltip=(
                    "Grid intervals in lambda; each costs two evaluations"))),
                advanced(io.Int.Input("samples", default=0, min=0, max=256, tooltip=(
                    "Trajectories, evaluated as one batch. 0: as many as the latent's size asks for, at most 16"))),
                advanced(io.Combo.Input("pool", options=["all", "channel"], default="all", tooltip=(
                    "all: one number at each lambda; channel: one for every latent channel"))),
            ],
            outputs=[STATISTICS.Output(display_name="STATISTICS", tooltip="For the DPM-Solver-v3 node, Save or Apply Solver Statistics"),
                     io.Image.Output(display_name="picture", tooltip=PICTURE)],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, seed, intervals, samples, pool) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])[:1]
        result: list[Statistics] = []

        def run(wrapped, x, extra_args) -> None:
            about = calibration.description(guider)
            partial = store.place(f"partial/{about['model']}-{seed}-{intervals}-{samples}-{pool}").with_suffix(".part")
            result.append(calibration.measure(wrapped, x, extra_args, about, seed=seed, intervals=intervals,
                                              samples=samples, pool=pool, partial=partial))

        sampling = model.get_model_object("model_sampling")
        sigmas = torch.tensor([float(sampling.sigma_max), float(sampling.sigma_min)])
        guider.sample(torch.zeros_like(latent), latent, calibration.Measuring(run), sigmas, disable_pbar=True, seed=seed)
        image = picture.curves(result[0])
        return io.NodeOutput(result[0], image, ui=ui.PreviewImage(image, cls=cls))


class SaveStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaSaveStatistics",
            display_name="Save Solver Statistics",
            category=CATEGORY,
            description="Writes statistics to models/solver_calibrations, a small file to share.",
            inputs=[
                STATISTICS.Input("statistics", tooltip="From Estimate Solver Statistics"),
                io.String.Input("name", default="", tooltip="File name; empty: the model's name and guidance, and a number if there is one"),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, statistics: Statistics, name: str, overwrite: bool) -> io.NodeOutput:
        path = store.place(name) if name.strip() else store.free(calibration.file_name(dict(statistics.about)))
        try:
            statistics.save(path, overwrite=overwrite)
        except FileExistsError:
            raise FileExistsError(f"{path.name} exists in {store.FOLDER}: choose another name, or overwrite it") from None
        calibration.say(f"saved as {path.name}")
        return io.NodeOutput(ui={"text": [f"saved as {path.name}"]})


class LoadStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaLoadStatistics",
            display_name="Load Solver Statistics",
            category=CATEGORY,
            description="Reads statistics from models/solver_calibrations.",
            inputs=[io.Combo.Input("name", options=store.names(), tooltip="A file of models/solver_calibrations")],
            outputs=[STATISTICS.Output(display_name="STATISTICS", tooltip="For the DPM-Solver-v3 node or Apply Solver Statistics"),
                     io.Image.Output(display_name="picture", tooltip=PICTURE)],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        statistics = Statistics.load(store.existing(name))
        return io.NodeOutput(statistics, picture.curves(statistics))

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        return store.existing(name).stat().st_mtime


class ApplyStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaApplyStatistics",
            display_name="Apply Solver Statistics",
            category=CATEGORY,
            description="Attaches statistics to a model, for dpm_solver_v3 in the plain KSampler.",
            inputs=[io.Model.Input("model", tooltip="The model the statistics were measured on"),
                    STATISTICS.Input("statistics", tooltip="From Estimate or Load Solver Statistics")],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The same model, with the statistics attached")],
        )

    @classmethod
    def execute(cls, model, statistics: Statistics) -> io.NodeOutput:
        patched = model.clone()
        patched.set_attachments(calibration.ATTACHMENT, statistics)
        return io.NodeOutput(patched)


NODES: list[type[io.ComfyNode]] = [EstimateStatistics, SaveStatistics, LoadStatistics, ApplyStatistics]
