"""The folder of calibrations: ComfyUI's too, if it is set so."""
from __future__ import annotations

from pathlib import Path

from modules import paths, shared

from ..hosting.store import ENDING, FOLDER
from . import settings_page


class Folder:
    """What the settings name, or models/solver_calibrations."""

    def directory(self) -> Path:
        return Path(getattr(shared.opts, settings_page.FOLDER, "") or Path(paths.models_path) / FOLDER)

    def names(self) -> list[str]:
        found = self.directory()
        return sorted(file.relative_to(found).as_posix() for file in found.rglob("*" + ENDING))

    def path(self, name: str) -> Path | None:
        found = self.directory() / name
        return found if found.is_file() else None
