"""Layouts that change during the run, planned before it: each range of noise levels has its own.

Load follows the noise level, so which experts are hot when is known, and so is what must move when: the weights of the
next window's layout arrive during the one before. Ranges are chosen by dynamic programming over the levels; then each
layer picks, by another over the ranges, among layouts that suit some range, where moving an expert has its price.

Legend: S noise levels, E experts of a layer, G devices, C cut points, W windows, Q candidate homes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, as_rows
from moefx.passes.placement.methods.minimax_time import greedy_over_time, minimax_layer
from moefx.passes.placement.objective import layer_cost
from moefx.passes.placement.placement import Window
from moefx.passes.placement.slots import boundary, equal_slots, level_ranges
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.swap import improve
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]
Range = tuple[int, int]

# Levels between which a layout may change; the number of ranges grows with its square.
_CUTS = 16


@register_strategy("windows", "a layout for each range of noise levels, moves priced and planned ahead")
def windows(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return at most ``budget.windows`` layouts."""
    ranges = _ranges(len(trace.sigmas), budget)
    draws, until = np.random.default_rng(budget.seed), budget.deadline()
    pools = []
    for i, count in enumerate(dims.experts):
        slots_G = equal_slots(count, len(topology), i)
        whole_E = minimax_layer(trace.layer(i), slots_G, topology.speeds, budget, draws)
        pools.append(_pool(trace.layer(i), ranges, whole_E, slots_G, topology.speeds, until))
    chosen = _choose_ranges(trace, topology, pools, budget.windows)
    homes = [
        _choose_homes(trace.layer(i), list(pools[i].values()), chosen, topology, budget) for i in range(len(pools))
    ]
    return _as_draft(trace, homes, chosen)


def _ranges(levels: int, budget: Budget) -> list[Range]:
    cuts = [start for start, _ in level_ranges(levels, _CUTS)] + [levels]
    return [(a, b) for k, a in enumerate(cuts) for b in cuts[k + 1 :]] if budget.windows > 1 else []


def _pool(
    load_SE: Array, ranges: Sequence[Range], whole_E: IDs, slots_G: IDs, speeds: Array, until: float
) -> dict[Range, IDs]:
    """Return homes of one layer that suit all levels, and for each range the better of two local optima."""
    pool = {(0, len(load_SE)): whole_E}
    for start, end in ranges:
        if time.monotonic() > until:
            break
        part_SE = load_SE[start:end]
        first_E, second_E = (improve(part_SE, h, speeds) for h in (whole_E, greedy_over_time(part_SE, slots_G, speeds)))
        first, second = (layer_cost(part_SE, home_E, speeds) for home_E in (first_E, second_E))
        pool.setdefault((start, end), first_E if first <= second else second_E)
    return pool


def _choose_ranges(
    trace: RoutingTrace, topology: Topology, pools: Sequence[dict[Range, IDs]], most: int
) -> list[Range]:
    """Return at most ``most`` ranges that cover all levels at the least cost, moves left out."""
    common = [r for r in pools[0] if all(r in pool for pool in pools)]
    cost = {
        (a, b): sum(layer_cost(trace.layer(i)[a:b], pool[a, b], topology.speeds) for i, pool in enumerate(pools))
        for a, b in common
    }
    best: dict[tuple[int, int], tuple[float, list[Range]]] = {(0, 0): (0.0, [])}
    levels = len(trace.sigmas)
    for used in range(most):
        for (a, b), added in cost.items():
            if (used, a) in best:
                total, path = best[used, a]
                if total + added < best.get((used + 1, b), (np.inf, []))[0]:
                    best[used + 1, b] = (total + added, [*path, (a, b)])
    ends = [best[used, levels] for used in range(1, most + 1) if (used, levels) in best]
    return min(ends, key=lambda end: end[0])[1]


def _choose_homes(
    load_SE: Array, pool: Sequence[IDs], chosen: Sequence[Range], topology: Topology, budget: Budget
) -> list[IDs]:
    """Return the homes of one layer in each range: the cheapest path through the pool, moves included."""
    speeds, alike = topology.speeds, topology.interchangeable
    price = budget.move_price * float(load_SE.sum()) / len(load_SE) / speeds.sum() / len(speeds)
    spots = [np.eye(len(speeds))[home] for home in pool]
    moved_QQ = np.array([[price * _moved(p, q, alike) for q in spots] for p in spots])
    total_Q = np.zeros(len(pool))
    back: list[IDs] = []
    for w, (a, b) in enumerate(chosen):
        reached_QQ = total_Q[:, None] + (moved_QQ if w else np.where(np.eye(len(pool)) > 0, 0.0, np.inf))
        back.append(reached_QQ.argmin(axis=0))
        total_Q = reached_QQ.min(axis=0) + [layer_cost(load_SE[a:b], home, speeds) for home in pool]
    path = [int(total_Q.argmin())]
    for step in reversed(back[1:]):
        path.append(int(step[path[-1]]))
    homes = [pool[path[-1]]]
    for q in path[-2::-1]:
        homes.append(_relabelled(homes[-1], pool[q], len(speeds)) if alike else pool[q])
    return homes


def _moved(before_EG: Array, after_EG: Array, alike: bool) -> float:
    """Return how many experts move between two layouts; where devices are alike, under the best names."""
    kept_GG = before_EG.T @ after_EG
    if not alike:
        return float(len(before_EG) - np.trace(kept_GG))
    rows, columns = linear_sum_assignment(kept_GG, maximize=True)
    return float(len(before_EG) - kept_GG[rows, columns].sum())


def _relabelled(before_E: IDs, after_E: IDs, devices: int) -> IDs:
    """Return the later homes with devices renamed so that fewest experts move."""
    kept_GG = np.eye(devices)[after_E].T @ np.eye(devices)[before_E]
    _, name_G = linear_sum_assignment(kept_GG, maximize=True)
    return np.asarray(name_G[after_E], dtype=np.int64)


def _as_draft(trace: RoutingTrace, homes: Sequence[Sequence[IDs]], chosen: Sequence[Range]) -> Draft:
    """Return one layout per range, successive equal ones as one."""
    found = [
        Window(sigma=boundary(trace.sigmas, a), primary=as_rows([h[w] for h in homes]))
        for w, (a, _) in enumerate(chosen)
    ]
    later = tuple(window for before, window in pairwise(found) if window.primary != before.primary)
    return Draft([home[0] for home in homes], windows=later)
