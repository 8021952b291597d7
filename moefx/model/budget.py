"""A target for active FLOPs: which sites are routed, and how far, so that the expected loss is least.

Every site has a few candidates, from dense to its smallest, each with its FLOPs and, from the calibration, with what it
is expected to lose. Sites inside a block that tokens pass by are chosen together with it, since what they cost and
lose is that of the tokens that run: such a unit's candidates are the combinations that no other beats in both. One
candidate of each unit is chosen by an integer programme (HiGHS).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from moefx.errors import InputError, NothingMatched, PlanError
from moefx.model.costs import Bill, total_cost
from moefx.model.expected import Expectation, beyond, check_weights_known
from moefx.model.plan import Plan, SitePlan, SkippedSite, taken_apart
from moefx.passes.analysis import Facts
from moefx.passes.calibration import Calibration
from moefx.passes.rewrite.base import Pass


@dataclass(frozen=True)
class Candidate:
    """One way to keep some sites: the plans of those that are routed, what FLOPs that adds, and what is lost.

    ``running`` is the share of the tokens that stay in a block which the others pass by.
    """

    plans: tuple[SitePlan, ...]
    flops: float
    loss: float
    running: float = 1.0


DENSE = Candidate((), 0.0, 0.0)


def within_budget(
    facts: Facts, plan: Plan, rules: Sequence[Pass], budget: float, calibration: Calibration | None
) -> Plan:
    """Return ``plan`` with as many sites, each routed as far, as brings the model to ``budget`` at the least loss.

    Args:
        facts: of the dense model.
        plan: of every site, the widest choice.
        rules: its passes; sites of those without a ratio to choose stay as they are planned.
        budget: active FLOPs of the model over those of the dense one.
        calibration: of the model.

    Raises:
        InputError: no calibration, or a budget that is no share.
        PlanError: no pass has a ratio to choose, or even the smallest choices cost more.
    """
    asked = f"plan {plan.model} for {budget:g} of its active FLOPs"
    if not 0 < budget <= 1:
        raise InputError(asked, found="no share", do="give a number above 0, at most 1")
    if all(rule.unit is None for rule in rules):
        found = f"the passes {', '.join(r.name for r in rules)}, whose ratios no calibration chooses"
        do = "use recipes that split networks or route heads or tokens: moefx-split, mixture-of-heads, mod"
        raise PlanError(asked, found=found, do=do)
    units = _Units(facts, plan, rules, check_weights_known(asked, facts.graph, calibration))
    choices = [units.candidates(outer, inner) for outer, inner in units.groups(plan.sites)]
    base = units.bill.total
    chosen = _choose(choices, budget * base - base)
    if chosen is None:
        least = 1 + sum(min(c.flops for c in found) for found in choices) / base
        raise PlanError(
            asked,
            found=f"with every site at its smallest the model keeps {least:.3f}",
            do="raise the budget, or compose further recipes, of heads or tokens (moefx recipes)",
        )
    kept = {made.name + made.rule: made for c in chosen for made in c.plans}
    if not kept:
        raise NothingMatched(asked, found="the dense model fits it", do="lower the budget")
    sites = [kept[s.name + s.rule] for s in plan.sites if s.name + s.rule in kept]
    reason = f"the budget of {budget:g} is best met with it dense"
    dense = [s for s in plan.sites if s.name + s.rule not in kept]
    left = [SkippedSite(name=s.name, kind=s.kind, rule=s.rule, reason=reason) for s in dense]
    warnings = (*plan.warnings, *units.expectation.warnings())
    expected = {"cost": total_cost(facts, sites), "expected_loss": sum(c.loss for c in chosen)}
    changed = {"sites": tuple(sites), "skipped": (*plan.skipped, *left), "warnings": warnings}
    return plan.model_copy(update=changed | expected)


class _Units:
    """The candidates of a plan's sites, in units that are chosen together."""

    def __init__(self, facts: Facts, plan: Plan, rules: Sequence[Pass], calibration: Calibration) -> None:
        self.rules = {rule.name: rule for rule in rules}
        self.bill = Bill(facts)
        self.expectation = Expectation(facts.graph, self.bill, calibration)

    def groups(self, planned: Iterable[SitePlan]) -> list[tuple[SitePlan | None, list[SitePlan]]]:
        """Return the units: a block that tokens pass by with the sites inside it, or a site alone."""
        planned = list(planned)
        blocks = {s.name: s for s in planned if self.rules[s.rule].unit == "tokens"}
        found: dict[str, tuple[SitePlan | None, list[SitePlan]]] = {name: (s, []) for name, s in blocks.items()}
        for site in planned:
            if site.name in blocks and blocks[site.name] is site:
                continue
            around = next((name for name in self.bill.around(site.name) if name in blocks), None)
            if around is None:
                found[f"{site.name} {site.rule}"] = (None, [site])
            else:
                found[around][1].append(site)
        return list(found.values())

    def candidates(self, outer: SitePlan | None, inner: Sequence[SitePlan]) -> list[Candidate]:
        """Return the choices of one unit that no other beats in both FLOPs and loss.

        A site that the rewrite of the block would take apart is routed, or the block is, but not both.
        """
        found = self._together(inner)
        if outer is None:
            return found
        free = [site for site in inner if not taken_apart(outer, site)]
        inside = found if len(free) == len(inner) else self._together(free)
        return best([*found, *(_passed_by(c, b) for c in inside for b in self._of_site(outer) if b.plans)])

    def _together(self, sites: Sequence[SitePlan]) -> list[Candidate]:
        found = [DENSE]
        for site in sites:
            found = best([_both(a, b) for a in found for b in self._of_site(site)])
        return found

    def _of_site(self, site: SitePlan) -> list[Candidate]:
        """Return the choices of one site by itself."""
        rule, region = self.rules[site.rule], self.bill.sites[site.name]
        ratios = rule.ratios(region)
        if not ratios:
            return [Candidate((site,), self._flops(site), 0.0)]
        losses = self.expectation.losses(rule, region)
        found = [DENSE]
        width = sum(tap.width for tap in site.taps if tap.rank > 1)
        for ratio in ratios:
            options = dict(ratio.options)
            costs = type(rule)(**rule.options.model_dump() | options).costs(region, width)
            made = site.model_copy(
                update={
                    "options": options,
                    "parameters_after": costs.parameters_after,
                    "active_after": costs.active_after,
                    "saved_fraction": costs.saved_fraction,
                }
            )
            running = ratio.kept if rule.unit == "tokens" else 1.0
            found.append(Candidate((made,), self._flops(made), beyond(losses, ratio.kept), running))
        return found

    def _flops(self, plan: SitePlan) -> float:
        return self.bill.after([plan]) - self.bill.total


def _passed_by(inside: Candidate, block: Candidate) -> Candidate:
    """Return a block with what is inside it: the tokens that pass by neither cost anything there nor lose it."""
    costing = 1 - block.plans[0].saved_fraction
    loss = block.loss + block.running * inside.loss
    return Candidate((*block.plans, *inside.plans), block.flops + costing * inside.flops, loss)


def _both(one: Candidate, two: Candidate) -> Candidate:
    return Candidate((*one.plans, *two.plans), one.flops + two.flops, one.loss + two.loss)


def best(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other beats in both FLOPs and loss, the cheapest last."""
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.loss, c.flops)):
        if not kept or candidate.flops < kept[-1].flops:
            kept.append(candidate)
    return kept


def _choose(choices: list[list[Candidate]], target: float) -> list[Candidate] | None:
    """Return one candidate of each list: FLOPs at most ``target`` in all, loss least; None if that cannot be."""
    flat = [candidate for found in choices for candidate in found]
    one_each = np.zeros((len(choices), len(flat)))
    at = 0
    for i, found in enumerate(choices):
        one_each[i, at : at + len(found)] = 1
        at += len(found)
    scale = max(1.0, abs(target))
    rows: list[Any] = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.array([[c.flops / scale for c in flat]]), -np.inf, target / scale),
    ]
    losses = np.array([c.loss for c in flat])
    losses = losses / max(float(losses.max()), 1e-300)
    done = milp(losses, constraints=rows, bounds=Bounds(0, 1), integrality=np.ones(len(flat)))
    if not done.success:
        return None
    return [c for c, taken in zip(flat, done.x, strict=True) if taken > 0.5]
