"""The picture of a model as SVG: nested boxes laid out in layers, without any external program."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import networkx as nx

from moefx.graph import Graph
from moefx.inspect.picture import Box, picture
from moefx.inspect.regions import Region

_FONT, _LINE, _CHAR = 11, 15, 6.7
_PAD, _GAP_X, _GAP_Y, _TITLE = 10, 24, 26, 20
_FILLS = {
    "input": "#eef2f7", "output": "#eef2f7", "module": "#ffffff", "block": "#fafafa", "ffn": "#fdeecf",
    "attention": "#dcebfb", "routed": "#d9f2dc",
}  # fmt: skip


@dataclass(eq=False)
class _Placed:
    """A box with its size, and the positions of its children inside it."""

    box: Box
    width: float
    height: float
    children: list[tuple[_Placed, float, float]]


def svg_text(graph: Graph, region: Region) -> str:
    """Return the picture of ``graph`` as a self-contained SVG file."""
    placed = _place(picture(graph, region))
    width, height = placed.width + 2 * _PAD, placed.height + 2 * _PAD
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(width)}" height="{_n(height)}" '
        f'viewBox="0 0 {_n(width)} {_n(height)}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="{_FONT}">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *_draw(placed, _PAD, _PAD),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _place(box: Box) -> _Placed:
    """Lay out a box: its children in layers along the arrows, top to bottom."""
    text = max((len(line) for line in box.lines), default=0) * _CHAR + 2 * _PAD
    if not box.children:
        return _Placed(box, text, len(box.lines) * _LINE + _PAD, [])
    inner = [_place(child) for child in box.children]
    layers = _layers(box)
    top = _TITLE + _PAD + (len(box.lines) - 1) * _LINE
    total = max(sum(inner[i].width for i in layer) + _GAP_X * (len(layer) - 1) for layer in layers)
    width = max(total, text) + 2 * _PAD
    children, y = [], float(top)
    for layer in layers:
        row = sum(inner[i].width for i in layer) + _GAP_X * (len(layer) - 1)
        x = (width - row) / 2
        for i in layer:
            children.append((i, inner[i], x, y))
            x += inner[i].width + _GAP_X
        y += max(inner[i].height for i in layer) + _GAP_Y
    children.sort(key=lambda item: item[0])
    return _Placed(box, width, y - _GAP_Y + _PAD, [(placed, x, y) for _, placed, x, y in children])


def _layers(box: Box) -> list[list[int]]:
    """Return the children layer by layer: each below all it reads, as low as what it feeds allows."""
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(box.children)))
    flow.add_edges_from(box.arrows)
    level = dict.fromkeys(flow, 0)
    for i in sorted(flow):
        level[i] = max((level[j] + 1 for j in flow.predecessors(i)), default=0)
    last = max(level.values())
    for i in sorted(flow, reverse=True):
        below = [level[j] - 1 for j in flow.successors(i)]
        level[i] = min(below) if below else (last if not list(flow.predecessors(i)) else level[i])
    layers: list[list[int]] = [[] for _ in range(last + 1)]
    for i in sorted(flow):
        layers[level[i]].append(i)
    return _ordered([layer for layer in layers if layer], flow)


def _ordered(layers: list[list[int]], flow: nx.DiGraph) -> list[list[int]]:
    """Order each layer by where its members' sources stand in the layers above (barycentres)."""
    place: dict[int, float] = {}
    for layer in layers:

        def key(i: int) -> tuple[float, int]:
            above = [place[j] for j in flow.predecessors(i) if j in place]
            return (sum(above) / len(above) if above else 0.5, i)

        layer.sort(key=key)
        for at, i in enumerate(layer):
            place[i] = (at + 0.5) / len(layer)
    return layers


def _draw(placed: _Placed, x: float, y: float) -> list[str]:
    box = placed.box
    fill = _FILLS.get(box.kind, "#ffffff")
    stroke = "#2e7d32" if box.kind == "routed" else "#888"
    out = [
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(placed.width)}" height="{_n(placed.height)}" rx="4" '
        f'fill="{fill}" stroke="{stroke}"/>'
    ]
    for i, line in enumerate(box.lines):
        weight = ' font-weight="bold"' if i == 0 else ""
        middle, base = _n(x + placed.width / 2), _n(y + 15 + i * _LINE)
        out.append(f'<text x="{middle}" y="{base}" text-anchor="middle"{weight}>{escape(line)}</text>')
    for a, b in box.arrows:
        out.append(_arrow(placed.children[a], placed.children[b], x, y))
    for child, dx, dy in placed.children:
        out += _draw(child, x + dx, y + dy)
    return out


def _arrow(tail: tuple[_Placed, float, float], head: tuple[_Placed, float, float], x: float, y: float) -> str:
    x1, y1 = x + tail[1] + tail[0].width / 2, y + tail[2] + tail[0].height
    x2, y2 = x + head[1] + head[0].width / 2, y + head[2]
    bend = (y2 - y1) / 2
    path = f"M{_n(x1)} {_n(y1)}C{_n(x1)} {_n(y1 + bend)} {_n(x2)} {_n(y2 - bend)} {_n(x2)} {_n(y2)}"
    return f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#arrow)"/>'
