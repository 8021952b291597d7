"""One step of a schedule. Every device runs the same list of tasks; how long each takes may differ.

Legend: G devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
COMPUTE, COMM, COPY = "compute", "comm", "copy"
STREAMS = (COMPUTE, COMM, COPY)


@dataclass(frozen=True, eq=False)
class Task:
    """What one stream of every device does without interruption.

    Args:
        name: unique in a schedule.
        role: ``dense``, ``shared``, ``dispatch``, ``expert``, ``combine``, ``prefetch`` or ``switch``.
        stream: the one that does it; a stream does one task at a time, in the order of the list.
        seconds: on each device, ``[G]`` or one number.
        after: names of tasks that must be over first.
        collective: all devices take part: it begins when the last one is ready and ends on all at once.
        layer: index of the routed layer.
        chunk: part of the tokens.
        wire_bytes: that a collective moves between devices, in all.
        holds_bytes: of a buffer that each device keeps from the start of this task to the end of the last one after it.
        deadline: the task that must not be kept waiting by this one.
    """

    name: str
    role: str
    stream: str
    seconds: Array | float
    after: tuple[str, ...] = ()
    collective: bool = False
    layer: int = -1
    chunk: int = 0
    wire_bytes: float = 0.0
    holds_bytes: Array | float = 0.0
    deadline: str = ""
