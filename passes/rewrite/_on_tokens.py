"""The part that all rewrites of blocks by token share: a router in front, what follows its tokens, a new output."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from moefx.graph import Graph
from moefx.graph.splice import Splice, is_inplace
from moefx.passes.analysis.local import local_sites
from moefx.passes.rewrite.base import BlockContext
from moefx.routing.tokens import follow, gather_tokens


@dataclass(frozen=True)
class Routed:
    """The values of a block that runs on some of its tokens.

    ``x`` [B, T, D] enters; ``index`` [B, C] and ``weights`` [B, T] come from the router; ``chosen`` [B, C, D] is what
    the block now reads, ``after`` [B, C, D] what it now returns. ``full`` says of what was cut what it was cut from.
    ``passes`` [B, C] comes from a router that reads taps: which of them do pass.
    """

    splice: Splice
    x: Node
    index: Node
    weights: Node
    chosen: Node
    after: Node
    full: Mapping[Node, Node]
    passes: Node | None = None

    def call(self, function: Callable[..., Any], *args: Any, around: Node | None = None) -> Node:
        """Insert a call, by default at the end of the block."""
        return self.splice.call_function(function, args, around=around or self.splice.graph.output_node)


def run_on_tokens(context: BlockContext, rule: str, child: str, count: int, taps: tuple[Node, ...] = ()) -> Routed:
    """Let the block read only the tokens that its future child ``child`` selects.

    Args:
        context: of the block; its graph is changed.
        rule: the pass.
        child: returns a `Selection` of the stream.
        count: C in the example run.
        taps: what else the child reads; it then returns a `TimedSelection`.
    """
    graph, layout, x = context.graph, context.layout, context.stream
    splice = Splice(graph, rule)
    first = next(n for n in graph.fx.nodes if n.op != "placeholder")
    users = list(x.users)
    value = x.meta["val"]
    with value.fake_mode:
        index_value = torch.empty((value.shape[0], count), dtype=torch.int64, device=value.device)
        weights_value = torch.empty(value.shape[:2], dtype=torch.float32, device=value.device)
    values = (index_value, weights_value, *(torch.empty_like(index_value, dtype=torch.bool) for _ in taps[:1]))
    selection = splice.call_module(child, (x, *taps), around=first, val=values)
    passes = splice.call_function(operator.getitem, (selection, 2), around=first) if taps else None
    index = splice.call_function(operator.getitem, (selection, 0), around=first)
    weights = splice.call_function(operator.getitem, (selection, 1), around=first)
    chosen = splice.call_function(gather_tokens, (x, index), around=first)
    for user in users:
        user.replace_input_with(x, chosen)
    before, full = {chosen: value}, {chosen: x}
    for item in layout.follows:
        node = context.node(item.node)
        readers = [context.node(item.user)] if item.user else list(node.users)
        around = readers[0] if item.user else first
        cut = splice.call_function(follow, (node, index, x, item.axes, item.ndim, item.joint), around=around)
        for reader in readers:
            reader.replace_input_with(node, cut)
        before[cut], full[cut] = node.meta["val"], node
    _reshape(graph, before)
    after = graph.output_node.args[0][layout.output]  # type: ignore[index]
    assert isinstance(after, Node)
    return Routed(splice, x, index, weights, chosen, after, full, passes)


@dataclass(frozen=True)
class Keys:
    """The keys and values of a block's attentions before its tokens were cut: cores, and what every node was like."""

    cores: tuple[tuple[Node, Node, Node], ...]
    values: dict[Node, Any]

    @staticmethod
    def of(graph: Graph) -> Keys:
        """Note them down in a graph that was not rewritten yet."""
        own = [s for s in local_sites(graph) if s.kind == "attention" and s.flavour in ("self", "joint")]
        cores = tuple((s.operands["core"], s.operands["k"], s.operands["v"]) for s in own)
        return Keys(cores, {node: node.meta.get("val") for node in graph.fx.nodes})

    def keep(self, routed: Routed) -> None:
        """Let the attentions of a rewritten block read keys and values of all tokens again: compute both once more."""
        fx = routed.splice.graph.fx
        order = [n for n in fx.nodes if n.op != "output"]
        cut = set(routed.full)
        for node in order:
            if cut & set(node.all_input_nodes):
                cut.add(node)
        for core, *operands in self.cores:
            needed = _ancestors(operands, order)
            copies = dict(routed.full)
            for node in order:
                if node in needed and node in cut and node not in copies:
                    made = routed.splice.copy(node, copies, around=core)
                    made.meta["val"] = self.values.get(node)
                    copies[node] = made
            for operand in operands:
                core.replace_input_with(operand, copies.get(operand, operand))


def _ancestors(nodes: Sequence[Node], order: Sequence[Node]) -> set[Node]:
    """Return what the nodes are computed from, writes into any of it included: those have no readers of their own."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
        if not stack:
            stack = [n for n in order if n not in seen and is_inplace(n) and n.args[0] in seen]
            seen.update(stack)
    return seen


def _reshape(graph: Graph, before: dict[Node, Any]) -> None:
    """Derive the example values of all that is computed from nodes whose values were as in ``before`` again."""
    mode = next(iter(before.values())).fake_mode
    for node in graph.fx.nodes:
        read = before.keys() & set(node.all_input_nodes)
        if node in before or not read or node.op == "output":
            continue
        before[node] = node.meta.get("val")
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        with mode, torch.no_grad():
            if node.op == "call_function":
                node.meta["val"] = node.target(*args, **kwargs)
            elif node.op == "call_method":
                node.meta["val"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:  # a child is not run again: it may remember what it saw
                sizes = dict(pair for n in read for pair in _changes(before[n], n.meta["val"]))
                node.meta["val"] = pytree.tree_map(functools.partial(_resized, sizes), before[node])


def _changes(old: Any, new: Any) -> list[tuple[int, int]]:
    return list(zip(old.shape[1:-1], new.shape[1:-1], strict=True)) if isinstance(old, torch.Tensor) else []


def _resized(sizes: dict[int, int], value: Any) -> Any:
    """Give the axes of tokens, wherever they are between batch and features, their new sizes."""
    if not isinstance(value, torch.Tensor) or value.ndim < 3:
        return value
    middle = [sizes.get(size, size) for size in value.shape[1:-1]]
    return value.new_empty((value.shape[0], *middle, value.shape[-1]))


def set_output(context: BlockContext, node: Node) -> None:
    """Let the block return ``node`` in the place of its stream."""
    output = context.graph.output_node
    leaves = list(output.args[0])  # type: ignore[arg-type]
    leaves[context.layout.output] = node
    output.args = (leaves,)
    context.graph.touch()
