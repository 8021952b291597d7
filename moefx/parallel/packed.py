"""Exchanges of a size that is known before the run, and a second one for what did not fit, if any rank has such rows.

Rows for rank g lie in ``caps[g]`` places of the message, the rest of which is empty. What each rank has for each slot
travels beside it, with one number more that says whether its rows fitted; so all ranks know together whether a second
exchange is made, and nobody waits for the device before the first.

Legend: T tokens, K slots per token, R = T·K rows, G ranks, D width, S slots of all ranks, s of this rank, c places from
each rank here, C places in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moefx import ops
from moefx.parallel.exchange import Flight, arrive, launch

Rest = tuple[list[int], list[int]] | None


def counts_with_flag(offsets: Tensor, bounds: Tensor, caps: Sequence[int]) -> Tensor:
    """Return, for each rank, the rows of each of its slots, and whether rows of this rank do not fit anywhere."""
    counts_S, leaving_G = offsets.diff(), offsets[bounds].diff()
    over = (leaving_G > leaving_G.new_tensor(caps)).any().to(counts_S.dtype).expand(len(caps))
    per_rank = torch.cat([counts_S, over])
    slots = torch.arange(len(counts_S), device=offsets.device)
    rank_S = torch.searchsorted(bounds, slots, right=True) - 1
    order = torch.cat([rank_S, torch.arange(len(caps), device=offsets.device)]).sort(stable=True).indices
    return per_rank[order]


def pack(x_TD: Tensor, order_R: Tensor, offsets: Tensor, bounds: Tensor, caps: Sequence[int], k: int) -> Tensor:
    """Return the message ``[C, D]``."""
    rank_C, place_C = _places(caps, x_TD.device)
    starts_G, leaving_G = offsets[bounds[:-1]], offsets[bounds].diff()
    row_C = (starts_G[rank_C] + place_C).clamp(max=max(len(order_R) - 1, 0))
    filled_C = place_C < leaving_G[rank_C]
    if not len(order_R):
        return x_TD.new_zeros((len(place_C), x_TD.shape[1])) + x_TD.sum(0)
    rows_CD = x_TD.index_select(0, order_R[row_C] // k)
    return torch.where(filled_C.unsqueeze(1), rows_CD, 0)


def slots_in(arrived: Tensor, ranks: int, places: int) -> Tensor:
    """Return the slot of each place of what arrives, ``[G·c, 1]``; -1 for empty ones."""
    counts_Gs = arrived.view(ranks, -1)[:, :-1]
    ends_Gs = counts_Gs.cumsum(1)
    place = torch.arange(places, device=arrived.device).expand(ranks, places).contiguous()
    slot_Gc = torch.searchsorted(ends_Gs, place, right=True)
    return torch.where(slot_Gc < counts_Gs.shape[1], slot_Gc, -1).reshape(-1, 1)


def rest_sizes(arrived: Tensor, offsets: Tensor, bounds: Tensor, caps: Sequence[int], places: int) -> Rest:
    """Return the rows that did not fit, to and from each rank; None if everyone's did. Waits for the device."""
    counts = arrived.view(len(caps), -1)
    if not bool(counts[:, -1].any()):
        return None
    leaving = (offsets[bounds].diff() - offsets.new_tensor(caps)).clamp(min=0)
    coming = (counts[:, :-1].sum(dim=1) - places).clamp(min=0)
    return leaving.tolist(), coming.tolist()


def rest_rows(x_TD: Tensor, order_R: Tensor, offsets: Tensor, bounds: Tensor, caps: Sequence[int], k: int) -> Tensor:
    """Return the rows that did not fit, by receiver."""
    starts, ends = offsets[bounds[:-1]].tolist(), offsets[bounds[1:]].tolist()
    parts = [torch.arange(min(a + c, b), b) for a, b, c in zip(starts, ends, caps, strict=True)]
    return x_TD.index_select(0, order_R[torch.cat(parts).to(order_R.device)] // k)


def launch_rest(
    rest: Rest, x_TD: Tensor, order_R: Tensor, offsets: Tensor, bounds: Tensor, caps: Sequence[int], k: int, group: Any
) -> Flight | None:
    """Begin the second exchange, if there is one."""
    if rest is None:
        return None
    return launch(rest_rows(x_TD, order_R, offsets, bounds, caps, k), *rest, group)


def arrive_rest(rest: Rest, flight: Flight | None, like_XD: Tensor, group: Any) -> Tensor:
    """End the second exchange; no rows if there is none."""
    if rest is None or flight is None:
        return like_XD[:0]
    return arrive(flight, *rest, group)


def return_rest(rest: Rest, rows_AD: Tensor, group: Any) -> Flight | None:
    """Begin to send the second exchange's rows back."""
    return None if rest is None else launch(rows_AD, rest[1], rest[0], group)


def returned_rest(rest: Rest, flight: Flight | None, like_XD: Tensor, group: Any) -> Tensor:
    """End that."""
    if rest is None or flight is None:
        return like_XD[:0]
    return arrive(flight, rest[1], rest[0], group)


def rest_slots(rest: Rest, arrived: Tensor, ranks: int, places: int) -> Tensor:
    """Return the slot of each row of the second exchange, ``[A, 1]``."""
    if rest is None:
        return arrived.new_empty((0, 1))
    most = places + max(rest[1])
    slots_Gc = slots_in(arrived, ranks, most).view(ranks, most)
    return torch.cat([slots_Gc[g, places : places + n] for g, n in enumerate(rest[1])]).unsqueeze(1)


def unpack(
    back_CD: Tensor,
    rest_XD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
    bounds: Tensor,
    caps: Sequence[int],
    gates_TK: Tensor,
) -> Tensor:
    """Return the weighted sums ``[T, D]`` of what came back in both exchanges."""
    row_R = torch.arange(len(order_R), device=order_R.device)
    starts_G, ends_G = offsets[bounds[:-1]], offsets[bounds[1:]]
    rank_R = torch.searchsorted(ends_G, row_R, right=True)
    known_R = rank_R.clamp(max=len(caps) - 1)
    cap_G = order_R.new_tensor(caps)
    place_R, cap_R = row_R - starts_G[known_R], cap_G[known_R]
    over_G = (ends_G - starts_G - cap_G).clamp(min=0)
    first_R = (cap_G.cumsum(0) - cap_G)[known_R] + place_R
    second_R = len(back_CD) + (over_G.cumsum(0) - over_G)[known_R] + place_R - cap_R
    nothing = len(back_CD) + len(rest_XD)
    source_R = torch.where(rank_R < len(caps), torch.where(place_R < cap_R, first_R, second_R), nothing)
    everything = torch.cat([back_CD, rest_XD, back_CD.new_zeros((1, back_CD.shape[1]))])
    return ops.combine(everything.index_select(0, source_R), order_R, gates_TK)


def _places(caps: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rank and the place of each row of a message."""
    sizes = torch.tensor(list(caps), dtype=torch.int64, device=device)
    rank_C = torch.repeat_interleave(torch.arange(len(caps), device=device), sizes, output_size=sum(caps))
    starts_G = sizes.cumsum(0) - sizes
    return rank_C, torch.arange(sum(caps), device=device) - starts_G[rank_C]
