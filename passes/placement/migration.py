"""What must move between two layouts, and in which batches.

A device sends and receives one expert at a time, so the batches are the colours of an edge colouring of the bipartite
multigraph of senders and receivers; Kőnig's theorem says that as many suffice as the busiest device has experts to send
or to receive, which no plan can beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import ModelDims
from moefx.passes.placement.placement import Placement


@dataclass(frozen=True)
class Move:
    """The weights of one expert go from a device that holds them to one that will."""

    layer: int
    expert: int
    source: int
    target: int


def moves(before: Placement, after: Placement) -> list[Move]:
    """Return the copies that ``after`` has resident and ``before`` has not, each from the holder that sends least."""
    found, sent_G = [], np.zeros(len(before.devices), dtype=np.int64)
    for i in range(len(before.layers)):
        here_EG, resident_E = before.holders(i), after.resident(i)
        new_EG = after.holders(i) & resident_E[:, None] & ~(here_EG & before.resident(i)[:, None])
        for e, target in np.argwhere(new_EG).tolist():
            holders = np.flatnonzero(here_EG[e])
            if target in holders:
                continue  # it comes from this device's own slower tier
            source = int(holders[np.argmin(sent_G[holders])])
            sent_G[source] += 1
            found.append(Move(i, e, source, target))
    return found


def move_bytes(found: Sequence[Move], dims: ModelDims, devices: int) -> NDArray[np.float64]:
    """Return the bytes between each pair of devices, ``[G, G]``."""
    bytes_GG = np.zeros((devices, devices))
    for move in found:
        bytes_GG[move.source, move.target] += dims.expert_bytes[move.layer]
    return bytes_GG


def batches(found: Sequence[Move]) -> list[list[Move]]:
    """Return the moves in the fewest batches in which no device sends twice or receives twice."""
    used: dict[tuple[str, int], dict[int, int]] = {}
    colour = [-1] * len(found)
    for k, move in enumerate(found):
        sender, receiver = ("send", move.source), ("receive", move.target)
        a, b = _free(used, sender), _free(used, receiver)
        if a != b:
            _flip(used, colour, found, receiver, a, b)
        colour[k] = a
        used.setdefault(sender, {})[a] = k
        used.setdefault(receiver, {})[a] = k
    return [[m for m, c in zip(found, colour, strict=True) if c == n] for n in range(max(colour, default=-1) + 1)]


def _free(used: dict[tuple[str, int], dict[int, int]], end: tuple[str, int]) -> int:
    taken = used.get(end, {})
    return next(c for c in range(len(taken) + 1) if c not in taken)


def _flip(
    used: dict[tuple[str, int], dict[int, int]],
    colour: list[int],
    found: Sequence[Move],
    start: tuple[str, int],
    a: int,
    b: int,
) -> None:
    """Exchange the colours a and b on the path from ``start`` that alternates between them, which frees a there."""
    path, end, wanted = [], start, a
    while wanted in used.get(end, {}):
        k = used[end][wanted]
        path.append(k)
        end = ("send", found[k].source) if end[0] == "receive" else ("receive", found[k].target)
        wanted = b if wanted == a else a
    for k in path:
        for place in (("send", found[k].source), ("receive", found[k].target)):
            if used[place].get(colour[k]) == k:
                del used[place][colour[k]]
    for k in path:
        colour[k] = b if colour[k] == a else a
        used[("send", found[k].source)][colour[k]] = k
        used[("receive", found[k].target)][colour[k]] = k
