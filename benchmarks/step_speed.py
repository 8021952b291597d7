"""Time denoising steps of sparse models against the dense one: ``python benchmarks/step_speed.py --results DIR``.

The model is a DiT-B/2 (width 768, 12 heads) of fewer blocks, which changes no ratio. Each sparse model runs interleaved
with the dense one in one process, without gradients; the ratio of two neighbouring runs is what counts, the median over
rounds and its quartiles. *Reached* is the FLOP ratio over the time ratio: 100 % means that time falls as FLOPs do.
FLOPs are those of the products that run: torch counts them, grouped products by the rows that an expert serves and
routed heads by the queries that chose them. Where time falls less than FLOPs, the last column says which operations
take more than their share: CPU time of the sparse run, less the FLOP ratio times that of the dense run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `examples` is found

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx.routing.step_cache import StepCache, StepCaches

WIDTH, HEADS, BLOCKS, TIME, STEPS = 768, 12, 2, 500.0, 4
AIM = 0.8
Inputs = tuple[Tensor, Tensor, Tensor]


def dense(tokens: int) -> DiT:
    """Return a DiT for ``tokens`` tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(image_size=2 * round(tokens**0.5), width=WIDTH, heads=HEADS, depth=BLOCKS, label_dropout=0.0)
        return randomise_zeros(model, std=0.02).eval()


def inputs(tokens: int, timestep: float = TIME) -> Inputs:
    """Return one noisy image."""
    side = 2 * round(tokens**0.5)
    return torch.randn(1, 1, side, side), torch.tensor([timestep]), torch.tensor([3])


def changed(tokens: int, recipe: str, **options: Any) -> nn.Module:
    """Return the model rewritten by a recipe."""
    return moefx.transform(dense(tokens), inputs(tokens), recipe=recipe, verify=False, **options)


def specialised(tokens: int, recipe: str, **options: Any) -> nn.Module:
    """Return the model with half of what the recipe switches off at this timestep, cut out by ``moefx.specialise``."""
    model = changed(tokens, recipe, **options)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("router.bias"):  # the first group is always on: 5 of the other 11 stay
                parameter.copy_(torch.tensor([15.0] * (HEADS // 2 - 1) + [-15.0] * (HEADS - HEADS // 2)))
    special = moefx.specialise(model, [TIME], inputs(tokens), fixed=["y"])
    if special.left:
        raise SystemExit(f"not everything was folded: {special.left}")
    return special


def split_half(tokens: int) -> nn.Module:
    """Return the FFNs cut by `moefx-split`: a shared quarter and, on average, a third of the others per token."""
    batches = [inputs(tokens, t) for t in (100.0, TIME, 900.0)]
    calibration = moefx.calibrate(
        dense(tokens), batches, buckets=2, timesteps=(0.0, 1000.0), samples=256, progress=False
    )
    return changed(tokens, "moefx-split", calibration=calibration)


CASES: dict[str, Callable[[int], nn.Module]] = {
    "half of the heads, by timestep, specialised": lambda tokens: specialised(tokens, "dydit-heads"),
    "half of the heads, per token": lambda tokens: changed(
        tokens, "mixture-of-heads", active_heads=0.5, router_std=0.05
    ),
    "half of the tokens": lambda tokens: changed(tokens, "mixture-of-depths", every=1, capacity=0.5, router_std=0.05),
    "half of each FFN, by slices per token": split_half,
    "half of heads and channels, by timestep, specialised": lambda tokens: specialised(tokens, "dydit", groups=HEADS),
    "a cache at every second step": lambda tokens: changed(tokens, "harmonica", steps=STEPS, period=2),
}


def sample(model: nn.Module, values: Inputs, steps: int) -> None:
    """Run ``steps`` steps of a sampler; caches over steps, if the model has some, are told which step it is."""
    x, t, y = values
    cached = any(isinstance(module, StepCache) for module in model.modules())
    with StepCaches(model) if cached else nullcontext() as caches:
        for step in range(steps):
            if caches is not None:
                caches.step(step)
            x = x - model(x, t - step, y) / steps


def pair(case: str, tokens: int) -> dict[str, Callable[[], None]]:
    """Return what is timed: one step, or a short sampling run if the sparse model caches over steps."""
    sparse, values = CASES[case](tokens).eval(), inputs(tokens)
    steps = STEPS if any(isinstance(module, StepCache) for module in sparse.modules()) else 1
    return {
        name: partial(sample, model, values, steps) for name, model in (("dense", dense(tokens)), ("sparse", sparse))
    }


def counted(call: Callable[[], None]) -> int:
    """Return the FLOPs of one call."""
    formulas = {
        torch.ops.moefx.grouped_linear: _served,
        torch.ops.moefx.head_attention: _chosen,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attended,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return int(counter.get_total_flops())


def _served(x: Tensor, weight: Tensor, bias: Any, order: Any, offsets: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(offsets[-1]) * weight.shape[1] * weight.shape[2]


def _chosen(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *_: Any, **__: Any) -> int:
    return 4 * int((gates != 0).sum()) * k.shape[1] * k.shape[3]


def _attended(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return 4 * q.numel() * k.shape[2]


for _formula in (_served, _chosen, _attended):
    vars(_formula)["_get_raw"] = True  # the counter passes values, not shapes


def own_times(call: Callable[[], None]) -> Counter[str]:
    """Return the CPU time in ms that each operation takes itself."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return Counter({event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e3 for event in seen.key_averages()})


def excess(calls: dict[str, Callable[[], None]], ratio: float, shown: int = 4) -> dict[str, float]:
    """Return the operations that take most beyond their share, in ms: the sparse time less ``ratio`` × the dense."""
    before, after = own_times(calls["dense"]), own_times(calls["sparse"])
    beyond = Counter({key: after[key] - ratio * before[key] for key in after.keys() | before.keys()})
    return dict(beyond.most_common(shown))


def measure(case: str, tokens: int, seconds: float) -> dict[str, Any]:
    """Time the dense and the sparse model alternately for about ``seconds``."""
    calls = pair(case, tokens)
    ratio = counted(calls["sparse"]) / counted(calls["dense"])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while len(times["dense"]) < 5 or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    ratios = [s / d for s, d in zip(times["sparse"], times["dense"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case,
        "tokens": tokens,
        "rounds": len(ratios),
        "dense_ms": 1e3 * statistics.median(times["dense"]),
        "sparse_ms": 1e3 * statistics.median(times["sparse"]),
        "time_ratio": middle,
        "quartiles": (low, high),
        "flops_ratio": ratio,
        "reached": ratio / middle,
        "excess": excess(calls, ratio),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Time of denoising steps on the CPU",
        "",
        f"`benchmarks/step_speed.py`, {platform.machine()}, one thread, torch {torch.__version__}, float32, batch 1,",
        f"DiT-B/2 with {BLOCKS} blocks; the cache over {STEPS} steps, the others one. CPU time of the process,",
        "interleaved; median of the ratio of neighbouring runs, quartiles in brackets. FLOPs as counted while running.",
        f"Beyond its share, where less than {AIM:.0%} was reached: operations whose CPU time in the sparse run exceeds",
        "the FLOP ratio times that in the dense run, from the profiler.",
        "",
        "| case | tokens | dense ms | sparse ms | time ratio | FLOP ratio | reached | beyond its share |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        low, high = r["quartiles"]
        reached = f"{r['flops_ratio']:.3f} | {r['reached']:.0%}"
        beyond = "" if r["reached"] >= AIM else ", ".join(f"{key} {ms:.1f} ms" for key, ms in r["excess"].items())
        lines.append(
            f"| {r['case']} | {r['tokens']} | {r['dense_ms']:.0f} | {r['sparse_ms']:.0f} "
            f"| {r['time_ratio']:.3f} [{low:.3f}, {high:.3f}] | {reached} | {beyond} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="time per case")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--results", type=Path, help="folder for step_speed.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in CASES if options.only in name]
    with torch.no_grad():
        rows = [measure(name, tokens, options.seconds) for name in chosen for tokens in options.tokens]
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
