"""From any pointwise function to a :class:`Pointwise` program.

The function, in whatever spelling (modules, functions, methods, operators), is traced by ``make_fx`` with torch's own
decompositions, so that every activation torch can decompose arrives as a few primitives: there is no list of
activations here.  What is left over and is no primitive is refused by name.

Shapes: the function takes [R, N] and returns [R, N], or [R, N/2] if it splits its input into two halves (gated FFNs).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from moefx.codegen.pointwise import Arg, Builder, Pointwise
from moefx.codegen.reasons import CannotLower

#: Operators that map to one primitive of the same arity, by the name of their overload packet.
_ROUNDING = ("floor", "ceil", "neg", "abs")
_CURVES = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "sigmoid", "tanh", "erf", "expm1", "log1p")
_BINARY = ("mul", "div", "maximum", "minimum", "gt", "ge", "lt", "le", "eq", "ne")
_DIRECT = {name: name for name in (*_ROUNDING, *_CURVES, *_BINARY, "where")} | {
    "logical_and": "and",
    "bitwise_and": "and",
    "logical_or": "or",
    "bitwise_or": "or",
    "logical_not": "not",
    "bitwise_not": "not",
    "true_divide": "div",
}
_SAME = frozenset({"clone", "alias", "detach", "view", "_unsafe_view", "reshape", "expand", "contiguous", "lift_fresh"})
_CASTS = frozenset({"_to", "convert_element_type", "device_put"})
_CONSTANTS = frozenset({"scalar_tensor", "full", "full_like", "zeros_like", "ones_like"})
_COMPOSITE = frozenset(
    {
        "add",
        "sub",
        "rsub",
        "pow",
        "square",
        "reciprocal",
        "relu",
        "clamp",
        "clamp_min",
        "clamp_max",
        "sign",
        "tan",
        "hardtanh",
    }
)
_SPLITS = frozenset({"split", "slice", "split_with_sizes"})
_TRACED_ROWS = 2
#: Largest exponent that is printed as repeated multiplication.
_MAX_POWER = 16


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's decompositions, without those of our own primitives."""
    known = {*_DIRECT, *_SAME, *_CASTS, *_CONSTANTS, *_COMPOSITE, *_SPLITS}
    return {op: rule for op, rule in decomposition_table.items() if _name(op) not in known}


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    # functionalize() spells views as copies
    return str(getattr(packet, "__name__", packet)).removesuffix("_copy") or str(packet)


def trace_pointwise(function: Callable[..., torch.Tensor], width: int, inputs: int = 1) -> Pointwise:
    """Return ``function`` as a program, or raise :class:`CannotLower` with the operator that stands in the way.

    ``function`` maps ``inputs`` tensors [R, ``width``] to [R, ``width``] or, if it splits its only input in halves, to
    [R, ``width``/2].
    """
    examples = [torch.zeros(_TRACED_ROWS, width, dtype=torch.float32) for _ in range(inputs)]

    # Functionalised on a copy, so that in-place activations (ReLU(inplace=True)) read like the others.
    def on_copy(*z: torch.Tensor) -> torch.Tensor:
        return function(*(value.clone() for value in z))

    try:
        with torch.no_grad():
            functional = torch.func.functionalize(on_copy, remove="mutations_and_views")
            graph = make_fx(functional, decomposition_table=_decompositions())(*examples).graph
    except Exception as error:  # whatever the traced code raises is the reason
        raise CannotLower(
            "print the expression between two projections", found=f"{type(error).__name__}: {error}"
        ) from error
    return _Reader(width, inputs).read(graph)


class _Reader:
    """Read an ATen graph of one or two [rows, width] inputs into a :class:`Builder`."""

    def __init__(self, width: int, inputs: int) -> None:
        self.width, self.inputs = width, inputs
        self.env: dict[fx.Node, Any] = {}
        self.halves = False
        self.whole = False
        self.b = Builder(max(2, inputs))

    def read(self, graph: fx.Graph) -> Pointwise:
        result: Any = None
        for node in graph.nodes:
            if node.op == "placeholder":
                # The only input may yet turn out to be split; of two, each is a value of its own.
                self.env[node] = "input" if self.inputs == 1 else f"z{len(self.env)}"
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                result = self.value(node.args[0])
                self._check_shape(node.args[0])
            else:
                raise self.refuse(node, f"it reads the tensor {node.target!r}; only constants may join")
        program = self.b.finish(result)
        return Pointwise(2 if self.halves else self.inputs, program.steps, program.result)

    def _check_shape(self, node: Any) -> None:
        want = self.width // 2 if self.halves else self.width
        shape = tuple(node.meta["val"].shape) if isinstance(node, fx.Node) and "val" in node.meta else None
        if shape is not None and shape != (_TRACED_ROWS, want):
            raise CannotLower("print the expression between two projections", found=f"it changes the shape to {shape}")

    @staticmethod
    def refuse(node: fx.Node, why: str) -> CannotLower:
        return CannotLower(
            "print the expression between two projections",
            found=f"{node.target} ({why})",
            do="the dialect ops are used",
        )

    def value(self, arg: Any) -> Arg:
        """Return a graph argument as a step argument; the whole input becomes ``z0``."""
        if isinstance(arg, fx.Node):
            arg = self.env[arg]
        if arg == "input":
            self.whole = True
            if self.halves:
                raise CannotLower("print a gated expression", found="the unsplit input is read as well as its halves")
            return "z0"
        if isinstance(arg, bool | int | float):
            return float(arg)
        if isinstance(arg, str):
            return arg
        raise CannotLower(
            "print the expression between two projections", found=f"an argument of type {type(arg).__name__}"
        )

    def number(self, arg: Arg) -> Arg:
        """Return a value as a float32: truth values become 0 and 1."""
        return self.b.step("to_float", arg) if self.b.is_bool(arg) else arg

    def call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        name = _name(node.target)
        if name in _SAME:
            return self.same(node)
        if name in _CASTS:
            return self.cast(node)
        if name in _CONSTANTS:
            return self.constant(node, name)
        if name in _SPLITS:
            return self.split(node, name)
        if name in _COMPOSITE:
            return self.composite(node, name)
        if name in _DIRECT and not node.kwargs:
            return self.direct(node, _DIRECT[name])
        if name in ("empty_strided", "empty_like", "empty"):
            return None  # a carrier of shape for full_like; reading its values is refused by value()
        raise self.refuse(node, "no primitive of the kernel language computes it")

    def direct(self, node: fx.Node, op: str) -> str:
        args = [self.value(a) for a in node.args]
        if op == "where":
            return self.b.step(op, args[0], self.number(args[1]), self.number(args[2]))
        if op not in ("and", "or", "not"):
            args = [self.number(a) for a in args]
        return self.b.step(op, *args)

    def same(self, node: fx.Node) -> Any:
        """Pass on a value whose shape does not change (copies, views of equal shape)."""
        source = node.args[0]
        if isinstance(source, fx.Node) and "val" in source.meta and source.meta["val"].shape != node.meta["val"].shape:
            raise self.refuse(node, "it changes the shape")
        return self.env[source] if isinstance(source, fx.Node) else source

    def cast(self, node: fx.Node) -> Any:
        """Drop casts between floating dtypes: the kernel keeps float32, which is at least as precise."""
        dtype = node.kwargs.get("dtype", node.args[1] if len(node.args) > 1 else torch.float32)
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise self.refuse(node, f"a cast to {dtype}")
        source = self.env[node.args[0]]  # type: ignore[index]
        return self.number(source) if source != "input" else source

    def constant(self, node: fx.Node, name: str) -> float:
        if name in ("zeros_like", "ones_like"):
            return 1.0 if name == "ones_like" else 0.0
        value = node.args[0 if name == "scalar_tensor" else 1]
        if not isinstance(value, bool | int | float):
            raise self.refuse(node, "a constant that is not a number")
        return float(value)

    def split(self, node: fx.Node, name: str) -> Any:
        """Read a split of the input into equal halves along its last axis."""
        half = self.width // 2
        if self.env.get(cast(fx.Node, node.args[0])) != "input" or self.whole:
            raise self.refuse(node, "only the projection's own output may be split, in two halves")
        if name == "slice":
            dim, start, end = (*node.args[1:], 0, None, None)[:3] if len(node.args) < 4 else node.args[1:4]
            bounds = (start or 0, min(end, self.width) if isinstance(end, int) else self.width)
            if dim in (1, -1) and bounds in ((0, half), (half, self.width)) and self.width % 2 == 0:
                self.halves = True
                return "z0" if bounds[0] == 0 else "z1"
            if dim == 0 or bounds == (0, self.width):
                return "input"
            raise self.refuse(node, "a slice that is no half")
        sizes = node.args[1]
        axis = node.args[2] if len(node.args) > 2 else 0
        if axis not in (1, -1) or sizes not in (half, [half, half]) or self.width % 2:
            raise self.refuse(node, "a split that is not in two halves")
        self.halves = True
        return ("z0", "z1")

    def composite(self, node: fx.Node, name: str) -> str:
        step, args = self.b.step, [None if a is None else self.number(self.value(a)) for a in node.args]
        x = args[0]
        assert x is not None
        if name in ("add", "sub", "rsub"):
            return self.sum(node, name, args)
        if name == "pow":
            return self.power(node, x, args[1])
        if name in ("clamp", "clamp_min", "clamp_max"):
            low, high = {"clamp_min": (args[1], None), "clamp_max": (None, args[1])}.get(
                name, (*args[1:], None, None)[:2]
            )
            low = node.kwargs.get("min", low)  # type: ignore[assignment]
            high = node.kwargs.get("max", high)  # type: ignore[assignment]
            # As choices, whose derivative at the bound is one; a maximum shares it with the bound.
            value = x if low is None else step("where", step("lt", x, low), low, x)
            return str(value if high is None else step("where", step("gt", value, high), high, value))
        if name == "hardtanh":
            low, high = [float(cast(float, v)) for v in (*args[1:], *(-1.0, 1.0)[len(args) - 1 :])]
            return step("where", step("le", x, low), low, step("where", step("ge", x, high), high, x))
        if name == "sign":
            return step("where", step("gt", x, 0.0), 1.0, step("where", step("lt", x, 0.0), -1.0, step("mul", x, 0.0)))
        simple: dict[str, Callable[[], str]] = {
            "square": lambda: step("mul", x, x),
            "reciprocal": lambda: step("div", 1.0, x),
            # As a choice, not as a maximum: its derivative at zero is zero, that of a maximum is not.
            "relu": lambda: step("where", step("le", x, 0.0), 0.0, x),
            "tan": lambda: step("div", step("sin", x), step("cos", x)),
        }
        return simple[name]()

    def sum(self, node: fx.Node, name: str, args: list[Arg | None]) -> str:
        left, right = (args[1], args[0]) if name == "rsub" else (args[0], args[1])
        assert left is not None
        assert right is not None
        alpha = node.kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if alpha != 1:
            right = self.b.step("mul", right, float(cast(float, alpha)))
        return self.b.step("add" if name == "add" else "sub", left, right)

    def power(self, node: fx.Node, base: Arg, exponent: Arg | None) -> str:
        step = self.b.step
        if isinstance(exponent, str) and isinstance(base, float) and base > 0:
            return step("exp2", step("mul", exponent, _log2(base)))
        if not isinstance(exponent, float):
            raise self.refuse(node, "a power whose exponent is not a constant")
        if exponent == int(exponent) and 0 < abs(exponent) <= _MAX_POWER:
            value = self.repeated(base, abs(int(exponent)))
            return str(value if exponent > 0 else step("div", 1.0, value))
        roots = {0.5: "sqrt", -0.5: "rsqrt"}
        if exponent in roots:
            return step(roots[exponent], base)
        if exponent == 0:
            return step("add", step("mul", base, 0.0), 1.0)
        return step("exp2", step("mul", step("log2", base), exponent))

    def repeated(self, base: Arg, times: int) -> Arg:
        """Return ``base ** times`` by squaring."""
        if times == 1:
            return base
        half = self.repeated(base, times // 2)
        square = self.b.step("mul", half, half)
        return self.b.step("mul", square, base) if times % 2 else square


def _log2(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log2())
