"""Time routed FFNs, blocks, models and heads against their rivals on one GPU: ``python benchmarks/gpu.py --out DIR``.

In this order, so that a run that is cut short has what matters most:

1. Correctness: every implementation is compared with a loop in float32, also with experts that have no rows and with
   few rows per expert; a peer that fails is left out, ours must pass.
2. Ceilings: one large product and one large copy. A share of the floor is the time that the useful operations, or the
   least traffic, would take at them.
3. The cost model: its constants are fitted to the device and kept (``--no-calibration`` leaves them), and every form of
   a kernel is timed, compared in a replayed graph, and set beside what the model and the disassembly said.
4. Routed FFNs of published denoisers beside all peers: forward, forward of training, forward + backward; balanced,
   skewed, one-sided and recorded routing; microseconds, TFLOP/s, share of the floor, launches, peak memory, first call
   and tuning.
5. What router, grouping and combine take of a layer; whole blocks; a whole model; heads.

All that is compared runs interleaved in one process, each round in its own order and with a cold L2 cache, eager and as
replayed CUDA graphs.  Every figure is measured twice, so that the result tells its own noise.

Nothing is downloaded; peers beside torch and transformers take part where they are installed, or by ``--peers``.  The
run stops on time (``--budget`` seconds), and what was not reached is named.  ``--device cpu --quick`` rehearses all of
it on toy sizes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import _gpu_report as report
import torch
from _gpu_cases import Ceilings
from _gpu_clock import Clock
from _gpu_ffn import check, run_ffn
from _gpu_peers import implementations, moefx_kernels, rehearsal_options
from _gpu_schedules import calibrate, run_schedules
from _gpu_session import Session
from _gpu_steps import run_steps


def ceilings(session: Session) -> Ceilings:
    """Measure one large product and one large copy."""
    size, elements = (256, 2**16) if session.options.quick else (8192, 2**32)
    a, b = (torch.randn(size, size, device=session.device, dtype=session.dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.int8, device=session.device)
    target = torch.empty_like(source)
    found = session.clock.interleaved({"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)})
    return Ceilings(2.0 * size**3 / found["product"].low_s, 2.0 * elements / found["copy"].low_s)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-calibration", action="store_true", help="leave the cost model's constants as they are")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on CPU")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything run?")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each measurement")
    parser.add_argument("--peers", type=Path, help="folder of files with a function build(case)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for JSON, table and plot")
    return parser.parse_args(arguments)


def machine(device: torch.device) -> dict[str, str]:
    """Name what the figures hold for."""
    import importlib.metadata as metadata

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"device": name, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "transformers", "liger-kernel", "scattermoe"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def main(arguments: list[str] | None = None) -> None:
    """Run all of it and write the result."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; rehearse with --device cpu --quick")
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    start = time.monotonic()
    clock = Clock(device, 1 if options.quick else options.rounds)
    # A process of users spends less; here every shape is to have its measured choice.
    os.environ.setdefault("MOEFX_AUTOTUNE_SECONDS", f"{options.budget / 5:.0f}")
    builders = implementations(device, options.quick, options.peers)
    session = Session(options, device, dtype, clock, builders, start + options.budget)
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        check(session)
        if options.quick:
            builders["moefx"] = moefx_kernels(rehearsal_options())
        found = ceilings(session)
        session.free()
        if not options.no_calibration:
            calibrate(session)
        run_schedules(session)
        run_ffn(session, found)
        run_steps(session, found)
    result = {
        "format": "moefx.gpu", "quick": options.quick, "machine": machine(device), "dtype": str(dtype),
        "ceilings": {"tflops": found.flops_per_s / 1e12, "tb_per_s": found.bytes_per_s / 1e12},
        "seconds": time.monotonic() - start, "errors": session.errors, "calibration": session.calibration,
        "schedules": session.schedules, "ffn": report.with_ratios(session.ffn), "steps": session.steps,
        "left_out": session.left_out,
    }  # fmt: skip
    files = report.write(result, options.out)
    print(report.document(result))
    print(f"{result['seconds']:.0f} s; wrote {', '.join(str(path) for path in files)}", file=sys.stderr)


if __name__ == "__main__":
    main()
