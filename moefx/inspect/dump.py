"""``moefx.dump``: a model, or what would become of it, as text, Python, JSON or a picture."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moefx.errors import OptionError, nearest
from moefx.graph import Graph
from moefx.graph.signature import Inputs
from moefx.inspect import schema
from moefx.inspect.explain import Explanation
from moefx.inspect.listing import listing
from moefx.inspect.picture import dot_text
from moefx.inspect.regions import build_regions
from moefx.inspect.stages import (
    Request,
    applied_marks,
    dense_graph,
    graph_of,
    opened_graph,
    plan_marks,
    plan_of,
    routed_graph,
)
from moefx.inspect.svg import svg_text
from moefx.inspect.tables import misses_text, plan_text, sites_text
from moefx.inspect.tree import tree_text
from moefx.model.select import Patterns

# What each stage can be written as; the first is its default.
STAGES: dict[str, tuple[str, ...]] = {
    "tree": ("text", "json", "dot", "svg"),
    "graph": ("python", "text", "json"),
    "sites": ("text", "json"),
    "plan": ("text", "json"),
    "routed": ("text", "python", "json", "dot", "svg"),
    "lowered": ("text", "json"),
    "kernels": ("python", "json"),
}
FORMATS = ("text", "python", "json", "dot", "svg")


def dump(
    model_or_graph: nn.Module | Graph,
    inputs: Inputs = None,
    *,
    stage: str = "tree",
    format: str | None = None,
    recipe: str | None = None,
    only: Patterns = None,
    skip: Patterns = None,
    seed: int = 0,
    depth: int | None = None,
    diff: bool = False,
    explain: str | None = None,
    target: str | None = None,
    **options: Any,
) -> str:
    """Return a model, or what a recipe makes of it, as text; nothing is changed.

    The same model, inputs and options give the same bytes in every process; names are escaped, so that they cannot
    speak to a terminal or a browser.

    Args:
        model_or_graph: a model, or a graph from :func:`moefx.trace`.
        inputs: example inputs of a model; synthesised for diffusers denoisers.
        stage: ``tree`` (the region tree), ``graph`` (every operation), ``sites``, ``plan``, ``routed`` (the region
            tree after the rewrite), ``lowered`` (which routed regions have kernels, and why others have none), or
            ``kernels`` (the emitted sources).
        format: ``text``, ``python`` (a listing to read), ``json`` (docs/dump-schema.md), ``dot`` or ``svg``.
        recipe: a rewrite to note in the tree, to plan or to apply to a copy; ``options`` are its options.
        only: sites to rewrite, as in :func:`moefx.transform`; ``skip`` those not to.
        skip: see ``only``.
        seed: of everything random in the rewrite.
        depth: levels of the tree to show; all by default.
        diff: return the difference that the rewrite makes instead, as a unified diff of the stage's text.
        explain: return why the site, module or node of this name (or glob) matched, or what came nearest, instead.
        target: the device of stages ``lowered`` and ``kernels``, such as ``"sm_90"`` (the default); none need be here.

    Raises:
        OptionError: an unknown stage or format, or a format that the stage does not have.
        InputError, CaptureError, PlanError: see :func:`moefx.transform`.
    """
    request = Request(recipe=recipe, options=options, only=only, skip=skip, seed=seed)
    if diff:
        check_stage(stage, "text" if format is None else format)
        return _diff(graph_of(model_or_graph, inputs), stage, format, request, depth)
    kind = check_stage(stage, format)
    graph = graph_of(model_or_graph, inputs)
    if explain is not None:
        if kind not in ("text", "json"):
            raise OptionError(f"explain as {kind!r}", found="an explanation is text or json", do="choose one of them")
        explanation = Explanation(graph, explain, _marks(graph, request))
        if kind == "text":
            return explanation.text()
        return schema.to_text(schema.head("explain") | {"model": schema.model(graph)} | explanation.json())
    return _WRITERS[stage](_View(graph, request, kind, depth, stage, target))


def check_stage(stage: str, format: str | None) -> str:
    """Return the format to write ``stage`` in.

    Raises:
        OptionError: there is no such stage or format, or the one cannot be written as the other.
    """
    if stage not in STAGES:
        raise OptionError(f"dump stage {stage!r}", found="no such stage", do=nearest(str(stage), STAGES))
    if format is None:
        return STAGES[stage][0]
    if format not in FORMATS:
        raise OptionError(f"dump as {format!r}", found="no such format", do=nearest(str(format), FORMATS))
    if format not in STAGES[stage]:
        found = f"it can be written as {', '.join(STAGES[stage])}"
        raise OptionError(f"dump stage {stage!r} as {format!r}", found=found, do="choose one of these")
    return format


@dataclass(frozen=True)
class _View:
    graph: Graph
    request: Request
    format: str
    depth: int | None = None
    stage: str = "tree"
    target: str | None = None


def _marks(graph: Graph, request: Request) -> dict[str, str]:
    return plan_marks(plan_of(graph, request)) if request.asked else applied_marks(graph.root)


def _tree(view: _View, note: str = "", stage: str = "tree", marks: dict[str, str] | None = None) -> str:
    graph = view.graph
    region = build_regions(graph, _marks(graph, view.request) if marks is None else marks)
    if view.format == "json":
        parts = {"tree": schema.region(region), "sites": schema.sites(graph), "misses": schema.misses(graph)}
        return schema.to_text(schema.document(graph, stage, **parts))
    if view.format == "dot":
        return dot_text(graph, region)
    if view.format == "svg":
        return svg_text(graph, region)
    return tree_text(graph, region, depth=view.depth, note=note)


def _graph(view: _View) -> str:
    if view.format != "json":
        return listing(view.graph)
    nodes = [schema.node(node) for node in view.graph.fx.nodes]
    return schema.to_text(schema.document(view.graph, "graph", nodes=nodes))


def _sites(view: _View) -> str:
    graph = view.graph
    if view.format != "json":
        return f"{sites_text(graph)}\n{misses_text(graph)}"
    return schema.to_text(schema.document(graph, "sites", sites=schema.sites(graph), misses=schema.misses(graph)))


def _plan(view: _View) -> str:
    plan = plan_of(view.graph, view.request)
    if view.format != "json":
        return plan_text(plan)
    return schema.to_text(
        schema.head("plan") | {"model": schema.model(view.graph), "plan": plan.model_dump(mode="json")}
    )


def _routed(view: _View) -> str:
    graph = routed_graph(view.graph, view.request)
    if view.format == "python":
        return listing(graph)
    return _tree(_View(graph, view.request, view.format, view.depth), stage="routed", marks=applied_marks(graph.root))


def _kernels(view: _View) -> str:
    from moefx.inspect.lowered import write  # which loads the kernel compiler's rooms

    return write(opened_graph(view.graph, view.request), view.stage, view.format, view.target)


_WRITERS: dict[str, Callable[[_View], str]] = {
    "tree": _tree,
    "graph": _graph,
    "sites": _sites,
    "plan": _plan,
    "routed": _routed,
    "lowered": _kernels,
    "kernels": _kernels,
}


def _diff(graph: Graph, stage: str, format: str | None, request: Request, depth: int | None) -> str:
    """Return what the rewrite changes in the text of a stage."""
    if stage in ("plan", "lowered", "kernels") or format not in (None, "text", "python", "json"):
        raise OptionError(
            f"show the difference in stage {stage!r} as {format or 'text'!r}",
            found="there are differences of tree, graph and sites, as text, python or json",
            do="choose one of these",
        )
    after = routed_graph(graph, request)
    before = dense_graph(graph)
    kind = "python" if format == "python" or stage == "graph" else "text"
    writer = listing if kind == "python" else _stage_text(stage, depth)
    lines = list(
        difflib.unified_diff(
            writer(before).splitlines(), writer(after).splitlines(), "dense", "routed", lineterm="", n=2
        )
    )
    if format == "json":
        models = {"before": schema.model(before), "after": schema.model(after)}
        return schema.to_text(schema.head("diff") | models | {"of": stage, "lines": lines})
    return "\n".join(lines) + "\n"


def _stage_text(stage: str, depth: int | None) -> Callable[[Graph], str]:
    if stage == "sites":
        return sites_text
    return lambda graph: tree_text(graph, build_regions(graph, applied_marks(graph.root)), depth=depth)
