"""Routers that are no kernel: what of the graph decides instead, for who reads a dump.

Some layers have no scores to rank (an interval of timesteps picks the expert), some rank tokens against each other, and
some have no routed operator at all, since their choice is a mask or a mixture of weights. Each is said by name.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from moefx.codegen.calls import is_data, recorded
from moefx.codegen.findings import Found, Refusal
from moefx.codegen.tail import called
from moefx.routing.record import RoutingRecord

#: The operators by which a choice enters a computation that skips nothing.
_WAYS = (
    "where",
    "masked_fill",
    "mul",
    "einsum",
    "bmm",
    "matmul",
    "tensordot",
    "scaled_dot_product_attention",
    "linear",
)

_RANKINGS = frozenset({"sort", "topk", "argmax"})
_CONSTANT = frozenset({"zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "arange", "tensor"})


def given_experts(group: fx.Node) -> str | None:
    """Return why the experts of a grouping have no router kernel, if no ranking of scores led to them."""
    seen, pending, made = {group}, list(group.all_input_nodes), []
    while pending:
        node = pending.pop()
        if called(node) in _RANKINGS:
            return None
        if node in seen or not is_data(node) or not _is_whole(node):
            continue
        seen.add(node)
        if called(node) in _CONSTANT:
            made.append(f"{called(node)}, a constant")
            continue
        numbers = [one.name for one in node.all_input_nodes if is_data(one) and not _is_whole(one)]
        made += [f"{called(node)} of {' and '.join(numbers)}"] if numbers else []
        pending += node.all_input_nodes
    return f"no scores are ranked: its experts follow from {'; '.join(made[::-1]) or 'whole numbers of the inputs'}"


def _is_whole(node: fx.Node) -> bool:
    """Whether a node holds whole numbers or truth values, or several tensors."""
    made = recorded(node)
    return not isinstance(made, torch.Tensor) or not made.is_floating_point()


def silent_layers(graph: fx.Graph, root: nn.Module, found: Iterable[Found]) -> list[Refusal]:
    """Return the routed layers of a traced model that nothing was found in, each with what its choice enters."""
    names = [item.name for item in found]
    owners = [path.rpartition(".")[0] for path, one in root.named_modules() if isinstance(one, RoutingRecord)]
    refused = []
    for owner in owners:
        nodes = [node for node in graph.nodes if _is_within(_path(node), owner) and is_data(node)]
        if nodes and not any(_is_within(name, owner) for name in names):
            ways = dict.fromkeys(called(node) for node in nodes if called(node) in _WAYS)
            ranks = any(called(node) in _RANKINGS for node in nodes)
            none = "reads its ranking" if ranks else "and no ranking of scores stands in it"
            how = f"torch's own compute it: {', '.join(ways) or called(nodes[-1])}"
            refused.append(Refusal(owner, nodes[0], f"no operator of the dialect {none}; {how}", "router"))
    return refused


def _path(node: fx.Node) -> str:
    return str(getattr(node.meta.get("moefx"), "path", ""))


def _is_within(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")
