"""Group the experts of one layer by how often tokens choose them together.

Legend: E experts, G devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IDs = NDArray[np.int64]

_SMALLEST_GAIN = 1e-12


def within(worth_EE: Array, home_E: IDs) -> float:
    """Return the worth of all pairs that live together."""
    return float(worth_EE[home_E[:, None] == home_E[None]].sum())


def regroup(worth_EE: Array, home_E: IDs, devices: int, fewest: int, most: int) -> IDs:
    """Return homes that no exchange of two experts and no move of one improves.

    Args:
        worth_EE: what each pair is worth on one device: symmetric with a zero diagonal.
        home_E: where it starts.
        devices: G.
        fewest: experts per device; a device never gets below it.
        most: experts per device.
    """
    home_E, smallest = home_E.copy(), _SMALLEST_GAIN * max(float(np.abs(worth_EE).sum()), 1e-300)
    everyone = np.arange(len(home_E))
    while True:
        pull_EG = worth_EE @ np.eye(devices)[home_E]
        gain_EG = pull_EG - pull_EG[everyone, home_E][:, None]
        swap_EE = gain_EG[:, home_E] + gain_EG[:, home_E].T - 2 * worth_EE
        swap_EE[home_E[:, None] == home_E[None]] = -np.inf
        counts_G = np.bincount(home_E, minlength=devices)
        may = (counts_G < most)[None] & (counts_G > fewest)[home_E][:, None]
        move_EG = np.where(may & (home_E[:, None] != np.arange(devices)), gain_EG, -np.inf)
        a, b = np.unravel_index(int(swap_EE.argmax()), swap_EE.shape)
        e, g = np.unravel_index(int(move_EG.argmax()), move_EG.shape)
        if max(swap_EE[a, b], move_EG[e, g]) <= smallest:
            return home_E
        if swap_EE[a, b] >= move_EG[e, g]:
            home_E[a], home_E[b] = home_E[b], home_E[a]
        else:
            home_E[e] = g
