"""Plans and reports as text tables: fixed width, no colour, the same bytes for the same data."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moefx.inspect.describe import describe_site
from moefx.inspect.text import WIDTH, clean, count, merge_names, type_of
from moefx.passes.analysis import analyse

if TYPE_CHECKING:
    from moefx.graph import Graph
    from moefx.model.plan import Plan
    from moefx.model.report import Report


def table_text(title: str, columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; ``columns`` are (header, justification)."""
    table = Table(title=escape(clean(title)), title_justify="left", box=None, pad_edge=False, show_edge=False)
    for header, justify in columns:
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(clean(cell)) for cell in row))
    return render(table)


def render(*parts: object) -> str:
    """Render rich objects as plain text of fixed width."""
    out = io.StringIO()
    console = Console(
        file=out, width=WIDTH, color_system=None, force_terminal=False, highlight=False, legacy_windows=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def plan_text(plan: Plan) -> str:
    """Return a plan as text."""
    cost = plan.cost
    head = [
        f"plan for {plan.model}: {plan.recipe or ', '.join(p.name for p in plan.passes)}, seed {plan.seed}",
        *(f"  pass {p.name} {{{', '.join(f'{k}={v}' for k, v in p.options.items())}}}" for p in plan.passes),
        f"  parameters {count(cost.parameters_before)} -> {count(cost.parameters_after)}"
        f"   memory {count(cost.bytes_before)}B -> {count(cost.bytes_after)}B",
        f"  FLOPs per forward {count(cost.flops_before)} -> {count(cost.flops_after)} active"
        f"   ({cost.flops_ratio:.3f} of the dense model)",
        f"  expected speed: {1 / cost.flops_ratio:.2f}x by FLOPs,"
        f" about {0.85 / cost.flops_ratio:.2f}x when routing costs 15 %",
    ]
    left = ("site", "kind", "role", "rule", "realised at")
    columns = [*((header, "left") for header in left), ("parameters", "right"), ("active", "right")]
    rows = [
        (
            s.name,
            f"{s.kind} {s.flavour}".strip(),
            s.role,
            s.rule,
            f"{s.tier} {s.block or s.module or ''}".strip(),
            f"{count(s.parameters_before)} -> {count(s.parameters_after)}",
            f"{s.active_after / max(1, s.active_before):.2f}",
        )
        for s in plan.sites
    ]
    parts = ["\n".join(head) + "\n", table_text(f"{len(plan.sites)} sites to rewrite", columns, rows)]
    if plan.skipped:
        skipped = [(s.name, s.kind, s.reason, s.source) for s in plan.skipped]
        titles = (("site", "left"), ("kind", "left"), ("why it stays dense", "left"), ("source", "left"))
        parts.append(table_text(f"{len(plan.skipped)} sites skipped", titles, skipped))
    parts += [f"warning: {warning}\n" for warning in plan.warnings]
    return "\n".join(parts)


def report_text(report: Report) -> str:
    """Return a report as text."""
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    head = f"{plan_text(report.plan)}\nproof: {report.proof_summary()}\ntimes: {times}\n"
    return head + (f"\n{checks_text(report)}" if report.checks else "")


def checks_text(report: Report) -> str:
    """Return the checks of a report as text."""
    left = ("site", "contract")
    columns = [
        *((header, "left") for header in left),
        ("relative error", "right"),
        ("bound", "right"),
        ("dtype", "left"),
    ]
    rows = [(c.name, c.contract, f"{c.error:.2e}", f"{c.bound:.1e}", c.dtype) for c in report.checks]
    return table_text("checked against the dense site", columns, rows)


def sites_text(graph: Graph) -> str:
    """Return all sites of a graph as text."""
    columns = (("site", "left"), ("what it is", "left"), ("reads", "left"), ("region", "left"))
    rows = [
        (s.name, describe_site(s), _reads(s), "module" if s.region_is_module else "inline")
        for s in analyse(graph).sites
    ]
    return table_text(f"{len(rows)} sites of {type(graph.root).__name__}", columns, rows)


def _reads(site: Any) -> str:
    value = site.operands.get("x")
    return type_of(value.meta.get("val")) if value is not None else ""


def misses_text(graph: Graph) -> str:
    """Return all near misses of a graph as text, those of one reason together."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for miss in analyse(graph).misses:
        shape = ".".join("#" if p.isdigit() else p for p in miss.module_path.split("."))
        groups.setdefault((miss.kind, shape, miss.reason, miss.source_line), []).append(miss)
    columns = (("almost a site", "left"), ("kind", "left"), ("first condition that failed", "left"), ("source", "left"))
    rows = []
    for (kind, _, reason, source), found in groups.items():
        paths = list(dict.fromkeys(m.module_path or m.node.name for m in found))
        rows.append((merge_names(paths), kind, reason, source))
    total = sum(len(found) for found in groups.values())
    return table_text(f"{total} near misses", columns, rows) if rows else "no near misses\n"
