"""Which process holds which experts of one layer, and which copy serves which row.

Legend: E experts, G ranks, C copies of an expert at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moefx.passes.placement import Placement

Numbers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Roster:
    """Experts by rank.

    Weights live where an expert's primary is; copies elsewhere are sent their weights. A *slot* is one holding of one
    expert: slots are numbered by rank, and within a rank the primaries come first, both kinds ascending.

    Args:
        homes: experts of each rank whose primary is there.
        copies: experts of each rank of which it has a copy.
        shares: fraction of each expert's rows that each rank computes, ``[E][G]``; empty if there are no copies.
        local_first: a row goes to a copy on its own rank where there is one.
    """

    homes: Numbers
    copies: Numbers
    shares: tuple[tuple[float, ...], ...] = ()
    local_first: bool = False

    @classmethod
    def of(cls, layout: Placement, layer: int) -> Roster:
        """Read one layer of a layout."""
        ranks = range(len(layout.devices))
        homes = tuple(tuple(layout.experts_of(layer, g).tolist()) for g in ranks)
        held = [tuple(np.flatnonzero(held_E).tolist()) for held_E in layout.holders(layer).T]
        copies = tuple(tuple(e for e in held[g] if e not in set(homes[g])) for g in ranks)
        if not any(copies):
            return cls(homes, copies)
        return cls(homes, copies, tuple(map(tuple, layout.shares(layer).tolist())), layout.local_first)

    @property
    def has_copies(self) -> bool:
        """Does any rank hold a copy?"""
        return any(self.copies)

    @property
    def slots_per_rank(self) -> list[int]:
        """Number of slots of each rank."""
        return [len(home) + len(copy) for home, copy in zip(self.homes, self.copies, strict=True)]

    def tables(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how rows that start on ``rank`` choose among the copies of their expert.

        Returns:
            The slot of each copy ``[E+1, C]``, the last row being for rows that go nowhere; and where along an
            expert's rows, from 0 to 1, each copy's part ends ``[E+1, C]``.
        """
        experts = sum(map(len, self.homes))
        slot_of: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
        slot = 0
        for g, (home, copy) in enumerate(zip(self.homes, self.copies, strict=True)):
            for expert in (*home, *copy):
                slot_of[expert].append((g, slot))
                slot += 1
        most = max(map(len, slot_of))
        slots, ends = np.full((experts + 1, most), slot, dtype=np.int64), np.ones((experts + 1, most))
        for expert, holders in enumerate(slot_of):
            own = [s for g, s in holders if g == rank]
            if len(holders) == 1 or (self.local_first and own):
                slots[expert] = own[0] if own else holders[0][1]
                continue
            parts = np.cumsum([self.shares[expert][g] for g, _ in holders])
            slots[expert, : len(holders)] = [s for _, s in holders]
            slots[expert, len(holders) :] = holders[-1][1]
            ends[expert, : len(holders)] = parts / parts[-1]
        return slots, ends
