"""Hot experts on every device, where that pays (shadowing, FasterMoE, PPoPP 2022).

A copy everywhere makes rows of that expert local. It costs sending the weights, once per run here, since the copies
stay; in training it is paid in every iteration. Experts are tried from the hottest on while the predicted time falls.
"""

from __future__ import annotations

import time

import numpy as np

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft
from moefx.passes.placement.methods.minimax_time import minimax_time
from moefx.passes.placement.placement import Replica
from moefx.passes.placement.price import Pricer
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

# After so many experts of a layer in a row that do not pay, colder ones will not either.
_PATIENCE = 2


@register_strategy("shadow", "hot experts on every device where that saves time", goal="seconds", copies=True)
def shadow(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return ``minimax_time`` with some experts everywhere."""
    homes = minimax_time.function(trace, topology, dims, budget)
    assert not isinstance(homes, Draft)
    until, pricer = budget.deadline(), Pricer(trace, topology, dims, budget)
    replicas: list[Replica] = []
    for i in range(len(dims.experts)):
        mine: list[Replica] = []
        best, misses = pricer.layer(i, homes[i], mine), 0
        for e in np.argsort(-trace.layer(i).sum(axis=0), kind="stable"):
            if misses >= _PATIENCE or time.monotonic() > until:
                break
            tried = [*mine, *_everywhere(i, int(e), int(homes[i][e]), len(topology))]
            cost = pricer.layer(i, homes[i], tried)
            if cost < best and pricer.fits(homes, [*replicas, *tried]):
                mine, best, misses = tried, cost, 0
            else:
                misses += 1
        replicas += mine
    return Draft(homes, tuple(replicas), local_first=True)


def _everywhere(layer: int, expert: int, home: int, devices: int) -> list[Replica]:
    return [Replica(layer=layer, expert=expert, device=g, share=1 / devices) for g in range(devices) if g != home]
