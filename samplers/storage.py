"""Files of what was measured: safetensors, checked when read, written whole or not at all."""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor


class CalibrationError(ValueError):
    """A file or an array that cannot be what it should; the message says what is wrong with it."""


class Damaged(CalibrationError):
    """A file that no version can read."""


class OtherKind(CalibrationError):
    """A whole file of ours, of another kind than the one asked for."""


def write_whole(path: Path, content: bytes, overwrite: bool) -> None:
    """Put a file in place in one go: no reader, and no process killed half way, ever sees a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _link_new(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _link_new(temporary: str, path: Path) -> None:
    """Give the finished file its name, unless the name is taken: of two writers one wins, whole."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: choose another name, or overwrite it") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another name, or overwrite it") from None
        os.replace(temporary, path)


def read_checked(path: Path, expected: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the description of one of our files; CalibrationError if it is none, or of another version."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format", "")
            kind = expected.rpartition(" ")[0]
            if not found.startswith(kind):
                ours = found.startswith(kind.split()[0])
                raise (OtherKind if ours else CalibrationError)(
                    f"{path} is not a file of {kind}" + (f", but of {found}" if found else ""))
            if found != expected:
                raise CalibrationError(f"{path} has the format {found!r}, and this version reads {expected!r}: update the pack, "
                                      "or estimate again")
            about = json.loads(metadata.get("about", "{}"), parse_constant=_no_number)
            if not isinstance(about, dict):
                raise CalibrationError(f"{path} is described by {about!r}: it must be an object of names and values")
            if not isinstance(about.get("guidance", 0.0), (int, float)):
                raise CalibrationError(f"{path} was measured at guidance {about['guidance']!r}: it must be a number")
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist") from None
    except OSError as fault:
        raise CalibrationError(f"{path} cannot be read: {fault}") from None
    except CalibrationError:
        raise
    except (SafetensorError, ValueError, TypeError, RecursionError) as fault:  # TypeError: a dtype that numpy lacks
        raise Damaged(f"{path} is damaged or was cut short: {fault}") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Twelve hex digits for the names, shapes and values (as float64) of arrays: the same in memory and in any file of them."""
    content = hashlib.sha256()
    for name in sorted(arrays):
        content.update(f"{name}{list(arrays[name].shape)}".encode())
        content.update(np.ascontiguousarray(arrays[name], dtype="<f8").tobytes())
    return content.hexdigest()[:12]


class Partial:
    """The file in which a calibration that was cut short goes on; without a path, none is kept.

    A file that cannot be written is a warning, once: what is measured is not lost for it.
    """

    def __init__(self, path: Path | str | None, kind: str, key: Mapping[str, Any], seconds: float,
                 device: torch.device) -> None:
        self.path, self.format = Path(path) if path else None, kind
        self.key = json.dumps(key, sort_keys=True)
        self.seconds, self.device, self.written = seconds, device, time.monotonic()
        self.following = 0

    def read(self) -> tuple[dict[str, Tensor], int]:
        """What was kept, and the first part that is not; nothing if there is no file of the same calibration."""
        if self.path and self.path.exists():
            try:
                tensors, about = read_checked(self.path, self.format)
            except CalibrationError:
                return {}, 0  # damaged, or of another version: measured again, and overwritten
            if about.get("key") == self.key:
                self.following = about["next"]
                return {name: torch.from_numpy(value).to(self.device) for name, value in tensors.items()}, self.following
        return {}, 0

    def write(self, kept: Mapping[str, Tensor], following: int, at_once: bool = False) -> None:
        self.following = following
        if self.path and (at_once or time.monotonic() - self.written >= self.seconds):
            about = json.dumps({"key": self.key, "next": following})
            content = save({name: np.asarray(value.cpu().numpy(), order="C") for name, value in kept.items()},
                           metadata={"format": self.format, "about": about})
            try:
                write_whole(self.path, content, overwrite=True)
            except OSError as fault:
                logging.warning("%s cannot be written (%s): the measuring goes on, but starts anew if it is cut short", self.path, fault)
                self.path = None
            self.written = time.monotonic()

    def remove(self) -> None:
        if self.path:
            with contextlib.suppress(OSError):  # what is left is known by its key, and overwritten
                self.path.unlink(missing_ok=True)
