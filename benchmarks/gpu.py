"""Time routed FFNs, blocks, models and heads against their rivals on one GPU: ``python benchmarks/gpu.py --out DIR``.

Correctness first: every implementation is compared with a loop in float32 before anything is timed, and ours must pass.
Then all run interleaved in one process, each round in its own order and with a cold L2 cache, forward and
forward + backward, eager and as replayed CUDA graphs, under balanced, skewed and one-sided routing.  Every figure is
measured twice, the second time after all others, so that the result tells its own noise.  A share of the floor is the
time that the useful operations or the least traffic would take at the ceilings measured in the same run.

Nothing is downloaded.  The run stops on time (``--budget`` seconds): problems come in order of importance, and what was
not reached is named.  ``--device cpu --quick`` rehearses all of it on toy sizes.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _gpu_report as report
import torch
from _gpu_blocks import BLOCKS, HEADS, QUICK_BLOCKS, QUICK_HEADS, head_calls, model_calls, share_calls
from _gpu_cases import ROUTINGS, Case, Ceilings, Shape, draw_experts, make_case, quick_shapes, standard_shapes
from _gpu_clock import Clock, Timing
from _gpu_peers import Build, implementations, index_add_loop
from torch import Tensor

#: Relative error against float32 that is still a dtype's own rounding.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
NOT_THE_SAME_FUNCTION = "dense, equal FLOPs"


@dataclass
class Session:
    """Options, device and what was found so far."""

    options: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    builders: dict[str, Build]
    deadline: float
    errors: list[dict[str, Any]] = field(default_factory=list)
    ffn: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def is_late(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent."""
        budget = self.options.budget
        return time.monotonic() > self.deadline - (1 - share) * budget

    def leave_out(self, what: str, error: BaseException | str) -> None:
        """Note what could not be measured, and why, in one line."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.left_out.append(f"{what}: {' '.join(text.split())[:240]}")


def ceilings(session: Session) -> Ceilings:
    """Measure one large product and one large copy."""
    size, elements = (256, 2**16) if session.options.quick else (8192, 2**31)
    a, b = (torch.randn(size, size, device=session.device, dtype=session.dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.int8, device=session.device)
    target = torch.empty_like(source)
    found = session.clock.interleaved({"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)})
    return Ceilings(2.0 * size**3 / found["product"].low_s, 2.0 * elements / found["copy"].low_s)


def with_gradients(run: Callable[[], Tensor], case: Case) -> Callable[[], list[Tensor]]:
    """Return a call that runs forward and backward, to all leaves that the implementation uses."""
    leaves = getattr(run, "leaves", case.leaves)

    def call() -> list[Tensor]:
        out = run()
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)]

    return call


def build(builder: Build, case: Case, backward: bool) -> Callable[[], Any]:
    """Return the call to time."""
    run = builder(case)
    if backward:
        return with_gradients(run, case)

    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


# ---------------------------------------------------------------------------------------------------------- correctness


def check(session: Session) -> None:
    """Compare every implementation with a float32 loop; drop the peers that fail, stop if ours does."""
    quick = session.options.quick
    shape = Shape("check", 37, 32, 48, 5, 2) if quick else Shape("check", 1000, 1152, 512, 9, 3)
    for routing in ROUTINGS:
        case = make_case(shape, routing, session.device, session.dtype).train(True)
        if routing == "skewed":  # experts without rows as well
            case.experts.copy_(draw_experts(shape, routing, session.device).clamp(max=shape.experts - 2))
        exact = Case(shape, routing, *(t.detach().float() if t.is_floating_point() else t for t in _tensors(case)))
        want = with_gradients(index_add_loop(exact.train(True)), exact)()
        torch.compiler.reset()
        for name in [n for n in session.builders if n != NOT_THE_SAME_FUNCTION]:
            _check_one(session, name, case, want)


def _tensors(case: Case) -> tuple[Tensor, ...]:
    return case.x, case.experts, case.gates, case.w1, case.w2


def _check_one(session: Session, name: str, case: Case, want: list[Tensor]) -> None:
    try:
        got = build(session.builders[name], case, True)()
        error = max(_relative(a, b) for a, b in zip(got, want, strict=True))
    except Exception as problem:  # a peer may fail in any way; that is a result
        if name.startswith("moefx"):
            raise
        session.leave_out(name, problem)
        del session.builders[name]
        return
    session.errors.append(
        {"implementation": name, "problem": case.routing, "error": error, "error_text": f"{error:.1e}"}
    )
    if not error <= TOLERANCE[session.dtype]:
        if name.startswith("moefx"):
            raise SystemExit(f"{name}, {case.routing}: relative error {error:.1e}; nothing was timed")
        session.leave_out(name, f"relative error {error:.1e} under {case.routing} routing")
        del session.builders[name]


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


# ----------------------------------------------------------------------------------------------------------- routed FFN


def problems(session: Session) -> Iterator[tuple[Shape, str, bool]]:
    """Yield what to time: every shape balanced, the first of them under other routings too."""
    shapes = quick_shapes() if session.options.quick else standard_shapes()
    for i, shape in enumerate(shapes):
        for routing in ROUTINGS if i < len(shapes) // 6 + 1 else ROUTINGS[:1]:
            for backward in (False, True):
                yield shape, routing, backward


def time_ffn(session: Session, shape: Shape, routing: str, backward: bool, found: Ceilings) -> list[dict[str, Any]]:
    """Time all implementations on one problem, eager and as graphs."""
    case = make_case(shape, routing, session.device, session.dtype).train(backward)
    torch.compiler.reset()
    calls, facts = _prepared(session, case, backward)
    modes: dict[str, dict[str, Callable[[], Any]]] = {"eager": calls}
    if session.clock.is_cuda:
        modes["graph"] = _graphs(session, calls, shape)
    rows = []
    for mode, ready in modes.items():
        for name, timing in session.clock.interleaved(ready).items():
            rows.append(_row(shape, routing, backward, mode, name, timing, found) | facts[name])
    return rows


def _prepared(
    session: Session, case: Case, backward: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """Build and first-call every implementation; note what the first call took and what a later one needs."""
    from moefx.codegen import tune

    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, builder in session.builders.items():
        before = tune.spent_s()
        try:
            call = build(builder, case, backward)
            first = session.clock.first_call_s(call)
            peak = session.clock.peak_bytes(call)
            facts[name] = {
                "first_call_s": first,
                "tuning_s": tune.spent_s() - before,
                "launches": session.clock.launches(call),
                "peak_mb": None if peak is None else peak / 1e6,
            }
        except Exception as error:  # out of memory, unsupported sizes: a result, not the end of the run
            session.leave_out(f"{name} on {case.shape.name}", error)
            continue
        calls[name] = call
    return calls, facts


def _graphs(session: Session, calls: dict[str, Callable[[], Any]], shape: Shape) -> dict[str, Callable[[], Any]]:
    found = {}
    for name, call in calls.items():
        if "loop" in name or "padded" in name:
            continue  # they read counts on the host; a failed capture would poison the stream
        try:
            found[name] = session.clock.graphed(call)
        except Exception as error:
            session.leave_out(f"graph of {name} on {shape.name}", error)
            torch.cuda.synchronize()
    return found


def _row(
    shape: Shape, routing: str, backward: bool, mode: str, name: str, timing: Timing, found: Ceilings
) -> dict[str, Any]:
    floor = found.floor_s(shape, backward)
    return {
        "shape": shape.name, "routing": routing, "direction": "forward + backward" if backward else "forward",
        "mode": mode, "implementation": name, "us": 1e6 * timing.median_s, "low_us": 1e6 * timing.low_s,
        "high_us": 1e6 * timing.high_s, "tflops": shape.flops(backward) / timing.median_s / 1e12,
        "floor_us": 1e6 * floor, "floor_percent": 100 * floor / timing.median_s, "bound": found.bound(shape, backward),
    }  # fmt: skip


def run_ffn(session: Session, found: Ceilings) -> None:
    """Time every problem once, then every problem again."""
    done: list[tuple[Shape, str, bool]] = []
    for problem in problems(session):
        if session.is_late(0.5):
            session.leave_out(f"{problem[0].name}, {problem[1]}", "no time left")
            continue
        session.ffn += time_ffn(session, *problem, found)
        done.append(problem)
        _free(session)
    again = {_key(row): row for row in session.ffn}
    for problem in done:
        if session.is_late(0.75):
            session.leave_out(f"second measurement of {problem[0].name}, {problem[1]}", "no time left")
            continue
        for row in time_ffn(session, *problem, found):
            if _key(row) in again:
                again[_key(row)]["us_again"] = row["us"]
        _free(session)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "routing", "direction", "mode", "implementation"))


def _free(session: Session) -> None:
    gc.collect()
    if session.clock.is_cuda:
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------- blocks, models and heads


def run_steps(session: Session) -> None:
    """Time the parts of routed layers, whole blocks, one whole model and routed heads."""
    quick = session.options.quick
    for shape in QUICK_BLOCKS if quick else BLOCKS[1:]:
        parts = f"parts of the FFN of a {shape.name}"
        _time_steps(session, parts, "forward", lambda s=shape: share_calls(s, session.device, session.dtype, quick))
    for shape in QUICK_BLOCKS if quick else BLOCKS:
        for train in (True,) if quick else (False, True):
            name = "forward + backward" if train else "forward"
            _time_steps(session, shape.name, name, lambda s=shape, t=train: _models(session, s, 1, t))
    shape, depth = (QUICK_BLOCKS[0], 2) if quick else (BLOCKS[0], 28)
    _time_steps(session, f"{depth} of {shape.name}", "forward", lambda: _models(session, shape, depth, False))
    for heads in QUICK_HEADS if quick else HEADS:
        _time_steps(session, heads.name, "forward", lambda h=heads: head_calls(h, session.device, session.dtype))


def _models(session: Session, shape: Any, depth: int, train: bool) -> dict[str, Callable[[], Any]]:
    return model_calls(shape, depth, session.device, session.dtype, session.options.quick, train)


def _time_steps(session: Session, shape: str, direction: str, make: Callable[[], dict[str, Callable[[], Any]]]) -> None:
    if session.is_late(0.95):
        session.leave_out(shape, "no time left")
        return
    try:
        calls = make()
        first = {name: session.clock.first_call_s(call) for name, call in calls.items()}
        timings = [session.clock.interleaved(calls) for _ in range(2)]
    except Exception as error:
        if session.options.quick:
            raise
        session.leave_out(f"{shape}, {direction}", error)
        return
    base = next(iter(timings[0].values())).median_s
    for name, timing in timings[0].items():
        again = timings[1][name].median_s
        session.steps.append(
            {"shape": shape, "direction": direction, "implementation": name, "us": 1e6 * timing.median_s,
             "us_again": 1e6 * again, "over_first": timing.median_s / base, "first_call_s": first[name]}
        )  # fmt: skip
    del calls
    _free(session)


# ---------------------------------------------------------------------------------------------------------------- main


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for package in ("triton", "transformers"):
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
    clock = Clock(device, 2 if options.quick else options.rounds)
    builders = implementations(device, options.quick, options.peers)
    session = Session(options, device, dtype, clock, builders, start + options.budget)
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        check(session)
        found = ceilings(session)
        run_ffn(session, found)
        run_steps(session)
    result = {
        "format": "moefx.gpu", "quick": options.quick, "machine": machine(device), "dtype": str(dtype),
        "ceilings": {"tflops": found.flops_per_s / 1e12, "tb_per_s": found.bytes_per_s / 1e12},
        "seconds": time.monotonic() - start, "errors": session.errors, "ffn": report.with_ratios(session.ffn),
        "steps": session.steps, "left_out": session.left_out,
    }  # fmt: skip
    files = report.write(result, options.out)
    print(report.document(result))
    print(f"{result['seconds']:.0f} s; wrote {', '.join(str(path) for path in files)}", file=sys.stderr)


if __name__ == "__main__":
    main()
