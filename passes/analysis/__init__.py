"""Analyses: pure functions from a graph to facts, found by data flow, cached per version of the graph."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch.fx import Node

from moefx.passes.analysis.attention import Stream, find_attentions
from moefx.passes.analysis.blocks import find_blocks
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.cost import Costs, NodeCost, cost
from moefx.passes.analysis.ffn import find_ffns
from moefx.passes.analysis.modulation import Modulation, Tap, conditioning, modulation, timestep_taps
from moefx.passes.analysis.pointwise import Activation
from moefx.passes.analysis.site import Match, Miss, Site, Weight

if TYPE_CHECKING:
    from moefx.graph import Graph

__all__ = [
    "Activation",
    "Costs",
    "Facts",
    "Match",
    "Miss",
    "Modulation",
    "NodeCost",
    "Site",
    "Stream",
    "Tap",
    "Weight",
    "analyse",
    "conditioning",
    "cost",
    "misses",
    "modulation",
    "sites",
    "timestep_taps",
]


_KINDS = ("ffn", "attention", "block")


class Facts:
    """Everything the analyses know about one version of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.context = Context(graph)

    @cached_property
    def attempts(self) -> list[Match | Miss]:
        """Every match and near miss."""
        return [*find_ffns(self.context), *find_attentions(self.context)]

    def taps(self, before: Node | None = None) -> list[Tap]:
        """Return where the timestep can be read before a node; see :func:`timestep_taps`."""
        return timestep_taps(self.context, before)

    def modulation(self, site: Site) -> Modulation:
        """Return the shift, scale and gate of a site."""
        return modulation(self.context, site)

    @cached_property
    def costs(self) -> Costs:
        """Floating point operations, bytes and parameters per node."""
        return Costs(self.context.flow)

    @cached_property
    def sites(self) -> list[Site]:
        """All sites, in program order of their outputs."""
        order = self.context.flow.index
        layers = [a.site for a in self.attempts if isinstance(a, Match)]
        blocks = [a.site for a in find_blocks(self.context, layers)]
        return sorted([*layers, *blocks], key=lambda s: (order[s.output], _KINDS.index(s.kind)))

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
