"""How long plan and transform take on full-size models, and how much memory: DiT-XL/2 with weights, FLUX.1 on meta.

    python benchmarks/transform.py [--json FILE]

Also: matching on a graph of 10,000 nodes, and planning time against the number of blocks (it should grow linearly).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import moefx
from moefx import zoo
from moefx.graph import trace
from moefx.passes.analysis import Facts

DIT_XL_2: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
FLUX_1: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}


def peak_gib() -> float:
    """Return the peak resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, config: dict[str, Any], *, device: str, verify: bool, **options: Any) -> dict[str, Any]:
    """Transform one model and return seconds per stage and memory."""
    model = zoo.from_config(name, config, device=device)
    size_gib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30 if device != "meta" else 0.0
    before = peak_gib()
    start = time.perf_counter()
    moefx.transform(model, verify=verify, **options)
    total = time.perf_counter() - start
    report = model.moefx.report
    grown = report.plan.cost.bytes_after - report.plan.cost.bytes_before
    return {
        "model": f"{name} on {device}, {report.plan.recipe}",
        "sites": len(report.plan.sites),
        "total_s": total,
        **{f"{stage}_s": seconds for stage, seconds in report.seconds.items()},
        "model_gib": size_gib,
        "added_gib": grown / 2**30 if device != "meta" else 0.0,
        "peak_grew_gib": peak_gib() - before,
    }


def scaling(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the planning time of FLUX-shaped models of several depths on meta."""
    rows = []
    for count in counts:
        depth = {"num_layers": count, "num_single_layers": 2 * count}
        model = zoo.from_config("FluxTransformer2DModel", FLUX_1 | depth, device="meta")
        start = time.perf_counter()
        moefx.plan(model)
        rows.append({"blocks": 3 * count, "plan_s": time.perf_counter() - start})
    return rows


def matching(nodes: int) -> dict[str, Any]:
    """Return how long finding all sites takes on a traced graph of at least ``nodes`` nodes."""
    depth = {"num_layers": 38, "num_single_layers": 76}
    model = zoo.from_config("FluxTransformer2DModel", FLUX_1 | depth, device="meta")
    graph = trace(model)
    assert len(graph.nodes) >= nodes, f"only {len(graph.nodes)} nodes"
    start = time.perf_counter()
    found = Facts(graph).sites
    return {"nodes": len(graph.nodes), "sites": len(found), "match_s": time.perf_counter() - start}


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        measure("FluxTransformer2DModel", FLUX_1, device="meta", verify=False),
        measure("FluxTransformer2DModel", FLUX_1, device="meta", verify=False, recipe="dydit"),
        measure("DiTTransformer2DModel", DIT_XL_2, device="cpu", verify=False, experts=2, top_k=1),
        measure("DiTTransformer2DModel", DIT_XL_2, device="cpu", verify=True, experts=2, top_k=1),
    ]
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "transform": rows,
        "scaling": scaling((5, 10, 20)),
        "matching": matching(10_000),
    }
    table = Table(title="transform")
    for column in rows[-1]:
        table.add_column(column, justify="right")
    for row in rows:
        cells = (row.get(column, 0.0) for column in rows[-1])
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console()
    console.print(table)
    console.print(result["scaling"], result["matching"])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
