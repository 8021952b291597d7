"""Channel groups: the timestep switches groups of a feed-forward network's hidden neurons on and off.

Source: DyDiT, arXiv 2410.03456. At its start every group is on and the network is the dense one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context, Contract, Costs, register_pass
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.ffn import FFNPass
from moefx.passes.rewrite.ratios import Ratio, steps
from moefx.passes.rewrite.thresholds import TIMESTEP_WIDTH, ThresholdOptions, threshold_gate
from moefx.routing.channels import ChannelGroups
from moefx.routing.layout import OnAxis


class ChannelGroupsOptions(ThresholdOptions):
    """Options of :class:`ChannelGroupsPass`."""

    groups: int = Field(8, ge=2, description="groups of hidden neurons; the first is always on")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")


@register_pass
class ChannelGroupsPass(FFNPass):
    """Gate groups of hidden neurons."""

    name = "channel-groups"
    summary = "FFN -> groups of hidden neurons, switched by the timestep; exact while all are on"
    provides = frozenset({"routed-channels"})
    unit = "neurons"
    Options = ChannelGroupsOptions
    options: ChannelGroupsOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep."""
        return ("timestep",)

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN."""
        hidden, groups = ffn_sizes(site)[1], self.options.groups
        if hidden % groups:
            divisors = [g for g in range(2, 65) if hidden % g == 0]
            return f"its width {hidden} is not divisible by groups = {groups}; possible: {divisors}"
        return ""

    def contract(self) -> Contract:
        """Exact while every group is on."""
        return self.options.threshold_contract("group")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds; what the switches save is learnt, and planned as the budget."""
        parameters, compute = ffn_counts(site)
        gate = (self.options.groups - 1) * ((tap_width or TIMESTEP_WIDTH) + 1)
        return Costs(parameters, parameters + gate, compute, round(compute * self.options.expected_share))

    def ratios(self, site: Site) -> list[Ratio]:
        """Return numbers of groups that are on, on average."""
        groups = self.options.groups
        return [Ratio({"budget": on / groups}, on / groups) for on in steps(groups)]

    def kept_first(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the neurons group by group."""
        groups = losses.reshape(self.options.groups, -1)
        return groups[groups.sum(1).argsort(descending=True, stable=True)].flatten()

    def build(self, context: Context) -> nn.Module:
        """Return the grouped FFN that stands where ``context.site`` stood."""
        o, site = self.options, context.site
        dense = dense_weights(site, context.graph)
        if "rest" in site.operands:
            dense = replace(dense, b_out=None)
        positions = float(site.operands["x"].meta["val"].numel() // int(site.shapes["D"]))
        gate = threshold_gate(o, context, o.groups, cost=positions * ffn_counts(site)[1])
        routed: nn.Module = ChannelGroups(dense, hidden_function(site), gate, o.groups)
        axis = int(site.shapes["axis"])
        if axis != len(site.shapes["x"]) - 1:
            routed = OnAxis(routed, axis)
        return routed.train(context.graph.root.training)
