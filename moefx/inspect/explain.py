"""Why a site matched, or what came nearest and the first condition that failed."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from moefx.errors import NothingMatched, nearest
from moefx.graph import Graph
from moefx.graph.origin import origin_of, show_source
from moefx.inspect import schema
from moefx.inspect.describe import describe_site
from moefx.inspect.listing import statement
from moefx.inspect.text import clean, count, fit, literal, type_of, wrap
from moefx.passes.analysis import analyse
from moefx.passes.analysis.site import Miss, Site, Weight

_AROUND = 8
_SHOWN = 6


class Explanation:
    """What is known about one name: the sites called so, and the near misses there.

    Raises:
        NothingMatched: the model has neither a site nor a module nor a node of that name.
    """

    def __init__(self, graph: Graph, name: str, marks: dict[str, str]) -> None:
        self.graph, self.name, self.marks = graph, name, marks
        facts = analyse(graph)
        self.sites = [s for s in facts.sites if _called(name, s.name, s.path)]
        inside = [m for m in facts.misses if _within(name, m.module_path) or name == m.node.name]
        self.misses = sorted(inside, key=lambda m: -m.progress)
        if not self.sites and not self.misses:
            self._check_known()

    def _check_known(self) -> None:
        modules = {path for path, _ in self.graph.root.named_modules() if path}
        nodes = {n.name for n in self.graph.fx.nodes}
        if any(_called(self.name, path) for path in modules) or self.name in nodes:
            return
        known = [s.name for s in analyse(self.graph).sites] + sorted(modules)
        close = difflib.get_close_matches(self.name, known, n=5, cutoff=0.4)
        raise NothingMatched(
            f"explain {clean(self.name)!r}",
            found="no site, module or node of that name",
            do=nearest(self.name, close) if close else "list the sites with the sites stage",
        )

    def text(self) -> str:
        """Return the explanation as text."""
        lines: list[str] = []
        for site in self.sites[:_SHOWN]:
            lines += [*self._site(site), ""]
        if len(self.sites) > _SHOWN:
            lines += [f"and {len(self.sites) - _SHOWN} more sites match {clean(self.name)!r}", ""]
        for miss in self.misses[:_SHOWN]:
            lines += [*self._miss(miss), ""]
        if len(self.misses) > _SHOWN:
            lines += [f"and {len(self.misses) - _SHOWN} more near misses, each with fewer matching nodes", ""]
        if not lines:
            lines = [f"{clean(self.name)}: no site, and nothing in it comes near one", *self._operations()]
        return "\n".join(lines).rstrip() + "\n"

    def json(self) -> dict[str, Any]:
        """Return the explanation as data."""
        return {
            "name": self.name,
            "sites": [schema.site(s) | {"mark": self._mark(s)} for s in self.sites],
            "misses": [schema.miss(m) for m in self.misses],
        }

    def _mark(self, site: Site) -> str | None:
        return self.marks.get(site.name) or self.marks.get(f"{site.kind} {site.path}")

    def _site(self, site: Site) -> list[str]:
        lines = [fit(f"{clean(site.name)}: {describe_site(site)}")]
        facts = {
            "why": site.why,
            "where": f"module {site.path or '(the model itself)'}, call {site.call_index}; "
            + ("the region is the whole module" if site.region_is_module else "the region is a part of the module"),
            "source": show_source(origin_of(site.output).source),
            "rewrite": self._mark(site) or "none asked for; name a recipe to see what it would do",
            "shapes": ", ".join(f"{k} {literal(v)}" for k, v in site.shapes.items()),
            "read outside": ", ".join(_read_outside(site)) or "nothing, the region can be removed",
        }
        for title, text in facts.items():
            lines += wrap(f"  {title:<13} {clean(text)}", " " * 16)
        lines.append("  operands")
        for name, value in site.operands.items():
            lines += wrap(f"    {clean(name):<11} {self._operand(value)}", " " * 16)
        return lines

    def _operand(self, value: Any) -> str:
        if isinstance(value, Weight):
            return f"{clean(value)}  {type_of(self.graph.parameter(value.fqn))}"
        if isinstance(value, Node):
            return f"{clean(value.name)}  {type_of(value.meta.get('val'))}"
        if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
            return f"{len(value)} of {clean(type(value[0]).__name__)}"
        return clean(value) if value is not None else "none"

    def _miss(self, miss: Miss) -> list[str]:
        place = clean(miss.module_path) or "the model itself"
        lines = [fit(f"{place}: almost {_article(miss.kind)}, at {clean(miss.node.name)}")]
        passed = ", ".join(miss.passed) or f"{count(miss.progress)} nodes matched"
        facts = {"failed": miss.reason, "held before": passed, "source": show_source(miss.source_line)}
        for title, text in facts.items():
            lines += wrap(f"  {title:<13} {clean(text)}", " " * 16)
        return [*lines, *_around(self.graph, miss.node)]

    def _operations(self) -> list[str]:
        found = [n for n in self.graph.fx.nodes if _within(self.name, origin_of(n).path) or n.name == self.name]
        shown = [line for n in found if n.op not in ("placeholder", "output") for line in statement(n)]
        more = [f"    and {len(shown) - 20} more lines"] if len(shown) > 20 else []
        return [*(fit(line) for line in shown[:20]), *more]


def _read_outside(site: Site) -> list[str]:
    """Return the inner values that something else computes with; reading a size or a device does not count."""
    inside = set(site.nodes)
    return [
        clean(n.name)
        for n in site.escapes()
        if any(u not in inside and isinstance(u.meta.get("val"), torch.Tensor | tuple | list) for u in n.users)
    ]


def _article(kind: str) -> str:
    return {"ffn": "a feed-forward network", "attention": "an attention", "block": "a block"}.get(kind, kind)


def _called(name: str, *candidates: str) -> bool:
    return any(c == name or fnmatch.fnmatchcase(c, name) for c in candidates)


def _within(name: str, path: str) -> bool:
    parts = path.split(".")
    return any(_called(name, ".".join(parts[: i + 1])) for i in range(len(parts)))


def _around(graph: Graph, node: Node) -> list[str]:
    """Return the lines of the graph around ``node``."""
    nodes: Sequence[Node] = [n for n in graph.fx.nodes if n.op not in ("placeholder", "output")]
    at = nodes.index(node) if node in nodes else 0
    lines = []
    for near in nodes[max(0, at - _AROUND) : at + _AROUND + 1]:
        mark = " >" if near is node else "  "
        lines += [fit(mark + line) for line in statement(near)]
    return lines
