"""Sums over the slots of a token, shared by ``combine`` and by the input gradient of ``grouped_linear``.

Shapes: ``T`` tokens, ``K`` slots per token, ``R = T*K`` routed rows, ``D`` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows handled at a time on CPU, so that the temporaries stay in the second-level cache.
CHUNK_ROWS = 512


def chunks(rows: int, device: torch.device) -> list[slice]:
    """Cut ``rows`` for the cache of a CPU; on other devices one launch takes them all."""
    step = CHUNK_ROWS if device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def inverse(order_R: Tensor) -> Tensor:
    """Return the sorted position of each (token, slot) pair."""
    position_R = torch.arange(order_R.shape[0], device=order_R.device)
    return torch.empty_like(position_R).scatter_(0, order_R, position_R)


def sum_slots(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Return ``sum_k weights[t, k] * rows[row[t, k]]``, in slot order, accumulated in at least float32."""
    if weights_TK is not None:
        weights_TK = weights_TK.to(torch.promote_types(rows_RD.dtype, torch.float32))
    if rows_RD.device.type == "cpu" and (weights_TK is None or weights_TK.dtype == rows_RD.dtype) and rows_RD.numel():
        # One fused pass. It wants weights of the dtype of the rows, which would round float32 gates to half precision.
        return F.embedding_bag(row_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
    out_TD = rows_RD.new_empty((row_TK.shape[0], rows_RD.shape[1]))
    for part in chunks(out_TD.shape[0], out_TD.device):
        out_TD[part] = _weighted(rows_RD, row_TK[part], None if weights_TK is None else weights_TK[part])
    return out_TD


def _weighted(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    total_TD = rows_RD.new_zeros((row_TK.shape[0], rows_RD.shape[1]), dtype=wide)
    for slot in range(row_TK.shape[1]):
        picked_TD = rows_RD.index_select(0, row_TK[:, slot])
        if weights_TK is None:
            total_TD.add_(picked_TD)
        else:
            total_TD.addcmul_(picked_TD.to(wide), weights_TK[:, slot : slot + 1])
    return total_TD
