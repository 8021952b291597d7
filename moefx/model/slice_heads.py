"""Cutting heads that are off out of an attention: fewer rows in its projections, fewer columns in the one behind it.

Works on one block whose head gates are constants. The shapes that the block's own code wrote down for H heads are
rewritten for those that stay, and the block is run against what it was: where the two differ, it keeps its heads.

Legend: H heads, S those that stay, d head width.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from moefx.errors import MoefxError
from moefx.graph import Graph
from moefx.graph.kinds import MOVES, POINTWISE, op
from moefx.model.forward import make_forward
from moefx.model.install import Change, changed_clone
from moefx.model.local import JSON, local_graph
from moefx.model.verify import random_call
from moefx.passes.analysis.local import local_sites
from moefx.passes.analysis.site import Site
from moefx.routing.static import ConstantGates

TOLERANCE = 1e-4
_SHAPING = frozenset({"view", "reshape", "unflatten", "expand", "flatten", "repeat", "repeat_interleave"})
_ARITHMETIC = frozenset({operator.floordiv, operator.mul, operator.mod})


class CannotSlice(Exception):
    """Heads that stay where they are, and why."""


def slice_heads(block: nn.Module, inputs: JSON, gates: Mapping[str, ConstantGates]) -> nn.Module:
    """Return a copy of ``block`` without the heads whose gates are zero; everything else is shared.

    Args:
        block: a block of a variant; its children may be changed.
        inputs: what it was captured with.
        gates: its constant gates by child name.

    Raises:
        CannotSlice: the heads cannot be told apart, or the sliced block differs.
    """
    try:
        graph = local_graph(block, inputs, "children")
        children: dict[str, nn.Module] = {}
        for site in [s for s in local_sites(graph) if s.kind == "attention"]:
            _slice_site(graph, site, gates, children)
        if not children:
            raise CannotSlice("no attention behind its gates")
        forward = make_forward(graph)
    except MoefxError as error:
        raise CannotSlice(error.found) from error
    sliced = changed_clone(block, Change("", {}, forward))
    for path, child in children.items():
        _set(sliced, path, child)
    _compare(block, sliced, inputs)
    return sliced


def _slice_site(graph: Graph, site: Site, gates: Mapping[str, ConstantGates], children: dict[str, nn.Module]) -> None:
    """Rewrite one attention in ``graph``; new projections and gates go to ``children``."""
    region = _region(graph, site)
    calls = [n for n in graph.fx.nodes if n.op == "call_module" and n.target in gates and _meets(n, region)]
    kept = {tuple(gates[str(call.target)].on()) for call in calls}
    if not calls:
        return
    if len(kept) != 1:
        raise CannotSlice("its token streams keep different heads")
    (heads,), total = kept, len(gates[str(calls[0].target)].values)
    if len(heads) == total:
        return
    for path, rows in _rows(site, heads, total).items():
        children[path] = _narrowed(children.get(path, graph.root.get_submodule(path)), rows, 0)
    for call in calls:
        children[str(call.target)] = gates[str(call.target)].only(heads)
        out, columns = _columns(graph, call, heads, total)
        children[out] = _narrowed(children.get(out, graph.root.get_submodule(out)), columns, 1)
    size = int(site.shapes["head_dim"])
    fewer = {total: len(heads), total * size: len(heads) * size}
    for node in region:
        _rewrite_sizes(node, fewer)


def _region(graph: Graph, site: Site) -> set[Node]:
    """Return the nodes between the projections of queries, keys and values and the next projection."""
    parts = [p for stream in site.operands["streams"] for p in (stream.q, stream.k, stream.v) if p is not None]
    region: set[Node] = set()
    stack = [user for part in parts for user in part.node.users]
    while stack:
        node = stack.pop()
        if node not in region and op(node, graph).kind not in ("linear", "conv", "output"):
            region.add(node)
            stack.extend(node.users)
    return region | _beside(graph, region, {part.node for part in parts})


def _beside(graph: Graph, region: set[Node], projections: set[Node]) -> set[Node]:
    """Return what only prepares something else for the region, such as a mask that is repeated for every head."""
    found: set[Node] = set()
    stack = [n for node in region for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        prepares = op(node, graph).kind in MOVES | POINTWISE | {"repeat", "other"} or node.target in _ARITHMETIC
        if prepares and node not in region | projections | found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _meets(call: Node, region: set[Node]) -> bool:
    """Whether the gates of ``call`` multiply something of the region."""
    return any(user in region or any(u in region for u in user.users) for user in call.users)


def _rows(site: Site, heads: tuple[int, ...], total: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the output features that stay, per projection module."""
    gone: dict[str, set[int]] = {}
    width: dict[str, int] = {}
    for stream in site.operands["streams"]:
        for part in (stream.q, stream.k, stream.v):
            if part is None:
                continue
            rows = part.lane.flat()
            if part.node.op != "call_module" or len(rows) % total:
                raise CannotSlice("a projection is no module, or has another number of heads")
            by_head = rows.reshape(total, -1)
            path = str(part.node.target)
            width[path] = int(part.node.meta["val"].shape[-1])
            gone.setdefault(path, set()).update(by_head[[h for h in range(total) if h not in heads]].flatten().tolist())
    return {path: np.array([r for r in range(width[path]) if r not in rows]) for path, rows in gone.items()}


def _columns(graph: Graph, call: Node, heads: tuple[int, ...], total: int) -> tuple[str, np.ndarray[Any, Any]]:
    """Follow gated heads to the projection that reads them; return it and the input features that stay."""
    node = next(u for user in [call, *call.users] for u in user.users if op(u, graph).kind == "mul")
    own, offset = int(np.prod([int(size) for size in node.meta["val"].shape[2:]])), 0
    while True:
        ahead = [user for user in node.users if node in op(user, graph).inputs]
        if len(ahead) != 1:
            raise CannotSlice("its gated heads are read in several places")
        before, node = node, ahead[0]
        what = op(node, graph)
        if what.kind == "linear" and node.op == "call_module":
            break
        if what.kind == "cat":
            parts = list(what.inputs)
            offset += sum(int(p.meta["val"].shape[-1]) for p in parts[: parts.index(before)])
        elif what.kind not in MOVES:
            raise CannotSlice(f"{node.name} lies between its heads and the output projection")
    features = np.arange(int(before.meta["val"].shape[-1]))
    head = (features - offset) // (own // total)
    mine = (features >= offset) & (features < offset + own)
    return str(node.target), features[~mine | np.isin(head, heads)]


def _rewrite_sizes(node: Node, fewer: Mapping[int, int]) -> None:
    """Replace the number of heads, and of their features, where the block's code wrote them into a shape."""

    def change(value: Any) -> Any:
        if isinstance(value, Node) and _is_width(value):
            return fewer.get(value.meta["val"], value)
        return fewer.get(value, value) if type(value) is int else value

    shaping = node.op == "call_method" and node.target in _SHAPING
    if shaping or (node.op == "call_function" and node.target in _ARITHMETIC):
        node.args = map_aggregate(node.args, change)
        node.kwargs = map_aggregate(node.kwargs, change)


def _is_width(node: Node) -> bool:
    """Whether a node asks for the last size of a value: a number of features, not of tokens or samples."""
    if node.op != "call_method" or node.target != "size" or len(node.args) < 2:
        return False
    asked = node.args[0]
    return isinstance(asked, Node) and node.args[1] in (-1, asked.meta["val"].ndim - 1)


def _narrowed(module: nn.Module, keep: np.ndarray[Any, Any], dim: int) -> nn.Linear:
    """Return a linear layer with some of the rows (dim 0) or columns (dim 1) of another."""
    if type(module) is not nn.Linear:
        raise CannotSlice(f"a projection is a {type(module).__name__}")
    index = torch.as_tensor(keep, device=module.weight.device)
    weight = module.weight.detach().index_select(dim, index)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        bias = module.bias.detach()
        made.bias = nn.Parameter(bias.index_select(0, index) if dim == 0 else bias, requires_grad=False)
    return made.eval()


def _set(block: nn.Module, path: str, child: nn.Module) -> None:
    """Put a child into the tree below ``block``, copying the modules on the way."""
    first, _, rest = path.partition(".")
    if not rest:
        block._modules[first] = child
        return
    owner = block._modules[first]
    assert owner is not None
    block._modules[first] = copied = changed_clone(owner, Change(""))
    _set(copied, rest, child)


def _compare(block: nn.Module, sliced: nn.Module, inputs: JSON) -> None:
    """Run both on random inputs.

    Raises:
        CannotSlice: they differ, or the sliced block does not run.
    """
    args, kwargs = random_call(block, inputs, seed=0)
    expected = _vector(block(*args, **kwargs))
    try:
        found = _vector(sliced(*args, **kwargs))
    except (RuntimeError, MoefxError) as error:
        raise CannotSlice(f"its code does not run with fewer heads: {str(error).splitlines()[0]}") from error
    scale = float(expected.abs().max())
    error_found = float((found - expected).abs().max()) / max(scale, 1e-30) if found.shape == expected.shape else 1.0
    if not error_found <= TOLERANCE:
        raise CannotSlice(f"with fewer heads it differs by {error_found:.1e}")


def _vector(output: Any) -> Tensor:
    """Return everything that was computed, as one vector."""
    return torch.cat(
        [leaf.detach().flatten().double() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    )
