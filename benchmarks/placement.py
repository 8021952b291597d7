"""Simulated step times and wire bytes of placements: ``python benchmarks/placement.py --json out.json``.

First, time. Traces in which each expert is hot at some noise level; 8 devices and 64. ``EPLB`` is DeepSeek's planner
as published: replicas for the largest load summed over time, then longest first onto the lightest device that has a
slot, duplicates on one device allowed. Strategies with copies get as many slots. The clock is that of
``moefx.passes.schedule``: exchanges, the busiest device's experts, and moves of weights that do not hide.

Second, bytes. Tokens that choose one expert per layer and seldom leave hidden groups of experts. ``home`` sends rows
to their experts and back in every layer; ``floating`` lets a token stay where its expert is until the next layer, so
that only flow between devices travels. Both need the keys and values of all tokens everywhere, which is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moefx.passes.placement import Budget, ModelDims, Placement, RoutingTrace, Topology, place, synthesise
from moefx.passes.placement.predict import expert_seconds, predict
from moefx.passes.schedule import Exchange, LayerCost, layer_costs, simulate, step_schedule

Array = NDArray[np.float64]
WIDTH, HIDDEN, ELEMENT_bytes = 1152, 4608, 2
OURS = ("minimax_time", "lp_share", "windows", "materialise")


def dims_of(trace: RoutingTrace) -> ModelDims:
    """Return sizes of experts as wide as those of DiT-XL, in bfloat16."""
    layers, weights = len(trace.layers), 2 * WIDTH * HIDDEN
    sizes = (weights * ELEMENT_bytes,) * layers
    return ModelDims(
        trace.layers, trace.experts, sizes, 0, (WIDTH * ELEMENT_bytes,) * layers, (2.0 * weights,) * layers
    )


def scaled(trace: RoutingTrace, rows: float) -> RoutingTrace:
    """Return the trace with so many rows per layer and level."""
    factor = rows / trace.load.sum(axis=2).mean()
    return RoutingTrace(trace.sigmas, trace.layers, trace.experts, trace.load * factor)


def eplb_shares(load_E: Array, devices: int, spare: int) -> Array:
    """Return the fraction of each expert's rows on each device ``[E, G]`` as DeepSeek's planner gives it."""
    experts = len(load_E)
    slots = experts // devices + spare
    copies_E = np.ones(experts, dtype=np.int64)
    for _ in range(slots * devices - experts):
        copies_E[np.argmax(load_E / copies_E)] += 1
    physical = np.repeat(np.arange(experts), copies_E)
    weight = load_E[physical] / copies_E[physical]
    held, free = np.zeros(devices), np.full(devices, slots)
    shares_EG = np.zeros((experts, devices))
    for p in np.argsort(-weight, kind="stable"):
        device = int(np.where(free > 0, held, np.inf).argmin())
        held[device] += weight[p]
        free[device] -= 1
        shares_EG[physical[p], device] += 1 / copies_E[physical[p]]
    return shares_EG


def eplb_seconds(trace: RoutingTrace, topology: Topology, dims: ModelDims, spare: int) -> float:
    """Return the simulated time of a run with one placement made from the load summed over time."""
    exchange, total = Exchange.of(topology), 0.0
    shares = [eplb_shares(trace.layer(i).sum(axis=0), len(topology), spare) for i in range(len(trace.layers))]
    nothing = np.zeros(len(topology))
    for s in range(len(trace.sigmas)):
        costs = []
        for i, shares_EG in enumerate(shares):
            rows_EG = trace.layer(i)[s][:, None] * shares_EG
            sent_G = rows_EG.sum(axis=0) * dims.row_bytes[i] / len(topology)
            experts_G = expert_seconds(rows_EG[None], i, topology, dims)[0].sum(axis=0)
            out, back = exchange.uniform(sent_G), exchange.uniform(sent_G, back=True)
            costs.append(LayerCost(nothing, experts_G, nothing, exchange.latency_s, out, back, 0.0, nothing))
        total += simulate(step_schedule(costs), len(topology)).total_s
    return total


def run_seconds(placement: Placement, trace: RoutingTrace, topology: Topology, dims: ModelDims) -> float:
    """Return the simulated time of a run, moves of weights that do not hide included."""
    steps = (step_schedule(layer_costs(placement, trace, topology, dims, s)) for s in range(len(trace.sigmas)))
    return (
        sum(simulate(tasks, len(topology)).total_s for tasks in steps)
        + predict(placement, trace, topology, dims).moving_s
    )


def times(options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Compare step times on 8 and on 64 devices."""
    rows: list[dict[str, float | str]] = []
    for topology, experts in ((Topology.node(8), 64), (Topology.cluster(8, 8), 256)):
        drawn = synthesise("drifting", levels=16, layers=options.layers, experts=experts, samples=8, tokens=256)
        trace = scaled(drawn, options.rows * len(topology))
        dims, budget = dims_of(trace), Budget(spare=1, restarts=2, seconds=options.seconds)
        base = eplb_seconds(trace, topology, dims, budget.spare)
        ideal = trace.load.sum() * dims.row_flops[0] / topology.flops_per_s.sum()
        head = {"devices": len(topology), "experts": experts}
        rows.append(
            {**head, "plan": "EPLB", "run_ms": 1e3 * base, "saved": 0.0, "plan_s": 0.0, "ideal_ms": 1e3 * ideal}
        )
        for name in ("contiguous", "eplb", *OURS):
            begin = time.process_time()
            plan = place(trace, topology, dims, name, budget)
            spent = time.process_time() - begin
            found = run_seconds(plan, trace, topology, dims)
            rows.append({**head, "plan": name, "run_ms": 1e3 * found, "saved": 1 - found / base, "plan_s": spent})
    return rows


def bytes_moved(options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Compare the bytes between devices with owners that stay and owners that float."""
    rows: list[dict[str, float | str]] = []
    for devices, experts in ((8, 64), (64, 64)):
        topology = Topology.node(devices)
        trace = synthesise(
            "planted", levels=4, layers=12, experts=experts, top_k=1, samples=8, tokens=512, groups=devices
        )
        dims, budget = dims_of(trace), Budget(restarts=2, seconds=options.seconds)
        flow = float(trace.load.sum(axis=2).sum(axis=0).mean())  # rows of one layer over all levels
        layers, away = len(trace.layers), 1 - 1 / devices
        two_way = 2 * layers * flow * away
        head = {"devices": devices, "experts": experts}
        rows.append({**head, "plan": "affinity, home", "rows": two_way, "saved": 0.0})
        for name in ("contiguous", "affinity", "pool", "joint"):
            plan = place(trace, topology, dims, name, budget)
            affinity = trace.need("affinity", "count bytes")
            homes = [np.asarray(row) for row in plan.primary]
            moved = sum(float(affinity[i][homes[i][:, None] != homes[i + 1][None]].sum()) for i in range(layers - 1))
            total = moved + 2 * flow * away  # to the first expert, and home from the last
            rows.append({**head, "plan": f"{name}, floating", "rows": total, "saved": 1 - total / two_way})
    return rows


def show(rows: list[dict[str, float | str]], title: str) -> None:
    """Print one table."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        cells = (row.get(column, "") for column in rows[0])
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=120).print(table)


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=float, default=16384, help="rows per layer and device")
    parser.add_argument("--seconds", type=float, default=20, help="for each plan")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {"machine": f"{platform.machine()}, simulated H100 nodes", "times": times(options)}
    show(result["times"], "run of 16 levels")
    result["bytes"] = bytes_moved(options)
    show(result["bytes"], "rows between devices, 12 layers")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
