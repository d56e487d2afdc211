"""Run the pack in a real ComfyUI: `python dev/demo.py` on a fresh machine makes pictures and a table.

Makes the environment (environment.py), starts ComfyUI with this pack and the tiny emoji checkpoint, queues
the example workflows once with each of our samplers and with two of ComfyUI's own beside them, and writes
    .dev/demo/few_steps.png       what so few evaluations make, and how far each is from the converged image
    .dev/demo/contact_sheet.png   every sampler: a row a sampler, a column a prompt
    .dev/demo/table.md            sampler, steps, model evaluations, seconds
COMFYUI_PATH names an existing ComfyUI to use instead; its own folders are left alone.
"""
from __future__ import annotations

import argparse
import copy
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

WORKFLOWS = environment.ROOT / "example_workflows"
CHECKPOINT = "tiny_emoji.safetensors"
PROMPTS = ("red heart", "panda", "strawberry", "doughnut")
LEARNED = ("ghost", "pizza", "green heart", "sun", "crying face", "penguin", "hamburger", "cactus", "tomato",
           "clown face", "evergreen tree")  # where an example asks for several
SEED, GUIDANCE, SIZE = 7, 3.0, 256
CORE = ("euler", "dpmpp_2m")
FEW, CONVERGED, SEEDS = 5, 100, 4  # of the few, the first seed is shown, and the errors are of all
FEW_STEPS = (("euler", "beta"), ("dpmpp_2m", "karras"), ("dpmpp_2m", "sgm_uniform"), ("lms", "beta"),
             ("lambda_v3", "sgm_uniform"), ("lambda_fitted", "karras"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="intervals of the schedule (default 12)")
    parser.add_argument("--keep", action="store_true", help="leave the server running and print its address")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give at least 1")

    place = environment.enter()
    from comfyui_server import Server

    base = environment.base_directory()
    home = environment.HOME / "demo"
    home.mkdir(exist_ok=True)
    with Server(place, base, log=home / "server.log") as server:
        print(f"ComfyUI runs at {server.url}", flush=True)
        rows = [produce(server, job, steps_of(job, options.steps)) for job in jobs(server)]
        contact_sheet(rows).save(home / "contact_sheet.png")
        (home / "table.md").write_text(table(rows))
        print(f"\n{table(rows)}", flush=True)
        converged, *few = [produce(server, job, steps, SEEDS) for job, steps in few_steps(server)]
        few = [row | {"error": distance(row, converged)} for row in few]
        contact_sheet([converged, *few]).save(home / "few_steps.png")
        print(f"\npictures: {home / 'few_steps.png'}, contact_sheet.png", flush=True)
        if options.keep:
            print(f"\nopen {server.url} in a browser; Ctrl-C here stops it", flush=True)
            try:
                server.process.wait()
            except KeyboardInterrupt:
                pass


def jobs(server) -> list[tuple[str, str | None, dict]]:
    """Label, catalogue name (None: ComfyUI's own) and workflow of every row of the sheet."""
    from workflow import load, nodes_of

    info = server.get("/object_info")
    listed = info["KSampler"]["input"]["required"]["sampler_name"][0]
    sys.path.append(str(environment.ROOT))
    from samplers import FAMILIES, SAMPLERS

    result = []
    chosen = runpy.run_path(str(environment.ROOT / "nodes" / "names.py"))
    ours = chosen["NAMES"]
    missing = set(ours) - set(listed)
    if missing:
        missing = ", ".join(sorted(missing))
        raise SystemExit(f"the server does not list {missing}: the pack did not load, see its log")
    for name in (*CORE, *ours):
        prompt = load(WORKFLOWS / "ksampler.json", info)
        for sampler in nodes_of(prompt, "KSampler"):
            sampler["sampler_name"] = name
        result.append((name, ours.get(name), prompt))
    for family in map(FAMILIES.get, chosen["NODES"]):
        prompt = load(WORKFLOWS / "sampler_node.json", info)
        [node] = [node for node in prompt.values() if node["class_type"].startswith("LambdaSampler")]
        node["class_type"] = chosen["node_id"](family.name)
        node["inputs"] = {key: option.default for key, option in family.options.items()
                          if option.stand_in is None}
        if family.stand_ins:
            node["inputs"]["measure"] = "auto"
        stands = (name for name, sampler in SAMPLERS.items()
                  if sampler.family == family.title and sampler.fixed.items() <= node["inputs"].items())
        result.append((family.title, next(stands), prompt))
    return result


def steps_of(job: tuple[str, str | None, dict], steps: int) -> int:
    """Half as many for AMED, which evaluates twice in each, and is trained for at most 10."""
    from samplers import SAMPLERS

    amed = job[1] is not None and "trained" in SAMPLERS[job[1]].options
    return min(10, (steps + 1) // 2) if amed else steps


def few_steps(server) -> list[tuple[tuple[str, None, dict], int]]:
    """Jobs and their steps: the converged images, KSampler at FEW, and the example that learns FEW."""
    from workflow import load, nodes_of

    info = server.get("/object_info")

    def ksampler(label: str, sampler: str, scheduler: str) -> tuple[str, None, dict]:
        prompt = load(WORKFLOWS / "ksampler.json", info)
        for node in nodes_of(prompt, "KSampler"):
            node.update(sampler_name=sampler, scheduler=scheduler)
        return label, None, prompt

    learned = load(WORKFLOWS / "few_steps.json", info)
    *_, measured = nodes_of(learned, "CLIPTextEncode")
    measured["text"] = "fox"
    learned = {key: node for key, node in learned.items() if node["class_type"] != "LambdaSaveCalibration"}
    for node in (*nodes_of(learned, "LambdaMeasureModel"), *nodes_of(learned, "LambdaTuneFitted")):
        node["save"] = False  # other rows would find it
    own = copy.deepcopy(learned)
    [sampled] = nodes_of(own, "KSampler")
    for node in (*nodes_of(own, "LambdaMeasureModel"), *nodes_of(own, "LambdaTuneFitted")):
        node["positive"] = sampled["positive"]
    for node in nodes_of(own, "LambdaMeasureModel"):
        node["prompt"] = "this"
    for node in nodes_of(own, "LambdaTuneFitted"):
        node["prompts"] = ""
    labels = {"lambda_fitted": "lambda_fitted,\nmeasured by auto",
              "lambda_v3": "lambda_v3, sgm_uniform,\nmeasured by auto"}
    return [(ksampler("converged", "dpmpp_2m", "karras"), CONVERGED),
            *((ksampler(labels.get(sampler, f"{sampler}, {scheduler}"), sampler, scheduler), FEW)
              for sampler, scheduler in FEW_STEPS),
            ((f"lambda_fitted, tuned on\n{len(LEARNED) + 1} other prompts", None, learned), FEW),
            (("lambda_fitted,\ntuned on the prompt", None, own), FEW)]


def distance(row: dict, converged: dict) -> float:
    """The rms between the images of two rows, of a range from -1 to 1."""
    import numpy as np

    flat = [[image for images in part["images"] for image in images] for part in (row, converged)]
    pixels = [np.stack([np.asarray(image, dtype=float) for image in images]) / 127.5 for images in flat]
    return float(np.sqrt(np.square(pixels[0] - pixels[1]).mean()))


def produce(server, job: tuple[str, str | None, dict], steps: int, seeds: int = 1) -> dict:
    """The images of one row: a list for each prompt, with an image a seed."""
    from PIL import Image
    from samplers import nfe

    label, name, prompt = job
    images, seconds = [], 0.0
    for words in PROMPTS:
        fill_in(prompt, words, steps, seeds)
        run = server.run(prompt)
        if run.status != "success":
            raise SystemExit(f"{label}: {run.status}: {run.error.get('exception_message')}")
        saved = next(output["images"] for key, output in run.outputs.items()
                     if prompt[key]["class_type"] == "SaveImage")
        images.append([Image.open(server.file(shown)).convert("RGB") for shown in saved])
        seconds += run.seconds
    evaluations = steps if name is None else nfe(name, steps)
    print(f"{' '.join(label.split()):44} {seconds / len(PROMPTS) / seeds:6.2f} s an image", flush=True)
    seconds /= len(PROMPTS) * seeds
    return {"label": label, "steps": steps, "evaluations": evaluations, "seconds": seconds,
            "images": images}


def fill_in(prompt: dict, words: str, steps: int, batch: int = 1) -> None:
    """The demo's checkpoint, prompts, size, guidance and seed instead of the example's."""
    from workflow import nodes_of

    for node in nodes_of(prompt, "CheckpointLoaderSimple"):
        node["ckpt_name"] = CHECKPOINT
    for node, text in zip(nodes_of(prompt, "CLIPTextEncode"), (words, "")):
        node["text"] = text
    for node in nodes_of(prompt, "EmptyLatentImage"):
        node.update(width=SIZE, height=SIZE, batch_size=batch)
    for node in nodes_of(prompt, "KSampler"):
        node.update(seed=SEED, steps=steps, cfg=GUIDANCE)
    for kind in ("CFGGuider", "SamplerCustom", "LambdaMeasureModel", "LambdaTuneFitted", "LambdaTrainAmed",
                 "LambdaCompareSamplers"):
        for node in nodes_of(prompt, kind):
            node["cfg"] = GUIDANCE
    for node in nodes_of(prompt, "LambdaTuneFitted"):
        node.update(steps=steps, prompts=node["prompts"] and "\n".join(LEARNED))
    for node in nodes_of(prompt, "RandomNoise"):
        node["noise_seed"] = SEED
    for node in nodes_of(prompt, "BasicScheduler"):
        node.update(steps=steps, scheduler="karras")


def table(rows: list[dict]) -> str:
    lines = ["| sampler | steps | model evaluations | seconds an image |", "|---|---|---|---|"]
    lines += [f"| {row['label']} | {row['steps']} | {row['evaluations'] or 'adaptive'} | "
              f"{row['seconds']:.2f} |" for row in rows]
    return "\n".join(lines) + "\n"


def contact_sheet(rows: list[dict], side: int = 128, label: int = 250):
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (label + side * len(PROMPTS), 28 + (side + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, words in enumerate(PROMPTS):
        draw.text((label + side * x + 8, 6), words, "black", font)
    for y, row in enumerate(rows):
        top = 28 + (side + 4) * y
        evaluations = f"{row['evaluations']} evaluations" if row["evaluations"] else "adaptive"
        error = f", error {row['error']:.2f}" if "error" in row else ""
        draw.text((8, top + side // 2), f"{row['label']}\n{evaluations}{error}", "black", font, anchor="lm")
        for x, (image, *_) in enumerate(row["images"]):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (label + side * x, top))
    return sheet


if __name__ == "__main__":
    main()
