"""From a local graph to a forward method: ordinary Python source with the original signature.

What the capture fixed (``None`` arguments, flags, guarded values) is checked by the method itself, so that it raises
instead of computing something else.
"""

from __future__ import annotations

import inspect
import linecache
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError, GuardError
from moefx.graph import Graph
from moefx.graph.guards import describe_node

Forward = Callable[..., Any]
_compiled: dict[Any, Forward] = {}


def expect(value: Any, captured: Any, name: str) -> None:
    """Raise :class:`GuardError` unless ``value`` is what the capture saw."""
    # A value that is being traced says what it stands for by __class__, not by type().
    if value is captured or (value.__class__ is captured.__class__ and value == captured):
        return
    raise GuardError(
        f"call a rewritten module with {name} = {_short(value)}",
        found=f"it was captured with {name} = {captured!r}",
        do="transform the model again with example inputs that pass this argument",
    )


def expect_nothing(value: Any, name: str) -> None:
    """Raise :class:`GuardError` unless ``value`` is None or an empty dict, which are the same to this module."""
    if value is not None and not (isinstance(value, dict) and not value):
        expect(value, None, name)


def _short(value: Any) -> str:
    return (
        repr(value) if isinstance(value, bool | int | float | str | tuple | type(None)) else f"a {type(value).__name__}"
    )


def expect_tensor(value: Any, ndim: int, name: str) -> None:
    """Raise :class:`GuardError` unless ``value`` is a tensor with as many dimensions as captured."""
    if isinstance(value, torch.Tensor) and value.ndim == ndim:
        return
    raise GuardError(
        f"call a rewritten module with {name} of another kind",
        found=f"it was captured as a tensor of {ndim} dimensions",
        do="transform the model again with example inputs like these",
    )


def make_forward(graph: Graph, empty: Collection[str] = (), flag: str = "") -> Forward:
    """Return a forward method for the module ``graph`` was captured from.

    Arguments named in ``empty`` may be None or an empty dict, whichever the capture saw. The argument ``flag`` says
    whether an output class is wanted or the plain tuple of its values.

    Raises:
        CaptureError: the graph holds something that plain Python source cannot express.
    """
    _check_expressible(graph)
    fx = _with_signature(graph, empty, flag)
    code = fx.python_code(root_module="self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in _compiled:
        filename = f"<moefx forward {len(_compiled)} of {type(graph.root).__name__}>"
        linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
        scope = dict(code.globals)
        exec(compile(code.src, filename, "exec"), scope)
        _compiled[key] = scope["forward"]
    return _compiled[key]


def _check_expressible(graph: Graph) -> None:
    owner = type(graph.root).__name__
    for node in graph.fx.nodes:
        if "context" in node.meta:
            found = f"an autocast or no_grad block around {node.name} at {node.meta['moefx'].source}"
            raise CaptureError(f"rewrite {owner}", found=found, do="skip this site")
    for name in graph.constants:
        raise CaptureError(
            f"rewrite {owner}", found=f"a tensor outside parameters and buffers: {name}", do="skip this site"
        )
    for note in graph.notes:
        raise CaptureError(f"rewrite {owner}", found=note, do="skip this site")


def _with_signature(graph: Graph, empty: Collection[str], flag: str) -> FxGraph:
    """Copy the graph under the original signature, with checks of everything the capture fixed."""
    spec = graph.call_spec
    assert spec is not None
    new = FxGraph()
    env: dict[Node, Node] = {}
    bound = pytree.tree_unflatten(_leaves(graph), spec.spec)
    parameters = list(spec.signature.parameters.values())
    holders = {p.name: _placeholder(new, p) for p in parameters}
    for parameter in parameters:
        if parameter.name in empty:
            new.call_function(expect_nothing, (holders[parameter.name], parameter.name))
            continue
        if parameter.name == flag:
            continue
        _unpack(new, env, holders[parameter.name], bound.get(parameter.name), parameter.name)
    guards = {guard.node: guard for guard in graph.guards}
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            copied = env[node]
        elif node.op == "output":
            leaves = [n if not isinstance(n, Node) else env[n] for n in node.args[0]]
            new.output(_output(new, graph, leaves, holders.get(flag)))
            continue
        else:
            copied = env[node] = new.node_copy(node, lambda n: env[n])
        if node in guards:
            new.call_function(expect, (copied, guards[node].expected, describe_node(node)))
    new.lint()
    return new


def _leaves(graph: Graph) -> list[Any]:
    assert graph.call_spec is not None
    placeholders = iter([n for n in graph.fx.nodes if n.op == "placeholder"])
    return [next(placeholders) if static is None else static[1] for static in graph.call_spec.static]


def _placeholder(fx: FxGraph, parameter: inspect.Parameter) -> Node:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    stars = "" if not variadic else "*" if parameter.kind == parameter.VAR_POSITIONAL else "**"
    if stars or parameter.default is parameter.empty:
        return fx.placeholder(stars + parameter.name)
    return fx.placeholder(parameter.name, default_value=parameter.default)


def _unpack(fx: FxGraph, env: dict[Node, Node], holder: Node, captured: Any, name: str) -> None:
    """Emit reads of the tensors inside one argument, and checks of the rest."""
    if isinstance(captured, Node):
        env[captured] = holder
        fx.call_function(expect_tensor, (holder, captured.meta["val"].ndim, name))
    elif isinstance(captured, dict | list | tuple) and any(isinstance(v, Node) for v in pytree.tree_leaves(captured)):
        items = captured.items() if isinstance(captured, dict) else enumerate(captured)
        for key, item in items:
            _unpack(fx, env, fx.call_function(_item, (holder, key)), item, f"{name}[{key!r}]")
    else:
        fx.call_function(expect, (holder, captured, name))


def _item(holder: Any, key: Any) -> Any:
    return holder[key]


def _output(new: FxGraph, graph: Graph, leaves: list[Any], flag: Node | None) -> Any:
    """Return what the new forward returns: plain containers, or a call of the output class."""
    tree: Any = pytree.tree_unflatten(leaves, graph.out_spec) if graph.out_spec is not None else leaves[0]
    if type(tree) in (Node, list, tuple, dict):
        return tree
    if isinstance(tree, OrderedDict) and hasattr(type(tree), "__dataclass_fields__"):
        made = new.call_function(type(tree), kwargs=dict(tree))
        return made if flag is None else new.call_function(_as_wanted, (flag, made))
    raise CaptureError(
        f"rewrite {type(graph.root).__name__}",
        found=f"its forward returns a {getattr(tree, 'cls', type(tree)).__name__}",
        do="skip this site",
    )


def _as_wanted(flag: bool, made: Any) -> Any:
    return made if flag else made.to_tuple()


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether an instance-level forward (a hook's) hides the class's one."""
    return "forward" in module.__dict__
