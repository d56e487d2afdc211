"""Calibration files, damaged and edited: refused by name, or what they were. Never read as something else.

What someone has made on purpose carries the seal of what it holds: it is refused by name, or read as any
other."""
from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
from safetensors.numpy import load, save

import environment
from problems import fitted_statistics, gaussian_statistics
from samplers import fit_amed, load_calibration, refit_multistep
from samplers.learning.record import Record
from samplers.learning.storage import CalibrationError, digest
from sealed import sealed
from test_calibrate import mixture, noise
from test_fitted import calibration

from .found import Found

STRANGE = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e300, -1.0, 5e-324, 2.0**70, 2.0**63]
ODD = [None, True, -1, 0, 1e999, 10**400, "", "x" * 300, "<img src=x onerror=alert(1)>", "\0", "\u202e", [],
       {}, [[1.0]], {"a": {}}, "NaN", [None] * 5000]
"""JSON values where others should be."""


def files(folder: Path, chance: random.Random, seconds: float) -> Found:
    found, path = Found(), folder / "x.safetensors"
    originals = {}
    for name, record in _records().items():
        record.save(path, overwrite=True)
        originals[name] = path.read_bytes()
    contents = {name: _content(path, whole) for name, whole in originals.items()}
    end = time.monotonic() + seconds
    while time.monotonic() < end or found.figures["files"] < 100:
        name, change = chance.choice([*originals]), chance.choice(CHANGES)
        try:
            changed = change(originals[name], chance)
        except (ValueError, TypeError, OverflowError, struct.error):
            continue  # what safetensors itself does not write
        if changed == originals[name]:
            continue
        found.figures["files"] += 1
        own, told = change in SEALED, f"{name}, {change.__name__}"
        try:
            read = _content(path, changed)
        except CalibrationError:
            found.figures["refused, with a seal of their own" if own else "refused"] += 1
        except BaseException as fault:
            found.fault(f"{told}: {type(fault).__name__}: {str(fault)[:200]}")
        else:
            if read == contents[name]:
                found.figures["read, of the same content"] += 1
            elif own:
                found.figures["read, with a seal of their own"] += 1
            else:
                found.fault(f"{told}: read as something else")
    return found


def _records() -> dict[str, Record]:
    """One of every kind that is saved, with all that one may hold."""
    levels, shared = [14.6, 3.0, 0.5, 0.03], environment.ROOT / "dev" / "tiny_emoji"
    return {"statistics": gaussian_statistics(), "fitted": fitted_statistics(),
            "tuned": refit_multistep(mixture(), noise(4, seed=3), calibration(intervals=8), 4),
            "hypersolver": load_calibration(shared / "hypersolver.safetensors"),
            "amed": fit_amed(mixture(), noise(4), levels, held_out=1)}


def _content(path: Path, whole: bytes) -> tuple[str, str, str]:
    """All of a file that a run may depend on."""
    path.write_bytes(whole)
    record = load_calibration(path)
    return type(record).__name__, digest(record.arrays()), json.dumps(record.about, sort_keys=True)


# --- changes ------------------------------------------------------------------------------------------------

def flipped(whole: bytes, chance: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(chance.choice([1, 1, 1, 2, 8, 64])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flipped_header(whole: bytes, chance: random.Random) -> bytes:
    changed, size = bytearray(whole), struct.unpack("<Q", whole[:8])[0]
    changed[chance.randrange(8 + size)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(whole: bytes, chance: random.Random) -> bytes:
    return whole[:chance.randrange(len(whole))]


def longer(whole: bytes, chance: random.Random) -> bytes:
    return whole + chance.randbytes(chance.choice([1, 8, 4096]))


def zeroed(whole: bytes, chance: random.Random) -> bytes:
    """A block, as a file system may leave it after a crash."""
    start = chance.randrange(len(whole))
    block = whole[start:start + chance.choice([1, 16, 512, 4096])]
    return whole[:start] + bytes(len(block)) + whole[start + len(block):]


def moved(whole: bytes, chance: random.Random) -> bytes:
    """A block over another one."""
    a, b, n = chance.randrange(len(whole)), chance.randrange(len(whole)), chance.choice([8, 64, 512])
    return whole[:b] + whole[a:a + n] + whole[b + len(whole[a:a + n]):]


def edited_header(whole: bytes, chance: random.Random) -> bytes:
    """A value of the header another one, or gone."""
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:8 + size])
    inner = header
    while chance.random() < 0.8 and isinstance(value := inner[chance.choice([*inner])], dict) and value:
        inner = value
    key = chance.choice([*inner])
    if chance.random() < 0.3:
        del inner[key]
    else:
        inner[key] = chance.choice([*ODD, "F64", "F16", "BF16", "I8", [1], [2**40, 2**40], [0, 8], [8, 0]])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size:]


def edited_about(whole: bytes, chance: random.Random) -> bytes:
    tensors, metadata = _parts(whole)
    return save(tensors, _edited_about(metadata, chance))


def edited_tensor(whole: bytes, chance: random.Random) -> bytes:
    tensors, metadata = _parts(whole)
    return save(_edited_tensor(tensors, chance), metadata)


def made_about(whole: bytes, chance: random.Random) -> bytes:
    tensors, metadata = _parts(whole)
    return sealed(tensors, _edited_about(metadata, chance))


def made_tensor(whole: bytes, chance: random.Random) -> bytes:
    tensors, metadata = _parts(whole)
    return sealed(_edited_tensor(tensors, chance), metadata)


def _parts(whole: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    header = json.loads(whole[8:8 + struct.unpack("<Q", whole[:8])[0]])
    return dict(load(whole)), header["__metadata__"]


def _edited_about(metadata: dict[str, str], chance: random.Random) -> dict[str, str]:
    """A value of what is said another one, at any depth."""
    about = json.loads(metadata["about"])
    inner: Any = about
    while chance.random() < 0.7 and isinstance(inner, dict) and any(isinstance(v, dict) and v
                                                                    for v in inner.values()):
        inner = chance.choice([v for v in inner.values() if isinstance(v, dict) and v])
    inner[chance.choice([*inner, "more"])] = chance.choice(ODD)
    return {**metadata, "about": json.dumps(about)}


def _edited_tensor(tensors: dict[str, np.ndarray], chance: random.Random) -> dict[str, np.ndarray]:
    """A number, a shape, a type, a name of one tensor another one."""
    name = chance.choice([*tensors])
    value = tensors.pop(name).copy()
    if chance.random() < 0.5 and value.size:
        with np.errstate(over="ignore"):
            value.flat[chance.randrange(value.size)] = chance.choice(STRANGE)
    else:
        value = chance.choice(SHAPES)(value)
    name = chance.choice([name] * 8 + ["x", "lam", "l", name + ".x", "../" + name])
    return {**tensors, name: np.ascontiguousarray(value)}


SHAPES: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda v: v[:-1], lambda v: v[None], lambda v: v[..., None], lambda v: v.flatten(), lambda v: v[:0],
    lambda v: v[::-1], lambda v: np.zeros((0, 3)), lambda v: v.astype(np.float16), lambda v: v.astype(bool),
    lambda v: v.astype(np.int8), lambda v: np.concatenate([v, v]), lambda v: v * 0.0, lambda v: v.T]
SEALED = [made_about, made_tensor]
CHANGES = [flipped, flipped_header, cut, longer, zeroed, moved, edited_header, edited_about, edited_tensor,
           *SEALED]
