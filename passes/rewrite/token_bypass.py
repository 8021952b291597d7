"""Token bypass: a switch per token decides whether it passes the block's feed-forward network.

Source: DyDiT, arXiv 2410.03456, its spatial half. Attention runs on all tokens. At its start every switch is on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from moefx.graph.splice import Splice
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.analysis.tokens import Branch, TokenLayout
from moefx.passes.rewrite.base import BlockContext, BlockPass, Contract, Costs, Edit, Options, register_pass
from moefx.passes.rewrite.dense import dense_weights, hidden_function, unshare
from moefx.routing.bypass import BypassedFFN, TokenSelect, TokenSwitch
from moefx.routing.weights import FFNWeights


class TokenBypassOptions(Options):
    """Options of :class:`TokenBypass`."""

    budget: float | None = Field(0.5, gt=0, le=1, description="target share of the block's compute; None: no budget")
    warm_up: float = Field(0.0, ge=0, le=1, description="fraction of the training in which the target falls from 1")
    temperature: float = Field(5.0, gt=0, description="temperature of the switch in training")
    minimum: float = Field(0.1, ge=0, le=1, description="share of tokens below which a layer is penalised")
    router_hidden: int | None = Field(None, ge=1, description="hidden width of the router; None: D/16")
    router_start: float = Field(35.0, description="bias of the router at the start; +35: every token is on")
    losses: dict[str, float] = Field({"budget": 2.0, "minimum": 2.0}, description="coefficients of the terms")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching block")


@register_pass
class TokenBypass(BlockPass):
    """Let a switch per token decide about the feed-forward network."""

    name = "token-bypass"
    summary = "block -> a switch per token in front of its FFN; exact at its start"
    site_kind: ClassVar[Kind] = "block"
    requires = frozenset({"block-sites", "ffn-sites"})
    provides = frozenset({"routed-tokens"})
    preserves = frozenset({"attention-sites", "block-sites"})
    Options = TokenBypassOptions
    options: TokenBypassOptions

    def refusal(self, site: Site) -> str:
        """Return why the tokens of this block cannot be switched."""
        if site.dead:
            return "its result feeds nothing that is returned"
        if not site.region_is_module:
            return "it is no module of its own"
        return ""

    def layout_refusal(self, layout: TokenLayout) -> str:
        """Return why there is no feed-forward network to switch."""
        if not layout.ffns:
            return "its feed-forward network is no module of its own"
        nested = next((b.module for b in layout.ffns if "." in b.module), "")
        return f"its feed-forward network {nested!r} lies deeper in the block" if nested else ""

    def contract(self) -> Contract:
        """Exact while every switch is on."""
        if self.options.router_start >= 35:
            return Contract("exact", 0.0, "every switch is on")
        return Contract("approximate", self.options.max_error, "tokens may be switched off")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the router's cost; what the switches save is learnt, and planned as the budget."""
        width = int(site.shapes["x"][-1])
        hidden = self.options.router_hidden or max(1, width // 16)
        router = hidden * (width + 1)
        return Costs(0, router + hidden + 1, 0, router, saved_fraction=1 - (self.options.budget or 1.0))

    def edit(self, context: BlockContext) -> Edit:
        """Replace the feed-forward networks of the stream."""
        children: dict[str, nn.Module | None] = {}
        splice = Splice(context.graph, self.name)
        for branch in context.layout.ffns:
            node = context.node(branch.node)
            children[branch.module] = self._bypassed(context, branch)
            stream = context.node(branch.stream)
            new = splice.call_module(branch.module, (node.args[0], stream), around=node, val=node.meta["val"])
            splice.replace(node, new)
        return Edit(routed=nn.ModuleDict({k: v for k, v in children.items() if v is not None}), children=children)

    def _bypassed(self, context: BlockContext, branch: Branch) -> nn.Module:
        o = self.options
        graph, site = context.ffn(branch)
        dense = dense_weights(site, graph)
        macs = _macs(dense)
        width, tokens = int(context.stream.meta["val"].shape[-1]), int(context.stream.meta["val"].shape[1])
        fixed = _attention_macs(width, tokens) / (_attention_macs(width, tokens) + macs)
        router = TokenSelect(
            width,
            o.router_hidden,
            start=o.router_start,
            generator=context.generator("switch"),
            device=dense.w_in.device,
        )
        switch = TokenSwitch(
            router,
            fixed=fixed,
            minimum=o.minimum,
            temperature=o.temperature,
            target=o.budget,
            warmup=o.warm_up,
            cost=float(macs / (1 - fixed)),
            device=dense.w_in.device,
        )
        switch.record.coefficients = dict(o.losses)
        routed = BypassedFFN(switch, dense, hidden_function(site))
        return unshare(routed, graph.root).train(context.graph.root.training)


def _macs(dense: FFNWeights) -> int:
    """Return the multiply-adds of the feed-forward network per token."""
    weights: list[Any] = [dense.w_in, dense.w_gate, dense.w_out]
    return sum(w.numel() for w in weights if isinstance(w, torch.Tensor))


def _attention_macs(width: int, tokens: int) -> int:
    """Return those of a self-attention of that width: four projections, scores and their use."""
    return 4 * width * width + 2 * tokens * width
