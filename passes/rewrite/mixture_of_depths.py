"""Mixture of depths: a block runs on the tokens that need it, the others pass by.

Source: Mixture-of-Depths, arXiv 2404.02258, per sample and without the causal predictor, which bidirectional models do
not need. At capacity 1 and its start every token passes with weight 1: the block is the dense one to the bit.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import (
    BlockContext,
    BlockPass,
    Contract,
    Costs,
    Edit,
    Forward,
    Options,
    register_pass,
)
from moefx.routing.depths import TokenRouter

CHILD = "token_router"


class MixtureOfDepthsOptions(Options):
    """Options of :class:`MixtureOfDepths`."""

    capacity: float = Field(1.0, gt=0, le=1, description="fraction of the tokens that pass a block; 1: the exact start")
    router_std: float = Field(0.0, ge=0, description="standard deviation of the router; 0: every weight is 1")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching block (2 in the paper)")


@register_pass
class MixtureOfDepths(BlockPass):
    """Let a router choose the tokens that pass a block."""

    name = "mixture-of-depths"
    summary = "block -> runs on its best tokens only; exact at capacity 1"
    site_kind: ClassVar[Kind] = "block"
    requires = frozenset({"block-sites"})
    provides = frozenset({"routed-tokens"})
    preserves = frozenset({"ffn-sites", "attention-sites"})
    Options = MixtureOfDepthsOptions
    options: MixtureOfDepthsOptions

    def refusal(self, site: Site) -> str:
        """Return why this block cannot skip tokens."""
        if site.dead:
            return "its result feeds nothing that is returned"
        if not site.region_is_module:
            return "it is no module of its own"
        if len(site.operands["streams"]) != 1:
            return f"it carries {len(site.operands['streams'])} token streams"
        if len(site.shapes["x"]) != 3:
            return f"its stream has shape {tuple(site.shapes['x'])}, not [batch, tokens, width]"
        return ""

    def contract(self) -> Contract:
        """Exact when no token is skipped."""
        if self.options.capacity == 1 and self.options.router_std == 0:
            return Contract("exact", 0.0, "every token passes with weight 1")
        return Contract("approximate", self.options.max_error, "tokens are skipped or weighted")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the router's parameters and multiply-adds per token; what skipping saves is in ``saved_fraction``."""
        width = int(site.shapes["x"][-1])
        return Costs(0, width + 1, 0, width, saved_fraction=1 - self.options.capacity)

    def edit(self, context: BlockContext) -> Edit:
        """Add the router, and wrap the block's forward."""
        parameters = list(context.module.parameters())
        router = TokenRouter(
            int(context.value.shape[-1]),
            self.options.capacity,
            std=self.options.router_std,
            generator=context.generator("tokens"),
            device=parameters[0].device if parameters else torch.device("cpu"),
        ).train(context.module.training)
        children: dict[str, nn.Module | None] = {CHILD: router}
        return Edit(routed=router, children=children, wrap=functools.partial(routed_forward, stream=context.stream))


@functools.cache
def routed_forward(forward: Forward, stream: str) -> Forward:
    """Return a method that runs ``forward`` on the tokens of parameter ``stream`` that the block's router selects."""
    position = list(inspect.signature(forward).parameters).index(stream) - 1

    @functools.wraps(forward)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if stream in kwargs:
            rest = {key: value for key, value in kwargs.items() if key != stream}
            return self.token_router(kwargs[stream], lambda x, _: forward(self, *args, **{stream: x}, **rest))
        before, after = args[:position], args[position + 1 :]
        return self.token_router(args[position], lambda x, _: forward(self, *before, x, *after, **kwargs))

    return routed
