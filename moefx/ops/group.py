"""``moefx::group``: sort (token, slot) pairs by expert.

Shapes: ``T`` tokens, ``K`` slots per token, ``R = T*K`` routed rows, ``E`` experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moefx.ops._checks import INDEX_DTYPES, refuse

# numpy sorts keys of at most 16 bits by radix, ten times faster than torch.sort at 8192 keys on CPU.
_RADIX_KEYS = np.iinfo(np.uint16).max


def group(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the (token, slot) pairs by expert; pairs of one expert stay in token order.

    Args:
        experts_TK: expert ids ``[T, K]`` of any integer dtype. An id outside ``[0, num_experts)`` sends its pair to
            the tail: a dropped slot, or an expert without weights.
        num_experts: ``E``.

    Returns:
        ``order`` ``[R]`` int64, the flat index ``t*K + k`` of each sorted row, and ``offsets`` ``[E+1]`` int64: rows
        ``offsets[e]:offsets[e+1]`` belong to expert ``e`` and rows from ``offsets[E]`` on are the tail.

    Raises:
        InputError: the ids are not an integer ``[T, K]`` tensor, or ``num_experts < 1``.
    """
    grouped: tuple[Tensor, Tensor] = torch.ops.moefx.group.default(experts_TK, num_experts)
    return grouped


@torch.library.custom_op(
    "moefx::group", mutates_args=(), schema="(Tensor experts, int num_experts) -> (Tensor order, Tensor offsets)"
)
def group_op(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort on any device without waiting for it."""
    _check(experts_TK, num_experts)
    key_R = experts_TK.reshape(-1).to(torch.int64)
    key_R = torch.where((key_R >= 0) & (key_R < num_experts), key_R, num_experts)
    sorted_R, order_R = torch.sort(key_R, stable=True)
    bounds = torch.arange(num_experts + 1, device=key_R.device)
    return order_R, torch.searchsorted(sorted_R, bounds)


@group_op.register_kernel("cpu")
def _group_cpu(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    _check(experts_TK, num_experts)
    key_R = experts_TK.detach().to(torch.int64).reshape(-1).numpy()  # a narrower key could not hold num_experts
    key_R = np.where((key_R >= 0) & (key_R < num_experts), key_R, num_experts)
    key_R = key_R.astype(np.uint16 if num_experts <= _RADIX_KEYS else np.int64)
    order_R = np.argsort(key_R, kind="stable").astype(np.int64, copy=False)
    offsets = np.zeros(num_experts + 1, dtype=np.int64)
    np.cumsum(np.bincount(key_R, minlength=num_experts)[:num_experts], out=offsets[1:])
    return torch.from_numpy(order_R), torch.from_numpy(offsets)


@group_op.register_fake
def _group_fake(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    _check(experts_TK, num_experts)
    rows = experts_TK.shape[0] * experts_TK.shape[1]
    return (
        experts_TK.new_empty((rows,), dtype=torch.int64),
        experts_TK.new_empty((num_experts + 1,), dtype=torch.int64),
    )


def _check(experts_TK: Tensor, num_experts: int) -> None:
    if experts_TK.dim() != 2 or experts_TK.dtype not in INDEX_DTYPES:
        refuse(
            "moefx.ops.group needs expert ids [T, K] of an integer dtype",
            "pass the indices that top-k returns, one row per token",
            experts=experts_TK,
        )
    if num_experts < 1:
        refuse(f"moefx.ops.group was asked for {num_experts} experts", "pass num_experts >= 1", experts=experts_TK)
