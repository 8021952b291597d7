"""The graph of a step as the tasks of the simulated clock, and in the order that the clock finds best.

Every marked node is a task; free nodes only carry dependencies. What changes tensors in place or draws random numbers
keeps its place among its like and among the readers of what it changes.

Legend: N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch.fx import Node

from moefx.graph import Graph
from moefx.graph.splice import is_inplace
from moefx.passes.schedule.mark import Mark, mark_of
from moefx.passes.schedule.order import in_best_order
from moefx.passes.schedule.task import Task

_RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial", "uniform")


def tasks_of(graph: Graph) -> list[Task]:
    """Return the marked nodes of a graph as tasks, in the order of the graph."""
    nodes = graph.nodes
    extra = kept_order(nodes)
    behind: dict[Node, frozenset[str]] = {}
    tasks: list[Task] = []
    for node in nodes:
        before = [*node.all_input_nodes, *extra.get(node, ())]
        after = frozenset().union(*(behind[n] for n in before))
        mark = mark_of(node)
        behind[node] = after
        if mark is not None:
            tasks.append(_task(node, mark, tuple(sorted(after))))
            behind[node] = frozenset((node.name,))
    return tasks


def _task(node: Node, mark: Mark, after: tuple[str, ...]) -> Task:
    return Task(
        name=node.name,
        role=mark.role,
        stream=mark.stream,
        seconds=mark.seconds,
        after=after,
        collective=mark.collective,
        layer=mark.layer,
        chunk=mark.chunk,
        wire_bytes=mark.wire_bytes,
        holds_bytes=mark.holds_bytes,
        deadline=mark.deadline,
    )


def order_graph(graph: Graph) -> list[Task]:
    """Bring the nodes of a graph into the best order the clock finds, in place, and return the tasks in that order."""
    tasks = in_best_order(tasks_of(graph))
    nodes = graph.nodes
    extra, by_name = kept_order(nodes), {node.name: node for node in nodes}
    wanted: list[Node] = []
    done: set[Node] = set()
    leading = [node for node in nodes if node.op == "placeholder"]
    for node in [*leading, *(by_name[task.name] for task in tasks), *nodes]:
        _emit(node, extra, done, wanted)
    place = graph.output_node
    for node in wanted:
        if node is not place:
            place.prepend(node)
    graph.touch()
    graph.fx.lint()
    return tasks_of(graph)


def _emit(node: Node, extra: dict[Node, list[Node]], done: set[Node], wanted: list[Node]) -> None:
    """Append ``node`` after all that it needs; without recursion, for graphs are deep."""
    stack = [(node, False)]
    while stack:
        at, ready = stack.pop()
        if at in done:
            continue
        if ready:
            done.add(at)
            wanted.append(at)
            continue
        stack.append((at, True))
        stack += [(n, False) for n in reversed([*at.all_input_nodes, *extra.get(at, ())]) if n not in done]


def kept_order(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """Return for each node those that must come before it though it does not read them.

    A node that writes in place comes after the earlier readers of that tensor and of its views, and before the later
    ones. Nodes that draw random numbers stay in line.
    """
    place = {node: i for i, node in enumerate(nodes)}
    extra: dict[Node, list[Node]] = {}
    for writer in (node for node in nodes if is_inplace(node)):
        touching = sorted(_touching(writer), key=place.__getitem__)
        earlier = [n for n in touching if place[n] < place[writer]]
        extra.setdefault(writer, []).extend(earlier)
        for later in touching:
            if place[later] > place[writer]:
                extra.setdefault(later, []).append(writer)
    drawing = [node for node in nodes if _draws(node)]
    for before, node in pairwise(drawing):
        extra.setdefault(node, []).append(before)
    return extra


def _touching(writer: Node) -> set[Node]:
    """Return the nodes that read or write the tensor that ``writer`` changes, or a view of it."""
    bases = [a for a in writer.args[:1] if isinstance(a, Node)]
    while bases and bases[-1].op != "get_attr" and bases[-1].args and isinstance(bases[-1].args[0], Node):
        if not _may_alias(bases[-1]):
            break
        bases.append(bases[-1].args[0])
    roots = _same_attribute(bases[-1]) if bases else []
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in found and user.op != "output":
                found.add(user)
                stack += [user] if _may_alias(user) or is_inplace(user) else []
    return found - {writer}


def _same_attribute(node: Node) -> Iterable[Node]:
    if node.op != "get_attr":
        return [node]
    return [n for n in node.graph.nodes if n.op == "get_attr" and n.target == node.target]


def _may_alias(node: Node) -> bool:
    """Whether the result may share memory with an input: not if the operator's name says that it computes."""
    if is_inplace(node):
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _VIEWS or node.op == "call_module"


_VIEWS = frozenset(
    [
        "view", "reshape", "expand", "expand_as", "transpose", "permute", "t", "mT", "T", "unsqueeze", "squeeze",
        "chunk", "split", "unbind", "getitem", "narrow", "select", "flatten", "unflatten", "view_as", "detach", "to",
        "float", "double", "contiguous", "tensor_split", "movedim", "swapaxes", "real", "imag", "as_strided", "getattr",
    ]
)  # fmt: skip


def _draws(node: Node) -> bool:
    name = str(node.target).lower() if node.op != "call_function" else getattr(node.target, "__name__", "").lower()
    return any(word in name for word in _RANDOM)
