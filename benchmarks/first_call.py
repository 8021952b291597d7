"""What the first call of lowered kernels costs on the host: emission, compilation, and the same with a warm cache.

Needs no GPU: kernels are compiled for a named target. Times are processor seconds, of this process and its children, so
that a busy machine does not count; the second column is what a later process pays.

    python benchmarks/first_call.py --target sm_90 --model flux --training

Nothing is timed on a device here: what that may take at most in one process is ``MOEFX_AUTOTUNE_SECONDS``.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from moefx.codegen import (
    CombineSpec,
    LinearSpec,
    RegionSpec,
    Target,
    aot,
    attention,
    backward,
    runtime,
    store,
    target,
    trace_pointwise,
    tune,
)
from moefx.codegen.schedule import Schedule, load_class
from moefx.codegen.spec import KernelSpec

#: (D, F, H, d) of a block.
MODELS = {"dit": (1152, 4608, 16, 72), "flux": (3072, 12288, 24, 128)}
EXPERTS, ROWS = 8, 8192


def processor_s() -> float:
    """Return the processor time of this process and of its finished children."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the processor seconds it took."""
    start = processor_s()
    return function(), processor_s() - start


def region(width: int, hidden: int) -> RegionSpec:
    """Return a routed FFN in bfloat16."""
    gelu = trace_pointwise(lambda z: F.gelu(z, approximate="tanh"), hidden)
    up = LinearSpec(width, hidden, "bfloat16", True, True, 2, gelu)
    return RegionSpec((up, LinearSpec(hidden, width, "bfloat16", True)), CombineSpec(width, 2, "bfloat16"))


def kernels(model: str, device: Target, training: bool) -> list[tuple[KernelSpec, Schedule | None]]:
    """Return the kernels of a model's routed FFN and of its routed heads: all of its layers share them."""
    width, hidden, heads, head_width = MODELS[model]
    routed, load = region(width, hidden), load_class(ROWS, EXPERTS)
    forward = backward.training_region(routed) if training else routed
    schedules = [*runtime.schedules(forward, device, load * EXPERTS, EXPERTS), None]
    found: list[tuple[KernelSpec, Schedule | None]] = list(zip(forward.kernels, schedules, strict=True))
    block_m = runtime.row_block(device, load)
    more = attention.specs(head_width, heads, "bfloat16", "ieee")[: 3 if training else 1]
    for spec in [*(backward.kernels(routed) if training else []), *more]:
        is_sum = isinstance(spec, CombineSpec)
        found.append((spec, None if is_sum else tune.schedule_for(spec, device, load, EXPERTS, block_m)))
    return found


def main() -> None:
    """Measure and print one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--model", choices=sorted(MODELS), default="dit")
    parser.add_argument("--training", action="store_true", help="with the gradients")
    options = parser.parse_args()
    device = target(options.target)
    print(f"{'kernel':58} {'emit s':>8} {'cold s':>8} {'warm s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        store.cache_folder = lambda: Path(folder)
        totals = [0.0, 0.0, 0.0]
        start = time.perf_counter()
        for spec, schedule in kernels(options.model, device, options.training):
            job, emitted = timed(lambda spec=spec, schedule=schedule: aot.job(spec, schedule, device))
            _, cold = timed(lambda job=job: aot.compile_module(job))
            _, warm = timed(lambda job=job: aot.compile_module(job))
            totals = [a + b for a, b in zip(totals, (emitted, cold, warm), strict=True)]
            print(f"{spec.name:58} {emitted:8.3f} {cold:8.2f} {warm:8.4f}")
        print(f"{'all':58} {totals[0]:8.3f} {totals[1]:8.2f} {totals[2]:8.4f}")
        print(f"{time.perf_counter() - start:.1f} s passed meanwhile")


if __name__ == "__main__":
    main()
