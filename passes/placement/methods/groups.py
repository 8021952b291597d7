"""Experts that the same token chooses share a device, so that it visits few (GRACE-MoE, arXiv 2509.25041).

Groups need not be equally large: a device may hold one expert of a layer more or less than an equal share. Spare slots
then take copies of the experts of busy devices, and rows prefer a copy on their own device.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, as_replicas
from moefx.passes.placement.methods.lp_share import best_shares
from moefx.passes.placement.methods.lpt import lpt
from moefx.passes.placement.placement import Replica
from moefx.passes.placement.regroup import IDs, regroup, within
from moefx.passes.placement.slots import equal_slots
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
_SLACK = 1


@register_strategy("groups", "experts of one token share a device; busy ones copied", goal="pairs apart")
def groups(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return groups by co-activation, and copies where ``budget.spare`` has slots."""
    pairs = trace.need("coactivation", "group experts by co-activation")
    starts = lpt.function(trace, topology, dims, budget)
    assert not isinstance(starts, Draft)
    draws, homes, replicas = np.random.default_rng(budget.seed), [], list[Replica]()
    for i, count in enumerate(dims.experts):
        slots_G = equal_slots(count, len(topology), i)
        sizes = (max(1, int(slots_G.min()) - _SLACK), min(int(slots_G.max()) + _SLACK, count))
        homes.append(best_groups(pairs[i, :count, :count], starts[i], len(topology), sizes, budget, draws))
        replicas += _copies(i, trace.layer(i), homes[i], topology.speeds, budget)
    return Draft(homes, tuple(replicas), local_first=bool(replicas))


def best_groups(
    worth_EE: Array, start_E: IDs, devices: int, sizes: tuple[int, int], budget: Budget, draws: np.random.Generator
) -> IDs:
    """Return the best grouping from a start and ``budget.restarts`` shuffles of it."""
    until = budget.deadline()
    best = regroup(worth_EE, start_E, devices, *sizes)
    for _ in range(budget.restarts):
        if time.monotonic() > until:
            break
        found = regroup(worth_EE, draws.permutation(start_E), devices, *sizes)
        best = max(best, found, key=lambda home: within(worth_EE, home))
    return best


def _copies(layer: int, load_SE: Array, home_E: IDs, speeds: Array, budget: Budget) -> list[Replica]:
    """Return copies of the hottest experts of the busiest devices on the idlest, with the best shares."""
    held_EG = np.eye(len(speeds), dtype=np.bool_)[home_E]
    free_G = np.full(len(speeds), 1 if budget.spare is None else budget.spare)
    for _ in range(int(free_G.sum())):
        shares_EG = held_EG / held_EG.sum(axis=1, keepdims=True)
        time_G = load_SE.sum(axis=0) @ shares_EG / speeds
        idle = int(np.where(free_G > 0, time_G, np.inf).argmin())
        rows_E = np.where(held_EG[:, int(time_G.argmax())] & ~held_EG[:, idle], load_SE.sum(axis=0), -1.0)
        if rows_E.max() <= 0:
            break
        held_EG[int(rows_E.argmax()), idle] = True
        free_G[idle] -= 1
    return as_replicas(layer, home_E, held_EG, best_shares(load_SE, held_EG, speeds))
