"""Copies that come and go with the noise level (sparse materialisation, Hecate, arXiv 2502.02581).

Every expert has its owner for the whole run. For each range of noise levels, in each layer, the busiest device's
hottest expert gets a copy on the idlest device with a spare slot, as long as the predicted time falls; the copies for
the next range travel during the one before, and are dropped when their range is over.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, as_replicas, as_rows
from moefx.passes.placement.methods.lp_share import best_shares
from moefx.passes.placement.methods.minimax_time import minimax_time
from moefx.passes.placement.placement import Replica, Window
from moefx.passes.placement.price import Pricer
from moefx.passes.placement.slots import boundary, level_ranges
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]
Held = NDArray[np.bool_]


@register_strategy("materialise", "copies for a range of noise levels, then dropped", goal="seconds", copies=True)
def materialise(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return ``minimax_time`` with copies for each of ``budget.windows`` ranges."""
    homes = minimax_time.function(trace, topology, dims, budget)
    assert not isinstance(homes, Draft)
    until, pricer, windows = budget.deadline(), Pricer(trace, topology, dims, budget), list[Window]()
    before: tuple[Replica, ...] = ()
    for start, end in level_ranges(len(trace.sigmas), budget.windows):
        replicas: list[Replica] = []
        for i, home_E in enumerate(homes):
            if time.monotonic() > until:
                break
            tried = _copies(i, home_E, trace.layer(i)[start:end], pricer, slice(start, end))
            # Copies of the range before are still there while these arrive.
            if pricer.fits(homes, _union([*before, *replicas, *tried])):
                replicas += tried
        before = tuple(replicas)
        sigma = boundary(trace.sigmas, start)
        windows.append(Window(sigma=sigma, primary=as_rows(homes), replicas=before))
    return Draft(homes, windows[0].replicas, windows=tuple(windows[1:]), local_first=True)


def _copies(i: int, home_E: IDs, load_SE: Array, pricer: Pricer, levels: slice) -> list[Replica]:
    """Return the copies of one layer in one range, the most useful first, as long as they save time."""
    speeds = pricer.topology.speeds
    held_EG, best_replicas = np.eye(len(speeds), dtype=np.bool_)[home_E], list[Replica]()
    free_G = np.full(len(speeds), 1 if pricer.budget.spare is None else pricer.budget.spare)
    best = pricer.layer(i, home_E, [], levels)
    while free_G.any():
        time_G = load_SE.sum(axis=0) @ best_shares(load_SE, held_EG, speeds) / speeds
        idle = int(np.where(free_G > 0, time_G, np.inf).argmin())
        rows_E = np.where(held_EG[:, int(time_G.argmax())] & ~held_EG[:, idle], load_SE.sum(axis=0), -1.0)
        held_EG[int(rows_E.argmax()), idle] = True
        free_G[idle] -= 1
        tried = as_replicas(i, home_E, held_EG, best_shares(load_SE, held_EG, speeds))
        cost = pricer.layer(i, home_E, tried, levels)
        if rows_E.max() <= 0 or cost >= best:
            break
        best, best_replicas = cost, tried
    return best_replicas


def _union(replicas: list[Replica]) -> list[Replica]:
    """Return one copy of each place, without shares: what memory holds."""
    places = {(r.layer, r.expert, r.device) for r in replicas}
    return [Replica(layer=i, expert=e, device=g, share=0.0) for i, e, g in sorted(places)]
