"""What the nodes of a distributed graph call: small steps between two exchanges, without a collective of their own.

Legend: T tokens, K slots per token, R = T·K rows, G ranks, E experts, C copies of an expert, D width, A rows that
arrive here, P pairs of a token and a rank that holds one of its slots, r parts of the tokens, S slots of all ranks, s
of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moefx import ops
from moefx.parallel.divided import DividedExperts, flat_rows
from moefx.parallel.exchange import Flight, arrive, launch, sorted_rows
from moefx.parallel.roster import Roster

Sizes = list[list[list[int]]]


def counts_of(offsets: Sequence[Tensor]) -> Tensor:
    """Return the rows of each slot in each part, ``[S·r]``: one exchange serves all parts."""
    return torch.stack([part.diff() for part in offsets], dim=1).flatten()


def splits_of(offsets: Sequence[Tensor], arrived: Tensor, bounds: Tensor | None) -> Sizes:
    """Return the rows that leave for and come from each rank in each part, ``[2][r][G]``; waits for the device.

    Args:
        offsets: of each part, ends of the rows of each slot ``[S+1]``, or of each rank ``[G+1]``.
        arrived: counts of all ranks.
        bounds: ends of the slots of each rank; None if ``offsets`` are those of ranks.
    """
    leaving = torch.stack([(part if bounds is None else part[bounds]).diff() for part in offsets])
    coming = arrived.view(leaving.shape[1], -1, len(offsets)).sum(dim=1).T
    sizes: Sizes = torch.stack([leaving, coming]).tolist()
    return sizes


def leaving_rows(x_TD: Tensor, order_R: Tensor, k: int, sent: Sequence[int]) -> Tensor:
    """Return the rows that leave, in the order of their receivers."""
    rows_RD = sorted_rows(x_TD, order_R, k)
    return torch.split(rows_RD, [sum(sent), len(order_R) - sum(sent)])[0]


def local_slots(arrived: Tensor, ranks: int, parts: int, part: int, total: Sequence[int]) -> Tensor:
    """Return the slot of each row that arrived in one part, ``[A, 1]``: by sender, then by slot."""
    counts_Gs = arrived.view(ranks, -1, parts)[:, :, part]
    slot_of_count = torch.arange(counts_Gs.shape[1], device=arrived.device).repeat(ranks)
    return slot_of_count.repeat_interleave(counts_Gs.reshape(-1), output_size=sum(total)).unsqueeze(1)


def some(weight: Tensor) -> Tensor:
    """Return stacked weights, with one of zeros where a rank holds none: rows may be none, their gradients must go."""
    return weight if len(weight) else torch.cat([weight, weight.new_zeros((1, *weight.shape[1:]))])


def in_order_of_arrival(rows_AD: Tensor, order_A: Tensor) -> Tensor:
    """Return sorted rows as they arrived."""
    ones = torch.ones((len(order_A), 1), dtype=torch.promote_types(rows_AD.dtype, torch.float32), device=rows_AD.device)
    return ops.combine(rows_AD, order_A, ones)


def at_home(back_RD: Tensor, order_R: Tensor, gates_TK: Tensor) -> Tensor:
    """Return the weighted sums of rows that came back; slots that went nowhere count nothing."""
    dropped = back_RD.new_zeros((len(order_R) - len(back_RD), back_RD.shape[1]))
    return ops.combine(torch.cat([back_RD, dropped]), order_R, gates_TK)


def pairs_of(slots_TK: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens each rank needs, each once.

    Returns:
        the token of each pair ``[P]``, by rank and then by token; the slot of the receiver that each slot of the token
        has there ``[P, K]``, -1 for none; and the end of each rank's pairs ``[G+1]``.
    """
    ranks = len(bounds) - 1
    rank_TK = torch.searchsorted(bounds, slots_TK, right=True) - 1  # G for slots that go nowhere
    wanted_TG = slots_TK.new_zeros((slots_TK.shape[0], ranks + 1), dtype=torch.bool)
    wanted_TG.scatter_(1, rank_TK.clamp(max=ranks), True)
    rank_P, token_P = wanted_TG[:, :ranks].T.nonzero(as_tuple=True)
    here_PK = rank_TK[token_P] == rank_P.unsqueeze(1)
    slots_PK = torch.where(here_PK, slots_TK[token_P] - bounds[rank_P].unsqueeze(1), -1)
    ends = torch.searchsorted(rank_P, torch.arange(ranks + 1, device=rank_P.device))
    return token_P, slots_PK.to(torch.int32), ends


def gates_of(gates_TK: Tensor, token_P: Tensor, slots_PK: Tensor) -> Tensor:
    """Return the gates of each pair, zero for slots of other ranks."""
    return gates_TK.index_select(0, token_P) * (slots_PK >= 0)


def sum_by_rank(back_PD: Tensor, token_P: Tensor, sent: Sequence[int], x_TD: Tensor) -> Tensor:
    """Return the sum of the ranks' sums for each token; a token is at most once in each part, so nothing races."""
    wide = torch.promote_types(back_PD.dtype, torch.float32)
    y_TD = back_PD.new_zeros((x_TD.shape[0], back_PD.shape[1]), dtype=wide)
    for tokens, part in zip(torch.split(token_P, list(sent)), torch.split(back_PD, list(sent)), strict=True):
        y_TD = y_TD.index_add(0, tokens, part.to(wide))
    return y_TD.to(back_PD.dtype)


class CopiedWeights:
    """Weights of copies of one layer, kept between calls without gradients until the layer forgets them.

    Args:
        layer: the divided experts; None in a graph that is not executed.
        leaving: which of this rank's experts each rank has a copy of, as rows of the stacked weights, in one list.
        sent: how many for each rank.
        received: how many copies here come from each rank.
        order: places of the copies here, ascending, among what arrives.
    """

    def __init__(
        self, layer: DividedExperts | None, leaving: list[int], sent: list[int], received: list[int], order: list[int]
    ) -> None:
        self.layer, self.leaving, self.order = layer, leaving, order
        self.sent, self.received = sent, received

    @classmethod
    def of(cls, layer: DividedExperts | None, roster: Roster, rank: int) -> CopiedWeights:
        """Read who sends what to whom off a roster."""
        mine = {expert: i for i, expert in enumerate(roster.homes[rank])}
        wanted = [[mine[e] for e in copies if e in mine] for copies in roster.copies]
        ours = roster.copies[rank]
        arriving = [[e for e in ours if e in set(home)] for home in roster.homes]
        place = {expert: i for i, expert in enumerate(e for rank in arriving for e in rank)}
        leaving = [i for rank in wanted for i in rank]
        return cls(layer, leaving, [len(r) for r in wanted], [len(r) for r in arriving], [place[e] for e in ours])

    def __repr__(self) -> str:
        return f"copies({sum(self.sent)} sent, {sum(self.received)} received)"


def begin_copies(copies: CopiedWeights, name: str, own: Tensor) -> Flight | None:
    """Begin to send weights to copies of this rank's experts; nothing if all ranks still have them."""
    layer = copies.layer
    assert layer is not None
    if torch.is_grad_enabled():
        layer._copied = None
    elif name in (layer._copied or {}):
        return None
    chosen = torch.tensor(copies.leaving, dtype=torch.int64, device=own.device)
    return launch(flat_rows(own)[chosen], copies.sent, copies.received, layer.group)


def end_copies(copies: CopiedWeights, name: str, own: Tensor, flight: Flight | None) -> Tensor:
    """Return this rank's weights followed by those of its copies."""
    layer = copies.layer
    assert layer is not None
    if flight is None:
        return torch.cat([own, (layer._copied or {})[name]])
    arrived = arrive(flight, copies.sent, copies.received, layer.group)
    order = torch.tensor(copies.order, dtype=torch.int64, device=own.device)
    copied = arrived[order].reshape(len(order), *own.shape[1:])
    if not torch.is_grad_enabled():
        layer._copied = (layer._copied or {}) | {name: copied}
    return torch.cat([own, copied])


def part_of(tensor: Tensor, parts: int, index: int) -> Tensor:
    """Return one part of the tokens."""
    return tensor.tensor_split(parts)[index]


def as_ids(slots_AK: Tensor) -> Tensor:
    """Return slots as the dialect sorts them."""
    return slots_AK.to(torch.int64)


def joined(parts: Sequence[Any]) -> Tensor:
    """Return the parts of the tokens as one."""
    return torch.cat(list(parts))
