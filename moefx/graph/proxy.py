"""Values that remember how they were computed: what the user's Python sees while a model is traced.

A proxy answers questions about itself from the example run, so Python control flow is decided concretely. A question
whose answer depends on a *size* or on *data* is answered through the tracer, which records a guard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from torch.fx import Node

if TYPE_CHECKING:
    from moefx.graph.tracer import GuidedTracer

_CONCRETE_ATTRIBUTES = frozenset(
    {"ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized"}
    | {"is_leaf", "itemsize", "names", "grad_fn", "is_nested"}
)
_CONCRETE_METHODS = frozenset(
    {"dim", "ndimension", "is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device"}
    | {"is_signed", "is_inference"}
)
_DATA_METHODS = frozenset(["item", "tolist", "numpy", "__array__"])
_STATIC_ATTRIBUTES = frozenset({"dtype", "device"})


class Shape(tuple[Any, ...]):
    """A tensor's sizes as a tuple of integer proxies."""

    __slots__ = ()

    def numel(self) -> Any:
        """Return the product of the sizes."""
        total: Any = 1
        for size in self:
            total = total * size
        return total

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Shape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Shape:
        return Shape((*self, *other))


class Proxy:
    """Common part of all proxies: the node that computes the value, and the value of the example run."""

    __slots__ = ("node", "tracer", "value")

    node: Node
    tracer: GuidedTracer
    value: Any

    def __init__(self, node: Node, value: Any, tracer: GuidedTracer) -> None:
        object.__setattr__(self, "node", node)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "tracer", tracer)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = _find_tracer((args, kwargs or {}))
        return tracer.call_torch(func, tuple(args), dict(kwargs or {}))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.node.name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Proxy:
        return self

    def __format__(self, spec: str) -> str:
        return repr(self)


class ScalarProxy(Proxy):
    """A Python value (int, float, bool, dtype, device, string) that the graph computes."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return cast(type, type(self.value))

    def __getattr__(self, name: str) -> Any:
        return self.tracer.scalar(getattr, self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.specialise(self)(*args, **kwargs)

    def __bool__(self) -> bool:
        return bool(self.tracer.specialise(self))

    def __int__(self) -> int:
        return int(self.tracer.specialise(self))

    def __float__(self) -> float:
        return float(self.tracer.specialise(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.specialise(self))

    def __str__(self) -> str:
        return str(self.tracer.specialise(self))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return numpy.asarray(self.tracer.specialise(self))

    def __format__(self, spec: str) -> str:
        return format(self.tracer.specialise(self), spec)

    def __hash__(self) -> int:
        # By identity: a cache of the user's must never return a value of this trace to a later call.
        return object.__hash__(self)

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.scalar(round, self) if digits is None else self.tracer.scalar(round, self, digits)

    def __ceil__(self) -> Any:
        import math

        return self.tracer.scalar(math.ceil, self)

    def __floor__(self) -> Any:
        import math

        return self.tracer.scalar(math.floor, self)


class TensorProxy(Proxy):
    """A tensor that the graph computes."""

    __slots__ = ("_is_parameter", "_shape")
    _shape: Shape | None
    _is_parameter: bool

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.nn.Parameter if self._is_parameter else torch.Tensor

    def __init__(self, node: Node, value: Any, tracer: GuidedTracer, is_parameter: bool = False) -> None:
        super().__init__(node, value, tracer)
        object.__setattr__(self, "_shape", None)
        object.__setattr__(self, "_is_parameter", is_parameter)

    @property
    def shape(self) -> Shape:
        """Sizes as integer proxies."""
        if self._shape is None:
            sizes = Shape(self.tracer.size(self, dim) for dim in range(self.value.ndim))
            object.__setattr__(self, "_shape", sizes)
        assert self._shape is not None
        return self._shape

    def size(self, dim: int | None = None) -> Any:
        """Return one size or all of them, like ``torch.Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        """Return the number of elements."""
        return self.shape.numel()

    nelement = numel

    def __getattr__(self, name: str) -> Any:
        if name in _CONCRETE_ATTRIBUTES:
            return getattr(self.value, name)
        if name in _CONCRETE_METHODS:
            return lambda *args, **kwargs: getattr(self.value, name)(*args, **kwargs)
        if name in _STATIC_ATTRIBUTES:
            return self.tracer.scalar(getattr, self, name)
        if name in _DATA_METHODS:
            return lambda *args, **kwargs: self.tracer.read(self, name, args, kwargs)
        if not hasattr(torch.Tensor, name):
            if hasattr(self.value, name):
                return getattr(self.value, name)
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if callable(getattr(torch.Tensor, name)):
            return lambda *args, **kwargs: self.tracer.call_method(name, (self, *args), kwargs)
        return self.tracer.call_function(getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.tracer.call_method("copy_", (self, value), {})
            return
        raise self.tracer.refuse(f"set attribute {name!r} of a tensor")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.call_function(operator.setitem, (self, index, value), {})

    def __iter__(self) -> Iterator[Any]:
        self.tracer.specialise(self.shape[0])
        return iter(self.tracer.call_method("unbind", (self, 0), {}))

    def __len__(self) -> int:
        return int(self.tracer.specialise(self.shape[0]))

    def __bool__(self) -> bool:
        return bool(self.tracer.read(self, "item", (), {}))

    def __int__(self) -> int:
        return int(self.tracer.read(self, "item", (), {}))

    def __float__(self) -> float:
        return float(self.tracer.read(self, "item", (), {}))

    def __index__(self) -> int:
        return operator.index(self.tracer.read(self, "item", (), {}))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.read(self, "numpy", (), {})

    def __contains__(self, value: Any) -> bool:
        return bool((self == value).any())

    def __hash__(self) -> int:
        return object.__hash__(self)


def _find_tracer(tree: Any) -> GuidedTracer:
    if isinstance(tree, Proxy) or type(tree) in (TensorProxy, ScalarProxy):
        return cast("GuidedTracer", tree.tracer)
    if type(tree) in (list, tuple, Shape):
        children: Any = tree
    elif type(tree) is dict:
        children = tree.values()
    elif type(tree) is slice:
        children = (tree.start, tree.stop, tree.step)
    else:
        return None  # type: ignore[return-value]
    for child in children:
        found = _find_tracer(child)
        if found is not None:
            return found
    return None  # type: ignore[return-value]


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift"]
_COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]
_UNARY = ["neg", "pos", "invert", "abs"]


def _install_operators() -> None:
    def binary(function: Callable[..., Any], reflected: bool) -> Callable[[Any, Any], Any]:
        def method(self: Proxy, other: Any) -> Any:
            left, right = (other, self) if reflected else (self, other)
            return self.tracer.apply(function, left, right)

        return method

    def unary(function: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda self: self.tracer.apply(function, self)

    for name in _BINARY:
        function, stem = getattr(operator, name), name.rstrip("_")
        setattr(Proxy, f"__{stem}__", binary(function, False))
        setattr(Proxy, f"__r{stem}__", binary(function, True))
    for name in _COMPARE:
        setattr(Proxy, f"__{name}__", binary(getattr(operator, name), False))
    for name in _UNARY:
        setattr(Proxy, f"__{name}__", unary(getattr(operator, name)))
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior"):
        setattr(TensorProxy, f"__{name}__", binary(getattr(operator, name), False))
    setattr(TensorProxy, "__getitem__", binary(operator.getitem, False))  # noqa: B010 - mypy sees a class body
    setattr(Proxy, "__hash__", object.__hash__)  # noqa: B010


_install_operators()
