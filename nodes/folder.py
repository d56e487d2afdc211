"""The folder of calibrations, as ComfyUI knows folders of models."""
from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..hosting import store
from ..hosting.store import ENDING, FOLDER


class Folder:
    """models/solver_calibrations, and any that the user has configured beside it."""

    def directory(self) -> Path:
        return Path(folder_paths.get_folder_paths(FOLDER)[0])

    def names(self) -> list[str]:
        return folder_paths.get_filename_list(FOLDER)

    def path(self, name: str) -> Path | None:
        found = folder_paths.get_full_path(FOLDER, name)
        return Path(found) if found else None


def register() -> None:
    """Make the folder known to ComfyUI, for safetensors files only."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.folder_names_and_paths[FOLDER][0], {ENDING})
    store.use(Folder())
