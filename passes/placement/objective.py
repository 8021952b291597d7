"""What a placement costs: at each noise level and in each layer everyone waits for the busiest device.

The sum runs over noise levels *outside* the maximum. Balancing the load averaged over time instead can be worse than
not balancing, because experts that are hot at different times look alike on average.

Legend: S noise levels, E experts of a layer, G devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def total_cost(trace: RoutingTrace, topology: Topology, homes: Sequence[IDs]) -> float:
    """Return the objective of a placement: :func:`layer_cost` summed over layers."""
    return sum(layer_cost(trace.layer(i), home, topology.speeds) for i, home in enumerate(homes))


def perfect_balance(trace: RoutingTrace, topology: Topology) -> float:
    """Return the objective if every load could be divided at will."""
    return float(trace.load.sum() / topology.speeds.sum())


def lower_bound(trace: RoutingTrace, topology: Topology) -> float:
    """Return a bound no placement of whole experts can beat: perfect balance, or the hottest expert alone."""
    speeds = topology.speeds
    balanced_SL = trace.load.sum(axis=2) / speeds.sum()
    return float(np.maximum(balanced_SL, trace.load.max(axis=2) / speeds.max()).sum())
