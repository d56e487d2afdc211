"""Run all tests: `python dev/test.py [pytest's arguments]` on a fresh machine, in the same environment as the demo."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environment  # noqa: E402

if __name__ == "__main__":
    environment.enter("test")
    import pytest

    raise SystemExit(pytest.main(["--rootdir", str(environment.ROOT), "-c", str(environment.ROOT / "pyproject.toml"),
                                  *(sys.argv[1:] or [str(environment.ROOT / "tests")])]))
