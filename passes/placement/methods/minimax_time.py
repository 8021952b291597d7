"""One placement for all noise levels that minimises the sum over levels of the busiest device's load.

The same objective over load snapshots is used for serving language models; here the snapshots are the noise levels,
which are known before the run. It costs nothing at run time.

Legend: S noise levels, E experts of a layer, G devices.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Homes
from moefx.passes.placement.methods.lpt import greedy
from moefx.passes.placement.objective import layer_cost
from moefx.passes.placement.slots import equal_slots, in_order
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.swap import improve
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


@register_strategy("minimax_time", "balanced at every noise level, not on average; exchanges from several starts")
def minimax_time(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return the best local optimum of each layer; never worse than ``contiguous`` or ``lpt``, which are starts."""
    draws = np.random.default_rng(budget.seed)
    return [
        minimax_layer(trace.layer(i), equal_slots(count, len(topology), i), topology.speeds, budget, draws)
        for i, count in enumerate(dims.experts)
    ]


def minimax_layer(
    load_SE: Array, slots_G: IDs, speeds: Array, budget: Budget, draws: np.random.Generator, more: Sequence[IDs] = ()
) -> IDs:
    """Return the best local optimum of one layer from several starts, ``more`` among them."""
    until = budget.deadline()
    best: IDs | None = None
    for start in itertools.chain(more, _starts(load_SE, slots_G, speeds, budget, draws)):
        found = improve(load_SE, start, speeds)
        best = found if best is None else min(best, found, key=lambda home: layer_cost(load_SE, home, speeds))
        if time.monotonic() > until:
            break
    assert best is not None
    return best


def _starts(load_SE: Array, slots: IDs, speeds: Array, budget: Budget, draws: np.random.Generator) -> Iterator[IDs]:
    """Yield contiguous, both forms of the greedy, one greedy over time, and random starts."""
    summed_1E = load_SE.sum(axis=0, keepdims=True)
    balanced = greedy(summed_1E[0], slots, speeds)
    yield in_order(slots)
    yield improve(summed_1E, balanced, speeds)
    yield improve(summed_1E, in_order(slots), speeds)
    yield greedy_over_time(load_SE, slots, speeds)
    for _ in range(budget.restarts):
        yield draws.permutation(balanced)


def greedy_over_time(load_SE: Array, slots_G: IDs, speeds: Array) -> IDs:
    """Place the expert with the highest peak first, each where the sum of the busiest device's times grows least."""
    load_SE = load_SE / max(float(load_SE.mean()), np.finfo(np.float64).tiny)
    home = np.empty(load_SE.shape[1], dtype=np.int64)
    held_SG, free = np.zeros((load_SE.shape[0], len(slots_G))), slots_G.copy()
    for expert in np.argsort(-load_SE.max(axis=0), kind="stable"):
        added_SG = (held_SG + load_SE[:, expert, None]) / speeds
        busiest_S1 = (held_SG / speeds).max(axis=1, keepdims=True)
        # The second term tells devices apart that are below the busiest at every level.
        cost_G = np.maximum(added_SG, busiest_S1).sum(axis=0) + 1e-6 * np.square(added_SG).sum(axis=0)
        device = int(np.where(free > 0, cost_G, np.inf).argmin())
        home[expert] = device
        held_SG[:, device] += load_SE[:, expert]
        free[device] -= 1
    return home
