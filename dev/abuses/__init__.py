"""What `python dev/abuse.py` does: each takes an empty folder, a source of chance, and seconds, which
count from when all is prepared; it does a little whatever they are."""
from __future__ import annotations

from .disk import disk
from .files import files
from .kills import kills
from .names import names
from .prompts import prompts

CAMPAIGNS = {"kills": kills, "files": files, "names": names, "disk": disk, "prompts": prompts}
