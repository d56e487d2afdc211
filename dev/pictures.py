"""Write the pictures of the help pages: python dev/pictures.py [node ...], each a node after a real run.

A node is laid between what it needs and what uses it, by the types of its slots, so a new node needs nothing
here. It is photographed alone if it shows something itself (a panel, a picture), and otherwise with the
neighbours that do. All of it runs on the tiny emoji checkpoint. `user_interface` is a picture of
docs/solvers.md. tests/test_tree.py asks for one of every node.
"""
from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo  # noqa: E402
import environment  # noqa: E402
import workflows  # noqa: E402

FOLDER = environment.ROOT / "web" / "docs" / "pictures"
INTERFACE = "user_interface"
SCALE, MARGIN, STEPS, WIDTH = 2, 8, 8, 360
MAKERS = {"SAMPLER": "LambdaSamplerMultistep", "LAMBDA_CALIBRATION": "LambdaMeasureModel",
          "NOISE": "RandomNoise"}
USERS = {"SAMPLER": ("SamplerCustom", "sampler"), "GUIDER": ("SamplerCustomAdvanced", "guider"),
         "SIGMAS": ("SamplerCustom", "sigmas"),
         "MODEL": ("KSampler", "model"), "LATENT": ("VAEDecode", "samples"),
         "IMAGE": ("PreviewImage", "images")}
SMALL = {"LambdaClassifierGuider": {"label": "blue", "scale": 4.0},
         "LambdaTuneFitted": {"prompts": "\n".join(demo.LEARNED), "steps": 4},
         "LambdaTrainHypersolver": {  # what the tiny checkpoint knows, in minutes
    "prompts": "\n".join((*demo.PROMPTS, "pizza", "tulip", "ghost", "red apple")), "images": 2,
    "training": 150}}
WIDE = {"LambdaCompareSamplers": 560}  # with a plot whose thin lines must keep their colours
SHOWS = """(id) => {  // whether a node shows something of its own
    const node = app.graph.getNodeById(id)
    const panel = (widget) => widget.name === 'lambda_solvers_panel' && !widget.hidden
    return !!node.imgs?.length || (node.widgets ?? []).some(panel)
}"""
FRAME = """([ids, nodes2]) => {  // left, top, right and bottom of nodes on the page
    const at = (id) => {
        const drawn = nodes2 && document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect()
        if (drawn) return [drawn.left, drawn.top, drawn.right, drawn.bottom]
        const [x, y, w, h] = app.graph.getNodeById(id).getBounding()
        const page = app.canvas.canvas.getBoundingClientRect()
        const [left, top] = app.canvas.ds.convertOffsetToCanvas([x, y]), scale = app.canvas.ds.scale
        return [left + page.left, top + page.top, left + page.left + w * scale, top + page.top + h * scale]
    }
    const boxes = ids.map(at)
    return [0, 1, 2, 3].map((k) => (k < 2 ? Math.min : Math.max)(...boxes.map((box) => box[k])))
}"""
LOOK = """(ids) => {  // these nodes at full size, away from the interface's bars; without links to others
    const boxes = ids.map((id) => app.graph.getNodeById(id).getBounding()), ds = app.canvas.ds
    ds.scale = 1
    const among = (id) => ids.some((one) => String(one) === String(id))
    for (const [key, link] of [...app.graph.links])
        if (![link.origin_id, link.target_id].every(among)) app.graph.links.delete(key)
    ds.offset = [0, 1].map((k) => 110 - Math.min(...boxes.map((box) => box[k])))
    app.canvas.setDirty(true, true)
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="node", help="ids of nodes, or user_interface; else all")
    options = parser.parse_args()
    place = environment.enter("test")
    sys.path.append(str(environment.ROOT / "tests" / "browser"))
    from comfyui_server import Server
    from interface import Interface, browser

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = environment.base_directory(Path(folder))
        frontend = str(environment.newest_frontend())
        with Server(place, base, "--front-end-root", frontend) as server:
            info = server.get("/object_info")
            kinds = [kind for kind in info if kind.startswith("Lambda")]
            kinds.sort(key=lambda kind: "Load" in kind)  # after what saves
            if unknown := {*options.names} - {*kinds, INTERFACE}:
                parser.error(f"there is no node {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
            with browser() as chromium:
                ui = Interface(chromium, server, nodes2=True, pictures=FOLDER, scale=SCALE)
                ui.page.set_viewport_size({"width": 1900, "height": 1500})
                ui.set(**{"Comfy.Node.AlwaysShowAdvancedWidgets": True})
                for kind in options.names or [*kinds, INTERFACE]:
                    picture = of_interface(ui, info) if kind == INTERFACE else of_node(ui, kind, info)
                    path, how = FOLDER / f"{kind}.webp", {"quality": 80 if kind in WIDE else 30, "method": 6}
                    if kind == INTERFACE:
                        path, how = environment.ROOT / "dev" / f"{kind}.png", {"optimize": True}
                    picture.save(path, **how)
                    print(f"{path.relative_to(environment.ROOT)}: {path.stat().st_size} bytes", flush=True)


def of_node(ui, kind: str, info: dict):
    workflow, node, neighbour = laid(kind, info)
    ui.open()  # nothing of the last node is kept, and lists have the files that were saved
    ui.load(workflow)
    ui.run()
    ui.page.wait_for_timeout(1500)
    picture = photograph(ui, [node] if neighbour is None or ui.do(SHOWS, node) else [node, neighbour])
    return picture.resize((picture.width * 3 // 4, picture.height * 3 // 4))  # all are shipped: some 300 kB


def laid(kind: str, info: dict) -> tuple[dict, int, int | None]:
    """A workflow around a node, the node's id, and that of the neighbour which shows what the node does."""
    canvas = workflows.Canvas(kind, info)
    got = workflows.start(canvas, demo.CHECKPOINT, size=demo.SIZE)
    texts = [node for node in canvas.nodes if node["type"] == "CLIPTextEncode"]
    for node, text in zip(texts, (demo.PROMPTS[1], "")):
        node["widgets_values"] = [text]
    amed = "Amed" in kind
    chosen = {"cfg": demo.GUIDANCE, "fitted": True, "noise_seed": demo.SEED,
              "scheduler": "karras", "seed": [*info].index(kind),  # one's own: nothing comes from a cache
              "steps": 3 if amed else STEPS, "sampler_name": "lambda_v3",
              "name": f"{'amed' if amed else 'statistics'}-panda{'.safetensors' if 'Load' in kind else ''}"}
    chosen |= SMALL.get(kind, {})
    known = {**got._asdict(), "MODEL": got.model, "LATENT": got.latent, "VAE": got.vae}

    def add(kind: str, **links: workflows.Output) -> workflows.Node:
        required, optional = (info[kind]["input"].get(part, {}) for part in ("required", "optional"))
        for name, (type_, *_) in {**required, **optional}.items():
            if isinstance(type_, list) or name in links:
                continue
            if name in known or type_ in known:
                links[name] = known.get(name, known.get(type_))
            elif name in required and type_ in MAKERS:
                links[name] = known[type_] = add(MAKERS[type_])[0]
        widgets = {name: chosen[name] for name in chosen if name in {**required, **optional}}
        return canvas.add(kind, **widgets, **links)

    known["SIGMAS"] = add("BasicScheduler")[0]
    needs = [type_ for type_, *_ in info[kind]["input"].get("required", {}).values()]
    makers = [MAKERS[type_] for type_ in needs if str(type_) in MAKERS]
    if makers:
        canvas.column("2  What it needs", WIDTH)
        [maker] = (add(maker) for maker in makers)
        known[next(type_ for type_ in MAKERS if MAKERS[type_] in makers)] = maker[0]
    canvas.column("3  The node", WIDE.get(kind, WIDTH))
    node = last = add(kind)
    users, current = [], kind
    while not info[current]["output_node"]:
        slots = enumerate(info[current]["output"])
        slot, (current, name) = next((slot, USERS[type_]) for slot, type_ in slots if type_ in USERS)
        canvas.column("4  What uses it", WIDTH)
        last = add(current, **{name: last[slot]})
        users.append((current, last.id))
    shown = users and users[0][0] in ("KSampler", "PreviewImage")
    neighbour = users[0][1] if shown else maker.id if makers else None
    return {**canvas.saved(), "groups": []}, node.id, neighbour


def of_interface(ui, info: dict):
    """All of a workflow around DPM-Solver-v3 after a run, in four columns, at half the scale."""
    workflow, *_ = laid("LambdaSamplerV3", info)
    nodes = {node["type"]: node for node in workflow["nodes"]}
    for below, above, y in (("BasicScheduler", "LambdaSamplerV3", 600), ("PreviewImage", "VAEDecode", 160)):
        nodes[below]["pos"] = [nodes[above]["pos"][0], y]
    nodes["MarkdownNote"]["pos"] = [0, 5000]
    ui.open()
    ui.load(workflow)
    ui.run()
    ui.page.wait_for_timeout(1500)
    picture = photograph(ui, [node["id"] for node in workflow["nodes"] if node["type"] != "MarkdownNote"])
    return picture.reduce(SCALE)


def photograph(ui, nodes: list[int]):
    from PIL import Image

    ui.do(LOOK, nodes)
    ui.page.wait_for_timeout(700)
    left, top, right, bottom = ui.do(FRAME, [nodes, ui.nodes2])
    width, height = (far - near + 2 * MARGIN for near, far in ((left, right), (top, bottom)))
    area = {"x": left - MARGIN, "y": top - MARGIN, "width": width, "height": height}
    return Image.open(io.BytesIO(ui.page.screenshot(clip=area))).convert("RGB")


if __name__ == "__main__":
    main()
