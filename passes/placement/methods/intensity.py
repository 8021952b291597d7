"""Hot experts on devices that compute fast, cold ones where memory is near (Duplex, arXiv 2409.01141; for two tiers).

The arithmetic intensity of an expert is its number of rows: few rows mean that reading the weights dominates, which a
processor next to large memory does as well as a fast one far from it. Per expert and device the time is the larger of
arithmetic and reading; experts go where the busiest device's times grow least, hottest first, then single ones move on.
What is minimised while searching is the time of the experts; rows on the way are added when the plan is scored.

Legend: S noise levels, E experts of a layer, G devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Homes
from moefx.passes.placement.predict import expert_seconds
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


@register_strategy("intensity", "hot experts where arithmetic is fast, cold ones where memory is near", goal="seconds")
def intensity(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return homes with unequal counts, within each device's memory."""
    limits_G = topology.memory_bytes
    if budget.memory_bytes is not None:
        limits_G = np.minimum(limits_G, budget.memory_bytes)
    left_G, homes = limits_G / budget.copies - dims.shared_bytes, []
    for i, count in enumerate(dims.experts):
        rows_SEG = np.repeat(trace.layer(i)[:, :, None], len(topology), axis=2)
        time_SEG = expert_seconds(rows_SEG, i, topology, dims) + _way(rows_SEG, i, topology, dims)
        layers_left = len(dims.experts) - i
        room_G = _room(left_G / layers_left / dims.expert_bytes[i], count)
        homes.append(_improved(time_SEG, _greedy(time_SEG, room_G), room_G))
        left_G = left_G - np.bincount(homes[i], minlength=len(topology)) * dims.expert_bytes[i]
    return homes


def _way(rows_SEG: Array, layer: int, topology: Topology, dims: ModelDims) -> Array:
    """Return the time on the way of rows that start on all devices alike, there and back."""
    far_G = topology.pair_seconds_per_byte.mean(axis=0)
    return np.asarray(2 * rows_SEG * far_G * dims.row_bytes[layer])


def _room(slots_G: Array, experts: int) -> IDs:
    """Return how many experts each device can take; at least enough in all, so that too little memory is told later."""
    room_G = np.floor(np.clip(slots_G, 0, experts)).astype(np.int64)
    while room_G.sum() < experts:
        room_G[int(slots_G.argmax())] += 1
    return room_G


def _greedy(time_SEG: Array, room_G: IDs) -> IDs:
    home_E = np.zeros(time_SEG.shape[1], dtype=np.int64)
    held_SG, free_G = np.zeros((time_SEG.shape[0], len(room_G))), room_G.copy()
    for e in np.argsort(-time_SEG.min(axis=2).sum(axis=0), kind="stable"):
        after_SG = held_SG + time_SEG[:, e]
        cost_G = np.maximum(after_SG, held_SG.max(axis=1, keepdims=True)).sum(axis=0)
        cost_G = cost_G + 1e-6 * after_SG.sum(axis=0)
        home_E[e] = int(np.where(free_G > 0, cost_G, np.inf).argmin())
        held_SG[:, home_E[e]] = after_SG[:, home_E[e]]
        free_G[home_E[e]] -= 1
    return home_E


def _improved(time_SEG: Array, home_E: IDs, room_G: IDs) -> IDs:
    """Move single experts, the best first, as long as the busiest device's times fall."""
    experts = np.arange(len(home_E))
    while True:
        spots_EG = np.eye(len(room_G))[home_E]
        held_SG = np.einsum("seg,eg->sg", time_SEG, spots_EG)
        mine_SE = time_SEG[:, experts, home_E]
        without_SEG = held_SG[:, None, :] - mine_SE[:, :, None] * spots_EG
        cost_EG = np.stack([_peak(without_SEG, time_SEG, g) for g in range(len(room_G))], axis=1)
        full = np.bincount(home_E, minlength=len(room_G)) >= room_G
        cost_EG[:, full] = np.inf
        e, g = np.unravel_index(int(cost_EG.argmin()), cost_EG.shape)
        if cost_EG[e, g] >= held_SG.max(axis=1).sum() * (1 - 1e-12):
            return home_E
        home_E[e] = g


def _peak(without_SEG: Array, time_SEG: Array, device: int) -> Array:
    """Return the busiest device's time, summed over levels, with each expert on one device ``[E]``."""
    held_SEG = without_SEG.copy()
    held_SEG[:, :, device] += time_SEG[:, :, device]
    return np.asarray(held_SEG.max(axis=2).sum(axis=0))
