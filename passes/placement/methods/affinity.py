"""Experts of successive layers that tokens visit in turn share a device (ExFlow, arXiv 2401.08383).

Here every layer is placed exactly given its neighbours, with annealing, instead of by an integer program: its usual
linear form has a bound of zero and cannot prune.
"""

from __future__ import annotations

import time

import numpy as np

from moefx.passes.placement.chain import Chain, noise_levels
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, Homes
from moefx.passes.placement.flow import nearness
from moefx.passes.placement.methods.lpt import lpt
from moefx.passes.placement.slots import equal_slots
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace


@register_strategy("affinity", "tokens change device seldom from layer to layer; annealed", goal="crossing flow")
def affinity(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return the best of several annealed chains."""
    chain = chain_of(trace, topology, dims)
    draws, until = np.random.default_rng(budget.seed), budget.deadline()
    greedy = lpt.function(trace, topology, dims, budget)
    assert not isinstance(greedy, Draft)
    best = chain.climb(greedy, until)
    pool = [best]
    for hot in noise_levels(budget.restarts):
        if time.monotonic() > until:
            break
        pool.append(min(chain.anneal(chain.start(draws), draws, hot, until), key=chain.crossing, default=best))
    if topology.interchangeable:
        pool.append(chain.climb(chain.glue(pool), until))
    return min(pool, key=chain.crossing)


def chain_of(trace: RoutingTrace, topology: Topology, dims: ModelDims) -> Chain:
    """Return the chain of a model's layers with equally many experts per device."""
    slots = [equal_slots(count, len(topology), i) for i, count in enumerate(dims.experts)]
    return Chain(trace.need("affinity", "place by affinity"), slots, nearness(topology))
