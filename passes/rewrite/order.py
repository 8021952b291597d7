"""The order of passes follows from the facts they need and leave standing, and is never a comment."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from moefx.errors import PlanError
from moefx.passes.rewrite.base import Pass

# What the analyses of a dense model provide before any pass ran.
ANALYSED = frozenset({"ffn-sites", "attention-sites", "block-sites"})


def in_order(rules: Sequence[Pass]) -> list[Pass]:
    """Return the passes so that each runs while the facts it requires still hold; otherwise as given.

    A pass that does not preserve a fact invalidates it, so it runs after every pass that requires the fact.

    Raises:
        PlanError: two passes exclude each other, or a fact is provided by none; the message names fact and passes.
    """
    provided = ANALYSED.union(*(rule.provides for rule in rules))
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(rules)))
    for i, rule in enumerate(rules):
        for fact in sorted(rule.requires - provided):
            raise PlanError(f"order pass {rule.name!r}", found=f"nothing provides {fact!r}", do="add a pass that does")
        for j, other in enumerate(rules):
            if i != j and _invalidates(other, rule.requires):
                graph.add_edge(i, j)
            if i != j and rule.provides & (other.requires - ANALYSED):
                graph.add_edge(i, j)
    try:
        return [rules[i] for i in nx.lexicographical_topological_sort(graph)]
    except nx.NetworkXUnfeasible:
        cycle = [rules[i] for i, _ in nx.find_cycle(graph)]
        facts = sorted(fact for rule in cycle for other in cycle if rule is not other for fact in _broken(other, rule))
        raise PlanError(
            f"order passes {', '.join(rule.name for rule in rules)}",
            found=f"{' and '.join(rule.name for rule in cycle)} each end what the other needs: {', '.join(facts)}",
            do="apply one of them",
        ) from None


def _invalidates(rule: Pass, facts: frozenset[str]) -> bool:
    return bool(facts & (ANALYSED - rule.preserves))


def _broken(rule: Pass, needy: Pass) -> frozenset[str]:
    return needy.requires & (ANALYSED - rule.preserves)
