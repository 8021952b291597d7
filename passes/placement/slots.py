"""How many experts each device holds when all hold equally many, and which noise levels a layout serves.

Legend: E experts of a layer, G devices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IDs = NDArray[np.int64]


def equal_slots(experts: int, devices: int, layer: int) -> IDs:
    """Return the slots of each device ``[G]``, which differ by at most one.

    The devices that hold one more rotate from layer to layer, so that memory evens out over the model.
    """
    slots = np.full(devices, experts // devices, dtype=np.int64)
    slots[(layer * (experts % devices) + np.arange(experts % devices)) % devices] += 1
    return slots


def in_order(slots_G: IDs) -> IDs:
    """Return the device of each expert ``[E]`` if devices are filled one after another."""
    return np.repeat(np.arange(len(slots_G)), slots_G)


def level_ranges(levels: int, windows: int) -> list[tuple[int, int]]:
    """Return ``windows`` ranges of levels, or as many as there are levels, of nearly equal length."""
    cuts = np.linspace(0, levels, min(windows, levels) + 1).round().astype(int).tolist()
    return list(pairwise(cuts))


def boundary(sigmas: NDArray[np.float64], start: int) -> float:
    """Return the noise level from which a window serves that starts at level ``start``: half-way from the last."""
    return float(sigmas[start] if start == 0 else (sigmas[start - 1] + sigmas[start]) / 2)
