"""Step caches around sub-layers: attentions and feed-forward networks that may reuse what they returned a step before.

Source: HarmoniCa, arXiv 2410.01723. Nothing is cached, and nothing changes, until a sampler uses
`moefx.routing.step_cache.StepCaches`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import CallPass, Contract, Costs, Options, register_pass
from moefx.routing.step_cache import StepCache


class StepCacheOptions(Options):
    """Options of both step caches."""

    steps: int = Field(50, ge=1, le=65536, description="sampler steps, the length of the tables")
    period: int = Field(1, ge=1, description="at the start every n-th step runs; 1: all, the dense model")
    cache_threshold: float = Field(0.1, gt=0, lt=1, description="a sub-layer runs where its weight exceeds this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")


class _StepCachePass(CallPass):
    """What the two passes have in common."""

    child: ClassVar[str] = "step_cache"
    Options = StepCacheOptions
    options: StepCacheOptions

    def refusal(self, site: Site) -> str:
        """Return why this sub-layer cannot be cached."""
        return "its result feeds nothing that is returned" if site.dead else ""

    def contract(self) -> Contract:
        """Exact: outside a sampling run nothing is cached."""
        return Contract("exact", 0.0, "nothing is cached outside a sampling run")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the table; what is saved depends on the sampler."""
        return Costs(0, self.options.steps, 0, 0)

    def around(self, module: nn.Module) -> nn.Module:
        """Return the cache of one sub-layer."""
        o = self.options
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        cache = StepCache(o.steps, period=o.period, threshold=o.cache_threshold, device=device)
        return cache.train(module.training)


@register_pass
class AttentionStepCache(_StepCachePass):
    """Cache attentions over steps."""

    name = "step-cache-attention"
    summary = "attention -> reuses its output at some sampler steps; the dense model outside a sampling run"
    site_kind: ClassVar[Kind] = "attention"
    requires = frozenset({"attention-sites"})
    provides = frozenset({"cached-attention"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})


@register_pass
class FFNStepCache(_StepCachePass):
    """Cache feed-forward networks over steps."""

    name = "step-cache-ffn"
    summary = "FFN -> reuses its output at some sampler steps; the dense model outside a sampling run"
    site_kind: ClassVar[Kind] = "ffn"
    requires = frozenset({"ffn-sites"})
    provides = frozenset({"cached-ffns"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})
