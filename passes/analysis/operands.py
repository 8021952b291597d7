"""Where the operands of an attention core come from: projections, the rows used, norms, rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import Node

from moefx.graph.kinds import MOVES, param_ref, shape
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.ffn import row_weight
from moefx.passes.analysis.lanes import Lane, Rows
from moefx.passes.analysis.site import Weight
from moefx.passes.analysis.streams import is_whole_operand

_THROUGH = MOVES | {
    "dropout",
    "norm",
    "act",
    "pointwise",
    "add",
    "sub",
    "mul",
    "div",
    "cat",
    "stack",
    "pad",
    "repeat",
    "complex",
    "item",
    "gather",
    "reduce",
    "matmul",
}
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "pointwise"})
_ROOTS = frozenset({"rsqrt", "sqrt", "norm", "vector_norm", "reciprocal"})
_TABLES = _THROUGH | {"gather", "outer", "matmul", "setitem", "factory", "split"}
_WAVE_NODES = 64
_WAVES = frozenset({"sin", "cos", "polar"})


@dataclass(eq=False)
class Part:
    """What one projection contributes to an operand.

    ``node`` is the projection ``x -> x @ weight.T + bias``; ``value`` is the last node that holds its features
    unchanged, laid out as ``lane`` says; ``offset`` is where its tokens start in the operand.
    """

    node: Node
    x: Node
    weight: Weight
    bias: Weight | None
    value: Node
    lane: Lane
    offset: int

    @property
    def width(self) -> int:
        """Number of output features used."""
        return len(np.unique(self.lane.rows))


@dataclass(eq=False)
class Operand:
    """One operand of an attention core: its parts in token order, and what was done to them on the way."""

    node: Node
    parts: list[Part] = field(default_factory=list)
    normed: bool = False
    rotary: bool = False

    @property
    def sources(self) -> tuple[Node, ...]:
        """The inputs of the projections."""
        return tuple(dict.fromkeys(part.x for part in self.parts))


def read_operand(context: Context, node: Node) -> Operand:
    """Follow an operand of an attention core back to its projections."""
    found = Operand(node)
    lanes: dict[tuple[Node, int], list[tuple[Node, Lane]]] = {}
    seen = {(node, 0)}
    stack = [(node, 0)]
    while stack:
        current, offset = stack.pop()
        lane = context.lanes.of(current)
        onward = [(n, offset) for w in context.flow.writes(current) for n in context.flow.ops[w].inputs[1:]]
        if lane is not None:
            lanes.setdefault((lane.base, offset), []).append((current, lane))
        else:
            onward += _back(context, current, offset, found)
        for source, start in onward:
            if (source, start) not in seen:
                seen.add((source, start))
                stack.append((source, start))
    parts = [_part(context, base, offset, entries) for (base, offset), entries in lanes.items()]
    order = context.flow.index
    found.parts = sorted((p for p in parts if p is not None), key=lambda p: (p.offset, order[p.node]))
    return found


def _back(context: Context, node: Node, offset: int, found: Operand) -> list[tuple[Node, int]]:
    """Return the values that ``node`` carries, and note norms and rotary embeddings passed on the way."""
    what = context.flow.ops[node]
    if what.kind not in _THROUGH:
        return []
    if what.kind == "norm":
        found.normed = True
    if what.kind == "complex":
        found.rotary = True
    if what.kind == "cat":
        return _back_cat(context, node, offset)
    if what.kind in _ELEMENTWISE:
        return [(n, offset) for n in _carried(context, node, found)]
    if what.kind in ("reduce", "matmul"):
        rotated = [n for n in what.inputs if _rotated(context, n)] if what.kind == "reduce" else _unwaved(context, node)
        found.rotary |= bool(rotated)
        return [(n, offset) for n in rotated]
    return [(n, offset) for n in (what.inputs[:1] if what.kind in MOVES | {"gather"} else what.inputs)]


def _carried(context: Context, node: Node, found: Operand) -> list[Node]:
    """Return the operands of an elementwise operation that are the value itself, not a scale or a table."""
    what = context.flow.ops[node]
    operands = [n for n in what.attrs["operands"] if isinstance(n, Node)]
    waves = {n for n in operands if is_wave(context, n)}
    if what.kind == "mul" and waves:
        found.rotary = True
        return [n for n in what.inputs if n not in waves]
    found.normed |= any(_is_scale(context, n) for n in operands if not is_whole_operand(n, node))
    return [n for n in what.inputs if n not in waves and is_whole_operand(n, node)]


def _rotated(context: Context, node: Node) -> bool:
    """Whether ``node`` is a product with a rotation matrix of sines and cosines, about to be summed."""
    what = context.flow.ops[node]
    return what.kind == "mul" and any(is_wave(context, n) for n in what.inputs)


def _unwaved(context: Context, node: Node) -> list[Node]:
    inputs = context.flow.ops[node].inputs
    rest = [n for n in inputs if not is_wave(context, n)]
    return rest if len(rest) < len(inputs) else []


def _back_cat(context: Context, node: Node, offset: int) -> list[tuple[Node, int]]:
    """A concatenation along the tokens shifts its parts; one along the features does not."""
    what = context.flow.ops[node]
    dim, start, parts = what.attrs["dim"], 0, []
    along_features = dim == len(shape(node) or ()) - 1
    for part in what.inputs:
        parts.append((part, offset if along_features else offset + start))
        start += (shape(part) or (0,) * (dim + 1))[dim]
    return parts


def _is_scale(context: Context, node: Node) -> bool:
    """Whether ``node`` is the statistic of a norm that was written out."""
    for _ in range(6):
        what = context.flow.ops[node]
        if what.kind == "reduce" or what.name in _ROOTS:
            return True
        if what.kind not in MOVES | _ELEMENTWISE or not what.inputs:
            return False
        node = what.inputs[0]
    return False


def is_wave(context: Context, node: Node) -> bool:
    """Whether ``node`` is a table of sines and cosines: made without a projection, or from an input of positions."""
    wave = False
    seen, stack = {node}, [node]
    while stack and len(seen) < _WAVE_NODES:
        current = stack.pop()
        what = context.flow.ops[current]
        if context.lanes.of(current) is not None:
            return False
        wave |= (
            what.name in _WAVES
            or _is_table(context, current)
            or (what.kind == "input" and context.classes.inputs.get(current) == "position")
        )
        if what.kind in _TABLES and what.name not in _WAVES:
            fresh = [n for n in (*current.all_input_nodes, *context.flow.writes(current)) if n not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return wave


def _is_table(context: Context, node: Node) -> bool:
    """Whether ``node`` is a buffer or a constant of at least two dimensions."""
    found = param_ref(node, context.graph) if context.flow.ops[node].kind == "param" else None
    if found is None:
        return False
    tensor = context.graph.parameter(found.fqn)
    return tensor.ndim >= 2 and not isinstance(tensor, torch.nn.Parameter)


def _part(context: Context, base: Node, offset: int, entries: list[tuple[Node, Lane]]) -> Part | None:
    what = context.flow.ops[base]
    if "weight" not in what.params:
        return None
    rows = _used(entries)
    value, lane = _holder(context, entries, rows)
    size = what.attrs["out_features"]
    bias = what.params.get("bias")
    return Part(
        base,
        context.flow.uncast(what.inputs[0]),
        row_weight(what.params["weight"], rows, size),
        row_weight(bias, rows, size) if bias is not None else None,
        value,
        lane,
        offset,
    )


def _holder(context: Context, entries: list[tuple[Node, Lane]], rows: Rows) -> tuple[Node, Lane]:
    """Return the last value that holds all used features: of the halves of a rotary embedding, what was halved."""
    value, lane = entries[0]
    while len(np.unique(lane.rows)) < len(rows) and value is not lane.base:
        value = context.flow.ops[value].inputs[0]
        above = context.lanes.of(value)
        assert above is not None, "a lane comes from a lane"
        lane = above
    return value, lane


def _used(entries: list[tuple[Node, Lane]]) -> Rows:
    """Return the features in order; several entries are the halves of a rotary embedding."""
    rows = np.concatenate([lane.flat() for _, lane in entries])
    if len(entries) > 1:
        return np.unique(rows)
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]
