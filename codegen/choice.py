"""Run FFNs whose experts chose their tokens: a batched product in which the gather, the expression and the sum by token
are part of the kernels; forward and backward.

Every expert has the same number of rows, so nothing is sorted or counted: one launch writes where the rows lie
(`moefx.codegen.kernels.choice_layout`), the grouped projections run over equal groups, and a token adds up the rows
that it has. Nothing waits for the device, and repeated runs give the same bits.

Shapes: T tokens, E experts, C tokens of each, R = E * C rows, D columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefx.codegen import backward, runtime
from moefx.codegen.choice_spec import WEIGHT, ChoiceSpec
from moefx.codegen.kernels import ChoiceGradSpec, ChoiceLayoutSpec, ChoiceSumSpec
from moefx.codegen.launcher import launcher
from moefx.codegen.reasons import CannotLower
from moefx.codegen.routing import most_tiles
from moefx.codegen.row_gradients import row_gradients
from moefx.codegen.runtime import Combine, LoadedRegion, rows_of
from moefx.codegen.schedule import load_class
from moefx.codegen.targets import Target, target_of

_SPECS: dict[str, ChoiceSpec] = {}


def register(spec: ChoiceSpec) -> str:
    """Make a spec callable by its key and return the key."""
    _SPECS[spec.key] = spec
    return spec.key


def spec_of(key: str) -> ChoiceSpec:
    """Return the spec of a key."""
    if key not in _SPECS:
        raise CannotLower(
            f"run the lowered expert choice {key}",
            found="a graph compiled in another process",
            do="compile the model again with torch.compile(model, backend='moefx')",
        )
    return _SPECS[key]


def clear() -> None:
    """Forget the specs and kernels of this process; files stay."""
    _SPECS.clear()
    _forward.cache_clear()
    _backward.cache_clear()


@dataclass(frozen=True)
class _Layout:
    """Where rows lie: a row of each token and expert, further ones, tokens to read, offsets [E + 1], row tiles."""

    first: Tensor
    chain: Tensor
    order: Tensor
    offsets: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, tokens: Tensor, count: int, experts: int, block_m: int) -> _Layout:
        """Write the layout of the chosen ``tokens`` [R] of ``count``, in one launch after a fill."""
        made = cls.empty(tokens, count, experts)
        made.first.fill_(-1)
        if tokens.shape[0]:
            launch = launcher(ChoiceLayoutSpec(), tokens.device).launch
            used = runtime.tiles_of(made.tiles, tokens.shape[0], experts, block_m)
            launch(tokens, made.first, made.chain, made.order, made.offsets, used, block_m)
        return made

    @classmethod
    def empty(cls, tokens: Tensor, count: int, experts: int) -> _Layout:
        """Return a layout without content."""
        narrow, rows = torch.int32, tokens.shape[0]
        return cls(
            tokens.new_empty((count, experts), dtype=narrow),
            tokens.new_empty((rows,), dtype=narrow),
            tokens.new_empty((rows,), dtype=torch.int64),
            tokens.new_zeros((experts + 1,), dtype=torch.int64),
            tokens.new_empty((3 * most_tiles(rows, experts),), dtype=narrow),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.first, self.chain, self.order, self.offsets, self.tiles]

    def summed(
        self, spec: ChoiceSumSpec, rows: Tensor, weights: Sequence[Tensor], tail: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the sum by token, and the sum before the tail if it is kept."""
        out = rows.new_empty((self.first.shape[0], spec.features))
        kept = [torch.empty_like(out)] if spec.keep else []
        flat = [t.reshape(-1, spec.features).contiguous() for t in tail]
        if out.numel():
            kernel = launcher(spec, rows.device)
            kernel.launch(rows, *weights, self.first, self.chain, *flat, out, *kept)
        return out, kept


def _of_region(spec: ChoiceSpec, tensors: Sequence[Any], layout: _Layout) -> list[Any]:
    """Return the inputs of the region of projections, in the order of :func:`moefx.codegen.runtime.region_op`."""
    return [tensors[0], layout.offsets, layout.order, layout.order, layout.tiles, *tensors[2 : spec.ends_at]]


def _flat(weights: Tensor) -> Tensor:
    return weights.reshape(-1).to(torch.float32).contiguous()


@functools.lru_cache(maxsize=1024)
def _forward(key: str, training: bool, target: Target, load: int, experts: int) -> LoadedRegion:
    spec = spec_of(key)
    return LoadedRegion((spec.keeping() if training else spec).region, target, load * experts, experts)


@functools.lru_cache(maxsize=1024)
def _backward(key: str, target: Target, load: int) -> backward.LoadedBackward:
    return backward.LoadedBackward(spec_of(key).region, target, load, runtime.row_block(target, load))


def _sizes(spec: ChoiceSpec, tensors: Sequence[Tensor]) -> tuple[int, int, int]:
    """Return T, E and the load class."""
    experts, rows = tensors[WEIGHT].shape[0], tensors[1].shape[0]
    return tensors[0].shape[0], experts, load_class(rows, experts)


def _run(key: str, tensors: Sequence[Tensor], training: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the result, and in training what its gradient reads: the layout, the rows, the expressions' inputs."""
    spec = spec_of(key)
    count, experts, load = _sizes(spec, tensors)
    x, tokens = rows_of(tensors[0]), tensors[1].to(torch.int64).contiguous()
    loaded = _forward(key, training, target_of(x.device), load, experts)
    layout = _Layout.of(tokens, count, experts, loaded.block_m)
    rows, saved = loaded(_of_region(spec, [x, *tensors[1:]], layout))
    total = spec.keeping().total if training else spec.total
    end = spec.ends_at
    out, kept = layout.summed(total, rows, [_flat(tensors[end])], tensors[end + 1 :])
    return out, [*layout.tensors, rows, *saved, *kept] if training else []


@torch.library.custom_op("moefx::choice", mutates_args=())
def choice_op(tensors: Sequence[Tensor], key: str) -> Tensor:
    """Run ``key`` on tokens [T, D], chosen tokens [R], each projection's weights and biases, weights [R], the tail."""
    return _run(key, tensors, training=False)[0]


@choice_op.register_fake
def _(tensors: Sequence[Tensor], key: str) -> Tensor:
    return tensors[0].new_empty((tensors[0].shape[0], spec_of(key).total.features))


@torch.library.custom_op("moefx::choice_train", mutates_args=())
def choice_train_op(tensors: Sequence[Tensor], key: str) -> list[Tensor]:
    """Run ``key`` as ``moefx::choice`` does; return its result and what its gradient needs."""
    out, saved = _run(key, tensors, training=True)
    return [out, *saved]


@choice_train_op.register_fake
def _(tensors: Sequence[Tensor], key: str) -> list[Tensor]:
    spec, x = spec_of(key), tensors[0]
    rows, region = tensors[1].shape[0], spec.region
    layout = _Layout.empty(tensors[1], x.shape[0], tensors[WEIGHT].shape[0])
    # An identity at the end saves nothing; the rows themselves are kept for the gradient of their weights.
    saves = [one for one, is_saved in zip(region.linears, region.saves, strict=True) if is_saved]
    saved = [x.new_empty((rows, one.out_features * one.halves)) for one in saves]
    out = x.new_empty((x.shape[0], spec.total.features))
    kept = [torch.empty_like(out)] if spec.keeping().total.keep else []
    return [out, *layout.tensors, x.new_empty((rows, spec.total.features)), *saved, *kept]


class _Pass(backward.BackwardPass):
    """One backward pass through the projections; the layout knows which rows a token has."""

    def __init__(self, layout: _Layout, total: ChoiceSumSpec, *given: Any) -> None:
        super().__init__(*given)
        self.layout, self.total = layout, total

    def slot_sum(self, kernel: Combine, rows: Tensor) -> Tensor:
        """Return the sum of the gradients of each token's rows."""
        return self.layout.summed(self.total, rows, [], [])[0]


@torch.library.custom_op("moefx::choice_backward", mutates_args=())
def choice_backward_op(
    grad: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], key: str, wants: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of the wanted ones of ``tensors``."""
    spec, end = spec_of(key), spec_of(key).ends_at
    _, _, load = _sizes(spec, tensors)
    layout, rows, rest = _Layout(*saved[:5]), saved[5], list(saved[6:])
    found: dict[int, Tensor] = {}
    if spec.tail_grad is not None:
        kept = rest.pop() if spec.tail_grad.reads_rows else grad
        grad, of_tail = row_gradients(spec.tail_grad, grad, kept, None, tensors[end + 1 :])
        found |= dict(enumerate(of_tail, end + 1))
    rows_grad, weights_grad = _through_sum(spec, rows_of(grad), rows, tensors)
    found[end] = weights_grad.view(tensors[end].shape).to(tensors[end].dtype)
    loaded = _backward(key, target_of(grad.device), load)
    inner = [wants[0], *[False] * 4, *wants[2:end]]
    given = _of_region(spec, tensors, layout)
    made = _Pass(layout, spec.input_sum, loaded, rows_grad, given, rest, inner).run()
    found |= dict(zip([i for i in (0, *range(2, end)) if wants[i]], made, strict=True))
    return [found[i] for i, wanted in enumerate(wants) if wanted]


def _through_sum(spec: ChoiceSpec, grad: Tensor, rows: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows that were added up and of their weights [R]."""
    tokens, weights = tensors[1].to(torch.int64).contiguous(), _flat(tensors[spec.ends_at])
    rows_grad, weights_grad = torch.empty_like(rows), torch.empty_like(weights)
    if rows.numel():
        kernel = launcher(ChoiceGradSpec(spec.total.features, spec.total.dtype), grad.device)
        kernel.launch(grad, rows, weights, tokens, rows_grad, weights_grad)
    return rows_grad, weights_grad


backward.differentiate_by(choice_train_op, choice_backward_op, "a lowered expert choice")
