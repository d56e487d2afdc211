"""ComfyUI's interface in headless Chromium: the pinned frontend and the newest one, with classic nodes and
with Nodes 2.0."""
from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import environment
import workflows
from comfyui_server import Server

sys.path.append(str(Path(__file__).parent))
from interface import CHROMIUM, Interface, browser  # noqa: E402

PICTURES = environment.HOME / "browser"
"""Where the tests leave their screenshots."""


@pytest.fixture(scope="package")
def executable() -> str:
    """A browser's program. Without one the tests fail in CI, and are skipped elsewhere."""
    if CHROMIUM is None:
        missing = "no Chromium: install the package chromium, or name one in the variable CHROMIUM"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip("NO BROWSER TEST WAS RUN: " + missing)
    return CHROMIUM


@pytest.fixture(scope="package", params=["pinned", "newest"])
def server(request, executable, tmp_path_factory):
    base = environment.base_directory(tmp_path_factory.mktemp(request.param))
    workflows.doughnut(base / "input" / "example.png")
    arguments = ["--front-end-root", str(environment.newest_frontend())] if request.param == "newest" else []
    with Server(environment.ensure(), base, *arguments) as running:
        running.frontend = request.param
        yield running


@pytest.fixture(scope="module")
def chromium(server, executable):
    """After the server, and gone before the next: Playwright keeps an event loop running, beside which
    there is no other."""
    with browser(executable) as running:
        yield running


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def opened(request, server, chromium):
    interface = Interface(chromium, server, nodes2=request.param == "nodes2",
                          pictures=PICTURES / f"{server.frontend}-{request.param}")
    yield interface
    interface.close()


@pytest.fixture
def ui(opened, request):
    """The interface, as after a start; afterwards the console must hold nothing of ours."""
    opened.logs.clear()
    yield opened
    opened.picture(re.sub(r"\W+", "_", request.node.originalname))
    assert opened.complaints() == []
