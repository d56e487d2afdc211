"""The example workflows: what dev/workflows.py makes, stamped for an importer, runnable, and restored from
saved images."""
from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

import demo
import workflows
from test_tree import published
from workflow import load, nodes_of

EXAMPLES = sorted(workflows.FOLDER.glob("*.json"))
EVERY_EXAMPLE = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def prepared(server, path) -> dict:
    """An example in API form, with the nano emoji, and of several prompts two."""
    prompt = workflows.tried(server, path, "panda")
    for node in nodes_of(prompt, "CheckpointLoaderSimple"):
        node["ckpt_name"] = demo.NANO
    for kind in ("LambdaTuneFitted", "LambdaTrainHypersolver"):
        for node in nodes_of(prompt, kind):
            node["prompts"] = "\n".join(node["prompts"].split("\n")[:2])
    return prompt


def saved(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_example_has_a_generator_and_a_thumbnail_and_is_published() -> None:
    assert {path.stem for path in EXAMPLES} == set(workflows.EXAMPLES)
    assert {path.with_suffix(".jpg") for path in EXAMPLES} | set(EXAMPLES) <= set(published())
    for path in EXAMPLES:
        with Image.open(path.with_suffix(".jpg")) as image:
            assert image.format == "JPEG" and image.size == (workflows.THUMBNAIL, workflows.THUMBNAIL)
            assert len(image.convert("RGB").getcolors(
                10**6)) > 1000 and path.with_suffix(".jpg").stat().st_size < 60_000


@EVERY_EXAMPLE
def test_an_example_is_what_its_generator_makes_of_this_server_s_nodes(server, path) -> None:
    assert saved(path) == workflows.make(path.stem, server.get("/object_info")), "run python dev/workflows.py"


@EVERY_EXAMPLE
def test_an_importer_learns_which_pack_and_which_model_it_needs(path) -> None:
    example = saved(path)
    for node in example["nodes"]:
        stamp = {key: node["properties"].get(key) for key in ("cnr_id", "ver")}
        if node["type"].startswith("Lambda"):
            assert stamp == workflows.OURS
        elif node["type"] not in workflows.NOTES:
            assert stamp == workflows.CORE
        if node["type"] == "CheckpointLoaderSimple":
            [model] = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0] and model["directory"] == "checkpoints"
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith("/" +
                                                                                                model["name"])
    assert any(node["properties"].get("cnr_id") == "lambda-solvers" for node in example["nodes"])
    assert sum(node["type"] == "MarkdownNote" and "**" in node["widgets_values"][0]
               for node in example["nodes"]) == 1


@EVERY_EXAMPLE
def test_links_name_each_other_and_nothing_overlaps(path) -> None:
    example = saved(path)
    nodes = {node["id"]: node for node in example["nodes"]}
    for link, source, slot, target, place, kind in example["links"]:
        assert link in nodes[source]["outputs"][slot]["links"] and nodes[target]["inputs"][place][
            "link"] == link
        assert nodes[source]["outputs"][slot]["type"] == kind and nodes[target]["inputs"][place]["type"] in (
            kind, "*")
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
             for node in nodes.values()]
    for k, (left, top, right, bottom) in enumerate(boxes):
        for a, b, c, d in boxes[:k]:
            assert right <= a or c <= left or bottom <= b or d <= top


@EVERY_EXAMPLE
def test_an_example_runs_on_the_tiny_checkpoint_and_its_image_restores_it(server, path) -> None:
    prompt, example = prepared(server, path), saved(path)
    run = server.run(prompt, saved=example)
    assert run.status == "success", run.error
    shown = [
        shown for key, output in run.outputs.items() for shown in output.get("images", [])
        if shown["type"] == "output"
    ]
    assert shown
    for one in shown:
        with Image.open(server.file(one)) as image:
            ran = json.loads(image.info["prompt"])
        for node in ran.values():
            node.pop("is_changed", None)  # ComfyUI's own note on a loaded image
            if "lambda_solvers" in node.get("_meta", {}):  # ours, on what a run was calibrated with
                assert all(entry["name"] and entry["digest"]
                           for entry in node.pop("_meta")["lambda_solvers"]["calibrations"])
        assert json.loads(image.info["workflow"]) == example and ran == prompt


def test_a_calibration_s_name_is_restored_from_an_image(server, base) -> None:
    """Measure and save under a name; a workflow that loads it by this name carries the name in its images."""
    folder = base / "models" / "solver_calibrations"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompt = prepared(server, workflows.FOLDER / "measure_and_share.json")
    for node in nodes_of(prompt, "LambdaMeasureModel"):
        node["name"] = "shared/panda"
    assert server.run(prompt).status == "success"
    canvas = workflows.Canvas("restored", server.get("/object_info"))
    got = workflows.start(canvas)
    loaded = canvas.add("LambdaLoadCalibration", name="shared/panda.safetensors")
    sampler = canvas.add("LambdaSamplerV3", calibration=loaded[0])
    workflows.save(canvas, "Image", workflows.custom(canvas, got, sampler, 3.0, "karras", 4), got.vae)
    path = base / "restored.json"
    path.write_text(json.dumps(canvas.saved()))
    workflows.EXAMPLES.setdefault("restored", None)
    try:
        run = server.run(prepared(server, path), saved=saved(path))
    finally:
        del workflows.EXAMPLES["restored"]
    [shown] = next(output["images"] for output in run.outputs.values() if output.get("images"))
    restored = base / "again.json"
    with Image.open(server.file(shown)) as image:
        restored.write_text(image.info["workflow"])
    again = load(restored, server.get("/object_info"))
    assert [node["name"] for node in nodes_of(again, "LambdaLoadCalibration")] == ["shared/panda.safetensors"]
