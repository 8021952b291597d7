"""An example-guided tracer: the user's Python runs once on proxies that carry the values of one example.

Control flow is decided concretely, sizes stay symbolic, and a value that reaches Python is specialised and recorded as
a guard. Values are fake tensors (no compute, no memory), unless the model reads data: then the example is really run.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError
from moefx.graph.extents import SPLITTERS, count_is_fixed
from moefx.graph.guards import Guard
from moefx.graph.leftovers import forget
from moefx.graph.origin import ModuleCall, Origin, show_source, user_source
from moefx.graph.proxy import ScalarProxy, Shape, TensorProxy

_SCALARS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_INPLACE_OPERATORS = frozenset(["setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior"])


class NeedsData(BaseException):
    """The model read tensor data, which fake values do not have (not an Exception: user code must not catch it)."""


class GuidedTracer:
    """Builds one ``fx.Graph``.

    ``leaf`` says which modules stay nodes: ``"nn"`` those of torch.nn, ``"children"`` all below the root but those in
    ``expand``. With ``real`` the example is really computed.
    """

    def __init__(
        self,
        root: nn.Module,
        leaf: str,
        real: bool,
        mode: FakeTensorMode | None = None,
        expand: Collection[str] = (),
    ) -> None:
        self.expand = frozenset(expand)
        self.root, self.leaf, self.real = root, leaf, real
        self.graph = FxGraph()
        self.paths = {id(m): name for name, m in root.named_modules(remove_duplicate=True)}
        named = [*root.named_parameters(remove_duplicate=True), *root.named_buffers(remove_duplicate=True)]
        self.names = {id(t): name for name, t in named}
        self.guards: dict[Node, Guard] = {}
        self.calls: list[ModuleCall] = []
        self._storages = {_storage(t) for _, t in named} if real else set()
        self.constants: dict[str, torch.Tensor] = {}
        self.autocasts: list[tuple[str, torch.dtype, bool]] = []
        self.paused = False
        self.symbolic_int = False
        self.reads_mode = False
        self.made: list[weakref.ref[Any]] = []
        self._fake = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self._scope: list[tuple[str, int]] = [("", 0)]
        self._counts: dict[str, int] = {}
        self._attributes: dict[int, TensorProxy] = {}
        self._scalars: dict[Any, ScalarProxy] = {}
        self._clones: dict[int, nn.Module] = {}

    def close(self) -> list[str]:
        """Let go of all proxies; return the types of what else still holds some."""
        self._attributes.clear()
        self._scalars.clear()
        self._clones.clear()
        return forget(self.made)

    # -- values ------------------------------------------------------------

    def example(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the example value that stands for ``tensor`` during this trace."""
        if self.real or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        with self.pause():
            fake = self._imitate(tensor)
            return fake.requires_grad_(tensor.requires_grad) if fake.is_leaf else fake

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let torch run undisturbed: nothing is recorded inside."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def evaluate(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``function`` on example values."""
        args, kwargs = self.raw(args), self.raw(kwargs)
        mode: Any = contextlib.nullcontext() if self.real else self._fake
        try:
            with self.pause(), mode, torch.no_grad():
                return function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise NeedsData(f"{error} at {show_source(user_source())}") from error

    def raw(self, tree: Any) -> Any:
        """Replace the proxies of a tree by their example values."""
        return _map(tree, lambda leaf: leaf.value if _is_proxy(leaf) else self._constant_value(leaf))

    def _constant_value(self, leaf: Any) -> Any:
        return self.example(leaf) if isinstance(leaf, torch.Tensor) else leaf

    # -- nodes ------------------------------------------------------------

    def node(self, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str | None = None) -> Node:
        """Create one node, stamped with its origin and the context it must run under."""
        node = self.graph.create_node(op, target, self.arg(args), self.arg(kwargs or {}), name)
        path, index = self._scope[-1]
        node.meta["moefx"] = Origin(path, index, user_source())
        if not torch.is_grad_enabled() or self.autocasts:
            node.meta["context"] = (torch.is_grad_enabled(), tuple(self.autocasts))
        return node

    def arg(self, tree: Any) -> Any:
        """Replace the proxies of a tree by their nodes, and tensors by ``get_attr`` nodes."""
        return _map(tree, self._leaf_arg)

    def _leaf_arg(self, leaf: Any) -> Any:
        if _is_proxy(leaf):
            if leaf.tracer is not self:
                raise self.refuse("use a value that an earlier trace left behind")
            return leaf.node
        if isinstance(leaf, torch.Tensor):
            return self.attribute(leaf).node
        if isinstance(leaf, torch.Generator):
            raise self.refuse("draw from a torch.Generator, whose state a graph cannot keep")
        return leaf

    def attribute(self, tensor: torch.Tensor) -> TensorProxy:
        """Return the proxy of a parameter, a buffer, or a constant tensor of the model."""
        known = self._attributes.get(id(tensor))
        if known is None:
            name = self.names.get(id(tensor))
            if name is None:
                if isinstance(tensor, torch._subclasses.FakeTensor):
                    raise self.refuse("use a value that an earlier trace left behind")
                name = f"_constant_{len(self.constants)}"
                self.constants[name] = tensor
            node = self.node("get_attr", name)
            value = self.example(tensor)
            with self.pause():
                node.meta["val"] = self._shape_only(value)
            known = self._attributes[id(tensor)] = TensorProxy.make(node, value, self, isinstance(tensor, nn.Parameter))
        return known

    def wrap(self, node: Node, value: Any) -> Any:
        """Return ``value`` as the user's Python sees it: proxies inside real Python containers."""
        with self.pause():
            node.meta["val"] = self._shape_only(value)
        if isinstance(value, torch.Tensor):
            return TensorProxy.make(node, value, self)
        if isinstance(value, torch.Size):
            return Shape(self._items(node, enumerate(value)))
        if isinstance(value, dict):
            made = dict(zip(value, self._items(node, value.items()), strict=True))
            return made if type(value) is dict else type(value)(**made)
        if isinstance(value, tuple | list):
            items = self._items(node, enumerate(value))
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return ScalarProxy(node, value, self) if isinstance(value, _SCALARS) else value

    def _shape_only(self, value: Any) -> Any:
        """What ``meta["val"]`` keeps: fake tensors, scalars, and containers of them."""
        if isinstance(value, torch.Tensor):
            return value if isinstance(value, torch._subclasses.FakeTensor) else self._imitate(value)
        if isinstance(value, tuple | list):
            return tuple(self._shape_only(v) for v in value)
        return {k: self._shape_only(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _imitate(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return self._fake.from_tensor(tensor, static_shapes=True)
        return self._same_shape(tensor)

    def _same_shape(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.pause(), self._fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _items(self, node: Node, items: Iterable[tuple[Any, Any]]) -> list[Any]:
        return [self.wrap(self.node("call_function", operator.getitem, (node, key)), item) for key, item in items]

    # -- what proxies ask ------------------------------------------------------------

    def call_function(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Record a function call."""
        name = getattr(function, "__name__", "")
        self._check_inplace(name, args, kwargs)
        value = self.evaluate(function, args, kwargs)
        return self._record(self.node("call_function", function, args, kwargs), name, value)

    def call_method(self, name: str, args: Any, kwargs: Any) -> Any:
        """Record a tensor method call; ``args[0]`` is the tensor."""
        self._check_inplace(name, args, kwargs)
        tensor, shape = args[0], tuple(args[0].value.shape)
        before = self._same_shape(tensor.value) if _changes_in_place(name) else None
        value = self.evaluate(lambda self_, *a, **k: getattr(self_, name)(*a, **k), args, kwargs)
        if before is not None and tuple(tensor.value.shape) != shape:
            # The proxy is another shape from here on; sizes that were read before stay what they were.
            tensor.node.meta["val"] = before
            tensor.__dict__.update(_sizes=None, _reshaped=tensor._reshaped + 1)
        return self._record(self.node("call_method", name, args, kwargs), name, value)

    def _record(self, node: Node, name: str, value: Any) -> Any:
        """Return what the user sees of ``node``; guard how many tensors a split returned, if sizes decide that."""
        if name in SPLITTERS and not count_is_fixed(node, len(value), self.root):
            self.specialise(self.wrap(self.node("call_function", len, (node,)), len(value)))
        return self.wrap(node, value)

    def _check_inplace(self, name: str, args: Any, kwargs: Any) -> None:
        """Where the example is really run, nothing may write into the model's own tensors."""
        if not self.real:
            return
        written = [kwargs.get("out")]
        if args and (_writes(name) or kwargs.get("inplace")):
            written.append(args[0])
        for proxy in pytree.tree_leaves(written):
            if type(proxy) is TensorProxy and _storage(proxy.value) in self._storages:
                raise self.refuse("change a parameter or buffer in place, which depends on data elsewhere")

    def call_torch(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Record what reached ``__torch_function__``: a function, a method, or a property of tensors."""
        name = getattr(function, "__name__", "")
        if name in ("is_floating_point", "is_complex", "is_tensor"):
            return self.evaluate(function, args, kwargs)
        if not torch.overrides.is_tensor_method_or_property(function):
            return self.call_function(function, args, kwargs)
        if type(args[0]) is not TensorProxy:
            args = (self.attribute(args[0]), *args[1:])
        if name == "__get__":
            return args[0].attribute(function.__self__.__name__)
        if name == "__set__":
            return args[0].assign(function.__self__.__name__, args[1])
        operation = getattr(operator, name, None) if name.startswith("__") and name not in ("__rsub__",) else None
        if operation is not None:
            return self.apply(operation, *args)
        return args[0].method(name, args[1:], kwargs)

    def apply(self, function: Any, *args: Any) -> Any:
        """Apply an operator to proxies: a tensor result is recorded, a scalar one is shared."""
        if any(type(a) is TensorProxy for a in args):
            return self.call_function(function, args, {})
        return self.scalar(function, *args)

    def scalar(self, function: Any, *args: Any) -> Any:
        """Compute a Python value in the graph, once per distinct expression."""
        try:
            value = function(*self.raw(args))
        except TypeError:
            return NotImplemented
        if not isinstance(value, _SCALARS):
            return function(*(self.specialise(a) if type(a) is ScalarProxy else a for a in args))
        key = (function, *((a.node, a.node.name) if _is_proxy(a) else (type(a), repr(a)) for a in args))
        known = self._scalars.get(key)
        if known is None:
            node = self.node("call_function", function, args)
            known = self._scalars[key] = self.wrap(node, value)
        return known

    def size(self, tensor: TensorProxy, dim: int) -> Any:
        """Return one size of a tensor as an integer of the graph."""
        key = ("size", tensor.node, tensor._reshaped, dim)
        known = self._scalars.get(key)
        if known is None:
            node = self.node("call_method", "size", (tensor, dim))
            known = self._scalars[key] = self.wrap(node, int(tensor.value.shape[dim]))
        return known

    def specialise(self, proxy: Any) -> Any:
        """Give a scalar's value to Python, and record the guard."""
        if type(proxy) is not ScalarProxy:
            return proxy
        if proxy.node not in self.guards:
            self.guards[proxy.node] = Guard(proxy.node, proxy.value, user_source())
        return proxy.value

    def read(self, tensor: TensorProxy, method: str, args: Any, kwargs: Any) -> Any:
        """Give a tensor's data to Python, and record the guard."""
        if not self.real:
            raise NeedsData(f"the model reads data with .{method}() at {show_source(user_source())}")
        if method == "item":
            return self.specialise(self.wrap(self.node("call_method", "item", (tensor,)), tensor.value.item()))
        if tensor.node not in self.guards:
            self.guards[tensor.node] = Guard(tensor.node, tensor.value.detach().clone(), user_source())
        return getattr(tensor.value.detach(), "numpy" if method == "__array__" else method)(*args, **kwargs)

    def check_assignment(self, module: nn.Module, name: str, value: Any) -> None:
        """Refuse that forward replaces a parameter, a child, or a buffer that it has read: state between calls."""
        if not any(name in store for store in (module._parameters, module._buffers, module._modules)):
            return
        path = f"{self.paths[id(module)]}.{name}".lstrip(".")
        read = [node for node in self.graph.nodes if node.op == "get_attr" and node.target == path]
        if name in module._buffers and (not read or _written_into(value, read)):
            return
        raise self.refuse(f"replace {path!r}")

    def refuse(self, what: str) -> CaptureError:
        """Return the error for something that a graph cannot hold."""
        return CaptureError(
            f"trace {type(self.root).__name__}",
            found=f"its forward tries to {what} at {show_source(user_source())}",
            do="keep that out of forward",
        )

    # -- modules ------------------------------------------------------------

    def is_leaf(self, module: nn.Module) -> bool:
        """Tell whether ``module`` stays one node."""
        if module is self.root or isinstance(module, _CONTAINERS):
            return False
        if self.leaf == "children":
            return self.paths[id(module)] not in self.expand
        rooms = ("torch.nn.", "torch.ao.") if self.leaf == "torch" else ("torch.nn.", "torch.ao.", "moefx.")
        opaque = type(module).__module__.startswith(rooms)
        return opaque and not getattr(module, "calls_back", False)

    def call_module(self, module: nn.Module, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        """Record a module call: one node for a leaf, the nodes inside it otherwise."""
        path = self.paths[id(module)]
        index = self._counts.get(path, 0)
        self._counts[path] = index + 1
        if self.is_leaf(module):
            clone = self.clone(module)
            value = self.evaluate(lambda *a, **k: type(module).forward(clone, *a, **k), args, kwargs)
            node = self.node("call_module", path, args, kwargs)
            node.meta["moefx_call_index"] = index
            return self.wrap(node, value)
        before = len(self.graph.nodes)
        last = next(iter(reversed(self.graph.nodes)), None)
        self._scope.append((path, index))
        try:
            output = call(module, *args, **kwargs)
        finally:
            self._scope.pop()
        inside = _nodes_after(last, len(self.graph.nodes) - before)
        self.calls.append(
            ModuleCall(path, index, type(module).__name__, self.arg(args), self.arg(kwargs), _map_out(output), inside)
        )
        return output

    def clone(self, module: nn.Module) -> nn.Module:
        """Return a shallow copy of ``module`` whose tensors are example values: running it never touches the user's."""
        known = self._clones.get(id(module))
        if known is None:
            known = self._clones[id(module)] = module.__class__.__new__(module.__class__)
            state = dict(module.__dict__)
            state.pop("forward", None)
            state["_parameters"] = {k: p if p is None else self._parameter(p) for k, p in module._parameters.items()}
            state["_buffers"] = {k: b if b is None else self._buffer(b) for k, b in module._buffers.items()}
            state["_modules"] = {k: m if m is None else self.clone(m) for k, m in module._modules.items()}
            known.__dict__.update(state)
        return known

    def _parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        found = self.example(parameter)
        found._is_param = True  # isinstance(_, nn.Parameter) asks for it
        return found

    def _buffer(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.clone() if self.real else self.example(buffer)


def _changes_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _written_into(value: Any, tensors: list[Node]) -> bool:
    """Tell whether ``value`` is what an in-place operation on one of ``tensors`` returned."""
    if type(value) is not TensorProxy or not value.node.args or value.node.args[0] not in tensors:
        return False
    return _writes(getattr(value.node.target, "__name__", str(value.node.target)))


def _writes(name: str) -> bool:
    return name in _INPLACE_OPERATORS or _changes_in_place(name)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_proxy(leaf: Any) -> bool:
    return type(leaf) is TensorProxy or type(leaf) is ScalarProxy


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    kind = type(tree)
    if kind is TensorProxy or kind is ScalarProxy:
        return function(tree)
    if kind is tuple or kind is Shape or kind is torch.Size:
        return tuple(_map(item, function) for item in tree)
    if kind is list:
        return [_map(item, function) for item in tree]
    if kind is dict:
        return {key: _map(item, function) for key, item in tree.items()}
    if kind is slice:
        return slice(_map(tree.start, function), _map(tree.stop, function), _map(tree.step, function))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(_map(item, function) for item in tree))
    if isinstance(tree, dict) and not isinstance(tree, nn.Module):
        return {key: _map(item, function) for key, item in tree.items()}
    return function(tree)


def _map_out(output: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.node if _is_proxy(leaf) else leaf, output)


def _nodes_after(last: Node | None, count: int) -> tuple[Node, ...]:
    if last is None:
        return ()
    found, node = [], last
    for _ in range(count):
        node = node.next
        found.append(node)
    return tuple(found)
