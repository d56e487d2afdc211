"""Copies of this process, which race and are killed: without the seconds that an import of torch takes
each time."""
from __future__ import annotations

import os
import signal
import time
import traceback
from typing import Callable

import pytest

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
KILLED = -9

HALF, WHOLE, IN_PLACE = "half of it is written", "it is written but not in place", "it is in place"
EVERY_PLACE = pytest.mark.parametrize("place", [HALF, WHOLE, IN_PLACE])


def copy(work: Callable[[], object]) -> int:
    """The id of a copy of this process that does this and nothing else. Its status is 0, or 1 if that
    raises."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int, seconds: float = 120.0) -> int:
    """The exit status of a copy; KILLED after a SIGKILL."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        which, status = os.waitpid(process, os.WNOHANG)
        if which:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"a copy of the process had not ended after {seconds:g} s")


def kill_within_write(count: int, place: str) -> None:
    """A SIGKILL to this process within its count-th write (from 0) of a file that is put in place whole."""
    fsync, replace, done = os.fsync, os.replace, 0

    def dying_fsync(file: int) -> None:
        if done == count and place == HALF:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    def dying_replace(*how) -> None:
        nonlocal done
        if done == count and place == WHOLE:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*how)
        if done == count and place == IN_PLACE:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    os.fsync, os.replace = dying_fsync, dying_replace


def slow(model: Callable, seconds: float = 100.0) -> Callable:
    """The model, as if each of its calls took so long: whatever is kept every few seconds is written after
    every call."""
    now = 0.0

    def called(x, sigma):
        nonlocal now
        now += seconds
        return model(x, sigma)

    time.monotonic = lambda: now
    return called
