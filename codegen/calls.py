"""Which dialect operator a node of a graph calls, with what, and what is known of a node's value.

Tracers spell one call in several ways: the overload packet, its default overload, or the function of `moefx.ops`, with
arguments by place or by name.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import fx

from moefx import ops
from moefx.codegen.reasons import CannotLower


def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.moefx, name).default._schema.arguments]


#: The arguments of the operators that regions are made of, by the names of their schemas.
ARGUMENTS = {name: _argument_names(name) for name in ("grouped_linear", "combine", "scatter")}
# The functions of moefx.ops suffix names with shapes; positions are the same.
_ALIASES = {
    name: dict(zip(inspect.signature(getattr(ops, name)).parameters, arguments, strict=True))
    for name, arguments in ARGUMENTS.items()
}


def calls(node: Any, name: str) -> bool:
    """Whether a node calls a dialect operator, in any spelling."""
    packet = getattr(torch.ops.moefx, name)
    spellings = (packet, packet.default, getattr(ops, name))
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in spellings


def dialect_op(node: Any) -> str | None:
    """Return which operator of a region over sorted rows a node calls: ``"grouped_linear"`` or ``"combine"``."""
    return next((name for name in ("grouped_linear", "combine") if calls(node, name)), None)


def operands(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a dialect call by name."""
    name = next(name for name in ARGUMENTS if calls(node, name))
    named = {_ALIASES[name].get(key, key): value for key, value in node.kwargs.items()}
    return dict.fromkeys(ARGUMENTS[name]) | dict(zip(ARGUMENTS[name], node.args, strict=False)) | named


def recorded(node: Any) -> Any:
    """Return the example or fake value of a node, if its tracer left one."""
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else None


def is_data(node: fx.Node) -> bool:
    """Whether a node computes with what it reads; a size or a device says nothing of it."""
    return isinstance(recorded(node), torch.Tensor | list | tuple) or node.op == "output"


class Values:
    """The tensors of a graph's nodes, fake or real."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root

    def __call__(self, node: Any) -> torch.Tensor:
        """Return the tensor of a node, or raise :class:`CannotLower`."""
        found = recorded(node)
        if found is None and isinstance(node, fx.Node) and node.op == "get_attr":
            found = self.root
            for name in str(node.target).split("."):
                found = getattr(found, name, None)
        if not isinstance(found, torch.Tensor):
            raise CannotLower(
                "read shapes", found=f"{node} has no recorded shape", do="propagate shapes through the graph"
            )
        return found


def site_of(node: fx.Node) -> str:
    """Return the path of the module that a node belongs to, else the node's name."""
    path = getattr(node.meta.get("moefx"), "path", None)
    if path:
        return str(path)
    stack = node.meta.get("nn_module_stack")
    if stack:
        innermost = str(next(reversed(stack.values()))[0])
        # A forward that moefx installed reads children past attribute lookup.
        innermost = re.sub(r"__dict__\['_modules'\]\['(\w+)'\]", r"\1", innermost)
        return innermost.removeprefix("L['self'].").replace("L['self']", "") or node.name
    return node.name
