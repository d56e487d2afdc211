"""The folders of calibrations and of classifiers, as ComfyUI knows folders of models."""
from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..hosting import store
from ..hosting.store import ENDING, FOLDER

CLASSIFIERS = "classifiers"  # ComfyUI has such a folder, and lists files without an ending there


class Folder:
    """models/solver_calibrations, and any that the user has configured beside it."""

    def directory(self) -> Path:
        return Path(folder_paths.get_folder_paths(FOLDER)[0])

    def names(self) -> list[str]:
        return folder_paths.get_filename_list(FOLDER)

    def path(self, name: str) -> Path | None:
        found = folder_paths.get_full_path(FOLDER, name)
        return Path(found) if found else None


def classifiers() -> list[str]:
    return [name for name in folder_paths.get_filename_list(CLASSIFIERS) if name.endswith(ENDING)]


def classifier(name: str) -> Path | None:
    """The file of such a name, if there is one."""
    found = folder_paths.get_full_path(CLASSIFIERS, name)
    return Path(found) if found and name.endswith(ENDING) else None


def classifiers_directory() -> Path:
    return Path(folder_paths.get_folder_paths(CLASSIFIERS)[0])


def register() -> None:
    """Make the folders known to ComfyUI, for safetensors files."""
    folder_paths.add_model_folder_path(CLASSIFIERS, os.path.join(folder_paths.models_dir, CLASSIFIERS))
    folder_paths.folder_names_and_paths[CLASSIFIERS][1].add(ENDING)
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.folder_names_and_paths[FOLDER][0], {ENDING})
    store.use(Folder())
