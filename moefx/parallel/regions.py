"""Where a traced graph runs routed experts: from the sort of the slots by expert to the weighted sum.

Legend: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from moefx.errors import PlanError
from moefx.graph import Graph
from moefx.graph.origin import origin_of, show_source

_GROUP = torch.ops.moefx.group.default
_COMBINE = torch.ops.moefx.combine.default
GROUPED = torch.ops.moefx.grouped_linear.default


@dataclass(frozen=True, eq=False)
class Region:
    """The routed experts of one layer in a graph.

    Args:
        path: of the experts' module.
        layer: index in the placement.
        x: tokens ``[T, D]``.
        experts: chosen experts ``[T, K]``.
        gates: ``[T, K]``.
        group: the sort.
        order: its first result.
        offsets: its second.
        combine: the weighted sum ``[T, D_o]``.
        body: what lies between, in program order.
        weights: stacked parameters that the body reads, by node.
    """

    path: str
    layer: int
    x: Node
    experts: Node
    gates: Node
    group: Node
    order: Node
    offsets: Node
    combine: Node
    body: tuple[Node, ...]
    weights: tuple[Node, ...]


def find_regions(graph: Graph, paths: Sequence[str]) -> list[Region]:
    """Return the regions of these modules of experts, in the order of ``paths``.

    Raises:
        PlanError: the graph does not run each of them once, or not as tokens that are sorted by expert.
    """
    found: dict[str, list[Region]] = {}
    for node in graph.nodes:
        if node.target is _GROUP and origin_of(node).path in set(paths):
            region = _region(graph, node, paths)
            found.setdefault(region.path, []).append(region)
    for path in paths:
        times = len(found.get(path, ()))
        if times != 1:
            raise PlanError(
                f"divide {path} in the graph of {type(graph.root).__name__}",
                found=f"its tokens are sorted by expert {times} times in one forward pass, not once",
                do="call moefx.parallelize alone, which needs no graph, or leave this layer dense (skip=...)",
            )
    return [found[path][0] for path in paths]


def _region(graph: Graph, group: Node, paths: Sequence[str]) -> Region:
    path = origin_of(group).path
    items = {u.args[1]: u for u in group.users if u.target is operator.getitem}
    order, offsets = items[0], items[1]
    sums = [u for u in order.users if u.target is _COMBINE and u.args[1] is order]
    combine = sums[0] if len(sums) == 1 else None
    if combine is None or not isinstance(combine.args[0], Node):
        raise _strange(group, f"{len(sums)} weighted sums of its rows")
    inside = _between((order, offsets), combine.args[0])
    body = tuple(node for node in graph.nodes if node in inside)
    firsts = [n for n in body if n.target is GROUPED and n.args[3] is order]
    tokens = {n.args[0] for n in firsts}
    x = tokens.pop() if len(tokens) == 1 else None
    experts, gates = group.args[0], combine.args[2]
    if not (isinstance(x, Node) and isinstance(experts, Node) and isinstance(gates, Node)):
        raise _strange(group, "products that read other tensors than the tokens")
    count = int(str(group.args[1]))
    weights = tuple(_weights(body, path, count))
    _check_closed(group, body, {x, order, offsets, combine, *weights}, combine)
    return Region(path, list(paths).index(path), x, experts, gates, group, order, offsets, combine, body, weights)


def _between(starts: Collection[Node], end: Node) -> set[Node]:
    """Return the nodes on a way from ``starts`` to ``end``, ``end`` included."""
    after: set[Node] = set()
    stack = list(starts)
    while stack:
        for user in stack.pop().users:
            if user not in after:
                after.add(user)
                stack.append(user)
    inside: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in after and node not in inside:
            inside.add(node)
            stack += node.all_input_nodes
    return inside


def _weights(body: Sequence[Node], path: str, count: int) -> list[Node]:
    """Return the stacked parameters of the experts that the body reads, by the shapes they were traced with."""
    read = dict.fromkeys(a for node in body for a in node.all_input_nodes if a.op == "get_attr")
    found = []
    for node in read:
        shape = node.meta["val"].shape
        stacked = str(node.target).startswith(f"{path}.") and shape[:1] == (count,)
        found += [node] if stacked else []
    return found


def _check_closed(group: Node, body: Sequence[Node], known: set[Node], combine: Node) -> None:
    inside = set(body)
    for node in body:
        users = [u for u in node.users if u not in inside and u is not combine]
        if users:
            raise _strange(group, f"{node.name} inside it is also used by {users[0].name}")
        for read in node.all_input_nodes:
            tensor = isinstance(read.meta.get("val"), torch.Tensor) and read.meta["val"].ndim > 0
            if tensor and read not in inside | known and read.op != "get_attr":
                raise _strange(group, f"{node.name} inside it reads {read.name}, which is neither rows nor weights")


def _strange(group: Node, found: str) -> PlanError:
    where = show_source(origin_of(group).source)
    return PlanError(
        f"divide the experts of {origin_of(group).path}",
        found=f"{found} (at {where})",
        do="call moefx.parallelize alone, which needs no graph",
    )
