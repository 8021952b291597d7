"""Tables and pictures of the runs: mean and standard deviation over seeds, differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality_runs.runner import Facts, Table
from examples.digits_demo.files import replacing, write_text

COLUMNS = (
    ("loss_before", "loss before", 4),
    ("loss", "loss", 4),
    ("flops_ratio", "active FLOPs", 3),
    ("parameters_ratio", "parameters", 2),
    ("time_ratio", "step time", 2),
    ("frechet_pca", "Fréchet (PCA)", 3),
    ("frechet_features", "Fréchet (classifier)", 3),
    ("agreement", "class agreement", 3),
)

# Which row the others are compared with.
REFERENCES = ("dense, trained", "dense, distilled", "dense, from scratch")


def write(table: Table, folder: Path) -> str:
    """Write the table as Markdown and as a picture beside its JSON; return the Markdown."""
    text = markdown(table)
    stem = f"quality_{table.name}_{table.setting.name}"
    write_text(folder / f"{stem}.md", text)
    with replacing(folder / f"{stem}.png") as path:
        draw(table, path)
    return text


def markdown(table: Table) -> str:
    """Return one row per condition."""
    seeds = max(len(runs) for runs in table.runs.values())
    reference = next((runs for name, runs in table.runs.items() if name.startswith(REFERENCES)), None)
    lines = [
        f"# {table.name}: {table.setting.name}, {seeds} seeds",
        "",
        f"Dense model: {table.setting.dense.steps} steps; every condition then gets "
        f"{table.setting.extra.steps} steps, or what its `steps` says. Mean ± standard deviation over seeds; "
        "`against dense`: mean of the paired relative differences of the loss to the dense model with as many steps.",
        "",
        "| condition | steps | against dense | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---|---:|---:|" + "---:|" * len(COLUMNS),
    ]
    for name, runs in table.runs.items():
        cells = [cell([run[key] for run in runs.values()], digits) for key, _, digits in COLUMNS]
        steps = next(iter(runs.values()))["steps"]
        lines.append(f"| {name} | {steps} | {against(runs, reference)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float], digits: int) -> str:
    """Return mean ± deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def against(runs: dict[str, Facts], reference: dict[str, Facts] | None) -> str:
    """Return the relative difference of the loss to the reference, paired by seed."""
    shared = [seed for seed in runs if reference and seed in reference]
    if not shared or reference is None or runs is reference:
        return "-"
    gaps = [100 * (runs[seed]["loss"] / reference[seed]["loss"] - 1) for seed in shared]
    spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.2f}{spread} %"


def draw(table: Table, path: Path) -> None:
    """Draw loss over measured time of a denoising step, and loss over noise level."""
    import matplotlib.pyplot as plt

    figure, (pareto, levels) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, runs in table.runs.items():
        losses = [run["loss"] for run in runs.values()]
        times = [run["time_ratio"] for run in runs.values()]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        pareto.errorbar(statistics.fmean(times), statistics.fmean(losses), yerr=spread, fmt="o", capsize=3, label=name)
        buckets = [
            statistics.fmean(column) for column in zip(*(r["loss_by_bucket"] for r in runs.values()), strict=True)
        ]
        middles = [(i + 0.5) / len(buckets) for i in range(len(buckets))]
        levels.plot(middles, buckets, marker=".", label=name)
    pareto.set(xlabel="time of a denoising step / dense", ylabel="validation loss", title="loss over measured time")
    levels.set(xlabel="noise level t", ylabel="validation loss", title="loss by noise level", yscale="log")
    levels.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
