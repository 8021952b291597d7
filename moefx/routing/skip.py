"""Running a block on the samples that take it, and on no others.

How many samples those are is known on the device. Where reading it costs nothing, on a CPU outside of compilation and
without gradients, a block runs on exactly its samples. Elsewhere shapes must not depend on it: without a capacity the
block runs on all samples and its gates say what becomes of the result; with one it runs on a fixed number of them.

Legend: B samples, T tokens, D width, m blocks, C samples that a block takes.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moefx import ops

Block = Callable[..., Any]


class Arguments(NamedTuple):
    """What of a block's arguments and result matters to who calls it on fewer samples.

    Attributes:
        streams: where its arguments have the streams ``[B, T, D]``: positions, or names.
        places: where its result has them, −1 for nowhere; none at all if it returns its one stream alone.
        rows: the leaves of its arguments with one row per sample, by number; None if that cannot be told.
    """

    streams: tuple[int | str, ...]
    places: tuple[int, ...]
    rows: tuple[int, ...] | None


def count_at(capacity: float, samples: int) -> int:
    """Return C = ⌈capacity · B⌉, an int, or a symbolic one for a symbolic batch."""
    share = Fraction(capacity).limit_denominator(10_000)
    return (samples * share.numerator + share.denominator - 1) // share.denominator


def within_capacity(wanted: Tensor, priority: Tensor, capacity: float) -> Tensor:
    """Return ``wanted`` ``[B, m]``, 1 or 0, with at most C ones per block: those of highest ``priority`` in [0, 1]."""
    order = (wanted * (1 + priority)).sort(dim=0, descending=True, stable=True).indices
    first = order[: count_at(capacity, wanted.shape[0])]
    return wanted * torch.zeros_like(wanted).scatter(0, first, 1.0)


def block_of_some(
    block: Block, gates: Tensor, index: int, capacity: float | None, streams: Any, places: Any, rows: Any
) -> Block:
    """Return what to call for a block: itself, or a function that runs it on some samples and hands the rest on.

    What `gate_block` makes of either is the same, as long as nobody needs the gradient of the samples left out.

    Args:
        block: one of m.
        gates: ``[B, m]``.
        index: which column.
        capacity: of the `BlockChoice` that made the gates.
        streams, places, rows: see `Arguments`.
    """
    known = Arguments(streams, places, rows)
    gate = gates[:, index].detach()
    if capacity is not None and rows is not None:
        best = gate.sort(descending=True, stable=True).indices
        return partial(_on_some, block, best[: count_at(capacity, gate.shape[0])], known)
    if not ops.unseen(gates) or gates.device.type != "cpu":
        return block
    taken = (gate > 0.5).nonzero().squeeze(1)
    if len(taken) == 0:
        return partial(_hand_on, known)
    return block if len(taken) == len(gate) or rows is None else partial(_on_some, block, taken, known)


def _hand_on(known: Arguments, *args: Any, **kwargs: Any) -> Any:
    return _put_together(known, _streams(known, args, kwargs))


def _on_some(block: Block, taken: Tensor, known: Arguments, *args: Any, **kwargs: Any) -> Any:
    """Run ``block`` on the samples ``taken`` ``[C]``."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    for i in known.rows or ():
        leaves[i] = leaves[i].index_select(0, taken)
    fewer, named = pytree.tree_unflatten(leaves, tree)
    result = block(*fewer, **named)
    made = [result] if not known.places else [result[place] if place >= 0 else None for place in known.places]
    before = _streams(known, args, kwargs)
    after = [x if y is None else x.index_copy(0, taken, y.to(x.dtype)) for x, y in zip(before, made, strict=True)]
    return _put_together(known, after)


def _streams(known: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [args[where] if isinstance(where, int) else kwargs[where] for where in known.streams]


def _put_together(known: Arguments, streams: list[Tensor]) -> Any:
    """Return the streams as the block does."""
    if not known.places:
        return streams[0]
    result: list[Any] = [None] * (max(known.places) + 1)
    for value, place in zip(streams, known.places, strict=True):
        if place >= 0:
            result[place] = value
    return tuple(result)
