"""Whole models as experts: a group of devices for each, sized by its share of the run; latents cross, not weights.

Denoisers made of a few models for different noise levels run them one after another. With the models on islands of
devices, successive requests follow each other as in a pipeline: no model is ever unloaded, and what crosses the border
is the latents of a request. What counts is the time between two requests: the work of the busiest device over a run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, as_replicas
from moefx.passes.placement.methods.lpt import lpt
from moefx.passes.placement.placement import Replica
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]


@register_strategy("islands", "a group of devices for each whole-model expert", goal="interval", copies=True)
def islands(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Draft:
    """Return islands where there are at least as many devices as experts, else the balanced greedy."""
    packed = lpt.function(trace, topology, dims, budget)
    assert not isinstance(packed, Draft)
    homes, replicas = [], list[Replica]()
    for i, count in enumerate(dims.experts):
        if count > len(topology):
            homes.append(packed[i])
            continue
        held_EG = _islands(trace.layer(i).sum(axis=0), topology.speeds)
        shares_EG = held_EG * topology.speeds
        homes.append(held_EG.argmax(axis=1))
        replicas += as_replicas(i, homes[i], held_EG, shares_EG / shares_EG.sum(axis=1, keepdims=True))
    return Draft(homes, tuple(replicas))


def _islands(work_E: Array, speeds: Array) -> NDArray[np.bool_]:
    """Return who holds what ``[E, G]``: neighbours in rank order, one device each, the next to whoever is slowest."""
    sizes_E = np.ones(len(work_E), dtype=np.int64)
    for _ in range(len(speeds) - len(work_E)):
        sizes_E[_times(work_E, sizes_E, speeds).argmax()] += 1
    return np.repeat(np.eye(len(work_E), dtype=np.bool_), sizes_E, axis=1)


def _times(work_E: Array, sizes_E: NDArray[np.int64], speeds: Array) -> Array:
    """Return the time each island needs for its work."""
    ends = np.cumsum(sizes_E)
    rates_E = np.array([speeds[end - size : end].sum() for end, size in zip(ends, sizes_E, strict=True)])
    return np.asarray(work_E / rates_E)
