"""What must hold before a scheduled graph runs: flights ended once and not read before, deadlines, memory, order."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from moefx.graph import Graph
from moefx.passes.schedule.graph_tasks import tasks_of
from moefx.passes.schedule.lint import Problem, lint
from moefx.passes.schedule.mark import mark_of

Array = NDArray[np.float64]


def lint_graph(graph: Graph, devices: int, *, memory_bytes: Array | float | None = None) -> list[Problem]:
    """Return everything that is wrong with a scheduled graph; nothing if it can run.

    Args:
        graph: with marks.
        devices: G.
        memory_bytes: that each device has for activations and buffers.
    """
    problems = _order(graph.nodes)
    if problems:
        return problems
    problems += [problem for node in graph.nodes for problem in _flight(node)]
    problems += [problem for node in graph.nodes for problem in _evicted(node, graph.nodes)]
    return problems + lint(tasks_of(graph), devices, memory_bytes=memory_bytes)


def inexact(graph: Graph) -> list[str]:
    """Return the names of nodes whose results are not those of the model."""
    return [node.name for node in graph.nodes if (mark := mark_of(node)) is not None and not mark.exact]


def _order(nodes: Sequence[Node]) -> list[Problem]:
    problems, seen = [], set[Node]()
    for node in nodes:
        missing = [read.name for read in node.all_input_nodes if read not in seen]
        if missing:
            problems.append(Problem("order", node.name, f"reads {', '.join(missing)}, not computed before it"))
        seen.add(node)
    return problems


def _flight(node: Node) -> list[Problem]:
    """Check what one node begins, or ends: an exchange, a copy of weights."""
    mark = mark_of(node)
    if mark is None or not (mark.begins or mark.waits):
        return []
    problems = []
    if mark.begins:
        waits = [user for user in node.users if _is_wait(user)]
        if len(waits) != 1:
            found = "nothing waits for it" if not waits else f"{', '.join(w.name for w in waits)} all wait for it"
            problems.append(Problem("wait", node.name, found))
        readers = [user.name for user in node.users if not _is_wait(user)]
        if readers:
            problems.append(Problem("early", node.name, f"{', '.join(readers)} reads what may not have arrived"))
    if mark.waits and not any(_begins(read) for read in node.all_input_nodes):
        problems.append(Problem("wait", node.name, "it waits for nothing that was begun"))
    return problems


def _is_wait(node: Node) -> bool:
    mark = mark_of(node)
    return mark is not None and mark.waits


def _begins(node: Node) -> bool:
    mark = mark_of(node)
    return mark is not None and mark.begins


def _evicted(node: Node, nodes: Sequence[Node]) -> list[Problem]:
    """Find readers of weights that were given up before."""
    mark = mark_of(node)
    if mark is None or mark.role != "evict":
        return []
    place = {n: i for i, n in enumerate(nodes)}
    late = [
        user.name
        for given_up in node.args[:1]
        if isinstance(given_up, Node)
        for user in _readers(given_up)
        if user is not node and place[user] > place[node]
    ]
    return [Problem("evict", node.name, f"{', '.join(late)} reads what it gave up")] if late else []


def _readers(node: Node) -> list[Node]:
    """Return the users of a value, through reads of its items."""
    found = []
    for user in node.users:
        found += _readers(user) if user.target is operator.getitem else [user]
    return found
