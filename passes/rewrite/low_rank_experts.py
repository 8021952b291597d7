"""Low-rank experts: the dense FFN stays, and routed low-rank deltas on its linear maps are what is learnt.

Sources: mixtures of LoRA experts on diffusion transformers (ICEdit, arXiv 2504.20690), per timestep interval (PPAP,
arXiv 2212.05973; TimeStep Master, arXiv 2503.07416). Exact at the start for every router: the deltas are zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context, Contract, Costs, register_pass
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.ffn import RoutedFFNPass
from moefx.passes.rewrite.routing_build import mean_experts, router_parameters, routing, routing_warnings
from moefx.passes.rewrite.routing_options import RoutingOptions
from moefx.routing.layout import OnAxis
from moefx.routing.low_rank import LowRankExperts
from moefx.routing.moe import RoutedFFN


class LowRankOptions(RoutingOptions):
    """Options of :class:`LowRank`."""

    rank: int = Field(16, ge=1, description="rank r of each delta")
    alpha: float = Field(16.0, gt=0, description="deltas are multiplied by alpha / rank")
    targets: list[Literal["in", "gate", "out"]] = Field(
        ["out"], min_length=1, description="maps with deltas; gate is left out where there is none"
    )
    core: bool = Field(False, description="interval: experts of the first partition have gate 1")

    @model_validator(mode="after")
    def _one_to_one(self) -> LowRankOptions:
        if self.granularity > 1:
            raise ValueError("granularity > 1 has no meaning for low-rank experts: raise the rank")
        if self.core and self.selector != "interval":
            raise ValueError("core needs selector = interval")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets = {self.targets} names a map twice")
        return self


@register_pass
class LowRank(RoutedFFNPass):
    """Add routed low-rank deltas to an FFN."""

    name = "low-rank-experts"
    summary = "FFN -> itself + routed low-rank deltas on its linear maps; exact at the start"
    provides = frozenset({"routed-ffns"})
    Options = LowRankOptions
    options: LowRankOptions

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN."""
        if not self._targets(site):
            return "it is not gated, and deltas were asked for its gate alone"
        return ""

    def _targets(self, site: Site) -> list[str]:
        return [name for name in self.options.targets if name != "gate" or "w_gate" in site.operands]

    def contract(self) -> Contract:
        """Always exact."""
        return Contract("exact", 0.0, "low-rank deltas that are zero")

    def warnings(self) -> list[str]:
        """Warn of results that depend on the batch."""
        return routing_warnings(self.options)

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token."""
        o = self.options
        dim, hidden, out, _ = ffn_sizes(site)
        parameters, compute = ffn_counts(site)
        widths = {"in": dim + hidden, "gate": dim + hidden, "out": hidden + out}
        delta = sum(o.rank * widths[name] for name in self._targets(site))
        router = router_parameters(o, dim, tap_width)
        active = compute + int(delta * mean_experts(o)) + router
        return Costs(parameters, parameters + o.experts * delta + router, compute, active)

    def build(self, context: Context) -> nn.Module:
        """Return the FFN with deltas that stands where ``context.site`` stood."""
        o, site = self.options, context.site
        dense = dense_weights(site, context.graph)
        if "rest" in site.operands:
            dense = replace(dense, b_out=None)
        experts = LowRankExperts(
            dense,
            hidden_function(site),
            num_experts=o.experts,
            rank=o.rank,
            alpha=o.alpha,
            targets=self._targets(site),
            ungated=o.intervals[0] if o.core else 0,
            generator=context.generator("deltas"),
        )
        routed = RoutedFFN(experts=experts, **routing(o, context, dense.dim, dense.w_in.device))
        axis = int(site.shapes["axis"])
        module = routed if axis == len(site.shapes["x"]) - 1 else OnAxis(routed, axis)
        return module.train(context.graph.root.training)
