"""What rewrites of attentions share: their token streams, their heads, and gates before the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.attention import Stream
from moefx.passes.analysis.operands import Part
from moefx.passes.analysis.site import Site
from moefx.routing.heads import apply_head_gates


def output_streams(site: Site) -> list[Stream]:
    """Return the token streams that have queries and an output projection."""
    return [s for s in site.operands["streams"] if s.out is not None and s.q is not None]


def count_heads(site: Site) -> int:
    """Count the heads of the output: under grouped queries they outnumber those of keys and values."""
    out = output_streams(site)[0].out
    assert out is not None
    return int(out.pre.meta["val"].shape[-1]) // int(site.shapes["head_dim"])


def refuse_heads(site: Site) -> str:
    """Return why the heads of an attention cannot be told apart before its output projections; ``""`` if they can."""
    if site.dead:
        return "its result feeds nothing that is returned"
    if not output_streams(site):
        return "no output projection reads the heads, so gates have no place"
    for stream in output_streams(site):
        assert stream.out is not None
        pre, x = stream.out.pre.meta["val"], stream.x.meta["val"]
        if pre.ndim != 3 or x.ndim != 3 or pre.shape[:2] != x.shape[:2]:
            return "queries and outputs are not one row per token"
        if pre.shape[-1] % int(site.shapes["head_dim"]):
            return f"its output has {pre.shape[-1]} features, which are no heads of {site.shapes['head_dim']}"
    return ""


def reader(stream: Stream) -> Node:
    """Return the node that reads a stream's heads: its output projection, or the concatenation in front of it."""
    assert stream.out is not None
    pre, projection = stream.out.pre, stream.out.node
    if pre in projection.all_input_nodes:
        return projection
    return next(user for user in pre.users if _leads_to(user, projection))


def _leads_to(node: Node, target: Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at is target:
            return True
        if at not in seen:
            seen.add(at)
            stack.extend(at.users)
    return False


def gates_of(splice: Splice, name: str, arguments: Sequence[Node], heads: int, *, around: Node) -> Node:
    """Insert a call of the gate module ``name`` before ``around``; per token if its first argument has tokens."""
    value = arguments[0].meta["val"]
    tokens = value.shape[:2]
    with value.fake_mode:
        gates = torch.empty((*tokens, heads), dtype=torch.float32, device=value.device)
    return splice.call_module(name, tuple(arguments), around=around, val=gates)


def multiply_heads(splice: Splice, stream: Stream, gates: Node) -> None:
    """Multiply a stream's heads by ``gates`` in front of the output projection."""
    assert stream.out is not None
    around, pre = reader(stream), stream.out.pre
    gated = splice.call_function(apply_head_gates, (pre, gates), around=around)
    around.replace_input_with(pre, gated)


# -- queries -----------------------------------------------------------------------------------------------------------


def refuse_queries(site: Site) -> str:
    """Return why the queries of a site cannot be read head by head; ``""`` if they can."""
    for stream in output_streams(site):
        assert stream.q is not None
        dims, rows = stream.q.lane.dims, stream.q.lane.flat()
        value = stream.q.value.meta["val"]
        if value.ndim - len(dims) != 2 or 0 in dims:
            return "its queries are not one row per sample and token"
        if not bool(np.all(np.diff(rows) > 0)) or len(rows) != count_heads(site) * int(site.shapes["head_dim"]):
            return "its queries are not one block of features per head"
    return ""


def split_heads(splice: Splice, query: Part, heads: int, *, around: Node) -> Node:
    """Insert the queries of one stream as ``[B, T, H, d]``, as they leave the projection."""
    return splice.call_function(by_head, (query.value, tuple(query.lane.dims), heads), around=around)


def by_head(value: Tensor, dims: tuple[int, ...], heads: int) -> Tensor:
    """Bring features that lie along ``dims`` to the end, and split them into heads: ``[B, T, H, d]``."""
    moved = value.movedim(dims, tuple(range(-len(dims), 0)))
    return moved.reshape(*moved.shape[:2], heads, -1)


def first_node(nodes: Sequence[Node]) -> Node:
    """Return the node that comes first in program order."""
    order: dict[Any, int] = {node: i for i, node in enumerate(nodes[0].graph.nodes)}
    return min(nodes, key=order.__getitem__)
