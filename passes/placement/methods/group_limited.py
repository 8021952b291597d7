"""Experts that the same token chooses live apart: the groups for a router that takes equally many from each device.

A group-limited router (Pangu Pro MoE, arXiv 2505.21411) takes the top K/G within each of G groups, one per device, so
that all devices have the same load by construction. It changes the model. This placement chooses the groups for which
it changes least: those in which a token seldom wants two experts of one group.
"""

from __future__ import annotations

import numpy as np

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, Homes
from moefx.passes.placement.methods.groups import best_groups
from moefx.passes.placement.methods.lpt import lpt
from moefx.passes.placement.slots import equal_slots
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace


@register_strategy(
    "group_limited", "experts of one token live apart, for a group-limited router", goal="pairs together"
)
def group_limited(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return equally large groups with the fewest pairs chosen together."""
    pairs = trace.need("coactivation", "group experts by co-activation")
    starts = lpt.function(trace, topology, dims, budget)
    assert not isinstance(starts, Draft)
    draws, homes = np.random.default_rng(budget.seed), []
    for i, count in enumerate(dims.experts):
        slots_G = equal_slots(count, len(topology), i)
        sizes = (int(slots_G.min()), int(slots_G.max()))
        homes.append(best_groups(-pairs[i, :count, :count], starts[i], len(topology), sizes, budget, draws))
    return homes
