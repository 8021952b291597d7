"""A target for active FLOPs: which networks are split how far, so that the expected loss is least.

Every network has a few candidates, from dense to its smallest, each with its FLOPs and, from the calibration, with what
it is expected to lose. One of each is chosen by an integer programme (HiGHS).

What is expected to be lost is what the least important neurons contribute, as many as do not run: the share of the
output's energy that varies with them, or with gradients in the calibration what they matter to the loss. A router that
foresees which slices a token needs loses less; the order of networks and of ratios is what the choice needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from moefx.errors import InputError, NothingMatched, PlanError
from moefx.graph import Graph
from moefx.model.plan import Cost, Plan, SitePlan, SkippedSite
from moefx.passes.analysis import analyse
from moefx.passes.analysis.site import Site
from moefx.passes.calibration import Calibration
from moefx.passes.rewrite._slicing import Slicing
from moefx.passes.rewrite.base import Pass
from moefx.passes.rewrite.dense import dense_weights, hidden_function
from moefx.passes.rewrite.split import Split

CANDIDATES = 8


@dataclass(frozen=True)
class Candidate:
    """One way to keep a network: its plan (None: dense), FLOPs per forward, and what is expected to be lost."""

    plan: SitePlan | None
    flops: float
    loss: float


def within_budget(
    graph: Graph,
    plan: Plan,
    rules: Sequence[Pass],
    budget: float,
    calibration: Calibration | None,
    cost: Callable[[list[SitePlan]], Cost],
) -> Plan:
    """Return ``plan`` with as many sites, each split as far, as brings the model to ``budget`` at the least loss.

    Args:
        graph: of the dense model.
        plan: of a split of every network, the widest choice.
        rules: its passes.
        budget: active FLOPs of the model over those of the dense one.
        calibration: of the model.
        cost: the totals of a list of site plans.

    Raises:
        InputError: no calibration, or a budget that is no share.
        PlanError: the passes are no splits, or even the smallest choices cost more.
    """
    asked = f"plan {plan.model} for {budget:g} of its active FLOPs"
    if not 0 < budget <= 1:
        raise InputError(asked, found="no share", do="give a number above 0, at most 1")
    rule = next((r for r in rules if isinstance(r, Split)), None)
    if rule is None or len(rules) > 1:
        found = f"the passes {', '.join(r.name for r in rules)}, whose ratios no calibration chooses"
        raise PlanError(asked, found=found, do="use a recipe that splits networks, such as moefx-split")
    if calibration is None:
        raise InputError(asked, found="no calibration", do="pass calibration=moefx.calibrate(model, batches)")
    if any(p.is_meta for p in graph.root.parameters()):
        raise InputError(asked, found="weights on meta", do="plan the model with its weights")
    sites = {site.name: site for site in analyse(graph).sites if site.kind == "ffn"}
    base = plan.cost.flops_before
    choices = [_candidates(graph, rule, sites[s.name], s, calibration, cost, base) for s in plan.sites]
    chosen = _choose(choices, budget * base - base)
    if chosen is None:
        least = 1 + sum(min(c.flops for c in found) for found in choices) / base
        raise PlanError(
            asked,
            found=f"with every network at its smallest the model keeps {least:.3f}",
            do="raise the budget, or route heads or tokens as well (moefx recipes)",
        )
    kept = [c.plan for c in chosen if c.plan is not None]
    if not kept:
        raise NothingMatched(asked, found="the dense model fits it", do="lower the budget")
    dense = [s for s, c in zip(plan.sites, chosen, strict=True) if c.plan is None]
    reason = f"the budget of {budget:g} is best met with it dense"
    left = [SkippedSite(name=s.name, kind=s.kind, rule=s.rule, reason=reason) for s in dense]
    return plan.model_copy(update={"sites": tuple(kept), "skipped": (*plan.skipped, *left), "cost": cost(kept)})


def _candidates(
    graph: Graph,
    rule: Split,
    site: Site,
    plan: SitePlan,
    calibration: Calibration,
    cost: Callable[[list[SitePlan]], Cost],
    base: int,
) -> list[Candidate]:
    """Return the choices of one network; FLOPs are what each changes in the model's."""
    o = rule.options
    lost = expected_losses(graph, rule, site, calibration)
    found = [Candidate(None, 0.0, 0.0)]
    ladder = sorted({max(1, round(o.experts * (i + 1) / CANDIDATES)) for i in range(CANDIDATES)} - {o.experts})
    for top_k in ladder:
        costs = Split(**o.model_dump() | {"top_k": top_k}).costs(site)
        made = plan.model_copy(
            update={
                "options": {"top_k": top_k},
                "parameters_after": costs.parameters_after,
                "active_after": costs.active_after,
            }
        )
        running = len(lost) * (o.shared + top_k) // o.slices
        found.append(Candidate(made, cost([made]).flops_after - base, float(lost[running:].sum())))
    return found


def expected_losses(graph: Graph, rule: Split, site: Site, calibration: Calibration) -> torch.Tensor:
    """Return what each neuron of a network is expected to lose when it does not run, the largest first ``[F]``."""
    layer = calibration.layer(site.name)
    learnt = bool(layer.taylor.count.any())
    options = rule.options.model_copy(update={"importance": "taylor" if learnt else "variance"})
    slicing = Slicing(options, dense_weights(site, graph), hidden_function(site), _no_draws, statistics=layer)
    values = slicing.importance().double()
    if not learnt:
        moments = layer.output
        energy = (moments.variance + moments.mean.square()) * moments.count.unsqueeze(1)
        values = values / (energy.sum() / moments.count.sum()).clamp_min(1e-30)
    return values.sort(descending=True).values


def _no_draws(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
    done = milp(losses, constraints=rows, bounds=Bounds(0, 1), integrality=np.ones(len(flat)))
    if not done.success:
        return None
    return [c for c, taken in zip(flat, done.x, strict=True) if taken > 0.5]
