"""What a schedule is tried on: operands of a kernel for a load, its launch, and what torch computes for some of it.

A trial draws operands once; every schedule writes into results that start as NaN, and a sample of them is compared.

Shapes: E experts of ``load`` rows each, R rows, T tokens, k slots, K input and N output columns; B samples, H heads of
D values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moefx.codegen import runtime
from moefx.codegen.derivative import differentiate
from moefx.codegen.kernels import HeadAttentionSpec, InputGradSpec, WeightGradSpec
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import LinearSpec

if TYPE_CHECKING:
    from moefx.codegen.tune import ShapeClass

#: Results are compared in so many rows, or columns, of so many experts.
_EXPERTS, _ROWS = 8, 16
#: Most values of one tensor of queries.
_MOST_VALUES = 2**27


def trial_of(shape: ShapeClass, device: torch.device) -> Trial:
    """Return the trial of a class's kernel on a device."""
    for kind, made in _TRIALS.items():
        if isinstance(shape.spec, kind):
            return made(shape, device)
    raise TypeError(f"nothing tries {shape.spec.name}")


class Trial(ABC):
    """Operands for one kernel under one load, and what some of its results are to be."""

    def __init__(self, shape: ShapeClass, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.dtype: torch.dtype = getattr(torch, shape.spec.dtype)  # type: ignore[union-attr]
        self.upcast = self.dtype == torch.bfloat16 and runtime.interpreting()
        self._generator = torch.Generator(device).manual_seed(0)

    @abstractmethod
    def arguments(self, schedule: Schedule) -> list[Any]:
        """Return what ``launch`` takes, with results that are still NaN."""

    @abstractmethod
    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield results of the last arguments beside what torch computes."""

    def error(self) -> float:
        """Return the largest relative error of a result."""
        found = ((got.double(), want.double()) for got, want in self.pairs())
        return max(float((got - want).norm() / want.norm().clamp_min(1e-30)) for got, want in found)

    def draw(self, *sizes: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers."""
        made = torch.empty(sizes, device=self.device, dtype=dtype or self.dtype)
        return made.normal_(0.0, scale, generator=self._generator)

    def nan(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a result that nothing has written."""
        return torch.full(sizes, torch.nan, device=self.device, dtype=dtype or self.dtype)


class _RowTrial(Trial):
    """Rows sorted by expert, spread evenly."""

    def __init__(self, shape: ShapeClass, device: torch.device, top_k: int) -> None:
        super().__init__(shape, device)
        self.experts, self.rows, self.top_k = shape.experts, shape.load * shape.experts, top_k
        self.tokens = -(-self.rows // top_k)
        self.order = torch.randperm(self.rows, device=device, generator=self._generator)
        self.offsets = torch.arange(self.experts + 1, device=device) * shape.load
        self.gates = self.draw(self.tokens, top_k, dtype=torch.float32)

    def tiles(self) -> Tensor:
        """Return the tile map, whose height the class fixes."""
        return runtime.tile_map(self.offsets, self.rows, self.shape.block_m)

    def sampled(self) -> Iterator[tuple[int, slice]]:
        """Yield the first rows of some experts."""
        for expert in range(min(_EXPERTS, self.experts)):
            start = expert * self.shape.load
            yield expert, slice(start, start + min(_ROWS, self.shape.load))


class LinearTrial(_RowTrial):
    """A forward projection."""

    def __init__(self, shape: ShapeClass, device: torch.device) -> None:
        spec = shape.spec
        assert isinstance(spec, LinearSpec)
        super().__init__(shape, device, spec.top_k if spec.gather else 1)
        self.spec = spec
        self.x = self.draw(self.tokens if spec.gather else self.rows, spec.in_features)
        sizes, scale = (self.experts, spec.weight_rows), spec.in_features**-0.5
        self.weights = [self.draw(*sizes, spec.in_features, scale=scale) for _ in range(spec.weights)]
        self.biases = [self.draw(*sizes) for _ in range(spec.weights if spec.bias else 0)]

    def arguments(self, schedule: Schedule) -> list[Any]:
        """Return what ``launch`` takes, with results that are still NaN."""
        spec, order = self.spec, [self.order] if self.spec.gather else []
        self.out = self.nan(self.rows, spec.out_features)
        kept = [self.nan(self.rows, spec.out_features * spec.halves)] if spec.keep else []
        planes = schedule.partials(spec.halves)
        partial = [self.nan(planes, *self.out.shape, dtype=torch.float32)] if planes else []
        given = [self.x, *self.weights, *self.biases, *order, self.tiles(), *partial]
        return [*given, self.out, *kept, self.upcast]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield sampled rows of the result."""
        for expert, rows in self.sampled():
            source = self.order[rows] // self.spec.top_k if self.spec.gather else rows
            x = self.x[source].float()
            z = [x @ weight[expert].float().t() for weight in self.weights]
            if self.biases:
                z = [value + bias[expert].float() for value, bias in zip(z, self.biases, strict=True)]
            halves = z if len(z) == self.spec.halves else list(z[0].chunk(2, dim=1))
            yield self.out[rows], self.spec.epilogue.evaluate(*halves)


class InputGradTrial(_RowTrial):
    """The gradient of the rows that a projection read."""

    def __init__(self, shape: ShapeClass, device: torch.device) -> None:
        spec = shape.spec
        assert isinstance(spec, InputGradSpec)
        super().__init__(shape, device, spec.top_k if spec.combined else 1)
        self.spec = spec
        n, k = spec.reduced, spec.columns
        self.grad = self.draw(self.tokens if spec.combined else self.rows, n * spec.weights)
        self.weights = [self.draw(self.experts, n, k, scale=n**-0.5) for _ in range(spec.weights)]
        self.bias = self.draw(self.experts, n, scale=n**-0.5) if spec.combined and spec.bias else None
        self.kept = self.draw(self.rows, k * spec.before.inputs) if spec.recomputes else None

    def arguments(self, schedule: Schedule) -> list[Any]:
        """Return what ``launch`` takes, with results that are still NaN."""
        spec, rows = self.spec, self.rows
        given: list[Any] = [self.grad, *self.weights, *([] if self.bias is None else [self.bias])]
        given += [self.order, self.gates] if spec.combined else []
        given += [self.kept] if spec.recomputes else []
        self.results = {"out": self.nan(rows, spec.columns * spec.before.inputs)}
        if spec.recomputes:
            self.results["value"] = self.nan(rows, spec.columns)
        if spec.combined:
            self.results["partial"] = self.nan(spec.column_tiles(schedule), rows, dtype=torch.float32)
        return [*given, self.tiles(), *self.results.values(), self.upcast]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield sampled rows of the gradient, and of what is recomputed for others."""
        spec = self.spec
        for expert, rows in self.sampled():
            slot = self.order[rows]
            grad = self.grad[slot // self.top_k if spec.combined else rows].double()
            pieces = grad.chunk(spec.weights, 1)
            g = torch.stack([part @ w[expert].double() for part, w in zip(pieces, self.weights, strict=True)]).sum(0)
            gate = self.gates.flatten()[slot].double()[:, None] if spec.combined else torch.ones_like(g[:, :1])
            if self.kept is None:
                yield self.results["out"][rows], g
                continue
            z = self.kept[rows].double().chunk(spec.before.inputs, 1)
            value, *grads = differentiate(spec.before).evaluate(g * gate, *z)
            yield self.results["out"][rows], torch.cat(grads, 1)
            yield self.results["value"][rows], value * gate
            if spec.combined:
                more = 0.0 if self.bias is None else (grad @ self.bias[expert].double())
                yield self.results["partial"][:, rows].double().sum(0), (g * value).sum(1) + more


class WeightGradTrial(_RowTrial):
    """The gradient of a stacked weight."""

    def __init__(self, shape: ShapeClass, device: torch.device) -> None:
        spec = shape.spec
        assert isinstance(spec, WeightGradSpec)
        super().__init__(shape, device, spec.top_k if spec.reads_order else 1)
        self.spec = spec
        self.grad = self.draw(self.tokens if spec.combined else self.rows, spec.rows)
        self.x = self.draw(self.tokens if spec.gather else self.rows, spec.columns)

    def arguments(self, schedule: Schedule) -> list[Any]:
        """Return what ``launch`` takes, with results that are still NaN."""
        spec = self.spec
        self.out = self.nan(self.experts, spec.rows, spec.columns)
        order = [self.order] if spec.reads_order else []
        gates = [self.gates] if spec.weighs_bias else []
        bias = [self.nan(self.experts, spec.rows)] if spec.bias else []
        return [self.grad, self.x, *order, *gates, self.offsets, self.out, *bias, self.upcast]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first rows of some experts' gradients."""
        spec, load = self.spec, self.shape.load
        for expert in range(min(_EXPERTS, self.experts)):
            rows = slice(expert * load, (expert + 1) * load)
            token = self.order[rows] // self.top_k
            grad = self.grad[token if spec.combined else rows][:, :_ROWS].double()
            x = self.x[token if spec.gather else rows].double()
            yield self.out[expert, :_ROWS], grad.t() @ x


class HeadTrial(Trial):
    """Attention of which every query computes half of its heads; ``load`` is the number of queries and of keys."""

    def __init__(self, shape: ShapeClass, device: torch.device) -> None:
        from moefx.codegen.attention import grouped

        super().__init__(shape, device)
        spec, length = shape.spec, shape.load
        assert isinstance(spec, HeadAttentionSpec)
        self.spec, self.scale = spec, spec.width**-0.5
        most = max(1, _MOST_VALUES // (length * spec.heads * spec.width))
        samples = min(most, -(-shape.experts // spec.heads))
        self.size = (samples, length, spec.heads, spec.width)
        self.q, self.k, self.v, self.grad = (self.draw(*self.size) for _ in range(4))
        drawn = self.draw(*self.size[:3], dtype=torch.float32)
        median = drawn.median(dim=2, keepdim=True).values
        self.gates = torch.where(drawn >= median, drawn.abs() + 0.1, 0.0)
        self.order, self.offsets = grouped(self.gates)
        self.out, self.lse, self.delta = self._forward()

    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the kernels of the gradient read, one sample and head at a time."""
        out, lse = torch.zeros_like(self.q), torch.zeros_like(self.gates)
        for b in range(self.size[0] if self.spec.stage != "forward" else 0):
            for h in range(self.spec.heads):
                logits = self.q[b, :, h].float() @ self.k[b, :, h].float().t() * self.scale
                lse[b, :, h] = logits.logsumexp(1) / math.log(2.0)
                out[b, :, h] = self.gates[b, :, h, None] * (logits.softmax(1) @ self.v[b, :, h].float())
        return out, lse, (out.float() * self.grad.float()).sum(3)

    def arguments(self, schedule: Schedule) -> list[Any]:
        """Return what ``launch`` takes, with results that are still NaN."""
        numbers = (self.scale, self.upcast)
        plain = [self.q, self.k, self.v, self.gates, self.order]
        if self.spec.stage == "keys":
            self.results = [self.nan(*self.size), self.nan(*self.size)]
            return [*plain, self.offsets, self.grad, self.lse, self.delta, *self.results, *numbers]
        tiles = runtime.tile_map(self.offsets, self.order.shape[0], schedule.block_m)
        rows = [self.nan(*self.size[:3], dtype=torch.float32) for _ in range(2)]
        self.results = [self.nan(*self.size), rows[0]]
        if self.spec.stage == "forward":
            return [*plain, tiles, *self.results, *numbers]
        return [*plain, tiles, self.grad, self.out, self.lse, *self.results, rows[1], *numbers]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the results of the first and of the last sample and head, by autograd."""
        for b, h in ((0, 0), (self.size[0] - 1, self.spec.heads - 1)):
            q, k, v = (t[b, :, h].double().requires_grad_() for t in (self.q, self.k, self.v))
            gates = self.gates[b, :, h].double().requires_grad_()
            out = gates[:, None] * ((q @ k.t() * self.scale).softmax(1) @ v)
            if self.spec.stage == "forward":
                yield self.results[0][b, :, h], out.detach()
                continue
            dq, dk, dv, dgates = torch.autograd.grad(out, (q, k, v, gates), self.grad[b, :, h].double())
            chosen = gates.detach() > 0
            want = (dq, torch.where(chosen, dgates, 0.0)) if self.spec.stage == "queries" else (dk, dv)
            for found, expected in zip(self.results, want, strict=True):
                yield found[b, :, h], expected


_TRIALS: dict[type, Callable[[ShapeClass, torch.device], Trial]] = {
    LinearSpec: LinearTrial,
    InputGradSpec: InputGradTrial,
    WeightGradSpec: WeightGradTrial,
    HeadAttentionSpec: HeadTrial,
}
