"""Find routed regions in a graph and say which kernels compute them, or why none do.

What is found: regions of grouped projections (`moefx.codegen.regions`), those whose experts chose their tokens
(`moefx.codegen.choice_lowering`), routers and groupings (`moefx.codegen.router_lowering`), attention of routed heads,
and tokens that are taken out and put back; all by data flow alone, in traced, exported and dynamo graphs.
`moefx.codegen.replacing` puts their kernels into the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moefx.codegen.calls import Values, calls, dialect_op, site_of
from moefx.codegen.choice_lowering import ChoiceLowering, lower_choice
from moefx.codegen.findings import Found, Lowering, Refusal, anchor_of, describe
from moefx.codegen.reasons import CannotLower
from moefx.codegen.regions import RegionFinder
from moefx.codegen.replacing import replace
from moefx.codegen.router_lowering import RouterLowering, feeds_routing, is_choice, lower_group, lower_router
from moefx.codegen.token_lowering import is_tokens, lower_tokens
from moefx.codegen.unlowered import given_experts, silent_layers

if TYPE_CHECKING:
    from moefx.codegen.attention import HeadLowering

__all__ = ["Found", "Lowering", "Refusal", "describe", "lowerings", "replace"]


def lowerings(graph: Any) -> list[Found]:
    """Return every routed region, attention of routed heads, gather and scatter of tokens, in execution order.

    In a traced model, which knows its modules, routed layers without any of these follow with a reason.  ``graph`` is a
    :class:`torch.fx.GraphModule` (dynamo, export) or a traced graph with ``fx`` and ``root``.
    """
    is_module = isinstance(graph, fx.GraphModule)
    nodes, root = (graph.graph, graph) if is_module else (graph.fx, graph.root)
    found = _Finder(nodes, root).find()
    return found if is_module else [*found, *silent_layers(nodes, root, found)]


class _Finder:
    def __init__(self, graph: fx.Graph, root: torch.nn.Module) -> None:
        self.graph, self.root, self.value = graph, root, Values(root)
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.regions = RegionFinder(graph, self.value)

    def find(self) -> list[Found]:
        found = self.choices()
        inside = {node for item in found if isinstance(item, ChoiceLowering) for node in item.nodes}
        for node in self.graph.nodes:
            if node in inside:
                continue
            try:
                one = self.at(node)
            except CannotLower as error:
                kind = "grouping" if calls(node, "group") else "region"
                one = Refusal(site_of(node), node, error.found or error.asked, kind)
            found += [] if one is None else [one]
        found += [item for node in self.graph.nodes if is_choice(node) for item in self.router(node)]
        for node in self.graph.nodes:
            given = given_experts(node) if calls(node, "group") else None
            found += [] if given is None else [Refusal(site_of(node), node, given, "router")]
        return sorted(found, key=lambda item: self.position[anchor_of(item)])

    def choices(self) -> list[Found]:
        """Return the FFNs whose experts chose their tokens, first: other kernels would take parts of them."""
        found: list[Found] = []
        for node in self.graph.nodes:
            if calls(node, "scatter"):
                try:
                    found.append(lower_choice(node, self.value))
                except CannotLower as error:
                    found.append(Refusal(site_of(node), node, error.found or error.asked))
        return found

    def at(self, node: fx.Node) -> Found | None:
        """Return what begins, or is decided, at a node."""
        if calls(node, "head_attention"):
            return self.heads(node)
        if is_tokens(node, self.value):
            return lower_tokens(site_of(node), node, self.value, self.root)
        if calls(node, "group"):
            return lower_group(node, site_of(node))
        if dialect_op(node) == "grouped_linear" and node not in self.regions.taken:
            return self.regions.region(node)
        return None

    def router(self, node: fx.Node) -> list[RouterLowering | Refusal]:
        """Return the router that ends in a choice, why there is none, or nothing if it is no router."""
        try:
            return [lower_router(node, self.value, site_of(node), self.root)]
        except CannotLower as error:
            fed = feeds_routing(node)
            tokens = f"{node.name} ranks tokens against each other; a router's kernel holds the experts of one token"
            why = tokens if fed == "tokens" else error.found or error.asked
            return [Refusal(site_of(node), node, why, "router")] if fed else []

    def heads(self, node: fx.Node) -> HeadLowering:
        """Return the kernels of one attention of routed heads."""
        from moefx.codegen.attention import lower_heads

        q = self.value(node.args[0] if node.args else node.kwargs["q"])
        return lower_heads(site_of(node), node, q)
