"""Calibration files: their names, and their places in the folder of the host."""
from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any, Callable, Protocol

from ..samplers.learning.storage import Damaged, OtherKind, digest

FOLDER = "solver_calibrations"
ENDING = ".safetensors"
NONE = "[none saved yet]"
LONGEST = 200  # bytes of a name: with what is added while it is written, file systems take 255
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$",
           *(f"{port}{k}" for port in ("com", "lpt") for k in "123456789\u00b9\u00b2\u00b3")}
"""On Windows, whatever follows after a dot; the last three are raised 1, 2 and 3."""


class Folder(Protocol):
    """The calibrations of a host."""

    def directory(self) -> Path:
        """Where files are written."""
    def names(self) -> list[str]:
        """Of all files, with the folders below it that they are in; OSError if it cannot be read."""
    def path(self, name: str) -> Path | None:
        """The file of such a name, if there is one."""


_folder: Folder


def use(folder: Folder) -> None:
    """Keep calibrations there. A process has one host."""
    global _folder
    _folder = folder
    listed()


def directory() -> Path:
    return _folder.directory()


def listed() -> list[str]:
    """The names of all files; a folder that is gone is made again, and one that cannot be made holds
    nothing."""
    try:
        directory().mkdir(parents=True, exist_ok=True)
        return _folder.names()
    except OSError:
        return []


def names() -> list[str]:
    return listed() or [NONE]


def existing(name: str) -> Path:
    """The file of a listed name; ValueError if there is none."""
    if name == NONE:
        raise ValueError("no calibration is chosen: run Measure Model first, or put a file into "
                         f"{directory()}; then refresh the node definitions (key R) and choose it")
    path = _folder.path(name)
    if path is None:
        raise ValueError(f"there is no calibration {name!r} in {directory()}: run Measure Model first, or "
                         "put a file there and reload the page")
    return path


def place(name: str) -> Path:
    """Where a file of this name goes; ValueError if the name would leave the folder or is not a plain one."""
    stem = name.strip().removesuffix(ENDING)
    parts = stem.replace("\\", "/").split("/")
    if not all(map(_plain, parts)) or len(stem.encode()) > LONGEST:
        raise ValueError(f"name = {name!r} cannot be a file in {FOLDER}: use up to {LONGEST} letters, "
                         "digits, '-', '_', and '/' for subfolders, no '..', no absolute path, no dot or "
                         "space at an end, and none that Windows keeps for devices, such as con")
    path = directory().joinpath(*parts[:-1], parts[-1] + ENDING)
    if not path.resolve().is_relative_to(directory().resolve()):
        raise ValueError(f"name = {name!r} leads out of {FOLDER} (through a link): choose another name")
    if any(map(os.path.isfile, [*path.parents][:len(parts) - 1])):  # False of what cannot be looked at
        raise ValueError(f"name = {name!r} leads through a file: choose another folder")
    return path


def _plain(part: str) -> bool:
    """Whether a file or folder of this name can be on every system; each way it may be shown is printable."""
    return bool(part) and part.isprintable() and part[0] != "." and part[-1] not in ". " and not (
        set(part) & set('<>:"|?*')) and part.split(".")[0].rstrip(" ").lower() not in DEVICES


def free(name: str, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """The file of this name, or of the first of name-2, name-3, ... that is not taken."""
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(path for path in map(place, names) if not taken(path))


def spare(name: str, content: Any) -> Path:
    """A file for what was just measured: as `free`, but one that holds the same of the same conditions, or
    that no version can read, is replaced."""
    return free(name, lambda path: path.exists() and not _gives_way(path, content))


def _gives_way(path: Path, content: Any) -> bool:
    try:
        held = type(content).load(path)
        return digest(held.arrays()) == digest(content.arrays()) and (
            held.about.get("conditions") == content.about.get("conditions"))
    except Damaged:
        return True
    except ValueError:  # of another kind or version
        return False


def read(kind: type, name: str) -> Any | None:
    """What a listed file holds, if it is of this kind; a damaged one is named in the log."""
    try:
        return kind.load(existing(name))
    except OtherKind:
        return None
    except ValueError as fault:
        logging.warning("Lambda Solvers: %s", fault)
        return None


def shown(path: Path) -> str:
    return path.relative_to(directory()).as_posix()


def partial(name: str) -> Path:
    """Where a measurement is kept until it is whole."""
    return place(f"partial/{name}").with_suffix(".part")
