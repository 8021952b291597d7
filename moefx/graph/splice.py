"""The one way to change a graph: every new node is made here, stamped with its rule and given its shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from moefx.errors import PlanError
from moefx.graph.graph import Graph
from moefx.graph.origin import Origin, origin_of, show_source

# Operators that end in an underscore because the word is a keyword.
_KEYWORDS = frozenset({"and_", "or_", "not_", "is_"})
_INPLACE_FUNCTIONS = frozenset({"setitem", "iadd", "isub", "imul", "itruediv"})


class Splice:
    """Edits one graph on behalf of one rule.

    New nodes take the origin of the node they are built ``around``, plus the rule's name; their shapes are propagated
    at once. Nothing is erased before :meth:`replace` found that the region is removable.
    """

    def __init__(self, graph: Graph, rule: str) -> None:
        self.graph, self.rule = graph, rule

    def call_module(self, target: str, args: tuple[Any, ...], *, around: Node, val: Any) -> Node:
        """Insert a call of the (possibly future) submodule ``target`` before ``around``."""
        return self._create("call_module", target, args, around, val)

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], *, around: Node) -> Node:
        """Insert a function call before ``around``; its shape is computed."""
        return self._create("call_function", function, args, around, self._propagate(function, args))

    def argument(self, name: str, *, val: Any) -> Node:
        """Let the graph take one more argument, which may be left out."""
        first = next(iter(self.graph.fx.nodes))
        with self.graph.fx.inserting_before(next(n for n in self.graph.fx.nodes if n.op != "placeholder")):
            node: Node = self.graph.fx.placeholder(name, default_value=None)
        node.meta |= {"moefx": origin_of(first).stamped(self.rule), "val": val, "optional": True}
        self.graph.touch()
        return node

    def after(self, node: Node, function: Callable[..., Any], args: tuple[Any, ...], *, val: Any = None) -> Node:
        """Insert ``function(node, *args)`` right after ``node``."""
        with self.graph.fx.inserting_after(node):
            made = self.graph.fx.call_function(function, (node, *args))
        made.meta |= {"moefx": origin_of(node).stamped(self.rule), "val": val}
        self.graph.touch()
        return made

    def copy(self, node: Node, swap: Mapping[Node, Node], *, around: Node) -> Node:
        """Insert a copy of ``node`` before ``around`` that reads ``swap[x]`` instead of x; its shape stays."""
        with self.graph.fx.inserting_before(around):
            made = self.graph.fx.node_copy(node, lambda n: swap.get(n, n))
        made.meta["moefx"] = origin_of(node).stamped(self.rule)
        self.graph.touch()
        return made

    def _create(self, op: str, target: Any, args: tuple[Any, ...], around: Node, val: Any) -> Node:
        with self.graph.fx.inserting_before(around):
            node = self.graph.fx.create_node(op, target, args)
        node.meta["moefx"] = origin_of(around).stamped(self.rule)
        node.meta["val"] = val
        self.graph.touch()
        return node

    def _propagate(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        values = map_arg(args, lambda n: n.meta["val"])
        modes = [v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)]
        with modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return function(*values)

    def replace(self, old: Node, new: Node, region: Iterable[Node] = ()) -> None:
        """Let every user of ``old`` use ``new`` instead, and erase what of ``region`` nothing uses any more.

        Raises:
            PlanError: an intermediate of the region is used elsewhere, or an in-place op straddles its border.
        """
        inside = set(region)
        problem = not_removable(inside - {old}, old) if inside else ""
        if problem:
            raise PlanError(f"apply rule {self.rule!r}", found=problem, do="exclude this site with skip=")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.sweep(inside | {old})

    def sweep(self, region: Iterable[Node]) -> None:
        """Erase what of ``region`` nothing uses any more; in-place writes have no users, so name none that matter."""
        inside = set(region)
        for node in reversed(list(self.graph.fx.nodes)):
            if node in inside and not node.users:
                self.graph.fx.erase_node(node)
        calls = self.graph.calls
        self.graph.calls = [dataclasses.replace(c, nodes=tuple(n for n in c.nodes if not n._erased)) for c in calls]
        self.graph.touch()


def not_removable(region: set[Node], output: Node) -> str:
    """Return why ``region`` cannot be replaced as a whole by something that yields ``output``; ``""`` if it can."""
    for node in sorted(region, key=lambda n: n.name):
        outside = [u for u in node.users if u not in region and u is not output]
        if outside and _computes(node):
            where = show_source(origin_of(outside[0]).source)
            return f"{node.name} inside the region is also used by {outside[0].name} at {where}"
        if is_inplace(node) and node.args and isinstance(node.args[0], Node) and node.args[0] not in region:
            return f"{node.name} changes {node.args[0].name} in place across the region's border"
    return ""


def is_inplace(node: Node) -> bool:
    """Tell whether ``node`` changes its first argument."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return name in _INPLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__") and name not in _KEYWORDS)


def _computes(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor | tuple | list) and node.op != "get_attr"


def unstamped(graph: Graph) -> list[Node]:
    """Return the nodes without provenance."""
    return [n for n in graph.fx.nodes if n.op != "output" and not isinstance(n.meta.get("moefx"), Origin)]
