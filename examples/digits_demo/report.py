"""Turn the collected facts into report.json, report.md and the table on the terminal."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from examples.digits_demo.files import write_text

Facts = dict[str, Any]
MODELS = {"dense": "dense, start", "dense_tuned": "dense, tuned", "routed_tuned": "routed, tuned"}


def versions() -> dict[str, str]:
    """Return what was run, and on what."""
    packages = {name: version(name) for name in ("moefx", "torch", "numpy", "scikit-learn")}
    return packages | {"python": platform.python_version(), "machine": platform.machine(), "system": sys.platform}


def write(folder: Path, facts: Facts) -> None:
    """Write both reports."""
    write_text(folder / "report.json", json.dumps(facts, indent=2) + "\n")
    write_text(folder / "report.md", markdown(facts))


def percent(value: float, digits: int = 1) -> str:
    """Format a share with its sign."""
    return f"{100 * value:+.{digits}f} %"


def summary_rows(facts: Facts) -> list[list[str]]:
    """Return one row per model: parameters, FLOPs, loss, sample scores."""
    rows = []
    for key, title in MODELS.items():
        cost, score = facts["cost"]["routed" if key.startswith("routed") else "dense"], facts["samples"][key]
        rows.append(
            [
                title,
                f"{cost['parameters']:,}",
                f"{cost['active_parameters']:,}",
                f"{cost['flops_per_image'] / 1e6:.2f}",
                f"{facts['validation_loss'][key]['mean']:.4f}",
                f"{score['pca_frechet_distance']:.3f}",
                f"{score['knn_agreement']}/{score['samples']}",
            ]
        )
    return rows


HEADINGS = ["model", "parameters", "active", "MFLOPs", "val. loss", "Fréchet", "kNN"]


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns after the first are right-aligned."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *rows])


def verdict(facts: Facts) -> str:
    """Say in a sentence which fine-tuned model has the lower validation loss, and whether the gap exceeds its noise."""
    gap = facts["validation_loss"]["routed_minus_dense"]
    size = (
        f"{percent(gap['relative'], 2)} ({gap['mean']:+.5f} ± {gap['standard_error']:.5f}, standard error over images)"
    )
    if abs(gap["mean"]) < 2 * gap["standard_error"]:
        return f"After fine-tuning the two do not differ measurably in validation loss: routed against dense {size}."
    word = "lower" if gap["mean"] < 0 else "higher"
    return f"After fine-tuning the routed model's validation loss is {word} than the dense one's: {size}."


def markdown(facts: Facts) -> str:
    """Return the report for people."""
    return (
        "\n\n".join(
            [
                "# Digits: a dense diffusion transformer made sparse",
                _introduction(facts),
                "## Result",
                table(HEADINGS, summary_rows(facts)),
                verdict(facts),
                _price(facts),
                _yardsticks(facts),
                "![samples](samples.png)",
                "## Proof that the conversion changed nothing",
                _proof(facts),
                "## Validation loss by time",
                _buckets(facts),
                "![loss curves](loss_curves.png)",
                "## Experts",
                _experts(facts),
                "![expert utilisation](expert_utilisation.png)",
                "## What moefx reports",
                f"```text\n{facts['receipt']}\n```",
                "The regions of the model: [before](graph_before.txt), [after](graph_after.txt).",
                "## Run",
                _run(facts),
            ]
        )
        + "\n"
    )


def _introduction(facts: Facts) -> str:
    config = facts["config"]
    routing, dense, tune = config["routing"], config["dense"], config["finetune"]
    return (
        f"A class-conditional DiT ({config['model']['depth']} blocks of width {config['model']['width']}) learns "
        f"rectified flow on scikit-learn's 8 × 8 digits for {dense['steps']} steps. `moefx.transform` with recipe "
        f"`{routing['recipe']}` turns each of its feed-forward networks into {routing['experts']} copies "
        f"of itself, {routing['top_k']} per token: the same active width. "
        f"Then both models train {tune['steps']} more steps on the same batches, times, noise and dropped labels."
    )


def _price(facts: Facts) -> str:
    """Say what the sparse model costs, and what the comparison does not tell."""
    dense, routed = facts["cost"]["dense"], facts["cost"]["routed"]
    more = routed["flops_per_image"] / dense["flops_per_image"] - 1
    steps = facts["config"]["finetune"]["steps"]
    step_ms = {name: 1000 * facts["curves"][name]["seconds"] / steps for name in ("dense", "routed")}
    return (
        f"FLOPs of the routed model against the dense one: {percent(more)}, all of it the routers; it holds "
        f"{routed['parameters'] / dense['parameters']:.1f} times the parameters. A training step took "
        f"{step_ms['dense']:.0f} ms dense and {step_ms['routed']:.0f} ms routed on this CPU: equal FLOPs are not equal "
        "time at this size. One training seed; the standard error is over images only and leaves out what another seed "
        "would change. The dense model is deliberately so small that its capacity limits it; with room to spare, extra "
        "experts gain little or nothing on so few images (`ModelConfig` in `examples/digits_demo/config.py`)."
    )


def _yardsticks(facts: Facts) -> str:
    real, noise = facts["yardsticks"]["real_validation"], facts["yardsticks"]["noise"]
    judge = facts["config"]["judge"]
    samples = facts["samples"]["dense"]["samples"]
    return (
        f"MFLOPs: matrix products to denoise one image once. "
        f"Samples: {samples} per model, {judge['sampler_steps']} Heun steps, guidance {judge['guidance']}, "
        f"same initial noise. Fréchet: squared Fréchet distance in the first {judge['components']} principal "
        f"components of the training pixels, against the training images; lower is closer. It is not FID. "
        f"kNN: samples that a "
        f"{judge['neighbours']}-nearest-neighbour classifier of pixels gives the class asked for. "
        f"The same scores for held-out real digits: {real['pca_frechet_distance']:.3f} "
        f"({real['samples']} images) and {real['knn_agreement']}/{real['samples']}; for noise: "
        f"{noise['pca_frechet_distance']:.1f} and {noise['knn_agreement']}/{noise['samples']}. "
        f"Sharper guidance raises agreement and distance together."
    )


def _proof(facts: Facts) -> str:
    proof = facts["equality"]
    errors = proof["max_relative_error_by_time"]
    rows = [["largest difference / largest output", *(f"{error:.1e}" for error in errors.values())]]
    return (
        f"Before any training, on all {proof['images']} validation images (tolerance {proof['tolerance']:.0e}):\n\n"
        + table(["time t", *errors], rows)
    )


def _buckets(facts: Facts) -> str:
    losses, edges = facts["validation_loss"], facts["config"]["judge"]["timestep_buckets"]
    rows = []
    for index in range(edges):
        values = [losses[key]["by_bucket"][index] for key in (*MODELS, "routed")]
        dense, tuned, routed_tuned, routed = values
        name = f"{index / edges:.3f}–{(index + 1) / edges:.3f}"
        rows.append(
            [name, *(f"{v:.4f}" for v in (dense, routed, tuned, routed_tuned)), percent(routed_tuned / tuned - 1)]
        )
    headings = ["t", "dense before", "routed before", "dense after", "routed after", "routed against dense, after"]
    return table(headings, rows)


def _experts(facts: Facts) -> str:
    rows = []
    for layer in facts["experts"]:
        shares, count = layer["load"], len(layer["load"])
        by_time = [load * count for bucket in layer["load_by_time"] for load in bucket]
        extremes = (max(shares) * count, min(shares) * count, max(by_time), min(by_time))
        unused = sum(share == 0 for share in shares)
        rows.append([f"`{layer['layer']}`", str(count), *(f"{value:.2f}" for value in extremes), str(unused)])
    headings = ["layer", "experts", "busiest", "idlest", "busiest in a bucket", "idlest in a bucket", "never used"]
    return (
        "Tokens of the validation images, relative to an even load, after fine-tuning: over all times, and within one "
        "bucket of the table above.\n\n" + table(headings, rows)
    )


def _run(facts: Facts) -> str:
    seconds = [[name.replace("_", " "), f"{value:.1f} s"] for name, value in facts["seconds"].items()]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    cached = "read from the cache of an earlier run" if facts["dense_from_cache"] else "trained in this run"
    return (
        f"{versions}; {facts['threads']} thread(s); seed {facts['config']['seed']}; dense model {cached}.\n\n"
        + table(["stage", "wall time"], seconds)
        + "\n\nAll choices, scores and curves are in [report.json](report.json)."
    )


def show(facts: Facts, folder: Path) -> None:
    """Print the result table and what was written."""
    console = Console()
    shown = Table(title="moefx on 8 × 8 digits", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in summary_rows(facts):
        shown.add_row(*row)
    console.print(shown)
    proof = facts["equality"]
    console.print(
        f"Before training, routed and dense outputs differ by at most {proof['max_relative_error']:.1e} of the largest."
    )
    console.print(verdict(facts))
    console.print(f"Total {sum(facts['seconds'].values()):.0f} s. Written:")
    for name in facts["files"]:
        console.print(f"  {folder / name}", highlight=False)
