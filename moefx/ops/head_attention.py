"""``moefx::head_attention``: attention in which every query chooses its heads.

A gate of exactly zero means that the head is not computed for that query, not that its result is multiplied by zero.
Shapes: ``B`` samples, ``N`` queries, ``M`` keys, ``H`` heads, ``d`` head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moefx.ops._checks import differ, no_double_backward, one_device, refuse

# What F.scaled_dot_product_attention calls on a CPU; only in this form it returns the log of the sum as well.
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Multiply-adds of one head of one sample below which a call of its own costs more than it saves.
_SMALL = 2**19

# Logits that the dense form holds at a time, whatever the number of tokens: 64 MiB in float32.
_LOGITS = 2**24


def head_attention(
    q_BNHd: Tensor, k_BMHd: Tensor, v_BMHd: Tensor, gates_BNH: Tensor, scale: float | None = None
) -> Tensor:
    """Return ``gates · softmax(q kᵀ · scale) v`` per query and head; zeros, without work, where the gate is zero.

    The gradient of a zero gate is zero, since what it multiplies is not computed: choose heads by a gate that is
    scattered into zeros, as :class:`moefx.routing.heads.HeadGate` does.

    Args:
        q_BNHd: queries.
        k_BMHd: keys, of the dtype of the queries.
        v_BMHd: values, of the dtype of the queries.
        gates_BNH: gates, of any floating dtype.
        scale: factor of the logits; None means ``d ** -0.5``.

    Returns:
        ``[B, N, H, d]`` of the dtype of ``q``.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        MoefxError: a second derivative was asked for.
    """
    factor = q_BNHd.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.moefx.head_attention.default(q_BNHd, k_BMHd, v_BMHd, gates_BNH, factor)[0]
    return out


@torch.library.custom_op(
    "moefx::head_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor gates, float scale) -> (Tensor out, Tensor lse)",
)
def head_attention_op(
    q_BNHd: Tensor, k_BMHd: Tensor, v_BMHd: Tensor, gates_BNH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with all heads and gate them, on a device whose emitted kernel is not in use: the same result."""
    _check(q_BNHd, k_BMHd, v_BMHd, gates_BNH)
    lse_BNH = q_BNHd.new_empty(gates_BNH.shape, dtype=torch.promote_types(q_BNHd.dtype, torch.float32))
    out_BNHd = q_BNHd.new_empty(q_BNHd.shape)
    k, v = (_head_first(t, lse_BNH.dtype) for t in (k_BMHd, v_BMHd))
    for part in _parts(q_BNHd, k_BMHd):
        gate = _head_first(gates_BNH[:, part], lse_BNH.dtype).unsqueeze(-1)
        weights = (_head_first(q_BNHd[:, part], lse_BNH.dtype) @ k.mT).mul_(scale)
        lse = weights.logsumexp(-1, keepdim=True)
        gated = (weights.sub_(lse).exp_() @ v).mul_(gate).masked_fill_(gate == 0, 0)
        out_BNHd[:, part] = gated.transpose(1, 2)
        lse_BNH[:, part] = lse.masked_fill(gate == 0, 0).squeeze(-1).transpose(1, 2)
    return out_BNHd, lse_BNH


@head_attention_op.register_kernel("cpu")
def _head_attention_cpu(
    q_BNHd: Tensor, k_BMHd: Tensor, v_BMHd: Tensor, gates_BNH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    _check(q_BNHd, k_BMHd, v_BMHd, gates_BNH)
    if _is_small(q_BNHd, k_BMHd):
        return _all_heads(q_BNHd, k_BMHd, v_BMHd, gates_BNH, scale)
    out = torch.zeros(q_BNHd.shape, dtype=q_BNHd.dtype)
    lse = torch.zeros(gates_BNH.shape, dtype=torch.promote_types(q_BNHd.dtype, torch.float32))
    for b, h, chosen in _chosen(gates_BNH):
        q, k, v, gate = _of_head(q_BNHd, k_BMHd, v_BMHd, gates_BNH, b, h, chosen)
        o, found = (
            _FUSED(q, k, v, scale=scale) if k.numel() else (torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf))
        )
        lse[b, :, h].index_copy_(0, chosen, found.view(-1))
        out[b, :, h].index_copy_(0, chosen, (gate * o).to(out.dtype)[0, 0])
    return out, lse


def _all_heads(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the same with every head computed in one call, and those that nobody chose left out of the result."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = _FUSED(*(t.transpose(1, 2).to(wide) for t in (q, k, v)), scale=scale)
    off = gates == 0
    gated = (out.transpose(1, 2) * gates.to(wide).unsqueeze(-1)).masked_fill_(off.unsqueeze(-1), 0)
    return gated.to(q.dtype).contiguous(), lse.transpose(1, 2).masked_fill(off, 0).contiguous()


def _is_small(q_BNHd: Tensor, k_BMHd: Tensor) -> bool:
    return k_BMHd.numel() > 0 and q_BNHd.shape[1] * k_BMHd.shape[1] * q_BNHd.shape[3] < _SMALL


@head_attention_op.register_fake
def _head_attention_fake(
    q_BNHd: Tensor, k_BMHd: Tensor, v_BMHd: Tensor, gates_BNH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    _check(q_BNHd, k_BMHd, v_BMHd, gates_BNH)
    wide = torch.promote_types(q_BNHd.dtype, torch.float32)
    return q_BNHd.new_empty(q_BNHd.shape), q_BNHd.new_empty(gates_BNH.shape, dtype=wide)


@torch.library.custom_op(
    "moefx::head_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor gates, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgates)",
)
def head_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients, by dense products, on a device whose emitted kernel is not in use."""
    wide = lse.dtype
    dq, dgates = q.new_empty(q.shape), gates.new_empty(gates.shape)
    k_, v_ = _head_first(k, wide), _head_first(v, wide)
    dk, dv = torch.zeros_like(k_), torch.zeros_like(v_)
    for part in _parts(q, k):
        gate = _head_first(gates[:, part], wide).unsqueeze(-1)
        q_ = _head_first(q[:, part], wide).masked_fill(gate == 0, 0)
        g = _head_first(grad[:, part], wide)
        weights = (q_ @ k_.mT).mul_(scale).sub_(_head_first(lse[:, part], wide).unsqueeze(-1)).exp_()
        weights.masked_fill_(gate == 0, 0)
        dv += weights.mT @ (g * gate)
        ds = g @ v_.mT
        dgate = (weights * ds).sum(-1, keepdim=True)
        ds = ds.sub_(dgate).mul_(weights).mul_(gate * scale)
        dk += ds.mT @ q_
        dq[:, part] = (ds @ k_).transpose(1, 2)
        dgates[:, part] = dgate.squeeze(-1).transpose(1, 2)
    dk, dv = (t.transpose(1, 2).to(q.dtype).contiguous() for t in (dk, dv))
    return dq, dk, dv, dgates


@head_attention_backward_op.register_kernel("cpu")
def _backward_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _is_small(q, k):
        return _all_heads_backward(grad, q, k, v, gates, out, lse, scale)
    dq, dk, dv, dgates = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v, gates))
    for b, h, chosen in _chosen(gates if k.numel() else gates[:0]):
        q_, k_, v_, gate = _of_head(q, k, v, gates, b, h, chosen)
        g = _rows(grad, b, h, chosen).to(q_.dtype)
        o = _rows(out, b, h, chosen).to(q_.dtype) / gate
        parts = _FUSED_BACKWARD(
            g * gate, q_, k_, v_, o, lse[b, :, h].index_select(0, chosen)[None, None], 0.0, False, scale=scale
        )
        dq[b, :, h].index_copy_(0, chosen, parts[0][0, 0].to(dq.dtype))
        dk[b, :, h], dv[b, :, h] = parts[1][0, 0], parts[2][0, 0]
        dgates[b, :, h].index_copy_(0, chosen, (g * o).sum(-1).view(-1).to(dgates.dtype))
    return dq, dk, dv, dgates


def _all_heads_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    g, q_, k_, v_, o = (t.transpose(1, 2).to(wide) for t in (grad, q, k, v, out))
    gate = gates.transpose(1, 2).to(wide).unsqueeze(-1)
    off = gate == 0
    # A head's weights are exp(logits - lse): with an infinite lse they are 0, as those of a head that is off must be.
    sums = lse.transpose(1, 2).masked_fill(off.squeeze(-1), torch.inf)
    o = (o / gate).masked_fill_(off, 0)
    found = _FUSED_BACKWARD((g * gate).contiguous(), q_.masked_fill(off, 0), k_, v_, o, sums, 0.0, False, scale=scale)
    dq, dk, dv = (t.transpose(1, 2).to(q.dtype).contiguous() for t in found)
    return dq, dk, dv, (g * o).sum(-1).transpose(1, 2).to(gates.dtype).contiguous()


@head_attention_backward_op.register_fake
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, gates))


def _parts(q_BNHd: Tensor, k_BMHd: Tensor) -> list[slice]:
    """Cut the queries so that the logits of a part stay below _LOGITS; sizes alone decide."""
    samples, queries, heads, _ = q_BNHd.shape
    step = max(1, _LOGITS // max(1, samples * heads * k_BMHd.shape[1]))
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def _head_first(values_BNH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[B, N, H, ...]`` as ``[B, H, N, ...]``."""
    return values_BNH.transpose(1, 2).to(dtype)


def _chosen(gates_BNH: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield every sample and head with the queries that chose it, if there are any."""
    for b in range(gates_BNH.shape[0]):
        for h in range(gates_BNH.shape[2]):
            chosen = gates_BNH[b, :, h].nonzero().squeeze(-1)
            if len(chosen):
                yield b, h, chosen


def _of_head(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, b: int, h: int, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the chosen queries, all keys and values and the gates of one head, in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    gate = gates[b, :, h].index_select(0, chosen).view(1, 1, -1, 1)
    return (
        _rows(q, b, h, chosen).to(wide),
        k[b, None, None, :, h].to(wide),
        v[b, None, None, :, h].to(wide),
        gate.to(wide),
    )


def _rows(values_BNHd: Tensor, b: int, h: int, chosen: Tensor) -> Tensor:
    """Return the chosen tokens of one head as a batch of one, ``[1, 1, n, d]``."""
    return values_BNHd[b, :, h].index_select(0, chosen)[None, None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gates, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, gates, *output)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    return (*head_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale), None)


def _second_derivative(ctx: Any, *grads: Tensor) -> None:
    no_double_backward("head_attention")


head_attention_op.register_autograd(_gradient, setup_context=_setup_context)
head_attention_backward_op.register_autograd(_second_derivative)


def _check(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> None:
    given = {"q": q, "k": k, "v": v, "gates": gates}
    if any(t.dim() != 4 for t in (q, k, v)) or gates.dim() != 3:
        refuse(
            "moefx.ops.head_attention needs q [B, N, H, d], k and v [B, M, H, d] and gates [B, N, H]",
            "split heads off the last axis, without transposing",
            **given,
        )
    same = all(not differ(k.shape[i], v.shape[i]) for i in range(4)) and not differ(q.shape[3], k.shape[3])
    same = same and all(not differ(q.shape[i], gates.shape[i]) for i in range(3))
    if not same or differ(q.shape[0], k.shape[0]) or differ(q.shape[2], k.shape[2]):
        refuse("moefx.ops.head_attention needs one key and value head per query head", "repeat shared heads", **given)
    if not gates.is_floating_point() or not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        refuse("moefx.ops.head_attention needs q, k and v of one floating dtype", "convert with .to(dtype)", **given)
    one_device("head_attention", **given)
