"""A person at ComfyUI's interface: opens workflows, edits widgets, presses Run, and reads what the nodes
show."""
from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from playwright.sync_api import sync_playwright

import demo

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.58.1", "Comfy.Workflow.Persist": False,
    "Comfy.EnableTooltips": False, "Comfy.VueNodes.AutoScaleLayout": False,
    "Comfy.Release.Status": "changelog seen", "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Locale": "en"
}
READY = ("() => window.app?.extensionManager && window.app?.graph"
         " && !document.querySelector('.p-blockui-mask')")
PANELS = """() => [...document.querySelectorAll('.lambda-solvers-panel')].map((el) => ({
    shown: el.style.display !== 'none',
    lines: [...el.querySelectorAll('.lines div')].map((line) => line.className + ': ' + line.textContent),
    points: (el.querySelector('.points').getAttribute('d') ?? '').split('M').length - 1,
    curve: el.querySelector('svg').getBoundingClientRect().height,
    cut: el.scrollHeight - el.offsetHeight,
    height: el.getBoundingClientRect().height}))"""
OVERLAPS = """(nodes2) => {
    const box = (node) => {
        const drawn = nodes2 && document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
        return drawn ? [drawn.x, drawn.y, drawn.width, drawn.height] : [...node.getBounding()]
    }
    const boxes = app.graph.nodes.map((node) => [node.title, ...box(node)]), found = []
    for (const [a, x, y, w, h] of boxes) for (const [b, u, v, s, t] of boxes)
        if (a < b && x < u + s && u < x + w && y < v + t && v < y + h)
            found.push([a, b, Math.min(v + t - y, y + h - v)])
    return found
}"""
SPILT = """(nodes2) => app.graph.nodes.flatMap((node) => {
    const group = app.graph.groups.find(({ _bounding: [x, y, w, h] }) =>
        x <= node.pos[0] && node.pos[0] < x + w && y <= node.pos[1] && node.pos[1] < y + h)
    const drawn = nodes2 && document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    const height = drawn && drawn.height / app.canvas.ds.scale - LiteGraph.NODE_TITLE_HEIGHT
    const bottom = node.pos[1] + (height ?? node.size[1])
    const below = bottom - group._bounding[1] - group._bounding[3]
    return below > 0 ? [[node.title, below]] : []
})"""
WATCH = """() => {
    window.seen = []
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted', 'executed'])
        comfyAPI.api.api.addEventListener(kind, (event) => window.seen.push([kind, event.detail]))
}"""


@contextmanager
def browser(executable: str | None = CHROMIUM) -> Iterator[Any]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"])
        yield running
        running.close()


class Interface:
    def __init__(self, browser, server, nodes2: bool, pictures: Path, scale: int = 1) -> None:
        self.browser, self.server, self.nodes2, self.pictures = browser, server, nodes2, pictures
        self.logs: list[tuple[str, str]] = []
        self.context = browser.new_context(viewport={"width": 1500, "height": 900}, locale="en-US",
                                           device_scale_factor=scale)
        # Nothing outside this machine is asked for, so nothing waits for an answer.
        self.context.route(lambda url: not url.startswith((server.url, "data:", "blob:")),
                           lambda route: route.abort())
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.logs.append((message.type, message.text)))
        self.page.on("pageerror", lambda fault: self.logs.append(("pageerror", str(fault))))
        self.page.on(
            "response", lambda answer: answer.status >= 400 and self.logs.append(
                (str(answer.status), answer.url)))
        self.set(**SETTINGS, **{"Comfy.VueNodes.Enabled": nodes2})
        self.open()

    @property
    def keeps_places(self) -> bool:
        """Whether nodes stay where a workflow has them: Nodes 2.0 of frontend 1.32.9 scales and moves them
        by itself."""
        return not self.nodes2 or self.server.frontend != "pinned"

    def close(self) -> None:
        self.context.close()

    def set(self, **settings: Any) -> None:
        """Write settings on the server; the page knows of them once it is opened again."""
        urllib.request.urlopen(urllib.request.Request(
            self.server.url + "/api/settings", data=json.dumps(settings).encode(), method="POST",
            headers={"Content-Type": "application/json"})).read()

    def open(self) -> None:
        """Open the page, or reload it."""
        self.page.goto(self.server.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_function("() => window.app.vueAppReady !== false", timeout=60_000)
        self.page.evaluate(WATCH)

    def do(self, javascript: str, argument: Any = None) -> Any:
        return self.page.evaluate(javascript, argument)

    def command(self, name: str) -> None:
        self.do("(name) => app.extensionManager.command.execute(name)", name)

    def load(self, workflow: dict | str) -> None:
        """Put a workflow, or the example of this name, on the canvas, all of it in view."""
        workflow = example(workflow) if isinstance(workflow, str) else workflow
        self.do(
            "() => { for (const el of document.querySelectorAll('.lambda-solvers-panel')) "
            "el.classList.add('old') }"
        )
        self.do("async (workflow) => { await app.loadGraphData(workflow) }", workflow)
        self.page.wait_for_function("() => !document.querySelector('.lambda-solvers-panel.old')",
                                    timeout=10_000)
        self.fit()

    def fit(self) -> None:
        self.command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(300)  # it moves the view for 250 ms, even from a place to the same
        until("the view has come to rest",
              lambda: self._same("() => [app.canvas.ds.scale, ...app.canvas.ds.offset]", 150))

    def run(self, expect: str = "success") -> None:
        """Press Run and wait for the end."""
        self.do("() => { window.seen.length = 0 }")
        self.page.locator(
            'button[data-testid="queue-button"], div[data-testid="queue-button"] button').first.click()
        self.page.wait_for_function("() => window.seen.some(([kind]) => kind.startsWith('execution_'))",
                                    timeout=300_000)
        end, detail = self.do("() => window.seen.find(([kind]) => kind.startsWith('execution_'))")
        assert end == "execution_" + expect, detail
        if expect == "error":  # a dialog, in some versions
            self.page.wait_for_timeout(300)
            self.page.keyboard.press("Escape")
            self.page.wait_for_function("() => !document.querySelector('.p-dialog-mask')", timeout=5_000)

    def images(self) -> list[dict]:
        """The files that nodes have shown in the last run."""
        return [image for kind, detail in self.do("() => window.seen") if kind == "executed"
                for image in (detail["output"] or {}).get("images", [])]

    def panels(self) -> list[dict]:
        return [panel for panel in self.do(PANELS) if panel["shown"]]

    def reads(self, *texts: str) -> dict:
        """Wait until a panel has a line with each of these texts; that panel."""
        def those() -> list[dict]:
            return [
                panel for panel in self.panels() if all(
                    any(text in line for line in panel["lines"]) for text in texts)
            ]
        until(f"a panel reads {texts}", those, self.panels)
        return those()[0]

    def overlaps(self) -> list:
        """Pairs of nodes that cover each other, and how far, once the interface has laid them out."""
        until("the nodes have come to rest",
              lambda: self._same(f"() => JSON.stringify(({OVERLAPS})({str(self.nodes2).lower()}))", 300))
        return self.do(OVERLAPS, self.nodes2)

    def spilt(self) -> list:
        """Nodes that reach below the group they stand in, and how far, after `overlaps` has waited."""
        return self.do(SPILT, self.nodes2)

    def saved(self) -> dict:
        """The workflow as it is saved, once it does not change any more."""
        until("the workflow has come to rest",
              lambda: self._same("() => JSON.stringify(app.graph.serialize())", 200))
        return self.do("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def node(self, kind: str) -> Any:
        """The id of the one node of a class, in the graph that is seen."""
        [found] = self.do(
            "(kind) => app.canvas.graph.nodes.filter((node) => node.comfyClass === kind).map((node) => "
            "node.id)",
            kind)
        return found

    def count_up(self, node: Any, widget: str) -> None:
        """Click the arrow or button behind a number."""
        if self.nodes2:
            self.do("""(id) => {
                const node = app.canvas.graph.getNodeById(id)
                app.canvas.ds.scale = 1
                app.canvas.ds.offset = [200 - node.pos[0], 200 - node.pos[1]]
                app.canvas.setDirty(true, true)
            }""", node)  # zoomed out, widgets are not drawn
            self.page.wait_for_timeout(500)
            number = self.page.locator(f'[data-node-id="{node}"] input').nth(self.do(
                """([id, name]) => app.canvas.graph.getNodeById(id).widgets.filter((w) => w.type === 'number')
                   .findIndex((w) => w.name === name)""", [node, widget]))
            value = self.do(
                "([id, name]) => app.canvas.graph.getNodeById(id).widgets.find((w) => w.name === name).value",
                [node, widget])
            box = number.bounding_box()
            self.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            self.page.wait_for_timeout(150)
            self.page.keyboard.press("Control+A")
            self.page.keyboard.type(str(value + 1))
            self.page.keyboard.press("Enter")
        else:
            self.page.mouse.click(*self.do(
                """([id, name]) => {
                const node = app.canvas.graph.getNodeById(id)
                const widget = node.widgets.find((w) => w.name === name)
                const frame = app.canvas.canvas.getBoundingClientRect()
                const at = app.canvas.ds.convertOffsetToCanvas(
                    [node.pos[0] + node.size[0] - 25, node.pos[1] + widget.last_y + 10])
                return [at[0] + frame.left, at[1] + frame.top]
            }""", [node, widget]))

    def beside(self) -> None:
        """Click where no node is. Soon after another click it would be a double one, which opens a search."""
        self.page.wait_for_timeout(700)
        self.page.mouse.click(80, 600)

    def aside(self, node: Any) -> None:
        """Move a node to where no other is."""
        self.do(
            "(id) => { const node = app.canvas.graph.getNodeById(id); node.pos = [0, 700]; "
            "app.graph.setDirtyCanvas(true, true) }",
            node)
        self.fit()

    def put(self, node: Any, widget: str, value: Any) -> None:
        """Choose a value, as a widget's menu does."""
        self.do("""([id, name, value]) => { const node = app.canvas.graph.getNodeById(id)
            const widget = node.widgets.find((w) => w.name === name)
            widget.value = value; widget.callback?.(value, app.canvas, node) }""", [node, widget, value])

    def picture(self, name: str) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def complaints(self) -> list[tuple[str, str]]:
        """What the console holds of this pack."""
        return [
            entry for entry in self.logs
            if "lambda_solvers" in entry[1] or "lambda-solvers/" in entry[1] or entry[0] == "pageerror"
        ]

    def _same(self, javascript: str, milliseconds: int) -> bool:
        before = self.do(javascript)
        self.page.wait_for_timeout(milliseconds)
        return self.do(javascript) == before


def until(what: str, true: Callable[[], bool], state: Callable[[], Any] = lambda: "",
          seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s until {what}; {state()}"
        time.sleep(0.05)


def example(name: str) -> dict:
    """An example workflow with the nano emoji, a latent of its size, and of several prompts two."""
    workflow = json.loads((demo.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            node["widgets_values"] = [demo.NANO]
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"] = [demo.SIZE, demo.SIZE, 1]
        if node["type"] in ("LambdaTuneFitted", "LambdaTrainHypersolver"):
            node["widgets_values"] = ["\n".join(value.split("\n")[:2]) if isinstance(value, str) else value
                                      for value in node["widgets_values"]]
        if node["type"] == "LambdaTrainHypersolver":
            short = {4: 1, 6000: 20}  # images, training
            node["widgets_values"] = [short.get(value, value) if k not in (6, 7) else value
                                      for k, value in enumerate(node["widgets_values"])]
    return workflow
