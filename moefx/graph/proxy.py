"""Values that remember how they were computed: what the user's Python sees while a model is traced.

A proxy answers questions about itself from the example run, so Python control flow is decided concretely. A question
whose answer depends on a *size* or on *data* is answered through the tracer, which records a guard.
"""

from __future__ import annotations

import math
import operator
import weakref
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
    {"dim", "ndimension", "is_floating_point", "is_complex", "element_size", "get_device", "is_signed", "is_inference"}
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


class ScalarProxy:
    """A Python value (int, float, bool, dtype, device, string) that the graph computes."""

    __slots__ = ("__weakref__", "node", "tracer", "value")

    node: Node
    tracer: GuidedTracer
    value: Any

    def __init__(self, node: Node, value: Any, tracer: GuidedTracer) -> None:
        object.__setattr__(self, "node", node)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "tracer", tracer)
        tracer.made.append(weakref.ref(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return owner_of((args, kwargs or {})).call_torch(func, tuple(args), dict(kwargs or {}))

    def __repr__(self) -> str:
        return f"ScalarProxy({self.node.name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ScalarProxy:
        return self

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
        # Numbers by identity: a size that looks something up in a cache of the user's must not be found there.
        number = isinstance(self.value, bool | int | float | complex)
        return object.__hash__(self) if number else hash(self.tracer.specialise(self))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.scalar(round, self) if digits is None else self.tracer.scalar(round, self, digits)

    def __ceil__(self) -> Any:
        return self.tracer.scalar(math.ceil, self)

    def __floor__(self) -> Any:
        return self.tracer.scalar(math.floor, self)

    def __trunc__(self) -> Any:
        return self.tracer.scalar(math.trunc, self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


class TensorProxy(torch.Tensor):
    """A tensor that the graph computes.

    A real tensor subclass without storage, because torch's argument parser unpacks whatever calls itself a tensor.
    """

    node: Node
    tracer: GuidedTracer
    value: torch.Tensor
    _sizes: Shape | None
    _reshaped: int

    @staticmethod
    def make(node: Node, value: torch.Tensor, tracer: GuidedTracer, is_parameter: bool = False) -> TensorProxy:
        """Return a proxy of ``value``, which passes for a parameter if it stands for one."""
        with torch._C.DisableTorchFunctionSubclass():
            proxy = torch.Tensor._make_wrapper_subclass(
                TensorProxy, value.shape, dtype=value.dtype, device=value.device, requires_grad=False
            )
        proxy.__dict__.update(node=node, value=value, tracer=tracer, _sizes=None, _reshaped=0, _is_param=is_parameter)
        tracer.made.append(weakref.ref(proxy))
        return proxy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return owner_of((args, kwargs or {})).call_torch(func, tuple(args), dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"a value that is being traced reached {func} unrecorded")

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes as integer proxies."""
        if self._sizes is None:
            self.__dict__["_sizes"] = Shape(self.tracer.size(self, dim) for dim in range(self.value.ndim))
        assert self._sizes is not None
        return self._sizes

    def size(self, dim: int | None = None) -> Any:
        """Return one size or all of them, like ``torch.Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        """Return the number of elements."""
        return self.shape.numel()

    nelement = numel

    def attribute(self, name: str) -> Any:
        """Read a property of the tensor."""
        if name == "shape":
            return self.shape
        if name in _STATIC_ATTRIBUTES:
            return self.tracer.scalar(getattr, self, name)
        if name in _CONCRETE_ATTRIBUTES:
            return getattr(self.value, name)
        return self.tracer.call_function(getattr, (self, name), {})

    def method(self, name: str, args: Any, kwargs: Any) -> Any:
        """Call a method of the tensor."""
        if name in _CONCRETE_METHODS:
            return self.tracer.evaluate(lambda *a, **k: getattr(self.value, name)(*a, **k), args, kwargs)
        if name in _DATA_METHODS:
            return self.tracer.read(self, name, args, kwargs)
        return self.tracer.call_method(name, (self, *args), kwargs)

    def assign(self, name: str, value: Any) -> None:
        """Set a property of the tensor."""
        if name != "data":
            raise self.tracer.refuse(f"set attribute {name!r} of a tensor")
        self.tracer.call_method("copy_", (self, value), {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"TensorProxy({self.node.name})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorProxy:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.call_function(operator.setitem, (self, index, value), {})

    def __iter__(self) -> Iterator[Any]:
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


Proxy = TensorProxy | ScalarProxy


def owner_of(tree: Any) -> GuidedTracer:
    """Return the tracer of the proxies in a call's arguments."""
    found = find_tracer(tree)
    if found is None:
        raise RuntimeError("a value that is being traced was hidden in a container that the tracer cannot read")
    return found


def find_tracer(tree: Any) -> GuidedTracer | None:
    """Return the tracer of the first proxy in a tree."""
    if type(tree) in (TensorProxy, ScalarProxy):
        return cast("GuidedTracer", tree.tracer)
    children: Any = ()
    if isinstance(tree, list | tuple):
        children = tree
    elif isinstance(tree, dict):
        children = tree.values()
    elif type(tree) is slice:
        children = (tree.start, tree.stop, tree.step)
    return next((found for child in children if (found := find_tracer(child)) is not None), None)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "invert", "abs")
_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior")


def _binary(function: Callable[..., Any], reflected: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        return self.tracer.apply(function, left, right)

    return method


def _unary(function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda self: self.tracer.apply(function, self)


def _install_operators(cls: type) -> None:
    for name in _BINARY:
        function, stem = getattr(operator, name), name.rstrip("_")
        setattr(cls, f"__{stem}__", _binary(function))
        setattr(cls, f"__r{stem}__", _binary(function, reflected=True))
    for name in _COMPARE:
        setattr(cls, f"__{name}__", _binary(getattr(operator, name)))
    for name in _UNARY:
        setattr(cls, f"__{name}__", _unary(getattr(operator, name)))


def _method(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self.method(name, args, kwargs)


def _property(name: str) -> property:
    return property(lambda self: self.attribute(name), lambda self, value: self.assign(name, value))


def _install_tensor_names() -> None:
    """Answer every public name of a tensor in Python: torch's own parser would turn size proxies into numbers."""
    for name in dir(torch.Tensor):
        if name.startswith("_") or name in TensorProxy.__dict__:
            continue
        found = getattr(torch.Tensor, name)
        setattr(TensorProxy, name, _method(name) if callable(found) else _property(name))


_install_operators(ScalarProxy)
_install_operators(TensorProxy)
for _name in _INPLACE:
    setattr(TensorProxy, f"__{_name}__", _binary(getattr(operator, _name)))
setattr(TensorProxy, "__getitem__", _binary(operator.getitem))  # noqa: B010
_install_tensor_names()
setattr(TensorProxy, "__hash__", object.__hash__)  # noqa: B010
