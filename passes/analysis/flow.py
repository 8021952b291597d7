"""Data flow of a graph: order, normalised operations, ancestors, liveness, aliasing writes.

Everything here is linear in the number of nodes; ancestor sets are Python integers used as bit sets.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch.fx import Node

from moefx.graph.kinds import MOVES, Op, carries_data, op

if TYPE_CHECKING:
    from moefx.graph import Graph


class Flow:
    """Facts about one version of a graph.

    ``index`` is the position of each node; ``sources(n)`` are the nodes whose data ``n`` reads. A size is not data: a
    reshape to ``x.shape[1]`` does not make its result depend on ``x``.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = list(graph.fx.nodes)
        self.index: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self.ops: dict[Node, Op] = {node: op(node, graph) for node in self.nodes}
        self._written: dict[Node, list[Node]] = {}
        self.stale: set[Node] = set()
        self._find_writes()

    @property
    def output(self) -> Node:
        """The node that returns."""
        return self.nodes[-1]

    def sources(self, node: Node) -> tuple[Node, ...]:
        """Return the nodes whose data ``node`` reads, in-place writes to them included."""
        read = self.ops[node].inputs
        if not self._written:
            return read
        return (*read, *(w for n in read for w in self.writes(n) if self.index[w] < self.index[node]))

    def writes(self, node: Node) -> list[Node]:
        """Return the in-place writes that readers of ``node`` see although they are not written as its users."""
        return self._written.get(self._root(node), []) if self._written else []

    @cached_property
    def readers(self) -> dict[Node, list[Node]]:
        """The inverse of :meth:`sources`, in program order."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in dict.fromkeys(self.sources(node)):
                found[source].append(node)
        return found

    @cached_property
    def ancestors(self) -> list[int]:
        """Per node, the bit set of the nodes it depends on, itself included."""
        sets: list[int] = []
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for source in self.sources(node):
                bits |= sets[self.index[source]]
            sets.append(bits)
        return sets

    def depends(self, node: Node, on: Node) -> bool:
        """Whether data of ``on`` reaches ``node``."""
        return bool(self.ancestors[self.index[node]] >> self.index[on] & 1)

    @cached_property
    def placeholders(self) -> tuple[Node, ...]:
        """The tensor inputs of the model, parameters excluded."""
        return tuple(n for n in self.nodes if self.ops[n].kind == "input" and carries_data(n))

    @cached_property
    def live(self) -> int:
        """Bit set of the nodes whose data reaches what the model returns."""
        return self.ancestors[self.index[self.output]]

    def is_live(self, node: Node) -> bool:
        """Whether data of ``node`` reaches what the model returns."""
        return bool(self.live >> self.index[node] & 1)

    def unmoved(self, node: Node) -> Node:
        """Return the value that ``node`` is a reshape, cast or slice of."""
        while self.ops[node].kind in MOVES or self.ops[node].kind == "dropout":
            node = self.ops[node].inputs[0]
        return node

    def uncast(self, node: Node) -> Node:
        """Return the value that ``node`` is a cast or copy of, same shape."""
        while self.ops[node].kind in ("identity", "dropout"):
            node = self.ops[node].inputs[0]
        return node

    # -- in-place writes -----------------------------------------------------------------------------------------------

    def _root(self, node: Node) -> Node:
        while True:
            what = self.ops[node]
            shared = (what.kind in MOVES and what.name != "clone") or what.in_place or what.kind == "setitem"
            if not shared or not what.inputs:
                return node
            node = what.inputs[0]

    def _find_writes(self) -> None:
        """Record what is overwritten, and the nodes that read an overwritten value through its old name."""
        writers = [
            n for n in self.nodes if (self.ops[n].in_place or self.ops[n].kind == "setitem") and self.ops[n].inputs
        ]
        if not writers:
            return
        aliases: dict[Node, list[Node]] = {}
        for node in self.nodes:
            aliases.setdefault(self._root(node), []).append(node)
        for writer in writers:
            root, when = self._root(writer), self.index[writer]
            renamed = self._derived(writer, aliases[root])
            late = [
                user
                for alias in aliases[root]
                if alias not in renamed
                for user in alias.users
                if self.index[user] > when and user not in renamed and carries_data(user)
            ]
            if late:
                self._written.setdefault(root, []).append(writer)
                self.stale.update(late)

    def _derived(self, writer: Node, aliases: list[Node]) -> set[Node]:
        """Return the aliases that are named after the write: reading those sees the new value."""
        found = {writer}
        for node in aliases:
            if self.ops[node].inputs and self.ops[node].inputs[0] in found:
                found.add(node)
        return found
