"""How much of the flow between layers changes device, and how often experts that fire together are apart.

Pairs of devices count by what a byte between them costs, the dearest pair as 1; where all pairs are alike this is the
share of the flow that moves.

Legend: L layers, E experts of a layer, G devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.topology import Topology

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


def nearness(topology: Topology) -> Array:
    """Return one minus the relative price of a byte between two devices, ``[G, G]``; one on the diagonal."""
    seconds_GG = topology.pair_seconds_per_byte
    return 1 - seconds_GG / max(float(seconds_GG.max()), np.finfo(np.float64).tiny)


def crossing(affinity: Array, experts: Sequence[int], homes: Sequence[IDs], near_GG: Array) -> float:
    """Return the share of the flow between layers that moves, weighted by the price of its way."""
    total = float(affinity.sum())
    kept = 0.0
    for i in range(len(homes) - 1):
        flow_EE = affinity[i, : experts[i], : experts[i + 1]]
        kept += float((flow_EE * near_GG[np.ix_(homes[i], homes[i + 1])]).sum())
    return 1 - kept / total if total > 0 else 0.0


def crossing_bound(affinity: Array, experts: Sequence[int], topology: Topology, slots: int) -> float:
    """Return a lower bound of :func:`crossing` with at most ``slots`` experts of a layer per device.

    Each expert keeps at most its ``slots`` largest flows, forward and backward; and the flow kept is at most ``slots``
    times the sum of the G largest singular values (von Neumann's trace inequality).
    """
    total, kept, devices = float(affinity.sum()), 0.0, len(topology)
    for i in range(len(experts) - 1):
        flow_EE = affinity[i, : experts[i], : experts[i + 1]]
        forward = np.sort(flow_EE, axis=1)[:, -slots:].sum()
        backward = np.sort(flow_EE, axis=0)[-slots:].sum()
        kept += float(min(forward, backward, _spectral(flow_EE, devices, slots)))
    near_GG = nearness(topology)
    apart = near_GG[~np.eye(devices, dtype=np.bool_)]
    cheapest = 1 - float(apart.max()) if len(apart) else 0.0
    return max(0.0, 1 - kept / total) * cheapest if total > 0 else 0.0


def _spectral(flow_EE: Array, devices: int, slots: int) -> float:
    singular = np.linalg.svd(flow_EE, compute_uv=False)
    plain = slots * singular[:devices].sum()
    if flow_EE.shape[0] != slots * devices or flow_EE.shape[1] != slots * devices:
        return float(plain)
    centred = flow_EE - flow_EE.mean(axis=0) - flow_EE.mean(axis=1, keepdims=True) + flow_EE.mean()
    rest = np.linalg.svd(centred, compute_uv=False)[: devices - 1].sum()
    return float(min(plain, flow_EE.sum() / devices + slots * rest))


def together(coactivation: Array, experts: Sequence[int], homes: Sequence[IDs]) -> float:
    """Return the share of pairs chosen by the same token that live on one device."""
    total, same = float(coactivation.sum()), 0.0
    for i, home_E in enumerate(homes):
        pairs_EE = coactivation[i, : experts[i], : experts[i]]
        same += float(pairs_EE[home_E[:, None] == home_E[None]].sum())
    return same / total if total > 0 else 0.0


def together_bounds(coactivation: Array, experts: Sequence[int], fewest: int, most: int) -> tuple[float, float]:
    """Return bounds of :func:`together` if every device holds between ``fewest`` and ``most`` experts of each layer."""
    total, low, high = float(coactivation.sum()), 0.0, 0.0
    for i, count in enumerate(experts):
        pairs_EE = coactivation[i, :count, :count]
        others = np.sort(pairs_EE + np.diag(np.full(count, np.inf)), axis=1)[:, :-1]
        low += float(others[:, : max(fewest - 1, 0)].sum())
        high += float(others[:, others.shape[1] - min(most - 1, others.shape[1]) :].sum())
    return (low / total, high / total) if total > 0 else (0.0, 0.0)
