"""Routed linear masks around whole blocks: what a block reads depends on the timestep (Switch-DiT, arXiv 2403.09176).

``m = 1 + Σ_j p_j (W_e x + b_e)``; the block runs on x ⊙ m, and (1 − m) ⊙ x is added to its output. Exact at the start
for every router: the experts are zero.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import BlockContext, BlockPass, Contract, Costs, Edit, Options, register_pass
from moefx.routing.masks import LinearExperts, StreamMask, complement, masked
from moefx.routing.moe import RoutedFFN
from moefx.routing.scorers import LinearScorer, Router

CHILD = "stream_mask"
TIMESTEP_WIDTH = 256


class LinearMaskOptions(Options):
    """Options of :class:`LinearMask`."""

    experts: int = Field(3, ge=1, le=65536, description="number of mask experts E")
    top_k: int = Field(2, ge=1, description="experts per sample K")
    router_std: float = Field(0.02, ge=0, description="standard deviation of the router")
    timesteps: float = Field(1000.0, gt=0, description="raw timesteps are in [0, this); 1 if they are sigma")
    every: int = Field(1, ge=1, description="rewrite every n-th matching block")


@register_pass
class LinearMask(BlockPass):
    """Mask what a block reads by experts of the timestep."""

    name = "linear-mask"
    summary = "block -> the same on x * (1 + routed linear experts), complement added back; exact at the start"
    site_kind: ClassVar[Kind] = "block"
    requires = frozenset({"block-sites"})
    provides = frozenset({"masked-blocks"})
    preserves = frozenset({"ffn-sites", "attention-sites"})
    Options = LinearMaskOptions
    options: LinearMaskOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep."""
        return ("timestep",)

    def refusal(self, site: Site) -> str:
        """Return why this block cannot be masked."""
        if site.dead:
            return "its result feeds nothing that is returned"
        if not site.region_is_module:
            return "it is no module of its own"
        if len(site.shapes["x"]) != 3:
            return f"its stream has shape {tuple(site.shapes['x'])}, not [batch, tokens, width]"
        return ""

    def contract(self) -> Contract:
        """Exact: the mask is one."""
        return Contract("exact", 0.0, "experts that are zero make a mask of ones")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the experts' parameters and multiply-adds per token."""
        o, width = self.options, int(site.shapes["x"][-1])
        router = o.experts * ((tap_width or TIMESTEP_WIDTH) + 1)
        return Costs(0, o.experts * width * (width + 1) + router, 0, o.top_k * width * width + router)

    def edit(self, context: BlockContext) -> Edit:
        """Put the mask in front of the block and add the complement at its end."""
        graph, x, tap = context.graph, context.stream, context.taps["timestep"]
        mask_module = self._mask(context, tap)
        splice = Splice(graph, self.name)
        order = {node: i for i, node in enumerate(graph.fx.nodes)}
        users = [user for user in x.users if order[user] > order[tap] or tap.op == "placeholder"]
        first = max((tap, x), key=order.__getitem__).next
        while first.op == "placeholder":
            first = first.next
        mask = splice.call_module(CHILD, (x, tap), around=first, val=x.meta["val"])
        read = splice.call_function(masked, (x, mask), around=first)
        for user in users:
            user.replace_input_with(x, read)
        outputs = graph.output_node.args[0]
        after = outputs[context.layout.output]  # type: ignore[index]
        assert isinstance(after, Node)
        total = splice.call_function(complement, (after, x, mask), around=graph.output_node)
        graph.output_node.replace_input_with(after, total)
        return Edit(routed=mask_module, children={CHILD: mask_module})

    def _mask(self, context: BlockContext, tap: Node) -> StreamMask:
        o, value = self.options, context.stream.meta["val"]
        raw = tap.meta["val"].ndim <= 1
        width = TIMESTEP_WIDTH if raw else int(tap.meta["val"].shape[-1])
        draws = context.generator("router")
        scorer = LinearScorer(width, o.experts, bias=True, before="silu", std=o.router_std, generator=draws)
        embed = {"timestep": width} if raw else {}
        router = Router(scorer, ("timestep",), embed=embed, timestep_scale=1000.0 / o.timesteps)
        parameter = next(context.graph.root.parameters())
        like = torch.empty(0, dtype=value.dtype, device=parameter.device)
        experts = LinearExperts(int(value.shape[-1]), o.experts, like=like)
        routed = RoutedFFN(router.to(like.device), experts, top_k=o.top_k, mode="softmax_topk", coefficients={})
        return StreamMask(routed).train(context.graph.root.training)
