"""Analyses: pure functions from a graph to facts, found by data flow, cached per version of the graph."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from moefx.passes.analysis.attention import Stream, find_attentions
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.ffn import find_ffns
from moefx.passes.analysis.pointwise import Activation
from moefx.passes.analysis.site import Match, Miss, Site, Weight

if TYPE_CHECKING:
    from moefx.graph import Graph

__all__ = ["Activation", "Facts", "Match", "Miss", "Site", "Stream", "Weight", "analyse", "misses", "sites"]


class Facts:
    """Everything the analyses know about one version of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.context = Context(graph)

    @cached_property
    def attempts(self) -> list[Match | Miss]:
        """Every match and near miss."""
        return [*find_ffns(self.context), *find_attentions(self.context)]

    @cached_property
    def sites(self) -> list[Site]:
        """All sites, in program order of their outputs."""
        order = self.context.flow.index
        return sorted((a.site for a in self.attempts if isinstance(a, Match)), key=lambda s: (order[s.output], s.kind))

    @cached_property
    def misses(self) -> list[Miss]:
        """All near misses, in program order."""
        return sorted((a for a in self.attempts if isinstance(a, Miss)), key=lambda m: self.context.flow.index[m.node])


def analyse(graph: Graph) -> Facts:
    """Return the facts of ``graph``, computed once per version of it."""
    key = f"analysis@{graph.version}"
    if key not in graph.facts:
        graph.facts[key] = Facts(graph)
    found = graph.facts[key]
    assert isinstance(found, Facts)
    return found


def sites(graph: Graph) -> list[Site]:
    """Return every site of ``graph`` in program order."""
    return analyse(graph).sites


def misses(graph: Graph) -> list[Miss]:
    """Return what almost was a site, with the first condition that failed."""
    return analyse(graph).misses
