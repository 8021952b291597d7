"""Sizes that no input can change: the width of a layer, a number written in the model's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

# How many tensors these return may depend on a size; all others return as many as they are asked for.
SPLITTERS = frozenset(["split", "unbind", "chunk", "unsafe_split", "unsafe_chunk"])
_SAME_SHAPE = frozenset(
    ["to", "float", "contiguous", "type", "type_as", "clone", "detach", "double", "half", "bfloat16"]
)


def count_is_fixed(split: Node, count: int, root: nn.Module) -> bool:
    """Tell whether ``split``, which returned ``count`` tensors, does so whatever the sizes of the inputs."""
    name = _name(split)
    options = [*split.args[1:], *(value for key, value in split.kwargs.items() if key != "dim")]
    how = options[0] if options and name != "unbind" else None
    if isinstance(how, list | tuple) or ("chunk" in name and how == count):
        return True
    rest = options[0 if name == "unbind" else 1 :]
    dim = split.kwargs.get("dim", rest[0] if rest else 0)
    tensor = split.args[0] if split.args else None
    if isinstance(how, Node) or not isinstance(dim, int) or not isinstance(tensor, Node):
        return False
    return is_constant(tensor, dim, root)


def is_constant(node: Node, dim: int, root: nn.Module) -> bool:
    """Tell whether dimension ``dim`` of ``node`` is the same for all inputs; False where that is not obvious."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    dim %= value.ndim
    name = _name(node)
    if node.op == "get_attr":
        return True
    if name == "linear" or (node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), nn.Linear)):
        return dim == value.ndim - 1
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    if name in _SAME_SHAPE:
        return is_constant(source, dim, root)
    if name in ("reshape", "view", "unflatten"):
        return _is_written(node, name, dim, value.ndim)
    moved = _source_dim(node, name, dim, value.ndim)
    return moved is not None and is_constant(source, moved, root)


def _is_written(node: Node, name: str, dim: int, ndim: int) -> bool:
    """Tell whether a reshape gives the size of ``dim`` as a number."""
    sizes = _flat(node.args[1:])
    if name == "unflatten":
        if len(sizes) < 2 or not isinstance(sizes[0], int):
            return False
        first = sizes[0] % (ndim - len(sizes) + 2)
        sizes, dim = sizes[1:], dim - first
    return 0 <= dim < len(sizes) and isinstance(sizes[dim], int) and sizes[dim] != -1


def _source_dim(node: Node, name: str, dim: int, ndim: int) -> int | None:
    """Return the dimension of the input that becomes ``dim`` of a permutation."""
    dims = _flat(node.args[1:])
    if not all(isinstance(d, int) for d in dims) or node.kwargs:
        return None
    if name == "permute" and len(dims) == ndim:
        return int(dims[dim])
    if name == "transpose" and len(dims) == 2:
        one, two = (int(d) % ndim for d in dims)
        return {one: two, two: one}.get(dim, dim)
    return None


def _flat(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in _flat(arg)] if isinstance(args, list | tuple) else [args]


def _name(node: Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
