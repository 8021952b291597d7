"""Run routers and grouping by emitted kernels: the operators that stand in lowered graphs, and their gradients.

``moefx::router`` is one launch; its gradient is one launch to the logits, and the library's products from there.
``moefx::grouping`` is two launches: what ``moefx::group`` returns, the position of each pair, and the row tiles that
the grouped projections walk over. Neither waits for the device, and repeated runs give the same bits.

Shapes: T tokens, D width, E experts, K chosen, R = T * K rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moefx.codegen import runtime, store
from moefx.codegen.kernels.grouping import GroupingSpec
from moefx.codegen.kernels.router import RouterGradSpec, RouterSpec
from moefx.codegen.launcher import Launcher
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import MIN_ROW_TILE, Schedule, load_class
from moefx.codegen.targets import Target, target_of
from moefx.errors import MoefxError

_ROUTERS: dict[str, RouterSpec] = {}


def register(spec: RouterSpec) -> str:
    """Make a router callable by its name and return the name."""
    _ROUTERS[spec.name] = spec
    return spec.name


def router_of(key: str) -> RouterSpec:
    """Return the router of a name."""
    if key not in _ROUTERS:
        raise CannotLower(
            f"run the lowered router {key}",
            found="a graph compiled in another process",
            do="compile the model again with torch.compile(model, backend='moefx')",
        )
    return _ROUTERS[key]


@functools.lru_cache(maxsize=1024)
def _loaded(spec: RouterSpec | RouterGradSpec, target: Target) -> Launcher:
    return Launcher(spec, spec.schedule(target, 1024, 32))


def clear() -> None:
    """Forget the routers and kernels of this process; files stay."""
    _ROUTERS.clear()
    _loaded.cache_clear()
    _grouping.cache_clear()


def _flat(spec: RouterSpec, operands: Sequence[Tensor]) -> list[Tensor]:
    """Return operands as the kernels read them: their last axis alone, and one before it where rows have their own."""
    experts = spec.program.experts
    kinds = spec.program.operands
    shapes = {"row": (-1, experts), "sample": (-1, experts), "column": (experts,), "scalar": (1,)}
    wide = [t.detach().float() if t.dtype == torch.bool else t.detach() for t in operands]
    return [t.reshape(shapes[kind]).contiguous() for t, kind in zip(wide, kinds, strict=True)]


def _empty(spec: RouterSpec, x: Tensor, kind: str) -> Tensor:
    width = spec.program.choice.k if kind == "slot" else spec.program.experts
    return x.new_empty((*x.shape[:-1], width), dtype=torch.int64 if kind == "index" else torch.float32)


def _results(spec: RouterSpec, x: Tensor) -> list[Tensor]:
    """Return the empty results: chosen experts, outputs, and the product if it is kept."""
    index = x.new_empty((*x.shape[:-1], spec.program.choice.k), dtype=torch.int64)
    outputs = [_empty(spec, x, kind) for kind, _ in spec.program.outputs]
    return [index, *outputs, *([_empty(spec, x, "wide")] if spec.keep else [])]


@torch.library.custom_op(
    "moefx::router", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor[] operands, str key) -> Tensor[]"
)
def router_op(x: Tensor, weight: Tensor, operands: Sequence[Tensor], key: str) -> list[Tensor]:
    """Run the router ``key`` on tokens ``[..., D]``: the chosen experts ``[..., K]``, then its outputs."""
    spec = router_of(key)
    found = _results(spec, x)
    if x.shape[:-1].numel():
        rows = runtime.rows_of(x.reshape(-1, spec.width))
        upcast = spec.dtype == "bfloat16" and runtime.interpreting()
        flat = [t.view(-1, t.shape[-1]) for t in found]
        given = (rows, weight.contiguous(), *_flat(spec, operands))
        _loaded(spec, target_of(x.device)).launch(*given, *flat, upcast)
    return found


@router_op.register_fake
def _(x: Tensor, weight: Tensor, operands: Sequence[Tensor], key: str) -> list[Tensor]:
    return _results(router_of(key), x)


@torch.library.custom_op(
    "moefx::router_backward",
    mutates_args=(),
    schema="(Tensor[] grads, int[] seeds, Tensor kept, Tensor index, Tensor[] operands, int[] wanted, str key)"
    " -> Tensor[]",
)
def router_backward_op(
    grads: Sequence[Tensor],
    seeds: Sequence[int],
    kept: Tensor,
    index: Tensor,
    operands: Sequence[Tensor],
    wanted: Sequence[int],
    key: str,
) -> list[Tensor]:
    """Return the gradients ``[T, E]`` of the wanted ones of product and operands, from those of outputs ``seeds``."""
    spec = router_of(key)
    flat = kept.reshape(-1, spec.program.experts)
    found = [torch.empty_like(flat) for _ in wanted]
    if flat.shape[0]:
        given = [g.reshape(-1, g.shape[-1]).contiguous() for g in grads]
        index = index.reshape(-1, spec.program.choice.k)
        kernel = _loaded(RouterGradSpec(spec.program, tuple(seeds), tuple(wanted)), target_of(kept.device))
        kernel.launch(flat, *_flat(spec, operands), index, *given, *found)
    return found


@router_backward_op.register_fake
def _(
    grads: Sequence[Tensor],
    seeds: Sequence[int],
    kept: Tensor,
    index: Tensor,
    operands: Sequence[Tensor],
    wanted: Sequence[int],
    key: str,
) -> list[Tensor]:
    flat = kept.reshape(-1, kept.shape[-1])
    return [flat.new_empty(flat.shape) for _ in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, weight, operands, ctx.key = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[0])
    ctx.count = len(operands)
    spec = router_of(ctx.key)
    if not spec.keep:
        raise MoefxError(
            "the gradient of a router lowered for inference",
            found="it keeps nothing",
            do="compile it with gradients on",
        )
    ctx.save_for_backward(x, weight, output[0], output[-1], *operands)


def _gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, weight, index, kept, *operands = ctx.saved_tensors
    spec = router_of(ctx.key)
    # Only the product itself is kept besides; its own gradient joins that of the logits.
    outputs, direct = grads[1:-1], grads[-1]
    seeds = [i for i, g in enumerate(outputs) if g is not None]
    flags = ctx.needs_input_grad
    wanted = [0, *(i + 1 for i in range(ctx.count) if flags[2][i])]  # a list has one entry, itself a list
    if not seeds and direct is None:
        return None, None, [None] * ctx.count, None
    given = [g for g in outputs if g is not None]
    found = torch.ops.moefx.router_backward(given, seeds, kept, index, operands, wanted, ctx.key) if seeds else []
    product = found[0] if seeds else None
    if direct is not None:
        flat = direct.reshape(-1, spec.program.experts)
        product = flat if product is None else product + flat
    assert product is not None
    rows = x.reshape(-1, spec.width)
    dx = (product @ weight.to(product.dtype)).to(x.dtype).view(x.shape) if flags[0] else None
    dweight = (product.T @ rows.to(product.dtype)).to(weight.dtype) if flags[1] else None
    of_operand = dict(zip(wanted, found, strict=False))
    kinds = spec.program.operands
    summed = [
        None if (g := of_operand.get(i + 1)) is None else _collected(g, kinds[i], t) for i, t in enumerate(operands)
    ]
    return dx, dweight, summed, None


def _collected(grad_TE: Tensor, kind: str, operand: Tensor) -> Tensor:
    """Return the gradient of an operand from that of the tile that it was spread over."""
    if kind == "sample":
        samples = operand.numel() // operand.shape[-1]
        grad_TE = grad_TE.view(samples, -1, grad_TE.shape[1]).sum(1)
    elif kind != "row":
        grad_TE = grad_TE.sum() if kind == "scalar" else grad_TE.sum(0)
    return grad_TE.to(operand.dtype).view(operand.shape)


def _second_derivative(ctx: Any, *grads: Any) -> None:
    raise MoefxError(
        "the second derivative of a lowered router was asked for",
        found="a backward pass through its gradient (create_graph=True)",
        do='differentiate once, or compile with options={"kernels": "off"}',
    )


router_op.register_autograd(_gradient, setup_context=_setup_context)
router_backward_op.register_autograd(_second_derivative)


@functools.cache
def _grouping() -> ModuleType:
    spec = GroupingSpec()
    return store.load(spec.emit(Schedule(128, 16, 16)), spec.name)


def most_tiles(rows: int, experts: int) -> int:
    """Return how many row tiles there can be, whatever their height; no guard on a symbolic number of rows."""
    return rows // MIN_ROW_TILE + experts + 1


@torch.library.custom_op(
    "moefx::grouping",
    mutates_args=(),
    schema="(Tensor experts, int num_experts) -> (Tensor order, Tensor offsets, Tensor position, Tensor tiles)",
)
def grouping_op(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``moefx::group`` returns, the sorted row of each pair, and the row tiles that regions read."""
    flat = experts.reshape(-1)
    rows, block_m = flat.shape[0], runtime.row_block(target_of(flat.device), load_class(flat.shape[0], num_experts))
    order, position = (flat.new_empty((rows,), dtype=torch.int64) for _ in range(2))
    offsets = flat.new_empty((num_experts + 1,), dtype=torch.int64)
    tiles = flat.new_empty((3 * most_tiles(rows, num_experts),), dtype=torch.int32)
    module = _grouping()
    counts = flat.new_empty((module.blocks_of(rows)[0], 1 << num_experts.bit_length()), dtype=torch.int32)
    used = runtime.tiles_of(tiles, rows, num_experts, block_m)
    module.launch(flat, counts, order, offsets, position, used, block_m)
    return order, offsets, position, tiles


@grouping_op.register_fake
def _(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = experts.shape[0] * experts.shape[1]
    sizes = (rows, num_experts + 1, rows)
    order, offsets, position = (experts.new_empty((size,), dtype=torch.int64) for size in sizes)
    return order, offsets, position, experts.new_empty((3 * most_tiles(rows, num_experts),), dtype=torch.int32)
