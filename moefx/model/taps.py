"""Taps: finding, inside one block, a value that carries what a router wants to read."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.graph import Graph, ModuleCall
from moefx.passes.analysis import Facts

_WANTED = {"timestep": ("timestep", frozenset({"timestep", "label"}))}


def choose_tap(name: str, facts: Facts, call: ModuleCall | None, local: Graph) -> Node | None:
    """Return the node of ``local`` that best carries ``name``, or None.

    A raw timestep is preferred to an embedding of it alone, and that to one mixed with the label or pooled text;
    among equals the first in program order. Values that depend on tokens or text never qualify.

    Args:
        facts: of the whole model; they say what each argument of the block depends on.
        call: the block's invocation in the whole model; None if the block is the whole model.
        local: the block's own graph.
    """
    needed, allowed = _WANTED[name]
    classes = _classes(facts, call, local)
    best: tuple[tuple[int, int], Node] | None = None
    for i, node in enumerate(local.fx.nodes):
        found = classes.get(node, frozenset())
        value = node.meta.get("val")
        if needed not in found or not found <= allowed or not isinstance(value, torch.Tensor) or not _per_sample(value):
            continue
        rank = (value.ndim - 1) + 2 * (len(found) - 1)
        if best is None or (rank, i) < best[0]:
            best = (rank, i), node
    return best[1] if best else None


def _per_sample(value: torch.Tensor) -> bool:
    return (
        value.ndim == 1 or (value.ndim == 2 and value.is_floating_point()) or (value.ndim == 3 and value.shape[1] == 1)
    )


def _classes(facts: Facts, call: ModuleCall | None, local: Graph) -> dict[Node, frozenset[str]]:
    """Return what every node of the local graph depends on."""
    found: dict[Node, frozenset[str]] = {}
    outer = _outer_nodes(facts, call, local)
    for node in local.fx.nodes:
        if node.op == "placeholder":
            source = next(outer)
            # Arguments that nothing reads were pruned from the whole model's graph.
            known = isinstance(source, Node) and not source._erased
            found[node] = facts.context.classes.of(source) if known else frozenset()
        elif node.op == "call_method" and node.target == "size":
            found[node] = frozenset()
        elif node.op != "output":
            found[node] = frozenset().union(*(found[n] for n in node.all_input_nodes))
    return found


def _outer_nodes(facts: Facts, call: ModuleCall | None, local: Graph) -> Any:
    """Iterate over the whole model's nodes that stand behind the local placeholders."""
    if call is None:
        return iter([n for n in facts.graph.fx.nodes if n.op == "placeholder"])
    assert local.call_spec is not None
    leaves = pytree.tree_leaves(local.call_spec.bind(call.args, call.kwargs))
    return iter([leaf for leaf in leaves if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor)])
