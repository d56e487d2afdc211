"""Run the pack in a real ComfyUI: `python dev/demo.py` on a fresh machine makes pictures and a table.

Makes the environment (environment.py), starts ComfyUI with this pack and the tiny emoji checkpoint, queues
the example workflows once with each of our samplers and with two of ComfyUI's own beside them, and writes
    .dev/demo/few_steps.png       what so few evaluations make at guidance 7, with the hypersolver in
                                  dev/tiny_emoji too, and how far each is from the converged image
    .dev/demo/contact_sheet.png   every sampler: a row a sampler, a column a prompt. AMED, which is trained
                                  for minutes first, with --amed only
    .dev/demo/table.md            sampler, steps, model evaluations, seconds
COMFYUI_PATH names an existing ComfyUI to use instead; its own folders are left alone.
"""
from __future__ import annotations

import argparse
import runpy
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

WORKFLOWS = environment.ROOT / "example_workflows"
CHECKPOINT = "tiny_emoji.safetensors"
NANO = "nano_emoji.safetensors"  # answers in a quarter of the time, with worse pictures: for tests
PROMPTS = ("red heart", "panda", "strawberry", "doughnut")
LEARNED = ("ghost", "pizza", "green heart", "sun", "crying face", "penguin", "hamburger", "cactus", "tomato",
           "clown face", "evergreen tree")  # where an example or a measurement asks for several
SEED, GUIDANCE, SIZE = 7, 3.0, 256
CORE = ("euler", "dpmpp_2m")
STRONG, CONVERGED, SEEDS = 7.0, 100, 4  # of the few, the first seed is shown, and the errors are of all
FEW_STEPS = (("euler", "beta", 5), ("dpmpp_2m", "karras", 5), ("dpmpp_2m", "sgm_uniform", 5),
             ("lms", "beta", 5), ("lambda_fitted", "karras", 5))
HYPERSOLVER = environment.ROOT / "dev" / "tiny_emoji" / "hypersolver.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="intervals of the schedule (default 12)")
    parser.add_argument("--amed", action="store_true", help="AMED too: minutes more, since it is trained")
    parser.add_argument("--keep", action="store_true", help="leave the server running and print its address")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give at least 1")

    place = environment.enter()
    from comfyui_server import Server

    base = environment.base_directory()
    home = environment.HOME / "demo"
    home.mkdir(exist_ok=True)
    found = base / "models" / "solver_calibrations" / HYPERSOLVER.name
    found.unlink(missing_ok=True)
    with Server(place, base, log=home / "server.log") as server:
        print(f"ComfyUI runs at {server.url}", flush=True)
        rows = [produce(server, job, steps_of(job, options.steps)) for job in jobs(server)
                if options.amed or not trained(job)]
        contact_sheet(rows).save(home / "contact_sheet.png")
        (home / "table.md").write_text(table(rows))
        print(f"\n{table(rows)}", flush=True)
        converged, *few = [produce(server, job, steps, SEEDS, STRONG) for job, steps in few_steps(server)]
        shutil.copy(HYPERSOLVER, found)  # from here on lambda_fitted finds it
        hyper = "lambda_fitted,\nwith its hypersolver", None, ksampler(server, "lambda_fitted")
        few += [produce(server, hyper, steps, SEEDS, STRONG) for steps in (4, 5)]
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
    chosen = runpy.run_path(str(environment.ROOT / "hosting" / "names.py"))
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
    for name, title in chosen["NODES"].items():
        family = FAMILIES[name]
        prompt = load(WORKFLOWS / "sampler_node.json", info)
        [node] = [node for node in prompt.values() if node["class_type"].startswith("LambdaSampler")]
        node["class_type"] = chosen["node_id"](family.name)
        node["inputs"] = {key: option.default for key, option in family.options.items()
                          if option.stand_in is None}
        if family.stand_ins:
            node["inputs"]["measure"] = "auto"
        stands = (name for name, sampler in SAMPLERS.items()
                  if sampler.family == family.title and sampler.fixed.items() <= node["inputs"].items())
        result.append((f"{title} (Lambda)", next(stands), prompt))
    return result


def trained(job: tuple[str, str | None, dict]) -> bool:
    """Whether the sampler is AMED."""
    from samplers import SAMPLERS

    return job[1] is not None and "trained" in SAMPLERS[job[1]].options


def steps_of(job: tuple[str, str | None, dict], steps: int) -> int:
    """Half as many for AMED, which evaluates twice in each, and is trained for at most 10; five times as many
    for the predictor-corrector, whose kind wants hundreds."""
    return min(10, (steps + 1) // 2) if trained(job) else 5 * steps if job[1] == "pc" else steps


def ksampler(server, sampler: str, scheduler: str = "karras") -> dict:
    """The example of a KSampler, with this sampler."""
    from workflow import load, nodes_of

    prompt = load(WORKFLOWS / "ksampler.json", server.get("/object_info"))
    for node in nodes_of(prompt, "KSampler"):
        node.update(sampler_name=sampler, scheduler=scheduler)
    return prompt


def few_steps(server) -> list[tuple[tuple[str, None, dict], int]]:
    """Jobs and their steps: the converged images, and what few steps make of them."""
    jobs = [(("converged", None, ksampler(server, "dpmpp_2m")), CONVERGED)]
    for sampler, scheduler, steps in FEW_STEPS:
        ours = sampler.startswith("lambda_")
        label = f"{sampler},\nmeasured by auto" if ours else f"{sampler}, {scheduler}"
        jobs.append(((label, None, ksampler(server, sampler, scheduler)), steps))
    return jobs


def distance(row: dict, converged: dict) -> float:
    """The rms between the images of two rows, of a range from -1 to 1."""
    import numpy as np

    flat = [[image for images in part["images"] for image in images] for part in (row, converged)]
    pixels = [np.stack([np.asarray(image, dtype=float) for image in images]) / 127.5 for images in flat]
    return float(np.sqrt(np.square(pixels[0] - pixels[1]).mean()))


def produce(server, job: tuple[str, str | None, dict], steps: int, seeds: int = 1,
            guidance: float = GUIDANCE) -> dict:
    """The images of one row: a list for each prompt, with an image a seed."""
    from PIL import Image
    from samplers import nfe

    label, name, prompt = job
    images, seconds = [], 0.0
    for words in PROMPTS:
        fill_in(prompt, words, steps, seeds, guidance)
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


def fill_in(prompt: dict, words: str, steps: int, batch: int = 1, guidance: float = GUIDANCE) -> None:
    """The demo's checkpoint, prompts, size, guidance and seed instead of the example's."""
    from workflow import nodes_of

    for node in nodes_of(prompt, "CheckpointLoaderSimple"):
        node["ckpt_name"] = CHECKPOINT
    for node, text in zip(nodes_of(prompt, "CLIPTextEncode"), (words, "")):
        node["text"] = text
    for node in nodes_of(prompt, "EmptyLatentImage"):
        node.update(width=SIZE, height=SIZE, batch_size=batch)
    for node in nodes_of(prompt, "KSampler"):
        node.update(seed=SEED, steps=steps, cfg=guidance)
    for kind in ("CFGGuider", "SamplerCustom", "LambdaMeasureModel", "LambdaTuneFitted", "LambdaTrainAmed",
                 "LambdaCompareSamplers"):
        for node in nodes_of(prompt, kind):
            node["cfg"] = guidance
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
