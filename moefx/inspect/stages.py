"""What a dump shows at each stage of the way from a model to a routed one; the user's model is never changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moefx.errors import CaptureError, InputError, MoefxWarning
from moefx.graph import Graph, trace
from moefx.graph.signature import Inputs
from moefx.inspect.describe import plan_mark
from moefx.model.handle import Handle, handle_of
from moefx.model.plan import Plan
from moefx.model.planner import make_plan
from moefx.model.select import Patterns
from moefx.model.transform import check_model, transform_model, untransform_model
from moefx.passes.rewrite.base import Pass
from moefx.recipes import build_passes, get_recipe

DEFAULT_RECIPE = "sparse-upcycling"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which rewrite a dump is about; none if no recipe and no option was given."""

    recipe: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    only: Patterns = None
    skip: Patterns = None
    seed: int = 0

    @property
    def asked(self) -> bool:
        """Whether a rewrite was asked for."""
        return self.recipe is not None or bool(self.options) or self.only is not None or self.skip is not None

    def rules(self) -> list[Pass]:
        """Return the passes of the recipe, with the options."""
        return build_passes(get_recipe(self.recipe or DEFAULT_RECIPE).passes, self.options)

    def arguments(self) -> dict[str, Any]:
        """Return what planning and transforming take besides the rules."""
        name = get_recipe(self.recipe or DEFAULT_RECIPE).name
        return {"recipe": name, "only": self.only, "skip": self.skip, "seed": self.seed}


def graph_of(model_or_graph: nn.Module | Graph, inputs: Inputs) -> Graph:
    """Return the graph, traced if need be."""
    return model_or_graph if isinstance(model_or_graph, Graph) else trace(model_or_graph, inputs)


def plan_of(graph: Graph, request: Request) -> Plan:
    """Plan the rewrite that was asked for."""
    rules = request.rules()
    check_model(graph.root, rules)
    return make_plan(graph, rules, **request.arguments())


def plan_marks(plan: Plan) -> dict[str, str]:
    """Return what ``plan`` would make of each site, or why it would stay dense.

    Keys are site names, and ``"kind path"`` for modules that are called more than once.
    """
    options = {p.name: p.options for p in plan.passes}
    marks = {s.name: f"dense: {s.reason}" for s in plan.skipped if s.rule}
    for site in plan.sites:
        marks[site.name] = f"planned {plan_mark(site.rule, options[site.rule])}"
        if site.module:
            marks[f"{site.kind} {site.module}"] = marks[site.name]
    return marks


def applied_marks(model: nn.Module) -> dict[str, str]:
    """Return why the dense sites of a transformed model stayed dense."""
    handle = handle_of(model)
    plans = handle.plans if handle else []
    return {s.name: f"dense: {s.reason}" for plan in plans for s in plan.skipped if s.rule}


def routed_graph(graph: Graph, request: Request) -> Graph:
    """Return the graph after the rewrite that was asked for; after those already made if none was."""
    if handle_of(graph.root) is not None and not request.asked:
        return graph
    check_model(graph.root, request.rules())
    try:
        return _routed(_on_meta(graph.root), graph, request)
    except CaptureError:
        # Some models read their weights or buffers while they are traced.
        return _routed(copy.deepcopy(graph.root), graph, request)


def opened_graph(graph: Graph, request: Request) -> Graph:
    """Return the graph after the rewrite that was asked for, with the operators of routed modules in it."""
    routed = routed_graph(graph, request)
    return trace(routed.root, _inputs(routed), leaf="torch")


def dense_graph(graph: Graph) -> Graph:
    """Return the graph before the rewrites that were already made; ``graph`` itself if there are none."""
    if handle_of(graph.root) is None:
        return graph
    return trace(untransform_model(_on_meta(graph.root)), _inputs(graph))


def _routed(model: nn.Module, graph: Graph, request: Request) -> Graph:
    inputs = _inputs(graph)
    with warnings.catch_warnings():
        # What the rewrite warns of is for who makes it, not for who looks at it.
        warnings.simplefilter("ignore", MoefxWarning)
        transform_model(model, inputs, request.rules(), verify=False, **request.arguments())
    return trace(model, inputs)


def _inputs(graph: Graph) -> Inputs:
    if graph.call_spec is None:
        raise InputError(
            f"rewrite {type(graph.root).__name__} for a dump",
            found="a graph without the model's call, such as one from torch.export",
            do="pass the model and its example inputs",
        )
    return graph.call_spec.rebuild(graph.call_spec.examples)


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy ``model`` without its weights."""
    memo: dict[int, Any] = {}
    for part in [model, *_kept_modules(handle_of(model))]:
        for parameter in part.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for buffer in part.buffers():
            memo[id(buffer)] = buffer.detach().to("meta")
    with torch.no_grad():
        return copy.deepcopy(model, memo)


def _kept_modules(handle: Handle | None) -> list[nn.Module]:
    undos = [undo for applied in handle.applied for undo in applied.undos or ()] if handle else []
    return [child for undo in undos for child in undo.children.values() if child is not None]
