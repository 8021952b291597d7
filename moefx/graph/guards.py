"""Guards: the facts under which a captured graph equals its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moefx.errors import GuardError
from moefx.graph.origin import origin_of, show_source


@dataclass(frozen=True)
class Guard:
    """A value that reached Python during the trace, so the graph is valid only while it stays the same.

    ``node`` computes the value, ``expected`` is what it was, ``source`` is the line that read it.
    """

    node: Node
    expected: Any
    source: str

    def holds(self, value: Any) -> bool:
        """Tell whether ``value`` is still what the trace saw."""
        if isinstance(self.expected, torch.Tensor):
            return isinstance(value, torch.Tensor) and torch.equal(value, self.expected)
        return type(value) is type(self.expected) and bool(value == self.expected)

    def check(self, value: Any) -> None:
        """Raise :class:`GuardError` unless ``value`` is still what the trace saw."""
        if not self.holds(value):
            raise GuardError(
                "run a captured graph outside the range it was captured for",
                found=f"{self.describe()}, now {_short(value)}; read at {show_source(self.source)}",
                do="trace the model again with inputs like these",
            )

    def describe(self) -> str:
        """Return the guard as a readable condition."""
        return f"{describe_node(self.node)} == {_short(self.expected)}"


def describe_node(node: Node, depth: int = 3) -> str:
    """Return a short expression for a scalar node, such as ``hidden_states.size(1) // 2``."""
    if node.op == "placeholder" or depth == 0:
        return node.name
    args = [describe_node(a, depth - 1) if isinstance(a, Node) else repr(a) for a in node.args]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    if node.op == "get_attr":
        return str(node.target)
    target = getattr(node.target, "__name__", str(node.target))
    if target == "getattr":
        return f"{args[0]}.{node.args[1]}"
    return f"{target}({', '.join(args)})" if args else origin_of(node).source


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.numel() > 8 else str(value.tolist())
    return repr(value)
