"""Taking tokens out of a sequence and putting them back; what belongs to them by position follows.

Legend: B samples, T tokens, D width, C selected tokens per sample, S further tokens of a joint sequence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Joint = Literal["", "first", "last"]


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Return the selected tokens ``[B, C, ...]`` of per-sample values ``[B, T, ...]``; ``index`` is ``[B, C]``."""
    rows = values.flatten(0, 1).index_select(0, _flat(index, values.shape[1]))
    return rows.reshape(*index.shape, *values.shape[2:])


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``[B, C, ...]``: for each sample its selected rows of a table ``[T, ...]`` that all samples share."""
    return table[index]


def put_tokens(values: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """Return ``values`` ``[B, T, ...]`` with ``tokens`` ``[B, C, ...]`` at the positions ``index`` ``[B, C]``."""
    flat = values.flatten(0, 1).index_copy(0, _flat(index, values.shape[1]), tokens.flatten(0, 1).to(values.dtype))
    return flat.reshape(values.shape)


def _flat(index: Tensor, total: int) -> Tensor:
    """Turn positions within samples into rows of the flattened batch ``[B · C]``."""
    first = torch.arange(index.shape[0], device=index.device) * total
    return (index + first.unsqueeze(1)).flatten()


def follow(values: Tensor, index: Tensor, x: Tensor, axes: tuple[int, ...], ndim: int, joint: Joint = "") -> Tensor:
    """Return ``values`` for the selected tokens alone: rotary tables, masks and modulations go with their tokens.

    Args:
        values: broadcastable against ``[B, ...]`` with ``ndim`` axes; without a batch axis, or of size 1 in it, all
            samples share them.
        index: ``[B, C]`` positions.
        x: ``[B, T, D]``, the sequence before the selection.
        axes: axes with one entry per token, counted from the back.
        ndim: the number of axes that the block works with.
        joint: the axes also have S entries of other tokens, which stay: those of the selection come ``first`` or
            ``last`` among the T + S.

    Returns:
        ``[B, ...]`` with C, or C + S, entries on ``axes``.
    """
    values = values.reshape((1,) * (ndim - values.ndim) + values.shape)
    values = values.expand(index.shape[0], *values.shape[1:])
    for axis in axes:
        where = _joined(index, x.shape[1], values.shape[axis] - x.shape[1], joint)
        sizes, ones = list(values.shape), [1] * ndim
        ones[0], ones[axis] = where.shape[0], where.shape[1]
        sizes[axis] = where.shape[1]
        # take_along_dim would tie a compiled graph to one batch size.
        values = values.gather(axis, where.view(ones).expand(sizes))
    return values


def _joined(index: Tensor, total: int, others: int, joint: Joint) -> Tensor:
    """Return the positions of the selected and of all other tokens in a joint sequence."""
    if not joint:
        return index
    start = total if joint == "first" else 0
    kept = torch.arange(start, start + others, device=index.device).expand(index.shape[0], others)
    return torch.cat([index, kept] if joint == "first" else [kept, index + others], dim=1)


def spread(total: int, device: torch.device | None = None) -> Tensor:
    """Return an order of T positions ``[T]`` of which every beginning is spread evenly (multiples of the golden ratio).

    For ties: a router that starts at zero has nothing else, and the first C tokens of an image are its top.
    """
    return (torch.arange(total, dtype=torch.float64, device=device) * 0.6180339887498949).frac().argsort(stable=True)
