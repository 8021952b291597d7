"""Find routed regions in a graph and say which kernels compute them, or why none do.

A region starts at a ``grouped_linear``, runs through pointwise operators into the next ``grouped_linear`` or the
``combine`` over the same routing, and so on.  It is found by data flow alone, in traced, exported and dynamo graphs.
Where an expression cannot be fused the region ends before it and says why; what follows starts a region of its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from moefx import ops
from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.router_lowering import (
    GroupLowering,
    RouterLowering,
    calls,
    feeds_routing,
    is_choice,
    lower_group,
    lower_router,
)
from moefx.codegen.spec import CombineSpec, LinearSpec, RegionSpec
from moefx.codegen.tail import Tail, tail_of
from moefx.codegen.token_lowering import TokenLowering, is_tokens, lower_tokens

if TYPE_CHECKING:
    from moefx.codegen.attention import HeadLowering


#: What a graph is found to hold.
Found: TypeAlias = "Lowering | HeadLowering | TokenLowering | RouterLowering | GroupLowering | Refusal"


def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.moefx, name).default._schema.arguments]


_ARGUMENTS = {name: _argument_names(name) for name in ("grouped_linear", "combine")}
# The functions of moefx.ops suffix names with shapes; positions are the same.
_ALIASES = {
    name: dict(zip(inspect.signature(getattr(ops, name)).parameters, arguments, strict=True))
    for name, arguments in _ARGUMENTS.items()
}


@dataclass(frozen=True)
class Lowering:
    """A region and the kernels that replace it."""

    name: str
    region: RegionSpec
    nodes: tuple[fx.Node, ...]
    #: What the region reads, in the order of :func:`moefx.codegen.runtime.region_op`.
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    #: Why the region is not larger, if there was more to fuse.
    notes: tuple[str, ...] = ()
    #: What has the shape of ``output``, where that is not the region's.
    like: fx.Node | None = None


@dataclass(frozen=True)
class Refusal:
    """A routed operator that no kernel computes; the dialect op stays."""

    name: str
    node: fx.Node
    reason: str
    #: What it would have been.
    kind: str = "region"


def dialect_op(node: Any) -> str | None:
    """Return which dialect op a node calls (``"grouped_linear"``, ``"combine"``), in any spelling of the call."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    target = node.target
    for name in _ARGUMENTS:
        packet = getattr(torch.ops.moefx, name)
        if target in (packet, packet.default, getattr(ops, name)):
            return name
    return None


def _calls_head_attention(node: fx.Node) -> bool:
    packet = torch.ops.moefx.head_attention
    return node.op == "call_function" and node.target in (packet, packet.default)


def operands(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a dialect call by name."""
    name = str(dialect_op(node))
    named = {_ALIASES[name].get(key, key): value for key, value in node.kwargs.items()}
    return dict.fromkeys(_ARGUMENTS[name]) | dict(zip(_ARGUMENTS[name], node.args, strict=False)) | named


def lowerings(graph: Any) -> list[Found]:
    """Return every routed region, attention of routed heads, gather and scatter of tokens, in execution order.

    ``graph`` is a :class:`torch.fx.GraphModule` (dynamo, export) or a traced graph with ``fx`` and ``root``.
    """
    is_module = isinstance(graph, fx.GraphModule)
    finder = _Finder(graph.graph if is_module else graph.fx, graph if is_module else graph.root)
    return finder.find()


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
        return Lowering(_site(nodes[0]), region, tuple(nodes), inputs, self.last[0], tuple(self.notes), self.like)


class _Finder:
    def __init__(self, graph: fx.Graph, root: torch.nn.Module) -> None:
        self.graph, self.root = graph, root
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.taken: set[fx.Node] = set()

    def find(self) -> list[Found]:
        found: list[Found] = []
        for node in self.graph.nodes:
            try:
                if _calls_head_attention(node):
                    found.append(self.heads(node))
                elif is_tokens(node, self.value):
                    found.append(lower_tokens(_site(node), node, self.value, self.root))
                elif calls(node, "group"):
                    found.append(lower_group(node, _site(node)))
                elif dialect_op(node) == "grouped_linear" and node not in self.taken:
                    lowering = self.region(node)
                    self.taken.update(lowering.nodes)
                    found.append(lowering)
            except CannotLower as error:
                kind = "grouping" if calls(node, "group") else "region"
                found.append(Refusal(_site(node), node, error.found or error.asked, kind))
        routers = [item for node in self.graph.nodes if is_choice(node) for item in self.router(node)]
        return sorted([*found, *routers], key=lambda item: self.position[_anchor(item)])

    def router(self, node: fx.Node) -> list[RouterLowering | Refusal]:
        """Return the router that ends in a choice, why there is none, or nothing if it is no router."""
        try:
            return [lower_router(node, self.value, _site(node), self.root)]
        except CannotLower as error:
            why = error.found or error.asked
            return [Refusal(_site(node), node, why, "router")] if feeds_routing(node) else []

    def heads(self, node: fx.Node) -> HeadLowering:
        """Return the kernels of one attention of routed heads."""
        from moefx.codegen.attention import lower_heads

        q = self.value(node.args[0] if node.args else node.kwargs["q"])
        return lower_heads(_site(node), node, q)

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
        return chain.lowering(self.position)

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

    def value(self, node: Any) -> torch.Tensor:
        """Return the fake or real tensor of a node."""
        found = None
        if isinstance(node, fx.Node):
            found = node.meta.get("val", node.meta.get("example_value"))
            if found is None and node.op == "get_attr":
                found = _attribute(self.root, str(node.target))
        if not isinstance(found, torch.Tensor):
            raise CannotLower(
                "read shapes", found=f"{node} has no recorded shape", do="propagate shapes through the graph"
            )
        return found

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
        graph.output(copies[operands(sink)[_ARGUMENTS[str(dialect_op(sink))][0]]])
        return trace_pointwise(fx.GraphModule(self.root, graph), int(self.value(starts[0]).shape[1]), len(starts))


def _only_data_input(node: fx.Node, name: str, inside: set[fx.Node]) -> bool:
    """Whether the region enters a dialect op as its rows and in no other place."""
    named = operands(node)
    data = named.pop(_ARGUMENTS[name][0])
    return data in inside and not any(isinstance(arg, fx.Node) and arg in inside for arg in named.values())


def _number(value: Any) -> int:
    """Return a number of slots, which a traced graph holds as a node with a value."""
    found = value.meta.get("val", value.meta.get("example_value")) if isinstance(value, fx.Node) else value
    return int(found or 1)


def _attribute(root: torch.nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, str(name), None)
    return value


def _anchor(item: Any) -> fx.Node:
    node: fx.Node = (
        item.node if isinstance(item, Refusal) else item.nodes[0] if isinstance(item, Lowering) else item.output
    )
    return node


def _site(node: fx.Node) -> str:
    path = getattr(node.meta.get("moefx"), "path", None)
    if path:
        return str(path)
    stack = node.meta.get("nn_module_stack")
    if stack:
        innermost = str(next(reversed(stack.values()))[0])
        # A forward that moefx installed reads children past attribute lookup.
        innermost = re.sub(r"__dict__\['_modules'\]\['(\w+)'\]", r"\1", innermost)
        return innermost.removeprefix("L['self'].").replace("L['self']", "") or node.name
    return node.name


def replace(graph: fx.GraphModule, found: Iterable[Found], training: bool = False) -> int:
    """Replace what was found by calls of its kernels, in place, and return how many regions were; refusals stay.

    With ``training`` a region also saves what its gradient reads.
    """
    # The operators are defined only where kernels are wanted.
    import moefx.codegen.attention
    import moefx.codegen.backward
    import moefx.codegen.routing
    import moefx.codegen.tokens  # noqa: F401
    from moefx.codegen.runtime import register

    target = torch.ops.moefx.region_train.default if training else torch.ops.moefx.region.default

    kept = [item for item in found if not isinstance(item, Refusal)]
    placements: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for group in kept:
        placements |= group.replace(graph) if isinstance(group, GroupLowering) else {}
    routers = [item for item in kept if isinstance(item, RouterLowering)]
    regions = [item for item in kept if not isinstance(item, GroupLowering | RouterLowering)]
    for lowering in regions:
        if isinstance(lowering, TokenLowering):
            lowering.replace(graph)
            continue
        if not isinstance(lowering, Lowering):
            lowering.output.target = torch.ops.moefx.head_attention_kernels.default
            continue
        lowering = _placed(lowering, placements)
        with graph.graph.inserting_before(lowering.output):
            arguments = (list(lowering.inputs), register(lowering.region))
            call = graph.graph.call_function(target, arguments)
            if training:
                call = graph.graph.call_function(operator.getitem, (call, 0))
            if lowering.like is not None:
                call = graph.graph.call_method("view_as", (call, lowering.like))
        call.meta = dict(lowering.output.meta)
        lowering.output.replace_all_uses_with(call)
        for node in reversed(lowering.nodes):
            graph.graph.erase_node(node)
    for router in routers:  # last: their results are what regions read
        router.replace(graph, training)
    graph.graph.lint()
    graph.recompile()
    return len(regions)


def _placed(lowering: Lowering, placements: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> Lowering:
    """Return a region that reads the positions and row tiles which its grouping made, if kernels group."""
    found = placements.get(lowering.inputs[1])
    if found is None:
        return lowering
    at = 3 if lowering.region.reads_order else 2
    inputs = (*lowering.inputs[:at], *found, *lowering.inputs[at:])
    return dataclasses.replace(lowering, region=dataclasses.replace(lowering.region, placed=True), inputs=inputs)


def describe(found: Iterable[Found]) -> str:
    """Return the regions as text: one line each, and one per kernel or reason below it."""
    lines: list[str] = []
    for item in found:
        if isinstance(item, Refusal):
            lines += [f"{item.name}: {item.kind} not lowered", f"  because {item.reason}"]
            continue
        if isinstance(item, TokenLowering):
            lines += [f"{item.name}: tokens", f"  {item.spec.name}"]
            continue
        if isinstance(item, RouterLowering | GroupLowering):
            kind = "router" if isinstance(item, RouterLowering) else "grouping"
            lines += [f"{item.name}: {kind}", *(f"  {kernel.name}" for kernel in item.kernels)]
            continue
        if not isinstance(item, Lowering):
            lines += [f"{item.name}: attention of routed heads", *(f"  {spec.name}" for spec in item.specs)]
            continue
        lines.append(f"{item.name}: region {item.region.key}")
        lines += [f"  {kernel.name}" for kernel in item.region.kernels]
        lines += [f"  ends there because {note}" for note in item.notes]
    return "\n".join(lines)
