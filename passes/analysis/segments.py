"""Segments: consecutive blocks of one module's forward, each of which reads what the one before returned.

The module is captured with the blocks as single nodes; where a block's tokens enter and leave is known from the block
sites of the whole model, and is found again by the position of the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.graph import Graph, ModuleCall
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.tokens import Follow, NotByToken


@dataclass(frozen=True)
class Member:
    """One block of a segment: the node of its call, and its streams' nodes before and after, the tokens' first.

    The exit of a stream that nothing reads afterwards, such as the text behind the last block, is "". ``rows`` numbers
    the leaves of its arguments that have one row per sample; None where that is not known.
    """

    call: str
    entries: tuple[str, ...]
    exits: tuple[str, ...]
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SegmentLayout:
    """The blocks of a segment in order, and the arguments that have one entry per token."""

    members: tuple[Member, ...]
    follows: tuple[Follow, ...]

    @property
    def tables_are_shared(self) -> bool:
        """Whether all samples share a table by position, so that they must also share a choice of tokens."""
        return any(-follow.axes[0] == follow.ndim for follow in self.follows)


def segment_layout(
    local: Graph,
    blocks: Sequence[tuple[str, Site, ModuleCall, Mapping[Node, Follow]]],
    per_sample: set[Node] | None = None,
) -> SegmentLayout:
    """Return the layout of a segment in the graph ``local`` of the module that owns its blocks.

    Args:
        local: its children are single nodes.
        blocks: per block its path below the owner, its site and call in the whole model, and what follows its tokens:
            nodes of the whole model, with axes and joint order.
        per_sample: nodes of the whole model with one row per sample, where the caller knows of all arguments.

    Raises:
        NotByToken: a block is out of sight, or does not read what the one before returned.
    """
    members: list[Member] = []
    follows: list[Follow] = []
    for path, site, call, following in blocks:
        node = next((n for n in local.fx.nodes if n.op == "call_module" and n.target == path), None)
        if node is None:
            raise NotByToken(f"{path!r} is not called by the forward of the module around it")
        outer = pytree.tree_leaves((call.args, call.kwargs))
        inner = pytree.tree_leaves((list(node.args), dict(node.kwargs)))
        if len(outer) != len(inner):
            raise NotByToken(f"{path!r} is called otherwise when the module around it is captured alone")
        pairs = [(a, b) for a, b in zip(outer, inner, strict=True) if isinstance(a, Node) and isinstance(b, Node)]
        streams = sorted(site.operands["streams"], key=lambda pair: pair[1] is not site.output)
        entries = tuple(_find(pairs, entry, path).name for entry, _ in streams)
        exits = tuple(_exit(node, call, leaving, path, needed=leaving is site.output) for _, leaving in streams)
        if members and any(a != b for a, b in zip(members[-1].exits, entries, strict=False)):
            raise NotByToken(f"{path!r} does not read what the block before it returned")
        rows = None if per_sample is None else tuple(i for i, leaf in enumerate(outer) if leaf in per_sample)
        members.append(Member(node.name, entries, exits, rows))
        for leaf, item in following.items():
            found = _find(pairs, leaf, path)
            follows.append(Follow(found.name, node.name, item.axes, item.ndim, item.joint))
    return SegmentLayout(tuple(members), tuple(follows))


def _find(pairs: Sequence[tuple[Node, Node]], wanted: Node, path: str) -> Node:
    found = next((b for a, b in pairs if a is wanted), None)
    if found is None:
        raise NotByToken(f"{path!r} gets a stream as no argument of its own")
    return found


def _exit(node: Node, call: ModuleCall, leaving: Node, path: str, *, needed: bool) -> str:
    """Return the local node of what a block returns as ``leaving``; "" where nothing reads it."""
    output: Any = call.output
    if output is leaving:
        return node.name
    if isinstance(output, tuple | list):
        for i, leaf in enumerate(output):
            if leaf is leaving:
                found = [u for u in node.users if len(u.args) == 2 and u.args[0] is node and u.args[1] == i]
                if found or not needed:
                    return found[0].name if found else ""
    raise NotByToken(f"{path!r} returns its stream within something else")
