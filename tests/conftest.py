"""The path, the order of the tests, and one ComfyUI server for all that start it alike.

This folder (`problems`), the repository root (`samplers`) and dev/ (`measure`) go on the path after
everything else, because ComfyUI has a top-level module `nodes` too: tests that run ComfyUI do so in a process
of its own.
"""
from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT), str(ROOT / "dev")]
from slow import QUICK, part  # noqa: E402

settings.register_profile("the same every time", derandomize=True)
if os.environ.get("CI"):  # new examples are for who can look into what they find
    settings.load_profile("the same every time")
torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

LONGEST = [
    "browser", "server_v3", "server_identity", "server_hypersolver", "server_amed", "server_compare",
    "server_metadata", "server", "workflows", "amed", "calibrate"
]
"""Where the most time goes. Two processes end together if what takes longest is begun first."""
TOGETHER = {"browser", "package", "webui_real", "refit", "border"}
"""In one process, for a fixture that takes long to make; as are the tests of a server with the same flag. All
others go to whichever process is free."""


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: not among the README's tests; dev/test.py --all runs it")
    config.addinivalue_line("markers", "thorough: runs only when named, as in dev/test.py tests/browser")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list) -> None:
    def group(item) -> str:
        return "browser" if item.path.parent.name == "browser" else item.path.stem.removeprefix("test_")

    for item in items:
        if (of := part(item.name, group(item) == "browser")) != QUICK:
            item.add_marker(of)
        flag = item.callspec.params.get("flag") if hasattr(item, "callspec") else None
        if flag or group(item) in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(flag or group(item)))
    items.sort(key=lambda item: LONGEST.index(group(item)) if group(item) in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A report goes from one process to the other as UTF-8, and a test logs what is none on purpose."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode())
                       for title, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    """A check that did not run is not a check that passed."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} CHECKS WERE NOT RUN", sep="!", red=True)
        for reason in sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped}):
            same = [
                report.nodeid for report in skipped if report.longrepr[2].removeprefix("Skipped: ") == reason
            ]
            terminalreporter.line(f"{len(same)}: {reason} ({same[0]}{', ...' * (len(same) > 1)})")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A ComfyUI base directory with the pack, the tiny checkpoint and tests/doubles. All servers of a
    process share it."""
    import environment
    path = environment.base_directory(tmp_path_factory.mktemp("comfyui"))
    environment.link_to(path / "custom_nodes" / "doubles", ROOT / "tests" / "doubles")
    return path


@pytest.fixture(scope="session")
def servers(base):
    """servers(*arguments): the one server of this command line."""
    import environment
    from comfyui_server import Server
    running: dict[tuple[str, ...], Server] = {}
    with ExitStack() as stack:
        def of(*arguments: str) -> Server:
            if arguments not in running:
                log = base / f"server{''.join(arguments)}.log"
                running[arguments] = stack.enter_context(
                    Server(environment.ensure(), base, *arguments, log=log))
            return running[arguments]

        yield of


@pytest.fixture(scope="session")
def server(servers):
    return servers()


@pytest.fixture
def folder(base) -> Path:
    """An empty folder of calibrations."""
    path = base / "models" / "solver_calibrations"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
