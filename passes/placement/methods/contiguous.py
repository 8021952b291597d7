"""Devices filled one after another in the order of the experts: what a sharded parameter gives; the baseline."""

from __future__ import annotations

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Homes
from moefx.passes.placement.slots import equal_slots, in_order
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace


@register_strategy("contiguous", "experts in order, equally many per device; reads no load", baseline=True)
def contiguous(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return ``home[e] = e // slots`` for every layer."""
    return [in_order(equal_slots(count, len(topology), i)) for i, count in enumerate(dims.experts)]
