"""Files of what was measured: safetensors, checked when read, written whole or not at all.

Files are shared, and what they say of themselves is shown: in logs, on nodes, in web pages that take it for
HTML. So every file is checked when it is read, and what is written is made to pass: known names alone (others
are left out), each of its kind; finite numbers; short printable text without <, > and &.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor


class CalibrationError(ValueError):
    """A file or an array that cannot be what it should; the message says what is wrong with it."""


class Damaged(CalibrationError):
    """A file that no version can read."""


class OtherKind(CalibrationError):
    """A whole file of ours, of another kind than the one asked for."""


LARGEST = 256 * 2**20  # bytes of a file: a hundred times what the nodes' defaults make
MOST = 4096            # tensors in one, and items of a list
LONGEST = 200          # characters of a text
GREATEST = 2.0**64     # a number's size
NAME = re.compile("[a-z0-9._]{1,40}")
"""Of a tensor, or of an entry where any is allowed."""
UNSAFE = str.maketrans("<>&", "()+")
SOME = [float]
ABOUT: Mapping[str, Any] = {
    **dict.fromkeys(("model", "fingerprint", "conditions", "path", "pool", "precision", "created", "form",
                     "first_step", "b", "source", "key"), str),
    **dict.fromkeys(("guidance", "samples", "seed", "evaluations", "prompts", "teacher", "held_out", "next"),
                    float),
    **dict.fromkeys(("shape", "sigmas", "strengths"), SOME),
    "base": (str, None), "fitted": bool, "patches": [str], "learn": [str], "distilled": [(float, None)],
    "refits": {"*": {"training": SOME, "selection": SOME, "kept": bool, "prompts": float,
                     "evaluations": float, "images": float}},
    "hypersolver": {**dict.fromkeys(("images", "prompts", "evaluations"), float), "guidance": SOME,
                    "selection": {"*": SOME}},
    "losses": dict.fromkeys(("untrained", "table", "trained"),
                            dict.fromkeys(("training", "selection", "held out"), SOME)),
}
"""What a file may say of itself. A list has items of one kind, a tuple names alternatives, and "*" stands
for any name."""
WORDS = {str: f"printable text of at most {LONGEST} characters, without angle brackets and ampersands",
         float: "a finite number", bool: "true or false", list: f"a list of at most {MOST}",
         dict: "an object of names and values", None: "null"}


def plain(text: str, longest: int = LONGEST) -> str:
    """Text as it may be shown anywhere: <, > and & as other signs, what cannot be printed as spaces, the
    rest cut off."""
    return "".join(c if c.isprintable() else " " for c in text[:longest].translate(UNSAFE))


def checked(value: Any, kind: Any = ABOUT, where: str = "about") -> Any:
    """`value`, without names that are not known; CalibrationError if it is not of its kind, as ABOUT
    writes them."""
    if isinstance(kind, tuple):
        kind = None if value is None else kind[0]
    of = type(kind) if isinstance(kind, (list, dict)) else kind
    if of is list and isinstance(value, list) and len(value) <= MOST:
        return [checked(part, kind[0], where) for part in value]
    if of is dict and isinstance(value, dict):
        return {name: checked(part, kind.get(name, kind.get("*")), f"{where}.{name}")
                for name, part in value.items() if name in kind or "*" in kind and NAME.fullmatch(name)}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not {str: isinstance(value, str) and value == plain(value), float: number and abs(value) <= GREATEST,
            bool: isinstance(value, bool), None: value is None}.get(of, False):
        raise CalibrationError(
            f"{where} is {plain(repr(value), 60)}: it must be {WORDS[of]}. No file is written so: "
            "measure again, or get it anew from where it came from")
    return value


def _plainly(value: Any) -> Any:
    """What is said of a file, with every text as it may be shown: names of patches come from other packs."""
    if isinstance(value, Mapping):
        return {name: _plainly(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plainly(part) for part in value]
    return plain(value) if isinstance(value, str) else value


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Twelve hex digits for the names, shapes and values (as float64) of arrays: the same in memory and in
    any file of them."""
    content = hashlib.sha256()
    for name in sorted(arrays):
        content.update(f"{name}{list(arrays[name].shape)}".encode())
        content.update(np.ascontiguousarray(arrays[name], dtype="<f8").tobytes())
    return content.hexdigest()[:12]


def bytewise(arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of the bytes as they are: of gigabytes in a tenth of the time."""
    content = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        content.update(f"{name}{value.dtype}{list(value.shape)}".encode())
        content.update(value.data)
    return content.hexdigest()


class Rules(NamedTuple):
    """What holds for files: their bytes, their tensors, and what their seal is of."""

    largest: float
    most: float
    content: Callable[[Mapping[str, np.ndarray]], str]


SHARED, OWN = Rules(LARGEST, MOST, digest), Rules(math.inf, math.inf, bytewise)
"""Of calibrations, and of what a measurement keeps until it is done."""


def write_checked(path: Path, kind: str, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any],
                  overwrite: bool, rules: Rules = SHARED) -> None:
    """Write a file for `read_checked`, whole or not at all; FileExistsError if it exists, unless told to
    overwrite."""
    described = json.dumps(checked(_plainly(about)), sort_keys=True, allow_nan=False)
    metadata = {"format": kind, "about": described, "seal": seal(kind, described, rules.content(tensors))}

    def write(temporary: Path) -> None:  # gigabytes, of which safetensors makes no copy, unless it is old
        own = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        try:
            save_file(own, temporary, metadata)
        except SafetensorError as fault:  # a disk that is full, by another name
            raise OSError(str(fault)) from fault
        if (size := temporary.stat().st_size) > rules.largest:
            raise CalibrationError(f"{path.name} would have {size} bytes: files have at most "
                                   f"{rules.largest:.0f}; measure with fewer samples or intervals")

    write_whole(path, write, overwrite)


def write_whole(path: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Put a file in place in one go: no reader, and no process killed half way, ever sees a part of it.
    Folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # that new files have here
        write(temporary)  # which may be by another file in its place, nobody else's to read
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            with suppress(OSError):  # some mounts know no permissions
                os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _link_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link_new(temporary: Path, path: Path) -> None:
    """Give the finished file its name, unless the name is taken: of two writers one wins, whole."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: choose another name, or overwrite it") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another name, or overwrite it") from None
        os.replace(temporary, path)


def read_checked(path: Path, expected: Sequence[str],
                 rules: Rules = SHARED) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Format, tensors and description of a file of one of these formats; CalibrationError if it is none,
    or of another version."""
    shown, kinds = plain(str(path), 1000), " or ".join(expected)
    try:
        if path.stat().st_size > rules.largest:
            raise CalibrationError(
                f"{shown} has {path.stat().st_size} bytes: files of {kinds} have at most {rules.largest:.0f}")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = _format(shown, metadata, expected)
            names = list(file.keys())
            if len(names) > rules.most or not all(map(NAME.fullmatch, names)):
                raise CalibrationError(
                    f"{shown} has tensors that no file of {_kind(found)} has: measure again, or get it anew")
            tensors, told = {name: file.get_tensor(name) for name in names}, metadata.get("about", "{}")
            _check_seal(shown, seal(found, told, rules.content(tensors)), metadata)
            about = json.loads(told, parse_constant=_no_number)
            return found, tensors, checked(about, where=f"{shown}: about")
    except FileNotFoundError:
        raise CalibrationError(f"{shown} does not exist") from None
    except OSError as fault:
        raise CalibrationError(f"{shown} cannot be read: {plain(str(fault), 1000)}") from None
    except CalibrationError:
        raise
    # TypeError: a dtype that numpy lacks
    except (SafetensorError, ValueError, TypeError, RecursionError) as fault:
        raise Damaged(f"{shown} is damaged or was cut short: {plain(str(fault))}") from None


def seal(kind: str, described: str, content: str) -> str:
    """What a file says of its content, so that damage is seen: safetensors itself has no checksum."""
    return hashlib.sha256(json.dumps([kind, described, content]).encode()).hexdigest()[:16]


def _check_seal(shown: str, own: str, metadata: Mapping[str, str]) -> None:
    """CalibrationError without a seal, ValueError for another one than the content's own."""
    if metadata.keys() - {"format", "about", "seal"}:
        raise ValueError("its header has names that no file has")
    if "seal" not in metadata:
        raise CalibrationError(f"{shown} has no seal, so nothing tells that it holds what was written: "
                               "measure again, or get it anew from where it came from")
    if metadata["seal"] != own:
        raise ValueError("it does not hold what was written: its seal is broken")


def _format(shown: str, metadata: Mapping[str, str], expected: Sequence[str]) -> str:
    """Which of the expected formats a file has."""
    found = plain(metadata.get("format", ""))
    if found in expected:
        return found
    for one in expected:
        if found.startswith(_kind(one)):
            raise CalibrationError(
                f"{shown} has the format {found!r}, and this version reads {one!r}: update the pack, or "
                "estimate again")
    ours = found.startswith(expected[0].split()[0])
    raise (OtherKind
           if ours else CalibrationError)(f"{shown} is not a file of {' or '.join(map(_kind, expected))}" +
                                          (f", but of {found}" if found else ""))


def _kind(format: str) -> str:
    """A format without its version."""
    return format.rpartition(" ")[0]


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


SHARE = 0.03
"""Of the time, which goes into writing what is kept: large latents are written less often."""


class Partial:
    """The file in which a calibration that was cut short goes on; without a path, none is kept.

    It belongs to x and to settings, all that decides what is found but the model. A file that cannot be
    written is a warning, once: what is measured is not lost for it, and the next writing is tried all the
    same.
    """

    def __init__(self, path: Path | str | None, kind: str, x: Tensor, settings: Mapping[str, Any],
                 seconds: float) -> None:
        self.path, self.format = Path(path) if path else None, kind
        belongs = json.dumps([digest({"x": x.cpu().numpy()}), settings], sort_keys=True)
        self.key = hashlib.sha256(belongs.encode()).hexdigest()
        self.seconds, self.written, self.took = seconds, time.monotonic(), 0.0
        self.warned = False

    def read(self) -> tuple[dict[str, Tensor], int]:
        """What was kept, in host memory, and the first part that is not; nothing if there is no file of the
        same calibration."""
        if self.path:
            try:
                _, tensors, about = read_checked(self.path, (self.format,), OWN)
            except CalibrationError:
                return {}, 0  # none, damaged, or of another version: measured again, and overwritten
            if about.get("key") == self.key:
                kept = {name: torch.from_numpy(value) for name, value in tensors.items()}
                return kept, int(about.get("next", 0))
        return {}, 0

    def write(self, kept: Mapping[str, Tensor], following: int, at_once: bool = False) -> None:
        start = time.monotonic()
        if self.path and (at_once or start - self.written >= max(self.seconds, self.took / SHARE)):
            tensors = {name: value.cpu().numpy() for name, value in kept.items()}
            about = {"key": self.key, "next": following}
            try:
                write_checked(self.path, self.format, tensors, about, True, OWN)
            except OSError as fault:
                if not self.warned:
                    logging.warning("%s cannot be written (%s): the measuring goes on, but if it is cut "
                                    "short it starts again from what was kept before", self.path, fault)
                self.warned = True
            self.written = time.monotonic()
            self.took = self.written - start

    def remove(self) -> None:
        if self.path:
            with contextlib.suppress(OSError):  # what is left is known by its key, and overwritten
                self.path.unlink(missing_ok=True)
