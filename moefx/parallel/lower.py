"""A placement becomes graph: the routed experts of a captured model, as one rank of many runs them.

Between the sort by expert and the weighted sum of every layer stand nodes that map experts to slots, count, send rows
to their experts and bring them back, each exchange a launch and a wait. The experts themselves are the nodes that were
traced, whatever they compute, on the rows that arrive. Parameters keep their names: on the rank they hold its experts.

Legend: E experts, G ranks, K slots per token, r parts of the tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moefx.graph import Graph
from moefx.graph.origin import origin_of
from moefx.parallel import steps
from moefx.parallel.exchange import arrive, launch, scale_gradient
from moefx.parallel.regions import GROUPED, Region, find_regions
from moefx.parallel.roster import Roster
from moefx.passes.schedule import COMM, COMPUTE, LayerCost
from moefx.passes.schedule.mark import Mark, set_mark

RULE = "expert-parallel"
_GROUP = torch.ops.moefx.group.default
_COMBINE = torch.ops.moefx.combine.default


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
        once: a token is sent to each rank once.
    """

    chunks: int = 1
    once: bool = False


def divide_experts(
    graph: Graph,
    paths: Sequence[str],
    rosters: Sequence[Roster],
    rank: Rank,
    plan: Plan,
    costs: Sequence[LayerCost] | None = None,
    copies: Mapping[str, steps.CopiedWeights] | None = None,
) -> None:
    """Rewrite the routed experts of a graph for one rank, in place.

    Args:
        graph: of the whole model, traced with ``leaf="torch"``.
        paths: of the modules of experts, by layer.
        rosters: who holds what, by layer.
        rank: whose graph it becomes.
        plan: how tokens travel.
        costs: of each layer; nothing costs anything without.
        copies: who sends weights to copies, by path; needed where a roster has copies.

    Raises:
        PlanError: the graph does not run each layer's experts once, or in a form that is not understood.
    """
    for i, region in enumerate(find_regions(graph, paths)):
        writer = _Writer(graph, region, rosters[i], rank, None if costs is None else costs[i], plan)
        weights = writer.weights(copies or {})
        y = (writer.once if plan.once else writer.by_slot)(weights)
        region.combine.replace_all_uses_with(y)
        for node in (region.combine, *reversed(region.body), region.order, region.offsets, region.group):
            graph.fx.erase_node(node)
    graph.prune()
    graph.touch()


class _Writer:
    """Writes the nodes of one layer before the sum that they replace."""

    def __init__(
        self, graph: Graph, region: Region, roster: Roster, rank: Rank, cost: LayerCost | None, plan: Plan
    ) -> None:
        self.graph, self.region, self.roster, self.rank = graph, region, roster, rank
        self.cost, self.chunks = cost, plan.chunks
        self.ranks = len(roster.homes)
        self.k = int(region.gates.meta["val"].shape[1])
        # Ranks that a token's experts are on, per slot, if all are as likely.
        self.share = self.ranks * (1 - (1 - 1 / self.ranks) ** self.k) / self.k if plan.once else 1.0
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
        return node

    def attribute(self, name: str) -> Node:
        """Write a read of a tensor of the module of experts."""
        return self.node("get_attr", f"{self.region.path}.{name}")

    def item(self, node: Node, *keys: int) -> Node:
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

    def expert_cost(self) -> dict[str, Any]:
        """Return what one part's experts cost."""
        if self.cost is None:
            return {}
        return {"seconds": self.cost.expert_s / self.chunks, "holds_bytes": self.cost.buffer_bytes / self.chunks}

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
        return self.call(steps.slots_of, self.region.experts, *tables)

    def sizes(self, offsets: list[Node], per_rank: list[int], bounds: Node | None) -> tuple[Node, Node]:
        """Write the exchange of counts; return what arrived, and the splits of all parts."""
        mine = per_rank[self.rank.number] * self.chunks
        counts = self.call(steps.counts_of, offsets, role="count")
        leaving, coming = [n * self.chunks for n in per_rank], [mine] * self.ranks
        flight = self.sent("count", 0, counts, leaving, coming, **self.latency())
        arrived = self.arrived("count", 0, flight)
        return arrived, self.call(steps.splits_of, offsets, arrived, bounds, role="count")

    def by_slot(self, weights: dict[Node, Node]) -> Node:
        """Write: a row for each chosen expert travels there and back."""
        per_rank, region = self.roster.slots_per_rank, self.region
        xs, slots, gates = (self.parts(n) for n in (region.x, self.slots(), region.gates))
        sorts = [self.call(_GROUP, s, sum(per_rank), chunk=c) for c, s in enumerate(slots)]
        orders, offsets = [self.item(s, 0) for s in sorts], [self.item(s, 1) for s in sorts]
        arrived, sizes = self.sizes(offsets, per_rank, self.bounds)
        flights = []
        for c, (x, order) in enumerate(zip(xs, orders, strict=True)):
            leaving, coming = self.item(sizes, 0, c), self.item(sizes, 1, c)
            rows = self.call(steps.leaving_rows, x, order, self.k, leaving, chunk=c)
            flights.append(self.sent("dispatch", c, rows, leaving, coming, **self.exchange_cost()))
        returns = []
        for c, flight in enumerate(flights):
            rows = self.arrived("dispatch", c, flight)
            ids = self.call(steps.local_slots, arrived, self.ranks, self.chunks, c, flight[2], chunk=c)
            done, order = self.experts(weights, rows, ids, 1, c)
            done = self.call(steps.in_order_of_arrival, done, order, role="expert", chunk=c)
            returns.append(self.sent("combine", c, done, flight[2], flight[1], **self.exchange_cost(back=True)))
        sums = []
        for c, (flight, order, part) in enumerate(zip(returns, orders, gates, strict=True)):
            back = self.arrived("combine", c, flight)
            sums.append(self.call(steps.at_home, back, order, part, role="combine", chunk=c))
        return self.joined(sums)

    def once(self, weights: dict[Node, Node]) -> Node:
        """Write: a token travels to each rank once, with its slots and gates there, and one sum comes back."""
        region = self.region
        xs, slots, gates = (self.parts(n) for n in (region.x, self.slots(), region.gates))
        pairs = [self.call(steps.pairs_of, s, self.bounds, chunk=c) for c, s in enumerate(slots)]
        _, sizes = self.sizes([self.item(p, 2) for p in pairs], [1] * self.ranks, None)
        flights = []
        for c, (x, gate, pair) in enumerate(zip(xs, gates, pairs, strict=True)):
            leaving, coming, token = self.item(sizes, 0, c), self.item(sizes, 1, c), self.item(pair, 0)
            rows = self.call(torch.index_select, x, 0, token, chunk=c)
            g = self.call(steps.gates_of, gate, token, self.item(pair, 1), chunk=c)
            sent = [(rows, self.exchange_cost()), (self.item(pair, 1), self.latency()), (g, self.latency())]
            flights.append([self.sent("dispatch", c, what, leaving, coming, **price) for what, price in sent])
        returns = []
        for c, three in enumerate(flights):
            rows, ids, gate = (self.arrived("dispatch", c, one) for one in three)
            done, order = self.experts(weights, rows, self.call(steps.as_ids, ids, chunk=c), self.k, c)
            summed = self.call(_COMBINE, done, order, gate, role="expert", chunk=c)
            _, leaving, coming = three[0]
            returns.append(self.sent("combine", c, summed, coming, leaving, **self.exchange_cost(back=True)))
        sums = []
        for c, (flight, pair, x) in enumerate(zip(returns, pairs, xs, strict=True)):
            back = self.arrived("combine", c, flight)
            sums.append(self.call(steps.sum_by_rank, back, self.item(pair, 0), flight[2], x, role="combine", chunk=c))
        return self.joined(sums)

    def experts(self, weights: dict[Node, Node], rows: Node, ids: Node, k: int, chunk: int) -> tuple[Node, Node]:
        """Write the experts' own nodes over the rows that arrived; return their rows and the order of these."""
        region, local = self.region, max(self.roster.slots_per_rank[self.rank.number], 1)
        sort = self.call(_GROUP, ids, local, role="expert", chunk=chunk)
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
            price = self.expert_cost() if node is busiest else {}
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
