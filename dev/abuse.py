"""A thousand abuses: `python dev/abuse.py --minutes N` (default 1), a line of figures for each.

kills      copies of this process, killed while they measure, train and save
files      calibration files of every kind, damaged and edited
names      names of files as anyone may type them
prompts    workflows queued at random in a real ComfyUI, cancelled, their clients gone
disk       a full disk, a folder that cannot be written, clocks that jump, several processes on one folder

The time is shared among them. A figure that must be 0 and is not ends it with status 1. A run is the same
again with the same --seed, as far as kills can be.
"""
from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

SHARES = {"kills": 0.2, "files": 0.15, "names": 0.05, "disk": 0.1, "prompts": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(SHARES)}; all of them if none is named")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all that is named together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.what) - SHARES.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(SHARES)}")
    environment.enter("test")
    sys.path += [str(environment.ROOT), str(environment.ROOT / "tests")]
    chosen = {name: share for name, share in SHARES.items() if name in (options.what or SHARES)}
    return max(run(name, 60.0 * options.minutes * share / sum(chosen.values()), options.seed)
               for name, share in chosen.items())


def run(name: str, seconds: float, seed: int) -> int:
    """The exit status of one of them."""
    from abuses import CAMPAIGNS
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = CAMPAIGNS[name](Path(folder), random.Random(seed), seconds)
    figures = ", ".join(f"{value} {what}" for what, value in found.figures.items())
    print(f"{name}: {figures}; {time.monotonic() - start:.0f} s", *found.faults, sep="\n    FAULT ",
          flush=True)
    return int(bool(found.faults))


if __name__ == "__main__":
    raise SystemExit(main())
