"""Run the tests on a fresh machine, in the same environment as the demo.

    python dev/test.py                    the README's tests, in two processes: all but those that take long
    python dev/test.py --all              these, then the slow rest; how long each took is told at the end
    python dev/test.py --oldest           those that need no host, in Python 3.10 with A1111's PyTorch
    python dev/test.py tests/x.py -k y    just that, however it is marked (tests/slow.py): the arguments are
                                          pytest's
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

PARTS = {"the README's tests": "not slow and not thorough", "the slow rest": "slow"}
HOSTED = re.compile("comfy|server|playwright|abuse")  # what tests say that need a host
TWO = ["-q", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]  # see tests/conftest.py


def run(*arguments: str, python: str | Path = sys.executable) -> int:
    """pytest's exit status."""
    return subprocess.run([str(python), "-m", "pytest", "--rootdir", str(environment.ROOT),
                           "-c", str(environment.ROOT / "pyproject.toml"), *arguments]).returncode


def oldest() -> int:
    """pytest's exit status with the oldest Python and PyTorch."""
    files = [str(path) for path in sorted((environment.ROOT / "tests").glob("test_*.py"))
             if not HOSTED.search(path.read_text())]
    return run(*TWO, *files, python=environment.oldest())


def timed(name: str, marks: str) -> tuple[int, str]:
    """The exit status of a part of all tests, and a line on how it went."""
    start = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes: more threads would wait for each other
    print(f"--- {name}", flush=True)
    status = run(*TWO, "-m", marks, str(environment.ROOT / "tests"))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    return status, f"{name}: {minutes} min {seconds:02} s, {'FAILED' if status else 'passed'}"


def main(arguments: list[str]) -> int:
    if arguments and arguments != ["--all"]:
        return run(*arguments)
    parts = [timed(*part) for part in list(PARTS.items())[:2 if arguments else 1]]
    print("", *(line for _, line in parts), sep="\n")
    return max(status for status, _ in parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--oldest"]:
        raise SystemExit(oldest())
    environment.enter("test")
    raise SystemExit(main(sys.argv[1:]))
