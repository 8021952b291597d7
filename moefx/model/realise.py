"""From a plan to changes of the user's model: each site at the smallest module that holds it and its taps.

Nothing here mutates the model: modules are captured alone, replacements are built beside it, and the changes are
returned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from moefx.errors import PlanError
from moefx.graph import Graph
from moefx.graph.splice import Splice
from moefx.graph.verify import verify_graph
from moefx.model.captures import Captures
from moefx.model.forward import Forward, has_own_forward, make_forward
from moefx.model.install import Change, child_named, set_child
from moefx.model.local import JSON, checkpointed_children, empty_dicts, encode, local_graph, output_flag
from moefx.model.plan import Plan, SitePlan
from moefx.model.wiring import Wiring
from moefx.passes.analysis.local import local_sites, weight_names
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.tokens import Branch
from moefx.passes.calibration import Calibration
from moefx.passes.rewrite.base import (
    BlockContext,
    BlockPass,
    CallPass,
    Context,
    Edit,
    ModelPass,
    Pass,
    SegmentContext,
    SegmentPass,
    SitePass,
    get_pass,
)


@dataclass(frozen=True)
class _Shared:
    """What all modules of one plan have in common: rules by name, the seed, and what the passes over blocks share."""

    rules: dict[str, Pass]
    seed: int
    wiring: Wiring
    captures: Captures
    common: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Realised:
    """One site with what replaces it: ``dense`` and ``routed`` map the same inputs, for the proof."""

    plan: SitePlan
    rule: Pass
    dense: Graph | None
    site: Site | None
    routed: nn.Module


def build_pass(plan: Plan, name: str) -> Pass:
    """Return the pass ``name`` with the options it has in ``plan``."""
    options = next(p.options for p in plan.passes if p.name == name)
    return get_pass(name)(**options)


def realise(
    model: nn.Module, plan: Plan, calibration: Calibration | None = None, captures: Captures | None = None
) -> tuple[list[Change], list[Realised]]:
    """Build everything that ``plan`` asks for, from the ``captures`` that planning made if it did so just now.

    Raises:
        PlanError: the model is not the one that was planned.
        CaptureError: a block cannot be rewritten faithfully.
    """
    changes: list[Change] = []
    built: list[Realised] = []
    rules = {p.name: build_pass(plan, p.name) for p in plan.passes}
    for rule in rules.values():
        rule.calibration = calibration
    for site in plan.sites:
        if site.tier == "module":
            rule = _rule_of(rules, site)
            assert isinstance(rule, SitePass)
            change, made = _replace_module(model, site, rule, plan.seed)
            changes.append(change)
            built.append(made)
    shared = _Shared(rules, plan.seed, Wiring(plan), captures or Captures(model))
    blocks = [s for s in plan.sites if s.tier == "block"]
    for path in sorted({s.block or "" for s in blocks} | set(shared.wiring.inputs)):
        made_changes, mades = _rewrite_block(model, path, [s for s in blocks if (s.block or "") == path], shared)
        changes += made_changes
        built += mades
    calls = [(site, rule) for site in plan.sites if isinstance(rule := rules[site.rule], CallPass)]
    for site, rule in calls:
        change = _wrap_call(model, plan, site, rule, changes)
        changes.append(change)
        child = change.children[rule.child]
        assert child is not None
        built.append(Realised(site, rule, None, None, child))
    return changes, built


def _rule_of(rules: dict[str, Pass], site: SitePlan) -> Pass:
    """Return the pass of a site, with the options it has there."""
    rule = rules[site.rule]
    if not site.options:
        return rule
    own = type(rule)(**rule.options.model_dump() | site.options)
    own.calibration = rule.calibration
    return own


def _wrap_call(model: nn.Module, plan: Plan, site: SitePlan, rule: CallPass, changes: list[Change]) -> Change:
    """Let a child decide when a module runs; on top of what its own forward was rewritten to, if it was.

    Raises:
        PlanError: another pass replaces the module, or writes it out in the forward around it.
    """
    path = site.block or ""
    written = {f"{s.block}.{inner}" for s in plan.sites for inner in s.expand}
    if path in written or any(s.module == path for s in plan.sites):
        raise PlanError(
            f"apply {rule.name} to {path!r}",
            found="another pass of this transform takes the module apart or replaces it",
            do="leave this site out of one of them with skip=",
        )
    module = find_module(model, path)
    before = next((c for c in changes if c.path == path), Change(path))
    forward = before.forward or type(module).forward
    called = called_with if isinstance(rule, ModelPass) else called_by
    return Change(path, {**before.children, rule.child: rule.around(module)}, called(forward, rule.child))


@functools.cache
def called_by(forward: Forward, child: str) -> Forward:
    """Return a method that lets the module's ``child`` run ``forward``."""

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, child)(lambda: forward(self, *args, **kwargs))

    return called


@functools.cache
def called_with(forward: Forward, child: str) -> Forward:
    """Return a method that gives the module's ``child`` ``forward`` and the arguments of the call."""

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, child)(functools.partial(forward, self), args, kwargs)

    return called


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at ``path``.

    Raises:
        PlanError: there is none, or a hook hides its forward.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise PlanError(
            f"apply a plan to {type(model).__name__}", found=f"no module {path!r}", do="use the model that was planned"
        ) from error
    if has_own_forward(module):
        raise PlanError(
            f"rewrite {path!r}",
            found="an instance-level forward (a hook of accelerate or diffusers) hides the one of its class",
            do="remove the hooks, transform, and add them again",
        )
    return module


def capture_module(model: nn.Module, path: str, inputs: JSON | None) -> tuple[Graph, Site]:
    """Capture an FFN module alone and return its graph with its one site."""
    assert inputs is not None
    graph = local_graph(find_module(model, path), inputs, "nn")
    found = [s for s in local_sites(graph) if s.kind == "ffn"]
    if len(found) != 1:
        raise PlanError(
            f"rewrite {path!r}", found=f"{len(found)} feed-forward sites in the module alone", do="plan the model again"
        )
    return graph, found[0]


def _replace_module(model: nn.Module, plan: SitePlan, rule: SitePass, seed: int) -> tuple[Change, Realised]:
    assert plan.module is not None
    graph, site = capture_module(model, plan.module, plan.module_inputs)
    edit = rule.edit(Context(graph=graph, site=site, name=plan.name, taps={}, seed=seed, whole=True))
    parent, _, name = plan.module.rpartition(".")
    return Change(parent, {name: edit.routed}), Realised(plan, rule, graph, site, edit.routed)


def _rewrite_block(
    model: nn.Module, path: str, plans: list[SitePlan], shared: _Shared
) -> tuple[list[Change], list[Realised]]:
    """Rewrite one module's own forward on behalf of all sites that live in it, and of the values it hands on."""
    module = find_module(model, path)
    inputs = plans[0].block_inputs if plans else shared.wiring.inputs[path]
    assert inputs is not None
    expand = {path for plan in plans for path in plan.expand}
    graph = shared.captures.take(path, inputs, expand)
    empty, flag = empty_dicts(module, inputs, graph, expand), output_flag(module, inputs, graph, expand)
    checkpointed = checkpointed_children(module, inputs, expand)
    before, read = _targets(graph, "call_module"), _targets(graph, "get_attr")
    values = shared.wiring.enter(graph, path)
    children: dict[str, nn.Module | None] = {}
    layers: dict[str, str] = {}
    made: list[Realised] = []
    # Whole blocks first: they know nodes by name, which the others may replace.
    for plan in sorted(plans, key=lambda p: p.kind != "block"):
        with future_children(module, children):
            realised, edit = _rewrite_site(model, graph, plan, shared)
        children |= edit.children
        layers |= {name: plan.state for name, child in edit.children.items() if plan.state and child is edit.routed}
        made.append(realised)
    shared.wiring.connect(graph, path, values, layers)
    gone = sorted(before - _targets(graph, "call_module"))
    children |= dict.fromkeys(target for target in gone if "." not in target)
    parameters = dict(module.named_parameters())
    unused = tuple(sorted(t for t in read - _targets(graph, "get_attr") if t in parameters))
    with future_children(module, children):
        verify_graph(graph, f"rewriting {path!r}")
    forward = make_forward(graph, empty, flag, checkpointed)
    return [Change(path, children, forward, unused), *_nested(path, gone)], made


def _rewrite_site(model: nn.Module, graph: Graph, plan: SitePlan, shared: _Shared) -> tuple[Realised, Edit]:
    """Let the rule of one site change the graph of the module that it lives in."""
    rule, seed = _rule_of(shared.rules, plan), shared.seed
    taps = {tap.name: _node(graph, tap.node, plan.block or "") for tap in plan.taps}
    if isinstance(rule, BlockPass):
        return _whole_block(model, graph, plan, rule, seed, shared.common, taps)
    if isinstance(rule, SegmentPass):
        return _segment(graph, plan, rule, taps, seed)
    assert isinstance(rule, SitePass)
    rewrite = _inline_site if plan.module is None else _tapped_child
    state = {"layer": plan.layer, "common": shared.wiring.common[plan.state]} if plan.state else {}
    return rewrite(model, graph, plan, rule, {"taps": taps, "seed": seed, **state})


def _nested(path: str, gone: list[str]) -> list[Change]:
    """Return the removal of modules below the children of ``path`` that its new forward calls no more."""
    owners: dict[str, dict[str, nn.Module | None]] = {}
    for target in gone:
        owner, _, name = target.rpartition(".")
        if owner:
            owners.setdefault(owner, {})[name] = None
    return [Change(f"{path}.{owner}".lstrip("."), children) for owner, children in owners.items()]


def _targets(graph: Graph, op: str) -> set[str]:
    return {str(node.target) for node in graph.fx.nodes if node.op == op}


def _whole_block(
    model: nn.Module,
    graph: Graph,
    plan: SitePlan,
    rule: BlockPass,
    seed: int,
    common: dict[str, Any],
    taps: dict[str, Node],
) -> tuple[Realised, Edit]:
    """Let the rule run the block on some of its tokens."""
    assert plan.tokens is not None

    def ffn(branch: Branch) -> tuple[Graph, Site]:
        inputs = {"args": [encode(_node(graph, branch.node, plan.block or "").args[0])], "kwargs": {}}
        return capture_module(model, f"{plan.block}.{branch.module}".lstrip("."), inputs)

    context = BlockContext(
        graph=graph,
        name=plan.name,
        layout=plan.tokens,
        layer=plan.layer,
        layers=plan.layers,
        seed=seed,
        ffn=ffn,
        common=common.setdefault(rule.name, {}),
        taps=taps,
    )
    edit = rule.edit(context)
    return Realised(plan, rule, None, None, edit.routed), edit


def _segment(
    graph: Graph, plan: SitePlan, rule: SegmentPass, taps: dict[str, Node], seed: int
) -> tuple[Realised, Edit]:
    """Let the rule route several blocks in the forward of the module that owns them."""
    assert plan.segment is not None
    edit = rule.edit(SegmentContext(graph=graph, name=plan.name, layout=plan.segment, taps=taps, seed=seed))
    return Realised(plan, rule, None, None, edit.routed), edit


def _tapped_child(
    model: nn.Module, graph: Graph, plan: SitePlan, rule: SitePass, given: dict[str, Any]
) -> tuple[Realised, Edit]:
    """Replace a child module, and give its calls the taps as further arguments."""
    taps: dict[str, Node] = given["taps"]
    assert plan.module is not None
    dense, site = capture_module(model, plan.module, plan.module_inputs)
    edit = rule.edit(Context(graph=dense, site=site, name=plan.name, whole=True, **given))
    child = plan.module.removeprefix(f"{plan.block}.") if plan.block else plan.module
    splice = Splice(graph, rule.name)
    for call in [n for n in graph.fx.nodes if n.op == "call_module" and n.target == child]:
        around = _after_all(graph, [call, *taps.values()])
        new = splice.call_module(child, (call.args[0], *taps.values()), around=around, val=call.meta["val"])
        splice.replace(call, new)
    return Realised(plan, rule, dense, site, edit.routed), Edit(routed=edit.routed, children={child: edit.routed})


def _after_all(graph: Graph, nodes: list[Node]) -> Node:
    """Return the first node before which all of ``nodes`` are computed."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    return max(nodes, key=order.__getitem__).next


def _inline_site(
    model: nn.Module, graph: Graph, plan: SitePlan, rule: SitePass, given: dict[str, Any]
) -> tuple[Realised, Edit]:
    """Let the rule rewrite a site that is written in the block's own forward."""
    site = find_site(graph, plan.block or "", plan.kind, plan.weights)
    edit = rule.edit(Context(graph=graph, site=site, name=plan.name, whole=False, **given))
    return Realised(plan, rule, None, site, edit.routed), edit


def find_site(graph: Graph, path: str, kind: str, weights: tuple[str, ...]) -> Site:
    """Return the site of a local graph that has exactly these parameters.

    Raises:
        PlanError: there is none.
    """
    prefix = f"{path}." if path else ""
    for site in local_sites(graph):
        if site.kind == kind and tuple(prefix + name for name in weight_names(site)) == weights:
            return site
    raise PlanError(f"rewrite {path!r}", found=f"its {kind} is not visible when it is captured alone", do="skip it")


def _node(graph: Graph, name: str, path: str) -> Node:
    found: list[Node] = [node for node in graph.fx.nodes if node.name == name]
    if found:
        return found[0]
    raise PlanError(f"wire a tap in {path!r}", found=f"no value {name!r}", do="plan the model again")


@contextmanager
def future_children(module: nn.Module, children: dict[str, nn.Module | None]) -> Iterator[None]:
    """Let ``module`` have its future children for a moment."""
    coming = {name: child for name, child in children.items() if child is not None}
    old = {name: child_named(module, name) for name in coming}
    try:
        for name, child in coming.items():
            set_child(module, name, child)
        yield
    finally:
        for name, before in old.items():
            set_child(module, name, before)
