"""What a schedule knows of a node of a graph: the same marks are simulated, checked and executed.

A mark lives in ``node.meta["custom"]["moefx"]``, which torch keeps when graphs are copied. Exchanges of tokens also
bear the keys of torchtitan's graph passes, so that these can run on our graphs. A node without a mark is free: a view,
a size, a parameter.

Legend: G devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from moefx.passes.schedule.task import COMPUTE

Array = NDArray[np.float64]
_KEY = "moefx"
_TORCHTITAN: dict[str, dict[str, Any]] = {
    "dispatch": {"EP_token_exchange": "dispatch"},
    "combine": {"EP_token_exchange": "combine"},
    "count": {"EP_token_count_exchange": True},
}


@dataclass(frozen=True, eq=False)
class Mark:
    """What one node of a schedule does and costs.

    Args:
        role: ``dense``, ``map`` (which rows go where), ``count``, ``dispatch``, ``expert``, ``combine``, ``copies``
            (weights sent to copies), ``prefetch``, ``evict``, ``stale_in`` or ``stale_out``.
        stream: what does it.
        seconds: on each device, ``[G]`` or one number.
        layer: index of the routed layer, -1 for none.
        chunk: part of the tokens.
        collective: all devices take part.
        begins: what it starts goes on until the node that waits for it: an exchange, a copy of weights.
        waits: it ends what its first argument began.
        wire_bytes: that it moves between devices, in all.
        holds_bytes: of what it makes, on each device, until its last user is done.
        deadline: name of the node that must not be kept waiting.
        exact: the results are those without it.
    """

    role: str
    stream: str = COMPUTE
    seconds: Array | float = 0.0
    layer: int = -1
    chunk: int = 0
    collective: bool = False
    begins: bool = False
    waits: bool = False
    wire_bytes: float = 0.0
    holds_bytes: Array | float = 0.0
    deadline: str = ""
    exact: bool = True


def set_mark(node: Node, mark: Mark) -> Node:
    """Put a mark on a node, and return the node."""
    custom: dict[str, Any] = dict(node.meta.get("custom") or {})
    tokens = mark.collective and mark.begins
    node.meta["custom"] = custom | (_TORCHTITAN.get(mark.role, {}) if tokens else {}) | {_KEY: mark}
    return node


def mark_of(node: Node) -> Mark | None:
    """Return the mark of a node; None if it is free."""
    found = (node.meta.get("custom") or {}).get(_KEY)
    return found if isinstance(found, Mark) else None
