"""Schedules of common shapes, compiled for every target and shipped as data.

``schedules.json`` holds, for the FFNs of published denoisers and each target, the best configuration by the cost model
*after* compilation: with the registers and the shared memory that it really needs, and without those that do not
compile, spill, or do not fit.  ``python -m moefx.codegen.table`` makes it anew, without a device.

Keys: target, K, N, accumulators, gather, dtype, epilogue or none, rows per expert, row tile.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moefx.codegen.schedule import Schedule
    from moefx.codegen.spec import LinearSpec
    from moefx.codegen.targets import Target

PATH = Path(__file__).with_name("schedules.json")
#: (D, F) of DiT-XL/2, a ninth of it, SD3 medium, FLUX.1 and a twelfth of it.
SHAPES = ((1152, 4608), (1152, 512), (1536, 6144), (3072, 12288), (3072, 1024))
LOADS = (64, 256, 1024)
EXPERTS = 8
TARGET_NAMES = ("sm_80", "sm_90", "sm_100", "gfx942")
_COMPILED = 2


def key(spec: LinearSpec, target: Target, load: int, experts: int, block_m: int) -> str:
    """Return the name of a shape class; numbers of experts count by powers of two."""
    plain = "plain" if spec.epilogue.is_identity else f"epilogue{spec.halves}"
    shape = f"{spec.in_features}x{spec.out_features}"
    gather = "gather" if spec.gather else "sorted"
    experts = 1 << max(0, experts - 1).bit_length()
    return f"{target.name} {shape} {plain} {gather} {spec.dtype} load{load} experts{experts} rows{block_m}"


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(PATH.read_text())["schedules"] if PATH.exists() else {}
    return entries


def lookup(spec: LinearSpec, target: Target, load: int, experts: int, block_m: int) -> dict[str, Any] | None:
    """Return the fields of the shipped schedule of a shape class, if there is one; kept products need registers too."""
    return None if spec.keep else _entries().get(key(spec, target, load, experts, block_m))


def standard_specs() -> list[LinearSpec]:
    """Return the projections of a GELU and of a gated FFN for each of the common shapes, in bfloat16."""
    import torch.nn.functional as F

    from moefx.codegen.epilogue import trace_pointwise
    from moefx.codegen.spec import LinearSpec

    found = []
    for width, hidden in SHAPES:
        gelu = trace_pointwise(lambda z: F.gelu(z, approximate="tanh"), hidden)
        swiglu = trace_pointwise(lambda gate, up: F.silu(gate) * up, hidden, inputs=2)
        found += [
            LinearSpec(width, hidden, "bfloat16", True, True, 2, gelu),
            LinearSpec(width, hidden, "bfloat16", True, True, 2, swiglu, weights=2),
            LinearSpec(hidden, width, "bfloat16", True),
        ]
    return found


def best_compiled(spec: LinearSpec, target: Target, load: int, experts: int) -> Schedule | None:
    """Return the cheapest of the first few configurations that compile for ``target`` without a problem."""
    from moefx.codegen import aot
    from moefx.codegen.cost import estimate, occupancy
    from moefx.codegen.reasons import CannotLower
    from moefx.codegen.schedule import ranked

    priced: list[tuple[float, int]] = []
    order = ranked(spec, target, load, experts)
    for i, schedule in enumerate(order):
        try:
            compiled = aot.compile_module(aot.job(spec, schedule, target))
        except CannotLower:
            continue
        if compiled.problems(target):
            continue
        main = compiled.main
        blocks = occupancy(target, main.registers, main.shared_bytes, main.warps)
        priced.append((estimate(spec, schedule, target, load, experts, blocks).seconds, i))
        if len(priced) == _COMPILED:
            break
    return order[min(priced)[1]] if priced else None


def make() -> dict[str, dict[str, Any]]:
    """Compile and return the whole table."""
    import dataclasses
    import os
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from moefx.codegen.schedule import row_tile
    from moefx.codegen.targets import target

    cases = [(s, target(t), load) for t in TARGET_NAMES for s in standard_specs() for load in LOADS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = [pool.submit(best_compiled, spec, device, load, EXPERTS) for spec, device, load in cases]
        best = [one.result() for one in tqdm(waiting)]
    return {
        key(spec, device, load, EXPERTS, row_tile(load)): dataclasses.asdict(found)
        for (spec, device, load), found in zip(cases, best, strict=True)
        if found is not None
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps({"format": 1, "schedules": make()}, indent=0, sort_keys=True) + "\n")
