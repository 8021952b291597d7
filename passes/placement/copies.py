"""Copies of hot experts: how many each gets, and on which devices, never two on one.

Legend: S noise levels, E experts of a layer, G devices, P pairs of copies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.errors import PlanError
from moefx.passes.placement.dims import Budget
from moefx.passes.placement.slots import equal_slots
from moefx.passes.placement.swap import busiest_of_others

Array = NDArray[np.float64]
IDs = NDArray[np.int64]
Held = NDArray[np.bool_]

_SMALLEST_GAIN = 1e-12
# After the greedy, so many times copies are taken from some of a few experts and given to others where that helps.
_ROUNDS, _CANDIDATES = 8, 2


def slots_with_spare(experts: int, devices: int, layer: int, budget: Budget) -> IDs:
    """Return the slots of each device ``[G]`` for experts and copies.

    Raises:
        PlanError: there would be more copies of the experts than devices to hold them.
    """
    slots_G = equal_slots(experts, devices, layer)
    if budget.spare is None:
        return np.minimum(slots_G + 1, experts)
    if int(slots_G.max()) + budget.spare > experts:
        most = experts - int(slots_G.max())
        raise PlanError(
            f"place copies of {experts} experts in {budget.spare} spare slots of each of {devices} devices",
            found=f"{experts + budget.spare * devices} slots; an expert has at most {devices} copies, one per device",
            do=f"use at most spare={most}" if most > 0 else "use more devices",
        )
    return slots_G + budget.spare


def replicate(load_SE: Array, slots_G: IDs, speeds: Array, *, equal: bool) -> Held:
    """Return which device holds which expert ``[E, G]``: spare slots go to the experts with most rows per copy.

    Args:
        load_SE: rows.
        slots_G: of each device.
        speeds: of the devices.
        equal: shares will stay equal, so the numbers of copies are refined for that.
    """
    counts_E = _count_copies(load_SE, int(slots_G.sum()), len(slots_G))
    held_EG = refine(load_SE, _pack(load_SE / counts_E, counts_E, slots_G, speeds), speeds)
    for _ in range(_ROUNDS if equal else 0):
        tried = [
            refine(load_SE, _pack(load_SE / counts, counts, slots_G, speeds), speeds)
            for counts in _copies_moved(load_SE, held_EG.sum(axis=1), len(slots_G))
        ]
        found = min([held_EG, *tried], key=lambda held: _peaks(load_SE, held, speeds))
        if found is held_EG:
            break
        held_EG = found
    return held_EG


def _peaks(load_SE: Array, held_EG: Held, speeds: Array) -> float:
    """Return the sum over noise levels of the busiest device's time."""
    return float((load_SE @ equal_shares(held_EG) / speeds).max(axis=1).sum())


def _copies_moved(load_SE: Array, counts_E: IDs, devices: int) -> list[IDs]:
    """Return other numbers of copies: one less of experts with many, one more of others with many rows per copy.

    The most rows per copy need not set the peak: two experts with more copies in all than there are devices meet on
    one. So one copy is moved, or one of each of several experts at a time.
    """
    rows_E = load_SE.sum(axis=0) / counts_E
    givers = [e for e in np.argsort(-counts_E, kind="stable")[:_CANDIDATES] if counts_E[e] > 1]
    takers = [e for e in np.argsort(-rows_E, kind="stable") if counts_E[e] < devices and e not in givers][:_CANDIDATES]
    moves = [([g], [t]) for g in givers for t in takers]
    if len(givers) == len(takers) > 1:
        moves.append((givers, takers))
    found = []
    for less, more in moves:
        counts = counts_E.copy()
        counts[less] -= 1
        counts[more] += 1
        found.append(counts)
    return found


def equal_shares(held_EG: Held) -> Array:
    """Return shares that are equal for all copies of an expert, ``[E, G]``."""
    return np.asarray(held_EG / held_EG.sum(axis=1, keepdims=True))


def primaries(held_EG: Held) -> IDs:
    """Return one holder of each expert ``[E]``, so that devices are the primary of nearly equally many."""
    home_E, taken_G = np.zeros(len(held_EG), dtype=np.int64), np.zeros(held_EG.shape[1], dtype=np.int64)
    for e in np.argsort(held_EG.sum(axis=1), kind="stable"):
        holders = np.flatnonzero(held_EG[e])
        home_E[e] = holders[np.argmin(taken_G[holders])]
        taken_G[home_E[e]] += 1
    return home_E


def _count_copies(load_SE: Array, slots: int, devices: int) -> IDs:
    """Return the number of copies of each expert ``[E]``; one more always goes to the one with most rows per copy."""
    rows_E, counts_E = load_SE.sum(axis=0), np.ones(load_SE.shape[1], dtype=np.int64)
    for _ in range(slots - len(counts_E)):
        counts_E[np.argmax(np.where(counts_E < devices, rows_E / counts_E, -1.0))] += 1
    return counts_E


def _pack(load_SE: Array, counts_E: IDs, slots_G: IDs, speeds: Array) -> Held:
    """Place copies, those with most rows first, each where the busiest device's times grow least."""
    held_EG = np.zeros((len(counts_E), len(slots_G)), dtype=np.bool_)
    rows_SG, free_G = np.zeros((load_SE.shape[0], len(slots_G))), slots_G.copy()
    unit = max(float(load_SE.mean()), np.finfo(np.float64).tiny)
    for e in np.argsort(-load_SE.max(axis=0), kind="stable"):
        for _ in range(counts_E[e]):
            if not (open_G := (free_G > 0) & ~held_EG[e]).any():
                _make_room(int(e), held_EG, free_G, rows_SG, load_SE)
                open_G = (free_G > 0) & ~held_EG[e]
            time_SG = (rows_SG + load_SE[:, e, None]) / speeds / unit
            busiest_S1 = (rows_SG / speeds / unit).max(axis=1, keepdims=True)
            cost_G = np.maximum(time_SG, busiest_S1).sum(axis=0) + 1e-6 * np.square(time_SG).sum(axis=0)
            device = int(np.where(open_G, cost_G, np.inf).argmin())
            held_EG[e, device] = True
            rows_SG[:, device] += load_SE[:, e]
            free_G[device] -= 1
    return held_EG


def _make_room(expert: int, held_EG: Held, free_G: IDs, rows_SG: Array, load_SE: Array) -> None:
    """Move a copy of another expert to a device with a free slot, so that one without ``expert`` has room; in place."""
    to = int(np.argmax(free_G))
    for device in np.flatnonzero(~held_EG[expert]):
        movable = np.flatnonzero(held_EG[:, device] & ~held_EG[:, to])
        if len(movable):
            other = movable[np.argmin(load_SE.sum(axis=0)[movable])]
            held_EG[other, device], held_EG[other, to] = False, True
            for g, sign in ((device, -1), (to, 1)):
                rows_SG[:, g] += sign * load_SE[:, other]
                free_G[g] -= sign
            return


def refine(load_SE: Array, held_EG: Held, speeds: Array) -> Held:
    """Exchange copies between the busiest device and another, as long as that gains."""
    held_EG = held_EG.copy()
    while True:
        shares_EG = equal_shares(held_EG)
        time_SG = load_SE @ shares_EG / speeds
        cost = float(time_SG.max(axis=1).sum())
        hot = int(np.bincount(time_SG.argmax(axis=1), weights=time_SG.max(axis=1), minlength=len(speeds)).argmax())
        found = _best_exchange(load_SE, held_EG, speeds, time_SG, hot)
        if found is None or found[0] >= cost - _SMALLEST_GAIN * max(cost, 1.0):
            return held_EG
        _, a, b, other = found
        held_EG[a, hot], held_EG[a, other] = False, True
        held_EG[b, other], held_EG[b, hot] = False, True


def _best_exchange(
    load_SE: Array, held_EG: Held, speeds: Array, time_SG: Array, hot: int
) -> tuple[float, int, int, int] | None:
    """Return the cost after the best exchange of expert a on ``hot`` for b on another device, with both and it."""
    a_P, b_P, g_P = _pairs(held_EG, hot)
    if not len(a_P):
        return None
    per_copy_SE = load_SE / held_EG.sum(axis=1)
    moved_SP = per_copy_SE[:, b_P] - per_copy_SE[:, a_P]
    here_SP = time_SG[:, hot, None] + moved_SP / speeds[hot]
    there_SP = time_SG[:, g_P] - moved_SP / speeds[g_P]
    ranked_SG = np.argsort(-time_SG, axis=1)[:, :3]
    others_SP = busiest_of_others(time_SG, ranked_SG, np.full(len(g_P), hot), g_P)
    cost_P = np.maximum(np.maximum(here_SP, there_SP), others_SP).sum(axis=0)
    best = int(cost_P.argmin())
    return float(cost_P[best]), int(a_P[best]), int(b_P[best]), int(g_P[best])


def _pairs(held_EG: Held, hot: int) -> tuple[IDs, IDs, IDs]:
    """Return experts a on ``hot`` and b on another device g such that neither device holds the other's."""
    mine = np.flatnonzero(held_EG[:, hot])
    b, g = np.nonzero(held_EG & ~held_EG[:, hot, None])
    a_P, k_P = np.repeat(mine, len(b)), np.tile(np.arange(len(b)), len(mine))
    b_P, g_P = b[k_P], g[k_P]
    fits = ~held_EG[a_P, g_P]
    return a_P[fits], b_P[fits], g_P[fits]
