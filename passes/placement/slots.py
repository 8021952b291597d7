"""How many experts each device holds when every device holds equally many.

Legend: E experts of a layer, G devices.
"""

from __future__ import annotations

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
