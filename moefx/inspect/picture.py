"""A module-level picture of a region tree: boxes in boxes, arrows along the data flow; and its DOT form.

Repeated blocks are one box. Arrows run between the boxes of one level only, so that a picture of nested boxes never has
to cross a border; of parallel paths only the longest is drawn (transitive reduction).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from moefx.graph import Graph
from moefx.inspect.fold import Row, fold_region
from moefx.inspect.regions import Region
from moefx.inspect.text import clean, first_of, type_of

_LONGEST = 44


@dataclass(eq=False)
class Box:
    """One box: ``lines`` of text, boxes inside it, and arrows between these by position."""

    lines: tuple[str, ...]
    kind: str
    children: list[Box] = field(default_factory=list)
    arrows: list[tuple[int, int]] = field(default_factory=list)


def picture(graph: Graph, region: Region) -> Box:
    """Return the picture of ``graph``; inputs and output are boxes of the first level."""
    boxes: list[tuple[Box, tuple[Node, ...]]] = []
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            boxes.append((Box((clean(node.name), type_of(node.meta.get("val"))), "input"), (node,)))
    boxes += _boxes(fold_region(region).children, {})
    output = tuple(n for n in graph.fx.nodes if n.op == "output")
    boxes.append((Box(("output", first_of(region.output)), "output"), output))
    root = Box((region.type_name,), "model")
    _connect(root, boxes, graph.nodes)
    return root


def _boxes(rows: list[Row], shown: dict[Any, str]) -> list[tuple[Box, tuple[Node, ...]]]:
    """Return a box for every row, with the nodes of all its repetitions; equal insides are drawn once."""
    made = []
    for row in rows:
        if row.regions and row.regions[0].trivial:
            continue
        if not row.regions:
            inner = _boxes(row.children, shown)
            nodes = tuple(n for _, part in inner for n in part)
            box = Box((f"{len(inner)} in turn ×{row.repeat}",), "block")
            _connect(box, inner, list(nodes))
        else:
            box, nodes = _box(row, shown), tuple(n for r in row.regions for n in r.nodes)
        made.append((box, nodes))
    return made


def _box(row: Row, shown: dict[Any, str]) -> Box:
    region = row.regions[0]
    inside = tuple(child.signature() for child in region.children)
    if inside in shown:
        return Box((*_lines(row), f"inside as {shown[inside]}"), _kind(region))
    if inside:
        shown[inside] = _cut(clean(region.name))
    box = Box(_lines(row), _kind(region))
    _connect(box, _boxes(row.children, shown), list(region.nodes))
    return box


def _lines(row: Row) -> tuple[str, ...]:
    region = row.regions[0]
    repeat = f" ×{row.repeat}" if row.repeat > 1 else ""
    marks = [f"[{mark}]" for mark in region.marks]
    lines = [f"{row.label}{repeat}", region.detail, *marks, first_of(region.output)]
    return tuple(_cut(line) for line in lines if line)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _kind(region: Region) -> str:
    if any(mark.startswith("routed") for mark in region.marks):
        return "routed"
    if region.site is not None:
        return region.site.kind
    return "block" if region.children else "module"


def _connect(owner: Box, parts: list[tuple[Box, tuple[Node, ...]]], nodes: list[Node]) -> None:
    """Give ``owner`` its boxes and the arrows between them, found by following the data through ``nodes``."""
    owner.children = [box for box, _ in parts]
    inside = {node: i for i, (_, members) in enumerate(parts) for node in members}
    reached: dict[Node, frozenset[int]] = {}
    arrows: set[tuple[int, int]] = set()
    for node in nodes:
        sources = frozenset().union(*(reached.get(used, frozenset()) for used in node.all_input_nodes))
        at = inside.get(node)
        if at is None:
            reached[node] = frozenset() if _is_scalar(node) else sources
            continue
        reached[node] = frozenset({at})
        arrows |= {(source, at) for source in sources if source != at}
    forward = nx.DiGraph(sorted((a, b) for a, b in arrows if a < b))
    owner.arrows = sorted(nx.transitive_reduction(forward).edges) if forward.number_of_edges() else []


def _is_scalar(node: Node) -> bool:
    """Tell whether a node is a size or a dtype: what only reads these does not read the data."""
    return isinstance(node.meta.get("val"), bool | int | float | torch.dtype | torch.device | torch.Size | str)


def dot_text(graph: Graph, region: Region) -> str:
    """Return the picture as a DOT file."""
    root = picture(graph, region)
    lines = [
        "digraph model {",
        f"  label={_quoted(root.lines)}; labelloc=t; compound=true; rankdir=TB;",
        '  node [shape=box, fontname="sans-serif", fontsize=10]; graph [fontname="sans-serif", fontsize=10];',
        *_dot(root, "n", "  "),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _dot(box: Box, name: str, indent: str) -> list[str]:
    lines = []
    for i, child in enumerate(box.children):
        if child.children:
            lines.append(f"{indent}subgraph cluster_{name}_{i} {{ label={_quoted(child.lines)};")
            lines += _dot(child, f"{name}_{i}", indent + "  ")
            lines.append(f"{indent}}}")
        else:
            lines.append(f"{indent}{name}_{i} [label={_quoted(child.lines)}, class={_quoted((child.kind,))}];")
    for a, b in box.arrows:
        tail, head = f"{name}_{a}", f"{name}_{b}"
        ends = [f"ltail=cluster_{tail}"] if box.children[a].children else []
        ends += [f"lhead=cluster_{head}"] if box.children[b].children else []
        start, end = _leaf(box.children[a], tail, last=True), _leaf(box.children[b], head, last=False)
        lines.append(f"{indent}{start} -> {end}{f' [{chr(44).join(ends)}]' if ends else ''};")
    return lines


def _leaf(box: Box, name: str, *, last: bool) -> str:
    while box.children:
        i = len(box.children) - 1 if last else 0
        box, name = box.children[i], f"{name}_{i}"
    return name


def _quoted(lines: tuple[str, ...]) -> str:
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'
