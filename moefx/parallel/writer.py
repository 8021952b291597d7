"""Writes the nodes of one layer of a divided graph: stamped, marked, priced.

Legend: G ranks, K slots per token, r parts of the tokens, L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from moefx.graph import Graph
from moefx.graph.origin import origin_of
from moefx.parallel import steps
from moefx.parallel.divided import slots_of
from moefx.parallel.exchange import arrive, launch, scale_gradient
from moefx.parallel.memory import Memory
from moefx.parallel.regions import GROUPED, Region
from moefx.parallel.roster import Roster
from moefx.passes.schedule import COMM, COMPUTE, LayerCost
from moefx.passes.schedule.mark import Mark, set_mark

RULE = "expert-parallel"
GROUP = torch.ops.moefx.group.default
COMBINE = torch.ops.moefx.combine.default


@dataclass(frozen=True)
class Rank:
    """Whose graph it is.

    Args:
        number: rank.
        group: name of the process group.
    """

    number: int
    group: str


@dataclass(frozen=True)
class Plan:
    """How tokens travel.

    Args:
        chunks: r.
        way: one of :data:`moefx.parallel.ways.WAYS`.
        caps: rows that may go to each rank at once, ``[L][G]``, for ways of fixed sizes.
        memories: what each layer remembers, for ways that go on from an earlier step.
    """

    chunks: int = 1
    way: str = "slots"
    caps: Sequence[Sequence[int]] = ()
    memories: Sequence[Memory] = ()


class RegionWriter:
    """Writes the nodes of one layer before the sum that they replace."""

    def __init__(
        self, graph: Graph, region: Region, roster: Roster, rank: Rank, cost: LayerCost | None, plan: Plan
    ) -> None:
        self.graph, self.region, self.roster, self.rank = graph, region, roster, rank
        self.cost, self.chunks = cost, plan.chunks
        self.caps = list(plan.caps[region.layer]) if plan.caps else []
        self.memory = plan.memories[region.layer] if plan.memories else Memory()
        self.written: list[Node] = []
        self.ranks = len(roster.homes)
        self.k = int(region.gates.meta["val"].shape[1])
        # Ranks that a token's experts are on, per slot, if all are as likely.
        self.share = self.ranks * (1 - (1 - 1 / self.ranks) ** self.k) / self.k if plan.way == "once" else 1.0
        self.bounds = self.attribute("slot_bounds")

    # -- nodes -----------------------------------------------------------------------------------------------------

    def call(self, function: Any, *args: Any, role: str = "map", chunk: int = 0, **mark: Any) -> Node:
        """Write a call, marked."""
        node = self.node("call_function", function, args)
        return set_mark(node, Mark(role, layer=self.region.layer, chunk=chunk, **mark))

    def node(self, op: str, target: Any, args: tuple[Any, ...] = ()) -> Node:
        """Write a node, stamped with where it comes from."""
        with self.graph.fx.inserting_before(self.region.combine):
            node = self.graph.fx.create_node(op, target, args)
        node.meta["moefx"] = origin_of(self.region.combine).stamped(RULE)
        self.written.append(node)
        return node

    def attribute(self, name: str) -> Node:
        """Write a read of a tensor of the module of experts."""
        return self.node("get_attr", f"{self.region.path}.{name}")

    def constant(self, name: str, value: Tensor) -> Node:
        """Write a read of a tensor that belongs to the graph."""
        self.graph.constants[name] = value
        return self.node("get_attr", name)

    def replace(self, y: Node) -> None:
        """Let ``y`` stand for the layer's experts, and erase what was traced of them."""
        region = self.region
        for weight in region.weights:
            for user in [u for u in weight.users if u not in region.body]:
                self._keep_size(user)
        region.combine.replace_all_uses_with(y)
        for node in (region.combine, *reversed(region.body), region.order, region.offsets, region.group):
            self.graph.fx.erase_node(node)

    def _keep_size(self, size: Node) -> None:
        """Make a number that was read off a whole stack of weights a constant: the stack will be another."""
        value = size.meta.get("val")
        assert isinstance(value, int | str | torch.dtype | torch.device), size
        for user in list(size.users):
            user.args, user.kwargs = (map_arg(tree, lambda n: value if n is size else n) for tree in _arguments(user))
        self.graph.guards = [guard for guard in self.graph.guards if guard.node is not size]
        self.graph.fx.erase_node(size)

    def first(self, function: Any) -> Node:
        """Return the first call of ``function`` that was written."""
        return next(node for node in self.written if node.target is function)

    def item(self, node: Node, *keys: int | str) -> Node:
        """Write reads of an item, without a mark: they are free."""
        for key in keys:
            node = self.node("call_function", operator.getitem, (node, key))
        return node

    def sent(self, role: str, chunk: int, rows: Any, leaving: Any, coming: Any, **mark: Any) -> tuple[Node, ...]:
        """Write the launch of an exchange, and return the arguments of its wait."""
        there = {"stream": COMM, "collective": True, "begins": True}
        flight = self.call(launch, rows, leaving, coming, self.rank.group, role=role, chunk=chunk, **there, **mark)
        return flight, leaving, coming

    def arrived(self, role: str, chunk: int, flight: tuple[Node, ...], **mark: Any) -> Node:
        """Write the wait."""
        return self.call(arrive, *flight, self.rank.group, role=role, chunk=chunk, waits=True, **mark)

    # -- costs -----------------------------------------------------------------------------------------------------

    def exchange_cost(self, back: bool = False) -> dict[str, Any]:
        """Return what one part's exchange costs."""
        if self.cost is None:
            return {}
        seconds = self.cost.combine_s if back else self.cost.dispatch_s
        found = {
            "seconds": self.cost.latency_s + self.share * seconds / self.chunks,
            "wire_bytes": self.share * self.cost.wire_bytes / self.chunks,
        }
        return found if back else found | {"holds_bytes": self.cost.buffer_bytes / self.chunks}

    def latency(self) -> dict[str, Any]:
        """Return what an exchange of a few numbers costs."""
        return {} if self.cost is None else {"seconds": self.cost.latency_s}

    def expert_cost(self, share: float) -> dict[str, Any]:
        """Return what one part's experts cost."""
        if self.cost is None:
            return {}
        part = share / self.chunks
        return {"seconds": part * self.cost.expert_s, "holds_bytes": part * self.cost.buffer_bytes}

    # -- the ways of tokens ----------------------------------------------------------------------------------------

    def weights(self, copies: Mapping[str, steps.CopiedWeights]) -> dict[Node, Node]:
        """Write what stands for each stacked parameter: this rank's rows and those of copies."""
        found: dict[Node, Node] = {}
        for own in self.region.weights:
            held = self.node("get_attr", own.target)
            if self.roster.has_copies:
                sender, name = copies[self.region.path], str(own.target).rpartition(".")[2]
                marks = {"role": "copies", **self.latency()}
                flight = self.call(
                    steps.begin_copies, sender, name, held, stream=COMM, collective=True, begins=True, **marks
                )
                held = self.call(steps.end_copies, sender, name, held, flight, role="copies", waits=True)
            share = self.call(scale_gradient, held, 1 / self.ranks, role="expert")
            found[own] = self.call(steps.some, share, role="expert")
        return found

    def parts(self, node: Node) -> list[Node]:
        """Write the parts of tokens."""
        if self.chunks == 1:
            return [node]
        return [self.call(steps.part_of, node, self.chunks, c, chunk=c) for c in range(self.chunks)]

    def slots(self) -> Node:
        """Write the map from experts to slots."""
        tables = self.attribute("slot_of_copy"), self.attribute("end_of_copy")
        return self.call(slots_of, self.region.experts, *tables)

    def experts(
        self,
        weights: dict[Node, Node],
        rows: Node,
        ids: Node,
        k: int,
        chunk: int,
        *,
        local: int | None = None,
        share: float = 1.0,
    ) -> tuple[Node, Node]:
        """Write the experts' own nodes over some rows; return what they make of them and the order of that.

        Args:
            weights: what stands for each stacked parameter.
            rows: ``[A, D]``.
            ids: of the experts among ``weights``, ``[A, k]``.
            k: experts per row.
            chunk: part of the tokens.
            local: number of experts; those of this rank by default.
            share: of what a part of the tokens costs.
        """
        region, local = self.region, local or max(self.roster.slots_per_rank[self.rank.number], 1)
        sort = self.call(GROUP, ids, local, role="expert", chunk=chunk)
        order, offsets = self.item(sort, 0), self.item(sort, 1)
        swap = weights | {region.x: rows, region.order: order, region.offsets: offsets}
        busiest = next(n for n in region.body if n.target is GROUPED)
        for node in region.body:
            with self.graph.fx.inserting_before(region.combine):
                made = self.graph.fx.node_copy(node, lambda n: swap.get(n, n))
            if node.target is GROUPED and node.args[3] is region.order:
                made.args = (*made.args[:5], k)
            made.meta["moefx"] = origin_of(node).stamped(RULE)
            made.meta.pop("val", None)
            price = self.expert_cost(share) if node is busiest else {}
            set_mark(made, Mark("expert", COMPUTE, layer=region.layer, chunk=chunk, **price))
            swap[node] = made
        last = region.combine.args[0]
        assert isinstance(last, Node)
        return swap[last], order

    def joined(self, sums: list[Node]) -> Node:
        """Write the parts of tokens as one, which has the shape of what it replaces."""
        y = sums[0] if len(sums) == 1 else self.call(steps.joined, sums, role="combine")
        y.meta["val"] = self.region.combine.meta["val"]
        return y


def _arguments(node: Node) -> tuple[Any, Any]:
    return node.args, node.kwargs
