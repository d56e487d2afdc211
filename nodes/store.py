"""Calibration files: models/solver_calibrations, and which of them belongs to a model at a guidance."""
from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any, Callable, Mapping

import folder_paths

from ..samplers.learning.storage import Damaged, OtherKind

FOLDER = "solver_calibrations"
ENDING = ".safetensors"
NONE = "[none saved yet]"
LONGEST = 200  # bytes of a name: with what is added while it is written, file systems take 255


def register() -> None:
    """Make the folder known to ComfyUI, for safetensors files only, beside any the user has configured."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.folder_names_and_paths[FOLDER][0], {ENDING})
    listed()


def directory() -> Path:
    """Where files are written: the first of the folder's places."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def listed() -> list[str]:
    """The names of all files; a folder that is gone is made again, and one that cannot be made holds nothing."""
    try:
        directory().mkdir(parents=True, exist_ok=True)
        return folder_paths.get_filename_list(FOLDER)
    except OSError:
        return []


def names() -> list[str]:
    return listed() or [NONE]


def existing(name: str) -> Path:
    """The file of a listed name; ValueError if there is none."""
    if name == NONE:
        raise ValueError("no calibration is chosen: run Save Solver Statistics first, or put a file into "
                         f"{directory()}; then refresh the node definitions (key R) and choose it")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"there is no calibration {name!r} in {directory()}: run Save Solver Statistics first, or put "
                         "a file there and reload the page")
    return Path(path)


def place(name: str) -> Path:
    """Where a file of this name goes; ValueError if the name would leave the folder or is not a plain one."""
    stem = name.strip().removesuffix(ENDING)
    parts = stem.replace("\\", "/").split("/")
    if not stem or len(stem.encode()) > LONGEST or any(part in ("", ".", "..") or part[0] == "." or any(c in '<>:"|?*' or ord(c) < 32 for c in part)
                       for part in parts):
        raise ValueError(f"name = {name!r} cannot be a file in {FOLDER}: use up to {LONGEST} letters, digits, '-', '_', and '/' for "
                         "subfolders, no '..' and no absolute path")
    path = directory().joinpath(*parts[:-1], parts[-1] + ENDING)
    if not path.resolve().is_relative_to(directory().resolve()):
        raise ValueError(f"name = {name!r} leads out of {FOLDER} (through a link): choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def free(name: str, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """The file of this name, or of the first of name-2, name-3, ... that is not taken."""
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(path for path in map(place, names) if not taken(path))


def unread(kind: type, name: str) -> Path:
    """A file for what was just measured: as `free`, but that one which no version can read is replaced."""
    return free(name, lambda path: path.exists() and not _damaged(kind, path))


def _damaged(kind: type, path: Path) -> bool:
    try:
        kind.load(path)
    except Damaged:
        return True
    except ValueError:  # of another kind or version
        pass
    return False


def partial(name: str) -> Path | None:
    """Where a measurement is kept until it is whole; None if nothing can be written there."""
    try:
        return place(f"partial/{name}").with_suffix(".part")
    except OSError as fault:
        logging.warning("Lambda Solvers: a measurement that is cancelled cannot be gone on with: %s", fault)
        return None


def near(a: float, b: float, apart: float = 0.1) -> bool:
    """Numbers close enough to share statistics: within a tenth, and `apart` more, for small ones."""
    return abs(a - b) <= apart + 0.1 * max(abs(a), abs(b))


NUMBERS = {"guidance": 0.1, "distilled": 0.1, "strengths": 0.0}
"""What of a description need only be near, and how far apart beyond a tenth: 0.8 and 0.88 of a LoRA are near,
0.1 and 0.2 are not."""


def alike(key: str, about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two descriptions agree in one of NUMBERS: one number, or as many; None stands for none."""
    def close(x: Any, y: Any) -> bool:
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            return near(x, y, NUMBERS[key])
        return x is None and y is None

    a, b = (told.get(key, []) for told in (about, wanted))
    a, b = (value if isinstance(value, list) else [value] for value in (a, b))
    return len(a) == len(b) and all(map(close, a, b))


def find(kind: type, wanted: Mapping[str, Any], measured_for: Callable[[Mapping[str, Any]], bool],
         serves: Callable[[Any], int]) -> tuple[str, Any] | None:
    """The name and content of a saved calibration for a model as `identity.description` describes it.

    The checkpoint and its patches are the same, their strengths and the guidance near, and it was measured for
    these conditions, as measured_for(its description) says, or learned for all prompts and just such a run
    (serves(it) = 2). Of several those that serve best, then those of the same prompt, then those of the nearest
    guidance. A damaged file is named in the log and skipped.
    """
    found = []
    for name in listed():
        try:
            loaded = kind.load(existing(name))
        except OtherKind:
            continue
        except ValueError as fault:
            logging.warning("Lambda Solvers: %s", fault)
            continue
        about = loaded.about
        same = all(about.get(key) == wanted[key] for key in ("fingerprint", "patches"))
        if same and all(alike(key, about, wanted) for key in NUMBERS):
            well = serves(loaded)
            if well == 2 or well and measured_for(about):
                other_prompt = about.get("conditions") != wanted["conditions"]
                found.append((-well, other_prompt, abs(about["guidance"] - wanted["guidance"]), name, loaded))
    return min(found, key=lambda entry: entry[:4])[3:] if found else None
