"""Wiring a routed FFN into a forward where the dense one is not a module of its own.

``out = down(act(up(x)))`` becomes ``out = moe(x)``; where the second projection is shared with something else, as in
single-stream blocks (``out = down(cat(attention, act(up(x))))``), its other columns and its bias stay a projection:
``out = down'(attention) + moe(x)``. The cut by columns is exact.
"""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.site import Site, Weight
from moefx.passes.rewrite.base import Context

CHILD = "moe"


def cannot_cut(site: Site) -> str:
    """Return why an inline FFN cannot be cut out of its forward; ``""`` if it can."""
    last = len(site.shapes["x"]) - 1
    if mixes_tokens(site):
        known = {*site.nodes, site.operands["x"]}
        if any(source not in known for node in site.nodes for source in node.all_input_nodes):
            return "it also reads values from around it"
    elif site.shapes["axis"] != last:
        return "its channels are not the last dimension, and it is no module of its own"
    if site.escapes():
        return "one of its projections also feeds something else"
    if site.operands.get("rest") and site.output.op != "call_module":
        return "its shared output projection is not a module"
    return ""


def mixes_tokens(site: Site) -> bool:
    """Tell whether a depthwise convolution lies between the projections."""
    return any(name.startswith("w_depth") for name in site.operands)


def extract(context: Context) -> GraphModule:
    """Return the region of an inline site as a module of its own, sharing the parameters."""
    site, fx = context.site, Graph()
    made: dict[Node, Node] = {site.operands["x"]: fx.placeholder("x")}
    for node in site.nodes:
        made[node] = fx.node_copy(node, made.__getitem__)
        made[node].meta.clear()
    fx.output(made[site.output])
    return GraphModule(context.graph.root, fx)


def splice_ffn(context: Context, rule: str, routed: nn.Module) -> dict[str, nn.Module | None]:
    """Let the local graph call ``routed`` instead of the dense FFN; return the children it now needs."""
    site, splice = context.site, Splice(context.graph, rule)
    down, name = site.output, context.free_name(CHILD)
    arguments = (site.operands["x"], *context.taps.values())
    moe = splice.call_module(name, arguments, around=down, val=down.meta["val"])
    children: dict[str, nn.Module | None] = {name: routed}
    rest = site.operands.get("rest", ())
    if not rest:
        splice.replace(down, moe, site.nodes)
        return children
    parts = [part for part, _ in rest]
    source = parts[0] if len(parts) == 1 else splice.call_function(torch.cat, (parts, -1), around=down)
    target = str(down.target)
    kept = splice.call_module(target, (source,), around=down, val=down.meta["val"])
    total = splice.call_function(operator.add, (kept, moe), around=down)
    splice.replace(down, total, site.nodes)
    children[target] = _kept_projection(context, [weight for _, weight in rest])
    return children


def _kept_projection(context: Context, columns: list[Weight]) -> nn.Linear:
    """Return the columns of the shared projection that do not belong to the FFN, with its bias."""
    weight = torch.cat([w.tensor(context.graph).detach() for w in columns], dim=-1)
    bias = context.site.operands.get("b_out")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if isinstance(bias, Weight):
        linear.bias = nn.Parameter(bias.tensor(context.graph).detach().clone())
    return linear.train(context.graph.root.training)
