"""Lanes: which output features of which projection a value holds, followed through reshapes, transposes and slices.

This is what turns ``chunk``, ``unbind(2)`` after ``view(B, N, 3, H, d)``, or ``x[..., :h]`` into *rows of one weight*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Node

from moefx.graph.kinds import MOVES, Op, shape
from moefx.passes.analysis.flow import Flow

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Lane:
    """Features of one projection inside a tensor.

    ``rows`` holds output-feature numbers of ``base``; its axis ``i`` lies along dimension ``dims[i]`` of the tensor
    (``dims`` ascend); all other dimensions of the tensor are batch or tokens.
    """

    base: Node
    rows: Rows
    dims: tuple[int, ...]

    def same(self, other: Lane) -> bool:
        """Whether two lanes hold the same features in the same places."""
        return self.base is other.base and self.dims == other.dims and np.array_equal(self.rows, other.rows)

    def flat(self) -> Rows:
        """Return the features in order."""
        return self.rows.reshape(-1)


def base_lane(node: Node, what: Op) -> Lane:
    """Return the lane of a projection's own output."""
    return Lane(node, np.arange(what.attrs["out_features"], dtype=np.int64), (what.attrs["axis"],))


class Lanes:
    """Lanes of all nodes of a flow, computed on demand."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._known: dict[Node, Lane | None] = {}

    def of(self, node: Node) -> Lane | None:
        """Return the lane of ``node`` if only movement lies between it and one projection."""
        chain: list[Node] = []
        while node not in self._known:
            what = self.flow.ops[node]
            if what.kind in ("linear", "conv"):
                known = what.kind == "linear" or "out_features" in what.attrs
                self._known[node] = base_lane(node, what) if known else None
            elif (what.kind in MOVES or what.kind == "dropout") and what.inputs:
                chain.append(node)
                node = what.inputs[0]
            else:
                self._known[node] = None
        lane = self._known[node]
        for moved in reversed(chain):
            lane = move(lane, self.flow.ops[moved], moved) if lane is not None else None
            self._known[moved] = lane
        return lane


def move(lane: Lane, what: Op, node: Node) -> Lane | None:
    """Return ``lane`` after the movement ``what``, or ``None`` if features and tokens get mixed."""
    before, after = shape(what.inputs[0]), shape(node)
    if before is None or after is None:
        return None
    if what.kind in ("identity", "dropout"):
        return lane
    if what.kind == "permute":
        places = [what.attrs["dims"].index(d) for d in lane.dims]
        order = sorted(range(len(places)), key=places.__getitem__)
        return Lane(lane.base, lane.rows.transpose(order), tuple(places[i] for i in order))
    if what.kind == "expand":
        shift = len(after) - len(before)
        dims = tuple(d + shift for d in lane.dims)
        return Lane(lane.base, np.broadcast_to(lane.rows, [after[d] for d in dims]), dims)
    if what.kind == "slice":
        return _sliced(lane, what.attrs["index"])
    return _reshaped(lane, before, after)


def _sliced(lane: Lane, index: tuple[Any, ...]) -> Lane:
    rows, dims, old, new = lane.rows, [], 0, 0
    axis = 0
    for item in index:
        if item is None:
            new += 1
            continue
        if old in lane.dims:
            rows = rows[(slice(None),) * axis + (item,)]
            if isinstance(item, slice):
                dims.append(new)
                axis += 1
        old += 1
        new += isinstance(item, slice)
    return Lane(lane.base, rows, tuple(dims))


def groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Split a reshape into the finest groups of old and new dimensions with equal products."""
    if 0 in before or 0 in after:
        return None
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new, a, b = [], [], 1, 1
        if i < len(before):
            old, a, i = [i], before[i], i + 1
        if j < len(after) and (a != 1 or after[j] == 1 or not old):
            new, b, j = [j], after[j], j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
                old.append(i - 1)
            else:
                b, j = b * after[j], j + 1
                new.append(j - 1)
        found.append((old, new))
    return found


def _reshaped(lane: Lane, before: tuple[int, ...], after: tuple[int, ...]) -> Lane | None:
    split = groups(before, after)
    if split is None:
        return None
    dims: list[int] = []
    for old, new in split:
        if any(d in lane.dims for d in old):
            if any(before[d] != 1 for d in old if d not in lane.dims):
                return None
            dims.extend(new)
    return Lane(lane.base, lane.rows.reshape([after[d] for d in dims]), tuple(dims))
