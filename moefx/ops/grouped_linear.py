"""``moefx::grouped_linear``: each routed row times the weight of its expert.

Shapes: ``T`` tokens, ``R`` routed rows (``T*k`` with an order), ``E`` experts, ``I`` input and ``N`` output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moefx.ops import _cpu, _sync_free
from moefx.ops._checks import differ, no_double_backward, one_device, refuse
from moefx.ops._slots import inverse, sum_slots


def grouped_linear(
    x: Tensor,
    weight_ENI: Tensor,
    bias_EN: Tensor | None,
    order_R: Tensor | None,
    offsets: Tensor,
    k: int = 1,
) -> Tensor:
    """Return rows in expert order, row ``r`` of expert ``e`` being ``x_r @ weight[e].T + bias[e]``.

    Rows of the tail (``r >= offsets[E]``) are zero, without bias, whatever they were before. Under autocast the
    operands are cast as those of ``F.linear`` are. The gradient of ``weight`` and ``bias`` is one stacked tensor, zero
    for an expert without rows.

    Args:
        x: tokens ``[T, I]`` if there is an order, whose row is then ``x[order[r] // k]``; else sorted rows ``[R, I]``.
        weight_ENI: stacked weights ``[E, N, I]``, of the dtype of ``x``; any strides.
        bias_EN: stacked biases ``[E, N]`` or ``None``.
        order_R: the order that :func:`moefx.ops.group` returned, ``[T*k]`` int64, or ``None``.
        offsets: the offsets that :func:`moefx.ops.group` returned, ``[E+1]`` int64.
        k: slots per token of the order.

    Returns:
        ``[R, N]`` of the dtype of ``x``.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        MoefxError: a second derivative was asked for.
    """
    rows: Tensor = torch.ops.moefx.grouped_linear.default(x, weight_ENI, bias_EN, order_R, offsets, k)
    return rows


@torch.library.custom_op(
    "moefx::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? order, Tensor offsets, int k) -> Tensor",
)
def grouped_linear_op(
    x: Tensor, weight_ENI: Tensor, bias_EN: Tensor | None, order_R: Tensor | None, offsets: Tensor, k: int
) -> Tensor:
    """Multiply on any device without waiting for it."""
    _check(x, weight_ENI, bias_EN, order_R, offsets, k)
    x_RI = x if order_R is None else x.index_select(0, order_R // k)
    rows_RN = _sync_free.rows_times_groups(x_RI, weight_ENI.transpose(1, 2), offsets)
    if bias_EN is None:
        return rows_RN
    padded_bias = torch.cat([bias_EN, bias_EN.new_zeros(1, bias_EN.shape[1])])
    return rows_RN.add_(padded_bias.index_select(0, _sync_free.group_of_row(offsets, rows_RN.shape[0])))


@grouped_linear_op.register_kernel("cpu")
def _grouped_linear_cpu(
    x: Tensor, weight_ENI: Tensor, bias_EN: Tensor | None, order_R: Tensor | None, offsets: Tensor, k: int
) -> Tensor:
    _check(x, weight_ENI, bias_EN, order_R, offsets, k)
    return _cpu.rows_times_groups(x, order_R, k, weight_ENI.mT, bias_EN, offsets)


@grouped_linear_op.register_fake
def _grouped_linear_fake(
    x: Tensor, weight_ENI: Tensor, bias_EN: Tensor | None, order_R: Tensor | None, offsets: Tensor, k: int
) -> Tensor:
    _check(x, weight_ENI, bias_EN, order_R, offsets, k)
    return x.new_empty((x.shape[0] if order_R is None else order_R.shape[0], weight_ENI.shape[1]))


@torch.library.custom_op(
    "moefx::grouped_linear_input_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor? order, Tensor offsets, int k) -> Tensor",
)
def _input_grad(grad_RN: Tensor, weight_ENI: Tensor, order_R: Tensor | None, offsets: Tensor, k: int) -> Tensor:
    """Return the gradient of ``x``: of sorted rows, or with an order of tokens, summed over their slots."""
    return _sum_over_slots(_sync_free.rows_times_groups(grad_RN.contiguous(), weight_ENI, offsets), order_R, k)


@_input_grad.register_kernel("cpu")
def _input_grad_cpu(grad_RN: Tensor, weight_ENI: Tensor, order_R: Tensor | None, offsets: Tensor, k: int) -> Tensor:
    rows_RI = _cpu.rows_times_groups(grad_RN, None, 1, weight_ENI, None, offsets)
    return _sum_over_slots(rows_RI, order_R, k)


@_input_grad.register_fake
def _input_grad_fake(grad_RN: Tensor, weight_ENI: Tensor, order_R: Tensor | None, offsets: Tensor, k: int) -> Tensor:
    rows = grad_RN.shape[0] if order_R is None else order_R.shape[0] // k
    return grad_RN.new_empty((rows, weight_ENI.shape[2]))


@torch.library.custom_op(
    "moefx::grouped_linear_weight_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? order, Tensor offsets, int k) -> Tensor",
)
def _weight_grad(grad_RN: Tensor, x: Tensor, order_R: Tensor | None, offsets: Tensor, k: int) -> Tensor:
    """Return the gradient of the stacked weight, ``[E, N, I]``; zeros for an expert without rows."""
    x_RI = x if order_R is None else x.index_select(0, order_R // k)
    return _sync_free.groups_of_outer_products(grad_RN.contiguous(), x_RI, offsets)


@_weight_grad.register_kernel("cpu")
def _weight_grad_cpu(grad_RN: Tensor, x: Tensor, order_R: Tensor | None, offsets: Tensor, k: int) -> Tensor:
    return _cpu.groups_of_outer_products(grad_RN, x, order_R, k, offsets)


@_weight_grad.register_fake
def _weight_grad_fake(grad_RN: Tensor, x: Tensor, order_R: Tensor | None, offsets: Tensor, k: int) -> Tensor:
    return grad_RN.new_empty((offsets.shape[0] - 1, grad_RN.shape[1], x.shape[1]))


@torch.library.custom_op(
    "moefx::grouped_linear_bias_grad", mutates_args=(), schema="(Tensor grad, Tensor offsets) -> Tensor"
)
def _bias_grad(grad_RN: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient of the stacked bias, ``[E, N]``, accumulated in at least float32."""
    return _sync_free.group_sums(grad_RN, offsets)


@_bias_grad.register_kernel("cpu")
def _bias_grad_cpu(grad_RN: Tensor, offsets: Tensor) -> Tensor:
    return _cpu.group_sums(grad_RN, offsets)


@_bias_grad.register_fake
def _bias_grad_fake(grad_RN: Tensor, offsets: Tensor) -> Tensor:
    return grad_RN.new_empty((offsets.shape[0] - 1, grad_RN.shape[1]))


def _register_autocast(device_type: str, key: str) -> None:
    """Cast as ``F.linear`` does; ``torch.library.register_autocast`` would fix one dtype at import."""
    key_set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        return value.to(torch.get_autocast_dtype(device_type)) if value.device.type == device_type else value

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key_set):
            return torch.ops.moefx.grouped_linear.default(*map(cast, args))

    torch.library.impl("moefx::grouped_linear", key, kernel)


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU")):
    _register_autocast(_device_type, _key)


def _sum_over_slots(rows: Tensor, order_R: Tensor | None, k: int) -> Tensor:
    return rows if order_R is None else sum_slots(rows, inverse(order_R).view(-1, k), None)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int], output: Tensor
) -> None:
    x, weight_ENI, _, order_R, offsets, ctx.k = inputs
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_weight else None, weight_ENI if wants_x else None, order_R, offsets)


def _gradient(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_ENI, order_R, offsets = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    return (
        _input_grad(grad_RN, weight_ENI, order_R, offsets, ctx.k) if wants_x else None,
        _weight_grad(grad_RN, x, order_R, offsets, ctx.k) if wants_weight else None,
        _bias_grad(grad_RN, offsets) if wants_bias else None,
        None,
        None,
        None,
    )


def _second_derivative(ctx: Any, *grads: Tensor) -> None:
    no_double_backward("grouped_linear")


grouped_linear_op.register_autograd(_gradient, setup_context=_setup_context)
for _op in (_input_grad, _weight_grad, _bias_grad):
    _op.register_autograd(_second_derivative)


def _check(
    x: Tensor, weight_ENI: Tensor, bias_EN: Tensor | None, order_R: Tensor | None, offsets: Tensor, k: int
) -> None:
    given = {"x": x, "weight": weight_ENI, "bias": bias_EN, "order": order_R, "offsets": offsets}
    if x.dim() != 2 or weight_ENI.dim() != 3 or offsets.dim() != 1 or (order_R is not None and order_R.dim() != 1):
        refuse(
            "moefx.ops.grouped_linear needs x [T, I], weight [E, N, I], order [T*k] and offsets [E+1]",
            "flatten batch and tokens",
            **given,
        )
    experts, outputs, inputs = weight_ENI.shape
    if differ(x.shape[1], inputs) or differ(offsets.shape[0], experts + 1):
        refuse(
            "moefx.ops.grouped_linear needs one weight [N, I] for each expert of the offsets",
            "pass the offsets that moefx.ops.group gave for this E",
            **given,
        )
    if bias_EN is not None and (
        bias_EN.dim() != 2 or differ(bias_EN.shape[0], experts) or differ(bias_EN.shape[1], outputs)
    ):
        refuse("moefx.ops.grouped_linear needs a bias [E, N]", "stack one bias per expert", **given)
    if order_R is not None and (k < 1 or differ(order_R.shape[0], x.shape[0] * k)):
        refuse(
            f"moefx.ops.grouped_linear needs an order of T*k rows, k = {k}",
            "pass k = the slots per token of the order",
            **given,
        )
    if not x.is_floating_point() or x.dtype != weight_ENI.dtype or (bias_EN is not None and bias_EN.dtype != x.dtype):
        refuse(
            "moefx.ops.grouped_linear needs x, weight and bias of one floating dtype",
            "convert with .to(dtype), or run under torch.autocast",
            **given,
        )
    if offsets.dtype != torch.int64 or (order_R is not None and order_R.dtype != torch.int64):
        refuse("moefx.ops.grouped_linear needs int64 order and offsets", "pass what moefx.ops.group gave", **given)
    one_device("grouped_linear", **given)


# Counted as if every row reached an expert: how many do is not known from shapes.
@register_flop_formula(torch.ops.moefx.grouped_linear)
def _grouped_linear_flops(x: Any, weight: Any, bias: Any, order: Any, *_: Any, **__: Any) -> int:
    return 2 * int((x if order is None else order)[0]) * int(weight[1]) * int(weight[2])


@register_flop_formula(torch.ops.moefx.grouped_linear_input_grad)
def _input_grad_flops(grad: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * int(grad[0]) * int(weight[1]) * int(weight[2])


@register_flop_formula(torch.ops.moefx.grouped_linear_weight_grad)
def _weight_grad_flops(grad: Any, x: Any, *_: Any, **__: Any) -> int:
    return 2 * int(grad[0]) * int(grad[1]) * int(x[1])
