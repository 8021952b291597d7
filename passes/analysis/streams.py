"""Token streams: residual adds, and which values reach the model's output token by token.

Token by token means through reshapes, norms, pointwise operations, projections, convolutions, concatenations and
slices, but not through attention and not as a broadcast operand: a modulation or a key is not the stream itself. Slices
are followed exactly, so that text tokens that are concatenated with the image and cut away again are known not to reach
the output.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from moefx.graph.kinds import MOVES, POINTWISE, basic_index, shape, value
from moefx.passes.analysis.flow import Flow
from moefx.passes.analysis.lanes import groups

Box = tuple[tuple[int, int], ...]

_THROUGH = MOVES | {"dropout", "norm", "add", "sub", "mul", "div", "cat", "pad"}
_MOST_PARTS = 8
_CLAMPS = frozenset({"clamp", "nan_to_num", "where", "clamp_min", "clamp_max"})
_LOCAL = frozenset({"conv", "resample", "pad", "repeat", "gather", "complex", "item"})


@dataclass(frozen=True, eq=False)
class Residual:
    """A residual add: ``add`` sums a branch with ``stream``, an ancestor of the branch's input."""

    add: Node
    stream: Node


def is_whole_operand(operand: Node, node: Node) -> bool:
    """Whether an operand of an elementwise ``node`` is not broadcast."""
    a, b = shape(operand), shape(node)
    return a is not None and b is not None and math.prod(a) == math.prod(b)


class Streams:
    """Residual adds and output-aligned values of one flow."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def residual(self, branch: Node, source: Node) -> Residual | None:
        """Return the add of ``branch`` to an ancestor of ``source``, if one follows without another computation."""
        seen, queue = {branch}, deque([branch])
        while queue:
            node = queue.popleft()
            for user in self.flow.readers[node]:
                if user in seen:
                    continue
                stream = self._added(user, node, source)
                if stream is not None:
                    return Residual(user, stream)
                if self._carries(user, node):
                    seen.add(user)
                    queue.append(user)
        return None

    def _carries(self, user: Node, node: Node) -> bool:
        what = self.flow.ops[user]
        if what.kind not in _THROUGH and what.name not in _CLAMPS:
            return False
        return what.kind not in POINTWISE or is_whole_operand(node, user)

    def _added(self, user: Node, node: Node, source: Node) -> Node | None:
        what = self.flow.ops[user]
        if what.kind != "add" or not is_whole_operand(node, user):
            return None
        for other in what.inputs:
            if other is not node and is_whole_operand(other, user) and self._is_ancestor(other, source):
                return other
        return None

    def _is_ancestor(self, stream: Node, source: Node, depth: int = 3) -> bool:
        """Whether ``source`` is computed from ``stream``, or from it before parallel branches were added."""
        root = self.flow.unmoved(stream)
        what = self.flow.ops[root]
        if self.flow.depends(source, stream) or self.flow.depends(source, root):
            return True
        if what.kind in ("cat", "stack"):
            return any(self.flow.depends(source, self.flow.unmoved(n)) for n in what.inputs)
        if what.kind != "add" or depth == 0:
            return False
        return any(is_whole_operand(n, root) and self._is_ancestor(n, source, depth - 1) for n in what.inputs)

    # -- alignment with the output -------------------------------------------------------------------------------------

    @cached_property
    def aligned(self) -> dict[Node, list[Box]]:
        """The nodes that reach the output token by token, with the parts of them that do."""
        found: dict[Node, list[Box]] = {}
        for node in reversed(self.flow.nodes):
            if self.flow.ops[node].kind == "output":
                reads: list[tuple[Node, Box | None]] = [(n, _full(n)) for n in self.flow.ops[node].inputs]
            else:
                reads = [read for box in found.get(node, ()) for read in self.back(node, box)]
            for source, box in reads:
                _add(found, source, box)
                for writer in self.flow.writes(source):
                    if self.flow.index[writer] < self.flow.index[node] and self._touches(writer, source, box):
                        found.setdefault(writer, [_full(writer) or ()])
        return found

    def _touches(self, writer: Node, source: Node, box: Box | None) -> bool:
        """Whether an in-place write reaches the needed part of ``source``; unknown regions count as reaching it."""
        what = self.flow.ops[writer]
        target = what.inputs[0]
        region = _full(target)
        if writer.target is operator.setitem:
            index = basic_index(writer.args[1], len(shape(target) or ()))
            region = None if index is None else _index_region(index, shape(target) or ())
        while target is not source and region is not None and self.flow.ops[target].kind in MOVES:
            region, target = self._unmove(target, region), self.flow.ops[target].inputs[0]
        if target is not source or region is None or box is None:
            return True
        return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(region, box, strict=True))

    def back(self, node: Node, box: Box) -> list[tuple[Node, Box | None]]:
        """Return the inputs that ``node`` carries token by token, with the part that part ``box`` of it comes from."""
        what = self.flow.ops[node]
        if not what.inputs:
            return []  # computed from parameters alone
        if what.kind == "cat":
            return self._uncat(node, box)
        if what.kind in MOVES or what.kind == "dropout":
            return [(what.inputs[0], self._unmove(node, box))]
        if what.kind == "linear":
            sizes = shape(what.inputs[0]) or ()
            return [(what.inputs[0], (*box[:-1], (0, sizes[-1])))]
        if what.kind == "norm":
            return [(what.inputs[0], box)]
        if what.kind in POINTWISE or what.kind == "complex":
            return [(n, box if shape(n) == shape(node) else _full(n)) for n in what.inputs if _covers(n, node)]
        if what.kind == "setitem":
            return [(n, _full(n)) for n in what.inputs[1:]]
        if what.kind in _LOCAL or what.kind == "embedding":
            return [(what.inputs[0], _full(what.inputs[0]))]
        if what.kind == "scatter":
            return [(n, _full(n)) for n in what.inputs if _is_real(n)]
        return self._unstack(node, box) if what.kind == "stack" else []

    def _uncat(self, node: Node, box: Box) -> list[tuple[Node, Box | None]]:
        what = self.flow.ops[node]
        dim, start, parts = what.attrs["dim"], 0, []
        for part in what.inputs:
            sizes = shape(part)
            if sizes is None or dim >= len(sizes):
                continue
            low, high = max(box[dim][0] - start, 0), min(box[dim][1] - start, sizes[dim])
            parts.append((part, (*box[:dim], (low, high), *box[dim + 1 :])))
            start += sizes[dim]
        return [(part, cut) for part, cut in parts if cut[dim][0] < cut[dim][1]]

    def _unstack(self, node: Node, box: Box) -> list[tuple[Node, Box | None]]:
        what = self.flow.ops[node]
        dim = what.attrs["dim"]
        low, high = box[dim]
        rest = (*box[:dim], *box[dim + 1 :])
        parts = [(part, shape(part) or ()) for part in what.inputs[low:high]]
        cuts = [(p, tuple((a, min(b, size)) for (a, b), size in zip(rest, sizes, strict=True))) for p, sizes in parts]
        return [(part, cut) for part, cut in cuts if all(a < b for a, b in cut)]

    def _unmove(self, node: Node, box: Box) -> Box | None:
        what = self.flow.ops[node]
        before, after = shape(what.inputs[0]), shape(node)
        if before is None or after is None:
            return None
        if before == after and what.kind != "permute":
            return box
        if what.kind == "permute":
            return tuple(box[what.attrs["dims"].index(d)] for d in range(len(before)))
        if what.kind == "slice":
            return _unslice(what.attrs["index"], before, box)
        return _unreshape(before, after, box)


def _is_real(node: Node) -> bool:
    """Whether ``node`` holds values, as opposed to indices."""
    found = value(node)
    return isinstance(found, torch.Tensor) and (found.is_floating_point() or found.is_complex())


def _full(node: Node) -> Box | None:
    sizes = shape(node)
    return tuple((0, size) for size in sizes) if sizes is not None else None


def _covers(operand: Node, node: Node) -> bool:
    """Whether an operand is not broadcast; complex numbers count for two."""
    a, b = shape(operand), shape(node)
    return a is not None and b is not None and math.prod(a) >= math.prod(b)


def _add(found: dict[Node, list[Box]], node: Node, box: Box | None) -> None:
    """Record one more part; too many parts become the box around them."""
    known = found.setdefault(node, []) if box is not None else []
    if box is None or box in known:
        return
    known.append(box)
    if len(known) > _MOST_PARTS:
        known[:] = [tuple((min(a for a, _ in side), max(b for _, b in side)) for side in zip(*known, strict=True))]


def _index_region(index: tuple[object, ...], sizes: tuple[int, ...]) -> Box | None:
    spans = [item.indices(size) for item, size in zip(index, sizes, strict=False) if isinstance(item, slice)]
    if None in index:
        return None
    return _unslice(index, sizes, tuple((0, len(range(*span))) for span in spans))


def _unslice(index: tuple[object, ...], before: tuple[int, ...], box: Box) -> Box:
    made: list[tuple[int, int]] = []
    place = 0
    for item in index:
        if item is None:
            place += 1
            continue
        size = before[len(made)]
        if isinstance(item, slice):
            start, _, step = item.indices(size)
            low, high = box[place]
            made.append((start + low * step, start + (high - 1) * step + 1))
            place += 1
        else:
            assert isinstance(item, int)
            made.append((item % size, item % size + 1))
    return tuple(made)


def _unreshape(before: tuple[int, ...], after: tuple[int, ...], box: Box) -> Box | None:
    made = [(0, size) for size in before]
    split = groups(before, after) if math.prod(before) == math.prod(after) else None
    for old, new in split or ():
        kept = [d for d in new if after[d] != 1]
        olds = [d for d in old if before[d] != 1]
        if len(kept) == len(olds) == 1:
            made[olds[0]] = box[kept[0]]
    return tuple(made)
