"""Run tokens taken out of a sequence and put back: two operators, their gradients, and the kernels of both.

``moefx::token_gather`` takes tokens out and normalises and modulates them, ``moefx::token_scatter`` makes tokens from a
block's result and puts them back. ``key`` names the spec of either, registered in this process by whoever lowered it.
Nothing waits for the device, and no order of additions is left to chance.

Shapes: T tokens of all samples, R of them taken, B samples, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moefx.codegen.kernels import TokenGatherSpec, TokenGradSpec, TokenScatterSpec, TokenSumSpec
from moefx.codegen.launcher import launcher
from moefx.codegen.reasons import CannotLower
from moefx.codegen.row_gradients import operands_of, row_gradients
from moefx.codegen.runtime import rows_of
from moefx.codegen.spec import Kernel, digest
from moefx.errors import MoefxError

_SPECS: dict[str, TokenGatherSpec | TokenScatterSpec] = {}


def register(spec: TokenGatherSpec | TokenScatterSpec) -> str:
    """Make a kernel callable by its key and return the key."""
    key = digest(spec.text)[:16]
    _SPECS[key] = spec
    return key


def _spec(key: str) -> Any:
    if key not in _SPECS:
        raise CannotLower(
            f"run the lowered tokens {key}",
            found="a graph compiled in another process",
            do="compile the model again with torch.compile(model, backend='moefx')",
        )
    return _SPECS[key]


def grad_spec(spec: TokenGatherSpec | TokenScatterSpec) -> TokenGradSpec:
    """Return the kernel of the gradients of rows and operands."""
    if isinstance(spec, TokenGatherSpec):
        return TokenGradSpec(spec.program, "gather", spec.keeps)
    return TokenGradSpec(spec.program, "scatter")


def backward_kernels(spec: TokenGatherSpec | TokenScatterSpec) -> list[Kernel]:
    """Return the kernels of the backward pass, in the order in which they run."""
    found: list[Kernel] = [grad_spec(spec)]
    return [*found, _token_sum(spec)] if isinstance(spec, TokenGatherSpec) else found


def _token_sum(spec: TokenGatherSpec) -> TokenSumSpec:
    return TokenSumSpec(spec.program.features, spec.program.dtype)


def clear() -> None:
    """Forget the kernels of this process; files stay."""
    _SPECS.clear()


@torch.library.custom_op("moefx::token_gather", mutates_args=())
def token_gather_op(tensors: Sequence[Tensor], key: str) -> list[Tensor]:
    """Take the tokens ``index`` [R] out of ``x`` [T, D] and run the program ``key``; tensors are x, index, operands.

    Returns its result [R, D] and, if the program keeps them, the tokens as they were.
    """
    spec = _spec(key)
    x, index = rows_of(tensors[0]), tensors[1].to(torch.int64).contiguous()
    found = _gathered(spec, x, index)
    if index.numel():
        launcher(spec, x.device).launch(x, index, *operands_of(spec.program, tensors[2:]), *found)
    return found


@token_gather_op.register_fake
def _(tensors: Sequence[Tensor], key: str) -> list[Tensor]:
    return _gathered(_spec(key), tensors[0], tensors[1])


def _gathered(spec: TokenGatherSpec, x: Tensor, index: Tensor) -> list[Tensor]:
    size, out = (index.shape[0], spec.program.features), getattr(torch, spec.program.out_dtype)
    return [x.new_empty(size, dtype=out), *([x.new_empty(size)] if spec.keeps else [])]


@torch.library.custom_op("moefx::token_scatter", mutates_args=())
def token_scatter_op(tensors: Sequence[Tensor], key: str) -> Tensor:
    """Run the program ``key`` and put its rows [R, D] at ``index`` of ``x`` [T, D].

    ``tensors`` are x, index, rows and operands. The index has no repetitions: of several rows for one token any may
    win, as in ``torch.index_copy``.
    """
    spec = _spec(key)
    x, index = rows_of(tensors[0]), tensors[1].to(torch.int64).contiguous()
    rows, operands = tensors[2].reshape(-1, x.shape[1]).contiguous(), operands_of(spec.program, tensors[3:])
    out = x.new_empty(x.shape)
    if not index.numel():
        return out.copy_(x)
    position = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    launcher(spec, x.device).launch(rows, x, index, position, *operands, out)
    return out


@token_scatter_op.register_fake
def _(tensors: Sequence[Tensor], key: str) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


@torch.library.custom_op("moefx::token_gather_backward", mutates_args=())
def token_gather_backward_op(
    grad: Tensor, added: Tensor | None, tensors: Sequence[Tensor], key: str, wants: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of the wanted ones of x and the operands; ``added`` is that of the kept tokens."""
    spec = _spec(key)
    x, index, *given = tensors
    index = index.to(torch.int64).contiguous()
    if spec.keeps:
        added = x.new_zeros((index.shape[0], x.shape[1])) if added is None else added.contiguous()
    drow, found = row_gradients(grad_spec(spec), grad, x, index, given, added)
    dx = [_back_to_tokens(spec, drow, index, x)] if wants[0] else []
    return dx + [one for one, wanted in zip(found, wants[2:], strict=True) if wanted]


def _back_to_tokens(spec: TokenGatherSpec, drow: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Add the gradient of each row to its token, those of a token taken twice in the order of the rows."""
    out = x.new_empty(x.shape)
    order, offsets = torch.ops.moefx.group.default(index.view(-1, 1), x.shape[0])
    if out.numel():
        launcher(_token_sum(spec), x.device).launch(drow, order, offsets, out)
    return out


@token_gather_backward_op.register_fake
def _(grad: Tensor, added: Tensor | None, tensors: Sequence[Tensor], key: str, wants: Sequence[bool]) -> list[Tensor]:
    return _wanted(tensors, wants)


def _wanted(tensors: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, wanted in zip(tensors, wants, strict=True) if wanted]


@torch.library.custom_op("moefx::token_scatter_backward", mutates_args=())
def token_scatter_backward_op(grad: Tensor, tensors: Sequence[Tensor], key: str, wants: Sequence[bool]) -> list[Tensor]:
    """Return the gradients of the wanted ones of x, the rows and the operands."""
    _, index, rows, *given = tensors
    index = index.to(torch.int64).contiguous()
    dx = [grad.index_fill(0, index, 0)] if wants[0] else []
    if not any(wants[2:]):
        return dx
    flat = rows.reshape(-1, grad.shape[1])
    drow, found = row_gradients(grad_spec(_spec(key)), grad, flat, index, given)
    found = [drow.reshape(rows.shape), *found]
    return dx + [one for one, wanted in zip(found, wants[2:], strict=True) if wanted]


@token_scatter_backward_op.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], key: str, wants: Sequence[bool]) -> list[Tensor]:
    return _wanted(tensors, wants)


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], str], output: Any) -> None:
    tensors, ctx.key = inputs
    ctx.wants = list(ctx.needs_input_grad[: len(tensors)])  # flat: one entry per tensor of the list
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _spread(ctx: Any, found: Sequence[Tensor]) -> tuple[list[Tensor | None], None]:
    """Return gradients in the places of the inputs that want one."""
    remaining = iter(found)
    return [next(remaining) if wanted else None for wanted in ctx.wants], None


def _gather_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    tensors = list(ctx.saved_tensors)
    grad, added = (*grads, None)[:2]
    if grad is None:
        if added is None:
            return [None] * len(tensors), None
        grad = added.new_zeros(added.shape, dtype=getattr(torch, _spec(ctx.key).program.out_dtype))
    return _spread(ctx, token_gather_backward_op(grad, added, tensors, ctx.key, ctx.wants))


def _scatter_gradient(ctx: Any, grad: Tensor | None) -> tuple[list[Tensor | None], None]:
    tensors = list(ctx.saved_tensors)
    if grad is None:
        return [None] * len(tensors), None
    return _spread(ctx, token_scatter_backward_op(grad, tensors, ctx.key, ctx.wants))


def _second_derivative(ctx: Any, *grads: Any) -> None:
    raise MoefxError(
        "the second derivative of lowered tokens was asked for",
        found="a backward pass through its gradient (create_graph=True)",
        do='differentiate once, or compile with options={"kernels": "off"}',
    )


token_gather_op.register_autograd(_gather_gradient, setup_context=_setup_context)
token_scatter_op.register_autograd(_scatter_gradient, setup_context=_setup_context)
token_gather_backward_op.register_autograd(_second_derivative)
token_scatter_backward_op.register_autograd(_second_derivative)
