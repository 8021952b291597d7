"""Pointwise expressions between projections, whatever they are made of.

An activation is not chosen from a list: it is the expression that the model wrote, kept as data so that it can be
called, printed, compared across spellings, and emitted into a kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from moefx.graph.kinds import KINDS, NONLINEAR


@dataclass(frozen=True)
class Arg:
    """The i-th hidden tensor."""

    i: int


@dataclass(frozen=True)
class Const:
    """A number."""

    value: float | int | bool | None


@dataclass(frozen=True)
class Call:
    """A torch function of expressions; ``options`` are its keyword arguments."""

    name: str
    args: tuple[Expr, ...]
    options: tuple[tuple[str, Any], ...] = ()


Expr = Arg | Const | Call

_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "floordiv": "//", "mod": "%"}


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield ``expr`` and everything below it."""
    yield expr
    if isinstance(expr, Call):
        for arg in expr.args:
            yield from walk(arg)


def arguments(expr: Expr) -> frozenset[int]:
    """Return the numbers of the hidden tensors that ``expr`` reads."""
    return frozenset(e.i for e in walk(expr) if isinstance(e, Arg))


def substitute(expr: Expr, values: dict[int, Expr]) -> Expr:
    """Replace hidden tensors by expressions."""
    if isinstance(expr, Arg):
        return values.get(expr.i, expr)
    if isinstance(expr, Const):
        return expr
    return Call(expr.name, tuple(substitute(a, values) for a in expr.args), expr.options)


def is_nonlinear(expr: Expr) -> bool:
    """Whether ``expr`` is more than a linear function of its tensors, by its operations."""
    for e in walk(expr):
        if isinstance(e, Call) and arguments(e):
            if e.name in NONLINEAR:
                return True
            if e.name in ("mul", "div", "addcmul", "lerp") and sum(bool(arguments(a)) for a in e.args) > 1:
                return True
            if e.name == "div" and arguments(e.args[1]):
                return True
    return False


def has_activation(expr: Expr) -> bool:
    """Whether ``expr`` contains an activation function by name, as opposed to the powers and roots of a norm."""
    return any(isinstance(e, Call) and KINDS.get(e.name) == "act" for e in walk(expr))


def evaluate(expr: Expr, tensors: tuple[torch.Tensor, ...]) -> Any:
    """Compute ``expr``."""
    known: dict[Expr, Any] = {}

    def run(e: Expr) -> Any:
        if isinstance(e, Arg):
            return tensors[e.i]
        if isinstance(e, Const):
            return e.value
        if e not in known:
            known[e] = function(e)(*(run(a) for a in e.args), **dict(e.options))
        return known[e]

    return run(expr)


def function(call: Call) -> Callable[..., Any]:
    """Return the torch function that a call names."""
    if call.name in _OPERATORS and not call.options:
        return _OPERATORS[call.name]
    found: Any = getattr(torch, call.name, None) or getattr(F, call.name, None) or getattr(torch.special, call.name)
    if call.name in ("gelu", "silu", "relu", "leaky_relu", "elu", "softplus", "hardtanh", "mish"):
        found = getattr(F, call.name)
    made: Callable[..., Any] = found
    return made


def show(expr: Expr, names: tuple[str, ...]) -> str:
    """Return ``expr`` as text."""
    if isinstance(expr, Arg):
        return names[expr.i]
    if isinstance(expr, Const):
        return repr(expr.value)
    args = [show(a, names) for a in expr.args]
    if expr.name in _SIGNS and len(args) == 2 and not expr.options:
        return f"({args[0]} {_SIGNS[expr.name]} {args[1]})"
    return f"{expr.name}({', '.join([*args, *(f'{k}={v!r}' for k, v in expr.options)])})"


_X = Arg(0)
_NAMED: dict[Expr, str] = {
    Call("gelu", (_X,), (("approximate", "tanh"),)): "gelu_tanh",
    Call("gelu", (_X,)): "gelu",
    Call("silu", (_X,)): "silu",
    Call("relu", (_X,)): "relu",
    Call("sigmoid", (_X,)): "sigmoid",
    Call("tanh", (_X,)): "tanh",
    Call("mul", (_X, Call("sigmoid", (_X,)))): "silu",
    Call("mul", (Call("sigmoid", (_X,)), _X)): "silu",
    Call("square", (Call("relu", (_X,)),)): "relu2",
    Call("pow", (Call("relu", (_X,)), Const(2))): "relu2",
    Call("mul", (Call("relu", (_X,)), Call("relu", (_X,)))): "relu2",
    _X: "identity",
}


@dataclass(frozen=True)
class Activation:
    """The pointwise function of a feed-forward network, callable and comparable.

    With ``arity`` 1 the hidden layer is ``act(h)``, or ``act(gate) * up`` in a gated network. ``arity`` 2 is the
    general gated form ``act(gate, up)``, for functions that do not factor.
    """

    expr: Expr
    arity: int = 1

    def __call__(self, *hidden: torch.Tensor) -> torch.Tensor:
        result = evaluate(self.expr, hidden)
        assert isinstance(result, torch.Tensor)
        return result

    @property
    def name(self) -> str:
        """A short name for well-known functions, else the expression."""
        return _NAMED.get(self.expr) or show(self.expr, ("g", "u"))

    def __str__(self) -> str:
        return self.name
