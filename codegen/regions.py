"""Regions of grouped projections: where one begins, how far it goes, and why it ends there.

A region starts at a ``grouped_linear``, runs through pointwise operators into the next ``grouped_linear`` or the
``combine`` over the same routing, and so on.  It is found by data flow alone.  Where an expression cannot be fused the
region ends before it and says why; what follows starts a region of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moefx.codegen.calls import ARGUMENTS, Values, dialect_op, operands, recorded, site_of
from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.findings import Lowering
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.spec import CombineSpec, LinearSpec, RegionSpec
from moefx.codegen.tail import Tail, tail_of


@dataclass
class _Chain:
    """A region while it grows: the projections it has come to, and what was taken so far."""

    last: tuple[fx.Node, ...]
    order: fx.Node | None
    open: bool = True
    nodes: list[fx.Node] = field(default_factory=list)
    specs: list[LinearSpec] = field(default_factory=list)
    weights: list[fx.Node] = field(default_factory=list)
    combine: CombineSpec | None = None
    gates: list[fx.Node] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    like: fx.Node | None = None

    def __post_init__(self) -> None:
        self.first = operands(self.last[0])

    def check_follows(self, sink: fx.Node) -> None:
        """Check that the next operator keeps to the same routing."""
        named = operands(sink)
        if dialect_op(sink) == "combine":
            if self.order is not None and named["order"] is not self.order:
                raise CannotLower("fuse a combine", found=f"{sink.name} reads another order than the projections")
        elif named["order"] is not None or named["offsets"] is not self.first["offsets"]:
            raise CannotLower("fuse two projections", found=f"{sink.name} groups its rows anew")

    def take(self, spec: LinearSpec, projections: tuple[fx.Node, ...], between: Iterable[fx.Node] = ()) -> None:
        """Take projections that become one kernel, with the expression behind them."""
        named = [operands(node) for node in projections]
        self.specs.append(spec)
        self.nodes += [*projections, *between]
        self.weights += [one["weight"] for one in named]
        self.weights += [one["bias"] for one in named if one["bias"] is not None]

    def end(self, why: str) -> None:
        """End with a projection whose expression is not fused."""
        self.notes.append(why)
        self.open = False

    def end_in_combine(self, sink: fx.Node, combine: CombineSpec) -> None:
        """End with the combine."""
        self.nodes.append(sink)
        self.order, self.gates = operands(sink)["order"], [operands(sink)["weights"]]
        self.combine, self.last, self.open = combine, (sink,), False

    def take_tail(self, tail: Tail) -> None:
        """Take what follows the combine."""
        assert self.combine is not None
        self.combine = dataclasses.replace(self.combine, tail=tail.program, operands=tail.kinds)
        self.nodes += tail.nodes
        self.gates += tail.operands
        self.last, self.like = (tail.nodes[-1],), tail.like

    def lowering(self, position: dict[fx.Node, int]) -> Lowering:
        """Return what was taken."""
        region = RegionSpec(tuple(self.specs), self.combine)
        order = [self.order] if region.reads_order else []
        inputs = (self.first["x"], self.first["offsets"], *order, *self.weights, *self.gates)
        nodes = sorted(self.nodes, key=position.__getitem__)
        return Lowering(site_of(nodes[0]), region, tuple(nodes), inputs, self.last[0], tuple(self.notes), self.like)


class RegionFinder:
    """The regions of one graph; ``taken`` holds the nodes of those found so far."""

    def __init__(self, graph: fx.Graph, value: Values) -> None:
        self.graph, self.value = graph, value
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.taken: set[fx.Node] = set()

    def region(self, start: fx.Node) -> Lowering:
        """Grow a region from its first projection as far as it goes."""
        chain = _Chain((start,), operands(start)["order"])
        pair = self.twin(start)
        if pair is not None and not self.grow(chain, pair):
            chain.notes.clear()
            chain.open = True
        while chain.open:
            self.grow(chain, chain.last)
        tail = tail_of(chain.last[0], self.value) if chain.combine else None
        if tail is not None:
            chain.take_tail(tail)
        lowering = chain.lowering(self.position)
        self.taken.update(lowering.nodes)
        return lowering

    def grow(self, chain: _Chain, projections: tuple[fx.Node, ...]) -> bool:
        """Take projections and what follows; a lone projection is taken even if what follows is not."""
        spec = self.linear_spec(projections[0])
        try:
            sink, between = self.consumer(projections)
            chain.check_follows(sink)
            fused = self.epilogue(projections, between, sink)
            if dialect_op(sink) == "combine" and not fused.keeps_zero:
                raise CannotLower("fuse an expression", found="it is not zero at zero, where rows of dropped slots are")
            width = spec.out_features * len(projections) // fused.inputs
            spec = dataclasses.replace(spec, out_features=width, epilogue=fused, weights=len(projections))
        except CannotLower as error:
            if len(projections) == 1:
                chain.take(spec, projections)
            chain.end(error.found)
            return False
        chain.take(spec, projections, between)
        if dialect_op(sink) == "combine":
            chain.end_in_combine(sink, self.combine_spec(sink, spec))
        else:
            chain.last = (sink,)
        return True

    def twin(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return the projection with the one other that reads the same rows, as gated FFNs with two weights have."""
        named = operands(node)
        free = [n for n in self.graph.nodes if dialect_op(n) == "grouped_linear" and n not in self.taken | {node}]
        same = [n for n in free if all(operands(n)[key] == named[key] for key in ("x", "order", "offsets", "k"))]
        if len(same) != 1 or (operands(same[0])["bias"] is None) != (named["bias"] is None):
            return None
        if self.value(operands(same[0])["weight"]).shape != self.value(named["weight"]).shape:
            return None
        return (node, same[0])

    def linear_spec(self, node: fx.Node) -> LinearSpec:
        """Return the spec of one projection, without an epilogue."""
        named = operands(node)
        x, weight, out = self.value(named["x"]), self.value(named["weight"]), self.value(node)
        if not x.dtype == weight.dtype == out.dtype:
            raise CannotLower(
                "lower a projection", found=f"{x.dtype} input, {weight.dtype} weight, {out.dtype} result (autocast)"
            )
        if x.device.type not in ("cuda", "cpu", "meta"):
            raise CannotLower("lower a projection", found=f"a tensor on {x.device.type}")
        precise = torch.get_float32_matmul_precision() == "highest"
        return LinearSpec(
            in_features=int(weight.shape[2]),
            out_features=int(weight.shape[1]),
            dtype=str(x.dtype).removeprefix("torch."),
            bias=named["bias"] is not None,
            gather=named["order"] is not None,
            top_k=_number(named["k"]),
            precision="ieee" if precise else "tf32",
        )

    def combine_spec(self, node: fx.Node, linear: LinearSpec) -> CombineSpec:
        """Return the spec of the combine that ends a region, after ``linear``."""
        slots = int(self.value(operands(node)["weights"]).shape[1])
        return CombineSpec(linear.out_features, slots, linear.dtype)

    def consumer(self, starts: tuple[fx.Node, ...]) -> tuple[fx.Node, list[fx.Node]]:
        """Return the one dialect op that everything computed from ``starts`` flows into, and the nodes between."""
        inside, sinks = set(starts), set()
        pending = {user for start in starts for user in start.users}
        while pending:
            node = min(pending, key=self.position.__getitem__)
            pending.remove(node)
            name = dialect_op(node)
            if name is not None and _only_data_input(node, name, inside):
                sinks.add(node)
                continue
            self._check_interior(node, inside)
            inside.add(node)
            pending.update(node.users)
        if len(sinks) != 1:
            raise CannotLower("fuse an expression", found=f"the projection flows into {len(sinks)} routed operators")
        return sinks.pop(), sorted(inside - set(starts), key=self.position.__getitem__)

    @staticmethod
    def _check_interior(node: fx.Node, inside: set[fx.Node]) -> None:
        if node.op == "output" or dialect_op(node) is not None:
            raise CannotLower(
                "fuse an expression", found=f"{node.op} {node.name} reads the projection outside of the region"
            )
        outside = [arg.name for arg in node.all_input_nodes if arg not in inside]
        if outside:
            raise CannotLower("fuse an expression", found=f"{node.name} joins it with {', '.join(outside)}")

    def epilogue(self, starts: tuple[fx.Node, ...], nodes: Iterable[fx.Node], sink: fx.Node) -> Pointwise:
        """Return the expression between dialect ops as a program."""
        graph = fx.Graph()
        copies = {start: graph.placeholder(f"z{i}") for i, start in enumerate(starts)}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[operands(sink)[ARGUMENTS[str(dialect_op(sink))][0]]])
        return trace_pointwise(fx.GraphModule(self.value.root, graph), int(self.value(starts[0]).shape[1]), len(starts))


def _only_data_input(node: fx.Node, name: str, inside: set[fx.Node]) -> bool:
    """Whether the region enters a dialect op as its rows and in no other place."""
    named = operands(node)
    data = named.pop(ARGUMENTS[name][0])
    return data in inside and not any(isinstance(arg, fx.Node) and arg in inside for arg in named.values())


def _number(value: Any) -> int:
    """Return a number of slots, which a traced graph holds as a node with a value."""
    found = recorded(value) if isinstance(value, fx.Node) else value
    return int(found or 1)
