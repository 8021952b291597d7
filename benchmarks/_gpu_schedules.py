"""The cost model on the device at hand, for ``gpu.py``: its constants fitted, and every form of a kernel beside it.

What cannot be known without a device: whether divided warps compute the same, also in a replayed graph; from which load
on rows are better permuted for descriptors than gathered by pointers; what K in parts and swapped operands give few
rows; and whether a loaded kernel has the registers and spills that its disassembly said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_session import Session

from moefx.codegen import LinearSpec, Schedule, aot, cost, emit, store, trace_pointwise
from moefx.codegen.calibrate import calibrate_device
from moefx.codegen.runtime import interpreting
from moefx.codegen.schedule import row_tile, short_list
from moefx.codegen.targets import target_of
from moefx.codegen.tune import DeviceTimer, ShapeClass

LOADS, EXPERTS = (4, 64, 1024), 8
_TOLERANCE = 2e-2
gelu = partial(F.gelu, approximate="tanh")


def specs(quick: bool) -> dict[str, LinearSpec]:
    """Return the projections whose forms are compared."""
    if quick:
        return {"toy up": LinearSpec(24, 40, "float32", True, True, 2, trace_pointwise(gelu, 40))}
    return {
        "DiT-XL/2 up": LinearSpec(1152, 4608, "bfloat16", True, True, 2, trace_pointwise(gelu, 4608)),
        "DiT-XL/2 down": LinearSpec(4608, 1152, "bfloat16", True),
        "FLUX up": LinearSpec(3072, 12288, "bfloat16", True, True, 2, trace_pointwise(gelu, 12288)),
    }


def calibrate(session: Session) -> None:
    """Fit the constants of the cost model and keep them: later choices of this run, and of later ones, use them."""
    if not session.clock.is_cuda:
        session.leave_out("calibration", "no device to fit the cost model to")
        return
    target = target_of(session.device)
    before = cost.constants_of(target)
    try:
        after = calibrate_device(session.left_s(0.12), specs(False).values())
    except Exception as error:  # too little time or too few kernels that run: the priors stay
        session.leave_out("calibration", error)
        return
    session.calibration = {"target": target.name, "before": vars(before), "after": vars(after)}


def run_schedules(session: Session) -> None:
    """Time the best schedule of every form under several loads, check it, and note what the model said."""
    if not (session.clock.is_cuda or interpreting()):
        session.leave_out("forms of kernels", "no device, and Triton's interpreter is off")
        return
    for kernel, spec in specs(session.options.quick).items():
        for load in LOADS[:1] if session.options.quick else LOADS:
            if session.is_late(0.2):
                session.leave_out(f"forms of {kernel}, {load} rows per expert", "no time left")
                continue
            _time_forms(session, kernel, _shape(session, spec, load))
            session.free()


def _shape(session: Session, spec: LinearSpec, load: int) -> ShapeClass:
    target = target_of(session.device)
    return ShapeClass(spec, target, str(session.device), load, EXPERTS, 16 if target.is_interpreter else row_tile(load))


def forms(shape: ShapeClass) -> Iterator[Schedule]:
    """Yield the best schedule of each form."""
    assert isinstance(shape.spec, LinearSpec)
    seen = set()
    for one in short_list(shape.spec, shape.target, shape.load, shape.experts, shape.block_m):
        form = (one.form, one.parts > 1)
        if form not in seen:
            seen.add(form)
            yield one


def _time_forms(session: Session, kernel: str, shape: ShapeClass) -> None:
    timer = DeviceTimer(shape, session.device)
    for schedule in forms(shape):
        name = f"{kernel}, {shape.load} rows per expert, {schedule.describe()}"
        try:
            call = timer.ready(schedule)
            if session.clock.is_cuda:
                _check_replay(session, timer, session.clock.graphed(call))
            first, second = (session.clock.interleaved({name: call})[name].median_s for _ in range(2))
        except Exception as error:  # a compiler may raise anything, and a wrong result is one too
            session.leave_out(name, error)
            continue
        session.schedules.append(_row(session, kernel, shape, schedule, first, second))


def _check_replay(session: Session, timer: DeviceTimer, replay: Callable[[], Any]) -> None:
    for found, _ in timer.trial.pairs():
        found.fill_(torch.nan)
    replay()
    error = timer.trial.error()
    if not error < _TOLERANCE:
        raise ArithmeticError(f"relative error {error:.1e} of a replayed graph")


def _row(
    session: Session, kernel: str, shape: ShapeClass, schedule: Schedule, first: float, second: float
) -> dict[str, Any]:
    assert isinstance(shape.spec, LinearSpec)
    said = cost.estimate(shape.spec, schedule, shape.target, shape.load, shape.experts)
    return {
        "kernel": kernel, "load": shape.load, "schedule": schedule.describe(), "us": 1e6 * first,
        "us_again": 1e6 * second, "model_us": 1e6 * said.seconds, "floor_percent": 100 * said.floor_s / first,
        "bound": "memory" if said.is_memory_bound else "compute", **_registers(session, shape, schedule),
    }  # fmt: skip


def _registers(session: Session, shape: ShapeClass, schedule: Schedule) -> dict[str, Any]:
    """Return registers and spills of the loaded kernel, and those of its disassembly."""
    if not session.clock.is_cuda:
        return {}
    module = store.load(emit(shape.spec, schedule), shape.spec.name)
    loaded = [kernel for caches in module.kernel.device_caches.values() for kernel in caches[0].values()]
    read = aot.compile_module(aot.job(shape.spec, schedule, shape.target)).main
    return {
        "registers": str(loaded[-1].n_regs), "spills": str(loaded[-1].n_spills),
        "read_registers": str(read.registers), "read_spills": str(read.spill_bytes),
    }  # fmt: skip
