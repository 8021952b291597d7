"""A whole routed FFN on a CPU, expert by expert, so that the hidden rows of one expert are gone before the next.

No operator but a composition, as ``activate`` is: tracers see the operators themselves. What it spares an eager call is
memory traffic. On a CPU the stacked weight gradients alone are fresh memory, whose page faults a dense FFN of equal
FLOPs does not have; keeping one expert's hidden rows at a time takes back as much: of the four arrays ``[R, F]`` that a
training step writes only the pre-activations remain, and an inference step has none.

Shapes: ``T`` tokens, ``K`` slots per token, ``R = T*K`` routed rows, ``M`` rows of one expert, ``E`` experts, ``I``
input, ``F`` hidden and ``N`` output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moefx.ops import _cpu
from moefx.ops._checks import no_double_backward
from moefx.ops._slots import inverse, sum_slots
from moefx.ops.activate import activate, untraced
from moefx.ops.grouped_linear import grouped_linear


class FFNStack(NamedTuple):
    """The weights of E feed-forward networks; without a gate ``gate`` and ``gate_bias`` are None."""

    up: Tensor  # [E, F, I]
    up_bias: Tensor | None  # [E, F]
    gate: Tensor | None  # [E, F, I]
    gate_bias: Tensor | None  # [E, F]
    down: Tensor  # [E, N, F]


def grouped_ffn(
    x_TI: Tensor, stack: FFNStack, act: Callable[..., Any], order_R: Tensor, offsets: Tensor, k: int
) -> Tensor:
    """Return rows in expert order, ``down[e] · act(up[e] x + up_bias[e] [, gate[e] x + gate_bias[e]])``.

    The same as ``grouped_linear``, ``activate`` and ``grouped_linear``, which any call is that is traced, small, under
    autocast or on another device. Its gradients are those of the three, the hidden rows computed a second time.

    Args:
        x_TI: tokens.
        stack: the weights, of the dtype of the tokens.
        act: pointwise, ``act(up)`` or ``act(up, gate)``.
        order_R: the order that :func:`moefx.ops.group` returned.
        offsets: likewise, ``[E+1]``.
        k: slots per token of the order.

    Returns:
        ``[R, N]`` of the dtype of ``x``; rows of the tail are zero.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        MoefxError: a second derivative was asked for.
    """
    if _expert_by_expert(x_TI, stack, act, order_R):
        return _rows(x_TI, stack, act, order_R, offsets, k)
    h_RF = grouped_linear(x_TI, stack.up, stack.up_bias, order_R, offsets, k)
    if stack.gate is None:
        h_RF = activate(act, h_RF)
    else:
        h_RF = act(h_RF, grouped_linear(x_TI, stack.gate, stack.gate_bias, order_R, offsets, k))
    return grouped_linear(h_RF, stack.down, None, None, offsets)


def _expert_by_expert(x_TI: Tensor, stack: FFNStack, act: Callable[..., Any], order_R: Tensor) -> bool:
    """Say whether this is an ordinary call with plain tensors on a CPU, large enough for a loop in Python."""
    if not untraced(x_TI) or torch.is_autocast_enabled("cpu"):
        return False
    given = [x_TI, *(t for t in stack if t is not None)]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == x_TI.dtype and t.device.type == "cpu" for t in given)
    fits = x_TI.dim() == 2 and stack.up.dim() == stack.down.dim() == 3 and x_TI.shape[1] == stack.up.shape[2]
    large = fits and order_R.shape[0] * stack.up.shape[1] > _cpu.SMALL_ELEMENTS
    return plain and large and _is_function(act, 1 if stack.gate is None else 2, x_TI.dtype)


def _is_function(act: Callable[..., Any], arguments: int, dtype: torch.dtype) -> bool:
    """Say whether calling ``act`` twice is calling it once: it keeps its arguments, draws nothing, has no parameter.

    Found out on two numbers, unless somebody watches the calls.
    """
    if isinstance(act, nn.Module) and any(m._forward_hooks or m._forward_pre_hooks for m in act.modules()):
        return False
    state = torch.get_rng_state()
    with torch.enable_grad():
        probe = [torch.ones((1, 2), dtype=dtype) for _ in range(arguments)]
        result = act(*probe)
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
        return False
    pointwise = isinstance(result, Tensor) and result.shape == (1, 2) and not result.requires_grad
    return pointwise and all(t._version == 0 for t in probe)


class _Group(NamedTuple):
    """One expert with rows."""

    expert: int
    rows: slice
    tokens: Tensor  # [M]


def _groups(order_R: Tensor, offsets: Tensor, k: int) -> Iterator[_Group]:
    bounds: list[int] = offsets.tolist()
    tokens_R = order_R // k
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            yield _Group(expert, slice(start, end), tokens_R[start:end])


def _project(x_MI: Tensor, weight_ENI: Any, bias_EN: Tensor | None, expert: int, out_MN: Tensor) -> None:
    _cpu.matmul_into(out_MN, x_MI, weight_ENI[expert].t(), None if bias_EN is None else bias_EN[expert])


def _rows(x_TI: Tensor, stack: FFNStack, act: Callable[..., Any], order_R: Tensor, offsets: Tensor, k: int) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TI, *stack)):
        rows: Tensor = _GroupedFFN.apply(x_TI, *stack, act, order_R, offsets, k)  # type: ignore[no-untyped-call]
        return rows
    most = int(offsets.diff().max())
    hidden = [x_TI.new_empty((most, stack.up.shape[1])) for w in (stack.up, stack.gate) if w is not None]
    return _forward(x_TI, stack, act, order_R, offsets, k, hidden)


def _forward(
    x_TI: Tensor,
    stack: FFNStack,
    act: Callable[..., Any],
    order_R: Tensor,
    offsets: Tensor,
    k: int,
    hidden: list[Tensor],
) -> Tensor:
    """Return the rows; ``hidden`` takes the pre-activations: of all experts, or if it is too short of one at a time."""
    out_RN = x_TI.new_empty((order_R.shape[0], stack.down.shape[1]))
    keeps = hidden[0].shape[0] == order_R.shape[0]
    for group in _groups(order_R, offsets, k):
        x_MI = x_TI.index_select(0, group.tokens)
        z = [t[group.rows] if keeps else t[: len(x_MI)] for t in hidden]
        for out_MF, weight, bias in zip(z, (stack.up, stack.gate), (stack.up_bias, stack.gate_bias), strict=False):
            _project(x_MI, weight, bias, group.expert, out_MF)
        h_MF = act(*z) if keeps or len(z) > 1 else activate(act, *z)
        _project(h_MF, stack.down, None, group.expert, out_RN[group.rows])
    out_RN[int(offsets[-1]) :].zero_()
    return out_RN


class _GroupedFFN(torch.autograd.Function):
    """Keeps pre-activations only; hidden rows are computed once more, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        stack, (ctx.act, order_R, offsets, ctx.k) = FFNStack(*given[:5]), given[5:]
        shape = (order_R.shape[0], stack.up.shape[1])
        kept = [x.new_empty(shape) for weight in (stack.up, stack.gate) if weight is not None]
        ctx.save_for_backward(x, *stack, order_R, offsets, *kept)
        return _forward(x, stack, ctx.act, order_R, offsets, ctx.k, kept)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> Any:
        found = _Gradients.apply(ctx, grad_RN, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (*found, None, None, None, None)


class _Gradients(torch.autograd.Function):
    """The backward pass, a function of its own so that a second derivative is an error and not a wrong number."""

    @staticmethod
    def forward(_: Any, ctx: Any, grad_RN: Tensor, x: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        stack, (order_R, offsets), kept = FFNStack(*saved[:5]), saved[5:7], saved[7:]
        wanted = ctx.needs_input_grad[:6]
        sink = _Sink.of(x, stack, order_R, wanted)
        for group in _groups(order_R, offsets, ctx.k):
            z = [t[group.rows].detach().requires_grad_() for t in kept]
            with torch.enable_grad():
                h_MF = ctx.act(*z)
            grad_MN = grad_RN[group.rows]
            if sink.down is not None:
                _cpu.matmul_into(sink.down[group.expert], grad_MN.t(), h_MF.detach())
            if any(wanted[:5]):
                grad_MF = torch.empty_like(z[0])
                _cpu.matmul_into(grad_MF, grad_MN, stack.down[group.expert])
                sink.take(group, x, stack, torch.autograd.grad(h_MF, z, grad_MF))
        return sink.results(order_R, offsets, ctx.k)

    @staticmethod
    def backward(*_: Any) -> Any:
        no_double_backward("grouped_ffn")


class _Sink(NamedTuple):
    """Where the gradients go: each straight into its place; None for what nobody wants."""

    rows: Tensor | None  # [R, I]
    up: Tensor | None
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    down: Tensor | None

    @classmethod
    def of(cls, x: Tensor, stack: FFNStack, order_R: Tensor, wanted: tuple[bool, ...]) -> _Sink:
        shapes = [(order_R.shape[0], x.shape[1]), *(None if t is None else t.shape for t in stack)]
        return cls(*(x.new_empty(s) if w and s is not None else None for s, w in zip(shapes, wanted, strict=True)))

    def take(self, group: _Group, x: Tensor, stack: FFNStack, grads: tuple[Tensor, ...]) -> None:
        """Fill in what follows from the gradients of one expert's pre-activations."""
        x_MI = x.index_select(0, group.tokens)
        places = ((self.up, self.up_bias), (self.gate, self.gate_bias))
        for grad_MF, (weight, bias) in zip(grads, places[: len(grads)], strict=True):
            if weight is not None:
                _cpu.matmul_into(weight[group.expert], grad_MF.t(), x_MI)
            if bias is not None:
                torch.sum(grad_MF, dim=0, out=bias[group.expert])
        if self.rows is not None:
            _cpu.matmul_into(self.rows[group.rows], grads[0], stack.up[group.expert])
            if stack.gate is not None:
                more_MI = torch.empty_like(x_MI)
                _cpu.matmul_into(more_MI, grads[1], stack.gate[group.expert])
                self.rows[group.rows] += more_MI

    def results(self, order_R: Tensor, offsets: Tensor, k: int) -> tuple[Tensor | None, ...]:
        """Return all gradients: zero for experts without rows, and tokens' from those of their slots."""
        for expert in (offsets.diff() == 0).nonzero().flatten().tolist():
            for grad in self[1:]:
                if grad is not None:
                    grad[expert].zero_()
        if self.rows is None:
            return (None, *self[1:])
        self.rows[int(offsets[-1]) :].zero_()
        return (sum_slots(self.rows, inverse(order_R).view(-1, k), None), *self[1:])
