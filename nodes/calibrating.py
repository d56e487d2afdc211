"""Nodes that measure, save, load and attach what solvers need to know of a model."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..samplers import fitted_sigmas
from ..samplers.learning.amed import BASES
from ..samplers.learning.measure import INTERVALS
from ..samplers.learning.refit import FEWEST, LARGEST, refit_cost
from ..samplers.learning.train_amed import TEACHER
from . import calibration, identity, picture, store
from .calibration import Kind, Run
from .host import path_of
from .kinds import AMED_KIND, STATISTICS_KIND, AmedKind, StatisticsKind

CATEGORY = "Lambda Solvers/calibration"
PICTURES = {STATISTICS_KIND: "The curves l, s, b and gamma over lambda; if measured for fitting, the error to expect",
            AMED_KIND: "r, c and a of every step, and the error after it, untrained and trained"}
SOCKETS = {STATISTICS_KIND: io.Custom("LAMBDA_STATISTICS"), AMED_KIND: io.Custom("LAMBDA_AMED")}


def advanced(widget: io.Input) -> io.Input:
    widget.extra_dict = {"advanced": True}  # not an argument yet in ComfyUI 0.3.75
    return widget


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


def _outputs(kind: Kind, word: str, uses: str) -> list[io.Output]:
    return [SOCKETS[kind].Output(display_name=word.upper(), tooltip=f"For {uses}"),
            io.Image.Output(display_name="picture", tooltip=PICTURES[kind])]


def _partial(kind: Kind, about: dict[str, Any], *settings: object) -> Any:
    """Where a measurement of these settings is kept until it is whole."""
    return store.partial("-".join([calibration.file_name(kind, about), *map(str, settings)]))


def _shown(cls: type[io.ComfyNode], result: Any, draw: Callable[[Any], Tensor]) -> io.NodeOutput:
    """What was measured, and its picture, which the node shows too."""
    image = draw(result)
    return io.NodeOutput(result, image, ui=ui.PreviewImage(image, cls=cls))


class EstimateStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaEstimateStatistics",
            display_name="Estimate Solver Statistics",
            category=CATEGORY,
            description="Measures what DPM-Solver-v3 needs to know of a model, at one prompt and guidance: about 55 "
                        "evaluations of a small batch, no training, no data. Best for that prompt; good for any size.",
            inputs=[
                *_model("for other prompts the part of the statistics that belongs to the prompt is left out"),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Of the noise of the measuring trajectories"),
                advanced(io.Int.Input("intervals", default=INTERVALS, min=4, max=500, tooltip=(
                    "Grid intervals in lambda; each costs two evaluations"))),
                advanced(io.Int.Input("samples", default=0, min=0, max=256, tooltip=(
                    "Trajectories to average over. 0: as many as the latent's size asks for, at most 16"))),
                advanced(io.Combo.Input("pool", options=["all", "channel"], default="all", tooltip=(
                    "all: one number at each lambda; channel: one for every latent channel"))),
                advanced(io.Boolean.Input("fitted", default=False, optional=True, tooltip=(
                    "Keep what Fitted Multistep and Fitted Sigmas need too: half as many evaluations more"))),
            ],
            outputs=_outputs(STATISTICS_KIND, "Statistics", f"the DPM-Solver-v3 and Fitted Multistep nodes, Save or Apply {STATISTICS_KIND.title}"),
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, seed, intervals, samples, pool, fitted=False) -> io.NodeOutput:
        def measure(run: Run) -> Any:
            about = {**calibration.described(STATISTICS_KIND, run), **({"fitted": True} if fitted else {})}
            partial = _partial(STATISTICS_KIND, about, seed, intervals, samples, pool)
            return STATISTICS_KIND.measure(run, about, partial, seed=seed, intervals=intervals,
                                           samples=samples, pool=pool)

        result = calibration.measured(model, [positive], negative, cfg, latent_image, seed, None, measure)
        return _shown(cls, result, picture.curves)


class FittedSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaFittedSigmas",
            display_name="Fitted Sigmas",
            category="Lambda Solvers",
            description="The noise levels that Fitted Multistep would choose, as a schedule for any sampler: where so many evaluations "
                        "leave the least error on the model that was measured. It chooses for DPM-Solver-v3's own steps.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: its noise levels are used"),
                SOCKETS[STATISTICS_KIND].Input("statistics", tooltip=(
                    f"From {STATISTICS_KIND.makes} with fitted on, or Load {STATISTICS_KIND.title}")),
                io.Int.Input("steps", default=6, min=1, max=1000, tooltip="Intervals of the schedule, the last one to 0"),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
                    "Below 1 the schedule begins where this share of the model's timesteps is left, for image to image")),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="For SamplerCustom, SamplerCustomAdvanced or Train AMED")],
        )

    @classmethod
    def execute(cls, model, statistics, steps, denoise) -> io.NodeOutput:
        sampling = model.get_model_object("model_sampling")
        start = float(sampling.sigma_max) if denoise == 1.0 else float(sampling.percent_to_sigma(1.0 - denoise))
        return io.NodeOutput(torch.tensor(fitted_sigmas(statistics, steps, start, path_of(sampling))))


class RefitStatistics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaRefitStatistics",
            display_name="Refit Fitted Multistep",
            category=CATEGORY,
            description="Learns levels and weights of lambda_fitted for one number of steps from its own runs on the model, for one prompt "
                        f"or, given several, for all: by forward evaluations alone, at most {refit_cost(5)} of a small batch for 5 steps "
                        f"and {refit_cost(8)} for 8, after the measurement.",
            inputs=[
                *_model("what is learned is used for this prompt only, unless there are more prompts below"),
                SOCKETS[STATISTICS_KIND].Input("statistics", tooltip=(
                    f"From {STATISTICS_KIND.makes} with fitted on, or Load {STATISTICS_KIND.title}")),
                io.Int.Input("steps", default=5, min=FEWEST, max=LARGEST + 1, tooltip=(
                    "KSampler's steps that it is for: other numbers stay as they were")),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Of the noise it learns from"),
                advanced(io.Int.Input("samples", default=0, min=0, max=64, tooltip=(
                    "Images; the last quarter selects among what the others teach. 0: 4 to 8 by the latent's size, "
                    "and at least one or two for each prompt"))),
                io.Clip.Input("clip", optional=True, tooltip="Reads the prompts below; what else the positive input has (guidance, sizes, "
                                                             "ControlNet) they get from it"),
                io.String.Input("prompts", default="", multiline=True, optional=True, tooltip=(
                    "More prompts, one a line, a dozen or more. What is learned from several is used for every prompt, if it helps on those "
                    "that select")),
            ],
            outputs=_outputs(STATISTICS_KIND, "Statistics", f"the Fitted Multistep node, Save or Apply {STATISTICS_KIND.title}"),
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, statistics, steps, seed, samples, clip=None, prompts="") -> io.NodeOutput:
        positives = [positive, *_read(prompts, clip, positive)]

        def measure(run: Run) -> Any:
            about = {**identity.description(run.guider), "prompts": len(positives)}
            partial = _partial(STATISTICS_KIND, about, "refit", steps, seed, samples)
            return STATISTICS_KIND.refit(run, statistics, steps, about, partial, seed=seed, samples=samples)

        result = calibration.measured(model, positives, negative, cfg, latent_image, seed, None, measure)
        return _shown(cls, result, picture.curves)


def _read(prompts: str, clip: Any, like: Any) -> list[Any]:
    """Conditions for every line, with what else `like` has."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if lines and clip is None:
        raise ValueError(f"prompts has {len(lines)} lines and nothing reads them: connect the checkpoint's CLIP to clip, or leave prompts "
                         "empty")
    return [[[tensor, {**like[0][1], **more}] for tensor, more in clip.encode_from_tokens_scheduled(clip.tokenize(line))]
            for line in lines]


class TrainAmed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaTrainAmed",
            display_name="Train AMED",
            category=CATEGORY,
            description="Learns where AMED evaluates inside every step of one schedule, at one prompt and guidance: by forward "
                        "evaluations alone, 11 to 15 times those of one image, on a small batch.",
            inputs=[
                *_model("what is learned serves other prompts less well"),
                io.Sigmas.Input("sigmas", tooltip="The schedule to train for, as it will be sampled. AMED evaluates twice in "
                                                  "every interval but the last: n steps are 2 n - 1 evaluations"),
                io.Combo.Input("base", options=list(BASES), default="amed", tooltip=(
                    "The rule that steps to the learned node and on: AMED's own, or another solver's (AMED-Plugin)")),
                io.Combo.Input("form", options=["table", "predictor"], default="table", tooltip=(
                    "table: one (r, c, a) for every step; predictor: a small network on top of it that looks at the image, for "
                    "U-Nets, at 2 to 6 times the cost and for the prompt it was trained on: others it mostly harmed")),
                io.Boolean.Input("afs", default=False, tooltip=(
                    "The analytic first step: one evaluation less, worth it for models with a very high sigma_max")),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, tooltip="Of the noise it is trained on"),
                advanced(io.Int.Input("samples", default=0, min=0, max=64, tooltip=(
                    "Images to learn from, with a quarter more that test a table, or select a predictor. 0: 2 to 8 by the latent's "
                    "size"))),
                advanced(io.Int.Input("teacher", default=TEACHER, min=2, max=64, tooltip=(
                    "Steps of the teacher in every interval: what AMED learns to land on"))),
            ],
            outputs=_outputs(AMED_KIND, "Amed", "the AMED node, Save or Apply AMED"),
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, sigmas, base, form, afs, seed, samples, teacher) -> io.NodeOutput:
        def measure(run: Run) -> Any:
            run = replace(run, options={"base": base, "first_step": "afs" if afs else "evaluate"})
            about = calibration.described(AMED_KIND, run)
            partial = _partial(AMED_KIND, about, form, seed, samples, teacher)
            return AMED_KIND.measure(run, about, partial, seed=seed, samples=samples, form=form,
                                     teacher=teacher)

        result = calibration.measured(model, [positive], negative, cfg, latent_image, seed, sigmas, measure)
        return _shown(cls, result, picture.training)


def _kept(kind: StatisticsKind | AmedKind, word: str, node: str, serves: str, draw: Any) -> list[type[io.ComfyNode]]:
    """Save, Load and Apply of one kind; `word` is its name in ids and inputs, and `node` the title of the sampler's node."""
    socket, name = SOCKETS[kind], word.lower()

    class Save(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=f"LambdaSave{word}",
                display_name=f"Save {kind.title}",
                category=CATEGORY,
                description=f"Writes {kind.title} to models/solver_calibrations, a small file to share.",
                inputs=[
                    socket.Input(name, tooltip=f"From {kind.makes}"),
                    io.String.Input("name", default="", tooltip="File name; empty: the model's name and guidance, and a number if there is one"),
                    io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name"),
                ],
                is_output_node=True,
            )

        @classmethod
        def execute(cls, name: str, overwrite: bool, **content: Any) -> io.NodeOutput:
            [content] = content.values()
            path = store.place(name) if name.strip() else store.free(calibration.file_name(kind, dict(content.about)))
            try:
                content.save(path, overwrite=overwrite)
            except FileExistsError:
                raise FileExistsError(f"{path.name} exists in {store.FOLDER}: choose another name, or overwrite it") from None
            said = f"saved as {path.relative_to(store.directory()).as_posix()}"
            calibration.say(said)
            return io.NodeOutput(ui={"text": [said]})

    class Load(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=f"LambdaLoad{word}",
                display_name=f"Load {kind.title}",
                category=CATEGORY,
                description=f"Reads {kind.title} from models/solver_calibrations.",
                inputs=[io.Combo.Input("name", options=store.names(), tooltip="A file of models/solver_calibrations")],
                outputs=_outputs(kind, word, f"the {node} node or Apply {kind.title}"),
            )

        @classmethod
        def execute(cls, name: str) -> io.NodeOutput:
            loaded = kind.type.load(store.existing(name))
            return io.NodeOutput(loaded, draw(loaded))

        @classmethod
        def validate_inputs(cls, name: str) -> bool:
            return True  # a file that is gone is named when the node runs, with the remedy; ComfyUI's own check would not say it

        @classmethod
        def fingerprint_inputs(cls, name: str) -> float:
            return store.existing(name).stat().st_mtime

    class Apply(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=f"LambdaApply{word}",
                display_name=f"Apply {kind.title}",
                category=CATEGORY,
                description=f"Attaches {kind.title} to a model, for {serves} in the plain KSampler.",
                inputs=[io.Model.Input("model", tooltip="The model that was measured, or one like it"),
                        socket.Input(name, tooltip=f"From {kind.makes} or Load {kind.title}")],
                outputs=[io.Model.Output(display_name="MODEL", tooltip=f"The same model, with {kind.title} attached")],
            )

        @classmethod
        def execute(cls, model, **content: Any) -> io.NodeOutput:
            patched = model.clone()
            [content] = content.values()
            patched.set_attachments(kind.attachment, content)
            return io.NodeOutput(patched)

    for made in (Save, Load, Apply):
        made.__name__ = made.__qualname__ = f"{made.__name__}{word}"
    return [Save, Load, Apply]


NODES: list[type[io.ComfyNode]] = [
    EstimateStatistics, RefitStatistics, FittedSigmas, *_kept(STATISTICS_KIND, "Statistics", "DPM-Solver-v3", "dpm_solver_v3 and lambda_fitted", picture.curves),
    TrainAmed, *_kept(AMED_KIND, "Amed", "AMED", "amed and amed_dpmpp_2m", picture.training)]
