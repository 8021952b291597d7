"""What a budget may choose from: how much of a site stays, as options of the pass that rewrites it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["neurons", "heads", "tokens"]
STEPS = 8


@dataclass(frozen=True)
class Ratio:
    """One way to keep a part of a site: the options that do it, and the share of its units that stays."""

    options: Mapping[str, Any]
    kept: float


def steps(count: int) -> list[int]:
    """Return at most eight numbers of ``count`` units that may stay, evenly apart, the smallest first; never all."""
    return sorted({max(1, round(count * (i + 1) / STEPS)) for i in range(STEPS)} - {count})
