"""Making a plan: which sites, realised where, at what cost. Reads no weights and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from moefx.errors import CaptureError, NothingMatched, PlanError
from moefx.graph import Graph
from moefx.graph.origin import show_source
from moefx.model.carry import Carrying, root_inputs
from moefx.model.costs import total_cost
from moefx.model.handle import applied_passes
from moefx.model.places import Skip, place_site
from moefx.model.plan import PassPlan, Plan, SitePlan, SkippedSite, taken_apart
from moefx.model.select import Patterns, check_patterns, patterns, selected
from moefx.passes.analysis import Facts, analyse
from moefx.passes.analysis.local import weight_names
from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import ModelPass, Pass, get_pass
from moefx.passes.rewrite.order import ANALYSED


def make_plan(
    graph: Graph,
    rules: Sequence[Pass],
    *,
    recipe: str | None,
    only: Patterns,
    skip: Patterns,
    seed: int,
    nested: bool = False,
) -> Plan:
    """Plan ``rules`` for the model that ``graph`` was traced from.

    With ``nested`` it may hold rewrites of which only one can be applied, for somebody to choose.

    Raises:
        NothingMatched: no site is left to rewrite, or a pattern matches none.
    """
    facts = analyse(graph)
    rules = [rule.fitted(facts) for rule in rules]
    wanted, unwanted = patterns(only, "only"), patterns(skip, "skip")
    check_patterns(wanted, facts.sites, "only")
    check_patterns(unwanted, facts.sites, "skip")
    planned: list[SitePlan] = []
    skipped: list[SkippedSite] = []
    carrying = Carrying(facts)
    for rule in rules:
        if isinstance(rule, ModelPass):
            planned.append(_plan_model(graph, rule, rules))
            continue
        made, left = _plan_rule(facts, rule, wanted, unwanted, carrying)
        planned += made
        skipped += left
    if not nested:
        _check_nesting(planned)
    if not planned:
        do = _what_to_do(facts, graph, rules)
        raise NothingMatched(_asked(graph, rules), found=_what_was_found(facts, skipped), do=do)
    kinds = {rule.site_kind for rule in rules}
    skipped += [_near_miss(m) for m in facts.misses if m.kind in kinds]
    return Plan(
        model=type(graph.root).__name__,
        recipe=recipe,
        seed=seed,
        passes=tuple(PassPlan(name=r.name, options=r.options.model_dump()) for r in rules),
        sites=tuple(planned),
        carried=carrying.needed(planned),
        carriers=carrying.carriers,
        skipped=tuple(skipped),
        warnings=tuple(w for rule in rules for w in rule.warnings()),
        cost=total_cost(facts, planned),
    )


def _plan_model(graph: Graph, rule: ModelPass, rules: Sequence[Pass]) -> SitePlan:
    """Plan a pass around the whole model, of which it adds a copy."""
    if len(rules) > 1:
        raise PlanError(
            f"apply {', '.join(r.name for r in rules)} at once",
            found=f"{rule.name} copies the model as it is before the others",
            do=f"transform with the others first, then with {rule.name} in a transform of its own",
        )
    count = sum(p.numel() for p in graph.root.parameters())
    return SitePlan(
        name=type(graph.root).__name__,
        kind="model",
        flavour="",
        role="main",
        rule=rule.name,
        tier="call",
        module=None,
        block="",
        block_inputs=root_inputs(graph),
        parameters_before=count,
        parameters_after=2 * count,
        active_before=0,
        active_after=0,
    )


def _plan_rule(
    facts: Facts, rule: Pass, only: Sequence[str], skip: Sequence[str], carrying: Carrying
) -> tuple[list[SitePlan], list[SkippedSite]]:
    """Plan one pass: the sites it takes, and those it leaves with the reason."""
    taken: list[tuple[Site, SitePlan]] = []
    left: list[SkippedSite] = []
    every = int(getattr(rule.options, "every", 1))
    done: dict[str, SitePlan] = {}
    outputs: dict[Node, str] = {}
    count = 0
    for site in facts.sites:
        if site.kind != rule.site_kind:
            continue
        try:
            if not selected(site, only, skip):
                raise Skip("not selected")
            if site.region_is_module and site.path in done:
                continue
            if site.output in outputs:
                raise Skip(f"it shares its output projection with {outputs[site.output]}, which is rewritten")
            refusal = rule.refusal(site)
            if refusal:
                raise Skip(refusal)
            count += 1
            if (count - 1) % every:
                raise Skip(f"only every {every}. site is rewritten")
            plan = done[site.path] = _plan_site(facts, rule, site, carrying)
            outputs[site.output] = site.name
            taken.append((site, plan))
        except Skip as reason:
            left.append(_skipped(site, rule, str(reason)))
        except (CaptureError, PlanError) as error:
            left.append(_skipped(site, rule, error.found))
    return carrying.state(rule, taken) if rule.state_width else [plan for _, plan in taken], left


def _skipped(site: Site, rule: Pass, reason: str) -> SkippedSite:
    source = str(site.output.meta["moefx"].source)
    return SkippedSite(name=site.name, kind=site.kind, rule=rule.name, reason=reason, source=source)


def _near_miss(miss: Any) -> SkippedSite:
    name = f"{miss.module_path}:{miss.node.name}" if miss.module_path else miss.node.name
    return SkippedSite(name=name, kind=miss.kind, rule="", reason=miss.reason, source=miss.source_line)


def _plan_site(facts: Facts, rule: Pass, site: Site, carrying: Carrying) -> SitePlan:
    """Decide where a site is realised: its module, else the smallest module around it."""
    where = place_site(facts, rule, site, carrying)
    tap_width = sum(tap.width for tap in where.get("taps", ()) if tap.rank > 1)
    costs = rule.costs(site, tap_width)
    return SitePlan(
        name=site.name,
        kind=site.kind,
        flavour=site.flavour,
        role=site.role,
        rule=rule.name,
        weights=weight_names(site),
        calls=sum(s.path == site.path and s.kind == site.kind for s in facts.sites) if site.region_is_module else 1,
        parameters_before=costs.parameters_before,
        parameters_after=costs.parameters_after,
        active_before=costs.active_before,
        active_after=costs.active_after,
        saved_fraction=costs.saved_fraction,
        **where,
    )


def _asked(graph: Graph, rules: Sequence[Pass]) -> str:
    return f"rewrite {type(graph.root).__name__} with {', '.join(r.name for r in rules)}"


def _what_was_found(facts: Facts, skipped: Sequence[SkippedSite]) -> str:
    lines = [f"{s.name}: {s.reason} ({show_source(s.source)})" for s in skipped[:5]]
    lines += [str(miss) for miss in facts.misses[: 5 - len(lines)]]
    head = f"no site to rewrite among {len(facts.sites)} sites and {len(facts.misses)} near misses"
    return "\n    ".join([head, *lines])


def _what_to_do(facts: Facts, graph: Graph, rules: Sequence[Pass]) -> str:
    for rule in rules:
        for earlier in sorted(applied_passes(graph.root)):
            ended = rule.requires & (ANALYSED - get_pass(earlier).preserves)
            if ended:
                return (
                    f"apply {rule.name} before {earlier}, which ends what it needs ({', '.join(sorted(ended))}): "
                    "moefx.untransform the model and transform in that order"
                )
    if facts.sites:
        return "see moefx.sites(model, inputs) for what there is, and change only=, skip= or the options"
    return "moefx finds projections with a nonlinearity between them, added to a residual stream; this model has none"


def _check_nesting(planned: Sequence[SitePlan]) -> None:
    """Refuse rewrites of a module that another rewrite writes out in the forward around it: they would be lost.

    Raises:
        PlanError: the message says in which order to apply the passes.
    """
    for outer in planned:
        for inner in planned:
            hit = taken_apart(outer, inner)
            if hit:
                raise PlanError(
                    f"apply {inner.rule} and {outer.rule} at once",
                    found=f"{outer.rule} takes {hit!r} apart, which {inner.rule} rewrites by itself",
                    do=f"transform with {inner.rule} first, then with {outer.rule} in a second transform",
                )
