"""Tables and numbers as text: rendered by rich for a fixed width, so that files and pipes get the same."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

_WIDTH = 120


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """Return a rich table; the first column is text, the others numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def rendered(*parts: Any) -> str:
    """Return text and tables below each other, without colours."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, markup=False, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def bytes_text(value: float) -> str:
    """Return a number of bytes with a unit."""
    if not math.isfinite(value):
        return "-"
    power = min(int(math.log(value, 1024)), 4) if value >= 1 else 0
    return f"{value / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def seconds_text(value: float) -> str:
    """Return a time with a unit."""
    if value == 0:
        return "0 s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"
