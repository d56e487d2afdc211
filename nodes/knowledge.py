"""Nodes that measure and learn what solvers need to know of a model."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..hosting import canonical, store, teaching
from ..hosting.events import say
from ..hosting.kinds import AMED_KIND, STATISTICS_KIND, kind_of
from ..hosting.library import Kind, kept, measuring_at, unfinished
from ..hosting.prompts import DOZEN, PROMPTS
from ..hosting.teaching import Lessons, beneath, lines
from ..samplers.learning.amed import BASES
from ..samplers.learning.measure import INTERVALS
from ..samplers.learning.refit import FEWEST, LARGEST
from ..samplers.learning.train_amed import TEACHER
from ..samplers.learning.train_hypersolver import ITERATIONS
from . import identity, picture
from .calibration_socket import SOCKET, needed, outputs, attached
from .guided_run import Run, measured
from .host import CATEGORY, SPECIAL, advanced, one_of

WHOSE = {"any": "auto", "this": "every prompt"}
"""The prompt that is measured at, and the rule under which samplers find it."""
FITTED = f"From {STATISTICS_KIND.makes} with fitted on, or a file of it"


def _model(what: str) -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model with its LoRAs, as it will be sampled"),
        io.Conditioning.Input("positive", tooltip=f"The prompt that will be sampled; {what}"),
        io.Conditioning.Input("negative", tooltip="The negative prompt that will be used"),
        io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=False, tooltip=(
            "The guidance that will be used. With prompt any it is rounded: to quarters below 2, halves "
            "below 5, whole numbers below 10, even ones above; else it serves within about 10 % of it")),
        io.Latent.Input("latent_image", tooltip=(
            "Its size is used, and other sizes are served too; as many images at once as it has: 1 takes the "
            "least memory")),
    ]


def _for(others: str) -> io.Input:
    return advanced(io.Combo.Input("prompt", options=[*WHOSE], default="any", tooltip=(
        "any: at no prompt in particular, as samplers do that measure by themselves. this: at the prompt "
        f"that is connected; {others}")))


def _seed(of: str) -> io.Input:
    """One that stays: the interface would else draw another for every run, and nothing was gone on with."""
    return advanced(io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False,
                                 tooltip=f"Of the noise {of}"))


def _save() -> io.Input:
    return io.Boolean.Input("save", default=True, tooltip=(
        "Write the result to models/solver_calibrations. Samplers find it there by themselves, unless it was "
        "learned at one prompt: then only where `measure` is every prompt"))


def _name() -> io.Input:
    return advanced(io.String.Input("name", default="", optional=True, tooltip=(
        "File name to save it under, with / for a subfolder; a number is added to one that is taken. Empty: "
        "the model's name and guidance")))


class Learning(io.ComfyNode):
    """A node that measures or learns, and may save what it found under a name of the user's."""

    @classmethod
    def validate_inputs(cls, name: str | None = "") -> bool | str:
        try:
            return not (name or "").strip() or bool(store.place(name))
        except ValueError as fault:
            return str(fault)


def _made(cls: type[io.ComfyNode], model: Any, result: Any, save: bool, name: str) -> io.NodeOutput:
    """What was measured of a model, saved if asked, its picture, which the node shows too, and the model with
    it."""
    kind = kind_of(result)
    if save and (path := kept(kind, result, name.strip())):
        taught = [*result.about.get("refits", {}).values(), result.about.get("hypersolver", {})]
        found = canonical.named(result.about) or any(told.get("prompts", 1) > 1 for told in taught)
        say(f"saved as {store.shown(path)}; samplers find it by themselves" + ("" if found else (
            " where `measure` is every prompt, and this is the prompt"))
            + ". Change the seed to see it: ComfyUI shows an old image again where nothing in its workflow "
            "has changed")
    image = picture.of(result)
    return io.NodeOutput(result, image, attached(model, result), ui=ui.PreviewImage(image, cls=cls))


def _measured(cls: type[io.ComfyNode], kind: Kind, prompt: str, save: bool, name: str, options: dict,
              how: dict, model: Any, positive: Any, negative: Any, cfg: float, latent_image: dict, seed: int,
              sigmas: Any = None) -> io.NodeOutput:
    """What a kind measures of a model at this prompt, or at nobody's; `options` are the solver's, and `how`
    the kind's."""

    def measure(run: Run) -> Any:
        run = replace(run, options=options)
        with measuring_at(kind, run, WHOSE[one_of("prompt", prompt, WHOSE)]) as about:
            return kind.measure(run, about, unfinished(kind, about, seed, *how.values()), seed=seed, **how)

    result = measured(model, [positive], negative, cfg, latent_image, seed, sigmas, measure)
    return _made(cls, model, result, save, name)



class MeasureModel(Learning):
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
                    "Measure what Fitted and the clock fitted need too: half as long again, and two "
                    "trajectories or more"))),
                _seed("of the measuring trajectories"),
                advanced(io.Int.Input("intervals", default=INTERVALS, min=4, max=500, tooltip=(
                    "Grid intervals in lambda: the time it takes goes with them"))),
                advanced(io.Int.Input("samples", default=0, min=0, max=256, tooltip=(
                    "Trajectories to average over. 0: as many as the latent's size asks for, at most 16"))),
                advanced(io.Combo.Input("pool", options=["all", "channel"], default="all", tooltip=(
                    "all: one number at each lambda; channel: one for every latent channel, without "
                    "fitted"))),
                _name(),
            ],
            outputs=outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, save=True, prompt="any", fitted=True,
                seed=0, intervals=INTERVALS, samples=0, pool="all", name="") -> io.NodeOutput:
        how, options = {"intervals": intervals, "samples": samples, "pool": pool}, {"choose_levels": True}
        return _measured(cls, STATISTICS_KIND, prompt, save, name, options if fitted else {}, how, model,
                         positive, negative, cfg, latent_image, seed)


class TrainAmed(Learning):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaTrainAmed",
            display_name="Train AMED",
            category=SPECIAL,
            description="Learns where AMED evaluates inside every step of one schedule of at most 10 steps, "
                        "and saves it: the AMED node with this base then finds it; in KSampler "
                        "lambda_amed finds base amed, lambda_amed_2m base dpmpp_2m. Takes as long as 30 to "
                        "150 images of that schedule, by the latent's size.",
            inputs=[
                *_model("read only for its size, unless `prompt` is this"),
                io.Sigmas.Input("sigmas", tooltip="The schedule to train for, as it will be sampled. AMED "
                                                  "evaluates twice in every interval but the last: n steps "
                                                  "are 2 n - 1 evaluations"),
                io.Combo.Input("base", options=list(BASES), default="dpmpp_2m", tooltip=(
                    "The rule that steps to the learned node and on: AMED's own, or another solver's "
                    "(AMED-Plugin). dpmpp_2m was the best in our measurements")),
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
                _name(),
            ],
            outputs=outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, sigmas, base, save=True, prompt="any",
                form="table", afs=False, seed=0, samples=0, teacher=TEACHER, name="") -> io.NodeOutput:
        if form == "predictor" and prompt == "any":
            raise ValueError("form = predictor with prompt = any: a predictor serves the prompt it was "
                             "trained at alone; set prompt to this, or form to table")
        options = {"base": base, "first_step": "afs" if afs else "evaluate"}
        return _measured(cls, AMED_KIND, prompt, save, name, options,
                         {"form": form, "samples": samples, "teacher": teacher},
                         model, positive, negative, cfg, latent_image, seed, sigmas)


class TuneFitted(Learning):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaTuneFitted",
            display_name="Tune Fitted",
            category=CATEGORY,
            description="Learns levels and weights of lambda_fitted for one number of steps from its own "
                        "runs on the model, for all prompts from a dozen, or for one: worth it without "
                        "guidance (cfg 1). Takes as long as 110 images of 20 steps for 5 steps, and 220 for "
                        "8; twice that for small latents; for one prompt 33 to 67 for 5 steps.",
            inputs=[
                *_model("beside those below; alone, what is learned is used for it only"),
                SOCKET.Input("calibration", tooltip=FITTED),
                io.Int.Input("steps", default=5, min=FEWEST, max=LARGEST + 1, tooltip=(
                    "KSampler's steps that it is for: other numbers stay as they were")),
                io.Clip.Input("clip", optional=True, tooltip=(
                    "The checkpoint's own: it reads the prompts below, and is needed unless there are none. "
                    "What else the positive input has (guidance, sizes, ControlNet) they get from it")),
                io.String.Input("prompts", default="\n".join(DOZEN), multiline=True, optional=True, tooltip=(
                    "One a line, a dozen or more. What is learned from several is used for every prompt, if "
                    "it helps on those that select. Empty: for the positive one alone, which lambda_fitted "
                    "takes where `measure` is every prompt")),
                _save(),
                _seed("it learns from"),
                advanced(io.Int.Input("samples", default=0, min=0, max=64, tooltip=(
                    "Images; the last quarter selects among what the others teach. 0: 4 to 8 by the latent's "
                    "size, and at least one or two for each prompt"))),
                _name(),
            ],
            outputs=outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent_image, calibration, steps, clip=None, prompts="",
                save=True, seed=0, samples=0, name="") -> io.NodeOutput:
        found = needed(STATISTICS_KIND, calibration, "Tune Fitted")
        positives = [positive, *_read(prompts, clip, positive)]

        def measure(run: Run) -> Any:
            about = {**identity.description(run.guider), "prompts": len(positives)}
            partial = unfinished(STATISTICS_KIND, about, "refit", steps, seed, samples)
            return STATISTICS_KIND.refit(run, found, steps, about, partial, seed=seed, samples=samples)

        result = measured(model, positives, negative, cfg, latent_image, seed, None, measure)
        return _made(cls, model, result, save and bool(result.plans), name)


def _read(prompts: str, clip: Any, like: Any) -> list[Any]:
    """Conditions for every line, with what else `like` has, if there is one."""
    texts = lines(prompts)
    if texts and clip is None:
        raise ValueError(f"prompts has {len(texts)} lines and nothing reads them: connect the checkpoint's "
                         "CLIP to clip, or leave prompts empty")
    others = like[0][1] if like else {}
    return [[[tensor, {**others, **more}]
             for tensor, more in clip.encode_from_tokens_scheduled(clip.tokenize(line))]
            for line in texts]


class TrainHypersolver(Learning):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LambdaTrainHypersolver",
            display_name="Train Hypersolver",
            category=CATEGORY,
            description="Trains a small network that adds what every step of lambda_fitted misses, for all "
                        "prompts, a range of guidances and of numbers of steps, and saves it: lambda_fitted "
                        "then finds it. No data, and no gradients of the model. Takes as long as about "
                        "2 images of 20 steps for each image it learns from: 460 with the built-in prompts.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its LoRAs, as it will be sampled"),
                io.Clip.Input("clip", tooltip="The checkpoint's own: it reads the prompts"),
                io.Conditioning.Input("negative", tooltip="The negative prompt that will be used"),
                io.Conditioning.Input("positive", optional=True, tooltip=(
                    "What the prompts have beside their texts they get from it: FluxGuidance, SDXL's sizes, "
                    "ControlNet. Its own text is not used")),
                io.Latent.Input("latent_image", tooltip=(
                    "Its size is trained at, and serves others too; as many images at once as it has: 1 "
                    "takes the least memory, and no longer")),
                SOCKET.Input("calibration", optional=True, tooltip=(
                    f"From {STATISTICS_KIND.makes} with fitted on, at a guidance of the range. Without: a "
                    "saved one of this model is taken, or measured first")),
                _guidance("cfg_low", 5.0, "Lowest"),
                _guidance("cfg_high", 9.0, "Highest"),
                io.String.Input("prompts", default="\n".join(PROMPTS), multiline=True, tooltip=(
                    "One a line, of all that the model will be used for: the more and the more varied, the "
                    "better it serves others")),
                io.Int.Input("images", default=2, min=1, max=64, tooltip=(
                    "Of every prompt: twice as many take twice as long")),
                _save(),
                _seed("it learns from"),
                _steps("fewest", 4, "The fewest"),
                _steps("most", 10, "The most"),
                advanced(io.Int.Input("training", default=ITERATIONS, min=1, max=100_000, tooltip=(
                    "Steps of the network's training, twice so many in all: they take time on the device, "
                    "but no evaluations of the model"))),
                _name(),
            ],
            outputs=outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, negative, latent_image, cfg_low, cfg_high, prompts, images, positive=None,
                calibration=None, save=True, seed=0, fewest=4, most=10, training=ITERATIONS,
                name="") -> io.NodeOutput:
        lessons = Lessons(lines(prompts), images, cfg_low, cfg_high, fewest, most, training, seed)
        positives, middle = _read(prompts, clip, positive), lessons.middle
        if calibration is None:
            calibration = measured(model, positives[:1], negative, middle, latent_image, seed, None, beneath)
        found = needed(STATISTICS_KIND, calibration, "Train Hypersolver")

        def teach(run: Run) -> Any:
            return teaching.teach(run, found, lessons, identity.description(run.guider))

        shares = [guidance / middle for guidance in lessons.guidances]
        result = measured(model, positives, negative, middle, latent_image, seed, None, teach, shares)
        return _made(cls, model, result, save and result is not found, name)


def _guidance(name: str, default: float, which: str) -> io.Input:
    return io.Float.Input(name, default=default, min=1.0, max=100.0, step=0.1, round=False, tooltip=(
        f"{which} guidance it is trained for, and will be used at. Both the same: for that one; 1 for models "
        "without guidance, whose unconditional answer is not asked for"))


def _steps(name: str, default: int, which: str) -> io.Input:
    return advanced(io.Int.Input(name, default=default, min=FEWEST, max=20, tooltip=(
        f"{which} of KSampler's steps that it is trained for")))


NODES: list[type[io.ComfyNode]] = [MeasureModel, TrainAmed, TuneFitted, TrainHypersolver]
