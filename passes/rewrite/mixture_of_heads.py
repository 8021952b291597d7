"""Mixture of heads: a gate for every token and attention head, in front of the output projection.

Source: MoH, arXiv 2410.11842, with the scale factors of the released code. At its start (zero routers, all heads
active) every gate is exactly 1 and the attention is the dense one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import Context, Contract, Costs, Edit, Options, SitePass, register_pass
from moefx.routing.heads import HeadGate, apply_head_gates

CHILD = "head_gate"


class MixtureOfHeadsOptions(Options):
    """Options of :class:`MixtureOfHeads`."""

    shared_heads: int = Field(0, ge=0, description="heads that are always on")
    active_heads: int | None = Field(None, ge=0, description="routed heads per token; None: all, the exact start")
    router_std: float = Field(0.0, ge=0, description="standard deviation of the routers; 0: gates of exactly 1")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")

    @model_validator(mode="after")
    def _some_head(self) -> MixtureOfHeadsOptions:
        if self.shared_heads == 0 and self.active_heads == 0:
            raise ValueError("no head is active: shared_heads and active_heads are both 0")
        return self


@register_pass
class MixtureOfHeads(SitePass):
    """Gate the heads of an attention."""

    name = "mixture-of-heads"
    summary = "attention -> a gate per token and head before the output projection; exact at zero routers and all heads"
    site_kind: ClassVar[Kind] = "attention"
    requires = frozenset({"attention-sites"})
    provides = frozenset({"routed-heads"})
    preserves = frozenset({"ffn-sites", "block-sites"})
    Options = MixtureOfHeadsOptions
    options: MixtureOfHeadsOptions

    def refusal(self, site: Site) -> str:
        """Return why the heads of this attention cannot be gated."""
        o = self.options
        if site.dead:
            return "its result feeds nothing that is returned"
        if not _gated_streams(site):
            return "no output projection reads the heads, so gates have no place"
        for stream in _gated_streams(site):
            pre = stream.out.pre.meta["val"]
            if pre.ndim != 3 or stream.x.meta["val"].ndim != 3 or pre.shape[:2] != stream.x.meta["val"].shape[:2]:
                return "queries and outputs are not one row per token"
            if pre.shape[-1] % int(site.shapes["head_dim"]):
                return f"its output has {pre.shape[-1]} features, which are no heads of {site.shapes['head_dim']}"
        heads = _heads(site)
        if o.shared_heads + (o.active_heads or 0) > heads or o.shared_heads > heads:
            return f"{o.shared_heads} shared and {o.active_heads} routed heads of only {heads}"
        return ""

    def contract(self) -> Contract:
        """Exact at the identity start."""
        if self.options.active_heads is None and self.options.router_std == 0:
            return Contract("exact", 0.0, "zero routers and all heads active: every gate is 1")
        return Contract("approximate", self.options.max_error, "heads are dropped or weighted")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the gates' parameters and multiply-adds per token; heads that are off save nothing until lowered."""
        o, heads = self.options, _heads(site)
        width = int(site.shapes["x"][-1])
        routed = heads - o.shared_heads
        gate = width * (heads + (2 if o.shared_heads and routed else 0)) * len(_gated_streams(site))
        return Costs(0, gate, 0, gate)

    def edit(self, context: Context) -> Edit:
        """Insert the gates into the local graph."""
        splice = Splice(context.graph, self.name)
        children: dict[str, nn.Module | None] = {}
        for i, stream in enumerate(_gated_streams(context.site)):
            name = context.free_name(CHILD, children)
            gate = self._gate(context, stream, i)
            children[name] = gate.train(context.graph.root.training)
            self._insert(splice, stream, name, gate)
        return Edit(routed=nn.ModuleDict({k: v for k, v in children.items() if v is not None}), children=children)

    def _gate(self, context: Context, stream: Any, index: int) -> HeadGate:
        o = self.options
        return HeadGate(
            int(stream.x.meta["val"].shape[-1]),
            _heads(context.site),
            shared=o.shared_heads,
            top_k=o.active_heads,
            std=o.router_std,
            generator=context.generator(f"heads{index}"),
            device=next(context.graph.root.parameters()).device,
        )

    def _insert(self, splice: Splice, stream: Any, name: str, gate: HeadGate) -> None:
        pre: Node = stream.out.pre
        around = stream.out.node if pre in stream.out.node.all_input_nodes else _reader(pre, stream.out.node)
        value = pre.meta["val"]
        with value.fake_mode:
            gates_value = torch.empty((*value.shape[:-1], gate.num_heads), dtype=torch.float32, device=value.device)
        gates = splice.call_module(name, (stream.x,), around=around, val=gates_value)
        gated = splice.call_function(apply_head_gates, (pre, gates), around=around)
        around.replace_input_with(pre, gated)


def _heads(site: Site) -> int:
    """Count the heads of the output: under grouped queries they outnumber those of keys and values."""
    return int(_gated_streams(site)[0].out.pre.meta["val"].shape[-1]) // int(site.shapes["head_dim"])


def _gated_streams(site: Site) -> list[Any]:
    return [s for s in site.operands["streams"] if s.out is not None and s.q is not None]


def _reader(pre: Node, projection: Node) -> Node:
    """Return the node between ``pre`` and a shared projection that reads ``pre``: the concatenation."""
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
