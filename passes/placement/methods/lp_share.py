"""Copies as ``eplb`` places them, with the best division of rows among them: a linear program, solved before the run.

Serving systems for language models solve it for every batch, because load depends on the prompt. Here it depends on
the noise level, so a few solutions, each for a range of levels, last for every run. Only shares change; nothing moves.

Legend: S noise levels, E experts of a layer, G devices, C copies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from moefx.errors import PlanError
from moefx.passes.placement.copies import equal_shares, primaries, replicate, slots_with_spare
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, as_replicas, as_rows
from moefx.passes.placement.placement import Replica, Window
from moefx.passes.placement.slots import boundary, level_ranges
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]


@register_strategy("lp_share", "as eplb, rows divided by a linear program for each range of levels", copies=True)
def lp_share(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return one layout per range of noise levels; they differ in the shares only."""
    held = [
        replicate(trace.layer(i), slots_with_spare(count, len(topology), i, budget), topology.speeds, equal=False)
        for i, count in enumerate(dims.experts)
    ]
    homes = [primaries(held_EG) for held_EG in held]
    windows: list[Window] = []
    for start, end in level_ranges(len(trace.sigmas), budget.windows):
        replicas: list[Replica] = []
        for i, held_EG in enumerate(held):
            shares_EG = best_shares(trace.layer(i)[start:end], held_EG, topology.speeds)
            replicas += as_replicas(i, homes[i], held_EG, shares_EG)
        sigma = boundary(trace.sigmas, start)
        windows.append(Window(sigma=sigma, primary=as_rows(homes), replicas=tuple(replicas)))
    return Draft(homes, windows[0].replicas, windows=tuple(windows[1:]))


def best_shares(load_SE: Array, held_EG: NDArray[np.bool_], speeds: Array) -> Array:
    """Return shares ``[E, G]`` that minimise the sum over levels of the busiest device's time; rows sum to one."""
    if (held_EG.sum(axis=1) == 1).all() or not load_SE.any():
        return equal_shares(held_EG)
    (levels, experts), devices = load_SE.shape, len(speeds)
    unit = load_SE.sum() / levels / speeds.sum()
    expert_C, device_C = np.nonzero(held_EG)
    copies = len(expert_C)
    # Rows (level, device): Σ_copies load · share / speed − busiest(level) ≤ 0; then rows (expert): Σ shares = 1.
    level, copy = np.meshgrid(np.arange(levels), np.arange(copies), indexing="ij")
    row = (level * devices + device_C[copy]).ravel()
    value = (load_SE[:, expert_C] / speeds[device_C] / unit).ravel()
    every = np.arange(levels * devices)
    entries = np.concatenate([value, np.full(len(every), -1.0)])
    places = (np.concatenate([row, every]), np.concatenate([copy.ravel(), copies + every // devices]))
    busiest = coo_matrix((entries, places), shape=(levels * devices, copies + levels)).tocsr()
    whole = coo_matrix((np.ones(copies), (expert_C, np.arange(copies))), shape=(experts, copies + levels)).tocsr()
    price = np.concatenate([np.zeros(copies), np.ones(levels)])
    solved = linprog(price, A_ub=busiest, b_ub=np.zeros(levels * devices), A_eq=whole, b_eq=np.ones(experts))
    if solved.x is None:
        raise PlanError("divide rows among copies", found=solved.message, do="use the strategy eplb")
    shares_EG = np.zeros((experts, devices))
    shares_EG[expert_C, device_C] = np.clip(solved.x[:copies], 0, 1)
    return np.asarray(shares_EG / shares_EG.sum(axis=1, keepdims=True))
