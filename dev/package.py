"""What the registry and ComfyUI-Manager do with this repository, by their own tools: python dev/package.py

    archive   comfy-cli reads pyproject.toml, packs the archive (git but .comfyignore), runs its ruff rules
    static    comfy-test's levels that need no network, on the unpacked archive in a running server
    manager   the Manager's command line installs, updates, disables, enables, uninstalls the last commit

Everything happens in .dev/package: a virtual environment with those tools that sees the packages of .dev/venv
(the Manager installs packages as it likes, so it gets none of the development environment), a copy of
ComfyUI, and a clone of the repository, served on a loopback port, because the Manager takes no file://
address. After each of its steps a real server is started and asked for our nodes; after the last, the files
that are left are held against those before the first. A registry needs the repository's address too: while
[project.urls] of pyproject.toml is empty, this says so, first and last. tests/test_package.py has what of
this is quick.
"""
from __future__ import annotations

import functools
import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

TOOLS = ["uv", "comfyui-manager==4.3", "comfy-cli==1.23.0", "comfy-test==0.4.15"]
LEVELS = ["syntax", "javascript", "install", "registration", "validation", "warnings", "hazards"]
NAME = "lambda-solvers"
NAMES = runpy.run_path(str(environment.ROOT / "hosting" / "names.py"))["NAMES"]
HOME = environment.HOME / "package"
BIN = HOME / "venv" / "bin"
THEIRS = ("user/", "temp/", "input/3d", "server.log", "custom_nodes/.disabled")  # not ours


def main() -> None:
    place = environment.enter("test")
    addressed()
    tools(place)
    archive = packed()
    static(place, archive)
    left = cycle(place)
    print(f"files left behind: {left or 'none'}")
    addressed()
    raise SystemExit(bool(left))


def addressed() -> None:
    """Say loudly that nobody has filled in the repository's address."""
    declared = (environment.ROOT / "pyproject.toml").read_text()
    if not re.search(r'^\[project\.urls\]\n(?:#.*\n)*Repository = "https?://', declared, re.M):
        frame = "!" * 100
        print(f"\n{frame}\nNOT READY TO PUBLISH: [project.urls] in pyproject.toml is empty. Fill in\n"
              f"    Repository = \"https://...\"\nwith this repository's address. All else is checked.\n"
              f"{frame}\n",
              flush=True)


def tools(place: environment.Environment) -> None:
    if all((BIN / name).exists() for name in ("cm-cli", "comfy", "comfy-test")):
        return
    subprocess.run([place.python, "-m", "venv", HOME / "venv"], check=True)
    [packages] = (HOME / "venv" / "lib").glob("python*/site-packages")
    [theirs] = (place.python.parent.parent / "lib").resolve().glob("python*/site-packages")
    (packages / "development.pth").write_text(f"{theirs}\n")
    subprocess.run([BIN / "python", "-m", "pip", "install", "-q", *TOOLS], check=True)


def packed() -> Path:
    """The registry's archive, by the code that publishes it."""
    archive = HOME / "node.zip"
    code = ("import sys; from comfy_cli.registry.config_parser import extract_node_configuration as read;"
            "from comfy_cli.file_utils import zip_files; config = read();"
            "project = config.project;"
            "assert project.name and project.version and config.tool_comfy.publisher_id, config;"
            "print(config); zip_files(sys.argv[1])")
    subprocess.run([BIN / "python", "-c", code, archive], cwd=environment.ROOT, check=True)
    print(f"archive: {archive.stat().st_size} bytes", flush=True)
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "S102,S307,E702", "."],
                   cwd=environment.ROOT, check=True)
    return archive


def static(place: environment.Environment, archive: Path) -> None:
    """comfy-test on the unpacked archive, attached to a server of ours.

    The server's log is not shown to it: it would take core's audio nodes, which miss torchaudio here, for a
    fault of the pack. That ours are there, `offered` sees.
    """
    from comfyui_server import Server

    comfyui = fresh(place)
    pack = comfyui / "custom_nodes" / NAME
    with zipfile.ZipFile(archive) as content:
        content.extractall(pack)
    (pack / "comfy-test.toml").write_text(f"[test]\nlevels = {json.dumps(LEVELS)}\n")
    logs = HOME / "comfy-test"
    logs.mkdir(exist_ok=True)
    homes = dict.fromkeys(("HOME", "TMPDIR", "COMFY_TEST_LOGS_DIR"), str(logs))
    with Server(place._replace(comfyui=comfyui), comfyui) as server:
        offered(server, "unpacked", listed=True)
        subprocess.run([BIN / "comfy-test", "run", "--server-url", server.url], cwd=pack, check=True,
                       env={**os.environ, **homes})


def cycle(place: environment.Environment) -> list[str]:
    """Install to uninstall: the files that are left."""
    comfyui = fresh(place)
    shutil.rmtree(HOME / "served", ignore_errors=True)
    subprocess.run(["git", "clone", "-q", "--bare", environment.ROOT, HOME / "served" / NAME], check=True)
    subprocess.run(["git", "update-server-info"], cwd=HOME / "served" / NAME, check=True)
    before = files(comfyui)
    with served(HOME / "served") as address:
        manager(comfyui, "install", f"{address}/{NAME}")
        check(place, comfyui, "installed", listed=True)
        commit(HOME / "served" / NAME)
        manager(comfyui, "update", NAME)
        if not (comfyui / "custom_nodes" / NAME / "a_new_file").exists():
            raise SystemExit("update: the new commit did not arrive")
        check(place, comfyui, "updated", listed=True)
        for step, done, listed in (("disable", "disabled", False), ("enable", "enabled", True),
                                   ("uninstall", "uninstalled", False)):
            manager(comfyui, step, NAME)
            check(place, comfyui, done, listed)
    own = (*THEIRS, "models/solver_calibrations")
    return sorted(name for name in files(comfyui) - before if not name.startswith(own))


def fresh(place: environment.Environment) -> Path:
    """A ComfyUI with the tiny checkpoint and without this pack."""
    comfyui = HOME / "ComfyUI"
    shutil.rmtree(comfyui, ignore_errors=True)
    shutil.copytree(place.comfyui, comfyui, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    environment.base_directory(comfyui)
    (comfyui / "custom_nodes" / NAME).unlink()
    return comfyui


class served:
    """A folder on a loopback port: `with served(folder) as address`."""

    def __init__(self, folder: Path) -> None:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

        handler = functools.partial(Quiet, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *reason: object) -> None:
        self.server.shutdown()


def commit(bare: Path) -> None:
    """One more file in the served repository, as an update."""
    work = HOME / "served" / "work"
    git = ["git", "-c", "user.name=update", "-c", "user.email=update@localhost"]
    subprocess.run(["git", "clone", "-q", bare, work], check=True)
    (work / "a_new_file").write_text("")
    subprocess.run([*git, "add", "a_new_file"], cwd=work, check=True)
    subprocess.run([*git, "commit", "-qm", "a new file"], cwd=work, check=True)
    subprocess.run(["git", "push", "-q"], cwd=work, check=True)
    subprocess.run(["git", "update-server-info"], cwd=bare, check=True)


def manager(comfyui: Path, *arguments: str) -> None:
    run = subprocess.run([BIN / "cm-cli", *arguments, "--mode", "local"], cwd=comfyui, text=True,
                         capture_output=True, env={**os.environ, "COMFYUI_PATH": str(comfyui)})
    (HOME / f"{arguments[0]}.log").write_text(run.stdout + run.stderr)
    if run.returncode or "ERROR: An error occurred" in run.stdout:
        raise SystemExit(f"cm-cli {' '.join(arguments)}: {run.stdout[-2000:]}{run.stderr[-2000:]}")


def check(place: environment.Environment, comfyui: Path, what: str, listed: bool) -> None:
    from comfyui_server import Server

    with Server(place._replace(comfyui=comfyui), comfyui) as server:
        offered(server, what, listed)


def offered(server, what: str, listed: bool) -> None:
    """Our nodes and all our names are offered by a server that was just started, or none of them."""
    info = server.get("/object_info")
    nodes = [name for name in info if name.startswith("Lambda")]
    names = [name for name in info["KSampler"]["input"]["required"]["sampler_name"][0] if name in NAMES]
    if bool(nodes) != listed or len(names) != len(NAMES) * listed:
        raise SystemExit(f"{what}: {len(nodes)} nodes and {len(names)} names are offered; see {server.log}")
    print(f"{what}: {len(nodes)} nodes, {len(names)} names", flush=True)


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


if __name__ == "__main__":
    main()
