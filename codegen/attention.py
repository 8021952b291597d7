"""Run and lower attention in which queries choose their heads: ``moefx::head_attention`` by emitted kernels.

Shapes: B samples, N queries, M keys, H heads, d head width, R = B * N * H rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moefx.codegen import runtime, tune
from moefx.codegen.kernels import HeadAttentionSpec
from moefx.codegen.launcher import Launcher
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import load_class
from moefx.codegen.spec import require_dtype
from moefx.codegen.targets import Target, target_of
from moefx.errors import MoefxError


@dataclass(frozen=True)
class HeadLowering:
    """A call of ``moefx::head_attention`` that kernels compute."""

    name: str
    specs: tuple[HeadAttentionSpec, ...]
    output: fx.Node
    what: ClassVar[str] = "attention of routed heads"

    @property
    def kernels(self) -> tuple[HeadAttentionSpec, ...]:
        """The kernels, those of the gradient too."""
        return self.specs

    @property
    def training_kernels(self) -> tuple[HeadAttentionSpec, ...]:
        """The same: the forward pass always keeps what its gradient reads."""
        return self.specs


def specs(width: int, heads: int, dtype: str, precision: str) -> tuple[HeadAttentionSpec, ...]:
    """Return the kernels, forward first."""
    return tuple(HeadAttentionSpec(width, heads, dtype, stage, precision) for stage in ("forward", "queries", "keys"))


def lower_heads(name: str, node: fx.Node, q: Tensor) -> HeadLowering:
    """Return the kernels of a call whose queries are like ``q``, or raise :class:`CannotLower`."""
    dtype = str(q.dtype).removeprefix("torch.")
    require_dtype(dtype)
    width, heads = int(q.shape[3]), int(q.shape[2])
    if width > 256:
        raise CannotLower("lower routed-head attention", found=f"heads of {width} values, which fill registers")
    return HeadLowering(name, specs(width, heads, dtype, _precision()), node)


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.lru_cache(maxsize=1024)
def _loaded(spec: HeadAttentionSpec, target: Target, load: int, groups: int) -> Launcher:
    rows = 32 if target.is_interpreter else 128
    return Launcher(spec, tune.schedule_for(spec, target, load, groups, rows))


def clear() -> None:
    """Forget the kernels of this process; files stay."""
    _loaded.cache_clear()


def grouped(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of rows by sample and head, [R], zero gates last, and where each group starts, [G + 1]."""
    samples, _, heads = gates.shape
    group = torch.arange(samples * heads, device=gates.device).view(samples, 1, heads)
    chosen = torch.where(gates != 0, group, samples * heads).reshape(-1, 1)
    order, offsets = torch.ops.moefx.group.default(chosen, samples * heads)
    return order, offsets


@dataclass(frozen=True)
class _Call:
    """What the three kernels share: operands in order, and the queries sorted by sample and head."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    order: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> _Call:
        order, offsets = grouped(gates)
        operands = (q.contiguous(), k.contiguous(), v.contiguous(), gates.to(torch.float32).contiguous())
        return cls(operands, order, offsets)

    def kernel(self, stage: int) -> Launcher:
        q = self.tensors[0]
        samples, queries, heads, width = q.shape
        spec = specs(width, heads, str(q.dtype).removeprefix("torch."), _precision())[stage]
        return _loaded(spec, target_of(q.device), load_class(queries, 1), samples * heads)

    def tiles(self, kernel: Launcher) -> Tensor:
        return runtime.tile_map(self.offsets, self.order.shape[0], kernel.schedule.block_m)

    @property
    def upcast(self) -> bool:
        return self.tensors[0].dtype == torch.bfloat16 and runtime.interpreting()


@torch.library.custom_op(
    "moefx::head_attention_kernels",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor gates, float scale) -> (Tensor out, Tensor lse)",
)
def head_attention_kernels(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run ``moefx::head_attention`` by its emitted kernel; ``lse`` is in powers of two."""
    call = _Call.of(q, k, v, gates)
    out = q.new_empty(q.shape)
    lse = q.new_empty(gates.shape, dtype=torch.float32)
    kernel = call.kernel(0)
    if out.numel():
        kernel.launch(*call.tensors, call.order, call.tiles(kernel), out, lse, scale, call.upcast)
    return out, lse


@head_attention_kernels.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(gates.shape, dtype=torch.float32)


@torch.library.custom_op(
    "moefx::head_attention_kernels_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor gates, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgates)",
)
def head_attention_kernels_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by two kernels: one walks over keys, the other over the queries of each key."""
    call, grad = _Call.of(q, k, v, gates), grad.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dgates, delta = (lse.new_empty(lse.shape) for _ in range(2))
    queries, keys = call.kernel(1), call.kernel(2)
    if dq.numel():
        given = (*call.tensors, call.order)
        queries.launch(*given, call.tiles(queries), grad, out, lse, dq, dgates, delta, scale, call.upcast)
    if dk.numel():
        keys.launch(*call.tensors, call.order, call.offsets, grad, lse, delta, dk, dv, scale, call.upcast)
    return dq, dk, dv, dgates.to(gates.dtype)


@head_attention_kernels_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, gates))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    return (*head_attention_kernels_backward(grad, *ctx.saved_tensors, ctx.scale), None)


def _second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise MoefxError(
        "the second derivative of lowered routed-head attention was asked for",
        found="a backward pass through its gradient (create_graph=True)",
        do="differentiate once",
    )


head_attention_kernels.register_autograd(_gradient, setup_context=_setup_context)
head_attention_kernels_backward.register_autograd(_second_derivative)
