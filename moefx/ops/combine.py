"""``moefx::combine``: the weighted sum of a token's routed rows, in token order.

Shapes: ``T`` tokens, ``K`` slots per token, ``R = T*K`` routed rows, ``D`` model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefx.ops._checks import differ, no_double_backward, one_device, refuse
from moefx.ops._slots import chunks, inverse, sum_slots


def combine(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Return ``y[t] = sum_k weights[t, k] * rows[r]``, where sorted row ``r`` is the pair ``(t, k)``.

    The sum runs in slot order and accumulates in at least float32 whatever the dtype of the rows, under autocast too,
    so float32 gates are never rounded. Slots in the tail count with the rows that they have: zeros, if the rows came
    from :func:`moefx.ops.grouped_linear`.

    Args:
        rows_RD: sorted rows ``[T*K, D]``.
        order_R: the order that :func:`moefx.ops.group` returned, ``[T*K]`` int64.
        weights_TK: combine weights ``[T, K]``, of any floating dtype.

    Returns:
        ``[T, D]`` of the dtype of ``rows``.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        MoefxError: a second derivative was asked for.
    """
    combined: Tensor = torch.ops.moefx.combine.default(rows_RD, order_R, weights_TK)
    return combined


@torch.library.custom_op(
    "moefx::combine", mutates_args=(), schema="(Tensor rows, Tensor order, Tensor weights) -> Tensor"
)
def combine_op(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum in slot order, without atomics, so that a rerun gives the same bits."""
    _check(rows_RD, order_R, weights_TK)
    return sum_slots(rows_RD, inverse(order_R).view(weights_TK.shape), weights_TK)


@combine_op.register_fake
def _combine_fake(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    _check(rows_RD, order_R, weights_TK)
    return rows_RD.new_empty((weights_TK.shape[0], rows_RD.shape[1]))


@torch.library.custom_op(
    "moefx::combine_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? rows, Tensor order, Tensor weights) -> (Tensor rows_grad, Tensor weights_grad)",
)
def _combine_backward(
    grad_TD: Tensor, rows_RD: Tensor | None, order_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weights; without ``rows`` that of the weights is zero (nobody wants it)."""
    wide = torch.promote_types(grad_TD.dtype, torch.float32)
    slots = weights_TK.shape[1]
    weight_R = weights_TK.reshape(-1).to(wide).index_select(0, order_R)
    rows_grad_RD = grad_TD.new_empty((order_R.shape[0], grad_TD.shape[1]))
    dot_R = torch.zeros_like(weight_R)
    for part in chunks(order_R.shape[0], order_R.device):
        picked_RD = grad_TD.index_select(0, order_R[part] // slots).to(wide)
        if rows_RD is not None:
            torch.sum(picked_RD * rows_RD[part], dim=1, out=dot_R[part])
        rows_grad_RD[part] = picked_RD.mul_(weight_R[part].unsqueeze(1))
    weights_grad_R = torch.empty_like(dot_R).scatter_(0, order_R, dot_R)
    return rows_grad_RD, weights_grad_R.to(weights_TK.dtype).view(weights_TK.shape)


@_combine_backward.register_fake
def _combine_backward_fake(
    grad_TD: Tensor, rows_RD: Tensor | None, order_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_TD.new_empty((order_R.shape[0], grad_TD.shape[1])), torch.empty_like(
        weights_TK, memory_format=torch.contiguous_format
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    rows_RD, order_R, weights_TK = inputs
    # Only the router's gradient reads the rows; without one they need not outlive the forward pass.
    ctx.save_for_backward(rows_RD if ctx.needs_input_grad[2] else None, order_R, weights_TK)


def _gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    rows_RD, order_R, weights_TK = ctx.saved_tensors
    rows_grad_RD, weights_grad_TK = _combine_backward(grad_TD, rows_RD, order_R, weights_TK)
    wants_rows, _, wants_weights = ctx.needs_input_grad
    return rows_grad_RD if wants_rows else None, None, weights_grad_TK if wants_weights else None


def _second_derivative(ctx: Any, *grads: Tensor) -> None:
    no_double_backward("combine")


combine_op.register_autograd(_gradient, setup_context=_setup_context)
_combine_backward.register_autograd(_second_derivative)


def _check(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> None:
    given = {"rows": rows_RD, "order": order_R, "weights": weights_TK}
    if rows_RD.dim() != 2 or order_R.dim() != 1 or weights_TK.dim() != 2:
        refuse(
            "moefx.ops.combine needs rows [T*K, D], order [T*K] and weights [T, K]", "flatten batch and tokens", **given
        )
    if differ(rows_RD.shape[0], order_R.shape[0]) or differ(
        order_R.shape[0], weights_TK.shape[0] * weights_TK.shape[1]
    ):
        refuse(
            "moefx.ops.combine needs one row for each of the T*K slots",
            "pass the order that moefx.ops.group gave",
            **given,
        )
    if not (rows_RD.is_floating_point() and weights_TK.is_floating_point()) or order_R.dtype != torch.int64:
        refuse(
            "moefx.ops.combine needs floating rows and weights, and an int64 order", "convert with .to(dtype)", **given
        )
    one_device("combine", **given)
