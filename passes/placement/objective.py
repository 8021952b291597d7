"""What a placement costs: at each noise level and in each layer everyone waits for the busiest device.

The sum runs over noise levels *outside* the maximum. Balancing the load averaged over time instead can be worse than
not balancing, because experts that are hot at different times look alike on average.

Legend: S noise levels, L layers, E experts of a layer, G devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.placement import Placement
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


def device_load(load_SE: Array, home_E: IDs, devices: int) -> Array:
    """Return the rows of each device, ``[S, G]``."""
    held_SG = np.zeros((load_SE.shape[0], devices))
    np.add.at(held_SG.T, home_E, load_SE.T)
    return held_SG


def layer_cost(load_SE: Array, home_E: IDs, speeds: Array) -> float:
    """Return the sum over noise levels of the time of the busiest device."""
    return float((device_load(load_SE, home_E, len(speeds)) / speeds).max(axis=1).sum())


def computed_shares(layout: Placement, layer: int) -> Array:
    """Return the fraction of each expert's rows that each device computes, ``[E, G]``.

    With ``local_first``, rows that start on a device with a copy stay there; rows start on all devices alike.
    """
    shares_EG = layout.shares(layer)
    if not layout.local_first:
        return shares_EG
    held_EG = layout.holders(layer) / len(layout.devices)
    return np.asarray(held_EG + shares_EG * (1 - held_EG.sum(axis=1, keepdims=True)))


def loads(trace: RoutingTrace, placement: Placement) -> Array:
    """Return the rows each device computes, ``[S, L, G]``."""
    layouts = placement.layouts
    rows_SLG = np.zeros((len(trace.sigmas), len(trace.layers), len(placement.devices)))
    serving_S = np.array([placement.layout_at(sigma) for sigma in trace.sigmas])
    for w, layout in enumerate(layouts):
        levels = np.flatnonzero(serving_S == w)
        for i in range(len(trace.layers) if len(levels) else 0):
            rows_SLG[levels, i] = trace.layer(i)[levels] @ computed_shares(layout, i)
    return rows_SLG


def total_cost(trace: RoutingTrace, topology: Topology, placement: Placement) -> float:
    """Return the objective of a placement: the time of the busiest device summed over levels and layers."""
    return float((loads(trace, placement) / topology.speeds).max(axis=2).sum())


def perfect_balance(trace: RoutingTrace, topology: Topology) -> float:
    """Return the objective if every load could be divided at will."""
    return float(trace.load.sum() / topology.speeds.sum())


def lower_bound(trace: RoutingTrace, topology: Topology, copies: int = 1) -> float:
    """Return a bound that no placement with at most so many copies of each expert can beat.

    It is perfect balance, or the hottest expert alone on the fastest devices.
    """
    speeds = np.sort(topology.speeds)[::-1]
    balanced_SL = trace.load.sum(axis=2) / speeds.sum()
    return float(np.maximum(balanced_SL, trace.load.max(axis=2) / speeds[:copies].sum()).sum())
