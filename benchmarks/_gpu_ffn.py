"""Routed FFNs for ``gpu.py``: every implementation compared with a loop in float32, then timed beside all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from _gpu_cases import (
    BACKWARD,
    DIRECTIONS,
    FORWARD,
    ROUTINGS,
    TRAINING,
    Build,
    Case,
    Ceilings,
    NotHere,
    Shape,
    draw_experts,
    make_case,
    quick_shapes,
    standard_shapes,
)
from _gpu_clock import Timing
from _gpu_peers import index_add_loop
from _gpu_session import Call, Session
from torch import Tensor

Problem = tuple[Shape, str, str]
#: Relative error against float32 that is still a dtype's own rounding.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def with_gradients(run: Callable[[], Tensor], case: Case) -> Callable[[], list[Tensor]]:
    """Return a call that runs forward and backward, to all leaves that the implementation uses."""
    leaves = getattr(run, "leaves", case.leaves)

    def call() -> list[Tensor]:
        out = run()
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)]

    return call


def build(builder: Build, case: Case, direction: str) -> Call:
    """Return the call to time; a forward pass of training keeps what its gradient would read."""
    run = builder(case)
    if direction == BACKWARD:
        return with_gradients(run, case)
    if direction == TRAINING:
        return run

    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


# ---------------------------------------------------------------------------------------------------------- correctness


def check(session: Session) -> None:
    """Compare every implementation with a float32 loop; drop the peers that fail, stop if ours does."""
    for shape, routing, _ in rehearsal()[:2] if session.options.quick else standard_checks():
        _check_problem(session, shape, routing)


def standard_checks() -> list[Problem]:
    """Return every routing, and few rows per expert, gated."""
    found = [(Shape("check", 1000, 1152, 512, 9, 3), routing, BACKWARD) for routing in ROUTINGS]
    return [*found, (Shape("check", 40, 1152, 512, 9, 2, gated=True), ROUTINGS[0], BACKWARD)]


def rehearsal() -> list[Problem]:
    """Return every routing, direction and activation once, on toy sizes."""
    plain, gated = quick_shapes()
    return [
        (plain, "skewed", BACKWARD),
        (gated, "balanced", FORWARD),
        (plain, "all to one", TRAINING),
        (plain, "recorded", FORWARD),
    ]


def _check_problem(session: Session, shape: Shape, routing: str) -> None:
    case = make_case(shape, routing, session.device, session.dtype).train(True)
    if routing == "skewed":  # experts without rows as well
        case.experts.copy_(draw_experts(shape, routing, session.device).clamp(max=shape.experts - 2))
    tensors = (case.x, case.experts, case.gates, case.w1, case.w2)
    exact = Case(shape, routing, *(t.detach().float() if t.is_floating_point() else t for t in tensors))
    want = with_gradients(index_add_loop(exact.train(True)), exact)()
    torch.compiler.reset()
    for name in [n for n in session.builders if not n.startswith("dense")]:
        _check_one(session, name, case, want)


def _check_one(session: Session, name: str, case: Case, want: list[Tensor]) -> None:
    try:
        got = _results(session.builders[name], case)
        error = max(_relative(a, b) for a, b in zip(got, want, strict=False))
    except NotHere:
        return
    except Exception as problem:  # a peer may fail in any way; that is a result
        if name.startswith("moefx"):
            raise
        session.leave_out(name, problem)
        del session.builders[name]
        return
    gated = ", gated" if case.shape.gated else ""
    session.errors.append(
        {"implementation": name, "problem": case.routing + gated, "error": error, "error_text": f"{error:.1e}"}
    )
    if not error <= TOLERANCE[session.dtype]:
        if name.startswith("moefx"):
            raise SystemExit(f"{name}, {case.routing}: relative error {error:.1e}; nothing was timed")
        session.leave_out(name, f"relative error {error:.1e} under {case.routing} routing")
        del session.builders[name]


def _results(builder: Build, case: Case) -> list[Tensor]:
    """Return result and gradients, or the result alone of what only infers."""
    try:
        found: list[Tensor] = build(builder, case, BACKWARD)()
    except NotHere:
        x = case.x.detach()
        found = [build(builder, replace(case, x=x), FORWARD)()]
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


# --------------------------------------------------------------------------------------------------------------- timing


def problems(session: Session) -> Iterator[Problem]:
    """Yield what to time: every shape balanced; the first of them under other routings and in training too."""
    if session.options.quick:
        yield from rehearsal()
        return
    shapes = standard_shapes()
    first = len(shapes) // 6 + 1
    for i, shape in enumerate(shapes):
        for routing in ROUTINGS if i < first else ROUTINGS[:1]:
            for direction in DIRECTIONS if (i < first and routing == ROUTINGS[0]) else (FORWARD, BACKWARD):
                yield shape, routing, direction


def time_ffn(session: Session, problem: Problem, found: Ceilings) -> list[dict[str, Any]]:
    """Time all implementations on one problem, eager and as graphs."""
    shape, routing, direction = problem
    case = make_case(shape, routing, session.device, session.dtype).train(direction != FORWARD)
    torch.compiler.reset()
    makers = {name: lambda b=b: build(b, case, direction) for name, b in session.builders.items()}
    calls, facts = session.prepared(makers, shape.name)
    return [
        _row(problem, mode, name, timing, found) | facts[name]
        for mode, ready in session.modes(calls, shape.name).items()
        for name, timing in session.clock.interleaved(ready).items()
    ]


def _row(problem: Problem, mode: str, name: str, timing: Timing, found: Ceilings) -> dict[str, Any]:
    shape, routing, direction = problem
    floor = found.floor_s(shape, direction)
    return {
        "shape": shape.name, "routing": routing, "direction": direction, "mode": mode, "implementation": name,
        "us": 1e6 * timing.median_s, "low_us": 1e6 * timing.low_s, "high_us": 1e6 * timing.high_s,
        "tflops": shape.flops(direction) / timing.median_s / 1e12, "floor_us": 1e6 * floor,
        "floor_percent": 100 * floor / timing.median_s, "bound": found.bound(shape, direction),
    }  # fmt: skip


def run_ffn(session: Session, found: Ceilings) -> None:
    """Time every problem once, then every problem again."""
    done: list[Problem] = []
    for problem in problems(session):
        if session.is_late(0.55):
            session.leave_out(", ".join((problem[0].name, *problem[1:])), "no time left")
            continue
        session.ffn += time_ffn(session, problem, found)
        done.append(problem)
        session.free()
    again = {_key(row): row for row in session.ffn}
    for problem in done:
        if session.is_late(0.78):
            session.leave_out(f"second measurement of {', '.join((problem[0].name, *problem[1:]))}", "no time left")
            continue
        for row in time_ffn(session, problem, found):
            if _key(row) in again:
                again[_key(row)]["us_again"] = row["us"]
        session.free()


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "routing", "direction", "mode", "implementation"))
