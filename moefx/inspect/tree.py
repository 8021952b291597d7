"""The default dump: the region tree as text, one line per block, repeats folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moefx.graph import Graph
from moefx.inspect.fold import Row, fold_region
from moefx.inspect.regions import Region
from moefx.inspect.text import WIDTH, clean, count, dtype_name, first_of, fit, merge_names, numberless, type_of, wrap
from moefx.passes.analysis import analyse
from moefx.passes.analysis.site import Miss

_INDENT = "  "
_NAME_WIDTH, _CLASS_WIDTH, _DETAIL_WIDTH, _OUTPUT_WIDTH = 40, 36, 44, 24
_MISSES = 8


def tree_text(graph: Graph, region: Region, *, depth: int | None = None, note: str = "") -> str:
    """Return the region tree of ``graph`` as text.

    Args:
        graph: the graph that ``region`` was built from.
        region: its tree.
        depth: how many levels to show below the model; all by default.
        note: one more line below the title.
    """
    rows = [_Line(*found) for found in _flatten(fold_region(region), depth)]
    lines = [*_head(graph, region), *([fit(note)] if note else []), ""]
    names = min(_NAME_WIDTH, max((len(row.name) for row in rows), default=0))
    details = min(_DETAIL_WIDTH, max((len(row.detail) for row in rows), default=0))
    outputs = min(_OUTPUT_WIDTH, max((len(row.output) for row in rows), default=0))
    lines.append(f"{'module':<{names}}  {'what it is':<{details}}  {'output':<{outputs}}  weights")
    for row in rows:
        lines += row.show(names, details, outputs)
    return "\n".join([*lines, *_why_not(graph)]).rstrip() + "\n"


def _head(graph: Graph, region: Region) -> list[str]:
    facts = analyse(graph)
    kinds: dict[str, int] = {}
    for site in facts.sites:
        kinds[site.kind] = kinds.get(site.kind, 0) + 1
    routed = sum(1 for r in region.walk() if any(m.startswith("routed") for m in r.marks))
    sites = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "no"
    dtypes = dict.fromkeys(dtype_name(p.dtype) for p in graph.root.parameters())
    title = f"{region.type_name}: {count(region.parameters)} parameters ({', '.join(dtypes) or 'none'})"
    inputs = [f"{clean(n.name)} {type_of(n.meta.get('val'))}" for n in graph.fx.nodes if n.op == "placeholder"]
    return [
        fit(f"{title}, {sites} sites, {routed or 'nothing'} routed"),
        *wrap(f"inputs  {', '.join(inputs)}", "        "),
        fit(f"output  {', '.join(region.output)}"),
    ]


def _flatten(root: Row, depth: int | None) -> Iterable[tuple[Row, int, str]]:
    """Yield the rows below the root, their levels, and the name of an equal subtree that was shown before."""
    stack = [(row, 0) for row in reversed(root.children)]
    shown: dict[Any, str] = {}
    while stack:
        row, level = stack.pop()
        if row.regions and row.regions[0].trivial:
            continue
        inside = tuple(child.signature() for child in row.regions[0].children) if row.regions else ()
        earlier = shown.get(inside, "") if inside else ""
        yield row, level, earlier
        if inside and not earlier:
            shown[inside] = clean(row.regions[0].name)
        if not earlier and (depth is None or level + 1 < depth):
            stack += [(child, level + 1) for child in reversed(row.children)]


class _Line:
    """One row, cut into columns."""

    def __init__(self, row: Row, level: int, earlier: str) -> None:
        region = row.regions[0] if row.regions else None
        repeat = f"  ×{row.repeat}" if row.repeat > 1 else ""
        label = row.label if region else f"{len(row.children)} in turn"
        self.indent = _INDENT * level
        self.name = f"{self.indent}{label}{repeat}"
        self.detail = region.detail if region and region.site else fit(region.detail, _CLASS_WIDTH) if region else ""
        self.output = first_of(region.output) if region else ""
        self.size = count(region.parameters) if region and region.parameters else ""
        self.marks = [f"[{mark}]" for mark in region.marks] if region else []
        self.marks += [f"(inside as {earlier})"] if earlier else []

    def show(self, names: int, details: int, outputs: int) -> list[str]:
        """Return the line, and more lines for marks that do not fit."""
        line = f"{self.name:<{names}}  {self.detail:<{details}}  {self.output:<{outputs}}  {self.size:>7}"
        lines = [line]
        for mark in self.marks:
            if len(lines[-1].rstrip()) + 2 + len(mark) <= WIDTH:
                lines[-1] = f"{lines[-1].rstrip()}  {mark}"
            else:
                lines += wrap(f"{self.indent}{_INDENT}{mark}", self.indent + _INDENT * 2)
        return [fit(text) for text in lines]


def _why_not(graph: Graph) -> list[str]:
    """List what is almost a site, one line per reason."""
    groups: dict[tuple[str, str], list[Miss]] = {}
    for miss in analyse(graph).misses:
        groups.setdefault((miss.kind, miss.reason), []).append(miss)
    if not groups:
        return []
    lines = ["", "almost sites, and the first condition that failed"]
    for (kind, reason), found in list(groups.items())[:_MISSES]:
        lines += wrap(f"{_INDENT}{kind}  {clean(_places(found))}: {clean(reason)}", _INDENT * 3)
    if len(groups) > _MISSES:
        lines.append(f"{_INDENT}and {len(groups) - _MISSES} more reasons: see the sites stage")
    return lines


def _places(found: Sequence[Miss]) -> str:
    """Name the modules of several misses, those that differ in numbers only as one."""
    merged: dict[str, list[str]] = {}
    for miss in found:
        path = miss.module_path or miss.node.name
        merged.setdefault(numberless(path), []).append(path)
    names = [merge_names(list(dict.fromkeys(paths))) for paths in merged.values()]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
