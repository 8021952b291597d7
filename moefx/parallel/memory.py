"""What a layer remembers of the last step in which its rows were counted, and what later steps do with it.

Between two steps of a sampler hardly any choice changes. *Delta* steps send every row where it went then, without
counting and without waiting for the device, and rows whose choice changed a second time, where they belong now; results
are exact. *Frozen* steps keep the choice itself and need no router; *stale* steps take the experts' result of the step
before, so that their own rows travel behind everything else: both change the results.

Legend: T tokens, K slots per token, R = T·K rows, G ranks, D width, A rows that arrive here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moefx import ops
from moefx.errors import PlanError
from moefx.parallel.exchange import sorted_rows
from moefx.parallel.packed import Rest


class Kept(NamedTuple):
    """One step's way of rows: slots and gates ``[T, K]``, order ``[R]``, splits, local slots ``[A, 1]``."""

    slots: Tensor
    gates: Tensor
    order: Tensor
    sent: list[int]
    received: list[int]
    arrived: Tensor


class Memory:
    """Of one layer, between steps.

    Attributes:
        kept: the last counted step's way of rows, or None.
        output: the last step's weighted sums, or None.
        overflowed: rows of some rank did not fit in the last step.
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.output: Tensor | None = None
        self.overflowed = False

    def forget(self) -> None:
        """Start anew: the next step counts."""
        self.kept, self.output, self.overflowed = None, None, False

    def __repr__(self) -> str:
        return "memory"


def keep(
    memory: Memory, slots: Tensor, gates: Tensor, order: Tensor, sent: list[int], received: list[int], arrived: Tensor
) -> None:
    """Remember the way of rows of this step."""
    memory.kept = Kept(slots.detach(), gates.detach(), order, list(sent), list(received), arrived)
    memory.overflowed = False


def recall(memory: Memory, x_TD: Tensor) -> Kept:
    """Return the way of rows that is kept.

    Raises:
        PlanError: nothing is, or it is of another number of tokens.
    """
    if memory.kept is None or len(memory.kept.slots) != len(x_TD):
        known = "nothing" if memory.kept is None else f"the way of {len(memory.kept.slots)} tokens"
        raise PlanError(
            "send rows as in the step before",
            found=f"{known} kept, {len(x_TD)} tokens now",
            do="call forget() on the program, on every rank, when another batch begins",
        )
    return memory.kept


def changed(kept: Kept, slots_TK: Tensor, nowhere: int) -> Tensor:
    """Return the slots that a token did not have then, in whatever place; ``nowhere`` for the others."""
    return torch.where(_same(kept, slots_TK).any(dim=1), nowhere, slots_TK)


def unchanged_rows(kept: Kept, x_TD: Tensor) -> Tensor:
    """Return the rows that leave as they did then."""
    return sorted_rows(x_TD, kept.order, kept.slots.shape[1])[: sum(kept.sent)]


def unchanged_sum(kept: Kept, back_RD: Tensor, slots_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Return the weighted sums over the slots that a token still has."""
    gates_TK = (_same(kept, slots_TK) * gates_TK.unsqueeze(1)).sum(dim=2)
    dropped = back_RD.new_zeros((len(kept.order) - len(back_RD), back_RD.shape[1]))
    return ops.combine(torch.cat([back_RD, dropped]), kept.order, gates_TK)


def _same(kept: Kept, slots_TK: Tensor) -> Tensor:
    """Return which slot of then is which slot of now, ``[T, K, K]``."""
    return kept.slots.unsqueeze(2) == slots_TK.unsqueeze(1)


def note(memory: Memory, rest: Rest) -> Rest:
    """Remember whether rows did not fit, and return what did not."""
    memory.overflowed = rest is not None
    return rest


def previous(memory: Memory, x_TD: Tensor) -> Tensor:
    """Return the sums of the step before.

    Raises:
        PlanError: there are none of as many tokens.
    """
    if memory.output is None or len(memory.output) != len(x_TD):
        known = "none" if memory.output is None else f"that of {len(memory.output)} tokens"
        raise PlanError(
            "use the experts' result of the step before",
            found=f"{known} kept, {len(x_TD)} tokens now",
            do="call forget() on the program, on every rank, when another batch begins",
        )
    return memory.output


def remember_output(memory: Memory, y_TD: Tensor, read: Tensor | None) -> None:
    """Keep the sums of this step, after those of the step before were ``read``."""
    memory.output = y_TD.detach()
