"""More experts than fit: pin some for the whole run, stream the others from a slower tier in a known order.

Layers are visited in the same order at every step, so the best cache is known before the run: with Belady's rule, and
the right to bypass the cache, it keeps a fixed part and streams the rest, while a cache of the least recently used has
no hit at all. What is pinned is what saves most waiting per byte; the rest is fetched behind its layer's arithmetic.

Legend: S noise levels, L layers, E experts of a layer, G devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, Homes
from moefx.passes.placement.methods.minimax_time import minimax_time
from moefx.passes.placement.placement import RESIDENT, STAGING_SLOTS
from moefx.passes.placement.predict import expert_seconds
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


@register_strategy("pin_and_stream", "what does not fit is streamed from a slower tier", goal="seconds")
def pin_and_stream(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return ``minimax_time`` with the tier of each expert; all are resident where they fit."""
    homes = minimax_time.function(trace, topology, dims, budget)
    assert not isinstance(homes, Draft)
    limits_G = topology.memory_bytes
    if budget.memory_bytes is not None:
        limits_G = np.minimum(limits_G, budget.memory_bytes)
    tiers = [[RESIDENT] * count for count in dims.experts]
    for g in range(len(topology)):
        names = list(topology.tiers(g))
        if not names:
            continue
        room = float(limits_G[g]) / budget.copies - dims.shared_bytes
        for i, experts in _streamed(g, homes, room, trace, topology, dims).items():
            for e in experts:
                tiers[i][e] = names[0]
    some = any(tier != RESIDENT for row in tiers for tier in row)
    return Draft(homes, tiers=tuple(map(tuple, tiers)) if some else ())


def _streamed(
    device: int, homes: Homes, room: float, trace: RoutingTrace, topology: Topology, dims: ModelDims
) -> dict[int, list[int]]:
    """Return the experts of one device that are streamed, by layer."""
    mine = {i: np.flatnonzero(home_E == device) for i, home_E in enumerate(homes)}
    needed = sum(len(experts) * dims.expert_bytes[i] for i, experts in mine.items())
    if needed <= room:
        return {}
    # Experts used at most levels first, then those with most rows: they are streamed most often otherwise.
    order = {i: _by_use(trace.layer(i), experts) for i, experts in mine.items()}
    link = next(iter(topology.tiers(device).values()))
    pinned = dict.fromkeys(order, 0)
    left = room - STAGING_SLOTS * max(dims.expert_bytes[i] for i, experts in order.items() if experts)
    waits = {i: _waits(order[i], i, device, float(link["beta_s_per_byte"]), trace, topology, dims) for i in order}
    while True:
        open_layers = [i for i in order if pinned[i] < len(order[i]) and dims.expert_bytes[i] <= left]
        if not open_layers:
            return {i: experts[pinned[i] :] for i, experts in order.items() if pinned[i] < len(experts)}
        # The steepest average fall over any number of further experts: waiting falls in steps, not evenly.
        best = max(open_layers, key=lambda i: (_fall(waits[i], pinned[i]) / dims.expert_bytes[i], -i))
        pinned[best] += 1
        left -= dims.expert_bytes[best]


def _by_use(load_SE: Array, experts: IDs) -> list[int]:
    used, rows = (load_SE > 0).sum(axis=0), load_SE.sum(axis=0)
    return sorted(experts.tolist(), key=lambda e: (-used[e], -rows[e], e))


def _waits(
    order: list[int], layer: int, device: int, beta: float, trace: RoutingTrace, topology: Topology, dims: ModelDims
) -> Array:
    """Return the time of a layer over all levels with 0, 1, 2 … of its experts pinned."""
    load_SE = trace.layer(layer)[:, order]
    compute_S = expert_seconds(load_SE[:, :, None], layer, topology, dims)[:, :, device].sum(axis=1)
    streamed_SE = (load_SE > 0) * dims.expert_bytes[layer] * beta
    after = [np.maximum(compute_S, streamed_SE[:, count:].sum(axis=1)).sum() for count in range(len(order) + 1)]
    return np.array(after)


def _fall(waits: Array, pinned: int) -> float:
    """Return the steepest fall per further pinned expert."""
    further = np.arange(1, len(waits) - pinned)
    return float(((waits[pinned] - waits[pinned + 1 :]) / further).max())
