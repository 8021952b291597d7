"""What a strategy returns: layouts as arrays, before they are checked and scored.

Legend: E experts of a layer, G devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.placement import Replica, Window

Array = NDArray[np.float64]
IDs = NDArray[np.int64]
Homes = Sequence[IDs]


@dataclass(frozen=True)
class Draft:
    """The parts of a placement a strategy decides; see :class:`Placement` for their meaning.

    Args:
        homes: for each layer the primary device of each expert.
        replicas: further copies.
        tiers: memory tiers of the weights.
        windows: layouts that take over later.
        local_first: rows prefer a copy on their own device.
    """

    homes: Homes
    replicas: tuple[Replica, ...] = ()
    tiers: tuple[tuple[str, ...], ...] = ()
    windows: tuple[Window, ...] = ()
    local_first: bool = False


def as_rows(homes: Homes) -> tuple[tuple[int, ...], ...]:
    """Return homes as plain numbers."""
    return tuple(tuple(int(g) for g in home) for home in homes)


def as_replicas(layer: int, home_E: IDs, held_EG: NDArray[np.bool_], shares_EG: Array) -> list[Replica]:
    """Return every copy that is not the primary, with its share; rows of ``shares`` sum to one."""
    return [
        Replica(layer=layer, expert=int(e), device=int(g), share=float(np.clip(shares_EG[e, g], 0, 1)))
        for e, g in np.argwhere(held_EG)
        if g != home_E[e]
    ]
