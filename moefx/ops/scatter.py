"""``moefx::scatter``: the weighted sum of rows that know their token, for experts which chose their tokens.

Where tokens choose experts every token has K slots and `moefx.ops.combine` sums them; where experts choose, a token has
any number of rows. Shapes: ``R`` rows, ``T`` tokens, ``D`` model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefx.ops._checks import differ, one_device, refuse


def scatter(rows_RD: Tensor, tokens_R: Tensor, weights_R: Tensor, num_tokens: int) -> Tensor:
    """Return ``y[t] = Σ weights[r] · rows[r]`` over the rows r with ``tokens[r] == t``, in the order of the rows.

    Deterministic on every device, unlike ``index_add``; accumulated in at least float32.

    Args:
        rows_RD: rows ``[R, D]``.
        tokens_R: token of each row, int64; ``num_tokens`` means none, and the row counts nowhere.
        weights_R: weights ``[R]``, of any floating dtype.
        num_tokens: T.

    Returns:
        ``[T, D]`` of the dtype of ``rows``.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
    """
    out: Tensor = torch.ops.moefx.scatter.default(rows_RD, tokens_R, weights_R, num_tokens)
    return out


@torch.library.custom_op(
    "moefx::scatter",
    mutates_args=(),
    schema="(Tensor rows, Tensor tokens, Tensor weights, SymInt num_tokens) -> Tensor",
)
def scatter_op(rows_RD: Tensor, tokens_R: Tensor, weights_R: Tensor, num_tokens: int) -> Tensor:
    """Add row after row."""
    _check(rows_RD, tokens_R, weights_R)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    # One row more takes what belongs to no token.
    total_TD = rows_RD.new_zeros((num_tokens + 1, rows_RD.shape[1]), dtype=wide)
    weighted_RD = rows_RD.to(wide) * weights_R.to(wide).unsqueeze(1)
    if rows_RD.is_cuda:
        total_TD.index_put_((tokens_R,), weighted_RD, accumulate=True)  # sorts; index_add_ would use atomics
    else:
        total_TD.index_add_(0, tokens_R, weighted_RD)
    return total_TD[:num_tokens].to(rows_RD.dtype, copy=True)


@scatter_op.register_fake
def _scatter_fake(rows_RD: Tensor, tokens_R: Tensor, weights_R: Tensor, num_tokens: int) -> Tensor:
    _check(rows_RD, tokens_R, weights_R)
    return rows_RD.new_empty((num_tokens, rows_RD.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    rows_RD, tokens_R, weights_R, _ = inputs
    ctx.save_for_backward(rows_RD if ctx.needs_input_grad[2] else None, tokens_R, weights_R)


def _gradient(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    rows_RD, tokens_R, weights_R = ctx.saved_tensors
    wide = torch.promote_types(grad_TD.dtype, torch.float32)
    picked_RD = torch.cat([grad_TD, grad_TD.new_zeros((1, grad_TD.shape[1]))]).index_select(0, tokens_R).to(wide)
    rows_grad = (picked_RD * weights_R.to(wide).unsqueeze(1)).to(grad_TD.dtype) if ctx.needs_input_grad[0] else None
    weights_grad = None if rows_RD is None else (picked_RD * rows_RD.to(wide)).sum(1).to(weights_R.dtype)
    return rows_grad, None, weights_grad, None


scatter_op.register_autograd(_gradient, setup_context=_setup_context)


def _check(rows_RD: Tensor, tokens_R: Tensor, weights_R: Tensor) -> None:
    given = {"rows": rows_RD, "tokens": tokens_R, "weights": weights_R}
    if rows_RD.dim() != 2 or tokens_R.dim() != 1 or weights_R.dim() != 1:
        refuse("moefx.ops.scatter needs rows [R, D], tokens [R] and weights [R]", "flatten them", **given)
    if differ(rows_RD.shape[0], tokens_R.shape[0]) or differ(rows_RD.shape[0], weights_R.shape[0]):
        refuse("moefx.ops.scatter needs a token and a weight for each row", "pass R of each", **given)
    if not (rows_RD.is_floating_point() and weights_R.is_floating_point()) or tokens_R.dtype != torch.int64:
        refuse(
            "moefx.ops.scatter needs floating rows and weights, and int64 tokens", "convert with .to(dtype)", **given
        )
    one_device("scatter", **given)
