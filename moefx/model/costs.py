"""What a plan costs: parameters, bytes and active FLOPs of the whole model, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from moefx.model.plan import Cost, SitePlan
from moefx.passes.analysis import Facts
from moefx.passes.analysis.site import Site


class Bill:
    """What sites cost in one forward of the example inputs, in FLOPs: a multiply-add counts two.

    Savings multiply: tokens that pass by a block skip what is left of its networks and attentions after those were
    rewritten.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.sites = {site.name: site for site in facts.sites}
        self.total = int(facts.costs.flops)
        self._regions = {site.name: frozenset(site.nodes) for site in facts.sites}
        self._blocks = [site for site in facts.sites if site.kind == "block"]

    def dense(self, name: str) -> int:
        """Return what a site costs as it is."""
        return int(self.facts.costs.of(self.sites[name].nodes).flops)

    def tokens(self, name: str) -> int:
        """Return how many tokens enter a site."""
        site = self.sites[name]
        value = site.operands.get("x", site.output).meta["val"]
        assert isinstance(value, torch.Tensor)
        return value.numel() // int(value.shape[int(site.shapes.get("axis", -1))])

    def change(self, plan: SitePlan) -> int:
        """Return what a rewrite adds to the cost of a site as long as every token runs; negative if it saves."""
        return 2 * (plan.active_after - plan.active_before) * self.tokens(plan.name) * plan.calls

    def around(self, name: str) -> list[str]:
        """Return the blocks that contain a site, itself left out."""
        region = self._regions[name]
        return [b.name for b in self._blocks if b.name != name and region <= self._regions[b.name]]

    def after(self, planned: Iterable[SitePlan]) -> float:
        """Return what the model costs with these rewrites."""
        sites = [plan for plan in planned if plan.kind != "model"]
        kept: dict[str, float] = {}
        for plan in sites:
            for block in self._skipped(plan):
                kept[block.name] = kept.get(block.name, 1.0) * (1 - plan.saved_fraction)
        cost = self.total - sum((1 - share) * self.dense(name) for name, share in kept.items())
        for plan in sites:
            cost += self.change(plan) * math.prod(kept.get(name, 1.0) for name in self.around(plan.name))
        return cost

    def _skipped(self, plan: SitePlan) -> Sequence[Site]:
        """Return the blocks of which a rewrite saves a part."""
        if not plan.saved_fraction:
            return ()
        if plan.span == 1:
            return (self.sites[plan.name],)
        layers = range(plan.layer, plan.layer + plan.span)
        main = [b for b in self._blocks if b.role == "main" and not b.dead]
        return [b for b in main if b.operands["layer"] in layers]


def total_cost(facts: Facts, planned: Sequence[SitePlan]) -> Cost:
    """Return parameters, bytes and FLOPs of the whole model, before and after."""
    bill, root = Bill(facts), facts.graph.root
    parameters = {id(p): p for p in root.parameters()}.values()
    before = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    width = max((p.element_size() for p in parameters), default=4)
    grown = sum(s.parameters_after - s.parameters_before for s in planned)
    return Cost(
        parameters_before=before,
        parameters_after=before + grown,
        bytes_before=size,
        bytes_after=size + grown * width,
        flops_before=bill.total,
        flops_after=max(1, round(bill.after(planned))),
    )
