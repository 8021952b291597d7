"""Plans and reports as text tables: fixed width, no colour, the same bytes for the same data."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moefx.model.plan import Plan
    from moefx.model.report import Report

_WIDTH = 120


def table_text(title: str, columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; ``columns`` are (header, justification)."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_edge=False)
    for header, justify in columns:
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return render(table)


def render(*parts: object) -> str:
    """Render rich objects as plain text of fixed width."""
    out = io.StringIO()
    console = Console(
        file=out, width=_WIDTH, color_system=None, force_terminal=False, highlight=False, legacy_windows=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def count(number: float) -> str:
    """Return 1234567 as ``1.23 M``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


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
        f"  expected speed: {1 / cost.flops_ratio:.2f}x by FLOPs, about {0.85 / cost.flops_ratio:.2f}x when routing costs 15 %",
    ]
    columns = (("site", "left"), ("kind", "left"), ("role", "left"), ("rule", "left"), ("realised at", "left"))
    columns = (*columns, ("parameters", "right"), ("active", "right"))
    rows = [
        (s.name, f"{s.kind} {s.flavour}".strip(), s.role, s.rule, f"{s.tier} {s.block or s.module or ''}".strip())
        + (
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
    if not report.checks:
        return head
    columns = (
        ("site", "left"),
        ("contract", "left"),
        ("relative error", "right"),
        ("bound", "right"),
        ("dtype", "left"),
    )
    rows = [(c.name, c.contract, f"{c.error:.2e}", f"{c.bound:.1e}", c.dtype) for c in report.checks]
    return head + "\n" + table_text("checked against the dense site", columns, rows)
