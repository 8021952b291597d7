"""What rewrites of attentions share: their token streams, their heads, and gates before the output projection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from moefx.graph.kinds import MOVES, op
from moefx.graph.splice import Splice, is_inplace
from moefx.passes.analysis.attention import Stream
from moefx.passes.analysis.operands import Part
from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context
from moefx.routing.heads import apply_head_gates, attend_with_heads

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def output_streams(site: Site) -> list[Stream]:
    """Return the token streams that have queries and an output projection."""
    return [s for s in site.operands["streams"] if s.out is not None and s.q is not None]


def count_heads(site: Site) -> int:
    """Count the heads of the output: under grouped queries they outnumber those of keys and values."""
    out = output_streams(site)[0].out
    assert out is not None
    return int(out.pre.meta["val"].shape[-1]) // int(site.shapes["head_dim"])


def attention_macs(site: Site) -> tuple[float, float]:
    """Return the multiply-adds of an attention in the example run: what its queries need, and its keys and values.

    The former are their projection, scores, weighted sums and the output projection, over all token streams.
    """
    query, key = site.operands["q"].meta["val"], site.operands["k"].meta["val"]
    keys = float(key.numel()) / (int(query.shape[0]) * int(site.shapes["kv_heads"]) * int(site.shapes["head_dim"]))
    by_query, by_key = 2.0 * float(query.numel()) * keys, 0.0
    for stream in site.operands["streams"]:
        rows = float(stream.x.meta["val"].numel())
        by_query += rows * stream.q.width if stream.q is not None else 0.0
        by_key += rows * sum(part.width for part in (stream.k, stream.v) if part is not None)
        if stream.out is not None:
            by_query += float(stream.out.pre.meta["val"].numel()) * int(stream.out.node.meta["val"].shape[-1])
    return by_query, by_key


def tokens_of(site: Site) -> int:
    """Return how many tokens of the main stream enter an attention in the example run."""
    value = site.operands["x"].meta["val"]
    return int(value.numel()) // int(value.shape[-1])


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


# -- the attention itself ----------------------------------------------------------------------------------------------


def core_call(core: Node) -> dict[str, Any]:
    """Return the arguments of a call of ``scaled_dot_product_attention`` by name."""
    return dict(zip(_PARAMETERS, core.args, strict=False)) | dict(core.kwargs)


def refuse_core(site: Site) -> str:
    """Return why an attention core cannot be called otherwise; ``""`` if it is one plain fused call."""
    core: Node = site.operands["core"]
    named = getattr(core.target, "__name__", "") == "scaled_dot_product_attention"
    if site.operands["core_kind"] != "sdpa" or core.op != "call_function" or not named:
        return f"its attention is written as {site.operands['core_kind']}, not one fused call"
    call = core_call(core)
    if call.get("attn_mask") is not None or call.get("is_causal") or call.get("dropout_p"):
        return "it has a mask or dropout of its own"
    if len(site.operands["q"].meta["val"].shape) != 4:
        return "its queries are not [batch, heads, tokens, width]"
    return ""


def gates_fit_core(context: Context) -> bool:
    """Whether gates may multiply the heads where they are made: nothing but movement lies before the projections."""
    site = context.site
    streams = output_streams(site)
    query, key = site.operands["q"].meta["val"], site.operands["k"].meta["val"]
    if refuse_core(site) or [s for s in site.operands["streams"] if s.q is not None] != streams:
        return False
    if query.shape[1] != key.shape[1] or sum(int(s.x.meta["val"].shape[1]) for s in streams) != query.shape[2]:
        return False
    moved = between([site.operands["core"]], [s.out.pre for s in streams if s.out is not None])
    return all(op(node, context.graph).kind in MOVES | {"size", "item"} for node in moved)


def gate_core(splice: Splice, site: Site, gates: Sequence[Node]) -> None:
    """Let the attention leave out the heads whose gate is zero; ``gates`` of the streams, in token order."""
    core: Node = site.operands["core"]
    call = core_call(core)
    whole = gates[0] if len(gates) == 1 else splice.call_function(torch.cat, (tuple(gates), 1), around=core)
    arguments = (call["query"], call["key"], call["value"], whole, call.get("scale"))
    splice.replace(core, splice.call_function(attend_with_heads, arguments, around=core))


def between(starts: list[Node], ends: list[Node]) -> list[Node]:
    """Return the nodes on the way from ``starts`` to ``ends``, in-place writes into them included, in program order."""
    after = _closure(starts, lambda node: node.users)
    wanted = list(ends)
    while True:
        found = after & _closure(wanted, lambda node: node.all_input_nodes)
        writes = [n for n in after - found if is_inplace(n) and n.args and n.args[0] in found]
        if not writes:
            return [node for node in ends[0].graph.nodes if node in found and node not in starts]
        wanted += writes


def _closure(nodes: list[Node], neighbours: object) -> set[Node]:
    seen, stack = set(nodes), list(nodes)
    while stack:
        near: Iterable[Node] = neighbours(stack.pop())  # type: ignore[operator]
        for node in near:
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


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
    rows = value.movedim(dims, tuple(range(-len(dims), 0))).flatten(2)
    return rows.reshape(*rows.shape[:2], heads, rows.shape[-1] // heads)  # no -1: there may be no words


def first_node(nodes: Sequence[Node]) -> Node:
    """Return the node that comes first in program order."""
    order: dict[Any, int] = {node: i for i, node in enumerate(nodes[0].graph.nodes)}
    return min(nodes, key=order.__getitem__)
