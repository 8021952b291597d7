"""Train lowered regions: the forward pass that keeps what its gradient needs, and the kernels of that gradient.

``moefx::region_train`` returns a region's result and, for each expression, what went into it; the expression itself is
recomputed.  Its gradient is ``moefx::region_backward``.  Neither waits for the device, and nothing is added in an order
that scheduling decides, so repeated runs give the same bits.

Shapes: T tokens, k slots, R = T * k routed rows, E experts, K input and N output columns of a projection.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moefx.codegen import runtime, tune
from moefx.codegen.kernels import (
    GateGradSpec,
    InputGradSpec,
    PointGradSpec,
    TokenGradSpec,
    TokenProgram,
    WeightGradSpec,
)
from moefx.codegen.launcher import Launcher
from moefx.codegen.row_gradients import row_gradients
from moefx.codegen.runtime import (
    Combine,
    LoadedRegion,
    Operands,
    fake_result,
    region_of,
    routed_rows,
    row_tiles,
    rows_of,
)
from moefx.codegen.schedule import load_class
from moefx.codegen.spec import CombineSpec, Kernel, LinearSpec, RegionSpec
from moefx.codegen.targets import Target, target_of
from moefx.errors import MoefxError


def training_region(region: RegionSpec) -> RegionSpec:
    """Return the region whose projections and combine keep what goes into the expressions behind them."""
    linears = tuple(dataclasses.replace(one, keep=not one.epilogue.is_identity) for one in region.linears)
    tail, combine = tail_grad(region), region.combine
    if combine is not None and tail is not None:
        combine = dataclasses.replace(combine, keep=tail.reads_rows)
    return dataclasses.replace(region, linears=linears, combine=combine)


def tail_grad(region: RegionSpec) -> TokenGradSpec | None:
    """Return the kernel of the gradient of what follows the combine, if anything does."""
    combine = region.combine
    if combine is None or not combine.operands:
        return None
    return TokenGradSpec(TokenProgram(combine.features, combine.dtype, combine.tail, combine.operands))


def last_grad(region: RegionSpec) -> PointGradSpec | None:
    """Return the kernel that starts the backward pass, if the last projection's result is saved."""
    spec = region.linears[-1]
    if not region.saves[-1]:
        return None
    slots = region.combine.top_k if region.combine else 1
    return PointGradSpec(spec.out_features, spec.dtype, region.combine is not None, slots, spec.epilogue)


def input_grad(region: RegionSpec, i: int) -> InputGradSpec:
    """Return the kernel of the gradient of what projection ``i`` reads, through the expression before it."""
    spec = region.linears[i]
    made = InputGradSpec(spec.in_features, spec.weight_rows, spec.dtype, weights=spec.weights, precision=spec.precision)
    if i > 0:
        made = dataclasses.replace(made, before=region.linears[i - 1].epilogue)
    if _is_combined(region, i) and region.combine is not None:
        made = dataclasses.replace(made, combined=True, bias=spec.bias, top_k=region.combine.top_k)
    return made


def weight_grad(region: RegionSpec, i: int) -> WeightGradSpec:
    """Return the kernel of the gradient of the weights of projection ``i``."""
    spec, combined = region.linears[i], _is_combined(region, i)
    slots = region.combine.top_k if combined and region.combine else spec.top_k if spec.gather else 1
    return WeightGradSpec(
        spec.weight_rows, spec.in_features, spec.dtype, spec.gather, combined, spec.bias, slots, spec.precision
    )


def slot_sum(spec: LinearSpec) -> CombineSpec | None:
    """Return the kernel that adds the gradients of a token's gathered rows."""
    return CombineSpec(spec.in_features, spec.top_k, spec.dtype, weighted=False) if spec.gather else None


def _is_combined(region: RegionSpec, i: int) -> bool:
    """Whether the gradient of projection ``i`` arrives by token, from the combine."""
    return region.combine is not None and i == len(region.linears) - 1 and not region.saves[-1]


def kernels(region: RegionSpec) -> list[Kernel | CombineSpec]:
    """Return the kernels of a region's backward pass, in the order in which they run."""
    found: list[Kernel | CombineSpec] = [one for one in (tail_grad(region), last_grad(region)) if one]
    for i in reversed(range(len(region.linears))):
        found += [input_grad(region, i), weight_grad(region, i)]
    found += [GateGradSpec()] if region.combine else []
    summed = slot_sum(region.linears[0])
    return [*found, summed] if summed else found


def sources(region: RegionSpec, target: Target, rows: int, experts: int) -> dict[str, str]:
    """Return the modules of a region's backward pass on a target, by kernel name, in execution order."""
    from moefx.codegen.emit import emit

    load = load_class(rows, experts)
    block_m = runtime.row_block(target, load)
    return {
        spec.name: emit(
            spec, None if isinstance(spec, CombineSpec) else tune.schedule_for(spec, target, load, experts, block_m)
        )
        for spec in kernels(region)
    }


class LoadedBackward:
    """The backward kernels of a region for one target and load class."""

    def __init__(self, region: RegionSpec, target: Target, load: int, experts: int) -> None:
        self.region, self.block_m = region, runtime.row_block(target, load)

        def loaded(spec: Kernel) -> Launcher:
            return Launcher(spec, tune.schedule_for(spec, target, load, experts, self.block_m))

        self.tail, start = tail_grad(region), last_grad(region)
        self.start = loaded(start) if start else None
        numbers = range(len(region.linears))
        self.input_grads = [loaded(input_grad(region, i)) for i in numbers]
        self.weight_grads = [loaded(weight_grad(region, i)) for i in numbers]
        self.gate_grad = loaded(GateGradSpec()) if region.combine else None
        summed = slot_sum(region.linears[0])
        self.slot_sum = Combine(summed) if summed else None
        self.upcast = region.linears[0].dtype == "bfloat16" and runtime.interpreting()

    def __call__(
        self, grad: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], wants: Sequence[bool]
    ) -> list[Tensor]:
        """Return the gradients of the wanted inputs."""
        return BackwardPass(self, grad, tensors, saved, wants).run()


class BackwardPass:
    """One backward pass: the gradient moves from the last projection to the first."""

    def __init__(
        self,
        loaded: LoadedBackward,
        grad: Tensor,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        wants: Sequence[bool],
    ) -> None:
        region = loaded.region
        self.k, self.region, self.wants = loaded, region, wants
        self.given = Operands.of(region, [rows_of(t) for t in tensors])
        self.at = Operands.of(region, range(len(tensors)))
        self.rows = routed_rows(region, tensors)
        self.tiles = row_tiles(self.given, self.rows, loaded.block_m)
        self.grad = rows_of(grad)
        self.saved = list(saved)
        self.gates = None if self.given.gates is None else self.given.gates.to(torch.float32).contiguous()
        self.partial: Tensor | None = None
        self.found: dict[int, Tensor] = {}

    def run(self) -> list[Tensor]:
        """Return the gradients of the wanted inputs, in their order."""
        last = len(self.region.linears) - 1
        if self.k.tail is not None:
            self.through_tail(self.k.tail)
        if self.k.start is not None:
            self.through_last(self.k.start)
        for i in range(last, 0, -1):
            grad, value = self.through(i)
            self.weights(i, value)
            self.grad = grad
        self.weights(0, self.given.x)
        if self.wants[self.at.x]:
            rows, _ = self.through(0)
            self.found[self.at.x] = rows if self.k.slot_sum is None else self.slot_sum(self.k.slot_sum, rows)
        if self.at.gates is not None and self.wants[self.at.gates]:
            self.found[self.at.gates] = self.gate_grad()
        return [self.found[i] for i, wanted in enumerate(self.wants) if wanted]

    def _order(self) -> Tensor:
        assert self.given.order is not None
        return self.given.order

    def slot_sum(self, kernel: Combine, rows: Tensor) -> Tensor:
        """Return the sum of the gradients of each token's rows."""
        return kernel(rows, self._order(), None, (), self.given.position)

    def through_tail(self, spec: TokenGradSpec) -> None:
        """Take the gradient through what follows the combine, and store that of its operands."""
        kept = self.saved.pop() if spec.reads_rows else self.grad
        self.grad, found = row_gradients(spec, self.grad, kept, None, self.given.tail)
        self.found |= dict(zip(self.at.tail, found, strict=True))

    def through_last(self, kernel: Launcher) -> None:
        """Take the gradient through the expression behind the last projection."""
        kept = self.saved.pop()
        out = torch.empty_like(kept)
        combined: list[Any] = []
        if self.gates is not None:
            self.partial = kept.new_empty((1, self.rows), dtype=torch.float32)
            combined = [self._order(), self.gates]
        if self.rows:
            partial = [] if self.partial is None else [self.partial]
            kernel.launch(self.grad, *combined, kept, self.given.offsets, out, *partial)
        self.grad = out

    def through(self, i: int) -> tuple[Tensor, Tensor]:
        """Take the gradient through projection ``i``; return it and what the projection read."""
        kernel = self.k.input_grads[i]
        spec = kernel.spec
        assert isinstance(spec, InputGradSpec)
        arguments: list[Any] = [self.grad, *(w.contiguous() for w in self.given.weights[i])]
        arguments += [b.contiguous() for b in self.given.biases[i]] if spec.bias else []
        arguments += [self._order(), self.gates] if spec.combined else []
        kept = self.saved.pop() if i > 0 else self.given.x
        arguments += [kept] if spec.recomputes else []
        out = self.grad.new_empty((self.rows, spec.columns * spec.before.inputs))
        arguments += [self.tiles, out]
        value = kept
        if spec.recomputes:
            value = self.grad.new_empty((self.rows, spec.columns))
            arguments.append(value)
        if spec.combined:
            parts = spec.column_tiles(kernel.schedule)
            self.partial = self.grad.new_empty((parts, self.rows), dtype=torch.float32)
            arguments.append(self.partial)
        if self.tiles.numel():
            kernel.launch(*arguments, self.k.upcast)
        return out, value

    def weights(self, i: int, x: Tensor) -> None:
        """Store the gradients of the weights and biases of projection ``i``, which read ``x``."""
        kernel = self.k.weight_grads[i]
        spec = kernel.spec
        assert isinstance(spec, WeightGradSpec)
        for j, weight in enumerate(self.at.weights[i]):
            bias = self.at.biases[i][j] if spec.bias else None
            if not (self.wants[weight] or (bias is not None and self.wants[bias])):
                continue
            experts = self.given.offsets.shape[0] - 1
            out = self.grad.new_empty((experts, spec.rows, spec.columns))
            outputs = [out] if bias is None else [out, self.grad.new_empty((experts, spec.rows))]
            arguments: list[Any] = [self.grad[:, j * spec.rows : (j + 1) * spec.rows], x]
            arguments += [self._order()] if spec.reads_order else []
            arguments += [self.gates] if spec.weighs_bias else []
            kernel.launch(*arguments, self.given.offsets, *outputs, self.k.upcast)
            self.found[weight] = out
            if bias is not None:
                self.found[bias] = outputs[1]

    def gate_grad(self) -> Tensor:
        """Return the gradient of the combine's weights."""
        gates, partial = self.given.gates, self.partial
        assert gates is not None
        assert partial is not None
        assert self.k.gate_grad is not None
        out = partial.new_empty((self.rows,))
        if self.rows:
            self.k.gate_grad.launch(partial, self._order(), out)
        return out.view(gates.shape).to(gates.dtype)


@functools.lru_cache(maxsize=1024)
def _loaded_training(key: str, target: Target, load: int, experts: int) -> LoadedRegion:
    return LoadedRegion(training_region(region_of(key)), target, load * experts, experts)


@functools.lru_cache(maxsize=1024)
def _loaded_backward(key: str, target: Target, load: int, experts: int) -> LoadedBackward:
    return LoadedBackward(region_of(key), target, load, experts)


def clear() -> None:
    """Forget the kernels of this process; files stay."""
    _loaded_training.cache_clear()
    _loaded_backward.cache_clear()


@torch.library.custom_op("moefx::region_train", mutates_args=())
def region_train_op(tensors: Sequence[Tensor], key: str) -> list[Tensor]:
    """Run the region ``key`` as ``moefx::region`` does; return its result and what its gradient needs."""
    x, experts = tensors[0], tensors[1].shape[0] - 1
    load = load_class(routed_rows(region_of(key), tensors), experts)
    out, saved = _loaded_training(key, target_of(x.device), load, experts)(tensors)
    return [out, *saved]


@region_train_op.register_fake
def _(tensors: Sequence[Tensor], key: str) -> list[Tensor]:
    region, x = region_of(key), tensors[0]
    rows = routed_rows(region, tensors)
    kept = [
        x.new_empty((rows, s.out_features * s.halves))
        for s, saves in zip(region.linears, region.saves, strict=True)
        if saves
    ]
    result = fake_result(region, tensors)
    combine = training_region(region).combine
    kept += [result.new_empty(result.shape)] if combine and combine.keep else []
    return [result, *kept]


@torch.library.custom_op("moefx::region_backward", mutates_args=())
def region_backward_op(
    grad: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], key: str, wants: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of the wanted ones of ``tensors``."""
    x, experts = tensors[0], tensors[1].shape[0] - 1
    load = load_class(routed_rows(region_of(key), tensors), experts)
    return _loaded_backward(key, target_of(x.device), load, experts)(grad, tensors, saved, wants)


def differentiate_by(train_op: Any, backward_op: Any, what: str) -> None:
    """Make ``train_op(tensors, key)`` differentiable once by ``backward_op(grad, tensors, saved, key, wants)``.

    The first result of ``train_op`` is differentiable, the others are what is saved; ``what`` is named in the error.
    """

    def fake(
        grad: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor], key: str, wants: Sequence[bool]
    ) -> list[Tensor]:
        return [t.new_empty(t.shape) for t, wanted in zip(tensors, wants, strict=True) if wanted]

    def gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
        tensors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if grads[0] is None:
            return [None] * ctx.count, None
        found = iter(backward_op(grads[0], list(tensors), list(saved), ctx.key, ctx.wants))
        return [next(found) if wanted else None for wanted in ctx.wants], None

    def second_derivative(ctx: Any, *grads: Any) -> None:
        raise MoefxError(
            f"the second derivative of {what} was asked for",
            found="a backward pass through its gradient (create_graph=True)",
            do='differentiate once, or compile with options={"kernels": "off"}',
        )

    backward_op.register_fake(fake)
    train_op.register_autograd(gradient, setup_context=_setup_context)
    backward_op.register_autograd(second_derivative)


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], str], output: Sequence[Tensor]) -> None:
    tensors, ctx.key = inputs
    ctx.count = len(tensors)
    ctx.wants = list(ctx.needs_input_grad[: ctx.count])  # flat: one entry per tensor of the list
    # What was saved has no gradient of its own; zeros in its place would be as large.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


differentiate_by(region_train_op, region_backward_op, "a lowered region")
