"""Find FFNs whose experts chose their tokens, and say which kernels compute them, or why none do.

The anchor is ``moefx::scatter``, which adds rows up by token. From there the finder goes up: the rows of E experts come
out of a batched product, before it stands pointwise code, before that another batched product, and so on to the tokens
that were taken by the same index. What follows the sum, such as a shared expert and the residual, is read on from it.

Shapes: T tokens, E experts, C tokens of each, R = E * C rows, K input and N output columns of a projection.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moefx.codegen.calls import Values, is_data, operands, recorded, site_of
from moefx.codegen.choice_spec import ChoiceSpec
from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.kernels import ChoiceSumSpec
from moefx.codegen.reasons import CannotLower
from moefx.codegen.spec import Kernel, LinearSpec, RegionSpec
from moefx.codegen.tail import VIEWS, called, same, tail_of

_VIEWS = VIEWS | {"flatten", "unflatten", "contiguous", "clone", "alias"}
_ASKED = "lower an expert choice"


@dataclass(frozen=True)
class ChoiceLowering:
    """Batched projections over chosen tokens with their sum by token, and the kernels that replace them."""

    name: str
    spec: ChoiceSpec
    nodes: tuple[fx.Node, ...]
    #: What :func:`moefx.codegen.choice.choice_op` takes; a bias is read as [E, 1, N].
    inputs: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...]
    output: fx.Node
    #: Rows and experts in the example inputs.
    rows: int
    experts: int
    #: What has the shape of ``output``, where that is not [T, D].
    like: fx.Node | None = None
    notes: tuple[str, ...] = ()
    what: ClassVar[str] = "sum by token"

    @property
    def region(self) -> RegionSpec:
        """The projections."""
        return self.spec.region

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels besides the projections."""
        return self.spec.kernels

    @property
    def training_kernels(self) -> tuple[Kernel, ...]:
        """Those of training, of both passes."""
        return self.spec.training_kernels

    def replace(self, graph: fx.GraphModule, training: bool) -> None:
        """Put a call of the kernels in the place of the nodes."""
        from moefx.codegen.choice import register

        target = torch.ops.moefx.choice_train.default if training else torch.ops.moefx.choice.default
        g = graph.graph
        with g.inserting_before(self.output):
            flat = {bias: g.call_method("squeeze", (bias, 1)) for bias in self.biases}
            call = g.call_function(target, ([flat.get(one, one) for one in self.inputs], register(self.spec)))
            call = g.call_function(operator.getitem, (call, 0)) if training else call
            call = call if self.like is None else g.call_method("view_as", (call, self.like))
        call.meta = dict(self.output.meta)
        self.output.replace_all_uses_with(call)
        for node in reversed(self.nodes):
            if not node.users:
                g.erase_node(node)


@dataclass
class _Projection:
    """A batched product with its bias: ``node`` is where its rows come out."""

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    transposed: fx.Node
    #: The product alone, and with its bias.
    products: tuple[fx.Node, ...]
    bias: fx.Node | None = None


@dataclass
class _Reader:
    """One expert choice while it is read, from its end to its beginning."""

    scatter: fx.Node
    value: Values
    #: What the kernels compute, and the views, copies and fills around it, which others may go on to read.
    nodes: list[fx.Node] = field(default_factory=list)
    moves: list[fx.Node] = field(default_factory=list)
    specs: list[LinearSpec] = field(default_factory=list)
    weights: list[list[fx.Node]] = field(default_factory=list)
    biases: list[fx.Node] = field(default_factory=list)

    def read(self) -> ChoiceLowering:
        named = operands(self.scatter)
        end, index = named["rows"], named["tokens"]
        x = None
        while x is None:
            end = self.stage(end)
            x = self.tokens(end, index, named["num_tokens"])
        self.nodes.append(self.scatter)
        total, given, output, like = self.total()
        position = {node: i for i, node in enumerate(self.scatter.graph.nodes)}
        nodes = tuple(sorted({*self.nodes, *self.moves}, key=position.__getitem__))
        self.check_readers(output)
        self.specs[0] = dataclasses.replace(self.specs[0], gather=True)
        spec = ChoiceSpec(RegionSpec(tuple(self.specs), placed=True), total)
        inputs = (x, index, *(one for part in self.weights for one in part), named["weights"], *given)
        experts, each = self.value(end).shape[:2]
        return ChoiceLowering(
            site_of(self.scatter),
            spec,
            nodes,
            inputs,
            tuple(self.biases),
            output,
            _example(experts) * _example(each),
            _example(experts),
            like,
        )

    def stage(self, end: fx.Node) -> fx.Node:
        """Take the projections whose expression ends in ``end``; return the rows that they read."""
        while called(end) in _VIEWS and not self.projection(end):
            self.moves.append(end)
            end = self.source(end)
        starts: list[_Projection] = []
        between: list[fx.Node] = []
        pending = [end]
        while pending:
            node = pending.pop()
            found = self.projection(node)
            if found is not None:
                starts += [found] if all(node is not one.node for one in starts) else []
            elif node not in between:
                between.append(node)
                pending += self.interior(node)
        self.take(end, starts, between)
        return starts[0].data

    def source(self, node: fx.Node) -> fx.Node:
        """Return what a view reads, which has the same rows, of the same experts where they have an axis."""
        found = node.all_input_nodes[0]
        before, after = self.value(found).shape, self.value(node).shape
        keeps = same(before[-1:], after[-1:]) and (len(before) != len(after) or same(before, after))
        if not keeps or not {len(before), len(after)} <= {2, 3}:
            raise CannotLower(_ASKED, found=f"{node.name} cuts the rows anew, {tuple(before)} into {tuple(after)}")
        return found

    @staticmethod
    def interior(node: fx.Node) -> list[fx.Node]:
        """Return what a node of an expression reads, all of which has to come out of the projections."""
        if node.op not in ("call_function", "call_method", "call_module") or not node.all_input_nodes:
            raise CannotLower(_ASKED, found=f"{node.name} joins the rows, and comes out of no batched product")
        if called(node) in ("bmm", "matmul", "baddbmm", "index_select"):
            raise CannotLower(_ASKED, found=f"{node.name} is no product of rows with one weight per expert")
        return list(node.all_input_nodes)

    def projection(self, node: fx.Node) -> _Projection | None:
        """Return the batched product, with or without a bias, that a node is."""
        if called(node) == "add" and len(node.all_input_nodes) == 2 and not node.kwargs:
            for product, bias in (node.all_input_nodes, node.all_input_nodes[::-1]):
                inner = self.projection(product) if called(product) in ("bmm", "matmul") else None
                if inner is not None and self.is_bias(bias, inner):
                    return dataclasses.replace(inner, node=node, bias=bias, products=(product, node))
        if called(node) not in ("bmm", "matmul") or len(node.all_input_nodes) != 2:
            return None
        data, transposed = node.all_input_nodes
        weight = _untransposed(transposed)
        if node.args[0] is not data or self.value(transposed).dim() != 3 or self.value(data).dim() != 3:
            return None
        if weight is None:
            raise CannotLower(_ASKED, found=f"{node.name} multiplies by a weight that is stored [E, K, N]")
        return _Projection(node, data, weight, transposed, (node,))

    def is_bias(self, bias: fx.Node, inner: _Projection) -> bool:
        """Whether a node is one row [E, 1, N] for each expert."""
        experts, _, columns = self.value(inner.node).shape
        return same(self.value(bias).shape, (experts, 1, columns))

    def take(self, end: fx.Node, starts: list[_Projection], between: list[fx.Node]) -> None:
        """Take one or two products of the same rows, and the expression behind them, as one kernel."""
        position = {node: i for i, node in enumerate(end.graph.nodes)}
        starts.sort(key=lambda one: position[one.node])
        first = starts[0]
        if len(starts) > 2 or any(one.data is not first.data for one in starts):
            raise CannotLower(_ASKED, found=f"{end.name} joins products of several rows")
        if len({(self.value(one.weight).shape, one.bias is None) for one in starts}) != 1:
            raise CannotLower(_ASKED, found=f"{end.name} joins products of different shapes")
        between.sort(key=position.__getitem__)
        fused = self.epilogue([one.node for one in starts], between, end)
        spec = self.linear_spec(first)
        width = spec.out_features * len(starts) // fused.inputs
        self.specs.insert(0, dataclasses.replace(spec, out_features=width, epilogue=fused, weights=len(starts)))
        biases = [one.bias for one in starts if one.bias is not None]
        self.weights.insert(0, [*(one.weight for one in starts), *biases])
        self.biases += biases
        self.nodes += [*between, *(node for one in starts for node in one.products)]
        self.moves += [one.transposed for one in starts]

    def epilogue(self, starts: list[fx.Node], between: list[fx.Node], end: fx.Node) -> Any:
        """Return the expression between two products as a program."""
        graph = fx.Graph()
        copies = {start: graph.placeholder(f"z{i}") for i, start in enumerate(starts)}
        for node in between:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[end])
        return trace_pointwise(fx.GraphModule(self.value.root, graph), int(self.value(starts[0]).shape[2]), len(starts))

    def linear_spec(self, one: _Projection) -> LinearSpec:
        """Return the spec of one projection, without an expression."""
        tensors = [self.value(node) for node in (one.data, one.weight, one.node, one.bias) if node is not None]
        if len({tensor.dtype for tensor in tensors}) != 1:
            found = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            raise CannotLower(_ASKED, found=f"{one.node.name} joins {found} (autocast)")
        weight = tensors[1]
        precise = torch.get_float32_matmul_precision() == "highest"
        return LinearSpec(
            in_features=int(weight.shape[2]),
            out_features=int(weight.shape[1]),
            dtype=str(weight.dtype).removeprefix("torch."),
            bias=one.bias is not None,
            precision="ieee" if precise else "tf32",
        )

    def tokens(self, rows: fx.Node, index: fx.Node, count: Any) -> fx.Node | None:
        """Return the tokens that ``rows`` were taken from, or nothing if an expression made them."""
        path = [rows]
        while called(path[-1]) in _VIEWS:
            path.append(self.source(path[-1]))
        take = path[-1]
        if called(take) != "index_select":
            return None
        named = dict(zip(("input", "dim", "index"), take.args, strict=False)) | take.kwargs
        if named["dim"] not in (0, -2) or named["index"] is not index:
            raise CannotLower(_ASKED, found=f"{take.name} takes tokens by another index than the sum puts them back")
        x = take.all_input_nodes[0]
        self.moves += path
        if called(x) == "cat" and same(self.value(x).shape[1:], self.value(x.all_input_nodes[0]).shape[1:]):
            # A row more, which stands for no token.
            self.moves += [x, *x.all_input_nodes[1:]]
            x = x.all_input_nodes[0]
        counted = recorded(count) if isinstance(count, fx.Node) else count
        if not statically_known_true(self.value(x).shape[0] == counted):
            raise CannotLower(_ASKED, found=f"tokens are taken out of {x.name}, and put back into another number")
        return x

    def total(self) -> tuple[ChoiceSumSpec, tuple[fx.Node, ...], fx.Node, fx.Node | None]:
        """Return the sum by token with what follows it, what that reads, its end, and what has the shape of that."""
        last = self.specs[-1]
        total = ChoiceSumSpec(last.out_features, last.dtype)
        tail = tail_of(self.scatter, self.value)
        if tail is None:
            return total, (), self.scatter, None
        self.nodes += tail.nodes
        total = dataclasses.replace(total, tail=tail.program, operands=tail.kinds)
        return total, tail.operands, tail.nodes[-1], tail.like

    def check_readers(self, output: fx.Node) -> None:
        """Check that nobody else reads what the kernels do not store."""
        inside = {*self.nodes, *self.moves}
        for node in self.nodes:
            outside = [user.name for user in node.users if user not in inside and is_data(user)]
            if outside and node is not output:
                raise CannotLower(_ASKED, found=f"{outside[0]} reads {node.name} outside of the region")


def _untransposed(node: fx.Node) -> fx.Node | None:
    """Return the weight [E, N, K] whose transpose a node is."""
    name, args = called(node), node.args
    last_two = {-2, -1}, {1, 2}
    swapped = name in ("transpose", "swapaxes") and set(args[1:3]) in last_two
    permuted = name == "permute" and (args[1:] == (0, 2, 1) or args[1:] in (([0, 2, 1],), ((0, 2, 1),)))
    named = (name == "getattr" and args[1] == "mT") or name in ("mT", "adjoint", "matrix_H")
    found = args[0] if swapped or permuted or named else None
    return found if isinstance(found, fx.Node) else None


def _example(size: Any) -> int:
    """Return a size of the example inputs, which a tracer may keep open."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(size if hint is None else hint)


def lower_choice(scatter: fx.Node, value: Values) -> ChoiceLowering:
    """Return the kernels of the FFN that ends in a sum by token, or raise :class:`CannotLower`."""
    return _Reader(scatter, value).read()
