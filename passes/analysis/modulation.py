"""Taps and modulation: where the timestep can be read, and how conditioning scales, shifts and gates a sub-layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch.fx import Node

from moefx.graph.kinds import MOVES, POINTWISE, op, shape, value
from moefx.passes.analysis.conditioning import LABEL, TIMESTEP
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.streams import is_whole_operand

if TYPE_CHECKING:
    from moefx.graph import Graph

_VECTORS = frozenset({TIMESTEP, LABEL})


@dataclass(frozen=True, eq=False)
class Tap:
    """A value made from the timestep and not from tokens: ``raw`` numbers ``[B]`` or an ``embedding`` ``[B, D]``."""

    node: Node
    depends: frozenset[str]
    form: Literal["raw", "embedding"]


@dataclass(frozen=True, eq=False)
class Modulation:
    """How conditioning enters a sub-layer: ``x = norm(s) * (1 + scale) + shift`` and ``s + gate * f(x)``.

    Each part is the vector before reshapes and ``1 +``, or ``None`` where there is none.
    """

    shift: Node | None
    scale: Node | None
    gate: Node | None


def timestep_taps(context: Context, before: Node | None = None) -> list[Tap]:
    """Return the values that carry the timestep, available before a node in program order.

    Raw timesteps come first, then embeddings of the timestep alone, then embeddings mixed with labels or pooled text;
    among equals those made by a projection come first, then program order.
    """
    flow = context.flow
    end = flow.index[before] if before is not None else len(flow.nodes)
    found = []
    for node in flow.nodes[:end]:
        depends = context.classes.of(node) if context.per_sample(node) else frozenset()
        if (
            TIMESTEP in depends
            and depends <= _VECTORS
            and (node.op == "placeholder" or value(node).is_floating_point())
        ):
            sizes = shape(node) or ()
            found.append(Tap(node, depends, "raw" if len(sizes) == 1 or sizes[-1] == 1 else "embedding"))

    def preference(tap: Tap) -> tuple[bool, int, bool, bool, int]:
        made = flow.ops[tap.node].kind in ("linear", "input")
        return tap.form != "raw", len(tap.depends), not made, _is_hidden(context, tap.node), flow.index[tap.node]

    return sorted(found, key=preference)


def _is_hidden(context: Context, node: Node) -> bool:
    """Whether ``node`` is only a layer on the way to another projection, such as the hidden layer of an embedder."""
    for _ in range(8):
        readers = context.flow.readers[node]
        if len(readers) != 1:
            return False
        node = readers[0]
        if context.flow.ops[node].kind == "linear":
            return True
        if context.flow.ops[node].kind not in POINTWISE | MOVES:
            return False
    return False


def modulation(context: Context, site: Site) -> Modulation:
    """Return the shift, the scale and the gate of a feed-forward or attention site, as far as they are plain to see."""
    shift, scale = _input_modulation(context, site.operands["x"])
    return Modulation(shift, scale, _gate(context, site))


def _input_modulation(context: Context, x: Node) -> tuple[Node | None, Node | None]:
    node, shift = context.flow.uncast(x), None
    what = context.flow.ops[node]
    if what.name == "addcmul":
        moved, _, factor = what.attrs["operands"]
        return _vector(context, moved), _vector(context, factor)
    if what.kind == "add":
        vectors, values = _split(context, node)
        if not vectors or not values:
            return None, None
        shift, node = vectors[0], values[0]
    if context.flow.ops[node].kind != "mul":
        return shift, None
    vectors, _ = _split(context, node)
    return shift, vectors[0] if vectors else None


def _split(context: Context, node: Node) -> tuple[list[Node], list[Node]]:
    """Separate the operands of an elementwise operation into conditioning vectors and the modulated value."""
    inputs = context.flow.ops[node].inputs
    vectors = [v for n in inputs if (v := _vector(context, n)) is not None]
    return vectors, [n for n in inputs if _vector(context, n) is None and is_whole_operand(n, node)]


def _vector(context: Context, node: Node) -> Node | None:
    """Return the conditioning vector behind ``node``, without reshapes and ``1 +``; ``None`` if there is none."""
    depends = context.classes.of(node)
    if not depends or not depends <= _VECTORS:
        return None
    what = context.flow.ops[node]
    while (what.kind in MOVES - {"slice"} or what.kind in ("add", "act")) and len(what.inputs) == 1:
        node = what.inputs[0]
        what = context.flow.ops[node]
    return node


def _gate(context: Context, site: Site) -> Node | None:
    """Follow the branch from its output to the residual add, and return the vector it is multiplied with."""
    end = site.operands.get("residual")
    seen, stack = {site.output}, [site.output]
    while stack:
        node = stack.pop()
        for user in context.flow.readers[node]:
            what = context.flow.ops[user]
            if user is end or user in seen:
                continue
            if what.kind == "mul":
                others = [v for n in what.inputs if n is not node and (v := _vector(context, n)) is not None]
                if others:
                    return others[0]
            if what.kind in MOVES | {"dropout", "norm", "add", "mul", "div"}:
                seen.add(user)
                stack.append(user)
    return None


def conditioning(graph: Graph) -> dict[Node, frozenset[str]]:
    """Return, per node with data, the classes of model inputs it depends on; empty for a constant."""
    context = Context(graph)
    return {n: context.classes.of(n) for n in context.flow.nodes if op(n, graph).kind not in ("size", "output")}
