"""What the first call of lowered kernels costs on the host: emission, compilation, and the same with a warm cache.

Needs no GPU: kernels are compiled for a named target. Times are processor seconds, of this process and its children, so
that a busy machine does not count; the second column is what a later process pays.

    python benchmarks/first_call.py --target sm_90
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

from moefx.codegen import CombineSpec, LinearSpec, RegionSpec, aot, runtime, store, target, trace_pointwise
from moefx.codegen.schedule import load_class

WIDTH, HIDDEN, EXPERTS, ROWS = 1152, 4608, 8, 8192


def processor_s() -> float:
    """Return the processor time of this process and of its finished children."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the processor seconds it took."""
    start = processor_s()
    return function(), processor_s() - start


def region() -> RegionSpec:
    """Return the routed FFN of DiT-XL/2 in bfloat16."""
    up = LinearSpec(
        WIDTH, HIDDEN, "bfloat16", True, True, 2, trace_pointwise(lambda z: F.gelu(z, approximate="tanh"), HIDDEN)
    )
    return RegionSpec((up, LinearSpec(HIDDEN, WIDTH, "bfloat16", True)), CombineSpec(WIDTH, 2, "bfloat16"))


def main() -> None:
    """Measure and print one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90")
    device = target(parser.parse_args().target)
    routed, load = region(), load_class(ROWS, EXPERTS)
    print(f"{'kernel':58} {'emit s':>8} {'cold s':>8} {'warm s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        store.cache_folder = lambda: Path(folder)
        schedules = [*runtime.schedules(routed, device, load * EXPERTS, EXPERTS), None]
        totals = [0.0, 0.0, 0.0]
        start = time.perf_counter()
        for spec, schedule in zip(routed.kernels, schedules, strict=True):
            job, emitted = timed(lambda spec=spec, schedule=schedule: aot.job(spec, schedule, device))
            _, cold = timed(lambda job=job: aot.compile_module(job))
            _, warm = timed(lambda job=job: aot.compile_module(job))
            totals = [a + b for a, b in zip(totals, (emitted, cold, warm), strict=True)]
            print(f"{spec.name:58} {emitted:8.3f} {cold:8.2f} {warm:8.4f}")
        print(f"{'all':58} {totals[0]:8.3f} {totals[1]:8.2f} {totals[2]:8.4f}")
        print(f"{time.perf_counter() - start:.1f} s passed meanwhile")


if __name__ == "__main__":
    main()
