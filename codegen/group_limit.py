"""Read what a sorted row is cut to, and a choice that is limited to the best groups of experts.

The limit is what `moefx.routing.select.group_limited_top_k` writes (DeepSeek-V3, arXiv 2412.19437): scores cut into
groups, the sum of each group's best, the best groups by that, and minus infinity for the experts of the others. It is
found from the choice upwards, by what each node computes.

Shapes: T tokens, G groups of S experts, E = G * S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moefx.codegen.calls import recorded
from moefx.codegen.reasons import CannotLower
from moefx.codegen.rows import Limit
from moefx.codegen.tail import called, same

Value = Callable[[Any], torch.Tensor]
_RESHAPES = frozenset({"reshape", "view", "flatten", "unflatten", "_unsafe_view"})
_NEGATIONS = frozenset({"invert", "bitwise_not", "logical_not", "__invert__"})


@dataclass(frozen=True)
class Limited:
    """The scores before the limit, the limit, and the nodes that compute it."""

    scores: fx.Node
    limit: Limit
    nodes: tuple[fx.Node, ...]


def limited(ranked: fx.Node, value: Value) -> Limited | None:
    """Return the limit that the ``ranked`` scores went through, or nothing if they went through none."""
    return _Reader(value).read(ranked)


@dataclass
class _Reader:
    value: Value
    nodes: list[fx.Node] = field(default_factory=list)

    def read(self, ranked: fx.Node) -> Limited | None:
        masked = self.up(ranked, _RESHAPES)
        parts, mask = self.masked(masked) if masked is not None else (None, None)
        scores = self.up(parts, _RESHAPES)
        widened = {"unsqueeze", *_NEGATIONS}
        eligible = self.up(self.up(mask, widened), widened)
        if scores is None or eligible is None or parts is None or called(eligible) != "scatter":
            return None
        # zeros.scatter(-1, kept, True)
        self.nodes += [eligible, *eligible.all_input_nodes[:1]]
        kept = self.best(eligible.args[2], "indices")
        summed = None if kept is None else self.up(kept[0], {"sum"})
        best = None if summed is None else self.best(summed, "values")
        if kept is None or best is None or best[0] is not parts:
            return None
        groups, members = self.value(parts).shape[-2:]
        if not same(self.value(ranked).shape, self.value(scores).shape) or not isinstance(members, int):
            return None
        return Limited(scores, Limit(int(groups), kept[1], best[1]), tuple(self.nodes))

    def up(self, node: Any, names: Any) -> fx.Node | None:
        """Return what a node of one of these calls reads, and note the node."""
        if not isinstance(node, fx.Node) or called(node) not in names or not node.all_input_nodes:
            return None
        self.nodes.append(node)
        return node.all_input_nodes[0]

    def masked(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """Return what is masked by minus infinity, and the mask."""
        if called(node) != "masked_fill" or node.args[2] != float("-inf"):
            return None, None
        self.nodes.append(node)
        parts, mask = node.all_input_nodes[:2]
        return parts, mask

    def best(self, node: Any, wanted: str) -> tuple[fx.Node, int] | None:
        """Return what was ranked along its last axis, and how many of its best were kept; all that a node holds."""
        if not isinstance(node, fx.Node):
            return None
        if called(node) == "argmax" and wanted == "indices":
            self.nodes.append(node)
            return node.all_input_nodes[0], 1
        count = self.value(node).shape[-1]
        while called(node) in ("getitem", "slice", "alias", "detach") and not _is_item(node):
            self.nodes.append(node)
            if first(node) is None and not same(self.value(node).shape, self.value(node.all_input_nodes[0]).shape):
                return None
            node = node.all_input_nodes[0]
        if not _is_item(node) or node.args[1] not in (wanted, ("values", "indices").index(wanted)):
            return None
        sort = node.all_input_nodes[0]
        axis = sort.kwargs.get("dim", sort.args[1] if len(sort.args) > 1 else -1)
        ranked = sort.all_input_nodes[0]
        if not sort.kwargs.get("descending", False) or axis not in (-1, self.value(ranked).dim() - 1):
            return None
        self.nodes += [node, sort, *(user for user in sort.users if not user.users)]
        return ranked, int(count)


def _is_item(node: fx.Node) -> bool:
    """Whether a node takes the values or the indices of a sort."""
    return called(node) in ("getitem", "getattr") and called(node.all_input_nodes[0]) == "sort"


def cut(node: fx.Node, between: list[fx.Node]) -> tuple[fx.Node, int]:
    """Return the slice of the first k of a sorted axis, which is all that is read of it; note what stands between."""
    start = node
    while len(node.users) == 1:
        user = next(iter(node.users))
        k = first(user)
        if k is not None:
            return user, k
        if called(user) not in ("slice", "alias"):
            break
        between.append(user)
        node = user
    made = node.meta.get("val")
    if node is not start and isinstance(made, torch.Tensor) and isinstance(made.shape[-1], int):
        return node, made.shape[-1]  # the first k of k
    raise CannotLower("lower a router", found=f"{node.name} is not cut to the first k")


def first(node: fx.Node) -> int | None:
    """Return k, if a node is ``x[..., :k]``."""
    arguments: Any = node.args
    if called(node) == "slice" and len(arguments) == 4:
        _, dim, start, stop = arguments
        made: Any = node.meta.get("val")
        if not isinstance(made, torch.Tensor) or dim not in (-1, made.dim() - 1) or not isinstance(stop, int):
            return None
        # A stop beyond the end cuts nothing.
        return stop if start in (None, 0) and same((stop,), made.shape[-1:]) else None
    if called(node) != "getitem" or not isinstance(arguments[1], tuple):
        return None
    *rest, last = arguments[1]
    whole = all(i is Ellipsis or i == slice(None) for i in rest)
    if not whole or not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):
        return None
    stop = recorded(last.stop) if isinstance(last.stop, fx.Node) else last.stop
    return stop if isinstance(stop, int) else None
