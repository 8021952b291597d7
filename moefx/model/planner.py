"""Making a plan: which sites, realised where, at what cost. Reads no weights and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError, MoefxError, NothingMatched, PlanError
from moefx.graph import Graph, ModuleCall
from moefx.graph.origin import show_source
from moefx.model.carry import Carrying, below, root_inputs
from moefx.model.forward import make_forward
from moefx.model.handle import applied_passes
from moefx.model.local import call_inputs, encode, local_graph
from moefx.model.plan import Cost, PassPlan, Plan, SitePlan, SkippedSite, TapPlan
from moefx.model.realise import find_site
from moefx.model.select import Patterns, check_patterns, patterns, selected
from moefx.model.taps import OF_ATTENTION, attention_over_text, choose_tap
from moefx.model.whole_block import plan_segment, plan_whole_block
from moefx.passes.analysis import Facts, analyse
from moefx.passes.analysis.local import weight_names
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.tokens import NotByToken
from moefx.passes.rewrite.base import BlockPass, CallPass, ModelPass, Pass, SegmentPass, get_pass
from moefx.passes.rewrite.order import ANALYSED


class Skip(Exception):
    """A site that stays dense, and why."""


def make_plan(
    graph: Graph, rules: Sequence[Pass], *, recipe: str | None, only: Patterns, skip: Patterns, seed: int
) -> Plan:
    """Plan ``rules`` for the model that ``graph`` was traced from.

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
        made, left = _plan_rule(graph, facts, rule, wanted, unwanted, carrying)
        planned += made
        skipped += left
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
        cost=total_cost(graph, facts, planned),
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
    graph: Graph, facts: Facts, rule: Pass, only: Sequence[str], skip: Sequence[str], carrying: Carrying
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
            plan = done[site.path] = _plan_site(graph, facts, rule, site, carrying)
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


def _plan_site(graph: Graph, facts: Facts, rule: Pass, site: Site, carrying: Carrying) -> SitePlan:
    """Decide where a site is realised: its module, else the smallest module around it."""
    call = _call(graph, site)
    where = _where(graph, facts, rule, site, call, carrying)
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


def _where(
    graph: Graph, facts: Facts, rule: Pass, site: Site, call: ModuleCall | None, carrying: Carrying
) -> dict[str, Any]:
    """Return the fields of a site's plan that say where it is realised."""
    if isinstance(rule, CallPass):
        return {"tier": "call", "module": None, **_plan_call(graph, facts, site)}
    if isinstance(rule, SegmentPass):
        return {"tier": "block", "module": None, **_plan_segment(graph, facts, rule, site)}
    if site.kind == "block":
        return {"tier": "block", "module": None, **_plan_whole_block(facts, rule, site, call, carrying)}
    if not (site.region_is_module and site.kind == "ffn"):
        return {"tier": "block", "module": None, **_plan_block(facts, rule, site, site.path, carrying)}
    module = {"module": site.path, "module_inputs": _ffn_inputs(site)}
    if not (rule.taps or rule.state_width) and _single_input(call) is site.operands["x"]:
        return {"tier": "module", **module}
    around = next(carrying.enclosing(site.path))
    return {"tier": "block", **module, **_plan_block(facts, rule, site, around, carrying)}


def _plan_call(graph: Graph, facts: Facts, site: Site) -> dict[str, Any]:
    """Find the module that is the site and nothing else."""
    calls = [c for c in graph.calls if c.path == site.path]
    whole = {s.path for s in facts.sites if s.kind == "block"} | {""}
    shared = any(s is not site and s.kind != "block" and s.path == site.path for s in facts.sites)
    if len(calls) != 1 or site.path in whole or shared:
        raise Skip("it is no module of its own that is called once")
    return {"block": site.path, "block_inputs": call_inputs(calls[0])}


def _call(graph: Graph, site: Site) -> ModuleCall | None:
    return next((c for c in graph.calls if c.path == site.path and c.index == site.call_index), None)


def _ffn_inputs(site: Site) -> dict[str, Any]:
    return {"args": [encode(site.operands["x"])], "kwargs": {}}


def _single_input(call: ModuleCall | None) -> Node | None:
    """Return the one tensor a module is called with, if it is called with nothing else."""
    if call is None or len(call.args) != 1 or not isinstance(call.args[0], Node):
        return None
    others = pytree.tree_leaves(call.kwargs)
    return call.args[0] if all(value is None for value in others) else None


def _plan_block(facts: Facts, rule: Pass, site: Site, path: str, carrying: Carrying) -> dict[str, Any]:
    """Capture the module whose own forward is rewritten, find the site in it, and every tap in it or around it."""
    graph = facts.graph
    calls = carrying.calls(path)
    if len(calls) > 1:
        what = ", so its layers have no order in which to hand on a state" if rule.state_width else ""
        raise Skip(f"{path!r} is called {len(calls)} times in one forward{what}")
    inputs = call_inputs(calls[0]) if path else root_inputs(graph)
    inline = not (site.region_is_module and site.kind == "ffn")
    expand = _expand(graph, site, path) if inline else _expand_attention(graph, facts, rule, path)
    local = local_graph(graph.root.get_submodule(path), inputs, "children", expand)
    make_forward(local)
    if inline:
        entry = find_site(local, path, site.kind, weight_names(site)).operands.get("x")
    else:
        entry = _argument(local, below(site.path, path))
    taps = []
    for name in rule.taps:
        node = choose_tap(name, facts, calls[0] if calls else None, local, entry)
        seen = node is not None and rule.accepts(name, node.meta["val"])
        tap = _tap(name, node) if node is not None and seen else carrying.tap(rule, name, path)
        if tap is None:
            raise Skip(f"no module around it sees the {name}")
        taps.append(tap)
    return {"block": path, "block_inputs": inputs, "expand": expand, "taps": tuple(taps)}


def _plan_whole_block(
    facts: Facts, rule: Pass, site: Site, call: ModuleCall | None, carrying: Carrying
) -> dict[str, Any]:
    """Find where the block's tokens are, and what follows them."""
    assert isinstance(rule, BlockPass)
    try:
        where = plan_whole_block(facts, site, call, _opened(facts, rule, site) if rule.opens_attention else ())
    except NotByToken as reason:
        raise Skip(str(reason)) from None
    refusal = rule.layout_refusal(where["tokens"])
    if refusal:
        raise Skip(refusal)
    if rule.taps:
        where["taps"] = _argument_taps(facts, rule, where, call, carrying)
    return {**where, "layer": site.operands["layer"], "layers": site.operands["layers"]}


def _opened(facts: Facts, rule: BlockPass, site: Site) -> tuple[str, ...]:
    """Return the modules of a block's attentions over its own tokens."""
    inside = [s for s in facts.sites if s.kind == "attention" and s.path.startswith(site.path)]
    own = [s for s in inside if s.flavour in ("self", "joint") and set(s.nodes) <= set(site.nodes)]
    if not own:
        raise Skip("no attention in it has its own tokens as keys")
    refusal = next((problem for s in own if (problem := rule.attention_refusal(s))), "")
    if refusal:
        raise Skip(refusal)
    return tuple(sorted({path for s in own for path in _expand(facts.graph, s, site.path)}))


def _plan_segment(graph: Graph, facts: Facts, rule: SegmentPass, site: Site) -> dict[str, Any]:
    """Find the module that owns the segment's blocks, and what follows their tokens there."""
    layers = int(site.operands["layers"])
    wanted = next(s for s in rule.segments(layers) if site.operands["layer"] in s)
    try:
        where = plan_segment(facts, wanted, root_inputs(graph), rule.taps, by_token=rule.by_token)
    except NotByToken as reason:
        raise Skip(str(reason)) from None
    refusal = rule.layout_refusal(where["segment"])
    if refusal:
        raise Skip(refusal)
    return {**where, "layer": wanted.start, "layers": layers}


def _argument_taps(
    facts: Facts, rule: Pass, where: dict[str, Any], call: ModuleCall | None, carrying: Carrying
) -> tuple[TapPlan, ...]:
    """Find the taps of a pass over a whole block among its arguments, or around it: there before its tokens are."""
    block = facts.graph.root.get_submodule(where["block"])
    local = local_graph(block, where["block_inputs"], "children", where["expand"])
    taps = []
    for name in rule.taps:
        node = choose_tap(name, facts, call, local)
        seen = node is not None and node.op == "placeholder" and rule.accepts(name, node.meta["val"])
        tap = _tap(name, node) if node is not None and seen else carrying.tap(rule, name, where["block"])
        if tap is None:
            raise Skip(f"none of its arguments is the {name}, and no module around it sees it")
        taps.append(tap)
    return tuple(taps)


def _expand(graph: Graph, site: Site, block: str) -> tuple[str, ...]:
    """Return the modules inside ``block`` through which the site's region runs: they must not stay opaque there."""
    prefix = f"{block}." if block else ""
    region = set(site.nodes)
    inner = {c.path for c in graph.calls if c.path.startswith(prefix) and c.path != block and region & set(c.nodes)}
    return tuple(sorted(path.removeprefix(prefix) for path in inner))


def _expand_attention(graph: Graph, facts: Facts, rule: Pass, block: str) -> tuple[str, ...]:
    """Return the modules of the block's attention over text, for a rule that reads its queries and keys."""
    found = attention_over_text(facts, block) if set(rule.taps) & set(OF_ATTENTION) else None
    return () if found is None else _expand(graph, found, block)


def _tap(name: str, node: Node) -> TapPlan:
    value = node.meta["val"]
    return TapPlan(name=name, node=node.name, rank=value.ndim, width=value.shape[-1] if value.ndim > 1 else 1)


def _argument(local: Graph, child: str) -> Node | None:
    """Return what the block passes to ``child``."""
    call = next((n for n in local.fx.nodes if n.op == "call_module" and n.target == child), None)
    return call.args[0] if call is not None and call.args and isinstance(call.args[0], Node) else None


def total_cost(graph: Graph, facts: Facts, planned: Sequence[SitePlan]) -> Cost:
    """Return parameters, bytes and FLOPs of the whole model, before and after."""
    parameters = {id(p): p for p in graph.root.parameters()}.values()
    before = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    width = max((p.element_size() for p in parameters), default=4)
    grown = sum(s.parameters_after - s.parameters_before for s in planned)
    flops = int(facts.costs.flops)
    sites = [s for s in planned if s.kind != "model"]
    tokens = {s.name: _tokens(facts, s.name) for s in sites}
    extra = sum(2 * (s.active_after - s.active_before) * tokens[s.name] * s.calls for s in sites)
    extra -= int(sum(s.saved_fraction * _site_flops(facts, s.name) for s in sites))
    return Cost(
        parameters_before=before,
        parameters_after=before + grown,
        bytes_before=size,
        bytes_after=size + grown * width,
        flops_before=flops,
        flops_after=max(1, flops + extra),
    )


def _site_flops(facts: Facts, name: str) -> int:
    return int(facts.costs.of(next(s for s in facts.sites if s.name == name).nodes).flops)


def _tokens(facts: Facts, name: str) -> int:
    site = next(s for s in facts.sites if s.name == name)
    value = site.operands.get("x", site.output).meta["val"]
    assert isinstance(value, torch.Tensor)
    return value.numel() // value.shape[int(site.shapes.get("axis", -1))]


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
            path = inner.module or inner.block or ""
            written = [f"{outer.block}.{child}".lstrip(".") for child in outer.expand]
            hit = next((w for w in written if path == w or path.startswith(f"{w}.")), None)
            if outer.rule != inner.rule and hit is not None:
                raise PlanError(
                    f"apply {inner.rule} and {outer.rule} at once",
                    found=f"{outer.rule} takes {hit!r} apart, which {inner.rule} rewrites by itself",
                    do=f"transform with {inner.rule} first, then with {outer.rule} in a second transform",
                )


__all__ = ["MoefxError", "make_plan"]
