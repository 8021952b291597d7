"""Which experts stay on the device: a cache whose future is known, filled once.

A denoiser visits its layers in the same order at every step, and with many tokens nearly every expert of a layer each
time. For such cyclic accesses a least-recently-used cache that is smaller than the whole has no hits at all; the
optimal policy that may bypass the cache (Belady, 1966) comes down to keeping a fixed part and streaming the rest.

Legend: L routed layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefx.errors import PlanError
from moefx.passes.placement import RoutingTrace

Pins = tuple[tuple[int, ...], ...]


def choose_pins(experts: Sequence[int], expert_bytes: Sequence[int], room: int, trace: RoutingTrace | None) -> Pins:
    """Return the experts of each layer that stay, ascending.

    An expert that is used at s noise levels saves s loads of its bytes per run and costs its bytes: the order is by s.
    Equals are taken from all layers in turn, so that every layer's computation hides equally much loading.

    Args:
        experts: E of each layer.
        expert_bytes: bytes of one expert of each layer.
        room: bytes that may be taken.
        trace: at which noise levels each expert received rows; without it all count the same.
    """
    uses = [np.ones(n) if trace is None else (trace.layer(i) > 0).sum(axis=0) for i, n in enumerate(experts)]
    return most_used(uses, expert_bytes, room)


def most_used(uses: Sequence[NDArray[Any]], expert_bytes: Sequence[int], room: int) -> Pins:
    """Return the experts of each layer that stay, given how often each is used ``[E]``; see :func:`choose_pins`."""
    order = []
    for layer, uses_E in enumerate(uses):
        turn: dict[float, int] = {}
        for expert in np.argsort(-uses_E, kind="stable"):
            times = float(uses_E[expert])
            turn[times] = turn.get(times, -1) + 1
            order.append((-times, turn[times], layer, int(expert)))
    kept: list[list[int]] = [[] for _ in uses]
    for _, _, layer, expert in sorted(order):
        if expert_bytes[layer] <= room:
            room -= expert_bytes[layer]
            kept[layer].append(expert)
    return tuple(tuple(sorted(chosen)) for chosen in kept)


def room_for_pins(asked: str, budget: int, shared: int, slot: int, staging: int) -> int:
    """Return the bytes left for experts that stay.

    Raises:
        PlanError: not even the weights that always stay and the staging slots fit.
    """
    needed = shared + staging * slot
    if budget < needed:
        least = shared + 2 * slot
        fewer = f", or staging=2 with a budget of {least:,} bytes" if staging > 2 else ""
        raise PlanError(
            asked,
            found=f"{shared:,} bytes of weights that are no routed experts and {staging} staging slots of {slot:,} "
            f"bytes: the budget is short by {needed - budget:,} bytes",
            do=f"use a budget of at least {needed:,} bytes{fewer}",
        )
    return budget - needed
