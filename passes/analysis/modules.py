"""Which module invocation a region belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from moefx.graph.origin import ModuleCall
from moefx.passes.analysis.flow import Flow

_INERT = frozenset({"identity", "dropout", "size", "param", "split", "factory"})


@dataclass(frozen=True, eq=False)
class Place:
    """The smallest module invocation around a region; ``call`` is ``None`` for the traced module itself."""

    path: str
    call_index: int
    call: ModuleCall | None
    is_module: bool

    @property
    def name(self) -> str:
        """The module path, with ``#i`` for every call after the first."""
        return self.path if self.call_index == 0 else f"{self.path}#{self.call_index}"


class Modules:
    """The module invocations of one graph as a tree."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._chains: dict[Node, list[ModuleCall]] = {}
        for call in sorted(flow.graph.calls, key=lambda c: -len(c.nodes)):
            for node in call.nodes:
                self._chains.setdefault(node, []).append(call)

    def chain(self, node: Node) -> list[ModuleCall]:
        """Return the invocations around ``node``, outermost first."""
        return self._chains.get(node, [])

    def place(self, region: Iterable[Node], entries: Iterable[Node], output: Node) -> Place:
        """Return the smallest invocation around ``region``, and whether the region is all it does."""
        inside = set(region)
        real = [n for n in inside if self.flow.ops[n].kind not in ("param", "size")]
        chains = [self.chain(n) for n in real]
        common = chains[0] if chains else []
        for chain in chains[1:]:
            depth = next(
                (i for i, (a, b) in enumerate(zip(common, chain, strict=False)) if a is not b),
                min(len(common), len(chain)),
            )
            common = common[:depth]
        if not common:
            return Place("", 0, None, False)
        call = common[-1]
        return Place(call.path, call.index, call, self._is_all(call, inside, set(entries), output))

    def _is_all(self, call: ModuleCall, region: set[Node], entries: set[Node], output: Node) -> bool:
        within = set(call.nodes)
        rest = [n for n in call.nodes if n not in region]
        if any(self.flow.ops[n].kind not in _INERT for n in rest):
            return False
        outer = {s for n in call.nodes for s in self.flow.ops[n].inputs if s not in within and self._is_data(s)}
        if outer != {self._entry(e, within) for e in entries}:
            return False
        leaving = [n for n in call.nodes if self._is_data(n) and any(u not in within for u in n.users)]
        return all(self.flow.uncast(n) is output for n in leaving)

    def _is_data(self, node: Node) -> bool:
        return self.flow.ops[node].kind not in ("param", "size", "factory")

    def _entry(self, node: Node, within: set[Node]) -> Node:
        while node in within and self.flow.ops[node].kind in ("identity", "dropout"):
            node = self.flow.ops[node].inputs[0]
        return node
