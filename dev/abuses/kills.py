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

PAUSE = 0.01  # seconds
LEVELS = torch.tensor([14.6, 3.0, 0.5, 0.03], dtype=torch.float64)
WORKS: dict[str, Callable[[Path | None], Record]] = {
    "measuring": lambda partial: estimate_statistics(mixture(), noise(4), [14.6, 0.03], intervals=24,
                                                     partial=partial),
    "training": lambda partial: fit_amed(mixture(), noise(4), LEVELS, held_out=1, partial=partial),
    "refitting": lambda partial: refit_multistep(mixture(), noise(4, seed=3), calibration(intervals=8), 4,
                                                 partial=partial),
}


NOWHERE, WRITING, WRITTEN, PLACED = range(4)
PLACES = {WRITING: "with a part of it written", WRITTEN: "with it written, not in place",
          PLACED: "just after it was put in place"}
"""Where in a write a copy is."""


def kills(folder: Path, chance: random.Random, seconds: float) -> Found:
    """Each copy goes on from what the one before it left, and saves over the same file. A copy that is let
    live makes just what one makes that nobody disturbs."""
    found, place = Found(), mmap.mmap(-1, 1)
    whole = {name: digest(work(None).arrays()) for name, work in WORKS.items()}
    paths = {name: (folder / f"{name}.safetensors", folder / f"{name}.part") for name in WORKS}

    def begun(name: str) -> int:
        place[0] = NOWHERE
        return copy(lambda: _work(WORKS[name], *paths[name], place, chance))

    takes = {}
    for name in WORKS:
        start = time.monotonic()
        ended(begun(name))
        takes[name] = time.monotonic() - start
    end = time.monotonic() + seconds
    while time.monotonic() < end or found.figures["kills"] < 10:
        name = chance.choice([*WORKS])
        process, path = begun(name), paths[name][0]
        if chance.random() < 0.9:
            _wait(place, chance, takes[name])
            os.kill(process, signal.SIGKILL)
        status = ended(process)
        found.figures["kills"] += status == KILLED
        if status == KILLED and place[0]:
            found.figures[PLACES[place[0]]] += 1
        found.figures["runs that ended"] += status == 0
        if status not in (0, KILLED):
            found.fault(f"{name} ended with {status}")
        _look(found, path, whole[name])
        if status == 0:
            path.unlink()
        for left in folder.glob(".*"):
            left.unlink()
    return found


def _wait(place: mmap.mmap, chance: random.Random, takes: float) -> None:
    """Until a random instant of a run; half of the time further, into the next write, and a little more."""
    time.sleep(chance.uniform(0.0, takes))
    end = time.monotonic() + takes
    if chance.random() < 0.5:
        while place[0] == NOWHERE and time.monotonic() < end:
            time.sleep(1e-4)
        time.sleep(chance.uniform(0.0, 2.5 * PAUSE))


def _look(found: Found, path: Path, whole: str) -> None:
    if path.exists():
        found.figures["files read after it"] += 1
        try:
            if digest(load_calibration(path).arrays()) != whole:
                found.fault(f"{path.name} holds something else")
        except CalibrationError as fault:
            found.fault(str(fault))


def _work(work: Callable[[Path], Record], path: Path, partial: Path, place: mmap.mmap,
          chance: random.Random) -> None:
    """Measure and save; `place` says where in a write it is. A write takes as long as on a slow disk, which
    has a part of it at first."""
    write_whole, fsync, replace = storage.write_whole, os.fsync, os.replace

    def seen(to: Path, write: Callable[[Path], None], overwrite: bool) -> None:
        write_whole(to, write, overwrite)
        place[0] = NOWHERE

    def slow(file: int) -> None:
        place[0], content = WRITING, os.pread(file, os.fstat(file).st_size, 0)
        os.ftruncate(file, chance.randrange(len(content)))
        time.sleep(PAUSE)
        os.pwrite(file, content, 0)
        fsync(file)
        place[0] = WRITTEN
        time.sleep(PAUSE)

    def put(*paths: Path) -> None:
        replace(*paths)
        place[0] = PLACED
        time.sleep(PAUSE / 4)

    storage.write_whole, os.fsync, os.replace = seen, slow, put
    time.monotonic = itertools.count(0.0, 100.0).__next__  # what is kept every few seconds is so every time
    work(partial).save(path, overwrite=True)
