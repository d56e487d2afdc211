"""Write example_workflows/: python dev/workflows.py [name ...] makes each workflow and, from a real run, its
thumbnail.

A workflow is a function below that lays nodes on a canvas. What the user interface stores besides (the order
of widgets, slots and their types) comes from the server's /object_info; ids of packs and models are stamped
as the interface and ComfyUI-Manager do on save. A new example is one function with @example; its docstring is
the note that a reader sees.

Thumbnails are made by the tiny emoji checkpoint in place of the one the workflow names: they show the way,
not the quality.
"""
from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

FOLDER = environment.ROOT / "example_workflows"
OURS = {"cnr_id": "lambda-solvers",
        "ver": re.search(r'^version = "(.*)"', (environment.ROOT / "pyproject.toml").read_text(), re.M)[1]}
CORE = {"cnr_id": "comfy-core", "ver": "0.3.75"}
NOTES = ("Note", "MarkdownNote")  # of the user interface, unknown to the server
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
HUB = "https://huggingface.co/Comfy-Org/"
MODELS = {
    name: {"name": name, "url": f"{HUB}{place}/resolve/main/{name}", "directory": "checkpoints"}
    for place, name in (("stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors"),
                        ("stable-diffusion-3.5-fp8", "sd3.5_large_fp8_scaled.safetensors"))
}
GAP, WIDTH = 40, 330
# what web/js adds to the height of nodes whose class begins so
PANEL = {"LambdaSampler": 200, "KSampler": 100}
# and the interface, once it shows the image while it is sampled
PREVIEW = {"KSampler": 320, "SamplerCustom": 320}


class Output(NamedTuple):
    node: int
    slot: int


@dataclass(frozen=True)
class Node:
    """A node on a canvas; node[k] is its k-th output."""

    id: int

    def __getitem__(self, slot: int) -> Output:
        return Output(self.id, slot)


class Canvas:
    """A workflow in the making, as the user interface saves it. Nodes are laid in columns, from the top
    down."""

    def __init__(self, name: str, object_info: dict[str, dict], about: str = "") -> None:
        self.name, self.info, self.about = name, object_info, about
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list] = []
        self.groups: list[dict[str, Any]] = []
        self.x, self.y, self.width, self.right = 0, 0, 0, 0

    def column(self, title: str, width: int = WIDTH) -> None:
        """Go on in a new column with this title, of this width."""
        self.close()
        self.x, self.y, self.width = self.right, 0, width
        self.right += width + 2 * GAP
        self.groups.append(
            {"id": len(self.groups) + 1, "title": title, "color": "#3f789e", "font_size": 22, "flags": {}})

    def close(self) -> None:
        if self.groups:
            self.groups[-1]["bounding"] = [self.x - GAP // 2, -80, self.width + GAP, self.y + 80]

    def note(self, text: str) -> None:
        height = 40 + 22 * sum(1 + len(line) // 38 for line in text.splitlines())
        self._place("MarkdownNote", {}, [], [text], [], height, None)

    def add(self, kind: str, title: str | None = None, tall: int | None = None, **inputs: Any) -> Node:
        """A node with these inputs: another node's output, or a widget's value; other widgets keep their
        defaults. `tall` pixels are for what it will show.
        """
        info, slots, values, lines = self.info[kind], [], [], 0
        unused = set(inputs)
        for name, (type_,
                   *rest) in {**info["input"].get("required", {}),
                              **info["input"].get("optional", {})}.items():
            options = rest[0] if rest else {}
            unused.discard(name)
            if isinstance(type_, list) or type_ in WIDGETS:
                choices = type_ if isinstance(type_, list) else options.get("options", [None])
                values.append(inputs[name] if name in inputs else options["default"] if "default" in
                              options else choices[0])
                lines += 5 if options.get("multiline") else 1
                if options.get("control_after_generate", name in ("seed", "noise_seed")):
                    values.append("fixed")
                    lines += 1
                if options.get("image_upload"):
                    values.append("image")  # the interface's own button
                    lines += 1
                continue
            slots.append({"name": name, "type": type_, "link": self._link(inputs.get(name), len(slots))})
        if unused:
            raise ValueError(f"{self.name}: {kind} has no input {', '.join(unused)}")
        outputs = [{"name": name, "type": type_, "links": []}
                   for name, type_ in zip(info["output_name"], info["output"])]
        stamp = OURS if kind.startswith("Lambda") else CORE
        models = {"models": [MODELS[value] for value in values if value in MODELS]}
        properties = {**stamp, **{key: value for key, value in models.items() if value}}
        shown = sum(more for table in (PANEL, PREVIEW) for start, more in table.items()
                    if kind.startswith(start))
        height = tall or 60 + 22 * max(len(slots), len(outputs)) + 26 * lines + shown
        return self._place(kind, properties, slots, values, outputs, height, title)

    def saved(self) -> dict[str, Any]:
        self.close()
        for link, source, slot, *_ in self.links:
            self.nodes[source - 1]["outputs"][slot]["links"].append(link)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "lambda-solvers/" + self.name)), "revision": 0,
            "last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
            "links": self.links, "groups": self.groups, "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [105, 230]}}, "version": 0.4
        }

    def _link(self, source: Output | None, slot: int) -> int | None:
        """A link from `source` to a slot of the node that will be placed next."""
        if source is None:
            return None
        type_ = self.nodes[source.node - 1]["outputs"][source.slot]["type"]
        self.links.append([len(self.links) + 1, source.node, source.slot, len(self.nodes) + 1, slot, type_])
        return len(self.links)

    def _place(self, kind: str, properties: dict, slots: list, values: list, outputs: list, height: int,
               title: str | None) -> Node:
        data = {
            "id": len(self.nodes) + 1, "type": kind, "pos": [self.x, self.y], "size": [self.width, height],
            "flags": {}, "order": len(self.nodes), "mode": 0, "inputs": slots, "outputs": outputs,
            "properties": {"Node name for S&R": kind,
                           **properties}, "widgets_values": values, **({"title": title} if title else {})
        }
        self.nodes.append(data)
        self.y += height + GAP + 20
        return Node(data["id"])


# --- the examples -------------------------------------------------------------------------------------------

EXAMPLES: dict[str, Callable[[Canvas], None]] = {}
SD, SD3 = MODELS
PROMPT, NEGATIVE = "a panda in a bamboo forest, morning light", "text, watermark"
CLASSIFIER = "emoji_colours.safetensors"
MEASURED = "a portrait of an old sailor, studio light"
SEVERAL = ("a bowl of ramen on a wooden table", "city street at night, neon signs, rain",
           "an oil painting of a lighthouse in a storm", "a red sports car on a mountain road",
           "a cat sleeping on a windowsill", "a knight in armour, fantasy illustration",
           "a modern living room, soft daylight", "a field of sunflowers under a blue sky",
           "a watercolour of two foxes in snow", "a close-up of a bee on a flower",
           "a steam train crossing a stone bridge")


def example(lay: Callable[[Canvas], None]) -> Callable[[Canvas], None]:
    EXAMPLES[lay.__name__] = lay
    return lay


class Start(NamedTuple):
    model: Output
    clip: Output
    vae: Output
    positive: Output
    negative: Output
    latent: Output


def start(canvas: Canvas, checkpoint: str = SD, latent: str = "EmptyLatentImage", size: int = 512) -> Start:
    """Loader, prompts and an empty latent, with a note of what the workflow is."""
    canvas.column("1  Model and prompt")
    loader = canvas.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    positive = canvas.add("CLIPTextEncode", "Prompt", clip=loader[1], text=PROMPT)
    negative = canvas.add("CLIPTextEncode", "Negative prompt", clip=loader[1], text=NEGATIVE)
    empty = canvas.add(latent, width=size, height=size)
    canvas.note(canvas.about)
    return Start(loader[0], loader[1], loader[2], positive[0], negative[0], empty[0])


def save(canvas: Canvas, title: str, samples: Output, vae: Output) -> None:
    canvas.column(title)
    image = canvas.add("VAEDecode", samples=samples, vae=vae)
    canvas.add("SaveImage", tall=400, images=image[0], filename_prefix="lambda")


def sample_with(canvas: Canvas, got: Start, calibration: Node, **how: Any) -> None:
    """A third column with KSampler on the model that has this calibration, and a fourth with its image."""
    canvas.column("3  Sample with it")
    latent = canvas.add("KSampler", model=calibration[2], positive=got.positive, negative=got.negative,
                        latent_image=got.latent, seed=1, cfg=5.0, **how)
    save(canvas, "4  Image", latent[0], got.vae)


def custom(canvas: Canvas, got: Start, sampler: Node, cfg: float, scheduler: str, steps: int) -> Output:
    """SamplerCustomAdvanced and what it needs, in the current column."""
    guider = canvas.add("CFGGuider", model=got.model, positive=got.positive, negative=got.negative, cfg=cfg)
    return guided(canvas, got, sampler, guider, scheduler, steps)


def guided(canvas: Canvas, got: Start, sampler: Node, guider: Node, scheduler: str, steps: int) -> Output:
    sigmas = canvas.add("BasicScheduler", model=got.model, scheduler=scheduler, steps=steps)
    noise = canvas.add("RandomNoise", noise_seed=1)
    return canvas.add("SamplerCustomAdvanced", noise=noise[0], guider=guider[0], sampler=sampler[0],
                      sigmas=sigmas[0], latent_image=got.latent)[0]


@example
def ksampler(canvas: Canvas) -> None:
    """First run: Lambda Solvers in KSampler

    `lambda_2m` measures nothing, and takes any number of steps. For 5 to 8 steps choose `lambda_fitted`: its
    first run measures the model, and later ones find the file. sampler_name lists `lambda_3m`, the SDE
    samplers, `lambda_v3` and `lambda_amed` too. If KSampler says `value_not_in_list`, install the pack
    *lambda-solvers*.
    """
    got = start(canvas)
    canvas.column("2  Sample")
    latent = canvas.add("KSampler", model=got.model, positive=got.positive, negative=got.negative,
                        latent_image=got.latent, seed=1, steps=12, cfg=5.0, sampler_name="lambda_2m",
                        scheduler="karras")
    canvas.add("LambdaSamplerMultistep", "lambda_2m as a node, with all its options")
    canvas.note(
        "The node above is not connected: it is what `lambda_2m` stands for, to be tried with SamplerCustom "
        "(see the example *sampler_node*).")
    save(canvas, "3  Image", latent[0], got.vae)


@example
def sampler_node(canvas: Canvas) -> None:
    """A solver as a node

    Every family of solvers has a node with all its options (category *Lambda Solvers*); connect it to
    `sampler` of SamplerCustomAdvanced or SamplerCustom.
    """
    got = start(canvas)
    canvas.column("2  Sample")
    save(canvas, "3  Image", custom(canvas, got, canvas.add("LambdaSamplerMultistep"), 5.0, "sgm_uniform",
                                    12), got.vae)


@example
def predictor_corrector(canvas: Canvas) -> None:
    """Predictor and corrector

    Score SDE's sampler: every step is a predictor's, and a Langevin step before it brings the image nearer to
    the distribution at its level. Two model evaluations a step, and many steps: 60 here. `corrector_steps` 0
    leaves the predictor alone.
    """
    got = start(canvas)
    canvas.column("2  Sample")
    save(canvas, "3  Image", custom(canvas, got, canvas.add("LambdaSamplerPc"), 5.0, "karras", 60),
         got.vae)


@example
def lambda_v3(canvas: Canvas) -> None:
    """DPM-Solver-v3 that calibrates itself

    The first run measures the model at this guidance (as long as a few images, with progress on the sampler)
    and saves a small file in `models/solver_calibrations`; later runs find it. In KSampler the same is
    `lambda_v3`.
    """
    got = start(canvas)
    canvas.column("2  Sample")
    save(canvas, "3  Image", custom(canvas, got, canvas.add("LambdaSamplerV3"), 5.0, "sgm_uniform", 8),
         got.vae)


@example
def flow_models(canvas: Canvas) -> None:
    """Flow models (SD3, Flux and others)

    The solvers find out by themselves that a model is a flow model and work in its true half-log-SNR, log((1
    - sigma) / sigma). Nothing is to be set.
    """
    got = start(canvas, SD3, "EmptySD3LatentImage", 1024)
    canvas.column("2  Sample")
    save(canvas, "3  Image", custom(canvas, got, canvas.add("LambdaSamplerMultistep"), 4.5, "simple", 16),
         got.vae)


@example
def img2img(canvas: Canvas) -> None:
    """Image to image

    `denoise` of BasicScheduler says how much is made anew: 0.6 keeps the composition. All solvers of the pack
    take such schedules.
    """
    canvas.column("1  Model, prompt and image")
    loader = canvas.add("CheckpointLoaderSimple", ckpt_name=SD)
    positive = canvas.add("CLIPTextEncode", "Prompt", clip=loader[1], text=PROMPT)
    negative = canvas.add("CLIPTextEncode", "Negative prompt", clip=loader[1], text=NEGATIVE)
    canvas.note(canvas.about)
    # last: how tall it becomes depends on the image
    image = canvas.add("LoadImage", tall=400, image="example.png")
    canvas.column("2  Sample")
    latent = canvas.add("VAEEncode", pixels=image[0], vae=loader[2])
    sampler = canvas.add("LambdaSamplerMultistep")
    sigmas = canvas.add("BasicScheduler", model=loader[0], scheduler="karras", steps=10, denoise=0.6)
    sampled = canvas.add("SamplerCustom", model=loader[0], positive=positive[0], negative=negative[0],
                         sampler=sampler[0], sigmas=sigmas[0], latent_image=latent[0], noise_seed=1, cfg=5.0)
    save(canvas, "3  Image", sampled[0], loader[2])


@example
def measure_and_share(canvas: Canvas) -> None:
    """Measure once, share the file

    Measure Model measures the model (its picture shows the curves) and saves it in
    `models/solver_calibrations`, so that `lambda_v3` and `lambda_fitted` find it by themselves. Share the
    file from there; its input `name` gives it a name of yours. A file of somebody else's: put it there, and
    use Load Calibration instead of Measure Model.
    """
    got = start(canvas)
    canvas.column("2  Measure and save")
    measured = canvas.add("LambdaMeasureModel", model=got.model, positive=got.positive, negative=got.negative,
                          latent_image=got.latent, tall=760)
    sample_with(canvas, got, measured, steps=8, sampler_name="lambda_v3", scheduler="sgm_uniform")


@example
def few_steps(canvas: Canvas) -> None:
    """Five steps for every prompt: lambda_fitted

    Column 2 runs once: Measure Model measures the model, Tune Fitted learns noise levels and weights for 5
    steps from all the prompts written in it (best: some like your own), and both save a file. Afterwards only
    KSampler runs, with any prompt. For another number of steps change it in Tune Fitted and in KSampler; the
    guidance is in three places. Once the file is there, `lambda_fitted` finds it without column 2. It gains
    the most without guidance (cfg 1); with it the example hypersolver gains more.
    """
    got = start(canvas)
    canvas.column("2  Measure and learn, once")
    prompt = canvas.add("CLIPTextEncode", "Prompt to measure on", clip=got.clip, text=MEASURED)
    measured = canvas.add("LambdaMeasureModel", model=got.model, positive=prompt[0], negative=got.negative,
                          latent_image=got.latent, tall=760)
    tuned = canvas.add("LambdaTuneFitted", model=got.model, positive=prompt[0], negative=got.negative,
                       calibration=measured[0], latent_image=got.latent, steps=5, clip=got.clip,
                       prompts="\n".join(SEVERAL), tall=820)
    canvas.y += 520  # Nodes 2.0 stretches the text over all of the node, and adds the picture below
    sample_with(canvas, got, tuned, steps=5, sampler_name="lambda_fitted", scheduler="karras")


@example
def hypersolver(canvas: Canvas) -> None:
    """Four to ten steps for every prompt: the hypersolver

    Train Hypersolver runs once for a checkpoint, for hours: as long as 460 images of 20 steps, which it
    says before it starts. Cancel keeps what is done, and the next run goes on from there. Give it prompts
    like yours, one a line, and the range of guidance that you use. Afterwards `lambda_fitted` finds the
    file by itself, without column 2, for any prompt and size.
    """
    got = start(canvas)
    canvas.column("2  Train, once", 420)
    trained = canvas.add("LambdaTrainHypersolver", model=got.model, clip=got.clip, negative=got.negative,
                         latent_image=got.latent, tall=900)
    canvas.y += 240  # Nodes 2.0 adds the picture below
    canvas.column("3  Sample with it")
    latent = canvas.add("KSampler", model=trained[2], positive=got.positive, negative=got.negative,
                        latent_image=got.latent, seed=1, steps=6, cfg=7.0, sampler_name="lambda_fitted",
                        scheduler="karras")
    save(canvas, "4  Image", latent[0], got.vae)


@example
def lambda_amed(canvas: Canvas) -> None:
    """AMED at 5 evaluations

    Train AMED learns, for one schedule, where to look a second time inside every step (its picture shows r,
    c, a and the error); 3 steps are 5 evaluations, because the last one, to sigma 0, takes one. Train it
    again after a change of model, guidance or schedule. In KSampler the same is `lambda_amed_2m`, which finds
    what was saved, or trains by itself.
    """
    got = start(canvas)
    canvas.column("2  Train for this schedule")
    sigmas = canvas.add("BasicScheduler", model=got.model, scheduler="karras", steps=3)
    trained = canvas.add("LambdaTrainAmed", model=got.model, positive=got.positive, negative=got.negative,
                         latent_image=got.latent, sigmas=sigmas[0], tall=720)
    canvas.column("3  Sample with it")
    sampler = canvas.add("LambdaSamplerAmed", calibration=trained[0])
    sampled = canvas.add("SamplerCustom", model=got.model, positive=got.positive, negative=got.negative,
                         sampler=sampler[0], sigmas=sigmas[0], latent_image=got.latent, noise_seed=1, cfg=5.0)
    save(canvas, "4  Image", sampled[0], got.vae)


@example
def compare_samplers(canvas: Canvas) -> None:
    """Compare samplers at equal model evaluations

    Write samplers (one a line), schedulers and budgets into the node. Everything is run from the same noise
    and held against the converged image, which is made once. *cheapest* names the fewest evaluations within
    `error`.
    """
    got = start(canvas)
    canvas.column("2  Compare", 420)
    node = canvas.add("LambdaCompareSamplers", model=got.model, positive=got.positive, negative=got.negative,
                      latent_image=got.latent, vae=got.vae, seed=1, tall=720)
    canvas.y += 200  # Nodes 2.0 stretches the text over all of the node, and adds the plot below
    canvas.column("3  Choice and figures", 520)
    canvas.add("PreviewAny", "The cheapest choice", tall=140, source=node[3])
    canvas.add("PreviewAny", "All figures", tall=420, source=node[2])
    canvas.column("4  Pictures", 640)
    canvas.add("SaveImage", "Error against evaluations", tall=460, images=node[0],
               filename_prefix="compare_plot")
    canvas.add("SaveImage", "The images side by side", tall=640, images=node[1],
               filename_prefix="compare_sheet")


@example
def classifier_guidance(canvas: Canvas) -> None:
    """Classifier guidance

    Classifier Guider leads any sampler to a class, by the gradient of a classifier of noisy images from
    `models/classifiers`. A classifier belongs to one model: it was trained on what that model sees in noise,
    and none is shipped. `emoji_colours` is that of the emoji model in this pack's repository, whose
    checkpoint is to be chosen with it; how one is trained is there too (*dev/tiny_emoji*). The prompt says
    what to make, `label` which class of it.
    """
    got = start(canvas)
    canvas.column("2  Lead and sample")
    guider = canvas.add("LambdaClassifierGuider", model=got.model, positive=got.positive,
                        negative=got.negative, classifier=CLASSIFIER, label="blue", scale=8.0)
    sampler = canvas.add("KSamplerSelect", sampler_name="lambda_2m")
    save(canvas, "3  Image", guided(canvas, got, sampler, guider, "karras", 12), got.vae)


def make(name: str, object_info: dict[str, dict]) -> dict[str, Any]:
    title, _, text = inspect.getdoc(EXAMPLES[name]).partition("\n\n")
    canvas = Canvas(name, object_info, f"**{title}**\n\n{' '.join(text.split())}")
    EXAMPLES[name](canvas)
    return canvas.saved()


# --- thumbnails ---------------------------------------------------------------------------------------------

THUMBNAIL = 384


def tried(server, path: Path, words: str) -> dict[str, dict]:
    """The example in API form, with the emoji checkpoint in place of its model (as a flow model in place
    of one)."""
    import demo
    from workflow import load, nodes_of

    prompt = load(path, server.get("/object_info"))
    flow = any(node["ckpt_name"] == SD3 for node in nodes_of(prompt, "CheckpointLoaderSimple"))
    learns = {"LambdaTrainAmed": 3, "LambdaTuneFitted": 5}  # for a number of steps
    demo.fill_in(prompt, words,
                 next((steps for kind, steps in learns.items() if any(nodes_of(prompt, kind))), 8))
    for node in nodes_of(prompt, "LambdaTrainHypersolver"):
        node.update(prompts="\n".join(demo.LEARNED[:4]), images=1, training=100, save=False)
    for node in nodes_of(prompt, "EmptySD3LatentImage"):
        node.update(width=demo.SIZE, height=demo.SIZE)
    for node in prompt.values():  # a picture of its own for every example
        for key in {"seed", "noise_seed"} & node["inputs"].keys():
            node["inputs"][key] = demo.SEED + [*EXAMPLES].index(path.stem)
    for node in nodes_of(prompt, "LoadImage"):
        doughnut(server.base / "input" / node["image"])
    if flow:
        for node in nodes_of(prompt, "BasicScheduler"):
            node["scheduler"] = "simple"
        [loader] = [key for key, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
        for node in prompt.values():
            node["inputs"] = {
                key: ["flow", 0] if value == [loader, 0] else value for key, value in node["inputs"].items()
            }
        prompt["flow"] = {"class_type": "TinyEmojiAsFlow", "inputs": {"model": [loader, 0]}}
    return prompt


def doughnut(path: Path) -> None:
    """An image to start from, unless there is one: in dev/contact_sheet.png the first row's last."""
    from PIL import Image

    if not path.exists():
        with Image.open(environment.ROOT / "dev" / "contact_sheet.png") as sheet:
            image = sheet.crop((250 + 3 * 128, 28, 250 + 4 * 128, 28 + 128))
        image.resize((32, 32), Image.Resampling.LANCZOS).save(path)


def pictures(server, prompt: dict[str, dict]) -> list:
    """The images of a run: those saved, then those only shown."""
    from PIL import Image

    run = server.run(prompt)
    if run.status != "success":
        raise SystemExit(f"{run.status}: {run.error.get('exception_message')}")
    nodes = sorted((key for key, output in run.outputs.items() if output.get("images")),
                   key=lambda key: (prompt[key]["class_type"] != "SaveImage", int(key)))
    return [
        Image.open(server.file(shown)).convert("RGB") for key in nodes for shown in run.outputs[key]["images"]
    ]


def thumbnail(server, path: Path):
    """Four prompts' images; of a workflow that draws a plot, the plot, above two of them where it saves
    images."""
    import demo
    from PIL import Image

    runs = [
        pictures(server, tried(server, path, words))
        for words in demo.PROMPTS[:1 if "compare" in path.stem else 4]
    ]
    sheet, half = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white"), THUMBNAIL // 2
    side = THUMBNAIL // 4
    plots = [
        image for image in runs[0]
        if image.width > 32 and (len(runs) == 1 or image.height / image.width <= 0.75)
    ]
    if plots:
        plot, *others = (image.resize((THUMBNAIL, round(THUMBNAIL * image.height / image.width)),
                                      Image.Resampling.LANCZOS) for image in plots)
        sheet.paste(plot, (0, 0))
        for other in others[:1]:  # a contact sheet: its first rows
            top = other.height // 6
            sheet.paste(other.crop((0, top, THUMBNAIL, top + THUMBNAIL - plot.height)), (0, plot.height))
        for k, images in enumerate(runs if not others else []):
            small = images[0].resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (side * k, (THUMBNAIL + plot.height - side) // 2))
        return sheet
    for k, (image, *_) in enumerate(runs):
        sheet.paste(image.resize((half, half), Image.Resampling.LANCZOS), (half * (k % 2), half * (k // 2)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*EXAMPLES, []], metavar="name",
                        help="which ones (default: all)")
    parser.add_argument("--no-thumbnails", action="store_true", help="write the workflows only")
    options = parser.parse_args()
    place = environment.enter()
    from comfyui_server import Server

    base = environment.base_directory()
    with Server(place, base, log=base / "server.log") as server:
        info = server.get("/object_info")
        for name in options.names or EXAMPLES:
            path = FOLDER / f"{name}.json"
            path.write_text(
                json.dumps(make(name, info), ensure_ascii=False) + "\n", encoding="utf-8")
            print(path.relative_to(environment.ROOT), flush=True)
            if not options.no_thumbnails:
                thumbnail(server, path).save(path.with_suffix(".jpg"), quality=55, optimize=True,
                                             progressive=True)


if __name__ == "__main__":
    main()
