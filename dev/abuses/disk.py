"""A full disk, a folder that cannot be written, clocks that jump, and several processes on one folder."""
from __future__ import annotations

import itertools
import os
import random
import resource
import time
from pathlib import Path

from processes import copy, ended
from samplers import Statistics, estimate_statistics, load_calibration
from samplers.learning.storage import digest
from test_calibrate import mixture, noise

from .found import Found

NOBODY = 65534


def _measured(partial: Path | None = None) -> Statistics:
    return estimate_statistics(mixture(), noise(2), [14.6, 0.03], intervals=8, partial=partial,
                               partial_seconds=0.0)


def disk(folder: Path, chance: random.Random, seconds: float) -> Found:
    found, whole, rounds = Found(), _measured(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end or not rounds:
        for abuse in (full, read_only, jumping, crowded):
            own = folder / f"{abuse.__name__}{rounds}"
            own.mkdir()
            abuse(found, own, chance, whole)
        rounds += 1
    return found


def full(found: Found, folder: Path, chance: random.Random, whole: Statistics) -> None:
    """The disk takes so many bytes and no more: the saving fails by name, what was there stays, no rest."""
    path, size = folder / "x.safetensors", len(_bytes(folder, whole))
    Statistics.constant().save(path)
    before = path.read_bytes()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (chance.randrange(size), size))
        _measured(folder / "x.part")
        try:
            whole.save(path, overwrite=True)
        except OSError:
            return
        raise AssertionError("nothing was said of it")

    _told(found, "savings on a full disk", copy(work))
    if path.read_bytes() != before or [name for name in os.listdir(folder) if name.startswith(".")]:
        found.fault(f"a full disk leaves {os.listdir(folder)}")


def read_only(found: Found, folder: Path, chance: random.Random, whole: Statistics) -> None:
    """Measured all the same, to be saved elsewhere."""
    os.chmod(folder, 0o555)
    elsewhere = chance.choice([folder / "x", folder / "none" / "x", Path(os.devnull) / "x"])

    def work() -> None:
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        assert digest(_measured(elsewhere.with_suffix(".part")).arrays()) == digest(whole.arrays())
        try:
            whole.save(elsewhere.with_suffix(".safetensors"))
        except OSError:
            return
        raise AssertionError("nothing was said of it")

    _told(found, "savings where nothing can be written", copy(work))
    os.chmod(folder, 0o755)


def jumping(found: Found, folder: Path, chance: random.Random, whole: Statistics) -> None:
    """Back and forth by days, as on waking up; monotonic clocks stand still or leap ahead."""
    def work() -> None:
        steady = itertools.accumulate(chance.choice([0.0, 1e-3, 1e6]) for _ in itertools.count())
        time.monotonic = steady.__next__
        time.gmtime = lambda *given: time.localtime(chance.uniform(0.0, 4e9))
        assert digest(_measured(folder / "x.part").arrays()) == digest(whole.arrays())
        assert os.listdir(folder) == []

    _told(found, "measurings with jumping clocks", copy(work))


def crowded(found: Found, folder: Path, chance: random.Random, whole: Statistics) -> None:
    """Several processes measure, keep and save under the same names."""
    def work() -> None:
        for _ in range(3):
            _measured(folder / "x.part").save(folder / "x.safetensors", overwrite=True)
            assert digest(load_calibration(folder / "x.safetensors").arrays()) == digest(whole.arrays())

    for process in [copy(work) for _ in range(3)]:
        _told(found, "processes on one folder", process)
    if os.listdir(folder) != ["x.safetensors"]:
        found.fault(f"several processes on one folder leave {os.listdir(folder)}")


def _bytes(folder: Path, whole: Statistics) -> bytes:
    path = folder / "size.safetensors"
    whole.save(path)
    content = path.read_bytes()
    path.unlink()
    return content


def _told(found: Found, what: str, process: int) -> None:
    found.figures[what] += 1
    if ended(process) != 0:
        found.fault(f"{what}: see above")
