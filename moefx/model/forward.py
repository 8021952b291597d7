"""From a local graph to a forward method: ordinary Python source with the original signature.

What the capture fixed (``None`` arguments, flags, guarded values) is checked by the method itself, so that it raises
instead of computing something else.
"""

from __future__ import annotations

import functools
import inspect
import linecache
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError, GuardError
from moefx.graph import Graph
from moefx.graph.guards import describe_node

Forward = Callable[..., Any]
CALL_CHILD = "_moefx_call_child"
_compiled: dict[Any, Forward] = {}


class HandedOn(NamedTuple):
    """What a block returns that hands states on: its own output, and they."""

    output: Any
    states: tuple[torch.Tensor, ...]


def received(value: Any, index: int, name: str) -> Any:
    """Return the output (-1) or a state of a block that hands states on.

    Raises:
        GuardError: something between it and its caller returned only an output.
    """
    if not isinstance(value, HandedOn):
        raise GuardError(
            f"take the routers' state from {name!r}",
            found=f"it returned a {type(value).__name__} without state: a cache or a hook answered in its place",
            do="remove that, or route without memory (state='none')",
        )
    return value.output if index < 0 else value.states[index]


def expect(value: Any, captured: Any, name: str) -> None:
    """Raise :class:`GuardError` unless ``value`` is what the capture saw."""
    # A value that is being traced says what it stands for by __class__, not by type(); a float does so by neither.
    alike = value.__class__ is captured.__class__ or (isinstance(captured, float) and isinstance(value, float))
    if value is captured or (alike and value == captured):
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


def make_forward(
    graph: Graph, empty: Collection[str] = (), flag: str = "", checkpointed: Collection[str] = ()
) -> Forward:
    """Return a forward method for the module ``graph`` was captured from.

    Arguments named in ``empty`` may be None or an empty dict, whichever the capture saw. The argument ``flag`` says
    whether an output class is wanted or the plain tuple of its values. Children in ``checkpointed`` are called through
    diffusers' gradient checkpointing while that is enabled.

    Arguments that the graph was given by `Splice.argument` follow the original ones; with values beyond its original
    output it returns `HandedOn`.

    Raises:
        CaptureError: the graph holds something that plain Python source cannot express.
    """
    _check_expressible(graph)
    fx = _with_signature(graph, empty, flag, checkpointed)
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


def _with_signature(graph: Graph, empty: Collection[str], flag: str, checkpointed: Collection[str]) -> FxGraph:
    """Copy the graph under the original signature, with checks of everything the capture fixed."""
    spec = graph.call_spec
    assert spec is not None
    new = FxGraph()
    env: dict[Node, Node] = {}
    bound = pytree.tree_unflatten(_leaves(graph), spec.spec)
    parameters = list(spec.signature.parameters.values())
    last = [p for p in parameters if p.kind == p.VAR_KEYWORD]
    holders = {p.name: _placeholder(new, p) for p in parameters if p not in last}
    added = [node for node in graph.fx.nodes if node.meta.get("optional")]
    env |= {node: new.placeholder(str(node.target), default_value=None) for node in added}
    holders |= {p.name: _placeholder(new, p) for p in last}
    for parameter in parameters:
        if parameter.name in empty:
            new.call_function(expect_nothing, (holders[parameter.name], parameter.name))
            continue
        if parameter.name == flag:
            continue
        _unpack(new, env, holders[parameter.name], bound.get(parameter.name), parameter.name)
    for node in added:
        if isinstance(node.meta["val"], torch.Tensor):
            new.call_function(expect_tensor, (env[node], node.meta["val"].ndim, str(node.target)))
    guards = {guard.node: guard for guard in graph.guards}
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            copied = env[node]
        elif node.op == "output":
            leaves = [n if not isinstance(n, Node) else env[n] for n in node.args[0]]
            new.output(_output(new, graph, leaves, holders.get(flag)))
            continue
        elif node.op == "call_module" and (node.target in checkpointed or "instead" in node.meta):
            copied = env[node] = _child_call(new, env, node, node.target in checkpointed)
        else:
            copied = env[node] = new.node_copy(node, lambda n: env[n])
        if node in guards:
            new.call_function(expect, (copied, guards[node].expected, describe_node(node)))
    new.lint()
    return new


def _child_call(new: FxGraph, env: dict[Node, Node], node: Node, checkpointed: bool) -> Node:
    """Emit the call of a child that is called through checkpointing, or in whose place something may be called.

    ``meta["instead"]`` is a function and its further arguments: it maps the child to what is called.
    """
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
    child = new.get_attr(str(node.target))
    hands_on = any(user.target is received for user in node.users)
    if "instead" in node.meta and not hands_on:
        choose, given = node.meta["instead"]
        child = new.call_function(choose, (child, *map_arg(given, lambda n: env[n])))
    if checkpointed:
        return new.call_module(CALL_CHILD, (child, *args), kwargs)
    return new.call_function(_call, (child, *args), kwargs)


def _call(child: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return child(*args, **kwargs)


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
    count = graph.out_spec.num_leaves if graph.out_spec is not None else len(leaves)
    own, added = leaves[:count], leaves[count:]
    tree = _own_output(new, graph, own, flag)
    return new.call_function(HandedOn, (tree, tuple(added))) if added else tree


def _own_output(new: FxGraph, graph: Graph, leaves: list[Any], flag: Node | None) -> Any:
    tree: Any = pytree.tree_unflatten(leaves, graph.out_spec) if graph.out_spec is not None else leaves[0]
    if type(tree) in (Node, list, tuple, dict):
        return tree
    if isinstance(tree, HandedOn) and isinstance(tree.output, Node | list | tuple | dict):
        return new.call_function(HandedOn, tuple(tree))
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


def call_child(self: nn.Module, child: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a child the way diffusers' models do: through gradient checkpointing while that is enabled."""
    owner: Any = self
    if not (torch.is_grad_enabled() and owner.gradient_checkpointing):
        return child(*args, **kwargs)
    # The checkpointing function takes positional arguments only.
    called = functools.partial(child, **kwargs) if kwargs else child
    return owner._gradient_checkpointing_func(called, *args)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether an instance-level forward (a hook's) hides the class's one."""
    return "forward" in module.__dict__
