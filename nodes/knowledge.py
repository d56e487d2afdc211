"""Nodes that measure, save, load and attach what solvers need to know of a model."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..samplers import fitted_sigmas, load_calibration
from ..samplers.learning.amed import BASES
from ..samplers.learning.measure import INTERVALS
from ..samplers.learning.refit import FEWEST, LARGEST
from ..samplers.learning.train_amed import TEACHER
from . import canonical, identity, store
from .events import say
from .host import CATEGORY, advanced, path_of
from .kinds import AMED_KIND, SOCKET, STATISTICS_KIND, kind_of, needed
from .library import Kind, file_name, kept, measuring_at
from .measuring import Run, measured

FITTED = f"From {STATISTICS_KIND.makes} with fitted on, or a file of it"


def _model(what: str) -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model with its LoRAs, as it will be sampled"),
        io.Conditioning.Input("positive", tooltip=f"The prompt that will be sampled; {what}"),
        io.Conditioning.Input("negative", tooltip="The negative prompt that will be used"),
        io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=False,
                       tooltip="Guidance: what is measured serves guidance within about 10 % of it"),
        io.Latent.Input("latent_image", tooltip=(
            "Its shape is measured, and as many images at once as it has: 1 takes the least memory")),
    ]


def _for(others: str) -> io.Input:
    return advanced(io.Combo.Input("prompt", options=["any", "this"], default="any", tooltip=(
        "any: at no prompt in particular, as samplers do that measure by themselves, so that they find it. "
        f"this: at the prompt that is connected; {others}")))


def _seed(of: str) -> io.Input:
    return advanced(io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip=f"Of the noise {of}"))


def _save() -> io.Input:
    return io.Boolean.Input("save", default=True, tooltip=(
        "Write the result to models/solver_calibrations, where samplers find it by themselves"))


def _outputs() -> list[io.Output]:
    return [SOCKET.Output(display_name="CALIBRATION", tooltip="For solver nodes, Save Calibration or Apply "
                                                              "Calibration"),
            io.Image.Output(display_name="picture", tooltip=(
                "Of a measurement the curves l, s, b and gamma over lambda and, for Fitted, the error to "
                "expect; of a training r, c and a of every step, and the error after it"))]


def _made(cls: type[io.ComfyNode], result: Any, save: bool) -> io.NodeOutput:
    """What was measured, saved if asked, and its picture, which the node shows too."""
    kind = kind_of(result)
    if save and (path := kept(kind, result)):
        found = canonical.named(result.about) or any(told["prompts"] > 1
                                                     for told in result.about.get("refits", {}).values())
        say(f"saved as {store.shown(path)}; samplers find it by themselves" + ("" if found else (
            " where `measure` is every prompt, and this is the prompt")))
    image = kind.draw(result)
    return io.NodeOutput(result, image, ui=ui.PreviewImage(image, cls=cls))


def _measured(cls: type[io.ComfyNode], kind: Kind, prompt: str, save: bool, options: dict, how: dict,
              model: Any,
              positive: Any, negative: Any, cfg: float, latent_image: dict, seed: int,
              sigmas: Any = None) -> io.NodeOutput:
    """What a kind measures of a model at this prompt, or at nobody's; `options` are the solver's, and `how`
    the kind's."""

    def measure(run: Run) -> Any:
        run = replace(run, options=options)
        with measuring_at(kind, run, "auto" if prompt == "any" else "every prompt") as about:
            return kind.measure(run, about, _partial(kind, about, seed, *how.values()), seed=seed, **how)

    return _made(cls, measured(model, [positive], negative, cfg, latent_image, seed, sigmas, measure), save)


def _partial(kind: Any, about: dict[str, Any], *settings: object) -> Any:
    """Where a measurement of these settings is kept until it is whole."""
    return store.partial("-".join([file_name(kind, about), *map(str, settings)]))


class MeasureModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaMeasureModel",
            display_name="Measure Model",
            category=CATEGORY,
            description="Measures once what DPM-Solver-v3 and Fitted need to know of a model at a guidance, "
                        "and saves it: lambda_v3 and lambda_fitted then find it. No training, no data; takes "
                        "as long as about 8 images of 20 steps.",
            inputs=[
                *_model("read only for its size, unless `prompt` is this"),
                _save(),
                _for("more exact for that, and for others a part of it is left out"),
                advanced(io.Boolean.Input("fitted", default=True, tooltip=(
                    "Measure what Fitted and Fitted Scheduler need too: half as long again, and two "
                    "trajectories or more"))),
                _seed("of the measuring trajectories"),
                advanced(io.Int.Input("intervals", default=INTERVALS, min=4, max=500, tooltip=(
                    "Grid intervals in lambda: the time it takes goes with them"))),
                advanced(io.Int.Input("samples", default=0, min=0, max=256, tooltip=(
                    "Trajectories to average over. 0: as many as the latent's size asks for, at most 16"))),
                advanced(io.Combo.Input("pool", options=["all", "channel"], default="all", tooltip=(
                    "all: one number at each lambda; channel: one for every latent channel, without "
                    "fitted"))),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, save=True, prompt="any", fitted=True,
                seed=0,
                intervals=INTERVALS, samples=0, pool="all") -> io.NodeOutput:
        how = {"intervals": intervals, "samples": samples, "pool": pool}
        return _measured(cls, STATISTICS_KIND, prompt, save, {"nodes": "chosen"} if fitted else {}, how,
                         model,
                         positive, negative, cfg, latent_image, seed)


class TrainAmed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaTrainAmed",
            display_name="Train AMED",
            category=CATEGORY,
            description="Learns where AMED evaluates inside every step of one schedule of at most 10 steps, "
                        "and saves it: the AMED node, lambda_amed and lambda_amed_2m then find it. Takes as "
                        "long as 30 to 150 images of that schedule, by the latent's size.",
            inputs=[
                *_model("read only for its size, unless `prompt` is this"),
                io.Sigmas.Input("sigmas", tooltip="The schedule to train for, as it will be sampled. AMED "
                                                  "evaluates twice in every interval but the last: n steps "
                                                  "are 2 n - 1 evaluations"),
                io.Combo.Input("base", options=list(BASES), default="amed", tooltip=(
                    "The rule that steps to the learned node and on: AMED's own, or another solver's "
                    "(AMED-Plugin)")),
                _save(),
                _for("other prompts it serves less well"),
                advanced(io.Combo.Input("form", options=["table", "predictor"], default="table", tooltip=(
                    "table: one (r, c, a) for every step; predictor: a small network on top of it that looks "
                    "at the image, for U-Nets, at 2 to 6 times the cost and for this prompt alone: others it "
                    "mostly harmed"))),
                advanced(io.Boolean.Input("afs", default=False, tooltip=(
                    "The analytic first step: one evaluation less, worth it for models with a very high "
                    "sigma_max"))),
                _seed("it is trained on"),
                advanced(io.Int.Input("samples", default=0, min=0, max=64, tooltip=(
                    "Images to learn from, with a quarter more that test a table, or select a predictor. 0: "
                    "2 to 8 by the latent's size"))),
                advanced(io.Int.Input("teacher", default=TEACHER, min=2, max=64, tooltip=(
                    "Steps of the teacher in every interval: what AMED learns to land on"))),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, sigmas, base, save=True, prompt="any",
                form="table", afs=False,
                seed=0, samples=0, teacher=TEACHER) -> io.NodeOutput:
        if form == "predictor" and prompt == "any":
            raise ValueError("form = predictor with prompt = any: a predictor serves the prompt it was "
                             "trained at alone; set prompt to this, or form to table")
        options = {"base": base, "first_step": "afs" if afs else "evaluate"}
        return _measured(cls, AMED_KIND, prompt, save, options,
                         {"form": form, "samples": samples, "teacher": teacher},
                         model, positive, negative, cfg, latent_image, seed, sigmas)


class TuneFitted(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaTuneFitted",
            display_name="Tune Fitted",
            category=CATEGORY,
            description="Learns levels and weights of lambda_fitted for one number of steps from its own "
                        "runs on the model, for all prompts from a dozen, or for one. Takes as long as about "
                        "50 images of 20 steps for 5 steps, and 100 for 8; with a dozen prompts twice that.",
            inputs=[
                *_model("what is learned is used for this prompt only, unless there are more prompts below"),
                SOCKET.Input("calibration", tooltip=FITTED),
                io.Int.Input("steps", default=5, min=FEWEST, max=LARGEST + 1, tooltip=(
                    "KSampler's steps that it is for: other numbers stay as they were")),
                io.Clip.Input("clip", optional=True, tooltip=(
                    "Reads the prompts below; what else the positive input has (guidance, sizes, ControlNet) "
                    "they get from it")),
                io.String.Input("prompts", default="", multiline=True, optional=True, tooltip=(
                    "More prompts, one a line, a dozen or more. What is learned from several is used for "
                    "every prompt, if it helps on those that select")),
                _save(),
                _seed("it learns from"),
                advanced(io.Int.Input("samples", default=0, min=0, max=64, tooltip=(
                    "Images; the last quarter selects among what the others teach. 0: 4 to 8 by the latent's "
                    "size, and at least one or two for each prompt"))),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, calibration, steps, clip=None, prompts="",
                save=True, seed=0,
                samples=0) -> io.NodeOutput:
        found = needed(STATISTICS_KIND, calibration, "Tune Fitted")
        positives = [positive, *_read(prompts, clip, positive)]

        def measure(run: Run) -> Any:
            about = {**identity.description(run.guider), "prompts": len(positives)}
            partial = _partial(STATISTICS_KIND, about, "refit", steps, seed, samples)
            return STATISTICS_KIND.refit(run, found, steps, about, partial, seed=seed, samples=samples)

        result = measured(model, positives, negative, cfg, latent_image, seed, None, measure)
        return _made(cls, result, save and bool(result.plans))


def _read(prompts: str, clip: Any, like: Any) -> list[Any]:
    """Conditions for every line, with what else `like` has."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if lines and clip is None:
        raise ValueError(f"prompts has {len(lines)} lines and nothing reads them: connect the checkpoint's "
                         "CLIP to clip, or leave prompts empty")
    return [[[tensor, {**like[0][1], **more}]
             for tensor, more in clip.encode_from_tokens_scheduled(clip.tokenize(line))]
            for line in lines]


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaLoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            description="Reads a file of models/solver_calibrations: what Measure Model, Tune Fitted or "
                        "Train AMED made.",
            inputs=[io.Combo.Input("name", options=store.names(),
                                   tooltip="A file of models/solver_calibrations")],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        loaded = load_calibration(store.existing(name))
        return io.NodeOutput(loaded, kind_of(loaded).draw(loaded))

    @classmethod
    def validate_inputs(cls, name: str) -> bool:
        return True  # a file that is gone is named when the node runs, with the remedy; ComfyUI names none

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        return store.existing(name).stat().st_mtime


class SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaSaveCalibration",
            display_name="Save Calibration",
            category=CATEGORY,
            description="Writes a calibration to models/solver_calibrations under a name of yours, a small "
                        "file to share.",
            inputs=[
                SOCKET.Input("calibration", tooltip="From Measure Model, Tune Fitted or Train AMED"),
                io.String.Input("name", default="", tooltip=(
                    "File name; empty: the model's name and guidance, and a number if there is one")),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, calibration: Any, name: str, overwrite: bool) -> io.NodeOutput:
        own = file_name(kind_of(calibration), calibration.about)
        path = store.place(name) if name.strip() else store.free(own)
        try:
            calibration.save(path, overwrite=overwrite)
        except FileExistsError:
            raise FileExistsError(f"{path.name} exists in {store.FOLDER}: choose another name, or overwrite "
                                  "it") from None
        said = f"saved as {store.shown(path)}"
        say(said)
        return io.NodeOutput(ui={"text": [said]})


class ApplyCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaApplyCalibration",
            display_name="Apply Calibration",
            category=CATEGORY,
            description="Attaches a calibration to a model, for our samplers in the plain KSampler. A model "
                        "can carry one of a measurement and one of a training: apply one behind the other.",
            inputs=[io.Model.Input("model", tooltip="The model that was measured, or one like it"),
                    SOCKET.Input("calibration", tooltip="From Measure Model, Tune Fitted, Train AMED or Load "
                                                        "Calibration")],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The same model, with the calibration "
                                                                   "attached")],
        )

    @classmethod
    def execute(cls, model: Any, calibration: Any) -> io.NodeOutput:
        patched = model.clone()
        patched.set_attachments(kind_of(calibration).attachment, calibration)
        return io.NodeOutput(patched)


class FittedScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaFittedScheduler",
            display_name="Fitted Scheduler",
            category=CATEGORY,
            description="The noise levels where so few steps leave the least error on your model, as SIGMAS "
                        "for any sampler. It does for any checkpoint that was measured what the tables of "
                        "Align Your Steps, GITS and OptimalSteps do for a few. Chosen for DPM-Solver-v3's "
                        "own steps.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: its noise levels are used"),
                SOCKET.Input("calibration", tooltip=FITTED),
                io.Int.Input("steps", default=6, min=1, max=1000, tooltip="Intervals of the schedule, the "
                                                                          "last one to 0"),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
                    "Below 1 the schedule begins where this share of the model's timesteps is left, for "
                    "image to image")),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS",
                                      tooltip="For SamplerCustom, SamplerCustomAdvanced or Train AMED")],
        )

    @classmethod
    def execute(cls, model, calibration, steps, denoise) -> io.NodeOutput:
        found = needed(STATISTICS_KIND, calibration, "Fitted Scheduler")
        sampling = model.get_model_object("model_sampling")
        start = float(sampling.percent_to_sigma(1.0 - denoise) if denoise < 1.0 else sampling.sigma_max)
        return io.NodeOutput(torch.tensor(fitted_sigmas(found, steps, start, path_of(sampling))))


NODES: list[type[io.ComfyNode]] = [MeasureModel, TrainAmed, TuneFitted, LoadCalibration, SaveCalibration,
                                   ApplyCalibration, FittedScheduler]
