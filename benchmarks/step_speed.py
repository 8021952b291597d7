"""Time a denoising step of sparse models against the dense one: ``python benchmarks/step_speed.py --results DIR``.

The model is a DiT-B/2 (width 768, 12 heads) of fewer blocks, which changes no ratio. Each sparse model runs interleaved
with the dense one in one process, without gradients; the ratio of two neighbouring runs is what counts, the median over
rounds and its quartiles. *Reached* is the FLOP ratio over the time ratio: 100 % means that time falls as FLOPs do.
FLOPs are counted by torch while the model runs where it uses torch's products, else taken from the model's plan.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `examples` is found

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros

WIDTH, HEADS, BLOCKS, TIME = 768, 12, 2, 500.0
Inputs = tuple[Tensor, Tensor, Tensor]
Sparse = tuple[nn.Module, float | None]


def dense(tokens: int) -> DiT:
    """Return a DiT for ``tokens`` tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(image_size=2 * round(tokens**0.5), width=WIDTH, heads=HEADS, depth=BLOCKS, label_dropout=0.0)
        return randomise_zeros(model, std=0.02).eval()


def inputs(tokens: int) -> Inputs:
    """Return one noisy image."""
    side = 2 * round(tokens**0.5)
    return torch.randn(1, 1, side, side), torch.tensor([TIME]), torch.tensor([3])


def planned(model: nn.Module) -> Sparse:
    """Return a transformed model with the FLOP ratio of its plan."""
    return model, model.moefx.plans[0].cost.flops_ratio


def specialised(tokens: int) -> Sparse:
    """DyDiT with half of the heads and channel groups off at this timestep, cut out by ``moefx.specialise``."""
    model = moefx.transform(dense(tokens), inputs(tokens), recipe="dydit", groups=HEADS, verify=False)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("router.bias"):  # the first group is always on: 5 of the other 11 stay
                parameter.copy_(torch.tensor([15.0] * (HEADS // 2 - 1) + [-15.0] * (HEADS - HEADS // 2)))
    special = moefx.specialise(model, [TIME], inputs(tokens), fixed=["y"])
    if special.left:
        raise SystemExit(f"not everything was folded: {special.left}")
    return special, None


def tokens_half(tokens: int) -> Sparse:
    """Half of the tokens in every block (mixture of depths)."""
    options = {"every": 1, "capacity": 0.5, "router_std": 0.05}
    return planned(moefx.transform(dense(tokens), inputs(tokens), recipe="mixture-of-depths", verify=False, **options))


def split_half(tokens: int) -> Sparse:
    """The FFNs cut by `moefx-split`: a shared quarter and, on average, a third of the other slices per token."""
    model, batches = (
        dense(tokens),
        [(inputs(tokens)[0], torch.tensor([t]), torch.tensor([3])) for t in (100.0, 900.0)],
    )
    calibration = moefx.calibrate(model, batches, buckets=2, timesteps=(0.0, 1000.0), samples=256, progress=False)
    options = {"timestep_thresholds": 1}
    return planned(
        moefx.transform(model, inputs(tokens), recipe="moefx-split", calibration=calibration, verify=False, **options)
    )


CASES: dict[str, Callable[[int], Sparse]] = {
    "half of heads and channels, specialised": specialised,
    "half of the tokens": tokens_half,
    "half of each FFN, by slices per token": split_half,
}


def counted(model: nn.Module, values: Inputs) -> int:
    """Return the FLOPs of one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(*values)
    return int(counter.get_total_flops())


def measure(name: str, tokens: int, seconds: float) -> dict[str, Any]:
    """Time the dense and the sparse model alternately for about ``seconds``."""
    reference, values = dense(tokens), inputs(tokens)
    model, ratio = CASES[name](tokens)
    ratio = counted(model, values) / counted(reference, values) if ratio is None else ratio
    pair = {"dense": reference, "sparse": model.eval()}
    times: dict[str, list[float]] = {key: [] for key in pair}
    for each in pair.values():
        each(*values)
    begin = time.perf_counter()
    while len(times["dense"]) < 5 or time.perf_counter() - begin < seconds:
        for key, each in pair.items():
            start = time.process_time()
            each(*values)
            times[key].append(time.process_time() - start)
    ratios = [s / d for s, d in zip(times["sparse"], times["dense"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": name,
        "tokens": tokens,
        "rounds": len(ratios),
        "dense_ms": 1e3 * statistics.median(times["dense"]),
        "sparse_ms": 1e3 * statistics.median(times["sparse"]),
        "time_ratio": middle,
        "quartiles": (low, high),
        "flops_ratio": ratio,
        "reached": ratio / middle,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Time of a denoising step on the CPU",
        "",
        f"`benchmarks/step_speed.py`, {platform.machine()}, one thread, torch {torch.__version__}, float32, batch 1,",
        f"DiT-B/2 with {BLOCKS} blocks. CPU time of the process, interleaved; median of the ratio of neighbouring",
        "runs, quartiles in brackets.",
        "",
        "| case | tokens | dense ms | sparse ms | time ratio | FLOP ratio | reached |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        low, high = r["quartiles"]
        lines.append(
            f"| {r['case']} | {r['tokens']} | {r['dense_ms']:.0f} | {r['sparse_ms']:.0f} "
            f"| {r['time_ratio']:.3f} [{low:.3f}, {high:.3f}] | {r['flops_ratio']:.3f} | {r['reached']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="time per case")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--results", type=Path, help="folder for step_speed.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [measure(name, tokens, options.seconds) for name in CASES for tokens in (256, 1024)]
    if options.json:
        print(json.dumps(rows))
    else:
        shown = Table("case", "tokens", "time ratio", "FLOP ratio", "reached")
        for r in rows:
            ratios = (f"{r['time_ratio']:.3f}", f"{r['flops_ratio']:.3f}", f"{r['reached']:.0%}")
            shown.add_row(r["case"], str(r["tokens"]), *ratios)
        Console().print(shown)
    if options.results is not None:
        (options.results / "step_speed.md").write_text(markdown(rows), encoding="utf-8")
        (options.results / "step_speed.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
