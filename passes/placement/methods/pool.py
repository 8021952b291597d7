"""Affinity from a pool of quick solutions, glued at the best layers: for when annealing takes too long.

Each solution is an iterated linear assignment from another start. Where devices are interchangeable the best chain
through all of them is found by dynamic programming; a perturbed copy of it joins the pool, round after round.
"""

from __future__ import annotations

import time

import numpy as np

from moefx.passes.placement.chain import Chain, IDs
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Homes
from moefx.passes.placement.methods.affinity import chain_of
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

_POOL, _LONGEST = 20, 5


@register_strategy("pool", "as affinity, from glued quick solutions: faster", goal="crossing flow")
def pool(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return the best chain after ``restarts`` rounds of gluing, climbing and perturbing."""
    chain = chain_of(trace, topology, dims)
    draws, until = np.random.default_rng(budget.seed), budget.deadline()
    solutions = [chain.climb(chain.start(draws), until) for _ in range(_POOL)]
    best = min(solutions, key=chain.crossing)
    for _ in range(budget.restarts if topology.interchangeable else 0):
        if time.monotonic() > until:
            break
        best = min(best, chain.climb(chain.glue([best, *solutions]), until), key=chain.crossing)
        solutions = [chain.climb(_perturbed(chain, best, draws), until) for _ in range(_POOL)]
    return min(best, *solutions, key=chain.crossing)


def _perturbed(chain: Chain, homes: list[IDs], draws: np.random.Generator) -> list[IDs]:
    """Return homes with a quarter of the experts of a few successive layers shuffled."""
    homes = [home.copy() for home in homes]
    length = int(draws.integers(1, _LONGEST + 1))
    first = int(draws.integers(0, max(len(homes) - length, 0) + 1))
    for home in homes[first : first + length]:
        moved = draws.choice(len(home), size=min(max(2, len(home) // 4), len(home)), replace=False)
        home[moved] = home[draws.permutation(moved)]
    return homes
