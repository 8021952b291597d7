"""Tables, plots and JSON of ``gpu.py``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "moefx"
Row = dict[str, Any]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(rows: list[Row], columns: list[tuple[str, str, int]]) -> str:
    """Return rows as a Markdown table; a column is (heading, key, digits)."""
    lines = ["| " + " | ".join(heading for heading, _, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            _number(row.get(key), digits) if isinstance(row.get(key), float | None) else str(row.get(key))
            for _, key, digits in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


FFN_COLUMNS = [
    ("implementation", "implementation", 0), ("us", "us", 1), ("again", "us_again", 1), ("p20", "low_us", 1),
    ("p80", "high_us", 1), ("TFLOP/s", "tflops", 1), ("% of floor", "floor_percent", 0),
    ("moefx speed-up", "speedup", 2), ("launches", "launches", 0), ("peak MB", "peak_mb", 1),
    ("first call s", "first_call_s", 1), ("tuning s", "tuning_s", 1),
]  # fmt: skip
STEP_COLUMNS = [
    ("implementation", "implementation", 0), ("us", "us", 1), ("again", "us_again", 1),
    ("over the first", "over_first", 2), ("% of floor", "floor_percent", 0), ("launches", "launches", 0),
    ("peak MB", "peak_mb", 1), ("first call s", "first_call_s", 1), ("tuning s", "tuning_s", 1),
]  # fmt: skip
SCHEDULE_COLUMNS = [
    ("schedule", "schedule", 0), ("us", "us", 1), ("again", "us_again", 1), ("model us", "model_us", 1),
    ("% of floor", "floor_percent", 0), ("registers", "registers", 0), ("disassembled", "read_registers", 0),
    ("spills", "spills", 0), ("disassembled", "read_spills", 0),
]  # fmt: skip


def grouped(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by the values of some keys, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return found


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add to each FFN row how much faster ours is in the same problem and mode."""
    for same in grouped(rows, "shape", "routing", "direction", "mode").values():
        ours = next((row["us"] for row in same if row["implementation"] == OURS), None)
        for row in same:
            row["speedup"] = None if ours is None else row["us"] / ours
    return rows


def summary(rows: list[Row]) -> str:
    """Return how ours stands against the best peer, and how far two measurements of one thing lie apart."""
    lines = []
    for (direction, mode), same in grouped(rows, "direction", "mode").items():
        ratios = []
        for problem in grouped(same, "shape", "routing").values():
            ours = [r["us"] for r in problem if r["implementation"] == OURS]
            peers = [r["us"] for r in problem if not r["implementation"].startswith(("moefx", "dense"))]
            if ours and peers:
                ratios.append(min(peers) / ours[0])
        if ratios:
            mean = statistics.geometric_mean(ratios)
            lines.append(
                f"- {direction}, {mode}: {mean:.2f} times the best peer in the geometric mean of {len(ratios)} "
                f"problems, {min(ratios):.2f} at worst"
            )
    noise = [abs(r["us_again"] / r["us"] - 1) for r in rows if r.get("us_again") and r["us"]]
    if noise:
        lines.append(f"- two measurements of one thing differ by {100 * statistics.median(noise):.1f} % in the median")
    return "\n".join(lines)


def document(result: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    machine, ceilings = result["machine"], result["ceilings"]
    parts = ["# Routed FFN, blocks and heads on a device", "", ", ".join(f"{k} {v}" for k, v in machine.items()), ""]
    parts.append(f"Ceilings: {ceilings['tflops']:.1f} TFLOP/s, {ceilings['tb_per_s']:.3f} TB/s, measured here.")
    if result["quick"]:
        parts += ["", "A rehearsal: the sizes are toys and the times mean nothing."]
    parts += ["", "## Correctness", "", table(result["errors"], [("implementation", "implementation", 0),
              ("problem", "problem", 0), ("relative error", "error_text", 0)])]  # fmt: skip
    parts += ["", "## Summary", "", summary(result["ffn"]), "", *_calibration(result["calibration"])]
    for (kernel, load, bound), same in grouped(result["schedules"], "kernel", "load", "bound").items():
        parts += ["", f"## Forms of {kernel}, {load} rows per expert, {bound}-bound", "", table(same, SCHEDULE_COLUMNS)]
    for key, same in grouped(result["ffn"], "shape", "routing", "direction", "mode").items():
        floor = f"floor {same[0]['floor_us']:.1f} us, {same[0]['bound']}-bound"
        parts += ["", f"## {', '.join(key)}", "", floor, "", table(same, FFN_COLUMNS)]
    for key, same in grouped(result["steps"], "shape", "direction", "mode").items():
        parts += ["", f"## {', '.join(key)}", "", *_share(same), table(same, STEP_COLUMNS)]
    if result["left_out"]:
        parts += ["", "## Left out", "", *(f"- {line}" for line in result["left_out"])]
    return "\n".join(parts) + "\n"


def _calibration(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    changes = [f"{name} {found['before'][name]:.3g} to {value:.3g}" for name, value in found["after"].items()]
    return [f"Cost model of {found['target']}, fitted here: {', '.join(changes)}."]


def _share(rows: list[Row]) -> list[str]:
    """Return what a layer takes beyond its products, where both were timed."""
    times = {row["implementation"]: row["us"] for row in rows}
    if not {"layer", "products"} <= set(times):
        return []
    share = 100 * (1 - times["products"] / times["layer"])
    return [f"Router, grouping and combine: {share:.1f} % of the layer.", ""]


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write JSON, Markdown and, where matplotlib is, a plot; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "gpu.json", folder / "gpu.md"]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(document(result))
    try:
        import matplotlib as mpl
    except ImportError:
        return files
    mpl.use("Agg")
    return [*files, _plot(result["ffn"], folder / "gpu.png")]


def _plot(rows: list[Row], path: Path) -> Path:
    """Draw the share of the floor that each implementation reaches, one panel for each direction and mode."""
    from matplotlib import pyplot as plt

    panels = grouped([r for r in rows if r["routing"] == "balanced"], "direction", "mode")
    figure, axes = plt.subplots(max(1, len(panels)), 1, figsize=(11, 3.6 * max(1, len(panels))), squeeze=False)
    for axis, ((direction, mode), same) in zip(axes[:, 0], panels.items(), strict=False):
        shapes = list(dict.fromkeys(row["shape"] for row in same))
        for name, mine in grouped(same, "implementation").items():
            heights = {row["shape"]: row["floor_percent"] for row in mine}
            axis.plot(shapes, [heights.get(shape) for shape in shapes], "o-", label=name[0])
        axis.set_ylabel("% of floor")
        axis.set_title(f"{direction}, {mode}", fontsize=9)
        axis.tick_params(axis="x", labelrotation=20, labelsize=7)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
