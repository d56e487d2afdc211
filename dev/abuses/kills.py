"""SIGKILL at random instants of measuring, training and saving: what is left loads and is right, or is not
there."""
from __future__ import annotations

import itertools
import mmap
import os
import random
import signal
import time
from pathlib import Path
from typing import Callable

import torch

from processes import KILLED, copy, ended
from samplers import estimate_statistics, fit_amed, load_calibration, refit_multistep
from samplers.learning import storage
from samplers.learning.record import Record
from samplers.learning.storage import CalibrationError, digest
from test_calibrate import mixture, noise
from test_fitted import calibration

from .found import Found

LEVELS = torch.tensor([14.6, 3.0, 0.5, 0.03], dtype=torch.float64)
WORKS: dict[str, Callable[[Path | None], Record]] = {
    "measuring": lambda partial: estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=24,
                                                     partial=partial),
    "training": lambda partial: fit_amed(mixture(), noise(4), LEVELS, held_out=1, partial=partial),
    "refitting": lambda partial: refit_multistep(mixture(), noise(4, seed=3), calibration(intervals=8), 4,
                                                 partial=partial),
}


def kills(folder: Path, chance: random.Random, seconds: float) -> Found:
    """Each copy goes on from what the one before it left, and saves over the same file. A copy that is let
    live makes just what one makes that nobody disturbs."""
    found, writing = Found(), mmap.mmap(-1, 1)
    whole = {name: digest(work(None).arrays()) for name, work in WORKS.items()}
    takes = {}
    for name, work in WORKS.items():
        start = time.monotonic()
        ended(copy(lambda: _work(work, folder / f"{name}.safetensors", folder / f"{name}.part", writing)))
        takes[name] = time.monotonic() - start
    end = time.monotonic() + seconds
    while time.monotonic() < end or found.figures["kills"] < 10:
        name = chance.choice([*WORKS])
        path, partial = folder / f"{name}.safetensors", folder / f"{name}.part"
        process = copy(lambda: _work(WORKS[name], path, partial, writing))
        if chance.random() < 0.9:
            time.sleep(chance.uniform(0.0, takes[name]))
            os.kill(process, signal.SIGKILL)
        status = ended(process)
        found.figures["kills"] += status == KILLED
        found.figures["kills within a write"] += status == KILLED and writing[0]
        found.figures["runs that ended"] += status == 0
        if status not in (0, KILLED):
            found.fault(f"{name} ended with {status}")
        _look(found, path, whole[name])
        if status == 0:
            path.unlink()
        for left in folder.glob(".*"):
            left.unlink()
    return found


def _look(found: Found, path: Path, whole: str) -> None:
    if path.exists():
        found.figures["files read after it"] += 1
        try:
            if digest(load_calibration(path).arrays()) != whole:
                found.fault(f"{path.name} holds something else")
        except CalibrationError as fault:
            found.fault(str(fault))


def _work(work: Callable[[Path], Record], path: Path, partial: Path, writing: mmap.mmap) -> None:
    """Measure and save; `writing` is 1 within every write, which takes as long as on a slow disk."""
    write, fsync = storage.write_whole, os.fsync

    def seen(*arguments) -> None:
        writing[0] = 1
        write(*arguments)
        writing[0] = 0

    def slow(file: int) -> None:
        fsync(file)
        time.sleep(0.02)

    writing[0] = 0
    storage.write_whole, os.fsync = seen, slow
    time.monotonic = itertools.count(0.0, 100.0).__next__  # what is kept every few seconds is so every time
    work(partial).save(path, overwrite=True)
