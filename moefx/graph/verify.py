"""Structural rules that every graph keeps, checked after each pass."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moefx.errors import VerifyError
from moefx.graph.graph import Graph
from moefx.graph.origin import origin_of, show_source
from moefx.graph.splice import unstamped

_CONTEXT_LINES = 8


def verify_graph(graph: Graph, after: str) -> None:
    """Check definition before use, provenance, targets, guards and shapes.

    Raises:
        VerifyError: a rule is broken; the message shows the node and the lines around it.
    """
    try:
        graph.fx.lint()
    except (RuntimeError, AssertionError) as error:
        raise _broken(graph, None, after, str(error)) from error
    for node in unstamped(graph):
        raise _broken(graph, node, after, "it has no provenance")
    nodes = set(graph.fx.nodes)
    for guard in graph.guards:
        if guard.node not in nodes:
            raise _broken(graph, None, after, f"a guard watches an erased node: {guard.source}")
    for node in graph.fx.nodes:
        _check_target(graph, node, after)


def _check_target(graph: Graph, node: Node, after: str) -> None:
    try:
        if node.op == "call_module":
            graph.root.get_submodule(str(node.target))
        elif node.op == "get_attr":
            graph.parameter(str(node.target))
    except AttributeError as error:
        raise _broken(graph, node, after, f"{node.target!r} does not exist in the model") from error


def check_shapes(graph: Graph, after: str) -> None:
    """Re-derive the shape of every plain function node and compare it with what the node claims.

    Raises:
        VerifyError: a shape or dtype differs.
    """
    for node in graph.fx.nodes:
        claimed = node.meta.get("val")
        if (
            node.op != "call_function"
            or not isinstance(claimed, torch._subclasses.FakeTensor)
            or "context" in node.meta
        ):
            continue
        values = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        with claimed.fake_mode, torch.no_grad():
            assert callable(node.target)
            found = node.target(*values[0], **values[1])
        if isinstance(found, torch.Tensor) and (found.shape != claimed.shape or found.dtype != claimed.dtype):
            what = f"{found.dtype} {tuple(found.shape)} is claimed as {claimed.dtype} {tuple(claimed.shape)}"
            raise _broken(graph, node, after, what)


def _broken(graph: Graph, node: Node | None, after: str, why: str) -> VerifyError:
    lines = [f"{n.name} = {n.op} {n.target} {n.args}" for n in graph.fx.nodes]
    around = ""
    if node is not None:
        at = list(graph.fx.nodes).index(node)
        window = range(max(0, at - _CONTEXT_LINES), min(len(lines), at + _CONTEXT_LINES + 1))
        around = "\n" + "\n".join(f"{'>' if i == at else ' '} {lines[i]}" for i in window)
    where = f"node {node.name} from {show_source(origin_of(node).source)}: " if node is not None else ""
    return VerifyError(
        f"verify the graph after {after}", found=f"{where}{why}{around}", do="report this as a bug of the pass"
    )
