"""Other ways to bring tokens to their experts: in chunks that overlap with computing, or once per rank.

Legend: T tokens of this rank, K slots per token, R = T·K rows, G ranks, D width, A rows that arrive here, P pairs of a
token and a rank that holds one of its slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.parallel.exchange import arrive, exchange, exchange_counts, launch, sorted_rows
from moefx.parallel.overlap import compute_ahead
from moefx.parallel.roster import Roster

Weights = dict[str, Tensor]
# What experts make of rows: stacked weights, x ``[A, D]``, the order of its (row, slot) pairs by expert, bounds, slots.
Rows = Callable[[Weights, Tensor, Tensor, Tensor, int], Tensor]


class Layer(Protocol):
    """What is needed of :class:`DividedExperts`."""

    roster: Roster
    rank: int
    group: str
    chunks: int
    meanwhile: tuple[nn.Module, ...]
    slot_bounds: Tensor

    def compute(self, weights: Weights, rows: Rows, rows_AD: Tensor, arrivals: Tensor, total: int) -> Tensor:
        """Run the experts of this rank on rows by sender and slot."""

    def local_sum(self, weights: Weights, rows: Rows, rows_AD: Tensor, slots_AK: Tensor, gates_AK: Tensor) -> Tensor:
        """Return the weighted sum over the slots of this rank."""


def send_in_chunks(
    layer: Layer, weights: Weights, rows: Rows, x_TD: Tensor, slots_TK: Tensor, gates_TK: Tensor
) -> Tensor:
    """Return the weighted sums, with the exchanges of one part of the tokens behind the computing of another.

    All parts are dispatched first, then each is computed when it has arrived, and sent back while the next computes;
    the backward pass does the same in reverse.
    """
    per_rank, r, k = layer.roster.slots_per_rank, layer.chunks, slots_TK.shape[1]
    groups = [ops.group(part, sum(per_rank)) for part in slots_TK.tensor_split(r)]
    counts = torch.stack([offsets.diff() for _, offsets in groups], dim=1)  # [slots, r]
    arrivals = exchange_counts(counts.flatten(), [n * r for n in per_rank], layer.rank, layer.group)
    arrivals = arrivals.view(len(per_rank), -1, r)
    sent = torch.stack([offsets[layer.slot_bounds].diff() for _, offsets in groups])
    sizes = torch.stack([sent, arrivals.sum(dim=1).T]).tolist()  # the one wait for the device
    flights = []
    for part_TD, (order_R, _), leaving, coming in zip(x_TD.tensor_split(r), groups, *sizes, strict=True):
        rows_RD = sorted_rows(part_TD, order_R, k)
        kept_RD, _ = torch.split(rows_RD, [sum(leaving), len(order_R) - sum(leaving)])
        flights.append(launch(kept_RD, leaving, coming, layer.group))
    for shared in layer.meanwhile:
        compute_ahead(shared, x_TD)
    returns = []
    for c, (flight, leaving, coming) in enumerate(zip(flights, *sizes, strict=True)):
        arrived_AD = arrive(flight, leaving, coming, layer.group)
        done_AD = layer.compute(weights, rows, arrived_AD, arrivals[:, :, c], sum(coming))
        returns.append(launch(done_AD, coming, leaving, layer.group))
    parts = []
    ends = zip(groups, gates_TK.tensor_split(r), returns, *sizes, strict=True)
    for (order_R, _), gates, flight, leaving, coming in ends:
        back_RD = arrive(flight, coming, leaving, layer.group)
        dropped = back_RD.new_zeros((len(order_R) - len(back_RD), back_RD.shape[1]))
        parts.append(ops.combine(torch.cat([back_RD, dropped]), order_R, gates))
    return torch.cat(parts)


def send_once(layer: Layer, weights: Weights, rows: Rows, x_TD: Tensor, slots_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Return the weighted sums; a token is sent to each rank at most once, and one sum comes back.

    Sums are made in at least float32 on each rank, travel in the dtype of the rows, and are added by rank.
    """
    bounds, ranks = layer.slot_bounds, len(layer.roster.homes)
    rank_TK = torch.searchsorted(bounds, slots_TK, right=True) - 1  # G for slots that go nowhere
    wanted_TG = x_TD.new_zeros((x_TD.shape[0], ranks + 1), dtype=torch.bool)
    wanted_TG.scatter_(1, rank_TK.clamp(max=ranks), True)
    rank_P, token_P = wanted_TG[:, :ranks].T.nonzero(as_tuple=True)  # by rank, then by token
    leaving = torch.bincount(rank_P, minlength=ranks)
    coming = exchange_counts(leaving, [1] * ranks, layer.rank, layer.group).flatten()
    sent, received = torch.stack([leaving, coming]).tolist()
    here_PK = rank_TK[token_P] == rank_P.unsqueeze(1)
    slots_PK = torch.where(here_PK, slots_TK[token_P] - bounds[rank_P].unsqueeze(1), -1)
    gates_PK = gates_TK.index_select(0, token_P) * here_PK
    arrived_AD = exchange(x_TD.index_select(0, token_P), sent, received, layer.group)
    slots_AK = exchange(slots_PK.to(torch.int32), sent, received, layer.group).to(torch.int64)
    gates_AK = exchange(gates_PK, sent, received, layer.group)
    sums_AD = layer.local_sum(weights, rows, arrived_AD, slots_AK, gates_AK)
    back_PD = exchange(sums_AD, received, sent, layer.group)
    wide = torch.promote_types(back_PD.dtype, torch.float32)
    y_TD = back_PD.new_zeros((x_TD.shape[0], back_PD.shape[1]), dtype=wide)
    for tokens, part in zip(torch.split(token_P, sent), torch.split(back_PD, sent), strict=True):
        y_TD = y_TD.index_add(0, tokens, part.to(wide))  # a token at most once in each part: nothing races
    return y_TD.to(back_PD.dtype)
