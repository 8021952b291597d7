"""Reverse-mode derivatives of pointwise programs, as pointwise programs again.

The derivative that a backward kernel prints is that of the very steps which the forward kernel printed, so any
activation has one.  Where a step chooses between two values, the value not chosen may be infinite on the way back
(``exp`` in softplus): the choice is carried along as a mask and applied last, so that it never multiplies a zero.

Symbols: ``z0, z1`` the inputs, ``g`` the gradient of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moefx.codegen.pointwise import OPS, Arg, Builder, Pointwise, Step, helpers_of, run, spell, statements_of

#: A condition that has to hold, or not to hold, for a contribution to count.
Mask = tuple[tuple[Arg, bool], ...]


@dataclass(frozen=True)
class Derivative:
    """The value of a program at ``z0, ...`` and, for the gradient ``g`` of that value, the gradient of each input."""

    inputs: int
    steps: tuple[Step, ...]
    value: Arg
    grads: tuple[Arg, ...]

    @property
    def helpers(self) -> tuple[str, ...]:
        """Names of the device functions that the printed program calls, callees first."""
        return helpers_of(self.steps)

    @property
    def reads(self) -> frozenset[Arg]:
        """Names of what the printed gradients read; a constant takes its shape from ``z0``."""
        shaped = () if all(isinstance(grad, str) for grad in self.grads) else ("z0",)
        return frozenset(arg for step in self.steps for arg in step.args) | {self.value, *self.grads, *shaped}

    def triton(self) -> list[str]:
        """Return the program as Triton statements, one per step."""
        return statements_of(self.steps)

    def printed_value(self) -> str:
        """Return the value as a Triton expression of the shape of the inputs."""
        return _shaped(self.value)

    def printed_grads(self) -> list[str]:
        """Return the gradients as Triton expressions of the shape of the inputs."""
        return [_shaped(grad) for grad in self.grads]

    def evaluate(self, g: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the value and the gradients in float64: the reference for kernels that contain them."""
        values: dict[str, Any] = {f"z{i}": z.to(torch.float64) for i, z in enumerate(inputs)}
        values = run(self.steps, values | {"g": g.to(torch.float64)})
        shape = values["z0"]
        return tuple(
            values[r].expand_as(shape) if isinstance(r, str) else torch.full_like(shape, r)
            for r in (self.value, *self.grads)
        )


def _shaped(result: Arg) -> str:
    return result if isinstance(result, str) else f"(z0 * 0.0 + {spell(result)})"


def differentiate(program: Pointwise, with_value: bool = True) -> Derivative:
    """Return the derivative of a program; without its value, that is zero and its steps are left out."""
    return _Reverse(program).derivative(with_value)


class _Reverse:
    """One backward walk over the steps of a program."""

    def __init__(self, program: Pointwise) -> None:
        self.program = program
        self.b = Builder(program.inputs, "g")
        self.names: dict[str, Arg] = {f"z{i}": f"z{i}" for i in range(program.inputs)}
        self.bars: dict[str, list[tuple[Mask, Arg]]] = {}

    def derivative(self, with_value: bool) -> Derivative:
        steps = self.program.steps
        for step in steps:
            self.names[step.name] = self.b.step(step.op, *map(self.new, step.args))
        if isinstance(self.program.result, str):
            self.bars[self.program.result] = [((), "g")]
        for step in reversed(steps):
            mask, bar = self.adjoint(step.name)
            if bar == 0.0 or OPS[step.op].is_bool:
                continue
            args = [self.new(a) for a in step.args]
            for position, chosen, value in _rules(self, step.op, args, self.names[step.name], bar):
                arg = step.args[position]
                if isinstance(arg, str):
                    self.bars.setdefault(arg, []).append(((*mask, *chosen), value))
        grads = [self.applied(*self.adjoint(f"z{i}")) for i in range(self.program.inputs)]
        result = self.new(self.program.result) if with_value else 0.0
        kept, (value, *rest) = self.b.finish_all(result, *grads)
        return Derivative(self.program.inputs, kept, value, tuple(rest))

    def new(self, arg: Arg) -> Arg:
        return self.names[arg] if isinstance(arg, str) else arg

    def adjoint(self, name: str) -> tuple[Mask, Arg]:
        """Return what has come together for a value: as it is if it came one way, else the sum."""
        found = self.bars.pop(name, [])
        if len(found) == 1:
            return found[0]
        total: Arg = 0.0
        for mask, value in found:
            total = self.add(total, self.applied(mask, value))
        return (), total

    def applied(self, mask: Mask, value: Arg) -> Arg:
        for condition, holds in reversed(mask):
            value = self.b.step("where", condition, *((value, 0.0) if holds else (0.0, value)))
        return value

    def add(self, a: Arg, b: Arg) -> Arg:
        if a == 0.0 or b == 0.0:
            return b if a == 0.0 else a
        return a + b if isinstance(a, float) and isinstance(b, float) else self.b.step("add", a, b)

    def mul(self, a: Arg, b: Arg) -> Arg:
        if isinstance(a, float) and isinstance(b, float):
            return a * b
        if 1.0 in (a, b):
            return b if a == 1.0 else a
        return self.b.step("mul", a, b)

    def neg(self, a: Arg) -> Arg:
        return -a if isinstance(a, float) else self.b.step("neg", a)


def _rules(r: _Reverse, op: str, args: list[Arg], out: Arg, bar: Arg) -> Iterator[tuple[int, Mask, Arg]]:
    """Yield (position of the argument, when it counts, its gradient) of one step."""
    if op in _UNARY:
        yield 0, (), _UNARY[op](r, args[0], out, bar)
    elif op in ("add", "sub"):
        yield 0, (), bar
        yield 1, (), bar if op == "add" else r.neg(bar)
    elif op == "mul":
        yield 0, (), r.mul(bar, args[1])
        yield 1, (), r.mul(bar, args[0])
    elif op == "div":
        over = r.b.step("div", bar, args[1])
        yield 0, (), over
        yield 1, (), r.neg(r.mul(over, out))
    elif op in ("maximum", "minimum"):
        yield from _extreme(r, "ge" if op == "maximum" else "le", args, bar)
    elif op == "where":
        yield 1, ((args[0], True),), bar
        yield 2, ((args[0], False),), bar
    elif op not in ("floor", "ceil", "to_float"):
        raise NotImplementedError(f"the derivative of {op}")


def _extreme(r: _Reverse, wins: str, args: list[Arg], bar: Arg) -> Iterator[tuple[int, Mask, Arg]]:
    """Two equal values share the gradient, as in torch."""
    left, right = args
    shared = r.b.step("where", r.b.step("eq", left, right), r.mul(bar, 0.5), bar)
    yield 0, ((r.b.step(wins, left, right), True),), shared
    yield 1, ((r.b.step(wins, right, left), True),), shared


def _abs(r: _Reverse, a: Arg, out: Arg, bar: Arg) -> Arg:
    below = r.b.step("where", r.b.step("lt", a, 0.0), r.neg(bar), 0.0)
    return r.b.step("where", r.b.step("gt", a, 0.0), bar, below)


def _erf(r: _Reverse, a: Arg, out: Arg, bar: Arg) -> Arg:
    bell = r.b.step("exp", r.neg(r.mul(a, a)))
    return r.mul(bar, r.mul(bell, 2.0 / math.sqrt(math.pi)))


def _complement(r: _Reverse, value: Arg) -> Arg:
    return r.b.step("sub", 1.0, value)


_UNARY: dict[str, Any] = {
    "neg": lambda r, a, out, bar: r.neg(bar),
    "abs": _abs,
    "exp": lambda r, a, out, bar: r.mul(bar, out),
    "exp2": lambda r, a, out, bar: r.mul(r.mul(bar, out), math.log(2)),
    "log": lambda r, a, out, bar: r.b.step("div", bar, a),
    "log2": lambda r, a, out, bar: r.b.step("div", r.mul(bar, 1 / math.log(2)), a),
    "sqrt": lambda r, a, out, bar: r.b.step("div", r.mul(bar, 0.5), out),
    "rsqrt": lambda r, a, out, bar: r.mul(r.mul(bar, -0.5), r.mul(out, r.mul(out, out))),
    "sin": lambda r, a, out, bar: r.mul(bar, r.b.step("cos", a)),
    "cos": lambda r, a, out, bar: r.neg(r.mul(bar, r.b.step("sin", a))),
    "sigmoid": lambda r, a, out, bar: r.mul(bar, r.mul(out, _complement(r, out))),
    "tanh": lambda r, a, out, bar: r.mul(bar, _complement(r, r.mul(out, out))),
    "erf": _erf,
    "expm1": lambda r, a, out, bar: r.mul(bar, r.b.step("exp", a)),
    "log1p": lambda r, a, out, bar: r.b.step("div", bar, r.b.step("add", 1.0, a)),
}
