"""Names of calibration files as anyone may type them, or another pack may make them up."""
from __future__ import annotations

import importlib
import random
import sys
import time
import types
from pathlib import Path

import environment
from samplers import Statistics

from .found import Found

PIECES = ["..", ".", "", "/", "\\", "//", "a", "b c", "CON", "nul", "com1.x", "LPT9", "aux", "C:", "~",
          "%2e%2e", "..;", "...", "a.", "a ", " a", "\0", "\n", "\x1b[31m", "\u202e", "\u200b", "\ufeff",
          "\ud800", "\uff0e\uff0e", "\u2215", "\u00e9", "e\u0301", "\U0001f600", "x" * 90, "\u6f22" * 40,
          "link", "link/x", "LINK", ".safetensors", ".part", "$(id)", "`id`", "'", '"', "<b>", "|", "?",
          "*", "-rf", "/etc/passwd", "C:\\Windows", "\\\\host\\share", "partial", ".git", "a:b",
          "con .txt", "COM\u00b9"]
RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$",
            *(f"{port}{k}" for port in ("com", "lpt") for k in "123456789\u00b9\u00b2\u00b3")}


class Here:
    """A folder of calibrations, as a host names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def directory(self) -> Path:
        return self.folder

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.safetensors"))

    def path(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None


def hosting(folder: Path) -> types.ModuleType:
    """The pack's hosting.store without a host, on this folder."""
    whole = sys.modules["whole"] = types.ModuleType("whole")
    whole.__path__ = [str(environment.ROOT)]
    store = importlib.import_module("whole.hosting.store")
    store.use(Here(folder))
    return store


def names(folder: Path, chance: random.Random, seconds: float) -> Found:
    """Each is refused with a ValueError, or is a file within the folder that every system can hold."""
    inside, outside, found, content = folder / "inside", folder / "outside", Found(), Statistics.constant()
    outside.mkdir()
    store = hosting(inside)
    (inside / "link").symlink_to(outside)
    end = time.monotonic() + seconds
    while time.monotonic() < end or found.figures["names"] < 1000:
        name = "".join(chance.choice(PIECES) + chance.choice(["", "", "/", "\\"])
                       for _ in range(chance.randrange(1, 5)))
        found.figures["names"] += 1
        try:
            path = store.place(name)
            if chance.random() < 0.1:
                content.save(path, overwrite=True)
        except ValueError as fault:
            found.figures["refused"] += 1
            if not str(fault).startswith("name = "):
                found.fault(f"{name!r}: {fault}")
            continue
        except Exception as fault:
            found.fault(f"{name!r}: {type(fault).__name__}: {fault}")
            continue
        _look(found, name, path, inside)
        if [*outside.iterdir()] or {path.name for path in folder.iterdir()} != {"inside", "outside"}:
            found.fault(f"{name!r} left the folder")
    return found


def _look(found: Found, name: str, path: Path, inside: Path) -> None:
    """Whether a place is one, on Windows too."""
    if not path.resolve().is_relative_to(inside.resolve()):
        found.fault(f"{name!r} leads to {path}")
    for part in path.relative_to(inside).parts:
        device = part.split(".")[0].rstrip(" ").lower() in RESERVED
        if device or part[-1] in ". " or set(part) & set('<>:"|?*'):
            found.fault(f"{name!r} makes {part!r}, which Windows cannot hold")
