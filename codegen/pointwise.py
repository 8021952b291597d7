"""Pointwise programs: the expression between two projections, as data.

A program is a straight line of steps over float32 values. It is made from an FX subgraph by
:mod:`moefx.codegen.epilogue`, printed into Triton kernels by :mod:`moefx.codegen.emit`, and evaluated by
:meth:`Pointwise.evaluate`, which is the oracle of the tests.  One table, :data:`OPS`, gives each primitive its
Triton spelling and its torch meaning; activations are not in it, they arrive decomposed into primitives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: A step argument: the name of a value (``"z0"``, ``"v3"``) or a constant.
Arg = str | float


@dataclass(frozen=True)
class PointOp:
    """One primitive: its Triton spelling, its torch meaning and the device functions that the spelling calls."""

    triton: str
    torch: Callable[..., Any]
    helpers: tuple[str, ...] = ()
    is_bool: bool = False


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return torch.where(condition, torch.as_tensor(yes, dtype=torch.float64), torch.as_tensor(no, dtype=torch.float64))


def _extreme(pick: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: pick(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))


# `propagate_nan` because torch's maximum, relu and clamp keep a NaN and Triton's default drops it.
_NAN = "propagate_nan=tl.PropagateNan.ALL"

OPS: dict[str, PointOp] = {
    "add": PointOp("{0} + {1}", torch.add),
    "sub": PointOp("{0} - {1}", lambda a, b: a - b),
    "mul": PointOp("{0} * {1}", torch.mul),
    "div": PointOp("{0} / {1}", lambda a, b: a / b),
    "neg": PointOp("-{0}", torch.neg),
    "abs": PointOp("tl.abs({0})", torch.abs),
    "exp": PointOp("tl.exp({0})", torch.exp),
    "exp2": PointOp("tl.exp2({0})", torch.exp2),
    "log": PointOp("tl.log({0})", torch.log),
    "log2": PointOp("tl.log2({0})", torch.log2),
    "sqrt": PointOp("tl.sqrt({0})", torch.sqrt),
    "rsqrt": PointOp("tl.rsqrt({0})", torch.rsqrt),
    "sin": PointOp("tl.sin({0})", torch.sin),
    "cos": PointOp("tl.cos({0})", torch.cos),
    "floor": PointOp("tl.floor({0})", torch.floor),
    "ceil": PointOp("tl.ceil({0})", torch.ceil),
    "maximum": PointOp(f"tl.maximum({{0}}, {{1}}, {_NAN})", _extreme(torch.maximum)),
    "minimum": PointOp(f"tl.minimum({{0}}, {{1}}, {_NAN})", _extreme(torch.minimum)),
    "sigmoid": PointOp("_sigmoid({0})", torch.sigmoid, ("sigmoid",)),
    "tanh": PointOp("_tanh({0})", torch.tanh, ("sigmoid", "tanh")),
    "erf": PointOp("_erf({0})", torch.erf, ("erf",)),
    "expm1": PointOp("_expm1({0})", torch.expm1, ("expm1",)),
    "log1p": PointOp("_log1p({0})", torch.log1p, ("log1p",)),
    "where": PointOp("tl.where({0}, {1}, {2})", _where),
    "to_float": PointOp("tl.where({0}, 1.0, 0.0)", lambda a: a.to(torch.float64)),
    "gt": PointOp("{0} > {1}", lambda a, b: a > b, is_bool=True),
    "ge": PointOp("{0} >= {1}", lambda a, b: a >= b, is_bool=True),
    "lt": PointOp("{0} < {1}", lambda a, b: a < b, is_bool=True),
    "le": PointOp("{0} <= {1}", lambda a, b: a <= b, is_bool=True),
    "eq": PointOp("{0} == {1}", lambda a, b: a == b, is_bool=True),
    "ne": PointOp("{0} != {1}", lambda a, b: a != b, is_bool=True),
    "and": PointOp("{0} & {1}", torch.logical_and, is_bool=True),
    "or": PointOp("{0} | {1}", torch.logical_or, is_bool=True),
    "not": PointOp("{0} == 0", torch.logical_not, is_bool=True),
}


@dataclass(frozen=True)
class Step:
    """``name = op(*args)``."""

    name: str
    op: str
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class Pointwise:
    """A pointwise function of ``inputs`` values ``z0, z1, ...`` of equal shape, with one result."""

    inputs: int = 1
    steps: tuple[Step, ...] = ()
    result: Arg = "z0"

    @property
    def is_identity(self) -> bool:
        """Whether the program returns its only input."""
        return self.inputs == 1 and self.result == "z0"

    @property
    def keeps_zero(self) -> bool:
        """Whether zeros give zero, as rows of dropped pairs have to stay."""
        zero = torch.zeros(1, dtype=torch.float64)
        return bool(self.evaluate(*[zero] * self.inputs) == 0)

    @property
    def helpers(self) -> tuple[str, ...]:
        """Names of the device functions that the printed program calls, callees first."""
        return helpers_of(self.steps)

    def text(self) -> str:
        """Return the program as one line per step: the form that is hashed and dumped."""
        lines = [f"{s.name} = {s.op}({', '.join(spell(a) for a in s.args)})" for s in self.steps]
        return "\n".join([*lines, f"return {spell(self.result)}"])

    def triton(self) -> list[str]:
        """Return the program as Triton statements, one per step."""
        return statements_of(self.steps)

    def evaluate(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Evaluate the program in float64: the reference for kernels that contain it."""
        values = run(self.steps, {f"z{i}": z.to(torch.float64) for i, z in enumerate(inputs)})
        if isinstance(self.result, str):
            result: torch.Tensor = values[self.result]
            return result
        return torch.full_like(values["z0"], self.result)


def helpers_of(steps: Iterable[Step]) -> tuple[str, ...]:
    """Return the names of the device functions that printed steps call, callees first."""
    return tuple(dict.fromkeys(helper for step in steps for helper in OPS[step.op].helpers))


def statements_of(steps: Iterable[Step]) -> list[str]:
    """Return steps as Triton statements, one each."""
    return [f"{s.name} = {OPS[s.op].triton.format(*map(spell, s.args))}" for s in steps]


def run(steps: Iterable[Step], values: dict[str, Any]) -> dict[str, Any]:
    """Add the value of every step to ``values``, in torch."""
    for step in steps:
        values[step.name] = OPS[step.op].torch(*(values[a] if isinstance(a, str) else a for a in step.args))
    return values


def spell(arg: Arg) -> str:
    """Return an argument as it stands in a program."""
    if isinstance(arg, str):
        return arg
    if arg != arg or arg in (float("inf"), float("-inf")):
        return f'float("{arg}")'
    return repr(float(arg))


class Builder:
    """Build a :class:`Pointwise` step by step; equal steps are made once, unused ones are dropped."""

    def __init__(self, inputs: int, *others: str) -> None:
        self.inputs, self.others = inputs, others
        self._steps: dict[tuple[str, tuple[Arg, ...]], Step] = {}
        self._by_name: dict[str, Step] = {}

    def is_bool(self, arg: Arg) -> bool:
        """Whether a value is a truth value."""
        op = self._by_name[arg].op if isinstance(arg, str) and arg in self._by_name else ""
        return op in OPS and OPS[op].is_bool

    def step(self, op: str, *args: Arg) -> str:
        """Append ``op(*args)`` and return the name of its value."""
        if op == "add" and len(args) == 2:
            rewritten = self._one_plus_tanh(*args)
            if rewritten is not None:
                return rewritten
        key = (op, args)
        if key not in self._steps:
            step = Step(f"v{len(self._steps)}", op, args)
            self._steps[key] = self._by_name[step.name] = step
        return self._steps[key].name

    def _one_plus_tanh(self, left: Arg, right: Arg) -> str | None:
        """Rewrite ``tanh(u) + 1`` to ``2 sigmoid(2u)``: one exponential and no cancellation for negative u."""
        value, one = (left, right) if isinstance(left, str) else (right, left)
        if one != 1.0 or not isinstance(value, str) or value not in self._by_name:
            return None
        inner = self._by_name[value]
        if inner.op != "tanh":
            return None
        return self.step("mul", self.step("sigmoid", self.step("mul", inner.args[0], 2.0)), 2.0)

    def finish(self, result: Arg) -> Pointwise:
        """Return the program, without the steps that the result does not need, renumbered."""
        steps, (value,) = self.finish_all(result)
        return Pointwise(self.inputs, steps, value)

    def finish_all(self, *results: Arg) -> tuple[tuple[Step, ...], tuple[Arg, ...]]:
        """Return the steps that any of the results needs, renumbered, and the results under their new names."""
        needed: set[Arg] = set(results)
        for step in reversed(self._steps.values()):
            if step.name in needed:
                needed.update(step.args)
        names: dict[Arg, str] = {name: name for name in (*(f"z{i}" for i in range(self.inputs)), *self.others)}
        steps: list[Step] = []
        for step in self._steps.values():
            if step.name in needed:
                args = tuple(names[a] if isinstance(a, str) else a for a in step.args)
                names[step.name] = f"v{len(steps)}"
                steps.append(Step(names[step.name], step.op, args))
        return tuple(steps), tuple(names[r] if isinstance(r, str) else r for r in results)
