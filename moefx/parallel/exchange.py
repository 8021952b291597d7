"""Rows between processes, with gradients: torch's functional all-to-all and its transpose.

Every call is a collective: each rank of the group makes it, in the same order, with no rows too. On gloo, splits may be
uneven or zero; the list forms of the collectives may not, hence ``all_to_all_single`` only.

Legend: R rows, D width, T tokens, K slots per token, E experts, G ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives  # noqa: F401 - registers the ops

from moefx import ops
from moefx.errors import MoefxError

Splits = list[int]
_launch_op: Callable[..., Tensor] = torch.ops._c10d_functional.all_to_all_single
_wait_op: Callable[..., Tensor] = torch.ops._c10d_functional.wait_tensor
_counters: list[np.ndarray] = []


class LostRankError(MoefxError):
    """An exchange failed because another process ended or stopped answering."""

    exit_code = 6


@contextmanager
def count_wire_bytes(ranks: int) -> Iterator[np.ndarray]:
    """Yield an array ``[G]`` that counts the bytes which this rank sends to each rank, itself included, meanwhile."""
    sent_G = np.zeros(ranks, dtype=np.int64)
    _counters.append(sent_G)
    try:
        yield sent_G
    finally:
        _counters[:] = [counter for counter in _counters if counter is not sent_G]


def exchange(rows_RD: Tensor, sent: Splits, received: Splits, group: Any) -> Tensor:
    """Send ``sent[g]`` consecutive rows to each rank g and return what arrived, by sender.

    Args:
        rows_RD: rows in the order of their receivers.
        sent: rows for each rank ``[G]``, in all R.
        received: rows from each rank ``[G]``.
        group: the ranks: a process group or its name.
    """
    out: Tensor = _Exchange.apply(rows_RD, sent, received, group)  # type: ignore[no-untyped-call]
    return out


def exchange_counts(counts_E: Tensor, experts_per_rank: Splits, rank: int, group: Any) -> Tensor:
    """Return how many rows each rank will send to each expert of this one, ``[G, E_local]``.

    Args:
        counts_E: rows of this rank for every expert, experts in the order of their ranks.
        experts_per_rank: ``[G]``, in all E.
        rank: this one.
        group: the ranks.
    """
    mine = experts_per_rank[rank]
    arrived = _all_to_all(counts_E, experts_per_rank, [mine] * len(experts_per_rank), group)
    return arrived.view(len(experts_per_rank), mine)


def sorted_rows(x_TD: Tensor, order_R: Tensor, k: int) -> Tensor:
    """Return the token of each sorted (token, slot) pair, ``[T*K, D]``; the gradient is summed without atomics."""
    out: Tensor = _SortedRows.apply(x_TD, order_R, k)  # type: ignore[no-untyped-call]
    return out


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``factor``."""
    if factor == 1.0:
        return x
    out: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return out


Flight = tuple[Tensor, Tensor]


def launch(rows_RD: Tensor, sent: Splits, received: Splits, group: Any) -> Flight:
    """Begin an exchange that goes on while other work is done; :func:`arrive` ends it, once and before any use.

    What is returned is the memory in which rows arrive, and a token of the shape of what was sent, without memory of
    its own: along it the gradient flies back, so that the backward pass has a launch and a wait of its own too.

    Args:
        rows_RD: rows in the order of their receivers; must not change before the end.
        sent: rows for each rank ``[G]``.
        received: rows from each rank ``[G]``.
        group: the ranks.
    """
    flight: Flight = _Launch.apply(rows_RD, sent, received, group)  # type: ignore[no-untyped-call]
    return flight


def arrive(flight: Flight, sent: Splits, received: Splits, group: Any) -> Tensor:
    """Wait for what :func:`launch` began with the same arguments, and return what arrived, by sender."""
    out: Tensor = _Arrive.apply(*flight, sent, received, group)  # type: ignore[no-untyped-call]
    return out


def _all_to_all(rows: Tensor, sent: Splits, received: Splits, group: Any) -> Tensor:
    return _end(_begin(rows, sent, received, group), len(sent))


def _begin(rows: Tensor, sent: Splits, received: Splits, group: Any) -> Tensor:
    """Return the memory in which rows arrive; torch keeps what is sent until the wait.

    The op itself: torch's function around it waits at once where a graph is recorded.
    """
    name = group if isinstance(group, str) else group.group_name
    if torch.compiler.is_compiling():
        return _launch_op(rows.contiguous(), received, sent, name)
    _count(rows, sent)
    with _loss_of_rank(len(sent)):
        return _launch_op(rows.contiguous(), received, sent, name)


def _end(arriving: Tensor, ranks: int) -> Tensor:
    if torch.compiler.is_compiling():
        return _wait_op(arriving)
    with _loss_of_rank(ranks):
        return _wait_op(arriving)


@contextmanager
def _loss_of_rank(ranks: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the base of all that torch.distributed raises when a peer is gone
        raise LostRankError(
            f"exchange rows among {ranks} processes",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            do="another process ended or is stuck: see its output, and resume from the last complete checkpoint",
        ) from error


def _count(rows: Tensor, sent: Splits) -> None:
    row_bytes = rows.element_size() * (rows.shape[1:].numel() if rows.ndim > 1 else 1)
    for counter in _counters:
        counter += np.array(sent, dtype=np.int64) * row_bytes


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, sent: Splits, received: Splits, group: Any) -> Flight:
        ctx.set_materialize_grads(False)
        ctx.ranks = len(sent)
        arriving = _begin(rows_RD, sent, received, group)
        return arriving, rows_RD.new_empty(()).expand(rows_RD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, flying: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return None if flying is None else _end(flying, ctx.ranks), None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, token: Tensor, sent: Splits, received: Splits, group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = _end(arriving, len(sent))
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        return None, _begin(grad, ctx.received, ctx.sent, ctx.group), None, None, None


class _Exchange(torch.autograd.Function):
    # The functional collective has a gradient of its own, but under another name in each torch release.

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, sent: Splits, received: Splits, group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows_RD, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


class _SortedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.k = k
        return x_TD.index_select(0, order_R // k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        wide = torch.promote_types(grad_RD.dtype, torch.float32)
        ones_TK = grad_RD.new_ones((order_R.shape[0] // ctx.k, ctx.k), dtype=wide)
        return ops.combine(grad_RD.contiguous(), order_R, ones_TK), None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
