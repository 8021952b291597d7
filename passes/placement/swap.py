"""Exchange two experts between two devices, best pairs first, until no exchange helps.

Legend: S noise levels, E experts of a layer, G devices, P pairs of experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.objective import device_load, layer_cost

Array = NDArray[np.float64]
IDs = NDArray[np.int64]

# A gain below rounding would let the search run in circles.
_SMALLEST_GAIN = 1e-12
_CHUNK = 4096
# Pairs tried after the best one before all pairs are priced again.
_PER_ROUND = 64


def improve(load_SE: Array, home_E: IDs, speeds: Array) -> IDs:
    """Return a placement that no single exchange improves, at least as good as ``home``.

    The cost is the sum over noise levels of the busiest device; with one level it is the busiest device itself. The
    number of experts per device does not change. Deterministic: ties go to the first pair.
    """
    home = home_E.copy()
    first_P, second_P = np.triu_indices(len(home), 1)
    cost = layer_cost(load_SE, home, speeds)
    while len(first_P):
        held_SG = device_load(load_SE, home, len(speeds))
        after_P = _costs(load_SE, home, held_SG, speeds, first_P, second_P)
        gains = np.flatnonzero(after_P < cost - _SMALLEST_GAIN * max(cost, 1.0))
        if not len(gains):
            if not _break_tie(load_SE, home, held_SG, speeds, first_P, second_P):
                break
            continue
        best = gains[np.argsort(after_P[gains], kind="stable")[:_PER_ROUND]]
        cost = _apply(load_SE, home, speeds, first_P[best], second_P[best], cost)
    return home


def _break_tie(load_SE: Array, home: IDs, held_SG: Array, speeds: Array, first_P: IDs, second_P: IDs) -> bool:
    """Relieve one of several equally busy devices, in place, if there is one level only; tell whether it was done.

    No exchange lowers the largest time while two devices have it, so the pair's own larger time is lowered instead.
    """
    if len(load_SE) > 1:
        return False
    time_G, load_E = held_SG[0] / speeds, load_SE[0]
    busiest = time_G[home] >= time_G.max() * (1 - _SMALLEST_GAIN)
    pairs = np.flatnonzero((home[first_P] != home[second_P]) & (busiest[first_P] != busiest[second_P]))
    a, b = first_P[pairs], second_P[pairs]
    g, h, moved_P = home[a], home[b], load_E[b] - load_E[a]
    after_P = np.maximum(time_G[g] + moved_P / speeds[g], time_G[h] - moved_P / speeds[h])
    best = int(after_P.argmin()) if len(pairs) else 0
    if not len(pairs) or after_P[best] >= time_G.max() * (1 - 1e-9):
        return False
    home[a[best]], home[b[best]] = h[best], g[best]
    return True


def _apply(load_SE: Array, home: IDs, speeds: Array, first_P: IDs, second_P: IDs, cost: float) -> float:
    """Exchange pairs in turn, in place, as long as they concern other devices and lower the cost; return it."""
    touched: set[int] = set()
    for a, b in zip(first_P, second_P, strict=True):
        devices = {int(home[a]), int(home[b])}
        if touched & devices:
            continue
        home[a], home[b] = home[b], home[a]
        after = layer_cost(load_SE, home, speeds)
        if after < cost:
            cost, touched = after, touched | devices
        else:
            home[a], home[b] = home[b], home[a]
    return cost


def _costs(load_SE: Array, home: IDs, held_SG: Array, speeds: Array, first_P: IDs, second_P: IDs) -> Array:
    """Return the cost after each exchange; infinite where both experts are on one device."""
    costs_P = np.full(len(first_P), np.inf)
    apart = np.flatnonzero(home[first_P] != home[second_P])
    time_SG = held_SG / speeds
    ranked_SG = np.argsort(-time_SG, axis=1)[:, :3]
    for start in range(0, len(apart), _CHUNK):
        pairs = apart[start : start + _CHUNK]
        a, b = first_P[pairs], second_P[pairs]
        g, h = home[a], home[b]
        moved_SP = load_SE[:, b] - load_SE[:, a]
        busiest_SP = np.maximum((held_SG[:, g] + moved_SP) / speeds[g], (held_SG[:, h] - moved_SP) / speeds[h])
        costs_P[pairs] = np.maximum(busiest_SP, busiest_of_others(time_SG, ranked_SG, g, h)).sum(axis=0)
    return costs_P


def busiest_of_others(time_SG: Array, ranked_SG: IDs, g: IDs, h: IDs) -> Array:
    """Return the time of the busiest device other than ``g`` and ``h``, ``[S, P]``: among the three busiest of all."""
    found = np.zeros((time_SG.shape[0], len(g)))
    for rank in reversed(range(ranked_SG.shape[1])):
        device_S1 = ranked_SG[:, rank : rank + 1]
        other = (device_S1 != g) & (device_S1 != h)
        found = np.where(other, np.take_along_axis(time_SG, device_S1, axis=1), found)
    return found
