"""Time blocks that run on half of their tokens: ``python benchmarks/token_routing.py --results benchmarks/results``.

The blocks are those of a DiT-B/2 (width 768, 12 heads), rewritten by the recipe ``mixture-of-depths`` at capacity 0.5.
Dense and routed blocks run interleaved in one process on the same tokens, without gradients, and the ratio of two
neighbouring runs is what counts: the median over rounds, and its quartiles. FLOPs are those of all matrix products.
*Reached* is the FLOP ratio over the time ratio: 100 % means that time falls as FLOPs do.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros

WIDTH, HEADS, BLOCKS = 768, 12, 2


def blocks_of(tokens: int, capacity: float | None) -> nn.ModuleList:
    """Return the blocks of a DiT for ``tokens`` tokens, routed where there is a capacity."""
    side = round(tokens**0.5) * 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise_zeros(DiT(image_size=side, width=WIDTH, heads=HEADS, depth=BLOCKS), std=0.02).eval()
    if capacity is not None:
        inputs = (torch.zeros(1, 1, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        moefx.transform(
            model,
            inputs,
            recipe="mixture-of-depths",
            every=1,
            capacity=capacity,
            router_std=0.05,
            verify=False,
        )
    return model.blocks


def run(blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
    """Return the tokens after all blocks."""
    for block in blocks:
        x = block(x, c)
    return x


def flops(tokens: int, capacity: float | None) -> float:
    """Return the FLOPs of one block: projections, attention and FFN of the tokens that pass, adaLN, router."""
    passed = tokens if capacity is None else int(capacity * tokens)
    router = 0 if capacity is None else 2 * tokens * WIDTH
    return 24 * passed * WIDTH**2 + 4 * passed**2 * WIDTH + 12 * WIDTH**2 + router


def measure(tokens: int, capacity: float, seconds: float) -> dict[str, Any]:
    """Time the dense and the routed blocks alternately for about ``seconds``."""
    dense, routed = blocks_of(tokens, None), blocks_of(tokens, capacity)
    x, c = torch.randn(1, tokens, WIDTH), torch.randn(1, WIDTH)
    calls: dict[str, Callable[[], Tensor]] = {"dense": partial(run, dense, x, c), "routed": partial(run, routed, x, c)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while len(times["dense"]) < 5 or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    ratios = [r / d for r, d in zip(times["routed"], times["dense"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ratio = flops(tokens, capacity) / flops(tokens, None)
    return {
        "tokens": tokens,
        "capacity": capacity,
        "rounds": len(ratios),
        "dense_ms": 1e3 * statistics.median(times["dense"]) / BLOCKS,
        "routed_ms": 1e3 * statistics.median(times["routed"]) / BLOCKS,
        "time_ratio": middle,
        "quartiles": (low, high),
        "flops_ratio": ratio,
        "reached": ratio / middle,
        "outside": _outside(calls["routed"]),
    }


def _outside(call: Callable[[], Any]) -> dict[str, float]:
    """Return the share of CPU time of the operations that the dense blocks do not have, from the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    events = seen.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    own = ("aten::sort", "aten::index_select", "aten::index_copy", "aten::index_copy_", "aten::gather")
    return {event.key: event.self_cpu_time_total / total for event in events if event.key in own}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Token routing on the CPU",
        "",
        f"`benchmarks/token_routing.py`, {platform.machine()}, one thread, torch {torch.__version__}, float32,",
        f"batch 1, blocks of a DiT-B/2 (width {WIDTH}, {HEADS} heads), mixture of depths. CPU time of this process",
        "(the machine was shared), interleaved; median of the ratio of neighbouring runs, quartiles in brackets.",
        "",
        "| tokens | capacity | dense ms/block | routed ms/block | time ratio | FLOP ratio | reached | gather, sort |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        low, high = r["quartiles"]
        lines.append(
            f"| {r['tokens']} | {r['capacity']} | {r['dense_ms']:.1f} | {r['routed_ms']:.1f} "
            f"| {r['time_ratio']:.3f} [{low:.3f}, {high:.3f}] | {r['flops_ratio']:.3f} | {r['reached']:.0%} "
            f"| {sum(r['outside'].values()):.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="time per case")
    parser.add_argument("--results", type=Path, default=None, help="folder for token_routing.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [measure(tokens, 0.5, options.seconds) for tokens in (256, 1024)]
    shown = Table("tokens", "time ratio", "FLOP ratio", "reached")
    for r in rows:
        shown.add_row(str(r["tokens"]), f"{r['time_ratio']:.3f}", f"{r['flops_ratio']:.3f}", f"{r['reached']:.0%}")
    Console().print(shown)
    if options.results is not None:
        (options.results / "token_routing.md").write_text(table(rows), encoding="utf-8")
        (options.results / "token_routing.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
