"""Plans and reports as text tables: fixed width, no colour, the same bytes for the same data."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moefx.inspect.describe import describe_site
from moefx.inspect.text import WIDTH, clean, count, merge_names, numberless, type_of, wrap
from moefx.passes.analysis import analyse

if TYPE_CHECKING:
    from moefx.graph import Graph
    from moefx.model.plan import Plan, SitePlan, SkippedSite
    from moefx.model.report import Report, SiteCheck


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
    """Return a plan as text; sites that differ in block numbers only share a row."""
    parts = ["\n".join(_plan_head(plan)) + "\n"]
    left = ("site", "kind", "role", "rule", "realised at")
    columns = [("", "right"), *((h, "left") for h in left), ("parameters", "right"), ("active", "right")]
    parts.append(
        table_text(f"{len(plan.sites)} sites to rewrite", columns, fold_rows(_site_row(s) for s in plan.sites))
    )
    if plan.skipped:
        rows = fold_rows((_place(s), s.kind, s.reason, s.source) for s in plan.skipped)
        titles = [("", "right"), *((h, "left") for h in ("site", "kind", "why it stays dense", "source"))]
        parts.append(table_text(f"{len(plan.skipped)} sites skipped", titles, rows))
    parts += ["\n".join(wrap(f"warning: {clean(warning)}")) + "\n" for warning in plan.warnings]
    return "\n".join(parts)


def _plan_head(plan: Plan) -> list[str]:
    cost = plan.cost
    lines = [f"plan for {clean(plan.model)}: {plan.recipe or ', '.join(p.name for p in plan.passes)}, seed {plan.seed}"]
    for rule in plan.passes:
        options = ", ".join(f"{key}={value}" for key, value in rule.options.items())
        lines += wrap(f"  pass {rule.name} {clean(options)}", "    ")
    for value in plan.carried:
        what = "carried from layer to layer through" if not value.node else "passed down to"
        lines.append(f"  {value.name}: {what} {len(value.blocks)} blocks of {clean(value.source) or 'the model'}")
    if plan.expected_loss is not None:
        lines.append(f"  chosen by calibration: expected loss {plan.expected_loss:.3g}, summed over sites")
    return [
        *lines,
        f"  parameters {count(cost.parameters_before)} -> {count(cost.parameters_after)}"
        f"   memory {count(cost.bytes_before)}B -> {count(cost.bytes_after)}B",
        f"  FLOPs per forward {count(cost.flops_before)} -> {count(cost.flops_after)} active"
        f"   ({cost.flops_ratio:.3f} of the dense model)",
        f"  expected speed: {1 / cost.flops_ratio:.2f}x by FLOPs,"
        f" about {0.85 / cost.flops_ratio:.2f}x when routing costs 15 %",
    ]


def _place(skipped: SkippedSite) -> str:
    """Return the name of a site, or the module of what is only almost one."""
    return skipped.name if skipped.rule else skipped.name.partition(":")[0]


def _site_row(site: SitePlan) -> tuple[str, ...]:
    return (
        site.name,
        f"{site.kind} {site.flavour}".strip(),
        site.role,
        " ".join([site.rule, *(f"{key}={value}" for key, value in site.options.items())]),
        "its module" if site.tier == "module" else f"block {site.block or '(the model)'}",
        f"{count(site.parameters_before)} -> {count(site.parameters_after)}",
        _active(site),
    )


def _active(site: SitePlan) -> str:
    """Return the share of a site's compute that one token uses; nothing where the pass leaves it as it is."""
    if site.active_before:
        return f"{site.active_after / site.active_before:.2f}"
    return f"{1 - site.saved_fraction:.2f}" if site.saved_fraction else ""


def fold_rows(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Merge rows that differ in the numbers of dotted names only, and put ``×n`` before each."""
    groups: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for row in rows:
        groups.setdefault(tuple(numberless(cell) for cell in row), []).append(row)
    return [
        (
            f"{len(found)}×" if len(found) > 1 else "",
            *(merge_names(list(dict.fromkeys(c))) for c in zip(*found, strict=True)),
        )
        for found in groups.values()
    ]


def report_text(report: Report) -> str:
    """Return a report as text."""
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    head = f"{plan_text(report.plan)}\nproof: {report.proof_summary()}\ntimes: {times}\n"
    return head + (f"\n{checks_text(report)}" if report.checks else "")


def checks_text(report: Report) -> str:
    """Return the checks of a report as text: of sites that differ in block numbers only the worst."""
    groups: dict[tuple[str, ...], list[SiteCheck]] = {}
    for check in report.checks:
        key = (numberless(check.name), check.contract, f"{check.bound:.1e}", check.dtype)
        groups.setdefault(key, []).append(check)
    columns = [("", "right"), ("site", "left"), ("contract", "left"), ("worst relative error", "right")]
    columns += [("bound", "right"), ("dtype", "left")]
    rows = []
    for (_, contract, bound, dtype), found in groups.items():
        name = merge_names(list(dict.fromkeys(c.name for c in found)))
        error = f"{max(c.error for c in found):.2e}"
        rows.append((f"{len(found)}×" if len(found) > 1 else "", name, contract, error, bound, dtype))
    return table_text(f"{len(report.checks)} sites checked against the dense ones", columns, rows)


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
        key = (miss.kind, numberless(miss.module_path), miss.reason, miss.source_line)
        groups.setdefault(key, []).append(miss)
    columns = (("almost a site", "left"), ("kind", "left"), ("first condition that failed", "left"), ("source", "left"))
    rows = []
    for (kind, _, reason, source), found in groups.items():
        paths = list(dict.fromkeys(m.module_path or m.node.name for m in found))
        rows.append((merge_names(paths), kind, reason, source))
    total = sum(len(found) for found in groups.values())
    return table_text(f"{total} near misses", columns, rows) if rows else "no near misses\n"
