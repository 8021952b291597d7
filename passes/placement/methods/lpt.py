"""Balanced greedy: the hottest expert first, always to the device that would be done earliest and has a free slot.

Longest processing time first (Graham, 1969) with equally many experts per device, then exchanges of two experts. It
reads the load summed over noise levels, as planners for language models do: the right input only where load does not
depend on time; see ``minimax_time``.

Legend: E experts of a layer, G devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Homes
from moefx.passes.placement.objective import layer_cost
from moefx.passes.placement.slots import equal_slots, in_order
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.swap import improve
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


@register_strategy("lpt", "balanced greedy on the load summed over time, refined by exchanges", baseline=True)
def lpt(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return the better of greedy and contiguous by summed load, after exchanges."""
    homes = []
    for i, count in enumerate(dims.experts):
        summed_1E = trace.layer(i).sum(axis=0, keepdims=True)
        slots = equal_slots(count, len(topology), i)
        starts = (greedy(summed_1E[0], slots, topology.speeds), in_order(slots))
        found = [improve(summed_1E, start, topology.speeds) for start in starts]
        homes.append(min(found, key=lambda home: layer_cost(summed_1E, home, topology.speeds)))
    return homes


def greedy(load_E: Array, slots_G: IDs, speeds: Array) -> IDs:
    """Return the device of each expert ``[E]``; ties go to the first expert and the first device."""
    home = np.empty(len(load_E), dtype=np.int64)
    held, free = np.zeros(len(slots_G)), slots_G.copy()
    for expert in np.argsort(-load_E, kind="stable"):
        done = np.where(free > 0, (held + load_E[expert]) / speeds, np.inf)
        device = int(done.argmin())
        home[expert] = device
        held[device] += load_E[expert]
        free[device] -= 1
    return home
