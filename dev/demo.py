"""Run the pack in a real ComfyUI: `python dev/demo.py` on a fresh machine makes pictures and a table.

Makes the environment (environment.py), starts ComfyUI with this pack and the tiny emoji checkpoint, queues the example
workflows once with each of our samplers and with two of ComfyUI's own beside them, and writes
    .dev/demo/contact_sheet.png   a row a sampler, a column a prompt
    .dev/demo/table.md            sampler, steps, model evaluations, seconds
COMFYUI_PATH names an existing ComfyUI to use instead; its own folders are left alone.
"""
from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

WORKFLOWS = environment.ROOT / "example_workflows"
CHECKPOINT = "tiny_emoji.safetensors"
PROMPTS = ("red heart", "panda", "strawberry", "doughnut")
LEARNED = ("ghost", "pizza", "green heart", "sun", "crying face", "penguin", "hamburger", "cactus")  # where an example asks for several
SEED, GUIDANCE, SIZE = 7, 3.0, 256
CORE = ("euler", "dpmpp_2m")


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
        rows = [produce(server, job, options.steps) for job in jobs(server)]
        sheet = contact_sheet(rows)
        sheet.save(home / "contact_sheet.png")
        (home / "table.md").write_text(table(rows, options.steps))
        print(f"\n{table(rows, options.steps)}\npicture: {home / 'contact_sheet.png'}", flush=True)
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
    ours = runpy.run_path(str(environment.ROOT / "nodes" / "names.py"))["NAMES"]
    missing = set(ours) - set(listed)
    if missing:
        raise SystemExit(f"the server does not list {', '.join(sorted(missing))}: the pack did not load, see its log")
    for name in (*CORE, *ours):
        prompt = load(WORKFLOWS / "ksampler.json", info)
        for sampler in nodes_of(prompt, "KSampler"):
            sampler["sampler_name"] = name
        result.append((name, ours.get(name), prompt))
    for family in FAMILIES.values():
        prompt = load(WORKFLOWS / "sampler_node.json", info)
        [node] = [node for node in prompt.values() if node["class_type"].startswith("LambdaSampler")]
        node["class_type"] = "LambdaSampler" + family.name.capitalize()
        node["inputs"] = {key: option.default for key, option in family.options.items() if option.stand_in is None}
        if family.stand_ins:
            node["inputs"]["calibration"] = "auto"
        result.append((family.title, next(name for name, sampler in SAMPLERS.items() if sampler.family == family.title
                                          and sampler.fixed.items() <= node["inputs"].items()), prompt))
    return result


def produce(server, job: tuple[str, str | None, dict], steps: int) -> dict:
    """The images of one row, one prompt after the other."""
    from PIL import Image
    from samplers import nfe

    label, name, prompt = job
    images, seconds = [], 0.0
    for words in PROMPTS:
        fill_in(prompt, words, steps)
        run = server.run(prompt)
        if run.status != "success":
            raise SystemExit(f"{label}: {run.status}: {run.error.get('exception_message')}")
        [shown] = next(output["images"] for output in run.outputs.values() if output.get("images"))
        images.append(Image.open(server.file(shown)).convert("RGB"))
        seconds += run.seconds
    evaluations = steps if name is None else nfe(name, steps)
    print(f"{label:28} {seconds / len(PROMPTS):6.2f} s an image", flush=True)
    return {"label": label, "evaluations": evaluations, "seconds": seconds / len(PROMPTS), "images": images}


def fill_in(prompt: dict, words: str, steps: int) -> None:
    """The demo's checkpoint, prompt, size, guidance and seed instead of the example's."""
    from workflow import nodes_of

    for node in nodes_of(prompt, "CheckpointLoaderSimple"):
        node["ckpt_name"] = CHECKPOINT
    for node, text in zip(nodes_of(prompt, "CLIPTextEncode"), (words, "")):
        node["text"] = text
    for node in nodes_of(prompt, "EmptyLatentImage"):
        node.update(width=SIZE, height=SIZE, batch_size=1)
    for node in nodes_of(prompt, "KSampler"):
        node.update(seed=SEED, steps=steps, cfg=GUIDANCE)
    for node in nodes_of(prompt, "CFGGuider"):
        node["cfg"] = GUIDANCE
    for node in nodes_of(prompt, "RandomNoise"):
        node["noise_seed"] = SEED
    for node in nodes_of(prompt, "BasicScheduler"):
        node.update(steps=steps, scheduler="karras")


def table(rows: list[dict], steps: int) -> str:
    lines = ["| sampler | steps | model evaluations | seconds an image |", "|---|---|---|---|"]
    lines += [f"| {row['label']} | {steps} | {row['evaluations'] or 'adaptive'} | {row['seconds']:.2f} |" for row in rows]
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
        draw.text((8, top + side // 2 - 18), f"{row['label']}\n{evaluations}", "black", font)
        for x, image in enumerate(row["images"]):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (label + side * x, top))
    return sheet


if __name__ == "__main__":
    main()
