"""What a campaign found."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Found:
    figures: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        """At most ten are told: they are alike."""
        self.figures["faults"] += 1
        if len(self.faults) < 10:
            self.faults.append(what)
