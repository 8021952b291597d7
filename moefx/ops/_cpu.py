"""Grouped products on CPU: one plain product per group, written straight into its place in the result.

Shapes: ``R`` sorted rows, ``E`` groups, ``A`` and ``B`` inner and outer width. With an ``order``, row ``r`` of ``x`` is
``x[order[r] // k]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops._checks import grouped_mm_takes

SMALL_ELEMENTS = 2**20


def rows_times_groups(
    x: Tensor, order_R: Tensor | None, k: int, weight_EAB: Tensor, bias_EB: Tensor | None, offsets: Tensor
) -> Tensor:
    """Multiply each row by the matrix of its group, and add its bias; rows of the tail are zero."""
    rows = x.shape[0] if order_R is None else order_R.shape[0]
    if bias_EB is None and _is_small(rows * weight_EAB.shape[2], x, weight_EAB):
        x_RA = x if order_R is None else x.index_select(0, order_R // k)
        out_RB = F.grouped_mm(x_RA, weight_EAB, offs=offsets[1:].to(torch.int32))
        out_RB[int(offsets[-1]) :].zero_()
        return out_RB
    sizes: list[int] = offsets.diff().tolist()
    out_RB = x.new_empty((rows, weight_EAB.shape[2]))
    biases = [None] * len(sizes) if bias_EB is None else bias_EB.unbind(0)
    groups = zip(_inputs(x, order_R, k, sizes), weight_EAB.unbind(0), biases, _split(out_RB, sizes), strict=True)
    for x_MA, weight_AB, bias_B, out_MB in groups:
        matmul_into(out_MB, x_MA, weight_AB, bias_B)
    out_RB[sum(sizes) :].zero_()
    return out_RB


def groups_of_outer_products(a_RA: Tensor, x: Tensor, order_R: Tensor | None, k: int, offsets: Tensor) -> Tensor:
    """Return ``a[group].T @ x[group]`` for each group, ``[E, A, B]``; the product of no rows is zero."""
    if _is_small((offsets.shape[0] - 1) * a_RA.shape[1] * x.shape[1], a_RA, x):
        x_RB = x if order_R is None else x.index_select(0, order_R // k)
        return F.grouped_mm(a_RA.t(), x_RB, offs=offsets[1:].to(torch.int32))
    sizes: list[int] = offsets.diff().tolist()
    out_EAB = a_RA.new_empty((len(sizes), a_RA.shape[1], x.shape[1]))
    for a_MA, x_MB, out_AB in zip(_split(a_RA, sizes), _inputs(x, order_R, k, sizes), out_EAB.unbind(0), strict=True):
        matmul_into(out_AB, a_MA.t(), x_MB)
    return out_EAB


def group_sums(a_RA: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of the rows of each group, ``[E, A]``."""
    sizes: list[int] = offsets.diff().tolist()
    out_EA = a_RA.new_empty((len(sizes), a_RA.shape[1]))
    for a_MA, out_A in zip(_split(a_RA, sizes), out_EA.unbind(0), strict=True):
        torch.sum(a_MA, dim=0, out=out_A)
    return out_EA


def _is_small(elements: int, left: Tensor, right: Tensor) -> bool:
    """Say whether a result is so small that the loop over groups belongs into C++: into one call of ``grouped_mm``.

    That saves 4 us per group. A large result gains more from rows gathered into cache, group by group.
    """
    legal = left.dtype in (torch.float32, torch.bfloat16) and _native(left.dtype)
    return legal and elements <= SMALL_ELEMENTS and grouped_mm_takes(left, right)


def _split(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return the rows of each group, without the tail."""
    return torch.split_with_sizes(rows[: sum(sizes)], sizes)


def _inputs(x: Tensor, order_R: Tensor | None, k: int, sizes: list[int]) -> Iterator[Tensor]:
    """Yield the input rows of each group, gathered one group at a time: few enough to stay in cache."""
    if order_R is None:
        yield from _split(x, sizes)
    else:
        for token_M in _split(order_R // k, sizes):
            yield x.index_select(0, token_M)


@cache
def _native(dtype: torch.dtype) -> bool:
    """Say whether this processor multiplies ``dtype`` at full rate.

    Measured at 1024x1152x4608 on one thread: bfloat16 with AVX512-BF16 is 4.5 times as fast as float32, but float16
    without AVX512-FP16 is 4 to 30 times slower than converting both operands to float32 and the result back.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    probe = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return hasattr(torch.ops.mkldnn, probe) and bool(getattr(torch.ops.mkldnn, probe)())


def matmul_into(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> None:
    """Write ``a @ b (+ bias)`` into ``out``; products of half precision accumulate in float32."""
    if not _native(out_MN.dtype):
        exact_MN = a_MK.float() @ b_KN.float()
        out_MN.copy_(exact_MN if bias_N is None else exact_MN.add_(bias_N))
    elif bias_N is None:
        torch.mm(a_MK, b_KN, out=out_MN)
    else:
        torch.addmm(bias_N, a_MK, b_KN, out=out_MN)
