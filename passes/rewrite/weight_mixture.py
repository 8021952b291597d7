"""FFNs whose weights are mixed for each timestep interval out of a few bases (Remix-DiT, arXiv 2412.05628).

Exact at the start: every basis is a copy, and any convex combination of equals is the dense FFN.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context, Contract, Costs, Options, register_pass
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.ffn import FFNPass
from moefx.routing.layout import OnAxis
from moefx.routing.mixture import MixedFFN, leaning_table
from moefx.routing.scorers import TableRouter


class WeightMixtureOptions(Options):
    """Options of :class:`WeightMixture`."""

    bases: int = Field(4, ge=1, description="number of basis FFNs K")
    intervals: int = Field(8, ge=1, description="number of timestep intervals, each with coefficients of its own")
    timesteps: float = Field(1000.0, gt=0, description="raw timesteps are in [0, this); 1 if they are sigma")
    lean: float = Field(3.0, ge=0, description="start of an interval's coefficient at its own basis, in deviations")
    prior: float = Field(1e-4, ge=0, description="coefficient of the prior term at the start of training")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")


@register_pass
class WeightMixture(FFNPass):
    """Mix an FFN's weights out of bases, by timestep."""

    name = "weight-mixture"
    summary = "FFN -> weights mixed out of copies for each timestep interval; exact at the start"
    provides = frozenset({"mixed-ffns"})
    Options = WeightMixtureOptions
    options: WeightMixtureOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep."""
        return ("timestep",)

    def accepts(self, tap: str, value: torch.Tensor) -> bool:
        """Intervals need a raw timestep."""
        return value.ndim <= 1

    def contract(self) -> Contract:
        """Always exact."""
        return Contract("exact", 0.0, "convex combinations of equal weights")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token; merging is per sample and not counted."""
        o = self.options
        parameters, compute = ffn_counts(site)
        kept = ffn_sizes(site)[2] if "rest" in site.operands and "b_out" in site.operands else 0
        after = (parameters - kept) * o.bases + kept + o.intervals * o.bases
        return Costs(parameters, after, compute, compute)

    def build(self, context: Context) -> nn.Module:
        """Return the mixed FFN that stands where ``context.site`` stood."""
        o, site = self.options, context.site
        dense = dense_weights(site, context.graph)
        if "rest" in site.operands:
            dense = replace(dense, b_out=None)
        table = leaning_table(o.intervals, o.bases, context.generator("table"), lean=o.lean)
        router = TableRouter(o.bases, entries=o.intervals, steps=o.timesteps, table=table).to(dense.w_in.device)
        mixed = MixedFFN(router, dense, o.bases, hidden_function(site), prior=o.prior)
        axis = int(site.shapes["axis"])
        module = mixed if axis == len(site.shapes["x"]) - 1 else OnAxis(mixed, axis)
        return module.train(context.graph.root.training)
