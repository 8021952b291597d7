"""The bytes that travel between devices, to the byte, if the choices of every token are known.

A trace holds counts, from which :func:`predict` estimates; here are the three ways of rows themselves: ``home``, each
row to its expert and back; ``once``, a token to each device at most once, and one sum back; ``floating``, a token stays
where most of its experts are until the next layer, and goes home after the last. Numbers that travel with rows count:
experts and gates of a token, its origin, and what devices tell each other before each exchange.

Legend: T tokens of a device, L layers, K experts per token, E experts, G devices, N all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefx.errors import OptionError, PlanError
from moefx.passes.placement.dims import ModelDims
from moefx.passes.placement.placement import Placement

Array = NDArray[np.float64]
IDs = NDArray[np.integer[Any]]
WAYS = ("home", "once", "floating")
COUNT_BYTES, NUMBER_BYTES = 8, 4


def wire_bytes(
    choices: Sequence[IDs],
    layout: Placement,
    dims: ModelDims,
    way: str = "home",
    *,
    gate_bytes: int = 4,
    carried: Sequence[int] | None = None,
) -> Array:
    """Return the bytes that each device sends to each other in one forward pass ``[G, G]``, zero on the diagonal.

    Args:
        choices: expert numbers ``[T, L, K]`` of the tokens of each device; one outside its layer goes nowhere.
        layout: who holds what, without copies.
        dims: sizes of rows.
        way: ``"home"``, ``"once"`` or ``"floating"``.
        gate_bytes: of one gate: 4, or 8 in models of float64.
        carried: for ``"floating"``, bytes that a token takes along to each layer, and then home: what the layer reads
            and what is read later; ``[L + 1]``, by default one row each time.

    Raises:
        OptionError: another way.
        PlanError: the sizes of rows are unknown, or experts have copies.
    """
    dims.need_rows("count the bytes of a placement")
    if way not in WAYS:
        raise OptionError("count the bytes of a placement", found=f"way = {way!r}", do=f"use one of {', '.join(WAYS)}")
    if layout.replicas:
        found = f"{len(layout.replicas)} copies of experts"
        raise PlanError("count the bytes of a placement", found=found, do="use a layout without copies")
    devices = len(layout.devices)
    held = [_holders(choices, np.asarray(row), devices, i) for i, row in enumerate(layout.primary)]
    home_N = np.repeat(np.arange(devices), [len(part) for part in choices])
    k = choices[0].shape[2]
    if way == "floating":
        sizes = list(carried or (*dims.row_bytes, dims.return_bytes[-1] if dims.return_bytes else dims.row_bytes[-1]))
        found_GG = _floating(held, home_N, dims, sizes, k, gate_bytes)
    else:
        found_GG = np.zeros((devices, devices))
        for i, count_NG in enumerate(held):
            sent_NG = count_NG if way == "home" else np.minimum(count_NG, 1)
            rows_GG = _pairs(home_N, sent_NG, devices)
            extra = 0 if way == "home" else k * (NUMBER_BYTES + gate_bytes)
            told_G = layout.counts(i) if way == "home" else np.ones(devices)
            found_GG += rows_GG * (dims.row_bytes[i] + extra) + rows_GG.T * dims.back_bytes(i)
            found_GG += COUNT_BYTES * told_G[None, :]
    np.fill_diagonal(found_GG, 0)
    return found_GG


def next_owner(count_NG: IDs, at_N: IDs) -> IDs:
    """Return where each token goes: where most of its experts are; among equals stay, or take the next one around."""
    devices = count_NG.shape[1]
    turn_NG = (np.arange(devices) - at_N[:, None]) % devices
    return np.asarray((count_NG * devices - turn_NG).argmax(axis=1))


def _holders(choices: Sequence[IDs], home_E: IDs, devices: int, layer: int) -> IDs:
    """Return how many of the experts that each token chose each device holds, ``[N, G]``."""
    chosen_NK = np.concatenate([part[:, layer] for part in choices])
    padded_E = np.append(home_E, devices)  # the last number is that of slots that go nowhere
    known = (chosen_NK >= 0) & (chosen_NK < len(home_E))
    at_NK = padded_E[np.where(known, chosen_NK, len(home_E))]
    return np.asarray((at_NK[:, :, None] == np.arange(devices)).sum(axis=1))


def _pairs(from_N: IDs, count_NG: IDs, devices: int) -> Array:
    rows_GG = np.zeros((devices, devices))
    np.add.at(rows_GG, from_N, count_NG)
    return rows_GG


def _floating(held: list[IDs], home_N: IDs, dims: ModelDims, carried: Sequence[int], k: int, gate_bytes: int) -> Array:
    devices = held[0].shape[1]
    found_GG, at_N, one_GG = np.zeros((devices, devices)), home_N, np.eye(devices, dtype=np.int64)
    chosen = k * (NUMBER_BYTES + gate_bytes)
    for i, count_NG in enumerate(held):
        owner_N = next_owner(count_NG, at_N)
        # With a row go its origin, two numbers, and what it chose.
        found_GG += _pairs(at_N, one_GG[owner_N], devices) * (carried[i] + 2 * NUMBER_BYTES + chosen) + COUNT_BYTES
        if k > 1:
            helped_NG = (count_NG > 0) & (np.arange(devices) != owner_N[:, None])
            to_help_GG = _pairs(at_N, helped_NG, devices)
            found_GG += to_help_GG * (dims.row_bytes[i] + NUMBER_BYTES + chosen) + COUNT_BYTES
            found_GG += _pairs(owner_N, helped_NG, devices).T * dims.back_bytes(i)
        at_N = owner_N
    home_GG = _pairs(at_N, one_GG[home_N], devices)
    return found_GG + home_GG * (carried[-1] + NUMBER_BYTES) + COUNT_BYTES
