"""The vocabulary of operation kinds, and the cache and registry behind :func:`op`: import :mod:`moefx.graph.kinds`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from moefx.graph import _kind_tables as tables
from moefx.graph._kind_spelling import Spelling, spell

if TYPE_CHECKING:
    from moefx.graph import Graph

_PLAIN = int | float | complex | str | torch.SymInt | torch.SymFloat | torch.SymBool | torch.dtype | torch.device
MOVES = frozenset({"identity", "reshape", "permute", "expand", "slice"})
POINTWISE = frozenset({"act", "add", "sub", "mul", "div", "pointwise"})


@dataclass(frozen=True)
class ParamRef:
    """A parameter or buffer by dotted name.

    ``rows`` selects a range of its first dimension, then ``transposed`` swaps the two dimensions of a matrix.
    """

    fqn: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Op:
    """What one node does.

    ``kind`` is the coarse class that matchers switch on, ``name`` torch's own word for it, ``inputs`` the tensors
    whose data flows in (parameters, sizes and shape-only operands excluded), ``params`` the parameters it reads by
    role, ``attrs`` its options.
    """

    kind: str
    name: str
    inputs: tuple[Node, ...] = ()
    params: Mapping[str, ParamRef] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether the operation overwrites its first input."""
        return bool(self.attrs.get("in_place"))


_cache: weakref.WeakKeyDictionary[Any, dict[Node, tuple[tuple[Any, ...], Op]]] = weakref.WeakKeyDictionary()


def op(node: Node, graph: Graph) -> Op:
    """Return the normalised operation of ``node``, cached until the node or its producers are edited."""
    known = _cache.setdefault(graph, {})
    key = (node.target, node.args, node.kwargs, *(n.args for n in node.all_input_nodes))
    entry = known.get(node)
    if entry is not None and len(entry[0]) == len(key) and all(a is b for a, b in zip(entry[0], key, strict=True)):
        return entry[1]
    made = _read(node, graph)
    known[node] = (key, made)
    return made


def value(node: Node) -> Any:
    """Return the example value of ``node``: a fake tensor, a number, a tuple of those, or ``None`` where unknown."""
    if "val" in node.meta:
        return node.meta["val"]
    found: Any = node.meta.get("tensor_meta")
    return torch.empty(found.shape, dtype=found.dtype, device="meta") if hasattr(found, "shape") else None


def shape(node: Node) -> tuple[int, ...] | None:
    """Return the concrete shape of a tensor-valued node in the example run, else ``None``."""
    found = value(node)
    return tuple(_integer(size) for size in found.shape) if isinstance(found, torch.Tensor) else None


def number(item: Any) -> Any:
    """Return a Python number for an argument that may be a size node; anything else unchanged."""
    if isinstance(item, Node):
        found = value(item)
        if isinstance(found, torch.Tensor):
            return item
        return _integer(found) if isinstance(found, int | torch.SymInt) else found
    return _integer(item) if isinstance(item, torch.SymInt) else item


def carries_data(node: Node) -> bool:
    """Whether ``node`` yields tensors, as opposed to sizes, numbers, dtypes and other Python values."""
    found = value(node)
    if isinstance(found, tuple | list):
        return any(isinstance(v, torch.Tensor) for v in found)
    return not isinstance(found, _PLAIN)


def param_ref(node: Any, graph: Graph) -> ParamRef | None:
    """Return the parameter that ``node`` stands for, seen through casts, transposes and row slices."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        return ParamRef(str(node.target))
    if node.op == "placeholder":
        name = node.meta.get("moefx_param")
        return ParamRef(name) if name else None
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or source.op == "call_module":
        return None
    what = op(node, graph)
    if what.kind not in MOVES:
        return None
    producer = what.attrs.get("of", source)
    inner = param_ref(producer, graph)
    return _moved_param(inner, producer, what) if inner is not None else None


def _moved_param(inner: ParamRef, source: Node, what: Op) -> ParamRef | None:
    if what.kind == "identity":
        return inner
    if what.kind == "permute" and what.attrs["dims"] == (1, 0):
        return ParamRef(inner.fqn, inner.rows, not inner.transposed)
    if what.kind == "slice" and not inner.transposed and inner.rows is None:
        first, *rest = what.attrs["index"] or (None,)
        sizes = shape(source)
        if isinstance(first, slice) and sizes and all(isinstance(r, slice) and r == slice(None) for r in rest):
            start, stop, step = first.indices(sizes[0])
            return ParamRef(inner.fqn, (start, stop)) if step == 1 else None
    return None


def _integer(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return int(size) if not isinstance(size, bool) else size


# -- reading one node --------------------------------------------------------------------------------------------------

Reader = Callable[[Node, Spelling, str, "Graph"], Op]
_readers: dict[str, Reader] = {}


def reads(*kinds: str) -> Callable[[Reader], Reader]:
    """Register a function that reads the calls of some kinds."""

    def register(reader: Reader) -> Reader:
        _readers.update(dict.fromkeys(kinds, reader))
        return reader

    return register


def _read(node: Node, graph: Graph) -> Op:
    if node.op == "placeholder":
        return Op("param" if node.meta.get("moefx_param") else "input", str(node.target))
    if node.op == "get_attr":
        return Op("param", str(node.target))
    if node.op == "output":
        return Op("output", "output", tuple(n for n in node.all_input_nodes if carries_data(n)))
    if not carries_data(node):
        return Op("size", str(node.target))
    call = spell(node, graph)
    if call is None:
        known = tables.KINDS.get(str(node.target), "other")
        return Op("module" if node.op == "call_module" else known, str(node.target), data(node, graph))
    kind = tables.KINDS.get(call.name, "other")
    return _readers.get(kind, _readers[""])(node, call, kind, graph)


def data(node: Node, graph: Graph) -> tuple[Node, ...]:
    """Return the input nodes that carry data and are not parameters, each once, in argument order."""
    return tuple(n for n in node.all_input_nodes if carries_data(n) and param_ref(n, graph) is None)


def params_of(node: Node, graph: Graph, names: tuple[str, ...]) -> dict[str, ParamRef]:
    if node.op == "call_module":
        module = graph.root.get_submodule(str(node.target))
        present = [name for name in names if getattr(module, name, None) is not None]
        return {name: ParamRef(f"{node.target}.{name}") for name in present}
    return {}
