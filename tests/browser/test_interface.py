"""What a person sees of the pack in ComfyUI's interface."""
from __future__ import annotations

import json
import re

import pytest
from PIL import Image

import demo
import environment
from interface import example, until

EXAMPLES = sorted(path.stem for path in demo.WORKFLOWS.glob("*.json"))
SAMPLER, SCHEDULER = "LambdaSamplerMultistep", "BasicScheduler"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_by_the_run_button_and_shows_its_evaluations(ui, name: str) -> None:
    opened(ui, name)
    assert not ui.keeps_places or ui.overlaps() == []
    ui.run()
    assert not ui.keeps_places or ui.overlaps() == [] == ui.spilt()
    images = ui.images()
    assert images
    with Image.open(ui.server.file(images[-1])) as image:
        assert len(image.convert("L").getcolors()) > 10
    if samplers(name):
        ui.reads("(last run)")
    ui.fit()
    ui.picture(f"example_{name}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_workflow_saved_and_loaded_again_is_the_same(ui, name: str) -> None:
    opened(ui, name)
    first = ui.saved()
    opened(ui, name, first)
    assert drifting(ui, ui.saved()) == drifting(ui, first)
    version = re.search('^version = "(.+)"$',
                        (environment.ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    ours = [node for node in first["nodes"] if node["type"].startswith("Lambda")]
    assert all((node["properties"]["cnr_id"], node["properties"]["ver"]) == ("lambda-solvers", version)
               for node in ours)
    values = {node["id"]: node.get("widgets_values") for node in first["nodes"]}
    assert all(values[node["id"]] == node.get("widgets_values")
               or not values[node["id"]] and not node.get("widgets_values")
               for node in example(name)["nodes"])
    prompt = ui.do("async () => (await app.graphToPrompt()).output")
    assert not any("panel" in key for node in prompt.values() for key in node["inputs"])


def opened(ui, name: str, workflow: dict | None = None) -> None:
    """Load an example, or the workflow it became, and wait for what its samplers say. Compare Samplers has
    none."""
    ui.load(workflow or name)
    if samplers(name):
        ui.reads("model evaluations: ")


def samplers(name: str) -> list[dict]:
    return [node for node in example(name)["nodes"] if node["type"].startswith(("LambdaSampler", "KSampler"))]


def drifting(ui, workflow: dict) -> dict:
    """Without the view, and without what the pinned interface in Nodes 2.0 changes on every load, SaveImage's
    also with none of our nodes: places (by a point or two) and heights (by 30, a title's)."""
    workflow["extra"].pop("ds", None)
    if ui.nodes2 and ui.server.frontend == "pinned":
        for node in workflow["nodes"]:
            del node["pos"], node["size"]
    return workflow


def test_an_edited_step_count_is_seen_at_once_on_the_sampler(ui) -> None:
    ui.load("sampler_node")
    before = ui.reads("count: model evaluations: 12")
    assert before["points"] == 12 and before["curve"] > 20 and before["height"] > 60
    ui.aside(ui.node(SCHEDULER))
    ui.count_up(ui.node(SCHEDULER), "steps")
    assert ui.reads("count: model evaluations: 13")["points"] == 13
    ui.put(ui.node(SCHEDULER), "steps", 2)
    ui.put(ui.node(SAMPLER), "order", 3)
    ui.reads("warn: warning: order 3 is never reached in 2 steps")


def test_ksampler_shows_a_panel_for_our_names_only(ui) -> None:
    ui.load("ksampler")
    ui.reads("count: model evaluations: 12")
    node = ui.node("KSampler")
    ui.count_up(node, "steps")
    ui.reads("count: model evaluations: 13")
    values = ui.saved()["nodes"]
    ui.put(node, "sampler_name", "euler")
    until("its panel is gone, and the other node's is left", lambda: len(ui.panels()) == 1)
    ui.put(node, "sampler_name", "lambda_2m")
    ui.reads("count: model evaluations: 13")
    again = ui.saved()["nodes"]
    assert [n.get("widgets_values") for n in again] == [n.get("widgets_values") for n in values]


def test_a_linked_step_count_is_known_after_a_run(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    ui.do(
        """() => { const graph = app.graph, number = LiteGraph.createNode('PrimitiveInt')
        graph.add(number); number.pos = [60, -150]
        number.widgets[0].value = 9; number.widgets[1].value = 'fixed'
        const node = graph.nodes.find((n) => n.comfyClass === 'BasicScheduler')
        number.connect(0, node, node.inputs.findIndex((input) => input.name === 'steps')) }""")
    ui.page.mouse.click(5, 500)
    ui.reads("count: set by a link: steps (model evaluations known after a run)")
    ui.run()
    assert ui.reads("count: model evaluations: 9 (last run)")["points"] == 9


def test_undo_brings_a_removed_sampler_back_with_its_panel(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    before = ui.saved()
    ui.do("(id) => { const node = app.graph.getNodeById(id); app.canvas.selectNode(node); }",
          ui.node(SAMPLER))
    ui.command("Comfy.Canvas.DeleteSelectedItems")
    until("the panel is gone", lambda: not ui.panels())
    ui.saved()
    ui.command("Comfy.Undo")
    ui.reads("count: model evaluations: 12")
    ui.put(ui.node(SCHEDULER), "steps", 2)
    ui.put(ui.node(SAMPLER), "order", 3)
    ui.reads("warn: warning: order 3 is never reached in 2 steps")
    assert [node["type"] for node in ui.saved()["nodes"]
            ].count(SAMPLER) == 1 == [node["type"] for node in before["nodes"]].count(SAMPLER)


def test_a_copied_sampler_has_a_panel_of_its_own(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    ui.do(
        "(id) => { const node = app.graph.getNodeById(id); app.canvas.selectNode(node); "
        "app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard() }",
        ui.node(SAMPLER))
    until("there are two", lambda: len(ui.panels()) == 2, ui.panels)
    ui.reads("count: model evaluations a step: 1")
    ui.reads("count: model evaluations: 12")


def test_inside_a_subgraph_the_panel_reads_and_runs_as_outside(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    ui.do("""() => { const graph = app.graph
        const inside = ['LambdaSamplerMultistep', 'BasicScheduler']
        const inner = new Set(graph.nodes.filter((n) => inside.includes(n.comfyClass)))
        app.canvas.graph.convertToSubgraph(inner) }""")
    ui.do("""() => { const node = app.graph.nodes.find((n) => n.subgraph)
        app.canvas.openSubgraph(node.subgraph, node) }""")
    ui.fit()
    ui.reads("count: model evaluations: 12")
    ui.put(ui.node(SCHEDULER), "steps", 11)
    ui.put(ui.node(SAMPLER), "order", 2)
    ui.reads("count: model evaluations: 11")
    ui.run()
    ui.reads("count: model evaluations: 11 (last run)")
    ui.do("""() => { const host = app.graph.nodes.find((node) => node.subgraph)
        const inner = host.subgraph.nodes.find((node) => node.comfyClass === 'BasicScheduler')
        const steps = inner.inputs.find((input) => input.name === 'steps')
        host.subgraph.addInput('steps', 'INT').connect(steps, inner)
        host.widgets.find((widget) => widget.name === 'steps').value = 15 }""")
    ui.beside()
    ui.reads("count: model evaluations: 15")  # the value outside, not the one that the node inside keeps


def test_a_sampler_that_is_named_outside_its_subgraph_has_a_panel(ui) -> None:
    ui.load("ksampler")
    ui.put(ui.node("KSampler"), "sampler_name", "euler")
    ui.do("""() => { const outer = app.graph.nodes.find((node) => node.comfyClass === 'KSampler')
        app.canvas.graph.convertToSubgraph(new Set([outer]))
        const host = app.graph.nodes.find((node) => node.subgraph)
        app.canvas.openSubgraph(host.subgraph, host)
        const inner = host.subgraph.nodes[0]
        const input = inner.inputs.find((input) => input.name === 'sampler_name')
        host.subgraph.addInput('sampler_name', 'COMBO').connect(input, inner) }""")
    name = """(name) => { const host = app.graph.nodes.find((node) => node.subgraph)
        host.widgets.find((widget) => widget.name === 'sampler_name').value = name }"""
    for _ in range(2):
        ui.do(name, "lambda_2m")
        ui.beside()
        ui.reads("count: model evaluations: ")
        ui.do(name, "euler")
        ui.beside()
        until("it is put away", lambda: all(panel["height"] == 0 for panel in ui.panels()), ui.panels)


def test_a_subgraph_used_twice_shows_the_use_that_is_open(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    ui.do("""() => { const inside = ['LambdaSamplerMultistep', 'BasicScheduler']
        const inner = new Set(app.graph.nodes.filter((n) => inside.includes(n.comfyClass)))
        app.canvas.graph.convertToSubgraph(inner)
        const { subgraph } = app.graph.nodes.find((node) => node.subgraph)
        app.graph.add(LiteGraph.createNode(subgraph.id)) }""")
    go = """(k) => { const host = app.graph.nodes.filter((node) => node.subgraph)[k]
        app.canvas.openSubgraph(host.subgraph, host) }"""
    for k, words in ((0, "count: model evaluations: 12"), (1, "count: model evaluations a step: 1"),
                     (0, "count: model evaluations: 12")):
        ui.do("() => app.canvas.setGraph(app.graph)")
        ui.do(go, k)
        ui.fit()
        ui.reads(words)


def test_a_small_ksampler_grows_for_all_that_its_panel_says_and_shrinks_again(ui) -> None:
    def whole(*texts: str) -> float:
        """The node's height, when a panel with these texts shows all of its lines."""
        ui.reads(*texts)
        until("no line is cut off", lambda: all(panel["cut"] < 2 for panel in ui.panels()), ui.panels)
        return ui.do("() => app.graph.nodes.find((node) => node.comfyClass === 'KSampler').size[1]")

    workflow = example("ksampler")
    node = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    node["size"], node["widgets_values"][4] = [315, 262], "lambda_2m"
    ui.load(workflow)
    before = whole("model evaluations: 12")
    ui.put(ui.node("KSampler"), "sampler_name", "lambda_fitted")
    grown = whole("as long as", "lambda -")
    ui.put(ui.node("KSampler"), "sampler_name", "lambda_2m")
    if not ui.nodes2:
        assert grown > before
        until("it is as high as before", lambda: whole("model evaluations: 12") == before, ui.panels)
    ui.put(ui.node("KSampler"), "sampler_name", "lambda_amed")
    whole("warning")
    ui.run(expect="error")
    panel = ui.reads("warn: ")
    assert len({*panel["lines"]}) == len(panel["lines"])
    whole("warn: ")


def test_a_collapsed_sampler_hides_its_panel_and_shows_it_again(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    flip = "(id) => { app.graph.getNodeById(id).collapse(); app.graph.setDirtyCanvas(true, true) }"
    ui.do(flip, ui.node(SAMPLER))
    until("it is hidden", lambda: all(panel["height"] == 0 for panel in ui.panels()), ui.panels)
    ui.do(flip, ui.node(SAMPLER))
    until("it is back", lambda: ui.panels() and ui.panels()[0]["height"] > 60, ui.panels)
    ui.reads("model evaluations: 12")


def test_after_a_reload_the_last_run_is_still_known_and_in_another_language(ui) -> None:
    ui.load("sampler_node")
    ui.put(ui.node(SCHEDULER), "steps", 7)
    ui.run()
    ui.reads("count: model evaluations: 7 (last run)")
    saved = ui.saved()
    chinese = json.loads((environment.ROOT / "locales" / "zh" /
                          "main.json").read_text(encoding="utf-8"))["lambdaSolvers"]["panel"]
    try:
        ui.set(**{"Comfy.Locale": "zh"})
        ui.open()
        ui.load(saved)
        ui.reads("count: " + chinese["evaluations_run"].format(count=7))
        output = """(kind) => app.graph.nodes.find((node) => node.comfyClass === kind)
            .outputs[0].localized_name"""
        # the pinned interface leaves titles and widgets in English
        assert not ui.do(output, SAMPLER).isascii()
        ui.picture("chinese")
    finally:
        ui.set(**{"Comfy.Locale": "en"})
        ui.open()
    ui.load(saved)
    ui.reads("count: model evaluations: 7 (last run)")


def test_a_missing_file_is_named_on_its_node(ui) -> None:
    workflow = example("measure_and_share")
    node = next(node for node in workflow["nodes"] if node["type"] == "LambdaMeasureModel")
    node.update(type="LambdaLoadCalibration", inputs=[], widgets_values=["nothing_here.safetensors"])
    node["properties"]["Node name for S&R"] = "LambdaLoadCalibration"
    kept = {link[0] for link in workflow["links"] if link[3] != node["id"]}
    workflow["links"] = [link for link in workflow["links"] if link[0] in kept]
    for other in workflow["nodes"]:
        for output in other.get("outputs", []):
            output["links"] = [link for link in output.get("links") or [] if link in kept]
    ui.load(workflow)
    ui.run(expect="error")
    until("the node says why", lambda: any("there is no calibration 'nothing_here.safetensors'" in line
                                           for panel in ui.panels() for line in panel["lines"]), ui.panels)


def forget(server) -> None:
    """What tests before have measured."""
    for file in (server.base / "models" / "solver_calibrations").glob("*.safetensors"):
        file.unlink()


def test_a_sampler_without_statistics_says_so_before_and_after(ui, server) -> None:
    forget(server)
    ui.load("lambda_v3")
    ui.put(ui.node("LambdaSamplerV3"), "measure", "saved only")
    ui.reads("saved calibration")  # whether the model is known or not
    ui.run(expect="error")
    ui.reads("warn: no saved statistics for ")
    ui.put(ui.node("LambdaSamplerV3"), "measure", "auto")
    ui.run()
    shown = ui.reads("good: statistics", "(last run)")
    assert not any("no saved statistics" in line for line in shown["lines"])


def test_the_help_of_a_node_shows_its_equation_and_its_picture(ui) -> None:
    page = (environment.ROOT / "web" / "docs" / f"{SAMPLER}.md").read_text(encoding="utf-8")
    equation = re.search(r"\n\n    (.+?)  ", page)[1]
    ui.load("sampler_node")
    try:
        ui.do("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", ui.node(SAMPLER))
        ui.page.locator('[data-testid="info-button"]').click()
        until(
            "the picture is loaded", lambda: ui.do(
                "(name) => document.querySelector(`img[src$='/docs/pictures/${name}.webp']`)?.naturalWidth > "
                "500",
                SAMPLER))
        assert equation in ui.page.inner_text("body")
        ui.picture("help")
        # which is asked for first
        ui.logs[:] = [entry for entry in ui.logs if not entry[1].endswith(f"/{SAMPLER}/en.md")]
    finally:
        ui.open()


def test_the_settings_say_whether_to_draw_and_to_measure(ui, server) -> None:
    forget(server)
    put = "([id, value]) => app.extensionManager.setting.set(id, value)"
    ui.load("sampler_node")
    assert ui.reads("model evaluations: 12")["curve"] > 20
    ui.do(put, ["LambdaSolvers.Plot", False])
    until("the curve is gone", lambda: ui.panels()[0]["curve"] == 0)
    ui.do(put, ["LambdaSolvers.Plot", True])
    until("the curve is back", lambda: ui.panels()[0]["curve"] > 20)
    try:
        workflow = example("ksampler")
        next(node for node in workflow["nodes"]
             if node["type"] == "KSampler")["widgets_values"][4] = "lambda_v3"
        ui.load(workflow)
        ui.reads("model evaluations: 12")
        ui.do(put, ["LambdaSolvers.Calibration", "saved only"])
        ui.reads("saved calibration")  # whether the model is known or not
        ui.run(expect="error")
        ui.reads("warn: no saved statistics for ")
    finally:
        ui.do(put, ["LambdaSolvers.Calibration", "auto"])


def hanging(route) -> None:
    """A server that never answers."""


WITHOUT = {
    "no routes of ours": lambda route: route.fulfill(status=404, body="404: Not Found"),
    "no JSON": lambda route: route.fulfill(status=200, content_type="text/html", body="<html>a proxy</html>"),
    "other JSON": lambda route: route.fulfill(status=200, content_type="application/json", body=
                                              '{"nodes": null}'),
    "no connection": lambda route: route.abort(),
}


def test_a_server_that_says_nothing_of_the_pack_leaves_the_interface_as_it_is(ui) -> None:
    try:
        for answer in ("no routes of ours", "other JSON", "no answer"):
            ui.page.unroute("**/lambda_solvers/pack")
            ui.page.route("**/lambda_solvers/pack", WITHOUT.get(answer, hanging))
            ui.logs.clear()
            ui.open()
            ui.load(example("sampler_node"))
            ui.run()
            assert ui.images() and ui.panels() == [] and ui.saved()["nodes"], answer
            assert ui.do("() => app.extensionManager.setting.get('Comfy.Locale')") == "en"
            said = [entry for entry in ui.logs if "Lambda Solvers" in entry[1]]
            assert [kind for kind, _ in said] == ["warning"] and "no panels on nodes" in said[0][1], answer
            assert not [
                entry for entry in ui.logs if entry[0] == "pageerror" or "Error loading extension" in entry[1]
            ], answer
    finally:
        ui.page.unroute("**/lambda_solvers/pack")
    ui.open()
    ui.logs.clear()
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")


def test_a_panel_without_an_answer_says_so_and_goes_on_when_there_is_one(ui) -> None:
    ui.load("sampler_node")
    ui.reads("model evaluations: 12")
    for answer in WITHOUT.values():
        ui.page.route("**/lambda_solvers/panel", answer)
        try:
            ui.put(ui.node(SAMPLER), "order", 3)
            ui.reads("warn: warning: the server has no answer")
        finally:
            ui.page.unroute("**/lambda_solvers/panel")
        ui.put(ui.node(SAMPLER), "order", 2)
        ui.reads("count: model evaluations: 12")
    assert not [entry for entry in ui.logs if entry[0] == "pageerror"]
    ui.logs.clear()


def test_a_fault_in_a_panel_is_told_once_and_ends_nothing_of_the_interface_s(ui) -> None:
    """Another extension may change what ours asks a node for."""
    ui.load("ksampler")
    ui.reads("model evaluations: 12")
    ui.do("""() => { const node = app.graph.nodes.find((node) => node.comfyClass === 'KSampler')
        node.inputs.findIndex = () => { throw new Error('changed') }
        node.widgets.find((widget) => widget.name === 'steps').callback(13)
        node.widgets.find((widget) => widget.name === 'steps').callback(14)
        node.onConfigure(node.serialize()) }""")
    ui.page.wait_for_timeout(600)
    said = [entry for entry in ui.logs if "Lambda Solvers: a panel failed" in entry[1]]
    assert len(said) == 1 and not [entry for entry in ui.logs if entry[0] == "pageerror"]
    ui.logs.clear()


def test_the_image_of_a_calibrated_run_is_opened_and_queued_again_with_what_it_says_of_the_calibration(
        ui) -> None:
    """As a workflow, and as what the server ran."""
    ui.load("lambda_v3")
    ui.run()
    ui.reads("digest ", "(last run)")
    [shown] = [image for image in ui.images() if image["type"] == "output"][:1]
    with Image.open(ui.server.file(shown)) as image:
        prompt = json.loads(image.info["prompt"])
    [noted] = [
        node["_meta"]["lambda_solvers"] for node in prompt.values()
        if "lambda_solvers" in node.get("_meta", {})
    ]
    [used] = noted["calibrations"]
    ui.reads(f"the last run used {used['name']}, digest {used['digest']}")
    ui.do(
        "async (url) => { const image = await (await fetch(url)).blob(); await app.handleFile(new "
        "File([image], 'a.png', {type: 'image/png'})) }",
        f"/api/view?filename={shown['filename']}&subfolder={shown['subfolder']}&type=output")
    ui.reads("digest ", "(last run)")
    ui.do("async (prompt) => { await app.loadApiJson(prompt, 'a.json') }", prompt)
    ui.reads("model evaluations")
    ui.run()
