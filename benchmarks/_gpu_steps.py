"""Whole blocks, whole models, parts of routed layers and heads for ``gpu.py``: what is timed, and its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _gpu_blocks import (
    BLOCKS,
    HEADS,
    QUICK_BLOCKS,
    QUICK_HEADS,
    head_makers,
    model_makers,
    share_makers,
)
from _gpu_cases import BACKWARD, FORWARD, Ceilings
from _gpu_session import Call, Session

Makers = dict[str, Callable[[], Call]]


def run_steps(session: Session, found: Ceilings) -> None:
    """Time the parts of routed layers, whole blocks, one whole model and routed heads, in the order of importance."""
    quick, device, dtype = session.options.quick, session.device, session.dtype
    blocks = QUICK_BLOCKS if quick else BLOCKS
    for shape in blocks[-2:]:
        _time(session, f"parts of the FFN of a {shape.name}", FORWARD, share_makers(shape, device, dtype, quick), None)
    for shape in blocks:
        for direction in (BACKWARD,) if quick else (FORWARD, BACKWARD):
            makers = model_makers(shape, 1, device, dtype, quick, direction)
            _time(session, shape.name, direction, makers, shape.flops(direction) / found.flops_per_s)
    shape, depth = (blocks[0], 2) if quick else (blocks[0], 28)
    for direction in (FORWARD,) if quick else (FORWARD, BACKWARD):
        floor = depth * shape.flops(direction) / found.flops_per_s
        makers = model_makers(shape, depth, device, dtype, quick, direction)
        _time(session, f"{depth} of {shape.name}", direction, makers, floor)
    for heads in QUICK_HEADS if quick else HEADS:
        for direction in (FORWARD, BACKWARD):
            floor = heads.flops(direction) / found.flops_per_s
            _time(session, heads.name, direction, head_makers(heads, device, dtype, quick, direction), floor)


def _time(session: Session, shape: str, direction: str, makers: Makers, floor_s: float | None) -> None:
    """Time the calls of one problem, twice, eager and as graphs; ratios are to the first of them."""
    if session.is_late(0.96):
        session.leave_out(f"{shape}, {direction}", "no time left")
        return
    before = len(session.left_out)
    calls, facts = session.prepared(makers, f"{shape}, {direction}")
    if session.options.quick and len(session.left_out) > before:
        raise SystemExit(session.left_out[-1])
    for mode, ready in session.modes(calls, shape).items():
        first, second = (session.clock.interleaved(ready) for _ in range(2))
        base = next(iter(first.values())).median_s
        for name, timing in first.items():
            row: dict[str, Any] = {
                "shape": shape, "direction": direction, "mode": mode, "implementation": name,
                "us": 1e6 * timing.median_s, "us_again": 1e6 * second[name].median_s,
                "over_first": timing.median_s / base, "floor_us": None if floor_s is None else 1e6 * floor_s,
                "floor_percent": None if floor_s is None else 100 * floor_s / timing.median_s,
            }  # fmt: skip
            session.steps.append(row | facts[name])
    del calls
    session.free()
