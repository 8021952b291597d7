"""How torch spells a call: functions, tensor methods, operators, ATen overloads and leaf modules, read as one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node

from moefx.graph import _kind_tables as tables

if TYPE_CHECKING:
    from moefx.graph import Graph


@dataclass
class Spelling:
    """A call as written: torch's name for it, its arguments, and the leaf module if there is one."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    in_place: bool = False
    module: nn.Module | None = None

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return one argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def spell(node: Node, graph: Graph) -> Spelling | None:
    if node.op == "call_module":
        return _spell_module(node, graph)
    name, args = str(node.target), node.args
    if node.op == "call_function":
        found = _function_name(node.target)
        if found is None:
            return None
        if found == "getattr":
            found, args = str(args[1]), args[:1]
        name = found
    in_place = name in tables.IN_PLACE_OPERATORS or (
        name.endswith("_") and not name.endswith("__") and name not in tables.ALIASES
    )
    in_place = in_place and name not in ("requires_grad_",)
    name = tables.IN_PLACE_OPERATORS.get(name, name)
    name = name.rstrip("_") if in_place else name
    in_place = in_place or node.kwargs.get("inplace") is True
    return Spelling(tables.ALIASES.get(name, name), args, node.kwargs, in_place)


def _function_name(target: Any) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return name if space == "aten" else None
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, _, name = target._qualified_op_name.partition("::")
        return name if space == "aten" else None
    if target is getattr:
        return "getattr"
    try:
        found = tables.FUNCTIONS.get(target)
    except TypeError:
        return None
    if found is None and getattr(target, "__qualname__", "").startswith(("TensorBase.", "Tensor.", "_TensorBase.")):
        return str(target.__name__)
    return found


def _spell_module(node: Node, graph: Graph) -> Spelling | None:
    module = graph.root.get_submodule(str(node.target))
    made: tuple[str, dict[str, Any]] | None = None
    if isinstance(module, nn.Linear):
        made = "linear", {}
    elif isinstance(module, tables.CONV_MODULES):
        made = "conv2d", {"stride": module.stride, "groups": module.groups, "padding": module.padding}
    elif isinstance(module, tables.NORM_MODULES):
        made = (
            "layer_norm"
            if isinstance(module, nn.LayerNorm)
            else "rms_norm"
            if isinstance(module, nn.RMSNorm)
            else "group_norm",
            {},
        )
    elif isinstance(module, tables.DROPOUT_MODULES):
        made = "dropout", {"p": module.p, "training": module.training}
    elif isinstance(module, nn.Identity):
        made = "contiguous", {}
    elif isinstance(module, tables.RESHAPE_MODULES):
        made = "reshape", {}
    elif isinstance(module, nn.Softmax):
        made = "softmax", {"dim": module.dim}
    elif isinstance(module, nn.Embedding):
        made = "embedding", {}
    elif isinstance(module, nn.MultiheadAttention):
        made = "multi_head_attention_forward", {}
    elif type(module) in tables.ACTIVATION_MODULES:
        made = tables.ACTIVATION_MODULES[type(module)](module)
    elif isinstance(module, tables.RESAMPLE_MODULES):
        made = "interpolate", {}
    if made is None:
        return None
    return Spelling(made[0], node.args, {**made[1], **node.kwargs}, bool(getattr(module, "inplace", False)), module)
