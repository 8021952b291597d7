"""A placement becomes graph: the routed experts of a captured model, as one rank of many runs them.

Between the sort by expert and the weighted sum of every layer stand nodes that map experts to slots, count, send rows
to their experts and bring them back, each exchange a launch and a wait. The experts themselves are the nodes that were
traced, whatever they compute, on the rows that arrive. Parameters keep their names: on the rank they hold its experts.

Legend: E experts, G ranks, K slots per token, r parts of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from moefx.graph import Graph
from moefx.graph.splice import is_inplace
from moefx.parallel.regions import find_regions
from moefx.parallel.roster import Roster
from moefx.parallel.steps import CopiedWeights
from moefx.parallel.ways import FROZEN, WAYS
from moefx.parallel.writer import Plan, Rank, RegionWriter
from moefx.passes.schedule import LayerCost, mark_of


def divide_experts(
    graph: Graph,
    paths: Sequence[str],
    rosters: Sequence[Roster],
    rank: Rank,
    plan: Plan,
    costs: Sequence[LayerCost] | None = None,
    copies: Mapping[str, CopiedWeights] | None = None,
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
        writer = RegionWriter(graph, region, rosters[i], rank, None if costs is None else costs[i], plan)
        weights = writer.weights(copies or {})
        writer.replace(WAYS[plan.way](writer, weights))
    if plan.way == FROZEN:
        _drop_routers(graph)
    graph.prune()
    graph.touch()


def _drop_routers(graph: Graph) -> None:
    """Erase what only decided where tokens go, statistics of it included; sizes were checked in the step before."""
    wanted = [graph.output_node, *(n for n in graph.nodes if _has_effect(n))]
    live: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in live:
            live.add(node)
            wanted += node.all_input_nodes
    graph.guards = [guard for guard in graph.guards if guard.node in live]
    for node in reversed(graph.nodes):
        if node not in live and node.op != "placeholder":
            graph.fx.erase_node(node)


def _has_effect(node: Node) -> bool:
    mark = mark_of(node)
    written = node.args[0] if is_inplace(node) else None
    statistic = isinstance(written, Node) and ".record." in f".{written.target}."
    return (written is not None and not statistic) or (mark is not None and mark.collective)
