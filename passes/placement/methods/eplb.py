"""Copies of hot experts in spare slots, all with equal shares, as planners for language models place them.

It differs from DeepSeek's EPLB in three ways: no device gets two copies of one expert, what is minimised is the sum
over noise levels of the busiest device rather than the average load, and exchanges refine the greedy.
"""

from __future__ import annotations

from moefx.passes.placement.copies import equal_shares, primaries, replicate, slots_with_spare
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, as_replicas
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace


@register_strategy("eplb", "hot experts copied into spare slots, equal shares", copies=True)
def eplb(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return homes, and copies in ``budget.spare`` more slots per device and layer."""
    homes, replicas = [], []
    for i, count in enumerate(dims.experts):
        slots_G = slots_with_spare(count, len(topology), i, budget)
        held_EG = replicate(trace.layer(i), slots_G, topology.speeds, equal=True)
        homes.append(primaries(held_EG))
        replicas += as_replicas(i, homes[i], held_EG, equal_shares(held_EG))
    return Draft(homes, tuple(replicas))
