"""Where a site is realised: the module that it is, else the smallest module around it that sees what it reads."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.graph import Graph, ModuleCall
from moefx.model.captures import Captures
from moefx.model.carry import Carrying, below, root_inputs
from moefx.model.forward import make_forward
from moefx.model.local import call_inputs, encode
from moefx.model.plan import TapPlan
from moefx.model.realise import find_site
from moefx.model.taps import OF_ATTENTION, attention_over_text, choose_tap
from moefx.model.whole_block import plan_segment, plan_whole_block
from moefx.passes.analysis import Facts
from moefx.passes.analysis.local import weight_names
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.tokens import NotByToken
from moefx.passes.rewrite.base import BlockPass, CallPass, Pass, SegmentPass


class Skip(Exception):
    """A site that stays dense, and why."""


def place_site(facts: Facts, rule: Pass, site: Site, carrying: Carrying) -> dict[str, Any]:
    """Return the fields of a site's plan that say where it is realised.

    Raises:
        Skip: it stays dense.
        CaptureError, PlanError: a module cannot be rewritten, or cannot hand on what the site reads.
    """
    graph, call = facts.graph, _call(facts.graph, site)
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
    local = Captures.of(graph).see(path, inputs, expand)
    make_forward(local)
    if inline:
        entry = find_site(local, path, site.kind, weight_names(site)).operands.get("x")
    else:
        entry = argument_of(local, below(site.path, path))
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
    return {**where, "layer": wanted.start, "layers": layers, "span": len(wanted)}


def _argument_taps(
    facts: Facts, rule: Pass, where: dict[str, Any], call: ModuleCall | None, carrying: Carrying
) -> tuple[TapPlan, ...]:
    """Find the taps of a pass over a whole block among its arguments, or around it: there before its tokens are."""
    local = Captures.of(facts.graph).see(where["block"], where["block_inputs"], where["expand"])
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


def argument_of(local: Graph, child: str) -> Node | None:
    """Return what the block passes to ``child``."""
    call = next((n for n in local.fx.nodes if n.op == "call_module" and n.target == child), None)
    return call.args[0] if call is not None and call.args and isinstance(call.args[0], Node) else None
