"""Find routers in a graph, by data flow alone: a linear map, what is computed of its rows, the choice of the top k.

From the choice (a stable descending sort, ``topk`` or ``argmax``) the finder goes up to the linear map whose result has
the shape of the scores, reads every step between them, then reads on to the gates as far as the rows go.  Each step is
a row program's (`moefx.codegen.rows`); whatever else enters, such as a bias, noise, or logits of a timestep, is an
operand.  A router that cannot be read stays as it is, with the reason.

Shapes: T tokens of B samples, D width, E experts, K chosen.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from moefx.codegen.calls import calls, is_data, recorded
from moefx.codegen.group_limit import cut, limited
from moefx.codegen.kernels.grouping import MOST_EXPERTS, GroupingSpec
from moefx.codegen.kernels.router import RouterGradSpec, RouterSpec
from moefx.codegen.pointwise import Arg
from moefx.codegen.reasons import CannotLower
from moefx.codegen.row_reader import SHAPED_LIKE, RowReader, last_axis
from moefx.codegen.rows import Choice, RowProgram
from moefx.codegen.spec import Kernel
from moefx.codegen.tail import called, same

Value = Callable[[Any], torch.Tensor]
_CASTS = frozenset({"to", "float", "_to_copy", "type_as"})


@dataclass(frozen=True)
class RouterLowering:
    """A router and the kernel that computes it."""

    name: str
    spec: RouterSpec
    #: Where tokens, weight and the operands of the program are read: a node, and which of its inputs.
    reads: tuple[tuple[fx.Node, int], ...]
    index: fx.Node
    #: What else leaves the kernel, with its place among the results.
    outputs: tuple[tuple[fx.Node, int], ...]
    #: What the kernel computes, in order.
    nodes: tuple[fx.Node, ...] = ()
    #: Whether tokens are read as [T, D].
    is_flat: bool = False
    what: ClassVar[str] = "router"

    @property
    def output(self) -> fx.Node:
        """A node on the device of the router."""
        return self.index

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Tokens, weight, and the operands of the program; other replacements may have changed them."""
        return tuple(node.all_input_nodes[i] for node, i in self.reads)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the forward pass."""
        return (self.spec,)

    @property
    def training_kernels(self) -> tuple[Kernel, ...]:
        """The forward kernel that keeps its product, and that of the gradient of all results."""
        seeds = tuple(range(len(self.spec.program.outputs)))
        return (dataclasses.replace(self.spec, keep=True), RouterGradSpec(self.spec.program, seeds))

    def replace(self, graph: fx.GraphModule, training: bool) -> None:
        """Put a call of the kernel in the place of the nodes."""
        from moefx.codegen.routing import register

        spec = dataclasses.replace(self.spec, keep=self.spec.keep or training)
        x, weight, *operands = self.inputs
        first = self.first_reader(graph)
        with graph.graph.inserting_before(first):
            x = graph.graph.call_method("flatten", (x, 0, -2)) if self.is_flat else x
            call = graph.graph.call_function(
                torch.ops.moefx.router.default, (x, weight, list(operands), register(spec))
            )
            pairs = [(self.index, 0), *self.outputs]
            items = [graph.graph.call_function(operator.getitem, (call, place)) for _, place in pairs]
        for (node, _), item in zip(pairs, items, strict=True):
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=_is_no_noise)
        self.shape_noise(graph.graph)
        for node in reversed((*self.nodes, self.index)):
            if not node.users:
                graph.graph.erase_node(node)

    def shape_noise(self, graph: fx.Graph) -> None:
        """Let noise that was made in the shape of the scores take it from the tokens: there are no scores any more."""
        x = self.inputs[0]
        for node in (user for one in self.nodes for user in list(one.users) if called(user) in SHAPED_LIKE):
            made = recorded(node)
            with graph.inserting_before(node):
                wide = graph.call_method("flatten", (x, 0, -2)) if self.is_flat else x
                column = graph.call_method("narrow", (wide, -1, 0, 1))
                shape = graph.call_method("expand", (column, *[-1] * (made.dim() - 1), self.spec.program.experts))
            node.args, node.kwargs = (shape, *node.args[1:]), {**node.kwargs, "dtype": made.dtype}

    def first_reader(self, graph: fx.GraphModule) -> fx.Node:
        """Return the first node that reads what leaves the kernel, once all inputs stand before it."""
        position = {node: i for i, node in enumerate(graph.graph.nodes)}
        inside = {*self.nodes, self.index}
        made = [self.index, *(node for node, _ in self.outputs)]
        readers = (u for n in made for u in n.users if u not in inside and _is_no_noise(u))
        first = min(readers, key=position.__getitem__)
        for node in self.inputs:
            if position[node] > position[first]:
                first.prepend(node)
        return first


@dataclass(frozen=True)
class GroupLowering:
    """A call of ``moefx::group``, which kernels compute together with the row tiles of the regions that read it."""

    name: str
    output: fx.Node
    experts: int
    what: ClassVar[str] = "grouping"

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The module of both kernels."""
        return (GroupingSpec(),)

    @property
    def training_kernels(self) -> tuple[Kernel, ...]:
        """The same."""
        return self.kernels

    def replace(self, graph: fx.GraphModule) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """Call the kernels instead; return position and tiles by the nodes of the offsets."""
        node = self.output
        node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
        node.target = torch.ops.moefx.grouping.default
        with graph.graph.inserting_after(node):
            tiles = graph.graph.call_function(operator.getitem, (node, 3))
            position = graph.graph.call_function(operator.getitem, (node, 2))
        return {user: (position, tiles) for user in node.users if user.args[1] == 1}


def lower_group(node: fx.Node, name: str) -> GroupLowering:
    """Return the grouping of a call, or raise :class:`CannotLower`."""
    experts = node.kwargs.get("num_experts", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(experts, int) or experts > MOST_EXPERTS:
        raise CannotLower("lower a grouping", found=f"{experts} experts; kernels take up to {MOST_EXPERTS}")
    if any(called(user) != "getitem" for user in node.users):
        raise CannotLower("lower a grouping", found=f"{node.name} is read as a whole")
    return GroupLowering(name, node, experts)


def feeds_routing(choice: fx.Node) -> str | None:
    """Return what a choice routes, if the numbers that it yields reach an operator that does: experts or tokens."""
    seen, pending = {choice}, [choice]
    while pending:
        for user in pending.pop().users:
            if calls(user, "group"):
                return "experts"
            if calls(user, "scatter") or called(user) in ("index_copy", "index_add"):
                return "tokens"
            made = recorded(user)
            moves = called(user) in ("getitem", "getattr", "sort")
            if user not in seen and (moves or (isinstance(made, torch.Tensor) and made.dtype == torch.int64)):
                seen.add(user)
                pending.append(user)
    return None


def is_choice(node: fx.Node) -> bool:
    """Whether a node chooses experts by rows of scores."""
    name = called(node)
    if name == "topk":
        return True
    keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    return name == "sort" or (name == "argmax" and keep)


def lower_router(choice: fx.Node, value: Value, name: str, modules: nn.Module) -> RouterLowering:
    """Return the router that ends in a choice, or raise :class:`CannotLower`; ``modules`` holds leaf modules."""
    if not isinstance(choice.args[0], fx.Node) or not last_axis(choice, 2 if called(choice) == "topk" else 1, value):
        raise CannotLower("lower a router", found=f"{choice.name} does not choose along the last axis")
    return _Router(choice, choice.args[0], value, name, modules).lowering()


class _Router:
    """One router while it is read."""

    def __init__(self, choice: fx.Node, scores: fx.Node, value: Value, name: str, modules: nn.Module) -> None:
        self.choice, self.value, self.name = choice, value, name
        self.modules = modules
        #: Nodes between the choice and the chosen experts, and before it those that limit it to groups.
        self.between: list[fx.Node] = []
        found = limited(scores, value)
        self.limit = None if found is None else found.limit
        self.limiting = () if found is None else found.nodes
        self.scores = scores if found is None else found.scores
        #: The view of the linear map's rows as [T, E], if the router reads that.
        self.flat: fx.Node | None = None
        self.root = self.linear()
        self.reader = RowReader(self.root, value, self.leaf(self.root), self.flat)

    def linear(self) -> fx.Node:
        """Return the nearest linear map above the scores whose result has their shape."""
        shape, seen, pending = self.value(self.scores).shape, set(), [self.scores]
        while pending:
            node = pending.pop(0)
            linear = self.is_linear(node)
            if linear and same(self.value(node).shape, shape):
                return node
            if self.flattens(node) and same(self.value(node).shape, shape):
                self.flat = node
                return node.all_input_nodes[0]
            new = [n for n in node.all_input_nodes if n not in seen and not linear]
            seen.update(new)
            pending += new
            if len(seen) > 64:
                break
        raise CannotLower("lower a router", found=f"no linear map gives the scores of {self.choice.name}")

    def is_linear(self, node: fx.Node) -> bool:
        return called(node) == "linear" or self.leaf(node) is not None

    def flattens(self, node: fx.Node) -> bool:
        """Whether a node takes the rows of a linear map as [T, E], and is all that reads them."""
        if called(node) not in ("reshape", "view", "flatten") or self.value(node).dim() != 2:
            return False
        source = node.all_input_nodes[0]
        only = self.is_linear(source) and sum(map(is_data, source.users)) == 1
        return only and same(self.value(source).shape[-1:], self.value(node).shape[-1:])

    def leaf(self, node: fx.Node) -> nn.Linear | None:
        """Return the linear module that a node calls, in graphs whose leaves are modules."""
        found = self.modules.get_submodule(str(node.target)) if node.op == "call_module" else None
        return found if isinstance(found, nn.Linear) else None

    def lowering(self) -> RouterLowering:
        index, k, values = self.chosen()
        reader = self.reader
        scores = reader.read(self.scores)
        reader.take_choice(index, k)
        if values is not None:
            reader.give(values, reader.b.step("pick", scores), "slot")
        reader.read_on()
        return self.finish(index, k, scores)

    def chosen(self) -> tuple[fx.Node, int, fx.Node | None]:
        """Return the node of the chosen experts, how many they are, and the node of their scores."""
        if called(self.choice) == "argmax":
            return self.choice, 1, None
        items: dict[int, fx.Node] = {}
        self.between = list(self.choice.users)
        for user in self.choice.users:
            which = {"values": 0, "indices": 1}.get(str(user.args[1]), user.args[1]) if len(user.args) > 1 else None
            if called(user) not in ("getitem", "getattr") or which not in (0, 1):
                raise CannotLower("lower a router", found=f"{user.name} reads {self.choice.name} in another way")
            if user.users:
                items[0 if which == 0 else 1] = user
        if called(self.choice) == "topk":
            largest = self.choice.kwargs.get("largest", self.choice.args[3] if len(self.choice.args) > 3 else True)
            k = self.choice.kwargs.get("k", self.choice.args[1] if len(self.choice.args) > 1 else None)
            if not largest or not isinstance(k, int) or 1 not in items:
                raise CannotLower("lower a router", found=f"{self.choice.name} takes the lowest, or no fixed number")
            return items[1], k, items.get(0)
        if not self.choice.kwargs.get("descending", False):
            raise CannotLower("lower a router", found=f"{self.choice.name} sorts upwards")
        cuts = {which: cut(item, self.between) for which, item in items.items()}
        if 1 not in cuts or len({k for _, k in cuts.values()}) != 1:
            raise CannotLower("lower a router", found=f"{self.choice.name} is not cut to the first k")
        node, k = cuts[1]
        return node, k, cuts[0][0] if 0 in cuts else None

    def finish(self, index: fx.Node, k: int, scores: Arg) -> RouterLowering:
        """Return what was read, with the outputs that others read."""
        reader = self.reader
        inside = {*reader.needed(self.scores), *self.limiting, *self.between, self.choice}
        leaving = [n for n in inside if n in reader.env and any(u not in inside and _reads(u) for u in n.users)]
        if not leaving and not index.users:
            raise CannotLower("lower a router", found=f"nothing reads what {self.choice.name} chooses")
        leaving.sort(key=list(self.root.graph.nodes).index)
        pairs = {n: (reader.kind(n), reader.env[n]) for n in leaving}
        results = list(dict.fromkeys(pair for pair in pairs.values() if pair[1] != "z0"))
        if any(kind not in ("slot", "wide") for kind, _ in results):
            raise CannotLower("lower a router", found="one value per token leaves it")
        steps, (by, *values) = reader.b.finish_all(scores, *(value for _, value in results))
        outputs = tuple((kind, value) for (kind, _), value in zip(results, values, strict=True))
        experts = int(self.value(self.root).shape[-1])
        kinds = tuple(reader.operands.values())
        whole = RowProgram(experts, steps, Choice(by, k, self.limit), kinds, outputs)
        program, kept = whole.pruned()
        reader.operands = {one: kind for i, (one, kind) in enumerate(reader.operands.items()) if i in kept}
        # The product itself is the last result.
        places = tuple((n, 1 + (results.index(p) if p in results else len(results))) for n, p in pairs.items())
        x, leaf = self.tokens(), self.leaf(self.root)
        weight = self.root.args[1] if leaf is None else None
        made = self.value(self.root).dtype
        spec = RouterSpec(
            program,
            int(self.value(x).shape[-1]),
            _dtype(self.value(x)),
            _dtype(self.value(weight) if leaf is None else leaf.weight),
            None if made == torch.float32 else _dtype(self.value(self.root)),
            keep=len(set(pairs.values())) > len(results),
        )
        return RouterLowering(
            self.name,
            spec,
            self.reads(x, weight, inside),
            index,
            places,
            tuple(sorted(inside - {index}, key=list(self.root.graph.nodes).index)),
            self.flat is not None,
        )

    def reads(self, x: fx.Node, weight: Any, inside: set[fx.Node]) -> tuple[tuple[fx.Node, int], ...]:
        """Return who reads the inputs of the kernel; nothing where a leaf module holds some of them."""
        if not isinstance(weight, fx.Node):
            return ()
        cast = self.root.args[0]
        assert isinstance(cast, fx.Node)
        holder = self.root if cast is x else cast
        found = [(holder, holder.all_input_nodes.index(x)), (self.root, self.root.all_input_nodes.index(weight))]
        for operand in self.reader.operands:
            assert isinstance(operand, fx.Node)
            user = next((u for u in operand.users if u in inside), next(iter(operand.users)))
            found.append((user, user.all_input_nodes.index(operand)))
        return tuple(found)

    def tokens(self) -> fx.Node:
        """Return what the linear map reads, before a cast to a wider dtype, which the kernel does by itself."""
        node = self.root.args[0]
        assert isinstance(node, fx.Node)
        source = node.args[0] if called(node) in _CASTS and node.args else None
        if isinstance(source, fx.Node) and isinstance(
            source.meta.get("val", source.meta.get("example_value")), torch.Tensor
        ):
            given, cast = self.value(source), self.value(node)
            if given.dtype in (torch.bfloat16, torch.float16, torch.float32) and cast.dtype == torch.float32:
                return source
        return node


def _is_no_noise(node: fx.Node) -> bool:
    return called(node) not in SHAPED_LIKE


def _reads(node: fx.Node) -> bool:
    """Whether a node computes with the values of what it reads."""
    return is_data(node) and _is_no_noise(node)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
