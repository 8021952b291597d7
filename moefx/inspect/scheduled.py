"""A scheduled graph as text: what runs when, on which stream, and what it costs."""

from __future__ import annotations

import operator

from torch.fx import Node

from moefx.graph import Graph
from moefx.inspect.listing import call_text
from moefx.inspect.text import clean, fit
from moefx.passes.schedule import Timeline, mark_of

_HEAD = "  start µs    end µs  stream   role      layer part  node"


def scheduled_text(graph: Graph, timeline: Timeline) -> str:
    """Return the marked nodes of a graph in the order in which they run, with their times on the slowest device.

    Launches are marked ``>``, waits ``<``; nodes that cost nothing and are not part of the exchange are left out.

    Args:
        graph: with marks.
        timeline: of the graph.
    """
    place = {task.name: n for n, task in enumerate(timeline.tasks)}
    wire = f"{timeline.wire_bytes:,.0f}"
    lines = [
        f"{clean(type(graph.root).__name__)}: {timeline.total_s * 1e6:,.1f} µs on the clock, {wire} bytes sent",
        _HEAD,
    ]
    for node in graph.nodes:
        mark = mark_of(node)
        if mark is None or (mark.role in ("dense", "shared") and not timeline.end_s[place[node.name]].any()):
            continue
        n = place[node.name]
        begin, end = (float(t[n].max()) * 1e6 for t in (timeline.start_s, timeline.end_s))
        sign = ">" if mark.begins else "<" if mark.waits else " "
        where = f"{mark.layer:>5} {mark.chunk:>4}" if mark.layer >= 0 else " " * 10
        lines.append(fit(f"{begin:>10,.1f}{end:>10,.1f}  {mark.stream:<8}{sign}{mark.role:<9} {where}  {_call(node)}"))
    return "\n".join(lines) + "\n"


def _call(node: Node) -> str:
    return f"{clean(node.name)} = {call_text(node)}" if node.target is not operator.getitem else clean(node.name)
